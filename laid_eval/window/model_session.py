"""The steps of a measurement that need torch: resolve, describe, quote, load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL.Image import Image, new
from transformers import ProcessorMixin

from laid_eval.errors import UserError
from laid_eval.models.cost import Shape, check_memory, needed_memory, shape_of, speed_test
from laid_eval.models.load import Described, describe, load, load_processor, load_vision
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.source import resolve
from laid_eval.records import ModelInfo, Settings
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.picture_reader import ModelPictureReader
from laid_eval.window.session import Quote

QUESTIONS = 60
"""Roughly, per longest context read: haystacks stop before it, with five cut points of about nine questions."""


@dataclass(frozen=True)
class Prepared:
    """A model that is known but not loaded."""

    described: Described
    shape: Shape
    _picture_tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def info(self) -> ModelInfo:
        """Its record so far."""
        return self.described.info

    def check_memory(self, length: int, chunk: int, each: int) -> None:
        """Refuse a length that does not fit; see `models.cost.check_memory`."""
        check_memory(self.described, self.shape, length, chunk, each)

    @cached_property
    def processor(self) -> ProcessorMixin:
        """Of a model that takes pictures; see `models.load.load_processor`."""
        return load_processor(self.described)

    def picture_tokens(self, width: int, height: int) -> int:
        """Tokens of a picture of so many pixels.

        Raises:
            UserError: The model takes no pictures, or none of this form, or its processor can't be loaded.
        """
        if (width, height) not in self._picture_tokens:
            name = self.described.source.name
            frame = picture_frame(name, self.processor)
            try:
                piece = frame.piece([new("RGB", (width, height))])
            except ValueError as error:  # so narrow that nothing is left of it
                raise UserError(f"Model {name!r} takes no picture of {width} x {height} pixels: {error}") from None
            self._picture_tokens[width, height] = int(piece.ids.shape[1])
        return self._picture_tokens[width, height]

    def quote(self, settings: Settings, each: int = 1) -> Quote:
        """What a measurement takes if it spends its budget, after a speed test of two seconds.

        A unit of length takes `each` tokens; the vision side of a model is not counted.
        """
        rate = speed_test(self.described, self.shape)
        # A haystack's tokens cost more the later they come; the budget holds so many full ones.
        longest = settings.max_length * each
        full = settings.budget / longest
        seconds = full * self.shape.seconds(longest, settings.chunk, rate)
        return Quote(
            max_length=longest,
            tokens=settings.budget,
            questions=round(full * QUESTIONS),
            minutes=seconds / 60,
            memory_bytes=needed_memory(self.shape, longest, settings.chunk),
        )

    def load(self, longest: int) -> tuple[ModelReader, float]:
        """The reader, and the seconds it took to load."""
        started = time.perf_counter()
        reader = ModelReader(load(self.described), longest)
        return reader, time.perf_counter() - started

    def load_pictures(self, sample: Sequence[Image], longest: int) -> tuple[ModelPictureReader, float]:
        """The reader of pictures, tried on a few of them, and the seconds it took to load."""
        started = time.perf_counter()
        reader = ModelPictureReader(load_vision(self.described, self.processor), sample, longest)
        return reader, time.perf_counter() - started


def prepare(
    name: str,
    revision: str | None,
    dtype: str,
    device: str,
    rope_scaling: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Prepared:
    """Find a model and read its configuration. Arguments as for `measure_window`."""
    source = resolve(name, revision, allow_pickle, trust_remote_code)
    described = describe(source, dtype, device, rope_scaling, trust_remote_code, allow_pickle)
    return Prepared(described, shape_of(described))
