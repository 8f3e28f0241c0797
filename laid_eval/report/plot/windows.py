"""Plots of windows. Each takes `ax=None` and returns the Axes; nothing is computed here that a record does not hold."""

from __future__ import annotations

import os
from functools import partial
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import beta

from laid_eval.errors import UserError
from laid_eval.records import ImageExtent, WindowEstimate
from laid_eval.report.plot.axes import (
    CLAIMED,
    CRITERIA,
    CURVE,
    INK,
    new_axes,
    powers_of_two,
    save_figure,
    token_axis,
    tokens_text,
)
from laid_eval.runs import LoadedRun, load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEPTHS = 4  # rows of the depth map
_ROW = 0.075  # height of one criterion below the curve, in score


def window(run: LoadedRun | str | os.PathLike[str], ax: Axes | None = None, probe: str | None = None) -> Axes:
    """Score against context length: trials, fitted curve with its interval, criteria, claimed length.

    Args:
        run: A run, or the path of its folder.
        ax: Where to draw; a new figure by default.
        probe: Which probe; the run's first by default.

    Returns:
        The Axes.

    Raises:
        UserError: The run holds no trials of that probe.
    """
    run, name, trials = _selected(run, probe)
    ax = ax or new_axes((7.2, 4.8))
    confidence = f"{100 * run.header.settings.confidence:g}%"
    for curve in run.header.curves:
        if curve.probe == name:
            x = [p.length for p in curve.points]
            ax.fill_between(
                x,
                [p.low for p in curve.points],
                [p.high for p in curve.points],
                color=CURVE,
                alpha=0.18,
                lw=0,
                label=f"{confidence} interval",
            )
            ax.plot(x, [p.score for p in curve.points], color=CURVE, lw=2, label="fitted curve")
    by_length = trials.groupby("length")["score"].agg(["sum", "count"])
    n, k = by_length["count"].to_numpy(float), by_length["sum"].to_numpy(float)
    low, high = beta.ppf(0.025, k + 0.5, n - k + 0.5), beta.ppf(0.975, k + 0.5, n - k + 0.5)
    mean = k / n
    ax.errorbar(
        by_length.index,
        mean,
        yerr=[np.clip(mean - low, 0, 1), np.clip(high - mean, 0, 1)],
        fmt="none",
        ecolor=INK,
        alpha=0.25,
        lw=1,
    )
    ax.scatter(
        by_length.index,
        mean,
        s=8 + 2 * n,
        color=INK,
        alpha=0.65,
        lw=0,
        zorder=3,
        label=f"mean of {n.min():.0f}{f'-{n.max():.0f}' if n.max() > n.min() else ''} questions",
    )
    chance = float(trials["chance"].iloc[0])
    ax.axhline(chance, color=INK, lw=0.8, ls=(0, (1, 2)), label=f"chance ({chance:.3g})")
    claimed, image = run.header.model.claimed_length, run.header.image
    if claimed and image:
        claimed //= max(image.tokens, 1)
    lengths = trials["length"]
    if claimed and lengths.min() <= claimed <= lengths.max() * 1.1:
        ax.axvline(claimed, color=CLAIMED, lw=1.2, ls="--", label=f"claimed length ({claimed:,})")
    short, long = float(lengths.min()), float(lengths.max())
    found = [w for w in run.windows if w.probe == name]
    windows = [w.length or (short if w.censored == "below" else long) for w in found]
    # Words go where the windows are not.
    left = not windows or float(np.mean(np.log(windows))) > float(np.log(short * long)) / 2
    rows = _criteria_rows(ax, found, short, long, left)
    ax.set_ylim(-_ROW * (rows + 0.9), 1.05)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    token_axis(ax, short / 1.15, long * 1.15, f"context length ({run.header.unit})")
    if image:
        _other_measures(ax, image)
    ax.set_ylabel("score")
    ax.set_title(f"{run.header.model.name}: effective context window, probe '{name}'", loc="left", fontsize=11)
    ax.legend(
        fontsize=7.5,
        frameon=False,
        loc="lower left" if left else "upper right",
        bbox_to_anchor=(0.0, (rows + 1.5) * _ROW / (1.05 + _ROW * (rows + 0.9))) if left else (1.0, 0.98),
    )
    return ax


