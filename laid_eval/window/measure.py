"""Measuring a window: read haystacks, ask at cut points, fit, choose the next lengths, stop when it is enough.

Everything that is asked follows from the settings, the seed and the trials so far. A killed run therefore
resumes by walking the same plan again, taking trials from disk where they are there, and ends with the same
estimate, bit for bit, as a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.records import Cost, Curve, LengthScore, ModelInfo, Run, Settings, Status, WindowEstimate
from laid_eval.runs import drop_torn_line, load_header, load_trials, save_header, trial_table
from laid_eval.window.curve import CRITERIA, Criterion, parse_criterion
from laid_eval.window.dataset_reading import image_extent, read_view
from laid_eval.window.estimate import FEWEST_TRIALS, curve_of, fit_trials, windows_of
from laid_eval.window.haystack import Corpus, check_long_enough
from laid_eval.window.length_scores import length_scores
from laid_eval.window.picture_reading import read_pictures
from laid_eval.window.plan import (
    COARSE,
    FEWEST,
    Next,
    at_chance,
    coarse_cuts,
    length_grid,
    refined_cuts,
)
from laid_eval.window.probes import Probe, ScenesProbe, TextProbe
from laid_eval.window.readers import PictureReader, Reader
from laid_eval.window.reading import Progress, State, check_room, read_haystack
from laid_eval.window.visual_haystacks import DatasetProbe

AnyProbe = Probe | DatasetProbe
_REFIT = 1.5
"""The cases of a data set are fitted again whenever there are so many times as many."""


def criteria(settings: Settings) -> list[Criterion]:
    """The criterion measured for, then all others that can be computed, once each."""
    names = [settings.criterion, *(c for c in CRITERIA if c != "anchored" or settings.anchor)]
    rules = [parse_criterion(name, settings.anchor) for name in names]
    return list(dict.fromkeys(rules))


def measure(
    reader: Reader | PictureReader,
    probes: Sequence[AnyProbe],
    corpus: Corpus | None,
    run: Run,
    folder: Path,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Run:
    """Carry a run to its end, from wherever it is.

    Args:
        reader: What is measured.
        probes: The questions, in the order of `run.settings.probes`; a data set is one by itself.
        corpus: The filler text; `None` for pictures.
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
    state = State(reader, corpus, settings, folder, known, progress, seconds=run.cost.seconds)
    note = check_long_enough(corpus, state.encode, settings.max_length) if corpus else None
    for probe in probes:
        if isinstance(probe, TextProbe):
            check_room(state, probe)
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
            if isinstance(probe, DatasetProbe):
                stops[probe.name] = _measure_cases(state, probe, save)
            else:
                stops[probe.name] = _measure_probe(state, probe, state.used + share, save)
    except BaseException as error:
        # In the middle of a haystack too: the estimate so far is worth keeping.
        for probe in probes:
            if state.trials.get(probe.name):
                _fit(state, probe)
        save("partial" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    return save("complete")


def _measure_probe(state: State, probe: Probe, budget: int, save: Callable[[], object]) -> str:
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
        if isinstance(probe, ScenesProbe):
            read_pictures(state, probe, haystack, step.cuts)
        else:
            read_haystack(state, probe, haystack, step.cuts)
        haystack += 1
        _fit(state, probe)
        save()


def _measure_cases(state: State, probe: DatasetProbe, save: Callable[[], object]) -> str:
    """Ask all cases of a data set, whatever the answers; why it stopped."""
    trials = state.trials[probe.name] = []
    state.image = image_extent(state.picture_reader, probe)
    fitted = 0
    for view in probe.views(state.settings.seed):
        read_view(state, probe, view)
        if len(trials) >= _REFIT * fitted:
            fitted = len(trials)
            _fit(state, probe)
            save()
    _fit(state, probe)
    return f"all {len(trials)} questions of the data set were asked"


def _fit(state: State, probe: AnyProbe) -> None:
    """Fit the curve to all trials of a probe and read off the window for the live line."""
    settings = state.settings
    table = trial_table(state.trials[probe.name])
    valid = table[table["score"].notna()]
    if len(valid) >= FEWEST_TRIALS and valid["length"].nunique() > 1:
        fit = fit_trials(table, settings.seed)
        state.fits[probe.name] = fit
        rule = criteria(settings)[:1]
        found = windows_of(
            fit, rule, confidence=settings.confidence, seed=settings.seed, probe=probe.name, unit=probe.unit
        )
        state.estimate = found[0]


def _next(state: State, probe: Probe, grid: list[int], haystack: int, budget: int) -> Next:
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
    expected *= state.image.tokens if state.image else 1
    if haystack and state.used + expected > budget:
        return Next(stop="what is left of the budget does not reach through another text")
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


def _header(run: Run, state: State, probes: Sequence[AnyProbe], stops: dict[str, str], status: Status) -> Run:
    """The header with estimates of all that was measured, costs and notes."""
    windows: list[WindowEstimate] = []
    curves: list[Curve] = []
    scores: list[LengthScore] = []
    notes = list(run.notes)
    settings = state.settings
    confidence, seed = settings.confidence, settings.seed
    for probe in probes:
        failed = sum(t.score is None for t in state.trials.get(probe.name, []))
        if failed:
            notes.append(f"{failed} trial(s) of {probe.name} failed and count neither as right nor as wrong")
        fit = state.fits.get(probe.name)
        if fit:
            windows += windows_of(
                fit, criteria(settings), confidence=confidence, seed=seed, probe=probe.name, unit=probe.unit
            )
            curves.append(curve_of(fit, confidence=confidence, seed=seed, probe=probe.name))
        if isinstance(probe, DatasetProbe):
            scores += length_scores(trial_table(state.trials.get(probe.name, [])), probe.name, confidence)
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
            "image": state.image,
            "scores": tuple(scores) or None,
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
    identity = ["fingerprint", "dtype", "rope_scaling", "server"]
    if model.server:
        identity.append("name")  # what a server holds has no fingerprint
    pairs += [(f"model.{name}", getattr(earlier.model, name), getattr(model, name)) for name in identity]
    for name, old, new in pairs:
        if old != new:
            raise UserError(
                f"'{folder}' holds a run with {name} = {old!r}, asked was {new!r}. "
                "Give the same options to resume it, or another --out."
            )
    return earlier
