"""What the client scripts share: where the server is, and what it says of itself.

Every script is called as `script.py URL GRPC_ADDRESS KEY`. Texts are only compared with each other,
never with what a good model would write; any bundle will do whose tasks know the control `words`.
"""

import contextlib
import json
import sys
import time
import urllib.request

URL, GRPC, KEY = sys.argv[1:4]
BEARER = f"Bearer {KEY}"

# Greedy, and short enough to fit into any context.
GREEDY = dict(temperature=0, max_tokens=12)


def fetch(path, body=None):
    """The JSON that a route of the server answers; with a body it is a POST."""
    headers = {"authorization": BEARER, "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers)) as reply:
        return json.load(reply)


def tasks():
    """The names of the server's tasks."""
    return [task["id"] for task in fetch("/v1/tasks")["data"]]


def model():
    """The name of the bundle: the model without a parent."""
    return next(m["id"] for m in fetch("/v1/models")["data"] if not m.get("parent"))


def metric(name, **labels):
    """The sum of a metric's series that have these labels."""
    request = urllib.request.Request(f"{URL}/metrics", headers={"authorization": BEARER})
    with urllib.request.urlopen(request) as reply:
        lines = reply.read().decode().splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    series = (line.rsplit(" ", 1) for line in lines if line.split("{")[0].split(" ")[0] == name)
    return sum(float(value) for key, value in series if all(label in key for label in wanted))


def cancelled():
    """How many requests the server has counted as left by their clients."""
    return metric("shoal_requests_total", outcome="cancelled")


def idle():
    """Whether the server runs nothing and holds nothing back."""
    return metric("shoal_requests_running") + metric("shoal_requests_waiting") == 0


def until(condition, what):
    """Waits for what the server does by itself, for at most 10 seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"{what} was waited for in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def left_early():
    """A client that leaves in mid-stream: the server sees it, and nothing of the request stays."""
    before = cancelled()
    yield
    until(lambda: cancelled() == before + 1, "a cancelled request")
    until(idle, "a server with nothing to do")


def refused(kind, call, *words):
    """The error that `call` raises: of exactly this kind, and its text names all of `words`."""
    try:
        call()
    except kind as error:
        assert type(error) is kind, f"{type(error)} instead of {kind}"
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def adds_up(usage):
    """Whether a usage, as a dict, is the sum of its parts."""
    parts = usage["prompt_tokens"], usage["completion_tokens"]
    return min(parts) > 0 and usage["total_tokens"] == sum(parts)
