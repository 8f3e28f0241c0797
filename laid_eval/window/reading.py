"""Reading one haystack: build it, read it chunk by chunk, ask at every cut point, keep the trials."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from laid_eval.errors import UserError
from laid_eval.records import ImageExtent, Settings, Trial, Unit, WindowEstimate
from laid_eval.runs import append_trials, trial_table
from laid_eval.window.estimate import Fit
from laid_eval.window.haystack import Corpus, Encode, Haystack, build, pick_by_depth
from laid_eval.window.plan import STRATA, at_chance
from laid_eval.window.probes import Declared, TextProbe
from laid_eval.window.questions import Question, Story, draw_story
from laid_eval.window.readers import Answer, Asked, Failure, PictureReader, Reader, Said

_LEAST_TEXT = 64  # tokens of haystack in the shortest context


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands, for a live line."""

    folder: Path
    probe: str
    haystack: int
    length: int
    """Of the present haystack read so far, tokens or images."""
    longest: int
    """What the present haystack will reach."""
    used: int
    """Tokens gone through the model in this measurement."""
    budget: int
    questions: int
    estimate: WindowEstimate | None
    unit: Unit = "tokens"


@dataclass
class State:
    """What grows while measuring."""

    reader: Reader | PictureReader
    corpus: Corpus | None
    """`None` where the haystack is pictures."""
    settings: Settings
    folder: Path
    known: dict[str, Trial]
    progress: Callable[[Progress], None]
    seconds: float
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    """By probe, in the order of the plan."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """By probe, of the trials so far."""
    prefill: int = 0
    asked: int = 0
    whole: int = 0
    estimate: WindowEstimate | None = None
    image: ImageExtent | None = None

    @cached_property
    def encode(self) -> Encode:
        """The reader's; sentences recur in many haystacks, and tokenizing each once is most of building them."""
        return lru_cache(maxsize=200_000)(self.text_reader.encode)

    @property
    def text_reader(self) -> Reader:
        """Where the haystack is text."""
        return cast(Reader, self.reader)

    @property
    def picture_reader(self) -> PictureReader:
        """Where it is pictures."""
        return cast(PictureReader, self.reader)

    @property
    def forks(self) -> bool:
        """Whether a haystack is read once, or again for every question."""
        return not (self.reader.info.fan_out or "").startswith("whole prompts")

    @property
    def used(self) -> int:
        """Tokens gone through the model."""
        return self.prefill + self.asked

    def report(self, probe: str, haystack: int, length: int, longest: int, ahead: int = 0) -> None:
        """Tell where things stand; `ahead` tokens are read but not yet accounted for."""
        count = sum(len(trials) for trials in self.trials.values())
        self.progress(
            Progress(
                self.folder,
                probe,
                haystack,
                length,
                longest,
                self.used + ahead,
                self.settings.budget,
                count,
                self.estimate,
                "images" if self.image else "tokens",
            )
        )


def _room(reader: Reader, story: Story) -> int:
    """Tokens kept free after the haystack for the longest question and choice."""
    everything = story.questions(range(len(story.statements)), np.random.default_rng(0))
    return max(reader.question_tokens(q) for q in everything) + 8


def check_room(state: State, probe: TextProbe) -> None:
    """Refuse a shortest length that the chat frame and the question fill by themselves."""
    shortest = state.settings.min_length or probe.min_length
    story = draw_story(probe, np.random.default_rng(0))
    taken = len(state.text_reader.opening(probe.instruction)) + _room(state.text_reader, story)
    if shortest - taken < _LEAST_TEXT:
        raise UserError(
            f"A context of {shortest} tokens leaves no room for text: the frame and the question of probe "
            f"{probe.name!r} take {taken}. Use --min-length {taken + 2 * _LEAST_TEXT}."
        )


def read_haystack(state: State, probe: TextProbe, haystack: int, cuts: tuple[int, ...]) -> None:
    """Read one haystack and ask at each cut point, until two successive lengths are at chance."""
    settings, reader = state.settings, state.text_reader
    assert state.corpus is not None
    stream = [settings.seed, zlib.crc32(probe.name.encode()), haystack]
    rng = np.random.default_rng(stream)
    story = draw_story(probe, rng)
    opening = reader.opening(probe.instruction)
    room = _room(reader, story)
    own = [cut - len(opening) - room for cut in cuts]
    text = build(state.corpus, story.statements, own, state.encode, rng)
    tokens = [*opening, *text.tokens]
    # The chunks are those of an uninterrupted run, so resuming changes no rounding.
    chunks = _chunks([len(opening) + end for end in own], settings.chunk)
    read = 0  # tokens the reader holds; stays behind while trials come from disk

    def read_to(target: int, gone: int) -> None:
        nonlocal read
        for at, to in chunks:
            if read <= at < target:
                reader.read(tokens[at:to])
                read = to
                state.report(probe.name, haystack, to, len(tokens), to - gone)

    def stops() -> Iterator[Stop]:
        for cut, end in zip(cuts, own, strict=True):
            asked = _choose(probe, story, text, haystack, cut, end, np.random.default_rng([*stream, cut]))
            target = len(opening) + end
            yield Stop(cut, asked, target, target, partial(read_to, target))

    ask_along(state, probe, haystack, stops(), len(tokens))


