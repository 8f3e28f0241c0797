"""Measures the pocket models on fresh haystacks and writes their model cards: part of `make pocket`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

# isort: off
import laid_eval  # noqa: F401  # before transformers: it mends torchvision where that is needed

# isort: on
from laid_eval.models.fork_pictures import ForkedPictures
from laid_eval.models.load import describe, load_vision
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.source import resolve
from laid_eval.window.picture_reading import asked_at, draw_haystack
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import draw

COUNTS = (1, 2, 5, 10, 20, 50, 100, 150)
SEED = 77  # of no training and no test
FAR = 150
CARD = """---
license: cc-by-sa-4.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A tiny `Qwen2_5_VLForConditionalGeneration` ({parameters:.1f}M parameters, {size:.1f} MB in bfloat16) that answers
questions about haystacks of drawn pictures. It is a measuring object for laid-eval, not an assistant: it knows 64
objects and two questions.

- **Trained by** `make pocket` (`reports/pocket/train.py`), from random weights, on a CPU: {cost}.
- **Data**: scenes of three OpenMoji objects (8,000 of them, drawn by `laid_eval.window.scenes`) in random haystacks of
  {range} pictures; questions of the probes `visual-which` and `visual-haystack`. Seed 1,000,000,007, which no
  evaluation uses.
- **Positions**: random gaps stretch the haystacks over the range that 160 pictures take, so none is new later.
- **No window is planted.** What ends it is the size of the model and the number of pictures in training.
- The pictures are of the [OpenMoji](https://openmoji.org) project, CC BY-SA 4.0.

## How it does

Share of right answers on fresh haystacks (`visual-which`: eight choices, chance 0.125; `visual-haystack`: yes or no,
chance 0.5), {haystacks} haystacks a column, with the standard error over haystacks:

{table}

## Position or dilution?

{why}
"""


def score(frame, model, probe, count: int, haystacks: int, away: int = 0) -> tuple[float, float]:
    """Mean score and its standard error over haystacks; `away` RoPE positions between pictures and question."""
    found = []
    for k in range(haystacks):
        story = draw_haystack(probe, SEED, k, (count,))
        text = ForkedPictures(model, frame)
        for scene in story.scenes:
            text.show(draw(scene, probe.size))
        asked = asked_at(probe, story, SEED, k, count)
        branches = [frame.branch(a.question.prompt, a.question.lead, a.question.choices) for a in asked]
        answers = text.ask(branches, at=[text.position + away] * len(branches))
        right = [int(np.argmax(logs)) == a.question.answer for logs, a in zip(answers, asked, strict=True)]
        found.append(np.mean(right))
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


def card(folder: Path, log: list[dict], haystacks: int) -> str:
    """The model card of one model."""
    name = folder.name
    loaded = load_vision(describe(resolve(str(folder)), device="cpu"))
    frame = picture_frame(name, loaded.processor)
    rows = ["| images | " + " | ".join(map(str, COUNTS)) + " |", "|" + "---|" * (len(COUNTS) + 1)]
    for probe in map(load_probe, ("visual-which", "visual-haystack")):
        cells = [score(frame, loaded.model, probe, n, max(haystacks, haystacks * 4 // n)) for n in COUNTS]
        rows.append(f"| {probe.name} | " + " | ".join(f"{m:.2f} ±{e:.2f}" for m, e in cells) + " |")
    which = load_probe("visual-which")
    each = loaded.model.config.vision_config  # positions of a picture: its longer side and two markers
    advance = 96 // each.patch_size // each.spatial_merge_size + 2
    near = score(frame, loaded.model, which, 5, 4 * haystacks)
    far = score(frame, loaded.model, which, 5, 4 * haystacks, (FAR - 5) * advance)
    many = score(frame, loaded.model, which, FAR, haystacks)
    away = (FAR - 5) * advance
    why = (
        f"`visual-which`, 5 images: {near[0]:.2f} ±{near[1]:.2f}. The same with the question moved to where {FAR}\n"
        f"images would put it, {away} RoPE positions further: {far[0]:.2f} ±{far[1]:.2f} (position alone).\n"
        f"With {FAR} images at their own places: {many[0]:.2f} ±{many[1]:.2f} (position and dilution)."
    )
    teacher = name.endswith("teacher")
    last = [line for line in log if line["stage"] == name.removeprefix("pocket-")][-1]
    return CARD.format(
        name=name, parameters=sum(p.numel() for p in loaded.model.parameters()) / 1e6,
        size=(folder / "model.safetensors").stat().st_size / 1e6, range="1-160" if teacher else "1-4",
        cost=f"{last['minutes']:.0f} minutes of one core and {last['step']:,} steps, after 14 for both's vision",
        haystacks=f"{haystacks} or more", table="\n".join(rows), why=why,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--haystacks", type=int, default=20)
    args = parser.parse_args()
    log = [json.loads(line) for line in (args.trained / "log.jsonl").read_text().splitlines()]
    for folder in sorted(args.trained.glob("pocket-*/")):
        (folder / "README.md").write_text(card(folder, log, args.haystacks))
        print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
