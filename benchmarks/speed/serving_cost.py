"""A window through vLLM against the same requests sent by vLLM's own benchmark client, and against this process.

One server, its prefix cache emptied before each side: first our measurement, every request kept; then
`vllm bench serve` sends the very same prompts, as many at once, one token each; then the same measurement in process.
At last our side again on a server without prefix caching. The questions are the same throughout.

    make serve-env && python benchmarks/speed/serving_cost.py                     # about 15 minutes on two cores
    make serve-env && python benchmarks/speed/serving_cost.py --max-length 1024   # about 6 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from laid_eval.models.load import describe, load
from laid_eval.models.source import resolve
from laid_eval.runs import load_trials
from laid_eval.serving.client import Client, Request
from laid_eval.serving.connect import connect
from laid_eval.serving.server import Plan, plan_server, running
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window

AT_ONCE = 8
THEIRS = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class KeepingClient(Client):
    """Keeps what it sends."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: list[Request[Any]] = []

    def run(self, request: Request[Any]) -> Any:
        """Send and keep."""
        self.kept.append(request)
        return super().run(request)


def ours(plan: Plan, out: Path, settings: dict[str, Any]) -> tuple[dict[str, float], list[Request[Any]]]:
    """Our measurement through a server: what it took, and its requests."""
    client = KeepingClient(plan.endpoint, AT_ONCE)
    reader = connect(client, pictures=False, api="tokens")
    client.kept.clear()
    before = counters(plan)
    started = time.perf_counter()
    measure_window(reader, out=out, **settings)
    seconds = time.perf_counter() - started
    queries, hits = (b - a for a, b in zip(before, counters(plan), strict=True))
    tokens = sum(request.tokens or 0 for request in client.kept)
    client.close()
    took = {"seconds": seconds, "requests": len(client.kept), "tokens": tokens}
    return {**took, "hit_rate": hits / queries if queries else 0.0}, client.kept


def theirs(plan: Plan, kept: list[Request[Any]], folder: Path) -> dict[str, float]:
    """The same prompts through vLLM's benchmark client."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.endpoint.tokenizer)
    file = folder / "prompts.jsonl"
    with file.open("w") as lines:
        for request in kept:
            prompt = tokenizer.decode(request.body["token_ids"], skip_special_tokens=False)
            lines.write(json.dumps({"prompt": prompt, "output_tokens": 1}) + "\n")
    options = {
        "backend": "openai", "base-url": plan.endpoint.root, "endpoint": "/v1/completions",
        "model": plan.endpoint.model,
        "tokenizer": plan.endpoint.tokenizer, "dataset-name": "custom", "dataset-path": file, "num-prompts": len(kept),
        "custom-output-len": 1, "max-concurrency": AT_ONCE, "result-dir": folder, "result-filename": "theirs.json",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    flags = ["--skip-chat-template", "--save-result", "--disable-shuffle", "--disable-tqdm"]
    subprocess.run([plan.command[0], "-c", THEIRS, *words, *flags], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "theirs.json").read_text())
    return {"seconds": found["duration"], "requests": found["completed"], "tokens": found["total_input_tokens"]}


def counters(plan: Plan) -> tuple[float, float]:
    """Tokens looked up in the server's prefix cache and found, so far."""
    lines = requests.get(f"{plan.endpoint.root}/metrics", timeout=60).text.splitlines()
    values = [
        sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total{{"))
        for name in ("queries", "hits")
    ]
    return values[0], values[1]


def forget(plan: Plan) -> None:
    """Empty the prefix cache."""
    requests.post(f"{plan.endpoint.root}/reset_prefix_cache", timeout=60).raise_for_status()


def main() -> None:
    """Measure all sides and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    settings = {"probe": "needle", "max_length": args.max_length, "budget": 6 * args.max_length, "seed": 0}
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # lets the prefix cache be emptied
    described = describe(resolve("smollm2"), device="cpu")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = plan_server(described, max_length=args.max_length + 16, log=folder / "log")
        with running(plan):
            results["ours through vLLM"], kept = ours(plan, folder / "ours", settings)
            forget(plan)
            results["vLLM's own client"] = theirs(plan, kept, folder)
        started = time.perf_counter()
        measure_window(ModelReader(load(described), args.max_length), out=folder / "hf", **settings)
        results["in process"] = {"seconds": time.perf_counter() - started, "questions": len(load_trials(folder / "hf"))}
        plan = plan_server(
            described, max_length=args.max_length + 16, log=folder / "log2", flags=["--no-enable-prefix-caching"]
        )
        with running(plan):
            results["ours, no prefix cache"], _ = ours(plan, folder / "bare", settings)
        results["ours through vLLM"]["questions"] = len(load_trials(folder / "ours"))
    for name, values in results.items():
        print(f"{name:24}", "  ".join(f"{key} {value:,.3f}" for key, value in values.items()))
    mine, other = results["ours through vLLM"], results["vLLM's own client"]
    ratio = (mine["requests"] / mine["seconds"]) / (other["requests"] / other["seconds"])
    print(f"requests a second, ours over theirs: {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps({**results, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
