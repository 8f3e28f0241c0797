"""A student beside its teacher: both runs compared, and their keys on the same text."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from laid_eval.models.capture import Call, capture
from laid_eval.models.frame import frame_of
from laid_eval.models.load import Described, load
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.spectra import (
    LoadedSpectrum,
    load_spectrum,
    save_arrays,
    save_spectrum,
)
from laid_eval.spectrum.compare import Mixing, compare_spectra, matched_layers, mix_keys
from laid_eval.spectrum.observe import SINKS
from laid_eval.spectrum.texts import prose
from laid_eval.window.haystack import Corpus

_MIX_LENGTH = 1024  # tokens of the texts whose keys are mixed


def compare_models(
    own: LoadedSpectrum,
    theirs: LoadedSpectrum,
    student: Described,
    teacher: Described,
    corpus: Corpus,
    seed: int,
) -> LoadedSpectrum:
    """Compare two finished runs, keys included where both models read the same tokens with the same pairs."""
    mixing, why = _mixing(student, teacher, corpus, own.header.settings.length, seed)
    found = compare_spectra(own, theirs, mixing, seed)
    if found.arrays:
        save_arrays(own.path / "comparison.npz", found.arrays)
    notes = [n for n in (*found.notes, why) if n]
    header = own.header.model_copy(
        update={
            "teacher": theirs.header.model,
            "comparison": found.measures,
            "notes": tuple(dict.fromkeys((*own.header.notes, *notes))),
        }
    )
    save_spectrum(own.path, header)
    return load_spectrum(own.path)


def _mixing(
    student: Described, teacher: Described, corpus: Corpus, length: int, seed: int
) -> tuple[Mixing | None, str | None]:
    """The mixing residual, or why there is none."""
    sides = []
    n = min([_MIX_LENGTH, length, *(d.claimed_length for d in (student, teacher) if d.claimed_length)])
    for described in (student, teacher):
        loaded = load(described)
        ids = prose(corpus, frame_of(loaded.tokenizer), n, 2, seed)
        rotary = rotaries(loaded.model, n)
        sides.append((ids, rotary, [_keys(loaded.model, text, rotary) for text in ids]))
        del loaded
        gc.collect()
    (ids, rotary, own), (other_ids, other_rotary, theirs) = sides
    if ids != other_ids:
        return None, "tokenizers differ: keys are not compared token by token"
    if not own[0] or not theirs[0]:
        return None, None  # no rotary pairs: the comparison says so
    match = matched_layers(len(own[0]), len(theirs[0]))
    layers, other_layers = sorted(own[0]), sorted(theirs[0])
    pairs = [(rotary[i], other_rotary[other_layers[j]]) for i, j in zip(layers, match, strict=True)]
    if any(a is None or b is None or not a.same(b) for a, b in pairs):
        return None, "rotary frequencies or head sizes differ: keys are not mixed"
    first = pairs[0][0]
    assert first is not None
    low = (first.theta > 0) & (first.theta * len(ids[0]) < 2 * np.pi)
    mixing = mix_keys(
        [own[0][i] for i in layers],
        [theirs[0][other_layers[j]] for j in match],
        [theirs[1][other_layers[j]] for j in match],
        low,
    )
    return mixing, None


def _keys(
    model: PreTrainedModel, ids: Sequence[int], rotary: Sequence[Rotary | None]
) -> dict[int, NDArray[np.complex128]]:
    """(G, N, F) key pairs of every rotating layer, sinks left out."""
    out: dict[int, NDArray[np.complex128]] = {}

    def look(call: Call) -> None:
        own = rotary[call.layer]
        if own is not None:
            out[call.layer] = own.pairs(call.key[0])[:, SINKS:].cpu().numpy().astype(np.complex128)

    with torch.inference_mode(), capture(model, look):
        model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    return out
