"""The part of a spectrum that needs no data and no loaded model: how large each rotary pair can get, from the weights.

For a layer input of unit RMS without a preferred direction, a pair's queries have RMS size |W_q,f|: the norm of its two
rows of the query projection, the input norm's weight multiplied in. What a pair can add to a logit is then

    amplitude_f = scale * factor^2 * |W_q,f| * |W_k,f|                         logit units (nats of a softmax)

and its share over pairs is the weights-only counterpart of *usage* (D8; Barbero et al. 2024, arXiv 2410.06205).
Where queries and keys have biases (Qwen2), these alone prefer distances, whatever the text (D11 of the biases):

    kernel(d) = scale * factor^2 * sum_f |b_q,f| |b_k,f| cos(inv_freq_f d + arg b_q,f - arg b_k,f)

One layer's projections are in memory at a time. Shape letters: L layers, H query heads, G key heads, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from laid_eval.errors import UserError
from laid_eval.models.rotary import Rotary
from laid_eval.spectrum.fourier import normalised
from laid_eval.spectrum.projections import Form, Projection, blocks_of, form_of, projections, tensors_of

Singles = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WeightSpectrum:
    """Size of every rotary pair from the weights. NaN fills where a layer has fewer heads or pairs than the largest."""

    layers: NDArray[np.int64]
    """(L,) numbers of the layers that rotate and have keys of their own."""
    inv_freq: Singles
    """(L, P) rad/token."""
    query_norm: Singles
    """(L, H, P) Frobenius norm of a pair's two rows of the query projection, norms' weights included."""
    key_norm: Singles
    """(L, G, P) likewise of the key projection."""
    amplitude: Singles
    """(L, H, P) logit units per unit-RMS input of query and key."""
    usage: Singles
    """(L, H, P) share of the amplitude over pairs, sums to 1; NaN for a head of zeros."""
    distances: NDArray[np.int64] | None
    """(K,) tokens; `None` without biases."""
    bias_kernel: Singles | None
    """(L, H, K) logit of the biases alone at each distance, rotated channels only."""
    notes: tuple[str, ...]
    """What a reader should know: layers left out, norms on queries and keys."""

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything but the notes by name, ready for `np.savez`."""
        named: dict[str, NDArray[np.generic] | None] = {
            "layers": self.layers,
            "inv_freq": self.inv_freq,
            "query_norm": self.query_norm,
            "key_norm": self.key_norm,
            "amplitude": self.amplitude,
            "usage": self.usage,
            "distances": self.distances,
            "bias_kernel": self.bias_kernel,
        }
        return {name: array for name, array in named.items() if array is not None}


@dataclass(frozen=True)
class _Layer:
    inv_freq: NDArray[np.float64]
    query_norm: NDArray[np.float64]
    key_norm: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    kernel: NDArray[np.float64] | None
    normed: bool


