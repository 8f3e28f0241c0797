"""The self-check: readers with planted windows, measured by the very design and estimate that models get."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from laid_eval.records import Run, Settings
from laid_eval.window.curve import crossing, marginal_width, parse_criterion
from laid_eval.window.haystack import Corpus
from laid_eval.window.measure import measure
from laid_eval.window.probes import FactsProbe, Kind, Probe
from laid_eval.window.readers import ScriptedReader


@dataclass(frozen=True)
class Family:
    """Readers of one kind, around the one given; each is measured once."""

    name: str
    reader: ScriptedReader
    choices: int = 8
    max_length: int = 16384

    def draw(self, seed: int) -> ScriptedReader:
        """A reader of this family: half an octave around its location, other widths and lapses.

        One fixed reader would test one point of the prior, where an interval may be right by luck.
        """
        rng = np.random.default_rng([seed, 6])
        return replace(
            self.reader,
            location=self.reader.location + rng.uniform(-0.5, 0.5),
            width=self.reader.width * float(np.exp(rng.normal(0, 0.35))),
            lapse=self.reader.lapse + rng.uniform(0, 0.1),
            seed=seed,
        )


FAMILIES = (
    Family("typical", ScriptedReader(location=12.4, width=0.3, lapse=0.0)),
    Family("cliff", ScriptedReader(location=12.6, width=0.05, lapse=0.0)),
    Family("gradual", ScriptedReader(location=12.0, width=0.5, lapse=0.0)),
    Family("lapsing", ScriptedReader(location=12.0, width=0.25, lapse=0.2)),
    Family("short window", ScriptedReader(location=10.0, width=0.25, lapse=0.0)),
    Family("long context", ScriptedReader(location=15.4, width=0.3, lapse=0.0), max_length=131072),
    Family("yes/no", ScriptedReader(location=12.0, width=0.3, lapse=0.0), choices=2),
    Family("four-way", ScriptedReader(location=11.0, width=0.35, lapse=0.0), choices=4),
    Family("haystacks differ", ScriptedReader(location=12.2, width=0.2, lapse=0.0, spread=0.3)),
    Family("correlated answers", ScriptedReader(location=12.2, width=0.3, lapse=0.0, correlation=0.05)),
)


@dataclass(frozen=True)
class Calibration:
    """How the estimates of one family relate to the plant."""

    family: str
    runs: int
    coverage: float
    """Share of intervals that hold the plant."""
    median_error: float
    """Median distance of estimate and plant, octaves; a censored estimate counts as infinite."""
    median_width: float
    """Median width of the interval, octaves; an open one counts as infinite."""
    trials: float
    """Mean number of questions."""
    planted: float
    """The median of the planted windows, tokens."""
    error_bound: float
    """What the median error must stay under: 0.15 octave, 0.25 for yes/no questions."""

    @property
    def in_bounds(self) -> bool:
        """Coverage of a 95% interval within 92-98%, give or take what so few runs can't tell; error in bound."""
        slack = 2 * np.sqrt(0.95 * 0.05 / self.runs) if self.runs < 300 else 0.0
        return bool(0.92 - slack <= self.coverage <= 0.98 + slack and self.median_error < self.error_bound)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON; what is infinite (censored or open) is `None`."""
        values = {k: None if v in (np.inf, -np.inf) else v for k, v in asdict(self).items()}
        return {**values, "in_bounds": self.in_bounds}


def planted_window(reader: ScriptedReader, choices: int, shortest: int, criterion: str = "relative") -> float:
    """Log2 of the window that a reader really has, on average over haystacks."""
    g = 1 / choices
    width = marginal_width(np.array(max(reader.width, 1e-6)), np.array(reader.spread))
    r = np.array((1 - reader.lapse - g) / (1 - g))
    rule = parse_criterion(criterion)
    return float(crossing(rule, np.array(reader.location), width, r, g, float(np.log2(shortest))))


def calibrate(family: Family, runs: int, trials: int, seed: int = 0) -> Calibration:
    """Measure `runs` readers of a family, `trials` questions each, and compare with what was planted."""
    probe = _probe(family.choices)
    inside, errors, widths, counts, plants = 0, [], [], [], []
    for k in range(runs):
        reader = family.draw(seed + k)
        truth = planted_window(reader, family.choices, probe.min_length)
        plants.append(2**truth)
        run = measure_scripted(reader, probe, family.max_length, trials, seed + k)
        w = run.windows[0]
        low = np.log2(w.low) if w.low else -np.inf
        high = np.log2(w.high) if w.high else np.inf
        inside += bool(low <= truth <= high)
        errors.append(abs(np.log2(w.length) - truth) if w.length else np.inf)
        widths.append(high - low)
        counts.append(w.trials)
    return Calibration(
        family=family.name,
        runs=runs,
        coverage=inside / runs,
        median_error=float(np.median(errors)),
        median_width=float(np.median(widths)),
        trials=float(np.mean(counts)),
        planted=float(np.median(plants)),
        error_bound=0.25 if family.choices == 2 else 0.15,
    )


def check_all(runs: int, seed: int, done: Callable[[str], None], trials: int = 400) -> list[Calibration]:
    """Calibrate every family, several at a time; `done` is called with each name as it finishes."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(calibrate, family, runs, trials, seed): family for family in FAMILIES}
        for job in as_completed(jobs):
            done(jobs[job].name)
        return [job.result() for job in jobs]


def measure_scripted(reader: ScriptedReader, probe: Probe, max_length: int, trials: int, seed: int) -> Run:
    """One measurement of a scripted reader over wordless text, in a folder that is thrown away."""
    corpus = Corpus("scripted", "scripted", (("word " * 20,),), shuffled=True)
    settings = Settings(
        probes=(probe.name,),
        probe_hashes={},
        haystack="scripted",
        haystack_hash="scripted",
        min_length=None,
        max_length=max_length,
        criterion="relative",
        confidence=0.95,
        precision=0.0,
        budget=10**9,
        max_trials=trials,
        chunk=10**9,
        seed=seed,
    )
    run = Run(created="", status="partial", model=reader.info, settings=settings, environment={})
    with tempfile.TemporaryDirectory() as folder:
        return measure(reader, [probe], corpus, run, Path(folder))


def _probe(choices: int) -> FactsProbe:
    words = tuple(f"w{i}" for i in range(choices))
    kinds = tuple(
        Kind(fact=f"Fact {i} is {{answer}}.", question=f"What is fact {i}?", lead="It is", answers=words)
        for i in range(24)
    )
    return FactsProbe(
        name="planted",
        summary="facts for the self-check",
        instruction="Read.",
        task="facts",
        kinds=kinds,
        choices=choices,
    )
