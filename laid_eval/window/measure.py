"""Measuring a window: read haystacks, ask at cut points, fit, choose the next lengths, stop when it is enough.

Everything that is asked follows from the settings, the seed and the trials so far. A killed run therefore
resumes by walking the same plan again, taking trials from disk where they are there, and ends with the same
estimate, bit for bit, as a run that was never stopped.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from laid_eval.errors import UserError
from laid_eval.records import Cost, Curve, ModelInfo, Run, Settings, Status, Trial, WindowEstimate
from laid_eval.runs import append_trials, drop_torn_line, load_header, load_trials, save_header, trial_table
from laid_eval.window.curve import CRITERIA, Criterion, parse_criterion
from laid_eval.window.estimate import FEWEST_TRIALS, Fit, curve_of, fit_trials, windows_of
from laid_eval.window.haystack import Corpus, Haystack, build, check_long_enough, pick_by_depth
from laid_eval.window.plan import (
    COARSE,
    FEWEST,
    STRATA,
    Next,
    at_chance,
    coarse_cuts,
    length_grid,
    refined_cuts,
)
from laid_eval.window.probes import Probe
from laid_eval.window.questions import Question, Story, draw_story
from laid_eval.window.readers import Asked, Reader

_LEAST_TEXT = 64  # tokens of haystack in the shortest context


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands, for a live line."""

    folder: Path
    probe: str
    haystack: int
    length: int
    """Tokens of the present haystack read so far."""
    longest: int
    """Tokens the present haystack will reach."""
    used: int
    """Tokens gone through the model in this measurement."""
    budget: int
    questions: int
    estimate: WindowEstimate | None


def criteria(settings: Settings) -> list[Criterion]:
    """The criterion measured for, then all others that can be computed, once each."""
    names = [settings.criterion, *(c for c in CRITERIA if c != "anchored" or settings.anchor)]
    rules = [parse_criterion(name, settings.anchor) for name in names]
    return list(dict.fromkeys(rules))


def measure(
    reader: Reader,
    probes: list[Probe],
    corpus: Corpus,
    run: Run,
    folder: Path,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Run:
    """Carry a run to its end, from wherever it is.

    Args:
        reader: What is measured.
        probes: The questions, in the order of `run.settings.probes`.
        corpus: The filler text.
        run: Header of a new or an unfinished run in `folder`.
        folder: The run folder; exists.
        progress: Called after every chunk read and every cut point asked.

    Returns:
        The finished header, also on disk.

    Raises:
        UserError: The haystack text is too short.
        KeyboardInterrupt: As it came; what was measured is on disk, with the estimate so far.
    """
    drop_torn_line(folder)
    settings = run.settings
    known = {trial.id: trial for trial in load_trials(folder)}
    state = _State(reader, corpus, settings, folder, known, progress, seconds=run.cost.seconds)
    note = check_long_enough(corpus, state.encode, settings.max_length)
    for probe in probes:
        _check_room(state, probe)
    stops: dict[str, str] = {}
    run = run.model_copy(update={"notes": (*run.notes, *([note] if note else []))})

    def save(status: Status = "partial") -> Run:
        header = _header(run, state, probes, stops, status)
        save_header(folder, header)
        return header

    try:
        save()
        for k, probe in enumerate(probes):
            share = (settings.budget - state.used) // (len(probes) - k)
            stops[probe.name] = _measure_probe(state, probe, state.used + share, save)
    except BaseException as error:
        # In the middle of a haystack too: the estimate so far is worth keeping.
        for probe in probes:
            if state.trials.get(probe.name):
                _fit(state, probe)
        save("partial" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    return save("complete")


@dataclass
class _State:
    """What grows while measuring."""

    reader: Reader
    corpus: Corpus
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

    def __post_init__(self) -> None:
        # Sentences recur in many haystacks; tokenizing each once is most of the cost of building them.
        self.encode = lru_cache(maxsize=200_000)(self.reader.encode)

    @property
    def forks(self) -> bool:
        """Whether a haystack is read once, or again for every question."""
        return not (self.reader.info.fan_out or "").startswith("whole prompts")

    @property
    def used(self) -> int:
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
            )
        )


def _measure_probe(state: _State, probe: Probe, budget: int, save: Callable[[], object]) -> str:
    """Read haystacks until the estimate is precise enough or the budget is spent; why it stopped.

    `save` is called after every haystack, so that a killed run can be looked at.
    """
    settings = state.settings
    grid = length_grid(settings.min_length or probe.min_length, settings.max_length)
    state.trials[probe.name] = []
    state.estimate = None
    haystack = 0
    while True:
        step = _next(state, probe, grid, haystack, budget)
        if step.stop:
            return step.stop
        _read_haystack(state, probe, haystack, step.cuts)
        haystack += 1
        _fit(state, probe)
        save()


