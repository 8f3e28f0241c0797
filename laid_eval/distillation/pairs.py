"""Which layers and heads of student and teacher are matched, and where their mixtures start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.core import HeadMixer, head_similarity
from laid_eval.distillation.prose import training_corpus
from laid_eval.distillation.recipe import Matching, Recipe
from laid_eval.distillation.samples import Sample, training_probe
from laid_eval.distillation.student import Batch, Pair, read, some_heads, view_of
from laid_eval.errors import UserError
from laid_eval.models.frame import Frame
from laid_eval.models.rotary import Rotary
from laid_eval.spectrum.compare import matched_layers
from laid_eval.spectrum.heads import retrieval_scores
from laid_eval.spectrum.texts import needles

_NEEDLES = (512, 1024)  # tokens of the texts that tell which heads retrieve
_GOOD = 0.5  # of the best head's score: also retrieves


def choose_pairs(
    how: Matching,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    own: Sequence[Rotary | None],
    theirs: Sequence[Rotary | None],
    frames: tuple[Frame, Frame],
    seed: int,
) -> list[Pair]:
    """The pairs a recipe asks for.

    Args:
        how: The recipe's table.
        student: The model.
        teacher: The model.
        own: The student's rotary pairs, by layer.
        theirs: The teacher's.
        frames: Of both tokenizers.
        seed: Of the texts that tell which heads retrieve.

    Raises:
        UserError: A layer that is not there, or that sees only a sliding window.
    """
    scores: list[NDArray[np.float64]] = []
    if "retrieval" in (how.layers, how.heads):
        probe, corpus = training_probe("facts"), training_corpus()
        for model, frame in zip((student, teacher), frames, strict=True):
            texts = [needles(probe, corpus, frame, n, seed) for n in _NEEDLES]
            scores.append(retrieval_scores(model, texts))
    pairs = []
    for a, b in _layers(how, len(own), len(theirs), scores):
        for model, layer, count, side in ((student, a, len(own), "student"), (teacher, b, len(theirs), "teacher")):
            _check_layer(model, layer, count, side)
        heads = [
            _heads(how, model, score, layer)
            for model, score, layer in zip((student, teacher), scores or (None, None), (a, b), strict=True)
        ]
        pairs.append(Pair(a, b, heads[0], heads[1], _frequencies(own[a]), _frequencies(theirs[b])))
    return pairs


def start_mixers(
    recipe: Recipe,
    pairs: Sequence[Pair],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sample: Sample,
    seed: int,
) -> list[HeadMixer | None]:
    """A mixer for every pair, from how alike the heads' attention is on one text, or from near uniform.

    Raises:
        UserError: Head to head was asked for, and the numbers of heads differ.
    """
    how = recipe.matching
    sizes = [(len(p.student_heads), len(p.teacher_heads)) for p in pairs]
    if how.mixture == "same":
        for p, (a, b) in zip(pairs, sizes, strict=True):
            if a != b:
                raise UserError(
                    f'matching.mixture = "same" needs as many heads on both sides; layers {p.student} and {p.teacher} '
                    f'have {a} and {b}. Use "similarity".'
                )
        return [None] * len(pairs)
    generator = torch.Generator().manual_seed(seed)
    if how.mixture == "uniform":
        return [HeadMixer(a, b, generator=generator) for a, b in sizes]
    batch = batch_of(sample, student.device)
    rows = torch.arange(1, len(sample.tokens), max(len(sample.tokens) // 64, 1), device=student.device)
    view = view_of(how, batch, 0, rows, len(sample.tokens))
    with torch.no_grad():
        _, own = read(student, batch, [p.student for p in pairs])
        _, theirs = read(teacher, batch, [p.teacher for p in pairs])
    mixers: list[HeadMixer | None] = []
    for p, (a, b) in zip(pairs, sizes, strict=True):
        size = len(sample.tokens)
        similarity = head_similarity(
            some_heads(own[p.student].heads(0, rows), p.student_heads, size),
            some_heads(theirs[p.teacher].heads(0, rows), p.teacher_heads, size),
            view,
        )
        mixers.append(HeadMixer(a, b, similarity=similarity.cpu()))
    return mixers


def batch_of(sample: Sample, device: torch.device) -> Batch:
    """One text as a batch."""
    ids = torch.tensor([sample.tokens], device=device)
    labels = torch.full_like(ids, -100)
    at = torch.tensor(sample.labels, dtype=torch.long, device=device)
    labels[0, at] = ids[0, at]
    positions = torch.as_tensor(sample.positions, device=device)[None]
    return Batch(ids, torch.ones_like(ids), positions, labels, torch.zeros(1, dtype=torch.long, device=device))


def _layers(how: Matching, own: int, theirs: int, scores: Sequence[NDArray[np.float64]]) -> list[tuple[int, int]]:
    if how.layers == "last":
        return [(own - 1, theirs - 1)]
    if how.layers == "all":
        return list(enumerate(matched_layers(own, theirs)))
    if how.layers == "retrieval":
        a, b = (int(np.nanargmax(np.nanmax(score, axis=1))) for score in scores)
        return [(a, b)]
    return list(how.layers)


def _heads(how: Matching, model: PreTrainedModel, score: NDArray[np.float64] | None, layer: int) -> Tensor:
    count = int(model.config.get_text_config(decoder=True).num_attention_heads)
    if how.heads == "all" or score is None:
        return torch.arange(count, device=model.device)
    own = np.nan_to_num(score[layer])
    chosen = np.flatnonzero(own >= _GOOD * own.max()) if own.max() > 0 else np.arange(count)
    return torch.as_tensor(chosen, device=model.device)


def _check_layer(model: PreTrainedModel, layer: int, count: int, side: str) -> None:
    if not 0 <= layer < count:
        raise UserError(f"matching.layers names layer {layer} of the {side}, which has layers 0 to {count - 1}.")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if kinds and kinds[layer] not in ("full_attention", "attention"):
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        raise UserError(
            f"Layer {layer} of the {side} sees only part of the text ({kinds[layer]}): there is no far attention to "
            f"match. Layers that see all of it: {', '.join(map(str, full)) or 'none'}. Name them in matching.layers."
        )


def _frequencies(rotary: Rotary | None) -> Tensor:
    return torch.zeros(0) if rotary is None else torch.as_tensor(rotary.theta)
