"""guidellm drives a short load by completions and by chats, and everything that it asks is answered.

It is installed without PyTorch, of which it uses the data loader only: `stand_in/torch.py`.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import KEY, URL, idle, tasks, until

HERE = Path(__file__).parent
TOKENIZER = os.environ.get("BUNDLE", HERE / "../../models/prompter")


def load(constraint, route, task):
    """Runs one benchmark and gives guidellm's report of it."""
    backend = f"kind=openai_http,target={URL},model={task},request_format={route},api_key={KEY}"
    command = [str(Path(sys.executable).with_name("guidellm")), "run"]
    command += ["--backend", backend, "--disable-progress"]
    command += ["--tokenizer", f"kind=hf_auto,model={Path(TOKENIZER).resolve()}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=16"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", constraint]
    offline = dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", USE_TORCH="0")
    # One process asks; each would load all of its packages first.
    one = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "PYTHONPATH": str(HERE / "stand_in")}
    environment = {**os.environ, **offline, **one}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command += ["--output", f"kind=json,path={report}"]
        done = subprocess.run(
            command, check=False, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark["metrics"]


def check(metrics, at_least):
    totals = metrics["request_totals"]
    assert totals["errored"] == 0 and totals["successful"] >= at_least, totals
    percentiles = metrics["time_to_first_token_ms"]["successful"]["percentiles"]
    assert 0 < percentiles["p50"] <= percentiles["p99"], percentiles
    return f"{totals['successful']} requests, first token after {percentiles['p50']:.1f} ms"


def main():
    task = tasks()[0]
    check(load("kind=max_requests,count=40", "/v1/chat/completions", task), 40)
    # At the end of its time guidellm leaves the streams that are still open.
    said = check(load("kind=max_duration,seconds=3", "/v1/completions", task), 20)
    until(idle, "a server with nothing to do")
    print(f"guidellm {importlib.metadata.version('guidellm')}: {said}")


main()
