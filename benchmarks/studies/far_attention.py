"""Does octave matching give far attention back faster than plain KL? A student with noise in what looks far.

Teacher: the heads of one layer of SmolLM2 on real text. Student: the same queries through a trainable matrix per head
that starts as the identity plus noise between the slowest rotary pairs, those that tell what is far. Both losses train
it with equal steps, rows and rates; KL within near and far octaves is read on another text.

    .venv/bin/python benchmarks/studies/far_attention.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from laid_eval.core import Heads, View, distance_weight, index_distance, octave_matching, seen_keys, sink_keys
from laid_eval.models.capture import Call, capture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR, FAR = range(1, 5), range(7, 10)  # octaves: distances up to 14 tokens; from 63 tokens
LOSSES = {
    "plain KL": {"kappa": 0.0, "gamma": 0.0},
    "octaves, no distance": {"kappa": 0.5, "gamma": 0.0},
    "octaves, ramp to 1": {"kappa": 0.5, "gamma": 1.0},
}


@dataclass(frozen=True)
class Outcome:
    """KL within octaves on held-out text, nats, mean over octaves."""

    near: float
    far: float
    total: float
    """Plain KL of whole rows."""


def layer_heads(model: PreTrainedModel, ids: Sequence[int], layer: int) -> Heads:
    """All queries and keys of one layer on a text."""
    found = []

    def keep(call: Call) -> None:
        if call.layer == layer:
            found.append(Heads(call.query[0].clone(), call.key[0].clone(), call.scale))

    with torch.no_grad(), capture(model, keep):
        model.get_decoder()(torch.tensor([list(ids)]), use_cache=False)
    return found[0]


def view_of(rows: torch.Tensor, keys: int) -> View:
    """Causal, distances in tokens."""
    documents = torch.zeros(keys, dtype=torch.long)
    return View(seen_keys(rows, documents), index_distance(rows, keys), sink_keys(documents))


def recover(train: Heads, held_out: Heads, *, kappa: float, gamma: float, seed: int, steps: int = 60) -> Outcome:
    """Train the student's matrices with one loss, then measure."""
    generator = torch.Generator().manual_seed(seed)
    heads, keys, channels = train.query.shape
    slow = torch.zeros(channels, dtype=torch.bool)
    slow[channels // 4 : channels // 2] = slow[3 * channels // 4 :] = True  # half-split: the slower half of the pairs
    noise = torch.randn(heads, channels, channels, generator=generator) * (slow[:, None] & slow) * 0.25
    matrix = (torch.eye(channels) + noise).requires_grad_()
    optimiser = torch.optim.Adam([matrix], lr=3e-3)
    mixture = torch.eye(heads)
    for step in range(steps):
        rows = torch.randint(keys // 2, keys, (32,), generator=generator).sort().values.unique()
        student = Heads(train.query[:, rows] @ matrix, train.key, train.scale)
        teacher = Heads(train.query[:, rows], train.key, train.scale)
        weight = distance_weight(step, steps, maximum=gamma)
        octave_matching(
            student, teacher, mixture, view_of(rows, keys), gamma=weight, kappa=kappa, octaves=10
        ).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    rows = torch.arange(keys // 2, keys, 8)
    with torch.no_grad():
        student = Heads(held_out.query[:, rows] @ matrix, held_out.key, held_out.scale)
        teacher = Heads(held_out.query[:, rows], held_out.key, held_out.scale)
        found = octave_matching(student, teacher, mixture, view_of(rows, keys), gamma=0.0, kappa=0.0, octaves=10)
    within = found.selectivity
    return Outcome(float(within[list(NEAR)].mean()), float(within[list(FAR)].mean()), float(found.loss))


def main() -> None:
    """A table over layers and seeds."""
    from laid_eval.distillation.prose import training_corpus
    from laid_eval.models.frame import frame_of
    from laid_eval.models.load import describe, load
    from laid_eval.models.source import resolve
    from laid_eval.spectrum.texts import prose

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 16, 23])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    loaded = load(describe(resolve("smollm2"), device="cpu"))
    texts, _ = prose(training_corpus(), frame_of(loaded.tokenizer), args.length, 2, 0)
    print("| layer | loss | near, nats | far, nats | whole rows, nats |\n|---|---|---|---|---|")
    for layer in args.layers:
        train, held_out = (layer_heads(loaded.model, text, layer) for text in texts)
        for name, options in LOSSES.items():
            found = [recover(train, held_out, **options, seed=seed) for seed in range(args.seeds)]
            values = torch.tensor([[f.near, f.far, f.total] for f in found])
            cells = " | ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(values.mean(0), values.std(0), strict=True))
            print(f"| {layer} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
