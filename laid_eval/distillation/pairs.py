"""Which layers and heads of student and teacher are matched, and where their mixtures start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.core import HeadMixer, head_similarity
from laid_eval.distillation.batches import batch_of
from laid_eval.distillation.picture_heads import picture_retrieval
from laid_eval.distillation.prose import training_corpus
from laid_eval.distillation.recipe import Matching, Recipe
from laid_eval.distillation.samples import Sample, training_probe
from laid_eval.distillation.student import Pair, read, some_heads, view_of
from laid_eval.errors import UserError
from laid_eval.models.frame import Frame
from laid_eval.models.gained import attention_modules, channels
from laid_eval.models.rotary import Rotary
from laid_eval.spectrum.compare import matched_layers
from laid_eval.spectrum.heads import retrieval_scores
from laid_eval.spectrum.texts import needles

_NEEDLES = (512, 1024)  # tokens of the texts that tell which heads retrieve
_GOOD = 0.5  # of the best head's score: also retrieves


def choose_pairs(
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    own: Sequence[Rotary | None],
    theirs: Sequence[Rotary | None],
    frames: tuple[Frame, Frame],
    seed: int,
    haystacks: Sequence[Sample] = (),
) -> list[Pair]:
    """The pairs a recipe asks for.

    Args:
        recipe: What is matched, and how long texts are.
        student: The model.
        teacher: The model.
        own: The student's rotary pairs, by layer.
        theirs: The teacher's.
        frames: Of both tokenizers.
        seed: Of the texts that tell which heads retrieve.
        haystacks: Of pictures, as long as they get: these tell it of models that see.

    Raises:
        UserError: A layer that is not there, or that sees only a sliding window; layers that can't be compared as the
            recipe asks; a model on which it can't be said what retrieves.
    """
    how = recipe.matching
    longest = max((len(sample.tokens) for sample in haystacks), default=recipe.data.lengths[1])
    whole = [_whole_layers(model, longest, len(side)) for model, side in ((student, own), (teacher, theirs))]
    scores: list[NDArray[np.float64]] = []
    if "retrieval" in (how.layers, how.heads):
        scores = [
            picture_retrieval(model, haystacks) if haystacks else _retrieval(model, frame, seed)
            for model, frame in zip((student, teacher), frames, strict=True)
        ]
    pairs = []
    alike = recipe.losses.qk > 0 or (recipe.gain is not None and recipe.gain.start == "queries")
    for a, b in _layers(how, len(own), len(theirs), scores, whole):
        for layer, seen, count, side in ((a, whole[0], len(own), "student"), (b, whole[1], len(theirs), "teacher")):
            _check_layer(layer, seen, count, side)
        if alike:
            _check_alike(student, teacher, a, b, own[a], theirs[b])
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


def _layers(
    how: Matching, own: int, theirs: int, scores: Sequence[NDArray[np.float64]], whole: Sequence[set[int]]
) -> list[tuple[int, int]]:
    """Pairs of layers; what the recipe leaves to us is chosen among layers that see the whole text."""
    if how.layers == "last":
        return [(max(whole[0], default=own - 1), max(whole[1], default=theirs - 1))]
    if how.layers == "all":
        every = enumerate(matched_layers(own, theirs))
        return [(a, b) for a, b in every if a in whole[0] and b in whole[1]] or [(own - 1, theirs - 1)]
    if how.layers == "retrieval":
        best = [np.nanmax(score, axis=1) for score in scores]
        a, b = (max(seen or {0}, key=list(own).__getitem__) for own, seen in zip(best, whole, strict=True))
        return [(a, b)]
    return list(how.layers)


def _retrieval(model: PreTrainedModel, frame: Frame, seed: int) -> NDArray[np.float64]:
    """(L, H) how well each head copies from needles."""
    texts = [needles(training_probe("facts"), training_corpus(), frame, n, seed) for n in _NEEDLES]
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    try:
        scores = retrieval_scores(model, texts)
        if len(scores) == layers:
            return scores
        reason = f"only {len(scores)} of {layers} layers have attention"
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = type(error).__name__
    raise UserError(
        f"Which heads of {type(model).__name__} retrieve can't be measured ({reason}). Name the layers in "
        'matching.layers, e.g. [[5, 11]], and set matching.heads = "all".'
    )


def _heads(how: Matching, model: PreTrainedModel, score: NDArray[np.float64] | None, layer: int) -> Tensor:
    count = int(model.config.get_text_config(decoder=True).num_attention_heads)
    if how.heads == "all" or score is None:
        return torch.arange(count, device=model.device)
    own = np.nan_to_num(score[layer])
    chosen = np.flatnonzero(own >= _GOOD * own.max()) if own.max() > 0 else np.arange(count)
    return torch.as_tensor(chosen, device=model.device)


def _whole_layers(model: PreTrainedModel, longest: int, count: int) -> set[int]:
    """Layers that see all of a text of `longest` tokens."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or longest
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window < longest else ""] * count
    short = {"sliding_attention", "chunked_attention"} if window < longest else {"chunked_attention"}
    return {i for i, kind in enumerate(kinds) if kind not in short | {"linear_attention", "conv", "mamba"}}


def _check_layer(layer: int, whole: set[int], count: int, side: str) -> None:
    if not 0 <= layer < count:
        raise UserError(f"matching.layers names layer {layer} of the {side}, which has layers 0 to {count - 1}.")
    if layer not in whole:
        raise UserError(
            f"Layer {layer} of the {side} sees only part of the text: there is no far attention to match. Layers that "
            f"see all of it: {', '.join(map(str, sorted(whole))) or 'none'}. Name them in matching.layers."
        )


def _check_alike(
    student: PreTrainedModel, teacher: PreTrainedModel, a: int, b: int, own: Rotary | None, theirs: Rotary | None
) -> None:
    """Queries and keys can be compared channel by channel."""
    sizes = [channels(attention_modules(m)[i], m.config) for m, i in ((student, a), (teacher, b))]
    if own is None or theirs is None or sizes[0] != sizes[1] or not own.same(theirs):
        raise UserError(
            f"Queries of layer {a} of the student and {b} of the teacher can't be compared: head sizes "
            f"({sizes[0]} and {sizes[1]}), rotary frequencies or layouts differ. Match attention instead "
            '(losses.attention), with gain.start = "one".'
        )


def _frequencies(rotary: Rotary | None) -> Tensor:
    return torch.zeros(0) if rotary is None else torch.as_tensor(rotary.theta)
