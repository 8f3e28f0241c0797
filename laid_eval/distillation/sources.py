"""The samples of a distillation, checked against both models before their weights are loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from laid_eval.distillation.picture_samples import open_pictures, places_of
from laid_eval.distillation.recipe import Data
from laid_eval.distillation.samples import Sample, Samples, Source, open_source
from laid_eval.distillation.sides import Side, shared_tokens
from laid_eval.errors import UserError
from laid_eval.models.cost import empty_model
from laid_eval.models.picture_frame import picture_frame
from laid_eval.window.probes import ScenesProbe


def open_data(probe: ScenesProbe | None, data: Data, own: Side, theirs: Side | None, seed: int) -> Source:
    """The samples that a recipe asks for, readable for both models; `probe` is that of pictures, if they are shown.

    Raises:
        UserError: As `open_source` and `open_pictures`; or the teacher lacks a token, is given other tokens or
            pictures by its processor, or positions lie beyond what a model states.
    """
    if probe is None:
        source = open_source(data, own.frame, seed)
    else:
        source = _opened(probe, data, own, seed)
        _check_positions(source, data, "student", own)
        if theirs is not None:
            _check_same(source, _opened(probe, data, theirs, seed))
            _check_positions(source, data, "teacher", theirs)
    if theirs is None:
        return source
    return replace(source, samples=readable(source.samples, shared_tokens(own, theirs)))


def _opened(probe: ScenesProbe, data: Data, side: Side, seed: int) -> Source:
    assert side.processor is not None, "find_side loads one where pictures are shown"
    frame = picture_frame(side.described.source.name, side.processor)
    return open_pictures(probe, data, frame, places_of(empty_model(side.described)), seed)


def _check_same(own: Source, theirs: Source) -> None:
    """Both models are given the same tokens, positions and pictures."""
    for a, b in zip(own.examples, theirs.examples, strict=True):
        assert a.shown is not None, "of open_pictures"
        assert b.shown is not None, "of open_pictures"
        count = int(a.shown.places.max()) - 1
        sizes = [int(((x.places > 0) & (x.places <= count)).sum()) for x in (a.shown, b.shown)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"The processors differ: {count} pictures take {sizes[0]:,} tokens of the student and {sizes[1]:,} of "
                "the teacher. Both must be of one family and share their processor's settings."
            )
        if a.tokens != b.tokens or not np.array_equal(a.positions, b.positions):
            raise UserError(
                "The processors differ: chat templates put the same haystack in other tokens or at other positions. "
                "Both models must be of one family, with one chat template."
            )
        same = a.shown.inputs.keys() == b.shown.inputs.keys() and all(
            value.shape == b.shown.inputs[name].shape and torch.allclose(value, b.shown.inputs[name])
            for name, value in a.shown.inputs.items()
        )
        if not same:
            raise UserError(
                "The processors differ: they make other pixels of the same pictures. Both models must be of one "
                "family and share their processor's settings."
            )


def _check_positions(source: Source, data: Data, role: str, side: Side) -> None:
    """No haystack lies at positions beyond those that a model states."""
    claimed = side.described.claimed_length
    reach = max(int(sample.positions.max()) for sample in source.examples) + 1
    if claimed and max(reach, data.stretch or 0) > claimed:
        what = f"data.stretch {data.stretch:,}" if data.stretch else f"{data.images and data.images[1]} pictures"
        raise UserError(
            f"{what} would take positions up to {max(reach, data.stretch or 0):,}; the {role} states {claimed:,} "
            "(max_position_embeddings). Set data.images or data.stretch lower."
        )


def readable(samples: Samples, vocabulary: int) -> Samples:
    """The same samples, refused where the teacher lacks a token."""

    def draw(number: int) -> Sample:
        sample = samples(number)
        if max(sample.tokens) >= vocabulary:
            raise UserError(
                f"Training text {sample.id!r} holds token {max(sample.tokens)}, which the teacher lacks (it has "
                f"{vocabulary:,}). Take that text out, or use a teacher with the student's tokens."
            )
        return sample

    return draw
