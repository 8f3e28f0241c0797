"""The effective window of a model whose rotary pairs of one band do not turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from laid_eval.models.load import LoadedModel
from laid_eval.models.rotary import unrotated
from laid_eval.spectra import Band, SpectrumSettings
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window


def knockout_windows(
    loaded: LoadedModel,
    bands: Sequence[Band],
    settings: SpectrumSettings,
    folder: Path,
    progress: Callable[[str], None],
) -> dict[float, str]:
    """Window with each band unrotated, in words, by the band's lower edge.

    Each is a run of its own (probe `needle`, up to the spectrum's length, three longest contexts of budget) in the
    folder `knockout-LOW`, resumed if killed.
    """
    out = {}
    for band in bands:
        progress(f"window without wavelengths from {band.low:,.0f} tokens")
        with unrotated(loaded.model, band.low, float("inf") if band.high is None else band.high):
            run = measure_window(
                ModelReader(loaded, settings.length),
                "needle",
                out=folder / f"knockout-{band.low:.0f}",
                max_length=settings.length,
                budget=3 * settings.length,
                seed=settings.seed,
            )
        out[band.low] = str(run.window()) if run.windows else "too few answers"
    return out