def _fit(state: _State, probe: Probe) -> None:
    """Fit the curve to all trials of a probe and read off the window for the live line."""
    settings = state.settings
    table = trial_table(state.trials[probe.name])
    valid = table[table["score"].notna()]
    if len(valid) >= FEWEST_TRIALS and valid["length"].nunique() > 1:
        fit = fit_trials(table, settings.seed)
        state.fits[probe.name] = fit
        rule = criteria(settings)[:1]
        found = windows_of(fit, rule, confidence=settings.confidence, seed=settings.seed, probe=probe.name)
        state.estimate = found[0]


def _next(state: _State, probe: Probe, grid: list[int], haystack: int, budget: int) -> Next:
    settings = state.settings
    trials = state.trials[probe.name]
    if settings.max_trials and len(trials) >= settings.max_trials:
        return Next(stop=f"the planned {settings.max_trials} questions were asked")
    if haystack < COARSE:
        cuts = coarse_cuts(grid, haystack)
    else:
        valid = [t for t in trials if t.score is not None]
        if len(valid) < len(trials) / 2:
            return Next(stop="more than half of the trials failed")
        if state.estimate is None:
            return Next(stop=f"{COARSE} haystacks gave fewer than {FEWEST_TRIALS} answers or only one length")
        if haystack >= FEWEST:
            done = _precise_enough(state.estimate, settings)
            if done:
                return Next(stop=done)
        cuts = refined_cuts(grid, state.fits[probe.name].posterior, haystack)
        if at_chance(trial_table(t for t in valid if t.length == grid[0])):
            cuts = coarse_cuts(grid, 0)[:2]  # can't do the task even here: a few more cheap looks
    # Asking costs little where a haystack is read once, and nearly everything where each question reads it again.
    places = {(t.haystack, t.length) for t in trials}
    expected = cuts[-1] if state.forks else len(trials) / max(len(places), 1) * sum(cuts)
    if haystack and state.used + expected > budget:
        return Next(stop="the budget is spent")
    return Next(cuts=tuple(cuts))


def _precise_enough(estimate: WindowEstimate, settings: Settings) -> str | None:
    octaves = estimate.octaves
    if octaves is not None and octaves <= settings.precision:
        return f"the interval is {octaves:.2f} octaves wide (asked: {settings.precision:g})"
    if estimate.low is None and estimate.high == estimate.tested_min:
        return "the window is shorter than the shortest length"
    if estimate.high is None and estimate.low == estimate.tested_max:
        return "the window is longer than the longest length"
    return None


def _room(reader: Reader, story: Story) -> int:
    """Tokens kept free after the haystack for the longest question and choice."""
    everything = story.questions(range(len(story.statements)), np.random.default_rng(0))
    return max(reader.question_tokens(q) for q in everything) + 8


def _check_room(state: _State, probe: Probe) -> None:
    """Refuse a shortest length that the chat frame and the question fill by themselves."""
    shortest = state.settings.min_length or probe.min_length
    story = draw_story(probe, np.random.default_rng(0))
    taken = len(state.reader.opening(probe.instruction)) + _room(state.reader, story)
    if shortest - taken < _LEAST_TEXT:
        raise UserError(
            f"A context of {shortest} tokens leaves no room for text: the frame and the question of probe "
            f"{probe.name!r} take {taken}. Use --min-length {taken + 2 * _LEAST_TEXT}."
        )


def _read_haystack(state: _State, probe: Probe, haystack: int, cuts: tuple[int, ...]) -> None:
    """Read one haystack and ask at each cut point, until two successive lengths are at chance."""
    settings, reader = state.settings, state.reader
    stream = [settings.seed, zlib.crc32(probe.name.encode()), haystack]
    rng = np.random.default_rng(stream)
    story = draw_story(probe, rng)
    opening = reader.opening(probe.instruction)
    room = _room(reader, story)
    own = [cut - len(opening) - room for cut in cuts]
    text = build(state.corpus, story.statements, own, state.encode, rng)
    tokens = [*opening, *text.tokens]
    read = 0  # tokens the reader holds; stays behind while trials come from disk
    begun = False
    gone = 0
    before = 0
    for cut, end in zip(cuts, own, strict=True):
        asked = _choose(probe, story, text, haystack, cut, end, np.random.default_rng([*stream, cut]))
        target = len(opening) + end
        if any(a.id not in state.known for a in asked):
            started = time.perf_counter()
            if not begun:
                reader.begin()
                begun = True
            # The chunks are those of an uninterrupted run, so resuming changes no rounding.
            for at, to in _chunks([len(opening) + to for to in own], settings.chunk):
                if read <= at < target:
                    reader.read(tokens[at:to])
                    read = to
                    state.report(probe.name, haystack, to, len(tokens), to - gone)
            # All of them, also where a kill lost only some: a pass of another shape would round differently.
            answered = _trials(probe, asked, reader.ask(asked), target, reader)
            state.seconds += time.perf_counter() - started
            new = [trial for trial in answered if trial.id not in state.known]
            append_trials(state.folder, new)
            state.known |= {trial.id: trial for trial in new}
        state.trials[probe.name] += [state.known[a.id] for a in asked]
        state.prefill += target - gone if state.forks else 0
        gone = target
        state.asked += sum(reader.pass_tokens(a.question, target) for a in asked)
        state.whole += sum(target + reader.question_tokens(a.question) for a in asked)
        state.report(probe.name, haystack, target, len(tokens))
        lately = [t for t in state.trials[probe.name] if t.length in (before, cut)]
        if before and at_chance(trial_table(lately)):
            return
        before = cut


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
    probe: Probe, story: Story, text: Haystack, haystack: int, cut: int, end: int, rng: np.random.Generator
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


