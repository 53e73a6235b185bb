"""schemathesis reads /openapi.json and looks for requests whose answers it does not allow.

All checks: no 5xx, no undocumented status, type or body, keys asked for where they are needed, what
the schema allows is taken and what it forbids is refused. SCHEMATHESIS_SECONDS is how long.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import BEARER, URL, fetch


def main():
    document = fetch("/openapi.json")
    operations = sum(len(item) for item in document["paths"].values())
    assert document["openapi"].startswith("3.") and operations > 10
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += ["--config-file", str(Path(__file__).with_name("schemathesis.toml").resolve())]
    command += ["run", f"{URL}/openapi.json"]
    command += ["--header", f"Authorization: {BEARER}", "--checks", "all", "--workers", "1"]
    command += ["--max-time", os.environ["SCHEMATHESIS_SECONDS"], "--no-color"]
    # Its reports and its database of examples are not kept.
    command += ["--generation-database", "none", "--request-timeout", "60", "--max-response-time", "60"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True)
    print(f"schemathesis {importlib.metadata.version('schemathesis')}: {operations} operations")


main()
