"""From a trained student to an ordinary checkpoint: adapters merged, gains folded, written, loaded anew, compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from laid_eval.core import RopeGain
from laid_eval.distillation.batches import like
from laid_eval.distillation.train import write_failure
from laid_eval.distillations import DECIBEL, GAINS, LayerGains
from laid_eval.errors import UserError
from laid_eval.models.rotary import Rotary
from laid_eval.models.source import quiet
from laid_eval.runs import publish
from laid_eval.spectra import save_arrays

_BOUND = {torch.float64: 1e-6, torch.float32: 1e-3}  # nats; the same weights in the same type
_LOOSE = 0.05


def save_gains(folder: Path, gains: dict[int, RopeGain], rotaries: Sequence[Rotary | None]) -> tuple[LayerGains, ...]:
    """Write all gains as arrays, and sum them up by layer.

    `log_gain` (layers, H or 1, P) natural logarithms, `wavelength` (layers, P) tokens per turn, `layers`; NaN where a
    layer has fewer pairs than another.
    """
    layers = sorted(gains)
    found = [gains[layer].log_gain().detach().double().cpu().numpy() for layer in layers]
    pairs = max(values.shape[1] for values in found)
    log_gain = np.full((len(layers), len(found[0]), pairs), np.nan)
    wavelength = np.full((len(layers), pairs), np.nan)
    for row, (layer, values) in enumerate(zip(layers, found, strict=True)):
        rotary = rotaries[layer]
        assert rotary is not None, "only layers that rotate have gains"
        log_gain[row, :, : values.shape[1]] = values
        wavelength[row, : values.shape[1]] = rotary.wavelength
    save_arrays(folder / GAINS, {"log_gain": log_gain, "wavelength": wavelength, "layers": np.array(layers)})
    db = log_gain * DECIBEL
    return tuple(
        LayerGains(
            layer=layer,
            rms_db=round(float(np.sqrt(np.nanmean(values**2))), 4),
            lowest_db=round(float(np.nanmin(values)), 4),
            highest_db=round(float(np.nanmax(values)), 4),
        )
        for layer, values in zip(layers, db, strict=True)
    )


def export(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase | ProcessorMixin,
    folder: Path,
    dtype: torch.dtype,
    prompt: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write an ordinary checkpoint into `folder`, load it with plain transformers, and compare.

    The files are written into a folder beside and moved, the configuration last: half a checkpoint is none.

    Args:
        model: Without gains and adapters.
        words: Tokenizer of the student, or its processor if it sees.
        folder: Of the run.
        dtype: Of the checkpoint.
        prompt: Arguments of the model to compare on, from `prompt_of`.
        trust_remote_code: The model's code came with it.

    Returns:
        `largest_difference` of log-probabilities between the checkpoint loaded anew and the model in memory, both in
        the checkpoint's type, and the `dtype`.

    Raises:
        UserError: No room on the disk, or the checkpoint loaded anew predicts otherwise.
    """
    own = model.dtype
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as made, quiet():
            _cast(model, dtype)
            model.save_pretrained(made)
            words.save_pretrained(made)
            names = sorted(os.listdir(made), key=lambda name: name == "config.json")
            for name in names:
                publish(Path(made) / name, folder / name)
    except (OSError, SafetensorError) as error:
        _cast(model, own)
        raise UserError(
            f"The checkpoint can't be written to '{folder}': {write_failure(error)}. Training is done and kept: make "
            "room and give the same command again."
        ) from None
    with quiet(), torch.no_grad():
        maker: Any = AutoModelForImageTextToText if isinstance(words, ProcessorMixin) else AutoModelForCausalLM
        again = maker.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        again = again.to(model.device).eval()
        model.eval()
        given = like(dict(prompt), next(model.parameters()))
        found, expected = (m(**given, use_cache=False).logits[0].float().log_softmax(dim=-1) for m in (again, model))
    _cast(model, own)
    difference = float((found - expected).abs().max())
    if not difference <= _BOUND.get(dtype, _LOOSE):
        raise UserError(
            f"The checkpoint in '{folder}', loaded anew, predicts otherwise than the student that was trained (by "
            f"{difference:.2g} nats). Training is done and kept; please report the model."
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "largest_difference": difference,
        "tokens": len(found),
    }


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies stay as exact as a fresh model's."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
