"""Finding out why windows end: ask in the six ways of `why`, keep the answers, split the loss.

Answers are appended to `why.jsonl` as they come, so a killed study goes on where it was; everything asked follows from
the settings of the run and of the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.records import Run, Settings, Why, WhyTrial
from laid_eval.runs import WHY, append_trials, drop_torn_line, load_header, load_why_trials, save_header, why_table
from laid_eval.window.haystack import Corpus, check_long_enough
from laid_eval.window.probes import CountsProbe, Probe
from laid_eval.window.reading import Progress, trial_of
from laid_eval.window.why import LEAST_HAYSTACKS, Study, explain
from laid_eval.window.why_texts import Text, WhyReader, texts

SHORT = 512
"""Length of the short text, tokens, where the probe and the long text allow it."""
NOTE = "not said why: "


@dataclass(frozen=True)
class WhyOptions:
    """What the user chose."""

    length: int | None = None
    haystacks: int = 6
    questions: int = 12


def check_options(options: WhyOptions, probes: Sequence[Probe], min_length: int | None = None) -> None:
    """Refuse what can't be answered, before anything is measured.

    Raises:
        UserError: No probe has a needle, or a number is too small.
    """
    asked = [probe for probe in probes if not isinstance(probe, CountsProbe)]
    if not asked:
        raise UserError(
            f"--why needs a probe with a needle; the answer of {probes[0].name!r} is spread over the whole text and "
            "has no place. Choose another --probe, e.g. needle."
        )
    for name, value, least in (
        ("haystacks", options.haystacks, LEAST_HAYSTACKS),
        ("questions", options.questions, 1),
    ):
        if value < least:
            raise UserError(f"--why-{name} must be at least {least}, got {value}.")
    for probe in asked if options.length is not None else []:
        shortest = min_length or probe.min_length
        if options.length is not None and options.length < 2 * shortest:
            raise UserError(
                f"--why-length {options.length} is too short: the long text must have at least twice the "
                f"{shortest} tokens of the shortest one of probe {probe.name!r}, {2 * shortest}."
            )


def study_of(run: Run, probe: Probe, options: WhyOptions) -> Study:
    """What is asked for a run: where its window has failed, and a short text.

    Raises:
        UserError: The probe has no needle, or the run no window long enough to be explained.
    """
    if isinstance(probe, CountsProbe):
        raise UserError(f"the answer of probe {probe.name!r} is spread over the whole text and has no place")
    shortest = run.settings.min_length or probe.min_length
    length = options.length
    if length is None:
        half = run.window(probe.name, "half")
        length = 0 if half.censored == "below" else round(half.length or half.tested_max)
        if length < 2 * shortest:
            raise UserError(
                f"the window of probe {probe.name!r} ({half.value_text()} tokens under `half`) is less than twice its "
                f"shortest text ({shortest:,} tokens); say where to ask with --why-length"
            )
    return Study(probe.name, length, max(shortest, min(SHORT, length // 4)), options.haystacks, options.questions)


def answered(run: Run, probes: Sequence[Probe], options: WhyOptions) -> bool:
    """Whether the run holds everything that these options ask for."""
    held = {Study(w.probe, w.length, w.short_length, w.haystacks, w.questions) for w in run.why or ()}
    for probe in probes:
        try:
            if study_of(run, probe, options) not in held:
                return False
        except UserError:
            continue
    return bool(held)


def explain_run(
    reader: WhyReader,
    probes: Sequence[Probe],
    corpus: Corpus,
    folder: Path,
    options: WhyOptions,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Run:
    """Find out why the windows of a finished run end.

    Returns:
        The header, also on disk: one `Why` a probe, and a note for each that can't be explained.
    """
    run = load_header(folder)
    drop_torn_line(folder, WHY)
    held = {why.probe: why for why in run.why or ()}
    notes = [note for note in run.notes if not note.startswith(NOTE)]  # those of this study are told afresh
    order = [probe.name for probe in probes]
    for probe in probes:
        try:
            study = study_of(run, probe, options)
            held[probe.name] = measure_why(reader, probe, corpus, run.settings, study, folder, progress)
        except UserError as error:
            notes.append(f"{NOTE}{str(error).removesuffix('.')}")
        why = tuple(sorted(held.values(), key=lambda w: order.index(w.probe)))
        run = run.model_copy(update={"why": why or None, "notes": tuple(notes)})
        save_header(folder, run)
    return run


def measure_why(
    reader: WhyReader,
    probe: Probe,
    corpus: Corpus,
    settings: Settings,
    study: Study,
    folder: Path,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Why:
    """Ask everything of one study and split the loss.

    Raises:
        UserError: The haystack text or the short length is too short.
    """
    check_long_enough(corpus, reader.encode, study.length)
    known = {trial.id: trial for trial in load_why_trials(folder)}
    state = _State(reader, probe, settings, study, folder, known, progress)
    trials: list[WhyTrial] = []
    for haystack in range(study.haystacks):
        for text in texts(reader, probe, corpus, settings.seed, study, haystack):
            trials += _answers(state, text, haystack, len(trials))
    seconds = None if state.resumed else state.seconds
    return explain(why_table(trials), study, settings.confidence, settings.seed, state.used, seconds)


@dataclass
class _State:
    """What grows while asking."""

    reader: WhyReader
    probe: Probe
    settings: Settings
    study: Study
    folder: Path
    known: dict[str, WhyTrial]
    progress: Callable[[Progress], None]
    used: int = 0
    seconds: float = 0.0
    resumed: bool = False

    def report(self, haystack: int, length: int, longest: int, answers: int) -> None:
        """Tell where things stand; the budget is what all texts take."""
        study = self.study
        total = study.haystacks * (study.short_length + study.length)
        name = f"why, {study.probe}"
        used = self.used + length
        self.progress(Progress(self.folder, name, haystack, length, longest, used, total, answers, None))


def _answers(state: _State, text: Text, haystack: int, before: int) -> list[WhyTrial]:
    """All answers after one reading, from disk where they are all there."""
    reader = state.reader
    missing = [way for way in text.ways if way.posed.asked.id not in state.known]
    state.resumed |= len(missing) < len(text.ways)
    if missing:
        started = time.perf_counter()
        reader.begin()
        for at in range(0, len(text.tokens), state.settings.chunk):
            to = min(at + state.settings.chunk, len(text.tokens))
            reader.read(text.tokens[at:to])
            state.report(haystack, to, len(text.tokens), before)
        # All of a condition, also where a kill lost only some: a pass of another shape would round differently.
        found = []
        for condition in dict.fromkeys(way.condition for way in text.ways):
            ways = [way for way in text.ways if way.condition == condition]
            if condition == "crowded" and text.shifts:
                reader.move(text.shifts)
            for way, logs in zip(ways, reader.pose([way.posed for way in ways]), strict=True):
                question = way.posed.asked.question
                size = len(text.tokens) + len(reader.encode(way.posed.told)) + reader.question_tokens(question)
                trial = trial_of(state.probe, way.posed.asked, logs, size)
                found.append(
                    WhyTrial(
                        **trial.model_dump(),
                        condition=condition,
                        question=question.item,
                        distance=round(way.distance, 2),
                    )
                )
        state.seconds += time.perf_counter() - started
        new = [trial for trial in found if trial.id not in state.known]
        append_trials(state.folder, new, WHY)
        state.known |= {trial.id: trial for trial in new}
    state.used += len(text.tokens)
    state.report(haystack, 0, len(text.tokens), before + len(text.ways))
    return [state.known[way.posed.asked.id] for way in text.ways]
