"""Haystacks of pictures to train on: the scenes of a visual probe, from numbers that no evaluation draws from.

What evaluation asks is told by its pictures alone, so a model can learn the task by heart but no answer: training may
use the same probes, on scenes of its own. A sample is what evaluation reads: the chat template's opening, the
pictures as the model's processor makes them, and questions that see the pictures and themselves but not each other,
each at the positions it would have alone. The loss is on the answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from laid_eval.distillation.recipe import Data
from laid_eval.distillation.samples import Sample, Shown, Source
from laid_eval.distillation.stretch import stretched
from laid_eval.errors import UserError
from laid_eval.models.picture_frame import PictureFrame, Piece
from laid_eval.models.positions import own_positions
from laid_eval.resources import content_hash
from laid_eval.window.pictures import PictureStory, draw_pictures
from laid_eval.window.probes import ScenesProbe, load_probe, probe_names
from laid_eval.window.scenes import draw, scenes_source

_STREAM, _EXAMPLES, _GAPS = 41, 42, 43
"""Second numbers of the random streams; the evaluation's have the checksum of a probe's name there."""
_TYPES = "token_type_ids"
Ints = NDArray[np.int64]
Places = Callable[[Piece], "Ints | None"]
"""(A, n) positions that a model gives to pictures which stand at the start; `None` where they are slots."""


def visual_probe(data: Data) -> ScenesProbe | None:
    """The visual probe that a recipe trains on; `None` where it trains on text.

    Raises:
        UserError: The source and `data.images` don't go together.
    """
    probe = load_probe(data.source) if data.source in probe_names() or data.source.endswith(".toml") else None
    if isinstance(probe, ScenesProbe):
        if data.images is None:
            raise UserError(
                f"Training data {data.source!r} shows pictures: say how many, from 1 up, e.g. --set "
                "'data.images=[2, 20]'."
            )
        if data.images[0] < probe.needles:
            raise UserError(
                f"data.images {list(data.images)}: probe {probe.name!r} asks about {probe.needles} pictures at once. "
                "Begin there or above."
            )
        return probe
    if data.images is not None:
        names = [name for name in probe_names() if load_probe(name).unit == "images"]
        raise UserError(
            f"data.images counts pictures, but training data {data.source!r} shows none. Allowed with pictures: "
            f"{', '.join(names)}, or the file of a visual probe (.toml)."
        )
    return None


def open_pictures(probe: ScenesProbe, data: Data, frame: PictureFrame, places: Places, seed: int) -> Source:
    """The haystacks that a recipe asks for.

    Args:
        probe: From `visual_probe`.
        data: Numbers of pictures and questions, and how far positions are stretched.
        frame: Of the model's processor.
        places: Positions that the model gives to pictures.
        seed: Of the run.

    Raises:
        UserError: A model that can't be shown several pictures this way; positions stretched too little.
    """
    assert data.images is not None, "visual_probe demands them"
    reader = _Shower(probe, data, frame, places, seed)
    examples = tuple(reader.haystack([_EXAMPLES, number], data.images[1], None) for number in range(4))
    reach = max(int(sample.positions.max()) for sample in examples) + 1
    if data.stretch is not None and data.stretch < reach:
        raise UserError(
            f"data.stretch {data.stretch} is below what {data.images[1]} pictures take of themselves, {reach:,} "
            "positions. Set it higher, or data.images lower."
        )
    font, digest = scenes_source()
    name = f"{probe.name}:{content_hash(probe)}:{font}:{digest}"
    return Source(reader.sample, name, examples=examples)


@dataclass(frozen=True)
class _Shower:
    """Draws haystacks and puts them into tokens."""

    probe: ScenesProbe
    data: Data
    frame: PictureFrame
    places: Places
    seed: int

    def sample(self, number: int) -> Sample:
        """Training's own."""
        assert self.data.images is not None
        length = np.random.default_rng([self.seed, _GAPS, number]).uniform(*np.log(self.data.images))
        return self.haystack([_STREAM, number], round(float(np.exp(length))), self.data.stretch)

    def haystack(self, stream: list[int], count: int, stretch: int | None) -> Sample:
        """`count` pictures with questions, positions stretched up to `stretch`."""
        probe = self.probe
        rng = np.random.default_rng([self.seed, *stream, zlib.crc32(probe.name.encode())])
        story = draw_pictures(probe, (count,), rng)
        piece = self.frame.piece([draw(scene, probe.size) for scene in story.scenes])
        before = self.frame.opening()
        opening, shown = len(before), piece.ids.shape[1]
        prefix = opening + shown
        each = self._tokens_each(piece, count)
        tokens = [*before, *piece.ids[0].tolist()]
        at, after = self._positions(piece, opening)
        endings = self._questions(story, count, rng)
        longest = max(len(stem) + len(ending) for stem, ending, _ in endings)
        if stretch is not None:
            # as one more token: where every question begins
            breaks = np.zeros(prefix + 1, dtype=bool)
            breaks[opening::each] = True
            edge = np.full((*at.shape[:-1], 1), after)
            moved = stretched(np.concatenate([at, edge], axis=-1), stretch - longest + 1, rng, breaks)
            at, after = moved[..., :-1], int(moved[..., -1].max())
        positions, branches = [at], [np.zeros(prefix, dtype=np.int64)]
        labels: list[int] = []
        needles: list[int] = []
        for number, (stem, ending, needle) in enumerate(endings, start=1):
            size = len(stem) + len(ending)
            labels += range(len(tokens) + len(stem), len(tokens) + size)
            needles += [needle + 1] * len(ending)
            tokens += [*stem, *ending]
            positions.append(np.broadcast_to(after + np.arange(size), (*at.shape[:-1], size)))
            branches.append(np.full(size, number))
        places = np.full(len(tokens), count + 1)
        places[:opening], places[opening:prefix] = 0, np.arange(shown) // each + 1
        # positions say what token types would
        inputs = {name: value for name, value in piece.inputs.items() if not name.endswith(_TYPES)}
        return Sample(
            id=f"{probe.name}/{stream[-1]}",
            tokens=tuple(tokens),
            labels=tuple(labels),
            positions=np.concatenate(positions, axis=-1),
            shown=Shown(inputs, places, np.concatenate(branches), tuple(needles)),
        )

    def _questions(
        self, story: PictureStory, count: int, rng: np.random.Generator
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Stem, right answer, and index of the picture that tells it, of some questions."""
        asked = story.questions(count, rng)
        out = []
        for i in rng.permutation(len(asked))[: self.data.questions]:
            question = asked[int(i)]
            assert question.needle is not None, "pictures always have one"
            branch = self.frame.branch(question.prompt, question.lead, question.choices)
            out.append((branch.stem, branch.endings[question.answer], question.needle))
        return out

    def _positions(self, piece: Piece, opening: int) -> tuple[Ints, int]:
        """Positions of opening and pictures, and the one after them."""
        own = self.places(piece)
        if own is None:
            own = np.arange(piece.ids.shape[1])
        start = np.broadcast_to(np.arange(opening), (*own.shape[:-1], opening))
        whole = np.concatenate([start, own + opening], axis=-1)
        return whole, int(whole.max()) + 1

    def _tokens_each(self, piece: Piece, count: int) -> int:
        """Tokens of every picture."""
        each, rest = divmod(piece.ids.shape[1], count)
        if rest or not bool((piece.ids.view(count, each) == piece.ids[:, :each]).all()):
            raise UserError(
                "This model's processor writes several pictures of one size otherwise than one by one; distillation "
                "can't tell them apart. Models that write them alike can be distilled (Qwen-VL, LLaVA-OneVision, ...)."
            )
        if any(name == _TYPES for name in piece.inputs):
            raise UserError(
                "The pictures of this model see later tokens of themselves; distillation follows causal attention only."
            )
        return each


def places_of(model: PreTrainedModel) -> Places:
    """Positions as a model gives them; one without memory for its weights will do."""

    def find(piece: Piece) -> Ints | None:
        positions = own_positions(model, piece)
        return None if positions is None else positions[:, 0].numpy()

    return find
