"""The texts and questions of the six ways of `why`.

Each haystack is a short and a long text with the same facts in the same order at the same depths (as near as sentences
allow); the filler of the short one is where that of the long one starts. Each is read once, as any text; a cause is
then taken away from what the question meets: from how far away it stands, how near the tokens are moved to it, what it
does not see, what it is told.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from laid_eval.errors import UserError
from laid_eval.records import Condition
from laid_eval.window.haystack import Corpus, Haystack, build
from laid_eval.window.probes import Probe
from laid_eval.window.questions import ItemStory, Question, draw_story
from laid_eval.window.readers import Asked
from laid_eval.window.why import CONDITIONS, Study

_LONG: tuple[Condition, ...] = ("full", "alone", "near", "crowded")
_SHARE = 0.5  # of the short text that facts may fill


@dataclass(frozen=True)
class Posed:
    """A question and the way it is asked."""

    asked: Asked
    told: str = ""
    """Said right before it, to it alone."""
    at: float | None = None
    """Its position; `None`: right after the text."""
    hidden: tuple[tuple[int, int], ...] = ()
    """Tokens of the text that it does not see, [start, end)."""


class WhyReader(Protocol):
    """A reader whose tokens and questions can be moved; see `window.readers.Reader`."""

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` as a continuation of other text."""
        ...

    def opening(self, instruction: str) -> list[int]:
        """Tokens before the haystack."""
        ...

    def question_tokens(self, question: Question) -> int:
        """Tokens after the haystack, longest choice included."""
        ...

    def begin(self) -> None:
        """Forget everything read."""
        ...

    def read(self, tokens: Sequence[int]) -> None:
        """Read on."""
        ...

    def move(self, shifts: Sequence[float]) -> None:
        """Move every token read by so many positions, for what is asked from now on."""
        ...

    def pose(self, posed: Sequence[Posed]) -> list[list[float]]:
        """Log-probability of every choice of every question; nothing is remembered."""
        ...


@dataclass(frozen=True)
class Way:
    """One question in one of the six ways."""

    condition: Condition
    posed: Posed
    distance: float


@dataclass(frozen=True)
class Text:
    """One reading and what is asked after it."""

    length: int
    """Context length asked for, tokens."""
    tokens: list[int]
    ways: list[Way]
    shifts: list[float] | None = None
    """By how much tokens are moved before the crowded questions, the last ones, are asked."""


def texts(reader: WhyReader, probe: Probe, corpus: Corpus, seed: int, study: Study, haystack: int) -> Iterator[Text]:
    """The short and the long text of one haystack, with what is asked after each.

    Raises:
        UserError: The short text has no room for enough facts.
    """
    stream = [seed, zlib.crc32(probe.name.encode()), haystack, 1]  # no cut is 1 token long
    rng = np.random.default_rng(stream)
    opening = reader.opening(probe.instruction)
    story, room = _told(reader, probe, study, len(opening), rng)
    short, long = (
        build(corpus, story.statements, [length - len(opening) - room], reader.encode, np.random.default_rng(stream))
        for length in (study.short_length, study.length)
    )
    questions = story.questions(range(len(story.statements)), rng)
    if len(questions) > study.questions:  # evenly over the depths
        by_depth = sorted(questions, key=lambda q: _span(long, q)[0])
        picks = np.linspace(0, len(by_depth) - 1, study.questions).round().astype(int)
        questions = [by_depth[i] for i in picks]
    start = len(opening)
    end_short, end_long = start + len(short.tokens), start + len(long.tokens)
    positions = compressed_positions(long, start, end_short)
    own = {item.name: item.statements for item in story.items}

    def way(condition: Condition, question: Question, distance: float, **how: Any) -> Way:
        length, text = (study.short_length, short) if condition in ("short", "far") else (study.length, long)
        place = f"{probe.name}/{haystack}/{study.short_length}-{study.length}x{study.questions}"
        depth = _span(text, question)[0] / len(text.tokens)
        asked = Asked(f"{place}/{condition}/{question.item}", question, haystack, length, depth)
        return Way(condition, Posed(asked, **how), distance)

    ways: dict[Condition, list[Way]] = {name: [] for name in CONDITIONS}
    for q in questions:
        near = end_short - start - _span(short, q)[0]
        far = end_long - start - _span(long, q)[0]
        far = max(far, near)  # never before the end of the text
        statements = own[q.item]
        told = "".join(f" {story.statements[i].text}" for i in statements)
        mine = [long.spans[i] for i in statements]
        others = [span for i, span in enumerate(long.spans) if i not in statements]
        ways["short"].append(way("short", q, near))
        ways["far"].append(way("far", q, far, at=start + _span(short, q)[0] + far))
        ways["crowded"].append(way("crowded", q, end_short - positions[start + _span(long, q)[0]], at=float(end_short)))
        ways["full"].append(way("full", q, far))
        ways["alone"].append(way("alone", q, far, hidden=_shifted(others, start)))
        ways["near"].append(way("near", q, len(reader.encode(told)), told=told, hidden=_shifted(mine, start)))
    yield Text(study.short_length, [*opening, *short.tokens], [*ways["short"], *ways["far"]])
    shifts = [position - slot for slot, position in enumerate(positions)]
    asked = [way for name in _LONG for way in ways[name]]
    yield Text(study.length, [*opening, *long.tokens], asked, shifts)


