"""One prefill for many questions (ours) against one full prompt per question (RULER, lm-eval), side by side.

First SmolLM2 is measured with forks, which shows how much the questions on one haystack are correlated (the design
effect: ours are worth trials / design effect, the peers' questions, each with a prompt of its own, count as
independent). Then the answers on one haystack are deleted and asked again by either side, the very same questions,
each side in a process of its own so that peak memory is that side's.

    python benchmarks/speed/window_cost.py                       # about 15 minutes on two cores
    python benchmarks/speed/window_cost.py --max-length 2048     # about 2 minutes
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from laid_eval.models.fork import ForkedText
from laid_eval.models.frame import Branch
from laid_eval.models.load import describe, load
from laid_eval.models.source import resolve
from laid_eval.runs import load_run
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HAYSTACK = 2  # the first one in the bracket where the curve falls: what most of a measurement consists of


class PromptPerQuestion:
    """The peers' protocol, at its best: each question reads a prompt of its own.

    One pass for the prompt and one for all choices; lm-eval would run the prompt once a choice, RULER would decode
    up to 128 tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Start with nothing read."""
        self._model = model
        self._tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        """Only remembered."""
        self._tokens.extend(tokens)

    def ask(self, branches: Sequence[Branch]) -> list[list[float]]:
        """One full prompt per question."""
        out = []
        for branch in branches:
            prompt = ForkedText(self._model)
            prompt.read(self._tokens)
            out += prompt.ask([branch])
        return out

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """As for forks: both sides must walk the same plan. What is really read is counted from the trials."""
        return len(branch.stem) + sum(len(ending) - 1 for ending in branch.endings)


def measure(protocol: type[PromptPerQuestion] | None, folder: str, max_length: int, budget: int) -> dict[str, Any]:
    """Measure, or go on measuring, in this process; what it took."""
    reader = ModelReader(load(describe(resolve("smollm2"), device="cpu")), max_length, protocol)
    reader.info = reader.info.model_copy(update={"fan_out": "forked"})
    before = load_run(folder).header.cost.seconds if Path(folder).exists() else 0.0
    run = measure_window(reader, "needle", out=folder, max_length=max_length, budget=budget, precision=1e-6)
    return {
        "seconds": run.header.cost.seconds - before,
        "peak_gib": (reader.peak_memory_bytes() or 0) / 1024**3,
        "design_effect": run.window().design_effect,
        "trials": run.trials,
        "cost": run.header.cost.model_dump(),
    }


def apart(*work: Any) -> Any:
    """Call in a fresh process: its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(*work).result()


def without_answers(folder: str, copy: str) -> str:
    """A copy of a run in which the haystack's questions are still to be asked."""
    shutil.copytree(folder, copy)
    path = Path(copy) / "trials.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["haystack"] != HAYSTACK]
    path.write_text("\n".join(lines) + "\n")
    header = Path(copy) / "run.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"status": "partial"}))
    return copy


def main() -> None:
    """Run both sides and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=6, help="longest contexts read to measure the design effect")
    options = parser.parse_args()
    work = (options.max_length, options.budget * options.max_length)
    with tempfile.TemporaryDirectory() as at:
        whole = apart(measure, None, f"{at}/run", *work)
        print(f"measured: {len(whole['trials'])} questions in {whole['seconds']:.0f} s", flush=True)
        ours = apart(measure, None, without_answers(f"{at}/run", f"{at}/ours"), *work)
        print(f"ours: haystack {HAYSTACK} in {ours['seconds']:.0f} s", flush=True)
        peers = apart(measure, PromptPerQuestion, without_answers(f"{at}/run", f"{at}/peers"), *work)
        print(f"peers: haystack {HAYSTACK} in {peers['seconds']:.0f} s", flush=True)
    effect = max(whole["design_effect"], 1.0)
    sides = [side["trials"].query("haystack == @HAYSTACK").set_index("id").sort_index() for side in (ours, peers)]
    assert sides[0].index.equals(sides[1].index), "the two sides must answer the same questions"
    count = len(sides[0])
    forked = int(sides[0]["prompt_tokens"].max()) + count * round(
        whole["cost"]["question_tokens"] / len(whole["trials"])
    )
    tokens = forked / count * effect, sides[1]["prompt_tokens"].mean()
    seconds = ours["seconds"] / count * effect, peers["seconds"] / count
    run_tokens = whole["cost"]["prefill_tokens"] + whole["cost"]["question_tokens"]
    curve = pd.DataFrame(
        {name: s.groupby("length")["score"].mean() for name, s in zip(("ours", "peers"), sides, strict=True)}
    )
    result = {
        "questions asked by both": count,
        "answers that differ": int((sides[0]["chosen"] != sides[1]["chosen"]).sum()),
        "largest difference of a margin, nats": float((sides[0]["margin"] - sides[1]["margin"]).abs().max().round(6)),
        "design effect": round(effect, 3),
        "tokens per effective trial, ours and peers": [round(float(v), 1) for v in tokens],
        "token ratio": round(float(tokens[1] / tokens[0]), 2),
        "seconds per effective trial, ours and peers": [round(v, 3) for v in seconds],
        "time ratio": round(seconds[1] / seconds[0], 2),
        "peak memory, ours and peers, GiB": [round(side["peak_gib"], 2) for side in (ours, peers)],
        "token ratio of the whole measurement": round(whole["cost"]["whole_prompt_tokens"] / run_tokens / effect, 2),
    }
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    print(curve.round(3).to_string())


if __name__ == "__main__":
    main()
