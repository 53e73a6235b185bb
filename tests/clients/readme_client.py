"""The README's Python, as it stands there: only the address and the key are this server's."""

import contextlib
import io
import re
from pathlib import Path

from shared import KEY, URL

README = Path(__file__).parents[2] / "README.md"


def replaced(block, old, new):
    assert old in block, f"{old} is not in the README's Python:\n{block}"
    return block.replace(old, new)


def main():
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, "the README has no Python"
    for block in blocks:
        block = replaced(block, "http://127.0.0.1:8000", URL)
        block = replaced(block, 'api_key="unused"', f'api_key="{KEY}"')
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(README), "exec"), {})
        assert printed.getvalue().strip(), f"it prints nothing:\n{block}"
    print(f"{len(blocks)} in Python: {printed.getvalue().strip()}")


main()
