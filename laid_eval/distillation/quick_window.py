"""A quick window of a student as it is during training."""

from __future__ import annotations

from pathlib import Path

import torch

from laid_eval.distillation.recipe import Recipe
from laid_eval.distillations import StepWindow
from laid_eval.models.load import LoadedModel, LoadedVision
from laid_eval.models.picture_frame import picture_frame
from laid_eval.runs import LoadedRun
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.picture_reader import ModelPictureReader
from laid_eval.window.probes import ScenesProbe, load_probe
from laid_eval.window.scenes import Scene, draw
from laid_eval.window.session import measure_window

_TEXTS, _HAYSTACKS = 3, 20
"""Longest contexts that are spent on it: half of what a window spends by default."""


def quick_window(
    student: LoadedModel | LoadedVision, recipe: Recipe, folder: Path, step: int, seed: int
) -> StepWindow | None:
    """The window as it is now, on needles or on the probe of pictures that is trained on.

    Random states are left as they were. `None` where so few questions tell nothing.
    """
    training = student.model.training
    student.model.eval()
    out = folder / "windows" / f"step-{step:06d}"
    try:
        with torch.random.fork_rng():
            measure = _of_pictures if isinstance(student, LoadedVision) else _of_text
            run = measure(student, recipe, out, seed)  # type: ignore[arg-type]
    finally:
        student.model.train(training)
    if not run.windows:
        return None
    w = run.window()
    return StepWindow(step=step, text=str(w), length=w.length, low=w.low, high=w.high)


def _of_text(student: LoadedModel, recipe: Recipe, out: Path, seed: int) -> LoadedRun:
    length = recipe.training.window_length
    reader = ModelReader(student, length)
    return measure_window(reader, "needle", out=out, max_length=length, budget=_TEXTS * length, seed=seed)


def _of_pictures(student: LoadedVision, recipe: Recipe, out: Path, seed: int) -> LoadedRun:
    source, most = recipe.data.source, recipe.training.window_images
    probe = load_probe(source)
    assert isinstance(probe, ScenesProbe), "pictures are of a visual probe"
    scenes = [Scene(probe.objects[k : k + probe.per_image], k) for k in range(3)]
    each = int(picture_frame(student.info.name, student.processor).piece([draw(scenes[0], probe.size)]).ids.shape[1])
    reader = ModelPictureReader(student, [draw(scene, probe.size) for scene in scenes], most * each)
    return measure_window(reader, source, out=out, max_length=most, budget=_HAYSTACKS * most * each, seed=seed)