def depth(run: LoadedRun | str | os.PathLike[str], ax: Axes | None = None, probe: str | None = None) -> Axes:
    """Mean score by context length and needle depth, with the number of questions in each cell.

    Args:
        run: A run, or the path of its folder.
        ax: Where to draw; a new figure by default.
        probe: Which probe; the run's first by default.

    Returns:
        The Axes.

    Raises:
        UserError: The run holds no trials of that probe.
    """
    run, name, trials = _selected(run, probe)
    ax = ax or new_axes((7.2, 3.6))
    title = f"{run.header.model.name}: score by needle depth, probe '{name}'"
    placed = trials[trials["depth"].notna()]
    if placed.empty:
        ax.set_axis_off()
        ax.set_title(title, loc="left", fontsize=11)
        ax.text(0.5, 0.5, "the answer is spread over the whole text: no depth", ha="center", transform=ax.transAxes)
        return ax
    # Columns of half an octave: quarter octaves would leave too few questions a cell to read.
    column = np.round(2 * np.log2(placed["length"] / placed["length"].max())).astype(int)
    row = np.minimum((placed["depth"] * _DEPTHS).astype(int), _DEPTHS - 1)
    columns = sorted(column.unique())
    score = np.full((_DEPTHS, len(columns)), np.nan)
    count = np.zeros_like(score, dtype=int)
    for (r, c), group in placed.groupby([row, column])["score"]:
        at = int(str(r)), columns.index(c)
        score[at], count[at] = group.mean(), len(group)
    image = ax.imshow(score, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for r in range(_DEPTHS):
        for c in range(len(columns)):
            if count[r, c]:
                ink = "black" if score[r, c] > 0.55 else "white"
                ax.text(c, r - 0.1, f"{score[r, c]:.2f}", ha="center", va="center", color=ink, fontsize=8)
                ax.text(c, r + 0.26, f"n={count[r, c]}", ha="center", va="center", color=ink, fontsize=6)
    middle = [placed.loc[column == c, "length"].mean() for c in columns]
    ax.set_xticks(range(len(columns)), [tokens_text(v) for v in middle])
    ax.set_yticks(range(_DEPTHS), [f"{100 * r // _DEPTHS}-{100 * (r + 1) // _DEPTHS}%" for r in range(_DEPTHS)])
    ax.set_xlabel(f"context length ({run.header.unit}, half-octave bins)")
    ax.set_ylabel("needle depth\n(0% = start)")
    ax.set_title(title, loc="left", fontsize=11)
    ax.figure.colorbar(image, ax=ax, label="mean score", fraction=0.04, pad=0.02)
    return ax


def save_figures(run: LoadedRun) -> list[Path]:
    """Write `window.png` and `depth.png` into the run's folder, one panel a probe; their paths."""
    from matplotlib.figure import Figure

    probes = [p for p in run.header.settings.probes if _has_trials(run, p)]
    out = []
    tall = 6.0 if run.header.image else 4.8
    for name, draw, height in (("window", window, tall), ("depth", depth, 3.6)):
        if not probes:
            break
        figure = Figure(figsize=(7.2, height * len(probes)), layout="constrained")
        for k, probe in enumerate(probes):
            draw(run, ax=figure.add_subplot(len(probes), 1, k + 1), probe=probe)
        out.append(save_figure(figure, run.path / f"{name}.png"))
    return out


def _criteria_rows(ax: Axes, found: list[WindowEstimate], short: float, long: float, left: bool) -> int:
    """Below the curve: each criterion's window and interval; open ends are arrows. Returns the number of rows."""
    for k, w in enumerate(found):
        y, colour = -_ROW * (k + 0.9), CRITERIA[k % len(CRITERIA)]
        low, high = w.low or short, w.high or long
        ax.plot([low, high], [y, y], color=colour, lw=3, alpha=0.5, solid_capstyle="butt")
        if w.low is None:
            ax.plot(low, y, marker="<", color=colour, ms=6)
        if w.high is None:
            ax.plot(high, y, marker=">", color=colour, ms=6)
        if w.length:
            ax.plot(w.length, y, marker="|", color=colour, ms=10, mew=2.5)
        ax.annotate(
            f"{w.criterion}:  {w.value_text()} {w.interval_text()}",
            (0.012 if left else 0.988, y),
            xycoords=("axes fraction", "data"),
            ha="left" if left else "right",
            va="center",
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},  # a long bar passes below
        )
    ax.axhline(0, color=INK, lw=0.6)
    return len(found)


def _other_measures(ax: Axes, image: ImageExtent) -> None:
    """The same context in tokens and in RoPE positions, below the axis in images."""
    for k, (name, each) in enumerate((("tokens", image.tokens), ("RoPE positions", image.positions))):
        below = ax.secondary_xaxis(-0.16 - 0.13 * k, functions=(partial(mul, each), partial(mul, 1 / each)))
        low, high = (v * each for v in ax.get_xlim())
        ticks = powers_of_two(low, high)
        below.set_xscale("log", base=2)
        below.set_xticks(ticks, [tokens_text(t) for t in ticks], fontsize=7.5)
        below.set_xticks([], minor=True)
        below.set_xlabel(name, fontsize=8, labelpad=1)


def _selected(run: LoadedRun | str | os.PathLike[str], probe: str | None) -> tuple[LoadedRun, str, pd.DataFrame]:
    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    name = probe or loaded.header.settings.probes[0]
    if not _has_trials(loaded, name):
        raise UserError(
            f"The run '{loaded.path}' holds no trials of probe {name!r}; it measured "
            f"{', '.join(loaded.header.settings.probes)}."
        )
    trials = loaded.trials
    return loaded, name, trials[(trials["probe"] == name) & trials["score"].notna()]


def _has_trials(run: LoadedRun, probe: str) -> bool:
    return bool(((run.trials["probe"] == probe) & run.trials["score"].notna()).any())
