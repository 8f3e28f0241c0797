"""Plots of spectra. Each takes `ax=None` and returns the Axes; nothing is computed here that a run does not hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laid_eval.errors import UserError
from laid_eval.report.plot.axes import CLAIMED, CRITERIA, CURVE, INK, new_axes, octave_axis, save_figure, tokens_text
from laid_eval.report.plot.picture_spectra import axes, axis_shares, picture_figure
from laid_eval.spectra import LoadedSpectrum, load_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = {
    "sink": "sink: mass on the first 4 tokens",
    "local": "local: mass within 64 tokens",
    "positional": "positional: most mass at one distance < 9",
    "global": "global: mass from {far} tokens on",
    "retrieval": "retrieval: answer token found in its needle",
    "needle": "needle: share of attention on pictures that its own has",
    "d50": "half-mass distance",
}
_WAVELENGTH = "wavelength of the rotary pair ({})"
Run = LoadedSpectrum | str | os.PathLike[str]


def heads(run: Run, ax: Axes | None = None, score: str = "retrieval") -> Axes:
    """One score of every head: layers down, heads across.

    Args:
        run: A spectrum run, or the path of its folder.
        ax: Where to draw; a new figure by default.
        score: A column of the run's `heads`: sink, local, positional, global, retrieval, d50, ...

    Raises:
        UserError: The run holds no such score.
    """
    from matplotlib.colors import LogNorm

    loaded = _loaded(run)
    table = loaded.heads
    if score not in table or score in ("layer", "head", "kinds"):
        names = [str(c) for c in table]
        columns = [c for c in names if not c.endswith(("_low", "_high")) and c not in ("layer", "head", "kinds")]
        raise UserError(f"The run '{loaded.path}' holds no head score {score!r}; it holds: {', '.join(columns)}.")
    grid = table.pivot(index="layer", columns="head", values=score)
    if ax is None:
        ax = new_axes((0.32 * grid.shape[1] + 2.2, 0.16 * grid.shape[0] + 1.4))
    values = grid.to_numpy(float)
    shares = score in ("sink", "local", "positional", "global", "retrieval", "needle")
    spread: dict[str, Any] = {"vmin": 0, "vmax": 1} if shares else {}
    if score in ("d50", "d90") and np.isfinite(values).any():
        values = np.maximum(values, 1)
        spread = {"norm": LogNorm(1, max(float(np.nanmax(values)), 2))}
    image = ax.imshow(values, cmap="cividis", aspect="auto", **spread)
    ax.set_facecolor("#dddddd")  # what is unknown
    step = max(grid.shape[0] // 10, 1)
    ax.set_yticks(range(0, grid.shape[0], step), [str(v) for v in grid.index[::step]])
    step = max(grid.shape[1] // 10, 1)
    ax.set_xticks(range(0, grid.shape[1], step), [str(v) for v in grid.columns[::step]])
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    far = 1 << int(np.log2(loaded.header.settings.length // 4))
    ax.set_title(SCORES.get(score, score).format(far=tokens_text(far)), loc="left", fontsize=8.5)
    unit = "tokens" if score in ("d50", "d90") else "share" if shares else None
    ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, label=unit)
    return ax


def pairs(run: Run, ax: Axes | None = None) -> Axes:
    """Usage of the rotary pairs over their wavelength, the measured and the claimed length marked.

    The line is the mean share of a head's usage over layers and heads, the band holds the middle half of the layers;
    dots below the even share are pairs used less than if all were used alike.

    Raises:
        UserError: The model has no rotary pairs.
    """
    loaded = _loaded(run)
    arrays = loaded.arrays
    if "usage" not in arrays:
        raise UserError(f"The run '{loaded.path}' is of a model without rotary pairs.")
    ax = ax or new_axes((7.2, 4.2))
    theta, usage = arrays["theta"], arrays["usage"].astype(float)
    share = (usage / np.nansum(usage, axis=-1, keepdims=True)).mean(axis=0)  # (L, H, F)
    for k, (value, rows) in enumerate(_groups(theta)):
        turning = value > 0
        wavelength = 2 * np.pi / value[turning]
        layers = np.nanmean(share[rows][..., : len(value)], axis=1)[:, turning]
        colour = CURVE if k == 0 else CRITERIA[(k - 1) % len(CRITERIA)]
        name = "mean over heads" if len(_groups(theta)) == 1 else f"layers {_numbers(arrays['layers'][rows])}"
        low, high = np.quantile(layers, [0.25, 0.75], axis=0)
        ax.fill_between(wavelength, low, high, color=colour, alpha=0.18, lw=0, label="middle half of the layers")
        ax.plot(wavelength, layers.mean(axis=0), color=colour, lw=1.5, marker="o", ms=3.5, label=name)
        ax.axhline(1 / len(value), color=INK, lw=0.8, ls=(0, (1, 2)), label=f"even share (1/{len(value)})")
    header = loaded.header
    claimed = header.model.claimed_length
    n, unit = header.settings.length, "tokens"
    if header.pictures:
        n, unit = header.pictures.audit.positions, "positions"
    ax.axvline(n, color=INK, lw=1, label=f"measured length ({n:,})")
    if claimed and claimed != n:
        ax.axvline(claimed, color=CLAIMED, lw=1.2, ls="--", label=f"claimed length ({claimed:,})")
    ax.set_xscale("log", base=2)  # its margins decide how far the ticks go
    octave_axis(ax, 3, ax.get_xlim()[1], _WAVELENGTH.format(unit))
    ax.set_ylim(bottom=0)
    what = "share of usage, mean |q| x mean |k|"
    ax.set_ylabel(what if header.settings.texts else "share of amplitude by the weights alone")
    ax.set_title(f"{header.model.name}: usage of rotary pairs", loc="left", fontsize=11)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def bands(run: Run, ax: Axes | None = None) -> Axes:
    """What the rotation of each band of wavelengths is worth: divergence of attention, and of the loss if knocked out.

    Raises:
        UserError: The run holds no rotation utility.
    """
    loaded = _loaded(run)
    found = [b for b in loaded.header.bands if b.utility is not None]
    if not found:
        raise UserError(f"The run '{loaded.path}' holds no rotation utility.")
    ax = ax or new_axes((7.2, 3.4))
    y = np.arange(len(found))
    shown: list[tuple[str, str, list[Any]]] = [("attention unrotated: KL (nats)", CURVE, [b.utility for b in found])]
    if all(b.knockout for b in found):
        shown.append(("loss unrotated: rise (nats/token)", CLAIMED, [b.knockout for b in found]))
    height = 0.8 / len(shown)
    for k, (label, colour, values) in enumerate(shown):
        mean = np.array([v.value or 0.0 for v in values])
        low = np.array([v.value - v.low if v.low is not None else 0.0 for v in values])
        high = np.array([v.high - v.value if v.high is not None else 0.0 for v in values])
        at = y + (k - (len(shown) - 1) / 2) * height
        ax.barh(at, mean, height=height * 0.9, color=colour, alpha=0.75, label=label)
        ax.errorbar(mean, at, xerr=[low, high], fmt="none", ecolor=INK, lw=1)
    ax.set_yticks(y, [_range(b.low, b.high) for b in found])
    ax.invert_yaxis()
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_ylabel("wavelength (tokens)")
    ax.set_xlabel("nats")
    ax.set_title(f"{loaded.header.model.name}: what the rotation of each band is worth", loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def transfer(run: Run, ax: Axes | None = None) -> Axes:
    """|H(nu)|^2 of the distance profile, a line a layer (mean over heads), coloured by depth.

    1 at zero frequency; the further right a line stays high, the more local its layer.

    Raises:
        UserError: The run is of the weights alone.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize

    loaded = _loaded(run)
    arrays = loaded.arrays
    if "power" not in arrays:
        raise UserError(f"The run '{loaded.path}' is of the weights alone; it holds no attention.")
    ax = ax or new_axes((7.2, 4.2))
    power = np.nanmean(arrays["power"], axis=(0, 2))  # (L, K)
    layers, nu = arrays["layers"], arrays["frequencies"]
    colours = plt.get_cmap("viridis")
    norm = Normalize(float(layers.min()), float(max(layers.max(), 1)))
    for layer, line in zip(layers, power, strict=True):
        ax.plot(nu, line, color=colours(norm(layer)), lw=0.9, alpha=0.85)
    ax.plot(nu, power.mean(axis=0), color=INK, lw=2.2, label="mean over layers")
    ax.set_xscale("log", base=2)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("frequency nu (cycles/token)")
    ticks = [2.0**-k for k in range(1, int(-np.log2(nu[0])) + 1, 2)]
    ax.set_xticks(ticks, [f"1/{1 / t:,.0f}" for t in ticks], fontsize=8)
    ax.set_xticks([], minor=True)
    ax.set_ylabel("|H(nu)|^2")
    ax.set_title(f"{loaded.header.model.name}: attention as a filter over distance", loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=ax, label="layer", fraction=0.04, pad=0.02)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def gain(run: Run, ax: Axes | None = None) -> Axes:
    """Student over teacher: usage of every rotary pair in dB, the middle half of the layers around the median.

    Raises:
        UserError: The run holds no comparison pair by pair.
    """
    loaded = _loaded(run)
    found = loaded.comparison
    if "gain_db" not in found:
        raise UserError(f"The run '{loaded.path}' holds no teacher with the same rotary pairs; measure with --teacher.")
    ax = ax or new_axes((7.2, 3.6))
    longest = 0.0
    for k, (inv_freq, rows) in enumerate(_groups(2 * np.pi / found["wavelength"])):
        turning = inv_freq > 0
        wavelength, db = 2 * np.pi / inv_freq[turning], found["gain_db"][rows][:, : len(inv_freq)][:, turning]
        longest = max(longest, float(wavelength.max()))
        colour = CURVE if k == 0 else CRITERIA[(k - 1) % len(CRITERIA)]
        low, median, high = np.nanquantile(db, [0.25, 0.5, 0.75], axis=0)
        label = "median layer" if k == 0 else f"median of layers {_numbers(np.array(rows))}"
        ax.fill_between(wavelength, low, high, color=colour, alpha=0.18, lw=0, label="middle half of the layers")
        ax.plot(wavelength, median, color=colour, lw=1.8, marker="o", ms=3.5, label=label)
    ax.axhline(0, color=INK, lw=0.8)
    pictures = loaded.header.pictures
    n = pictures.audit.positions if pictures else loaded.header.settings.length
    ax.axvline(n, color=INK, lw=1, ls=":", label="measured length")
    octave_axis(ax, 3, longest, _WAVELENGTH.format("positions" if loaded.header.pictures else "tokens"))
    ax.set_ylabel("usage, student over teacher (dB)")
    teacher = loaded.header.teacher.name if loaded.header.teacher else "teacher"
    ax.set_title(f"{loaded.header.model.name} against {teacher}", loc="left", fontsize=11)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def what_if(run: Run, ax: Axes | None = None, scaling: str | None = None) -> Axes:
    """Mean logit by distance under another scaling: as it is, as predicted, and as then measured (mean over heads).

    Args:
        run: A spectrum run, or the path of its folder.
        ax: Where to draw; a new figure by default.
        scaling: One of the run's; the first by default.

    Raises:
        UserError: The run tried no such scaling.
    """
    loaded = _loaded(run)
    tried = [w.scaling for w in loaded.header.what_if]
    name = scaling or next(iter(tried), None)
    if name not in tried:
        raise UserError(f"The run '{loaded.path}' tried no scaling {name!r}; it tried: {', '.join(tried) or 'none'}.")
    k = tried.index(name)
    arrays = loaded.arrays
    ax = ax or new_axes((7.2, 3.6))
    at = arrays["distances"]
    now = arrays["logit"][..., at]
    for values, colour, style, label in (
        (now, INK, "-", "as it is"),
        (arrays[f"what_if_{k}_predicted"], CURVE, "--", f"{name}: predicted"),
        (arrays[f"what_if_{k}_measured"], CLAIMED, "-", f"{name}: measured"),
    ):
        ax.plot(np.maximum(at, 0.5), np.nanmean(values, axis=(0, 1)), color=colour, ls=style, lw=1.6, label=label)
    octave_axis(ax, 0, at.max(), "distance (tokens)")
    ax.set_ylabel("mean logit (nats)")
    ax.set_title(f"{loaded.header.model.name}: logit by distance, what if {name}", loc="left", fontsize=11)
    ax.legend(fontsize=7.5, frameon=False)
    return ax


