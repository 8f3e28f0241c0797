"""The data-free spectrum: what the weights alone say of the rotary pairs, into a run folder."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laid_eval.environment import environment
from laid_eval.errors import UserError
from laid_eval.models.cost import peak_memory
from laid_eval.models.load import describe
from laid_eval.models.rotary import rotaries_of_config
from laid_eval.models.source import resolve
from laid_eval.runs import run_folder
from laid_eval.spectra import (
    SPECTRA,
    LoadedSpectrum,
    Metric,
    SpectrumCost,
    SpectrumRun,
    SpectrumSettings,
    load_spectrum,
    save_arrays,
    save_spectrum,
)
from laid_eval.spectrum.measure import LENGTH
from laid_eval.spectrum.running import earlier
from laid_eval.spectrum.summary import bands, coverage, usage_metrics
from laid_eval.spectrum.weights import weight_spectrum


def measure_weights(
    model: str,
    *,
    length: int | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    rope_scaling: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedSpectrum:
    """Sizes of the rotary pairs from the rows of the query and key projections, a layer at a time.

    The model is not loaded: memory is that of one layer's projections, and there is no forward pass.

    Args:
        model: Reference model, local folder, GGUF file or Hub id; its weights must be safetensors.
        length: Tokens that coverage refers to. Default: the claimed length.
        out: Run folder. Default: a new one in `runs/`.
        revision: Of a Hub id.
        rope_scaling: As if scaled: `yarn:2`, `linear:2`, `dynamic:2`.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        UserError: A family whose projections are not known, or weights of another kind.
    """
    if length is not None and length < 1:
        raise UserError(f"--length must be at least 1 token, got {length}.")
    started = time.perf_counter()
    source = resolve(model, revision, False, trust_remote_code)
    described = describe(source, "float32", "cpu", rope_scaling, trust_remote_code)
    n = length or described.claimed_length or LENGTH
    settings = SpectrumSettings(
        length=n,
        texts=0,
        queries=0,
        haystack=None,
        haystack_hash=None,
        confidence=0.95,
        seed=0,
        knockout="no",
        what_if=(),
    )
    folder = run_folder(out, described.info.name, "spectrum")
    done = earlier(folder, described.info, settings)
    if done:
        return done
    rotary = rotaries_of_config(described.config, n)
    found = weight_spectrum(source.folder, described.config, rotary)
    arrays: dict[str, NDArray[Any]] = {
        "layers": found.layers,
        "theta": found.inv_freq.astype(np.float64),
        "usage": found.amplitude[None],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(folder / SPECTRA, {**arrays, **{f"weights_{k}": v for k, v in found.arrays().items()}})
    metrics: tuple[Metric, ...] = usage_metrics(arrays, n, settings.confidence)
    save_spectrum(
        folder,
        SpectrumRun(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status="complete",
            model=described.info,
            settings=settings,
            environment=environment(),
            coverage=coverage(rotary, arrays, n, described.claimed_length),
            metrics=metrics,
            bands=bands(arrays, settings.confidence),
            cost=SpectrumCost(
                seconds=round(time.perf_counter() - started, 1), peak_memory_bytes=peak_memory(described.device)
            ),
            notes=("from the weights alone: amplitude per unit-RMS input, no text was read", *found.notes),
        ),
    )
    return load_spectrum(folder)
