"""Why a window ends, as one small figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from laid_eval.errors import UserError
from laid_eval.report.plot.axes import CURVE, INK, new_axes, save_figure
from laid_eval.runs import LoadedRun, load_run
from laid_eval.window.why import CAUSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from laid_eval.records import Why

_WORDS = {
    "position": "position alone: the needle is far away",
    "dilution": "dilution alone: so much filler",
    "distractors": "distractors: the other facts",
    "remainder": "the rest (below 0: causes overlap)",
    "recovered": "won back: needle told next to the question",
}
_ROWS = ("comprehension", "loss", *CAUSES, "recovered")
_WHOLE, _WON, _OTHER = "#555555", "#009E73", "#999999"  # loss and recovery apart from the causes


def why(run: LoadedRun | str | os.PathLike[str], ax: Axes | None = None, probe: str | None = None) -> Axes:
    """What the score lost from a short text to a long one is due to: a bar a cause, with its interval.

    Args:
        run: A run measured with `why`, or the path of its folder.
        ax: Where to draw; a new figure by default.
        probe: Which probe; the first that was explained by default.

    Returns:
        The Axes.

    Raises:
        UserError: The run does not say why.
    """
    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    split = _selected(loaded, probe)
    ax = ax or new_axes((7.2, 3.4))
    for y, name in enumerate(_ROWS):
        part = split.part(name)
        colour = CURVE if name in CAUSES else _WON if name == "recovered" else _OTHER if y == 0 else _WHOLE
        ax.barh(y, part.value, color=colour, height=0.62, zorder=2)
        ax.plot([part.low, part.high], [y, y], color=INK, lw=1.4, zorder=3)
        for end in (part.low, part.high):
            ax.plot(end, y, marker="|", color=INK, ms=6, zorder=3)
        ax.annotate(
            f"{part.value:.2f}",
            (max(part.high, 0.0), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    ax.axvline(0, color=INK, lw=0.8, zorder=4)
    ax.axhline(1.5, color=INK, lw=0.5, ls=(0, (1, 2)))
    ax.axhline(len(_ROWS) - 1.5, color=INK, lw=0.5, ls=(0, (1, 2)))
    ax.set_yticks(range(len(_ROWS)), [_words(name, split) for name in _ROWS], fontsize=8.5)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    low, high = min(split.part(n).low for n in _ROWS), max(split.part(n).high for n in _ROWS)
    ax.set_xlim(min(low, 0.0) - 0.06, max(high, 1.0) + 0.1)
    ax.set_xlabel(f"share of the score above chance, with {100 * split.confidence:g}% interval")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title(
        f"{loaded.header.model.name}: why the window ends, probe '{split.probe}'", loc="left", fontsize=11, pad=8
    )
    return ax


def save_why(run: LoadedRun) -> list[Path]:
    """Write `why.png` into the run's folder, one panel a probe; its path, or nothing where the run does not say why."""
    from matplotlib.figure import Figure

    splits = run.header.why or ()
    if not splits:
        return []
    figure = Figure(figsize=(7.2, 3.4 * len(splits)), layout="constrained")
    for k, split in enumerate(splits):
        why(run, ax=figure.add_subplot(len(splits), 1, k + 1), probe=split.probe)
    return [save_figure(figure, run.path / "why.png")]


def _words(name: str, split: Why) -> str:
    if name == "loss":
        return f"lost from {split.short_length:,} to {split.length:,} tokens"
    if name == "comprehension":
        return f"lost at {split.short_length:,} tokens already"
    return _WORDS[name]


def _selected(run: LoadedRun, probe: str | None) -> Why:
    held = run.header.why or ()
    for split in held:
        if probe in (None, split.probe):
            return split
    names = ", ".join(split.probe for split in held) or "none"
    raise UserError(
        f"The run '{run.path}' does not say why the window of {probe or 'its probe'} ends (it does for: {names}). "
        "Measure it with: laid-eval window --why --out, the same model and options."
    )
