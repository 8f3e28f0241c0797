"""What happens when rotary frequencies are changed: bands knocked out, and scalings predicted, then tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from laid_eval.errors import UserError
from laid_eval.models.load import scale_rope
from laid_eval.models.rotary import Rotary, is_rotary, rotaries, unrotated
from laid_eval.spectra import WhatIf
from laid_eval.spectrum.collect import Arrays, observe_text

Floats = NDArray[np.float64]
_POSITIONS = 512
"""Predictions of a text's second half whose loss is taken: logits of all would take gigabytes."""


def knockout_losses(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    edges: Sequence[tuple[float, float]],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[float, Floats]:
    """Rise of the loss with each band of wavelengths unrotated, by the band's lower edge: (T,) nats/token.

    One forward pass a band and text.

    Raises:
        UserError: The model's frequencies change with the length.
    """
    progress("loss with nothing unrotated")
    own = np.array([_loss(model, ids) for ids in texts])
    out: dict[float, Floats] = {}
    for low, high in edges:
        progress(f"loss without wavelengths from {low:,.0f} tokens")
        with unrotated(model, low, high):
            out[low] = np.array([_loss(model, ids) for ids in texts]) - own
    return out


def _loss(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Mean loss, nats/token, over predictions spread evenly over the text's second half."""
    tokens = torch.tensor([list(ids)], device=model.device)
    n = len(ids)
    at = torch.unique(torch.linspace(n // 2, n - 2, min(_POSITIONS, n // 2 - 1)).long()).to(model.device)
    with torch.inference_mode():
        logits = model(tokens, use_cache=False, logits_to_keep=at).logits[0].float()
        return float(nn.functional.cross_entropy(logits, tokens[0, at + 1]))


@contextmanager
def rescaled(model: PreTrainedModel, scaling: str) -> Iterator[None]:
    """Within, the model's rotary modules are those of another scaling: `yarn:2`, `linear:2`, `dynamic:2`, `base:4`.

    `base:4` multiplies the rotary base by 4^(F / (F - 1)), F pairs: the NTK-aware change, which stretches the longest
    wavelength by 4 and leaves the shortest as it is.

    Raises:
        UserError: Unknown scaling, or a model that has none.
    """
    config = copy.deepcopy(model.config)
    inner = config.get_text_config(decoder=True)
    kind, _, number = scaling.partition(":")
    if kind == "base":
        _scale_base(inner, scaling, number)
    else:
        try:
            scale_rope(config, scaling)
        except UserError:
            raise UserError(
                f"--what-if {scaling!r} can't be done: allowed are base:FACTOR, linear:FACTOR, dynamic:FACTOR and "
                "yarn:FACTOR, FACTOR above 1, on a model with rotary position embeddings."
            ) from None
    decoder = model.get_decoder()
    changed: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if is_rotary(child):
                    changed.append((parent, name, child))
                    build: Any = type(child)
                    setattr(parent, name, build(config=inner).to(model.device))
        yield
    finally:
        for parent, name, child in changed:
            setattr(parent, name, child)


def _scale_base(inner: Any, scaling: str, number: str) -> None:
    rope = getattr(inner, "rope_parameters", None) or {}
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if not (0 < factor < 1e6) or "rope_theta" not in rope:
        raise UserError(
            f"--what-if {scaling!r} can't be done: base:FACTOR needs a factor above 0 and a model with one rotary base."
        )
    head = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    pairs = max(head * rope.get("partial_rotary_factor", 1.0) / 2, 2)
    inner.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor ** (pairs / (pairs - 1))}


def predicted_logit(arrays: Arrays, rotary: Sequence[Rotary | None]) -> Floats:
    """(L, H, M) mean logit, nats, at `distances` if the measured un-rotated moments turned at these frequencies.

    Exact where the layer's inputs do not depend on the frequencies (the first rotating layer).
    """
    moment = arrays["moment"][..., 0] + 1j * arrays["moment"][..., 1]  # (L, H, F, M)
    out = np.full((*moment.shape[:2], moment.shape[-1]), np.nan)
    for row, layer in enumerate(arrays["layers"]):
        own = rotary[layer]
        if own is not None:
            turn = np.exp(1j * own.theta[:, None] * arrays["distances"])
            out[row] = own.factor**2 * (moment[row, :, : len(own.theta)] * turn).real.sum(axis=1)
    return out


def what_if(
    model: PreTrainedModel, scaling: str, ids: Sequence[int], arrays: Arrays, rotary: Sequence[Rotary | None]
) -> tuple[WhatIf, Floats, Floats]:
    """Predict the logit kernel under another scaling, then look: the record, predicted and measured (L, H, M).

    Args:
        model: As measured.
        scaling: See `rescaled`.
        ids: The text that `arrays` hold moments of.
        arrays: Of the unchanged model.
        rotary: Its pairs.
    """
    own = _squared_factors(arrays, rotary)
    with rescaled(model, scaling):
        other = rotaries(model, len(ids))
        # moments hold the measured factor already
        predicted = predicted_logit(arrays, other) / own
        part = observe_text(model, ids, other, queries=1, seed=0, kernels=True)
    measured = part["logit"][..., arrays["distances"]].astype(np.float64)
    before = predicted_logit(arrays, rotary) / own
    turning = [row for row, layer in enumerate(arrays["layers"]) if rotary[layer] is not None]
    first = turning[0]
    change, guess = (measured - before)[turning], (predicted - before)[turning]
    error = np.sqrt(np.nanmean((predicted - measured)[first] ** 2) / np.nanmean(measured[first] ** 2))
    spread = float(np.nansum(change**2))
    if spread <= 1e-10 * float(np.nansum(measured[turning] ** 2)):
        spread = 0.0  # rounding: at this length the scaling changes nothing
    record = WhatIf(
        scaling=scaling,
        first_layer_error=float(error),
        agreement=1 - float(np.nansum((change - guess) ** 2)) / spread if spread else None,
        change=float(np.sqrt(np.nanmean(change**2))),
    )
    return record, predicted, measured


def _squared_factors(arrays: Arrays, rotary: Sequence[Rotary | None]) -> Floats:
    """(L, 1, 1) what the measured moments were multiplied by."""
    turning = [rotary[layer] for layer in arrays["layers"]]
    return np.array([r.factor**2 if r else 1.0 for r in turning])[:, None, None]
