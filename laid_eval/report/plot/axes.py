"""What the plots share: colours and axes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito: told apart by colour-blind readers and in grey.
INK, CURVE, CLAIMED = "#333333", "#0072B2", "#D55E00"
CRITERIA = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write under a name beside `path`, then rename: a reader never sees half a picture."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path


def octave_axis(ax: Axes, first: int, longest: float, label: str) -> None:
    """A logarithmic axis with a tick at every second power of two, from 2^first tokens."""
    ax.set_xscale("log", base=2)
    ticks = [2.0**k for k in range(first, int(np.log2(longest)) + 1, 2)]
    ax.set_xticks(ticks, [tokens_text(t) if t < 2**20 else f"{t / 2**20:.0f}M" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)


def token_axis(ax: Axes, low: float, high: float, label: str = "context length (tokens)") -> None:
    """A logarithmic axis in powers of two."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    ticks = powers_of_two(low, high)
    ax.set_xticks(ticks, [tokens_text(t) for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)


def powers_of_two(low: float, high: float) -> list[float]:
    """Those that lie between.

    >>> powers_of_two(3, 17)
    [4.0, 8.0, 16.0]
    """
    return [2.0**k for k in range(int(np.ceil(np.log2(low))), int(np.floor(np.log2(high))) + 1)]


def tokens_text(tokens: float) -> str:
    """`512`, `8k`, `11.6k`."""
    if tokens < 1000:
        return f"{tokens:.0f}"
    thousands = tokens / 1024
    return f"{thousands:.0f}k" if abs(thousands - round(thousands)) < 0.05 else f"{thousands:.1f}k"


def new_axes(size: tuple[float, float]) -> Axes:
    """A figure of its own."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]
