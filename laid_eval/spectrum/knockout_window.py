"""The effective window of a model whose rotary pairs of one band do not turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from laid_eval.models.load import LoadedModel
from laid_eval.models.rotary import unrotated
from laid_eval.spectra import SpectrumSettings
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window

SHORTEST = 512
"""Tokens: a window needs an octave of lengths."""


def knockout_windows(
    loaded: LoadedModel,
    edges: Sequence[tuple[float, float]],
    settings: SpectrumSettings,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[str, dict[float, str]]:
    """Window in words with nothing unrotated, and with each band unrotated by the band's lower edge.

    Each is a run of its own (probe `needle`, up to the spectrum's length, three longest contexts of budget) in a folder
    of `folder`, whose record of the model says what was unrotated. A killed one goes on.
    """
    progress("window with nothing unrotated")
    own = _window(loaded, "nothing", settings, folder / "knockout-nothing")
    out = {}
    for low, high in edges:
        name = f"wavelengths {low:.0f} to {high:.0f}"
        progress(f"window without {name}")
        with unrotated(loaded.model, low, high):
            out[low] = _window(loaded, name, settings, folder / f"knockout-{low:.0f}")
    return own, out


def _window(loaded: LoadedModel, stopped: str, settings: SpectrumSettings, folder: Path) -> str:
    scaling = " ".join(filter(None, [loaded.info.rope_scaling, f"unrotated: {stopped}"]))
    named = replace(loaded, info=loaded.info.model_copy(update={"rope_scaling": scaling}))
    run = measure_window(
        ModelReader(named, settings.length),
        "needle",
        out=folder,
        max_length=settings.length,
        budget=3 * settings.length,
        seed=settings.seed,
    )
    return str(run.window()) if run.windows else "too few answers"
