"""What distillation costs: attention matching against dense maps, shared-row KL against full logits, a whole step.

Every figure comes from a process of its own, one after the other on the same machine, so that peak memory is that of
one way alone. Reported are ratios; seconds depend on the machine.

- matching: 128 sampled rows (and their recomputation in the backward pass) against N x N maps of both models, with a
  row KL and its backward pass: 4 + 4 heads of 64 channels.
- KL: 8 labelled tokens of a text, projected on the vocabulary one chunk at a time, against logits of every token of
  both models, masked afterwards, as TRL's GKDTrainer computes it (49,152 and 49,280 rows, cut to the shared ones).
- step: SmolLM2 from itself, a text of 1,024 tokens, one step with SFT alone, and with SFT, KL and matching.

    .venv/bin/python benchmarks/speed/distill_cost.py
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from laid_eval.models.cost import peak_memory

ROWS, HEADS, CHANNELS = 128, 4, 64
HIDDEN, VOCABULARY, LABELS = 576, (49152, 49280), 8


def heads(keys: int, grad: bool) -> list[torch.Tensor]:
    """Queries and keys of one layer."""
    return [torch.randn(HEADS, keys, CHANNELS).requires_grad_(grad) for _ in range(2)]


def matching(keys: int) -> None:
    """Ours: octaves on sampled rows."""
    from laid_eval.core import Heads, View, index_distance, octave_matching, sample_rows, seen_keys, sink_keys

    own, other = heads(keys, True), heads(keys, False)
    rows = sample_rows(torch.arange(1, keys), ROWS, seed=0, step=0, example=0)
    documents = torch.zeros(keys, dtype=torch.long)
    view = View(seen_keys(rows.index, documents), index_distance(rows.index, keys), sink_keys(documents))
    sides = [Heads(q[:, rows.index], k, CHANNELS**-0.5) for q, k in (own, other)]
    octave_matching(*sides, torch.eye(HEADS), view, gamma=1.0, weights=rows.weight).loss.backward()


def dense(keys: int) -> None:
    """Whole maps of both, as with `output_attentions`: row KL, one text."""
    own, other = heads(keys, True), heads(keys, False)
    hidden = torch.ones(keys, keys, dtype=torch.bool).triu(1)
    logs = [
        (q @ k.mT * CHANNELS**-0.5).masked_fill(hidden, torch.finfo(q.dtype).min).log_softmax(-1)
        for q, k in (own, other)
    ]
    loss = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True) / (HEADS * keys)
    loss.backward()


def _hidden(tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    states = [torch.randn(tokens, HIDDEN, requires_grad=k == 0) for k in range(2)]
    weights = [torch.randn(v, HIDDEN) * 0.02 for v in VOCABULARY]
    return states, weights, torch.arange(tokens - LABELS - 1, tokens - 1)


def shared_rows(tokens: int) -> None:
    """Ours: labelled tokens only."""
    from laid_eval.core import Unembedding, shared_vocab_kl

    states, weights, rows = _hidden(tokens)
    shared_vocab_kl(states[0], Unembedding(weights[0]), states[1], Unembedding(weights[1]), rows).backward()


def full_logits(tokens: int) -> None:
    """All logits of both models in float32, masked afterwards."""
    states, weights, rows = _hidden(tokens)
    logs = [(s @ w.T)[:, : min(VOCABULARY)].log_softmax(-1) for s, w in zip(states, weights, strict=True)]
    each = torch.nn.functional.kl_div(logs[0], logs[1].detach(), reduction="none", log_target=True).sum(-1)
    each[rows].mean().backward()


def step(tokens: int, recipe: str) -> float:
    """Seconds of one training step after a first one that is not counted."""
    from laid_eval.distillation.pairs import choose_pairs, start_mixers
    from laid_eval.distillation.recipe import changed, load_recipe
    from laid_eval.distillation.samples import open_source
    from laid_eval.distillation.student import Student, Teacher
    from laid_eval.distillation.train import Numbered, padded
    from laid_eval.models.frame import frame_of
    from laid_eval.models.gained import add_gains, gainable
    from laid_eval.models.load import describe, load
    from laid_eval.models.rotary import rotaries
    from laid_eval.models.source import resolve

    plan = changed(load_recipe(recipe), {"data.lengths": f"[{tokens},{tokens}]"})
    own, theirs = (load(describe(resolve("smollm2"), device="cpu")) for _ in range(2))
    frame = frame_of(own.tokenizer)
    turning = rotaries(own.model, tokens)
    pairs = []
    if plan.matches:
        pairs = choose_pairs(plan, own.model, theirs.model, turning, turning, (frame, frame), 0)
    for model in (own.model, theirs.model):
        gainable(model)
    theirs.model.requires_grad_(False)
    samples = open_source(plan.data, frame, 0).samples
    mixers = start_mixers(plan, pairs, own.model, theirs.model, samples(0), 0) if pairs else []
    if plan.gain:
        add_gains(own.model, dict(enumerate(turning)), False)
    teacher = Teacher(theirs.model, 49152) if plan.needs_teacher else None
    student = Student(own.model, teacher, plan, pairs, mixers, 0)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    seconds = 0.0
    for number in range(2):
        started = time.perf_counter()
        student(**padded([Numbered(samples, 9)[number]]), step=1)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds = time.perf_counter() - started
    return seconds


def once(way: str, size: int) -> dict[str, float]:
    """Run one way in this process: seconds and MiB on top of what a small run takes."""
    if way.startswith("step:"):
        return {"seconds": step(size, way.split(":")[1]), "mib": peak()}
    run = {"matching": matching, "dense": dense, "shared rows": shared_rows, "full logits": full_logits}[way]
    run(256)  # what is paid once
    before, started = peak(), time.perf_counter()
    run(size)
    return {"seconds": time.perf_counter() - started, "mib": peak() - before}


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    return peak_memory(torch.device("cpu")) / 2**20


def apart(way: str, size: int) -> dict[str, float] | None:
    """The same in a process of its own; `None` where it ran out of memory."""
    done = subprocess.run([sys.executable, __file__, "--way", way, "--size", str(size)], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """Tables of both sides and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--largest-dense", type=int, default=8192, help="16,384 keys take over 30 GiB")
    parser.add_argument("--way")
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(once(args.way, args.size)))
        return
    for ours, theirs in (("matching", "dense"), ("shared rows", "full logits")):
        print(f"\n| tokens | {ours}: s | MiB | {theirs}: s | MiB | time | memory |\n|---|---|---|---|---|---|---|")
        for length in args.lengths:
            a = apart(ours, length)
            b = apart(theirs, length) if length <= args.largest_dense else None
            line = f"| {length:,} | {a['seconds']:.2f} | {a['mib']:.0f} |" if a else f"| {length:,} | - | - |"
            if a and b:
                ratios = f"{a['seconds'] / b['seconds']:.1%} | {a['mib'] / b['mib']:.1%} |"
                print(f"{line} {b['seconds']:.2f} | {b['mib']:.0f} | {ratios}", flush=True)
            else:
                print(f"{line} not run | | | |", flush=True)
    print("\n| step of 1,024 tokens | s | peak MiB | against SFT |\n|---|---|---|---|")
    plain = None
    for recipe in ("sft", "sft-kl", "sft-kl-attn", "paper", "laid"):
        found = apart(f"step:{recipe}", 1024)
        if not found:
            print(f"| {recipe} | failed | | |")
            continue
        plain = plain or found["seconds"]
        print(
            f"| {recipe} | {found['seconds']:.1f} | {found['mib']:.0f} | {found['seconds'] / plain:.2f}x |", flush=True
        )


if __name__ == "__main__":
    main()
