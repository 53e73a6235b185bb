"""guidellm drives a short load, closed and open, and everything that it asks is answered.

It is installed without PyTorch, of which it uses the data loader only: `stand_in/torch.py`.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import KEY, URL, metric, tasks, until

HERE = Path(__file__).parent
TOKENIZER = os.environ.get("BUNDLE", HERE / "../../models/prompter")
REQUESTS = 40


def load(profile, constraint, route, task):
    """Runs one benchmark and gives guidellm's report of it."""
    backend = f"kind=openai_http,target={URL},model={task},request_format={route},api_key={KEY}"
    command = [str(Path(sys.executable).with_name("guidellm")), "run"]
    command += ["--backend", backend, "--disable-progress"]
    command += ["--tokenizer", f"kind=hf_auto,model={Path(TOKENIZER).resolve()}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=16"]
    command += ["--profile", profile, "--constraint", constraint]
    offline = dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", USE_TORCH="0")
    environment = {**os.environ, **offline, "PYTHONPATH": str(HERE / "stand_in")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command += ["--output", f"kind=json,path={report}"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark["metrics"]


def check(metrics, at_least):
    totals = metrics["request_totals"]
    assert totals["errored"] == 0 and totals["successful"] >= at_least, totals
    percentiles = metrics["time_to_first_token_ms"]["successful"]["percentiles"]
    assert 0 < percentiles["p50"] <= percentiles["p99"], percentiles
    return totals["successful"]


def main():
    task = tasks()[0]
    closed = ("kind=concurrent,streams=4", f"kind=max_requests,count={REQUESTS}")
    check(load(*closed, "/v1/completions", task), REQUESTS)
    check(load(*closed, "/v1/chat/completions", task), REQUESTS)
    # At the end of its time guidellm leaves the streams that are still open.
    opened = ("kind=poisson,rate=20", "kind=max_duration,seconds=4")
    check(load(*opened, "/v1/completions", task), 40)
    until(lambda: metric("shoal_requests_running") == 0, "shoal_requests_running = 0")
    print(f"guidellm {importlib.metadata.version('guidellm')}: closed and open load")


main()
