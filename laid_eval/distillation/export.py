"""From a trained student to an ordinary checkpoint: adapters merged, gains folded, written, loaded anew, compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from laid_eval.core import RopeGain
from laid_eval.distillations import GAINS, LayerGains
from laid_eval.errors import UserError
from laid_eval.models.rotary import Rotary
from laid_eval.models.source import quiet

DECIBEL = 20 / np.log(10)


def save_gains(folder: Path, gains: dict[int, RopeGain], rotaries: Sequence[Rotary | None]) -> tuple[LayerGains, ...]:
    """Write all gains as an array (layers, H or 1, P), and sum them up by layer."""
    layers = sorted(gains)
    log_gain = np.stack([gains[layer].log_gain().detach().double().cpu().numpy() for layer in layers])
    rotary = rotaries[layers[0]]
    assert rotary is not None, "only layers that rotate have gains"
    temporary = folder / f".{GAINS}"
    with temporary.open("wb") as file:
        np.savez(file, log_gain=log_gain, wavelength=rotary.wavelength, layers=np.array(layers))
    os.replace(temporary, folder / GAINS)
    db = log_gain * DECIBEL
    return tuple(
        LayerGains(
            layer=layer,
            rms_db=round(float(np.sqrt((values**2).mean())), 4),
            lowest_db=round(float(values.min()), 4),
            highest_db=round(float(values.max()), 4),
        )
        for layer, values in zip(layers, db, strict=True)
    )


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    ids: Sequence[int],
) -> dict[str, Any]:
    """Write an ordinary checkpoint into `folder`, load it with plain transformers, and compare.

    The files are written into a folder beside and moved, the configuration last: half a checkpoint is none.

    Args:
        model: Without gains and adapters.
        tokenizer: Of the student.
        folder: Of the run.
        dtype: Of the checkpoint.
        ids: A text to compare on.

    Returns:
        `largest_difference` of log-probabilities between the checkpoint loaded anew and the model in memory, both in
        the checkpoint's type, and the `dtype`.

    Raises:
        UserError: No room on the disk.
    """
    own = model.dtype
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as made, quiet():
            torch.nn.Module.to(model, dtype)
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            names = sorted(os.listdir(made), key=lambda name: name == "config.json")
            for name in names:
                os.replace(Path(made) / name, folder / name)
    except OSError as error:
        raise UserError(
            f"The checkpoint can't be written to '{folder}': {error.strerror or error}. Training is done and kept: "
            "make room and give the same command again."
        ) from None
    with quiet(), torch.no_grad():
        text = torch.tensor([list(ids)], device=model.device)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        again = again.to(model.device).eval()  # type: ignore[arg-type]
        model.eval()
        found, expected = (m(text, use_cache=False).logits[0].float().log_softmax(dim=-1) for m in (again, model))
    torch.nn.Module.to(model, own)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "largest_difference": float((found - expected).abs().max()),
        "tokens": len(ids),
    }
