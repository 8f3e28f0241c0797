"""Plots of distillations: losses by term, and the gains by layer and wavelength."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laid_eval.distillations import DECIBEL, TERMS, LoadedDistillation, load_distillation
from laid_eval.errors import UserError
from laid_eval.report.plot.axes import CLAIMED, CRITERIA, CURVE, INK, new_axes, save_figure, tokens_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def losses(run: LoadedDistillation | str | os.PathLike[str], ax: Axes | None = None) -> Axes:
    """The loss and its terms, unweighted, step by step, on a logarithmic axis.

    Args:
        run: A distillation, or the path of its folder.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        UserError: No step was logged yet.
    """
    run = run if isinstance(run, LoadedDistillation) else load_distillation(run)
    if run.steps.empty:
        raise UserError(f"'{run.path}' holds no steps yet; let the distillation go on first.")
    ax = ax or new_axes((7.2, 4.2))
    shown = [name for name in TERMS if name in run.steps and (run.steps[name] > 0).any()]
    if len(shown) != 1:
        ax.plot(run.steps["step"], run.steps["loss"].clip(lower=1e-12), color=INK, lw=2, label="loss (weighted sum)")
    for name, colour in zip(shown, (CURVE, CLAIMED, *CRITERIA), strict=False):
        ax.plot(run.steps["step"], run.steps[name], color=colour, lw=1.5, label=name)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.set_xlabel("step of the optimiser")
    ax.set_ylabel("nats")
    name = run.header.recipe["name"]
    ax.set_title(f"{run.header.student.name}, recipe {name}", loc="left", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def rope_gain(run: LoadedDistillation | str | os.PathLike[str], ax: Axes | None = None) -> Axes:
    """The gains that were learned, dB, mean over heads: layers against wavelengths.

    Args:
        run: A distillation with gains, or the path of its folder.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        UserError: It has none.
    """
    run = run if isinstance(run, LoadedDistillation) else load_distillation(run)
    if run.log_gain is None or run.wavelength is None or not run.header.gains:
        raise UserError(f"The distillation in '{run.path}' learned no gains; a recipe with a [gain] table does.")
    ax = ax or new_axes((7.2, 4.8))
    db = run.log_gain.mean(axis=1) * DECIBEL
    order = np.argsort(run.wavelength[0])
    same = bool(np.allclose(run.wavelength, run.wavelength[0], rtol=1e-5, equal_nan=True))
    largest = max(float(np.nanmax(np.abs(db))), 0.5)
    image = ax.imshow(db[:, order], aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
    places = np.arange(0, len(order), max(len(order) // 8, 1))
    ax.set_xticks(places, [tokens_text(w) for w in run.wavelength[0][order][places]])
    layers = [g.layer for g in run.header.gains]
    rows = np.arange(0, len(layers), max(len(layers) // 10, 1))
    ax.set_yticks(rows, [str(layers[i]) for i in rows])
    ax.set_xlabel(f"wavelength of the rotary pair (tokens{'' if same else '; of the lowest layer, others differ'})")
    ax.set_ylabel("layer")
    sharing = "mean over heads" if run.header.sharing == "head" else "shared by heads"
    ax.set_title(f"RoPE gain of {run.header.student.name}, {sharing}", loc="left", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="dB")
    return ax


def save_distillation_figures(run: LoadedDistillation) -> list[Path]:
    """`losses.png`, and `rope-gain.png` where there are gains, in the run's folder."""
    import matplotlib.pyplot as plt

    saved = []
    plots = [("losses.png", losses)] + ([("rope-gain.png", rope_gain)] if run.log_gain is not None else [])
    for name, draw in plots:
        ax = draw(run)
        saved.append(save_figure(ax.figure, run.path / name))  # type: ignore[arg-type]
        plt.close(ax.figure)  # type: ignore[arg-type]
    return saved
