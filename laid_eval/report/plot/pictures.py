"""What a model was shown: pictures of a haystack with the questions, the right answers and the model's."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laid_eval.errors import UserError
from laid_eval.records import Trial
from laid_eval.report.plot.axes import CLAIMED, CRITERIA, INK, save_figure
from laid_eval.resources import content_hash
from laid_eval.runs import LoadedRun, load_run, load_trials
from laid_eval.window.dataset_reading import view_id
from laid_eval.window.picture_reading import asked_at, draw_haystack
from laid_eval.window.plan import coarse_cuts, length_grid
from laid_eval.window.probes import ScenesProbe, load_probe
from laid_eval.window.questions import Question
from laid_eval.window.scenes import draw
from laid_eval.window.visual_haystacks import DatasetProbe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_SHOWN, _ACROSS = 8, 4  # pictures
_ASKED = 6
_SAID = 60  # letters of a free answer
_RIGHT, _WRONG = CRITERIA[0], CLAIMED  # green and red that all readers tell apart


@dataclass(frozen=True)
class _Sheet:
    """What is shown: the first pictures of a haystack, and questions with their trials."""

    pictures: list[Image]
    asked: list[tuple[str, Trial]]
    needle: int | None
    """Index of a picture to be marked."""
    title: str


def haystack(
    run: LoadedRun | str | os.PathLike[str], figure: Figure | None = None, probe: str | DatasetProbe | None = None
) -> Figure:
    """The first pictures of a run's first haystack, and what was asked about them.

    Args:
        run: A run of a visual probe or a data set, or the path of its folder.
        figure: Where to draw; a new one by default.
        probe: Which probe; the run's first by default. Of a run of a data set, the data set: its pictures are not in
            the run.

    Returns:
        The figure.

    Raises:
        UserError: The run is about text, or its probe is not at hand any more.
    """
    from matplotlib.figure import Figure

    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    sheet = _of_dataset(loaded, probe) if isinstance(probe, DatasetProbe) else _of_scenes(loaded, probe)
    rows = -(-len(sheet.pictures) // _ACROSS)
    figure = figure or Figure(figsize=(9.2, 0.6 + 2.3 * rows + 0.6 * len(sheet.asked)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.3 * rows, 0.6 * len(sheet.asked)])
    top, bottom = parts
    for k, picture in enumerate(sheet.pictures):
        ax = top.add_subplot(rows, _ACROSS, k + 1)
        ax.imshow(picture)
        ax.set_axis_off()
        ax.set_title(f"image {k + 1}{' (needle)' if k == sheet.needle else ''}", fontsize=8, color=INK)
    lines = bottom.add_subplot()
    lines.set_axis_off()
    for k, (question, trial) in enumerate(sheet.asked):
        y = 1 - (k + 0.5) / len(sheet.asked)
        lines.text(0, y + 0.035, question, fontsize=8.5, color=INK, va="bottom")
        said = (trial.chosen or "no answer")[:_SAID]
        verdict = "right" if trial.score == 1 else "wrong" if trial.score == 0 else "tied"
        lines.text(
            0.02, y - 0.005, f"right answer: {trial.answer}     {loaded.header.model.name}: {said} ({verdict})",
            fontsize=8.5, va="top", color=_RIGHT if trial.score == 1 else _WRONG, parse_math=False,
        )  # fmt: skip
    title = f"{loaded.header.model.name}, {sheet.title}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _of_scenes(loaded: LoadedRun, probe: str | None) -> _Sheet:
    """The first haystack of a probe, drawn again."""
    settings = loaded.header.settings
    name = probe or settings.probes[0]
    declared = _declared(loaded, name)
    cuts = tuple(coarse_cuts(length_grid(settings.min_length or declared.min_length, settings.max_length), 0))
    story = draw_haystack(declared, settings.seed, 0, cuts)
    answers = {trial.id: trial for trial in load_trials(loaded.path) if trial.probe == name}
    reached = [cut for cut in cuts if any(t.haystack == 0 and t.length == cut for t in answers.values())]
    cut = max((c for c in reached if c <= _SHOWN), default=reached[0] if reached else cuts[0])
    count = min(cut, _SHOWN)
    asked = [a for a in asked_at(declared, story, settings.seed, 0, cut) if a.id in answers][:_ASKED]
    of = f"the first {count} of {cuts[-1]} images" if cuts[-1] > count else f"{count} images"
    return _Sheet(
        [draw(scene, declared.size) for scene in story.scenes[:count]],
        [(_told(each.question), answers[each.id]) for each in asked],
        None,
        f"probe '{name}': {of} of haystack 1",
    )


def _of_dataset(loaded: LoadedRun, dataset: DatasetProbe) -> _Sheet:
    """The longest of its cases that fits on a sheet, or the start of the shortest."""
    answers = {trial.id: trial for trial in load_trials(loaded.path)}
    views = [v for v in dataset.views(loaded.header.settings.seed) if view_id(dataset, v) in answers]
    if not views:
        raise UserError(f"The run '{loaded.path}' holds no answers to this data set.")
    view = max(views, key=lambda v: v.case.length if v.case.length <= _SHOWN else -v.case.length)
    shown = view.pictures[:_SHOWN]
    of = f"the first {len(shown)} of {view.case.length}" if len(shown) < view.case.length else f"{len(shown)}"
    return _Sheet(
        [dataset.folder.read(name) for name in shown],
        [(_told(view.question), answers[view_id(dataset, view)])],
        view.needle,
        f"{dataset.name}: {of} images of case {view.case.id}",
    )


def _told(question: Question) -> str:
    """A question and where its answer is."""
    words = textwrap.shorten(question.prompt.split(":")[-1].strip(), 140)
    return f"{words} (image {(question.needle or 0) + 1})"


def save_pictures(run: LoadedRun, dataset: DatasetProbe | None = None) -> list[Path]:
    """Write `haystack.png` into the folder of a run about pictures; its path, or nothing."""
    if run.header.image is None:
        return []
    try:
        figure = haystack(run, probe=dataset)
    except UserError:  # the probe's file has changed or gone since
        return []
    return [save_figure(figure, run.path / "haystack.png")]


def _declared(run: LoadedRun, name: str) -> ScenesProbe:
    if run.header.image is None:
        raise UserError(f"The run '{run.path}' is about text; it was shown no pictures.")
    if run.header.scores is not None:
        raise UserError(f"The pictures of '{run.path}' are a data set's; give it: probe=visual_haystacks(...).")
    declared = load_probe(name)
    if not isinstance(declared, ScenesProbe) or content_hash(declared) != run.header.settings.probe_hashes.get(name):
        raise UserError(f"Probe {name!r} is not what it was when '{run.path}' was measured; its pictures are unknown.")
    return declared