@dataclass(frozen=True)
class Stop:
    """A cut point of a haystack: what is asked there, and how to get there."""

    cut: int
    asked: list[Asked]
    tokens: int
    """Read before the questions."""
    length: int
    """The same for the live line, tokens or images."""
    read: Callable[[int], None]
    """Reads on up to here; given the tokens that are accounted for."""


def ask_along(
    state: State,
    probe: Declared,
    haystack: int,
    stops: Iterable[Stop],
    longest: int,
    answer: Callable[[Stop], list[Trial]] | None = None,
) -> None:
    """Ask at each cut point and keep the trials, until two successive lengths are at chance.

    What is on disk is not asked again, and nothing is read for it. Choices are forced, or `answer` asks otherwise.
    """
    reader = state.reader
    answer = answer or partial(_forced, reader, probe)
    begun = False
    gone = before = 0
    for stop in stops:
        if any(a.id not in state.known for a in stop.asked):
            started = time.perf_counter()
            if not begun:
                reader.begin()
                begun = True
            stop.read(gone)
            # All of them, also where a kill lost only some: a pass of another shape would round differently.
            answers = answer(stop)
            state.seconds += time.perf_counter() - started
            new = [trial for trial in answers if trial.id not in state.known]
            append_trials(state.folder, new)
            state.known |= {trial.id: trial for trial in new}
        state.trials[probe.name] += [state.known[a.id] for a in stop.asked]
        state.prefill += stop.tokens - gone if state.forks else 0
        gone = stop.tokens
        state.asked += sum(reader.pass_tokens(a.question, stop.tokens) for a in stop.asked)
        state.whole += sum(stop.tokens + reader.question_tokens(a.question) for a in stop.asked)
        state.report(probe.name, haystack, stop.length, longest)
        lately = [t for t in state.trials[probe.name] if t.length in (before, stop.cut)]
        if before and at_chance(trial_table(lately)):
            return
        before = stop.cut


def _forced(reader: Reader | PictureReader, probe: Declared, stop: Stop) -> list[Trial]:
    """The trials of a cut point, by log-probability."""
    return [
        trial_of(probe, a, logs, stop.tokens + reader.question_tokens(a.question))
        for a, logs in zip(stop.asked, reader.ask(stop.asked), strict=True)
    ]


def _chunks(ends: list[int], size: int) -> list[tuple[int, int]]:
    """Spans of at most `size` tokens that never cross a cut point."""
    out, at = [], 0
    for end in ends:
        while at < end:
            to = min(at + size, end)
            out.append((at, to))
            at = to
    return out


def _choose(
    probe: TextProbe, story: Story, text: Haystack, haystack: int, cut: int, end: int, rng: np.random.Generator
) -> list[Asked]:
    """The questions at one cut point: one in each slice of depth, or all where depth has no meaning."""
    questions = story.questions(text.read(end), rng)
    depths = [_depth(q, text, end) for q in questions]
    placed = [i for i, depth in enumerate(depths) if depth is not None]
    if placed:
        chosen = pick_by_depth([depths[i] or 0.0 for i in placed], STRATA, rng)
        keep = [placed[i] for i in chosen]
    else:
        keep = list(range(len(questions)))
    return [
        Asked(f"{probe.name}/{haystack}/{cut}/{questions[i].item}", questions[i], haystack, cut, depths[i])
        for i in keep
    ]


def _depth(question: Question, text: Haystack, end: int) -> float | None:
    if question.needle is None:
        return None
    span = text.spans[question.needle]
    if span is None:
        raise AssertionError("a question was asked about a statement that was not planted")
    return (span[0] + span[1]) / 2 / end


def trial_of(probe: Declared, asked: Asked, answer: Answer, prompt_tokens: int) -> Trial:
    """The record of one answer."""
    question = asked.question
    trial = Trial(
        id=asked.id,
        probe=probe.name,
        haystack=asked.haystack,
        length=asked.length,
        prompt_tokens=prompt_tokens,
        depth=None if asked.depth is None else round(asked.depth, 4),
        score=None,
        chance=question.chance,
        answer=question.choices[question.answer],
    )
    return trial.model_copy(update=_verdict(question, answer))


def _verdict(question: Question, answer: Answer) -> dict[str, Any]:
    """Score and choice, or why there are none."""
    if isinstance(answer, Failure):
        return {"error": answer.reason}
    if isinstance(answer, Said):
        chosen = None if answer.choice is None else question.choices[answer.choice]
        return {"score": float(answer.choice == question.answer), "chosen": chosen}
    if not all(math.isfinite(value) for value in answer):
        return {"error": "the model gave a log-probability that is not finite"}
    winners = [i for i, value in enumerate(answer) if value == max(answer)]
    wrong = max(value for i, value in enumerate(answer) if i != question.answer)
    return {
        "score": (question.answer in winners) / len(winners),
        "margin": answer[question.answer] - wrong,
        "chosen": question.choices[winners[0]],
    }