def weight_spectrum(
    folder: Path,
    config: PreTrainedConfig,
    rotary: Sequence[Rotary | None],
    distances: Sequence[int] | None = None,
) -> WeightSpectrum:
    """Size of every rotary pair straight from safetensors shards.

    Args:
        folder: Of the checkpoint (a GGUF file is converted to one by `laid_eval.models.source.resolve`).
        config: Its configuration.
        rotary: Pairs of every layer, from `laid_eval.models.rotary.rotaries_of_config`; `None`: does not rotate.
        distances: For the bias kernel, tokens; by default 0 and 64 steps on a log scale up to the claimed length.

    Raises:
        UserError: No rotary layers, quantized weights, or queries and keys that can't be read off the tensors.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"The weights of '{folder.name}' are quantized: their norms can't be read off the stored numbers. Take the "
            "unquantized checkpoint, or measure without --weights-only."
        )
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    owning = len(rotary) - shared
    turning = [(i, r) for i, r in enumerate(rotary[:owning]) if r is not None]
    if not turning:
        raise UserError(
            f"No layer of this {text.model_type} model rotates its queries and keys: no rotary pairs to read."
        )
    tensors = tensors_of(folder)
    blocks = blocks_of(tensors.names)
    form, calls = form_of(config, rotary[:owning])
    at = np.asarray(distances if distances is not None else _log_distances(text), dtype=np.int64)
    found = []
    for i, pairs in turning:
        sides = partial(projections, tensors, blocks, i, form, config, calls[i].query.shape[-1])
        found.append(_layer(sides, pairs, calls[i].scale, form, at))
    kernels = [layer.kernel for layer in found if layer.kernel is not None]
    biased = len(kernels) == len(found)
    return WeightSpectrum(
        layers=np.array([i for i, _ in turning]),
        inv_freq=_stacked([layer.inv_freq for layer in found]),
        query_norm=_stacked([layer.query_norm for layer in found]),
        key_norm=_stacked([layer.key_norm for layer in found]),
        amplitude=_stacked([layer.amplitude for layer in found]),
        usage=_stacked([normalised(layer.amplitude) for layer in found]),
        distances=at if biased else None,
        bias_kernel=_stacked(kernels) if biased else None,
        notes=_notes(rotary, owning, any(layer.normed for layer in found)),
    )


def bias_kernel(
    query_bias: Tensor, key_bias: Tensor, rotary: Rotary, scale: float, distances: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(H, K) logit of biases (H, D) and (G, D) alone at distances (K,) tokens, rotated channels only (D11)."""
    q, k = (rotary.pairs(bias.double()).numpy() for bias in (query_bias, key_bias))
    product = q * np.repeat(k.conj(), len(q) // len(k), axis=0)
    turn = np.exp(1j * rotary.theta[:, None] * distances)
    return np.asarray((product @ turn).real * scale * rotary.factor**2)


def _layer(
    sides: Callable[[], tuple[Projection, Projection]],
    rotary: Rotary,
    scale: float,
    form: Form,
    distances: NDArray[np.int64],
) -> _Layer:
    query, key = sides()  # read in here, so that they are gone before the next layer's
    q, k = (_pair_norms(side, rotary, form) for side in (query, key))
    normed = query.gain is not None or key.gain is not None
    kernel = None
    if query.bias is not None and key.bias is not None and not normed:
        kernel = bias_kernel(query.bias, key.bias, rotary, scale, distances)
    return _Layer(
        inv_freq=rotary.theta,
        query_norm=q,
        key_norm=k,
        amplitude=scale * rotary.factor**2 * q * np.repeat(k, len(q) // len(k), axis=0),
        kernel=kernel,
        normed=normed,
    )


def _pair_norms(projection: Projection, rotary: Rotary, form: Form) -> NDArray[np.float64]:
    """(H, P) RMS size of each pair for an input of unit RMS; a norm on queries or keys sets the size of a head."""
    rows = projection.rows
    over = (0, 1) if projection.joint else (1,)
    if projection.gain is not None and form.norm == "layer":
        rows = rows - rows.mean(dim=over, keepdim=True)
    square = rows.square().sum(dim=-1).double()
    if projection.gain is not None:
        square = square / square.mean(dim=over, keepdim=True) * projection.gain.double().square()
    first, second = (torch.as_tensor(channels) for channels in (rotary.first, rotary.second))
    return (square[:, first] + square[:, second]).sqrt().numpy()


def _log_distances(text: PreTrainedConfig) -> NDArray[np.int64]:
    longest = getattr(text, "max_position_embeddings", None) or 4096
    return np.unique(np.round(np.r_[0, np.geomspace(1, longest, 64)]).astype(np.int64))


def _stacked(arrays: Sequence[NDArray[np.float64]]) -> Singles:
    """Arrays of one rank along a new first axis, filled up with NaN to the largest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    out = np.full((len(arrays), *shape), np.nan, dtype=np.float32)
    for i, array in enumerate(arrays):
        out[i][tuple(slice(n) for n in array.shape)] = array
    return out


def _notes(rotary: Sequence[Rotary | None], owning: int, normed: bool) -> tuple[str, ...]:
    still = [str(i) for i, r in enumerate(rotary[:owning]) if r is None]
    out = []
    if still:
        out.append(f"Left out, as they don't rotate: layers {', '.join(still)}.")
    if owning < len(rotary):
        out.append(f"Left out, as their keys come from an earlier layer: layers {owning} to {len(rotary) - 1}.")
    if normed:
        out.append("Queries and keys are normed: sizes hold for an average input, and biases have no closed form.")
    return tuple(out)