def _trials(probe: Probe, asked: list[Asked], answers: list[list[float]], prefix: int, reader: Reader) -> list[Trial]:
    return [
        _trial(probe, a, logs, prefix + reader.question_tokens(a.question))
        for a, logs in zip(asked, answers, strict=True)
    ]


def _trial(probe: Probe, asked: Asked, logs: list[float], prompt_tokens: int) -> Trial:
    question = asked.question
    valid = all(math.isfinite(value) for value in logs)
    best = max(logs) if valid else 0.0
    winners = [i for i, value in enumerate(logs) if value == best]
    right = logs[question.answer]
    wrong = max(value for i, value in enumerate(logs) if i != question.answer)
    return Trial(
        id=asked.id,
        probe=probe.name,
        haystack=asked.haystack,
        length=asked.length,
        prompt_tokens=prompt_tokens,
        depth=None if asked.depth is None else round(asked.depth, 4),
        score=(question.answer in winners) / len(winners) if valid else None,
        chance=question.chance,
        margin=right - wrong if valid else None,
        answer=question.choices[question.answer],
        chosen=question.choices[winners[0]] if valid else None,
        error=None if valid else "the model gave a log-probability that is not finite",
    )


def _header(run: Run, state: _State, probes: list[Probe], stops: dict[str, str], status: Status) -> Run:
    """The header with estimates of all that was measured, costs and notes."""
    windows: list[WindowEstimate] = []
    curves: list[Curve] = []
    notes = list(run.notes)
    settings = state.settings
    confidence, seed = settings.confidence, settings.seed
    for probe in probes:
        failed = sum(t.score is None for t in state.trials.get(probe.name, []))
        if failed:
            notes.append(f"{failed} trial(s) of {probe.name} failed and count neither as right nor as wrong")
        fit = state.fits.get(probe.name)
        if fit:
            windows += windows_of(fit, criteria(settings), confidence=confidence, seed=seed, probe=probe.name)
            curves.append(curve_of(fit, confidence=confidence, seed=seed, probe=probe.name))
    cost = Cost(
        prefill_tokens=state.prefill,
        question_tokens=state.asked,
        whole_prompt_tokens=state.whole,
        seconds=round(state.seconds, 2),
        load_seconds=run.cost.load_seconds,
        peak_memory_bytes=_larger(run.cost.peak_memory_bytes, state.reader.peak_memory_bytes()),
    )
    return run.model_copy(
        update={
            "status": status,
            "stopped": stops or None,
            "windows": tuple(windows),
            "curves": tuple(curves),
            "cost": cost,
            "notes": tuple(dict.fromkeys(notes)),
        }
    )


def _larger(a: int | None, b: int | None) -> int | None:
    return max((v for v in (a, b) if v is not None), default=None)


def resumable(folder: Path, settings: Settings, model: ModelInfo) -> Run | None:
    """The header of an earlier run in `folder` that these settings continue, or `None` where there is none.

    `budget` and `precision` may differ: they only say when to stop.

    Raises:
        UserError: The folder holds a run of another model or of other settings (the field is named), or
            something that is no run.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    earlier = load_header(folder)
    stops = {"budget", "precision", "max_trials"}
    pairs = [
        (f"settings.{name}", value, getattr(settings, name)) for name, value in earlier.settings if name not in stops
    ]
    identity = ("fingerprint", "dtype", "rope_scaling")
    pairs += [(f"model.{name}", getattr(earlier.model, name), getattr(model, name)) for name in identity]
    for name, old, new in pairs:
        if old != new:
            raise UserError(
                f"'{folder}' holds a run with {name} = {old!r}, asked was {new!r}. "
                "Give the same options to resume it, or another --out."
            )
    return earlier
