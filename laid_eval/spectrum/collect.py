"""From texts to arrays: one forward pass a text, a file a text, then all of them merged.

The file of a finished text stays until the whole measurement is done, so a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.errors import UserError
from laid_eval.models.capture import Call, capture
from laid_eval.models.rotary import Rotary
from laid_eval.spectra import UNREADABLE, read_arrays, save_arrays
from laid_eval.spectrum.distance import half_mass_distance, mean_log2_distance, octave_mass
from laid_eval.spectrum.fourier import (
    default_cuts,
    frequency_grid,
    half_power_frequency,
    low_frequency_ratio,
    spectral_centroid,
    spectral_entropy,
    transfer,
)
from laid_eval.spectrum.layout import log_distances, stationary_width
from laid_eval.spectrum.observe import observe, sample

Floats = NDArray[np.floating[Any]]
Arrays = dict[str, NDArray[Any]]

_FIRST = ("logit", "moment", "rms")
"""Kept of the first text only."""


def observe_text(
    model: PreTrainedModel,
    ids: Sequence[int],
    rotary: Sequence[Rotary | None],
    queries: int,
    seed: int,
    kernels: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Arrays:
    """One text through the model: the raw arrays of all its layers, stacked (L, ...).

    Args:
        model: With attention that can be captured.
        ids: N tokens.
        rotary: Pairs of every layer.
        queries: Rows sampled.
        seed: Of the sample.
        kernels: Also mean and RMS logits at every distance.
        progress: Called with the number of each layer done.
    """
    plan = sample(len(ids), queries, seed)
    prompt = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    return observe_layers(model, prompt, lambda call: dict(observe(call, rotary[call.layer], plan, kernels)), progress)


def observe_layers(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    observe: Callable[[Call], Arrays],
    progress: Callable[[int], None] = lambda _: None,
) -> Arrays:
    """One prompt through the model: what `observe` takes from each layer, stacked (L, ...), with `layers` and `scale`.

    Raises:
        UserError: A layer gives values that are not finite.
    """
    found: dict[int, Arrays] = {}

    def look(call: Call) -> None:
        arrays = observe(call)
        if not all(np.isfinite(x).all() for x in arrays.values()):
            raise UserError(f"Layer {call.layer} gives values that are not finite; try --dtype float32 or bfloat16.")
        arrays["scale"] = np.array(call.scale, dtype=np.float32)
        found[call.layer] = arrays
        progress(call.layer)

    with torch.inference_mode(), capture(model, look):
        model(**prompt, use_cache=False, logits_to_keep=1)
    layers = sorted(found)
    names = sorted({name for arrays in found.values() for name in arrays})
    out: Arrays = {name: _stacked([found[i].get(name) for i in layers]) for name in names}
    return out | {"layers": np.array(layers)}


def finish(parts: Sequence[Arrays], rotary: Sequence[Rotary | None], length: int) -> Arrays:
    """The arrays of `laid_eval.spectra.ARRAYS` from those of each text."""
    texts = [_derived(part) for part in parts]
    out: Arrays = {name: np.stack([t[name] for t in texts]) for name in texts[0]}
    out["profile"] = np.stack([part["profile"].mean(axis=1) for part in parts]).mean(axis=0)
    out |= {name: parts[0][name] for name in _FIRST if name in parts[0]}
    layers = parts[0]["layers"]
    pairs = max((len(r.theta) for r in rotary if r), default=0)
    theta = np.full((len(layers), pairs), np.nan)
    for row, layer in enumerate(layers):
        turning = rotary[layer]
        if turning is not None:
            theta[row, : len(turning.theta)] = turning.theta
    return out | {
        "layers": layers,
        "theta": theta,
        "scale": parts[0]["scale"],
        "distances": log_distances(length),
        "frequencies": frequency_grid(stationary_width(length)),
    }


def _derived(part: Arrays) -> Arrays:
    """What is kept of one text."""
    one, two = np.moveaxis(part["profile"].astype(np.float64), 1, 0)  # two samples of every profile
    profile = (one + two) / 2
    tail = np.clip(part["tail"], 0, None)
    near, far = default_cuts(profile.shape[-1])
    grid = frequency_grid(profile.shape[-1])
    out: Arrays = {
        "octave": octave_mass(profile, tail),
        "sink": part["sink"],
        "learned_sink": part["learned_sink"],
        "entropy": part["entropy"],
        "power": np.maximum((transfer(one, grid) * transfer(two, grid).conj()).real, 0),
        "d50": half_mass_distance(profile, 0.5, tail),
        "d90": half_mass_distance(profile, 0.9, tail),
        "log_distance": mean_log2_distance(profile),
        "half_power": half_power_frequency(profile),
        "low_ratio": low_frequency_ratio(one, near, other=two),
        "low_ratio_64": low_frequency_ratio(one, far, other=two),
        "centroid": spectral_centroid(one, other=two).log,
        "spectral_entropy": spectral_entropy(one, other=two),
    }
    if "query_norm" in part:
        scale = part["scale"].reshape(-1, 1, 1)
        mean: NDArray[Any] = np.linalg.norm(part["query_mean"], axis=-1)
        out |= {
            "usage": scale * part["query_norm"] * part["key_norm"],
            "concentration": mean / np.maximum(part["query_norm"], 1e-12),
            "key_concentration": np.linalg.norm(part["key_mean"], axis=-1) / np.maximum(part["key_norm"], 1e-12),
            "contribution": part["contribution"],
            "utility": part["utility"],
        }
    return {name: np.asarray(x, dtype=np.float32) for name, x in out.items()}


def mass_residual(parts: Sequence[Arrays]) -> float:
    """Largest distance from one of a head's masses: profile, tail, sinks, ahead."""
    worst = 0.0
    for part in parts:
        profile = part["profile"].mean(1, dtype=np.float64).sum(-1)
        total = profile + part["tail"] + part["sink"] + part["learned_sink"] + part["ahead"]
        worst = max(worst, float(np.abs(total - 1).max()))
    return worst


def load_part(path: Path) -> Arrays | None:
    """Arrays of a text that an earlier session finished."""
    if not path.is_file():
        return None
    try:
        return read_arrays(path)
    except UNREADABLE:
        return None  # torn: measured again


def save_part(path: Path, arrays: Arrays) -> None:
    """Keep the arrays of a finished text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, arrays)


def _stacked(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any]:
    """Stack layers; NaN fills what a layer does not have (pairs, heads)."""
    there = [np.asarray(a) for a in arrays if a is not None]
    if there[0].ndim == 0:
        return np.array(there)
    shape = tuple(max(a.shape[axis] for a in there) for axis in range(there[0].ndim))
    out = np.full((len(arrays), *shape), np.nan, dtype=np.float32)
    for row, array in enumerate(arrays):
        if array is not None:
            out[row][tuple(slice(0, n) for n in array.shape)] = array
    return out
