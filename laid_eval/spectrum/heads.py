"""Scores of heads that need texts of their own: retrieval on needle questions, and position without content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from laid_eval.models.capture import Call, capture
from laid_eval.models.fork import ForkedText
from laid_eval.spectrum.collect import observe_text
from laid_eval.spectrum.distance import js_divergence, octave_mass
from laid_eval.spectrum.texts import NeedleText

Floats = NDArray[np.float64]


def retrieval_scores(model: PreTrainedModel, texts: Sequence[NeedleText]) -> Floats:
    """(L, H) copy scores after Wu et al. 2024 (arXiv 2404.15574), on needle questions of ours.

    For every token of a right answer, read after its question: does the head's highest attention fall on a token
    within the needle that equals the one to be said next? The mean over tokens, then over answers. The answer is
    given, not generated, so the score does not depend on the model being right.
    """
    total: dict[int, Floats] = {}
    for text in texts:
        forked = ForkedText(model)
        forked.read(text.tokens)
        steps = _steps(text)
        tokens = np.array(text.tokens)

        def look(call: Call, steps: list[_Step] = steps, tokens: NDArray[np.int64] = tokens) -> None:
            rows = torch.tensor([step.row for step in steps], device=call.query.device)
            best = call.probabilities(rows)[0].argmax(-1).cpu().numpy()  # (H, steps)
            hits = np.zeros(len(best))
            for step, key in zip(steps, best.T, strict=True):
                inside = (key >= step.start) & (key < step.end)
                hits += (inside & (tokens[np.minimum(key, len(tokens) - 1)] == step.token)) * step.share
            total[call.layer] = total.get(call.layer, 0.0) + hits

        with capture(model, look):
            forked.ask(text.branches)
    heads = max(len(h) for h in total.values())
    out = np.full((len(total), heads), np.nan)
    for row, layer in enumerate(sorted(total)):
        out[row, : len(total[layer])] = total[layer] / sum(len(text.branches) for text in texts)
    return out


class _Step(NamedTuple):
    """One token of an answer."""

    row: int
    """Of the packed questions: the token after which it is said."""
    start: int
    end: int
    """Where its needle stands in the text."""
    token: int
    share: float
    """One over the answer's tokens."""


def _steps(text: NeedleText) -> list[_Step]:
    """Questions are packed one after the other: stem, then the ending but its last token."""
    out, at = [], 0
    for branch, (start, end) in zip(text.branches, text.spans, strict=True):
        (ending,) = branch.endings
        for k, token in enumerate(ending):
            out.append(_Step(at + len(branch.stem) - 1 + k, start, end, token, 1 / len(ending)))
        at += len(branch.stem) + len(ending) - 1
    return out


def content_shift(
    model: PreTrainedModel, text: Sequence[int], scrambled: Sequence[int], layers: int, seed: int
) -> Floats:
    """(L, H) Jensen-Shannon divergence, nats, between the octave masses of a text and of its tokens shuffled.

    Near 0: the head looks at places, whatever stands there.
    """
    masses = []
    for ids in (text, scrambled):
        part = observe_text(model, ids, [None] * layers, queries=128, seed=seed, kernels=False)  # attention only
        masses.append(octave_mass(part["profile"].mean(axis=1), np.clip(part["tail"], 0, None)))
    return np.asarray(js_divergence(*masses))