def save_spectra(run: LoadedSpectrum) -> list[Path]:
    """Write the figures of a spectrum run into its folder; their paths."""
    from matplotlib.figure import Figure

    out: list[Path] = []

    def save(name: str, figure: Figure) -> None:
        out.append(save_figure(figure, run.path / f"{name}.png"))

    header = run.header
    if header.settings.texts:
        table = run.heads
        scores = [s for s in SCORES if s in table]
        tall = 0.11 * table["layer"].nunique() + 1.3
        figure = Figure(figsize=(10.5, 2 * tall), layout="constrained")
        for k, score in enumerate(scores):
            heads(run, ax=figure.add_subplot(2, 3, k + 1), score=score)
        figure.suptitle(f"{header.model.name}: heads, {header.settings.length:,} tokens", fontsize=11)
        save("heads", figure)
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        transfer(run, ax=figure.add_subplot())
        save("transfer", figure)
    if header.bands:
        figure = Figure(figsize=(7.2, 7.4 if header.settings.texts else 4.2), layout="constrained")
        pairs(run, ax=figure.add_subplot(2, 1, 1) if header.settings.texts else figure.add_subplot())
        if header.settings.texts:
            bands(run, ax=figure.add_subplot(2, 1, 2))
        save("pairs", figure)
    if header.pictures:
        save("images", picture_figure(run))
        if header.pictures.axes:
            figure = Figure(figsize=(7.2, 6.6), layout="constrained")
            upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
            axes(run, ax=upper)
            axis_shares(run, ax=lower)
            save("axes", figure)
    if header.what_if:
        figure = Figure(figsize=(7.2, 3.4 * len(header.what_if)), layout="constrained")
        for k, tried in enumerate(header.what_if):
            what_if(run, ax=figure.add_subplot(len(header.what_if), 1, k + 1), scaling=tried.scaling)
        save("what-if", figure)
    if "gain_db" in run.comparison:
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        gain(run, ax=figure.add_subplot())
        save("gain", figure)
    return out


def _loaded(run: Run) -> LoadedSpectrum:
    return run if isinstance(run, LoadedSpectrum) else load_spectrum(run)


def _groups(theta: NDArray[Any]) -> list[tuple[NDArray[Any], list[int]]]:
    """Layers (rows of theta) by their frequencies; those without are left out."""
    out: list[tuple[NDArray[Any], list[int]]] = []
    for row, value in enumerate(theta):
        own = value[~np.isnan(value)]
        if not len(own):
            continue
        for first, rows in out:
            if len(first) == len(own) and np.allclose(first, own, rtol=1e-5):
                rows.append(row)
                break
        else:
            out.append((own, [row]))
    return out


def _numbers(layers: NDArray[Any]) -> str:
    numbers = [str(int(x)) for x in layers]
    return ", ".join(numbers) if len(numbers) <= 6 else f"{', '.join(numbers[:3])}, ... {numbers[-1]}"


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "do not turn"
    if not low:
        return f"< {tokens_text(high or 0)}"
    return f">= {tokens_text(low)}" if high is None else f"{tokens_text(low)} - {tokens_text(high)}"
