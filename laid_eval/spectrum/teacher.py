"""A student beside its teacher: both runs compared, and their keys on the same text."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from laid_eval.models.capture import Call, capture
from laid_eval.models.frame import frame_of
from laid_eval.models.load import Described, load
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.spectra import (
    COMPARISON,
    LoadedSpectrum,
    load_spectrum,
    save_arrays,
    save_spectrum,
)
from laid_eval.spectrum.compare import compare_spectra, matched_layers
from laid_eval.spectrum.coverage import low_band
from laid_eval.spectrum.layout import SINKS
from laid_eval.spectrum.mixing import Keys, Mixing, mix_keys
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
    return _kept(own, theirs, mixing, why, seed)


def compare_on_pictures(own: LoadedSpectrum, theirs: LoadedSpectrum, seed: int) -> LoadedSpectrum:
    """Compare two finished runs on the same haystacks of pictures."""
    return _kept(own, theirs, None, "on pictures keys are not mixed: give --length to compare them on text", seed)


def _kept(
    own: LoadedSpectrum, theirs: LoadedSpectrum, mixing: Mixing | None, why: str | None, seed: int
) -> LoadedSpectrum:
    """The run with its comparison, read back."""
    found = compare_spectra(own, theirs, mixing, seed)
    if found.arrays:
        save_arrays(own.path / COMPARISON, found.arrays)
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
        ids, _ = prose(corpus, frame_of(loaded.tokenizer), n, 2, seed)
        rotary = rotaries(loaded.model, n)
        sides.append((ids, rotary, [_keys(loaded.model, text, rotary) for text in ids]))
        del loaded
        gc.collect()
    (ids, rotary, own), (other_ids, other_rotary, theirs) = sides
    if ids != other_ids:
        return None, "tokenizers differ: keys are not compared token by token"
    layers, other_layers = sorted(own[0]), sorted(theirs[0])
    match = [other_layers[j] for j in matched_layers(len(layers), len(other_layers))]
    pairs = [(rotary[i], other_rotary[j]) for i, j in zip(layers, match, strict=True)]
    turning = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not turning:
        return None, None  # no rotary pairs: the comparison says so
    if not all(a.same(b) for a, b in turning):
        return None, "rotary frequencies or head sizes differ: keys are not mixed"
    low = np.zeros((len(layers), max(len(a.theta) for a, _ in turning)), dtype=bool)
    for row, (a, _) in zip(low, pairs, strict=True):
        if a is not None:
            row[: len(a.theta)] = low_band(a.theta, n)
    both = [a is not None and b is not None for a, b in pairs]
    mixing = mix_keys(
        [own[0][i] if there else None for i, there in zip(layers, both, strict=True)],
        [theirs[0][j] for j in match],
        [theirs[1][j] for j in match],
        low,
        n,
    )
    return mixing, None


def _keys(model: PreTrainedModel, ids: Sequence[int], rotary: Sequence[Rotary | None]) -> dict[int, Keys | None]:
    """(G, N, F) key pairs of every layer with attention, sinks left out; `None` where it does not rotate."""
    out: dict[int, Keys | None] = {}

    def look(call: Call) -> None:
        own = rotary[call.layer]
        keys = None if own is None else own.pairs(call.key[0])[:, SINKS:].cpu().numpy().astype(np.complex128)
        out[call.layer] = keys

    with torch.inference_mode(), capture(model, look):
        model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    return out
