"""Prompts that spectra of vision-language models are taken from: haystacks of pictures, a question at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL.Image import new
from torch import Tensor
from transformers import ProcessorMixin

from laid_eval.errors import UserError
from laid_eval.models.cost import empty_model
from laid_eval.models.load import Described, load_processor
from laid_eval.models.picture_frame import PictureFrame, Piece, picture_frame
from laid_eval.models.positions import span
from laid_eval.spectrum.measure import SHORTEST
from laid_eval.spectrum.observe_pictures import LAST
from laid_eval.window.picture_reading import asked_at, draw_haystack
from laid_eval.window.pictures import PictureStory
from laid_eval.window.probes import ScenesProbe, load_probe
from laid_eval.window.readers import Asked
from laid_eval.window.scenes import draw

IMAGES = 40
"""Default number of pictures of a haystack."""
PROBE = "visual-which"


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """Pictures and a question, as the model takes them."""

    piece: Piece
    spans: Tensor
    """(I, 2) tokens of each picture, the markers around it included."""
    needle: int
    """The picture that the question asks about."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """The prompts of a measurement: drawn when they are asked for, their sizes known before."""

    frame: PictureFrame
    processor: ProcessorMixin
    probe: ScenesProbe
    images: int
    seed: int
    stories: tuple[PictureStory, ...]
    asked: tuple[Asked, ...]
    """One question a haystack."""
    each: int
    """Tokens of a picture."""
    step: int
    """RoPE positions of a picture: what follows stands so many further."""

    @cached_property
    def opening(self) -> list[int]:
        """Tokens before the pictures."""
        return self.frame.opening()

    @cached_property
    def stems(self) -> list[tuple[int, ...]]:
        """Tokens of every question, up to where the answers part."""
        return [self.frame.branch(a.question.prompt, a.question.lead, a.question.choices).stem for a in self.asked]

    @property
    def words(self) -> list[int]:
        """Tokens of every prompt that belong to no picture."""
        return [len(self.opening) + len(stem) for stem in self.stems]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt."""
        return [self.images * self.each + words for words in self.words]

    @property
    def reach(self) -> int:
        """RoPE positions of the longest prompt."""
        return self.images * self.step + max(self.words)

    def prompt(self, k: int) -> PicturePrompt:
        """Draw a haystack and put its question."""
        return self._prompt(k, self.images)

    def few(self) -> PicturePrompt:
        """The same with three pictures only, to try a model on."""
        return self._prompt(0, 3)

    def _prompt(self, k: int, images: int) -> PicturePrompt:
        needle = self.asked[k].question.needle
        assert needle is not None
        shown = self.frame.piece([draw(scene, self.probe.size) for scene in self.stories[k].scenes[:images]])
        starts = len(self.opening) + self.each * torch.arange(images)
        spans = torch.stack([starts, starts + self.each], dim=1)
        return PicturePrompt(shown.within(self.opening, self.stems[k]), spans, needle)


def plan_gallery(described: Described, images: int, texts: int, seed: int) -> Gallery:
    """What will be shown and asked; nothing is drawn and no weights are loaded.

    Raises:
        UserError: The model takes no pictures, or not so many, or so few that half a prompt holds too few octaves.
    """
    processor = load_processor(described)
    frame = picture_frame(described.source.name, processor)
    probe = load_probe(PROBE)
    assert isinstance(probe, ScenesProbe)
    if images < probe.min_length:
        raise UserError(f"--images must be at least {probe.min_length} pictures, got {images}.")
    blank = new("RGB", (probe.size, probe.size))
    one, two = frame.piece([blank]), frame.piece([blank, blank])
    if not torch.equal(one.ids.repeat(1, 2), two.ids):
        raise UserError(
            f"The processor of {described.source.name!r} writes several pictures otherwise than one by one: which "
            "tokens belong to which picture is not known, so attention by picture can't be measured."
        )
    each, step = one.ids.shape[1], span(empty_model(described), one)
    most = (described.claimed_length or images * step) // step + 1
    count = min(images, max(most, probe.min_length))  # where they are too many, enough to be refused
    stories = tuple(draw_haystack(probe, seed, k, (count,)) for k in range(texts if count == images else 1))
    asked = tuple(_spread(asked_at(probe, story, seed, k, count), k, texts) for k, story in enumerate(stories))
    gallery = Gallery(frame, processor, probe, images, seed, stories, asked, each, step)
    _check_positions(described, images, step, max(gallery.words))
    for n, words in zip(gallery.lengths, gallery.words, strict=True):
        if n < SHORTEST or images * each < words + LAST:
            least = max(-(-(SHORTEST - min(gallery.words)) // each), -(-(max(gallery.words) + LAST) // each))
            raise UserError(
                f"--images {images} makes prompts of {n:,} tokens, {images * each:,} of them pictures: too few for a "
                f"spectrum. Measure with --images {max(least, probe.min_length)} or more."
            )
    return gallery


def _check_positions(described: Described, images: int, step: int, words: int) -> None:
    longest = described.claimed_length
    if longest is not None and images * step + words > longest:
        fits = (longest - 5 * words // 4) // step  # other haystacks' questions may be longer
        raise UserError(
            f"--images {images:,} takes {images * step + words:,} positions, {step:,} a picture; "
            f"{described.source.name!r} has {longest:,}. Measure with --images {fits} or fewer."
        )


def _spread(asked: Sequence[Asked], k: int, texts: int) -> Asked:
    """The question of a haystack: about a picture near its turn, so that the haystacks' needles lie at all depths."""
    return min(asked, key=lambda one: abs((one.question.needle or 0) / one.length - (k + 0.5) / texts))