def compressed_positions(text: Haystack, opening: int, end: int) -> list[float]:
    """Positions at which the text ends just before `end`: the opening and statements keep steps of one.

    Every token of the filler advances by one and the same fraction. `opening` tokens come before the text.
    """
    step = np.ones(opening + len(text.tokens))
    filler = np.ones(len(text.tokens), dtype=bool)
    for span in text.spans:
        if span:
            filler[span[0] : span[1]] = False
    kept = len(step) - int(filler.sum())
    step[opening:][filler] = (end - kept) / max(int(filler.sum()), 1)
    # The first token stands at 0, whatever its step.
    return [float(p) for p in np.cumsum(step) - 1]


def _told(
    reader: WhyReader, probe: Probe, study: Study, opening: int, rng: np.random.Generator
) -> tuple[ItemStory, int]:
    """As many facts as fill half of the short text, and the tokens kept free after any text.

    Raises:
        UserError: There is no room for as many facts as there must be choices.
    """
    story = draw_story(probe, rng)
    assert isinstance(story, ItemStory), "probes without needles were refused before"
    lengths = [len(reader.encode(f" {statement.text}")) for statement in story.statements]
    everything = {q.item: reader.question_tokens(q) for q in story.questions(range(len(lengths)), rng)}
    facts = [sum(lengths[i] for i in item.statements) for item in story.items]
    room = 8 + max(everything[item.name] + size for item, size in zip(story.items, facts, strict=True))
    space = study.short_length - opening - room
    count = int(np.searchsorted(np.cumsum(facts), _SHARE * space, side="right"))
    least = 1 if story.items[0].rivals else story.choices
    if count < least:
        fit = opening + room + int(np.ceil(sum(facts[:least]) / _SHARE))
        raise UserError(
            f"a short text of {study.short_length} tokens has room for {max(count, 0)} facts of probe "
            f"{probe.name!r}, needed are {least}. Pass --min-length {fit} and --why-length {4 * fit} or more."
        )
    items = story.items[:count]
    statements = [replace(s, first=True) for s in story.statements[: items[-1].statements[-1] + 1]]
    return ItemStory(story.choices, statements, items), room


def _span(text: Haystack, question: Question) -> tuple[int, int]:
    """Where the (earliest) statement of a question lies."""
    assert question.needle is not None, "probes without needles were refused before"
    span = text.spans[question.needle]
    assert span is not None, "all facts find room in both texts"
    return span


def _shifted(spans: Sequence[tuple[int, int] | None], by: int) -> tuple[tuple[int, int], ...]:
    return tuple((span[0] + by, span[1] + by) for span in spans if span)
