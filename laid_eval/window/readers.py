"""What measures a window is a reader: something that reads tokens and then answers forced choices about them.

`ScriptedReader` has a planted window: for tests, teaching and the self-check. `ModelReader` (in `model_reader`)
is a real model behind the same protocol.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from laid_eval.records import ModelInfo
from laid_eval.window.curve import score_at
from laid_eval.window.questions import Question

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Asked:
    """A question at one cut point of one haystack."""

    id: str
    question: Question
    haystack: int
    length: int
    depth: float | None


@dataclass(frozen=True)
class Failure:
    """No answer came: a failed trial, never a wrong one."""

    reason: str


@dataclass(frozen=True)
class Said:
    """An answer in the model's own words, where it gives no log-probabilities."""

    choice: int | None
    """The choice that it names; `None`: none, or several, which is wrong."""


Answer: TypeAlias = "list[float] | Said | Failure"
"""Of a forced choice: the log-probability of every choice, or what came in their place."""


class Reader(Protocol):
    """Reads a haystack from its start and answers questions on a fork of what it has read."""

    @property
    def info(self) -> ModelInfo:
        """What is measured."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` as a continuation of other text."""
        ...

    def opening(self, instruction: str) -> list[int]:
        """Tokens before the haystack: chat frame and instruction."""
        ...

    def question_tokens(self, question: Question) -> int:
        """Tokens after the haystack, longest choice included."""
        ...

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens that go through the model to ask a question when `read` tokens were read."""
        ...

    def begin(self) -> None:
        """Forget everything read."""
        ...

    def read(self, tokens: Sequence[int]) -> None:
        """Read on."""
        ...

    def ask(self, questions: Sequence[Asked]) -> Sequence[Answer]:
        """Log-probability of every choice of every question, given all that was read; nothing is remembered."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Most memory taken so far; `None` where it can't be known."""
        ...


@dataclass(frozen=True)
class Extent:
    """What something read takes."""

    tokens: int
    positions: int
    """RoPE positions: where a model counts a picture by its longer side, fewer than tokens."""


class PictureReader(Protocol):
    """Sees pictures one after the other and answers questions on a fork of what it has seen."""

    @property
    def info(self) -> ModelInfo:
        """What is measured."""
        ...

    def opening_extent(self) -> Extent:
        """What comes before the first picture."""
        ...

    def extent(self, width: int, height: int) -> Extent:
        """What a picture of so many pixels takes."""
        ...

    def question_tokens(self, question: Question) -> int:
        """Tokens after the pictures, longest choice included."""
        ...

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens that go through the model to ask a question when `read` tokens were read."""
        ...

    def begin(self) -> None:
        """Forget everything seen."""
        ...

    def show(self, picture: Image) -> None:
        """See one more picture."""
        ...

    def ask(self, questions: Sequence[Asked]) -> Sequence[Answer]:
        """Log-probability of every choice of every question, given all that was seen; nothing is remembered."""
        ...

    def say(self, asked: Asked, limit: int) -> str:
        """A free answer of at most so many tokens, given all that was seen; nothing is remembered."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Most memory taken so far; `None` where it can't be known."""
        ...


@dataclass(frozen=True)
class ScriptedReader:
    """Answers rightly inside its planted window and guesses beyond, after a psychometric curve.

    Every answer is drawn from (seed, question id), so a resumed run meets the same answers.

    >>> reader = ScriptedReader(location=13.0)
    >>> round(2 ** reader.location)
    8192
    """

    location: float = 13.0
    """Log2 length at which the score is half way down."""
    width: float = 0.25
    """Octaves; 0 is a cliff."""
    lapse: float = 0.02
    """Share of questions answered wrongly even at short lengths."""
    spread: float = 0.0
    """Octaves by which haystacks differ in location (standard deviation, normal)."""
    correlation: float = 0.0
    """Instead of `spread`: correlation of answers at one length of a haystack (beta-distributed score)."""
    depth_bias: float = 0.0
    """Octaves by which the location of a needle at the end exceeds that of one at the start."""
    seed: int = 0
    claimed: int = 8192

    @property
    def info(self) -> ModelInfo:
        """A record that says it is scripted."""
        return ModelInfo(name="scripted", source="scripted", claimed_length=self.claimed)

    def encode(self, text: str) -> list[int]:
        """One token a word."""
        return [0] * len(text.split())

    def opening(self, instruction: str) -> list[int]:
        """The instruction alone."""
        return self.encode(instruction)

    def question_tokens(self, question: Question) -> int:
        """Words of question, lead and one choice."""
        return len(self.encode(question.prompt)) + len(self.encode(question.lead)) + 1

    def pass_tokens(self, question: Question, read: int) -> int:
        """As on a fork that runs every choice."""
        return self.question_tokens(question)

    def begin(self) -> None:
        """Nothing is kept."""

    def read(self, tokens: Sequence[int]) -> None:
        """Nothing is kept."""

    def ask(self, questions: Sequence[Asked]) -> list[list[float]]:
        """Right with the curve's probability, else a guess among all choices."""
        return [self._answer(asked) for asked in questions]

    def show(self, picture: Image) -> None:
        """Nothing is kept."""

    def say(self, asked: Asked, limit: int) -> str:
        """The choice it would take."""
        return asked.question.choices[int(np.argmax(self._answer(asked)))]

    def opening_extent(self) -> Extent:
        """Nothing."""
        return Extent(0, 0)

    def extent(self, width: int, height: int) -> Extent:
        """A token and a position a picture."""
        return Extent(1, 1)

    def peak_memory_bytes(self) -> int | None:
        """Unknown."""
        return None

    def _answer(self, asked: Asked) -> list[float]:
        question = asked.question
        own = np.random.default_rng([self.seed, asked.haystack, 1])
        shift = self.spread * own.normal()
        if asked.depth is not None:
            shift += self.depth_bias * (asked.depth - 0.5)
        x, g = np.log2(asked.length), question.chance
        width = np.array(max(self.width, 1e-6))
        r = np.array((1 - self.lapse - g) / (1 - g))
        p = float(score_at(x, np.array(self.location + shift), width, r, g))
        if self.correlation > 0 and 0 < p < 1:
            own = np.random.default_rng([self.seed, asked.haystack, asked.length, 2])
            scale = 1 / self.correlation - 1
            p = float(own.beta(p * scale, (1 - p) * scale))
        rng = np.random.default_rng([self.seed, zlib.crc32(asked.id.encode()), 3])
        right = rng.random() < (p - g) / (1 - g) if p > g else rng.random() < p / g - 1
        chosen = question.answer
        if not right:
            # A guess among all choices, so that p is the score; below chance (beta only) a wrong one.
            wrong = [i for i in range(len(question.choices)) if i != question.answer or p >= g]
            chosen = int(rng.choice(wrong))
        return [0.0 if i == chosen else -1.0 for i in range(len(question.choices))]
