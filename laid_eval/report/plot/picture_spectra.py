"""Plots of spectra on pictures: rotary pairs by position axis, attention by picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from laid_eval.errors import UserError
from laid_eval.report.plot.axes import CLAIMED, CRITERIA, CURVE, INK, new_axes, octave_axis
from laid_eval.spectra import LoadedSpectrum, PictureFindings, load_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS = {
    "t": (CURVE, "o", "t: time"),
    "h": (CLAIMED, "s", "h: height"),
    "w": (CRITERIA[0], "^", "w: width"),
    "text": (CURVE, "o", "one axis"),
    "none": (CRITERIA[4], "x", "does not turn"),
}
"""Colour, marker and name of each position axis."""
_PANELS = 6
_TOP = 3
Run = LoadedSpectrum | str | os.PathLike[str]


def axes(run: Run, ax: Axes | None = None) -> Axes:
    """Usage of every rotary pair over its wavelength in positions, coloured and marked by position axis.

    Points are means over haystacks, layers and heads, bars hold the middle half of the layers.

    Raises:
        UserError: The run showed no pictures, or the model has no rotary pairs.
    """
    loaded, found = _shown(run)
    arrays = loaded.arrays
    ax = ax or new_axes((7.2, 4.2))
    usage = arrays["usage"].astype(float)
    share = np.nanmean(usage / np.nansum(usage, axis=-1, keepdims=True), axis=(0, 2))  # (L, F)
    longest = 8.0
    for name, (colour, marker, label) in AXIS.items():
        own = arrays["axis"] == name
        turning = own & (arrays["theta"] > 0)
        for first, column in enumerate(np.flatnonzero(turning.any(axis=0))):
            rows = turning[:, column]
            # layers may differ in their frequencies: a point each
            for theta in np.unique(np.round(arrays["theta"][rows, column], 12)):
                same = rows & np.isclose(arrays["theta"][:, column], theta, rtol=1e-6)
                low, high = np.quantile(share[same, column], [0.25, 0.75])
                wavelength = 2 * np.pi / theta
                longest = max(longest, wavelength)
                ax.plot([wavelength] * 2, [low, high], color=colour, lw=1.2, alpha=0.6)
                mean = share[same, column].mean()
                ax.plot(wavelength, mean, marker, ms=5, color=colour, label=None if first else label)
    pairs = max(a.pairs / a.even for a in found.axes)
    ax.axhline(1 / pairs, color=INK, lw=0.8, ls=(0, (1, 2)), label=f"even share (1/{pairs:.0f})")
    ax.axvline(found.audit.positions, color=INK, lw=1, label=f"positions of a prompt ({found.audit.positions:,})")
    octave_axis(ax, 3, longest, "wavelength of the rotary pair (positions)")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("share of usage, mean |q| x mean |k|")
    ax.set_title(f"{loaded.header.model.name}: rotary pairs by position axis", loc="left", fontsize=11)
    handles, labels = ax.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    ax.legend(kept.values(), kept.keys(), fontsize=7.5, frameon=False)
    return ax


def axis_shares(run: Run, ax: Axes | None = None) -> Axes:
    """Share of usage by position axis with its interval, the even share marked.

    Raises:
        UserError: The run showed no pictures, or the model has no rotary pairs.
    """
    _, found = _shown(run)
    ax = ax or new_axes((7.2, 2.2))
    y = np.arange(len(found.axes))
    for at, a in zip(y, found.axes, strict=True):
        value = a.usage.value or 0.0
        ends = [[value - (a.usage.low or value)], [(a.usage.high or value) - value]]
        ax.barh(at, value, height=0.6, color=AXIS[a.axis][0], alpha=0.75)
        ax.errorbar(value, at, xerr=ends, fmt="none", ecolor=INK, lw=1, capsize=2)
        ax.plot([a.even] * 2, [at - 0.38, at + 0.38], color=INK, lw=1.4, ls=(0, (1, 1)))
    ax.plot([], [], color=INK, lw=1.4, ls=(0, (1, 1)), label="even share")
    ax.set_yticks(y, [f"{AXIS[a.axis][2]} ({a.pairs:g} pairs)" for a in found.axes], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("share of usage (interval over haystacks)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def images(run: Run, ax: Axes | None = None, haystack: int = 0) -> Axes:
    """Attention of the question's last tokens by picture in one haystack, the needle's picture marked.

    The mean over all heads, and the heads that put most of it on needles over all haystacks; each scaled to its
    attention on pictures. The dotted line is what each picture has of their tokens.

    Args:
        run: A spectrum run on pictures, or the path of its folder.
        ax: Where to draw; a new figure by default.
        haystack: Its number, from 0.

    Raises:
        UserError: The run showed no pictures, or not so many haystacks.
    """
    loaded, _ = _shown(run, pairs=False)
    arrays = loaded.arrays
    mass = arrays["image_mass"].astype(float)  # (T, L, H, I)
    if not 0 <= haystack < len(mass):
        raise UserError(f"The run '{loaded.path}' holds haystacks 0 to {len(mass) - 1}, none with number {haystack}.")
    ax = ax or new_axes((7.2, 3.2))
    needle = int(arrays["needle"][haystack])
    number = np.arange(1, mass.shape[-1] + 1)
    ax.axvspan(needle + 0.5, needle + 1.5, color=CRITERIA[2], alpha=0.3, lw=0, label="needle's picture")
    table = loaded.heads.nlargest(_TOP, "needle")
    row = {int(layer): i for i, layer in enumerate(arrays["layers"])}
    styles = zip((CURVE, CLAIMED, CRITERIA[0]), ("-", "--", "-."), strict=True)
    for (_, head), (colour, style) in zip(table.iterrows(), styles, strict=False):
        line = mass[haystack, row[int(head["layer"])], int(head["head"])]
        ax.plot(
            number, line / line.sum(), style, color=colour, lw=1.4, label=f"head {head['layer']:.0f}.{head['head']:.0f}"
        )
    every = np.nansum(mass[haystack], axis=(0, 1))
    ax.plot(number, every / every.sum(), color=INK, lw=2, label="all heads")
    share = np.nanmean(arrays["image_share"][haystack].astype(float), axis=0)
    ax.plot(number, share / share.sum(), color=INK, lw=0.9, ls=(0, (1, 2)), label="share of tokens")
    ax.set_xlim(0.5, len(number) + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("picture, in order")
    ax.set_ylabel("share of attention\non pictures")
    ax.set_title(f"haystack {haystack + 1}: needle in picture {needle + 1}", loc="left", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def picture_figure(run: LoadedSpectrum) -> Figure:
    """`images` of the first six haystacks, one under the other."""
    from matplotlib.figure import Figure

    count = min(run.header.settings.texts, _PANELS)
    figure = Figure(figsize=(8.6, 1.9 * count + 0.9), layout="constrained")
    panels: Any = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for k, ax in enumerate(panels):
        images(run, ax=ax, haystack=k)
        ax.label_outer()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"{run.header.model.name}: what the question's last 4 tokens look at", fontsize=11)
    return figure


def _shown(run: Run, pairs: bool = True) -> tuple[LoadedSpectrum, PictureFindings]:
    loaded = run if isinstance(run, LoadedSpectrum) else load_spectrum(run)
    found = loaded.header.pictures
    if found is None:
        raise UserError(f"The run '{loaded.path}' showed no pictures; measure a vision-language model.")
    if pairs and not found.axes:
        raise UserError(f"The run '{loaded.path}' is of a model without rotary pairs.")
    return loaded, found
