"""One prefill for many questions (ours) against one full prompt per question (RULER, lm-eval), side by side.

Both sides measure SmolLM2 on the very same haystack and questions, each in a process of its own, so that peak
memory is that side's. Our side then reads on, to measure how much its questions on one haystack are correlated:
its effective trials are its trials divided by that design effect. The peers' questions each have a prompt of
their own and are counted as independent.

    python benchmarks/speed/window_cost.py                       # about 25 minutes on two cores
    python benchmarks/speed/window_cost.py --max-length 2048     # about 3 minutes, no meaningful design effect
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from transformers import PreTrainedModel

from laid_eval.models.fork import ForkedText
from laid_eval.models.frame import Branch
from laid_eval.models.load import describe, load
from laid_eval.models.source import resolve
from laid_eval.runs import LoadedRun
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window


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
        """The prompt, then the choices on its cache."""
        return read + len(branch.stem) + sum(len(ending) - 1 for ending in branch.endings)


def measure(side: str, folder: str, max_length: int, budget: int) -> dict[str, Any]:
    """One side, in this process."""
    loaded = load(describe(resolve("smollm2"), device="cpu"))
    reader = ModelReader(loaded, max_length, protocol=None if side == "ours" else PromptPerQuestion)
    run = measure_window(reader, "needle", out=folder, max_length=max_length, budget=budget, precision=1e-6)
    return summary(run)


def summary(run: LoadedRun) -> dict[str, Any]:
    """What one side did."""
    cost = run.header.cost
    return {
        "trials": len(run.trials),
        "seconds": cost.seconds,
        "tokens": cost.prefill_tokens + cost.question_tokens,
        "peak_gib": (cost.peak_memory_bytes or 0) / 1024**3,
        "design_effect": run.window().design_effect,
        "scores": dict(zip(run.trials["id"], run.trials["score"], strict=True)),
        "margins": dict(zip(run.trials["id"], run.trials["margin"], strict=True)),
        "lengths": dict(zip(run.trials["id"], run.trials["length"], strict=True)),
    }


def apart(*work: Any) -> Any:
    """Call in a fresh process: its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(*work).result()


def main() -> None:
    """Run both sides and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=6, help="longest contexts read to measure the design effect")
    options = parser.parse_args()
    longest = options.max_length
    with tempfile.TemporaryDirectory() as folder:
        # A budget of one longest context is one haystack, the same on both sides.
        ours = apart(measure, "ours", f"{folder}/ours", longest, longest)
        print(f"ours: {ours['trials']} questions in {ours['seconds']:.0f} s", flush=True)
        theirs = apart(measure, "peers", f"{folder}/peers", longest, longest)
        print(f"peers: {theirs['trials']} questions in {theirs['seconds']:.0f} s", flush=True)
        more = apart(measure, "ours", f"{folder}/ours", longest, options.budget * longest)
    assert ours["scores"].keys() == theirs["scores"].keys(), "the two sides must answer the same questions"
    effect = max(more["design_effect"], 1.0)
    per_ours = {k: ours[k] / ours["trials"] * effect for k in ("tokens", "seconds")}
    per_peer = {k: theirs[k] / theirs["trials"] for k in ("tokens", "seconds")}
    gap = max(abs(ours["margins"][k] - theirs["margins"][k]) for k in ours["margins"])
    differ = sum(ours["scores"][k] != theirs["scores"][k] for k in ours["scores"])
    curve = {}
    for name, side in (("ours", ours), ("peers", theirs)):
        for key, score in side["scores"].items():
            curve.setdefault(int(side["lengths"][key]), {}).setdefault(name, []).append(score)
    result = {
        "questions": ours["trials"],
        "answers that differ": differ,
        "largest difference of a margin, nats": round(gap, 5),
        "design effect": round(effect, 3),
        "measured on questions": more["trials"],
        "tokens per effective trial": [round(per_ours["tokens"], 1), round(per_peer["tokens"], 1)],
        "token ratio": round(per_peer["tokens"] / per_ours["tokens"], 2),
        "seconds per effective trial": [round(per_ours["seconds"], 3), round(per_peer["seconds"], 3)],
        "time ratio": round(per_peer["seconds"] / per_ours["seconds"], 2),
        "peak memory, GiB": [round(ours["peak_gib"], 2), round(theirs["peak_gib"], 2)],
        "accuracy by length [ours, peers]": {
            length: [round(sum(v[s]) / len(v[s]), 3) for s in ("ours", "peers")] for length, v in sorted(curve.items())
        },
    }
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
