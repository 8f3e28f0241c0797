"""The self-check of the gate: how often it errs where the truth is planted, and its power at the size it asks for.

Baseline and run answer the same questions. Half of the answers to a question are drawn alike in both (the question is
hard or easy for either), and haystacks have windows of their own, half of it shared.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binom, norm

from laid_eval.records import Metric, ModelInfo, Outcome, Run, Settings
from laid_eval.report.gate.comparable import Measured
from laid_eval.report.gate.evidence import POWER, Look, further
from laid_eval.report.gate.rules import Rule, parse_rule
from laid_eval.report.gate.verdicts import judge
from laid_eval.runs import LoadedRun
from laid_eval.scores import LoadedScores
from laid_eval.window.curve import score_at

ALPHA = 0.05
_CHANCE = 0.125
_LENGTHS = 2.0 ** np.arange(8, 15.01, 1.0)
_LOCATION, _WIDTH = 12.0, 0.3


@dataclass(frozen=True)
class Plan:
    """One kind of comparison; the truth lies at the limit unless said otherwise."""

    name: str
    subject: str
    """`window`, `length` (a window against a length), `score`, or `several` (a window and two scores, Holm)."""
    drop: float
    """Planted: octaves of windows, 0..1 of scores."""
    limit: float
    clusters: int
    """Haystacks; of scores clusters of documents."""
    spread: float = 0.0
    """Octaves by which haystacks differ; of scores the correlation within a cluster."""
    size: int = 6
    """Questions at one of 8 lengths of a haystack; documents of a cluster."""
    sequential: bool = False
    shared: float = 0.5
    """Share of questions answered alike where the models are alike."""
    power: bool = False
    """Whether the run has the size that a first run, of `clusters`, asked for."""


PLANS = (
    Plan("windows, no drop", "window", 0.0, 0.25, 12),
    Plan("windows, no drop, haystacks differ", "window", 0.0, 0.25, 12, spread=0.3),
    Plan("windows, drop at the limit", "window", 0.25, 0.25, 12),
    Plan("windows, drop at the limit, haystacks differ", "window", 0.25, 0.25, 12, spread=0.3),
    Plan("windows, drop at the limit, 8 haystacks, answers alike", "window", 0.25, 0.25, 8, shared=0.9),
    Plan("a window at its limit, haystacks differ", "length", 0.0, 0.0, 12, spread=0.3),
    Plan("scores, no drop", "score", 0.0, 0.02, 400, size=1),
    Plan("scores, drop at the limit", "score", 0.02, 0.02, 400, size=1),
    Plan("scores, drop at the limit, few differ", "score", 0.02, 0.02, 200, size=1, shared=0.98),
    Plan("scores, drop at the limit, clusters", "score", 0.05, 0.05, 40, size=10, spread=0.3),
    Plan("three rules, all at the limit, clusters", "several", 0.05, 0.05, 40, size=10, spread=0.3),
    Plan("windows, looked at after every other haystack, at the limit", "window", 0.25, 0.25, 40, 0.3, sequential=True),
    Plan("scores, looked at 20 times, at the limit", "score", 0.05, 0.05, 400, size=1, sequential=True),
    Plan("power: windows, no drop, haystacks differ", "window", 0.0, 0.4, 12, spread=0.3, power=True),
    Plan("power: scores, no drop", "score", 0.0, 0.05, 100, size=1, power=True),
    Plan("power: scores, no drop, clusters", "score", 0.0, 0.05, 40, size=10, spread=0.3, power=True),
)


@dataclass(frozen=True)
class Errors:
    """How often the gate said what."""

    plan: str
    comparisons: int
    failed: int
    passed: int
    bound: str
    """What must hold: `fail <= 5%`, `fail and pass <= 5%`, `pass >= 80%`."""

    @property
    def in_bounds(self) -> bool:
        """Whether what was seen may come of a gate that keeps its promise (binomial test, 1%)."""
        most = binom.isf(0.01, self.comparisons, ALPHA)
        if self.bound.startswith("pass >="):
            return bool(self.passed >= binom.ppf(0.01, self.comparisons, POWER))
        return bool(self.failed <= most and (self.passed <= most or "and pass" not in self.bound))

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {**asdict(self), "in_bounds": self.in_bounds}


def check_all(comparisons: int, seed: int, done: Callable[[str], None]) -> list[Errors]:
    """Simulate every plan, several at a time; `done` is called with each name as it finishes."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(simulate, plan, comparisons, seed): plan for plan in PLANS}
        for job in as_completed(jobs):
            done(jobs[job].name)
        return [job.result() for job in jobs]


def simulate(plan: Plan, comparisons: int, seed: int = 0) -> Errors:
    """Compare again and again. Looked at several times, a comparison ends with the first verdict."""
    outcomes = [_compare(plan, np.random.default_rng([seed, k])) for k in range(comparisons)]
    at_limit = plan.drop == plan.limit
    bound = f"pass >= {POWER:.0%}" if plan.power else "fail and pass <= 5%" if at_limit else "fail <= 5%"
    return Errors(plan.name, comparisons, outcomes.count("fail"), outcomes.count("pass"), bound)


def _compare(plan: Plan, rng: np.random.Generator) -> Outcome:
    if plan.power:
        return _at_planned_size(plan, rng)
    if plan.sequential:
        return _looked_at(plan, rng)
    if plan.subject == "several":
        parts = [_scores(plan, plan.clusters, rng, f"task{k}") for k in range(2)]
        joint = [Measured(Path(name), score=_joined([p[i] for p in parts])) for i, name in enumerate(("run", "base"))]
        windows = _windows(Plan("", "window", 0.25, 0.25, 12, 0.3), 12, rng)
        sides = [Measured(m.path, window=w, score=m.score) for m, w in zip(joint, windows, strict=True)]
        rules = ["window.planted drop <= 0.25 octave", "score.* drop <= 5 points"]
        found = [v.outcome for v in judge(sides[0], sides[1], [parse_rule(r) for r in rules], Look(ALPHA))]
        return "fail" if "fail" in found else "pass" if set(found) == {"pass"} else "inconclusive"
    return _verdict(plan, _draw(plan, plan.clusters, rng))


def _at_planned_size(plan: Plan, rng: np.random.Generator) -> Outcome:
    """A first run tells the spread, hence a size for the true distance; then both are measured at that size."""
    first = judge(*_draw(plan, plan.clusters, rng), _rules(plan), Look(ALPHA))[0]
    if first.low is None or first.high is None or first.change is None:
        return "inconclusive"
    scale = 100 if plan.subject == "score" else 1
    deviation = (first.high - first.low) / scale / 2 / 1.645
    size = further(plan.clusters, plan.clusters, deviation, plan.limit - plan.drop, ALPHA)
    clusters = plan.clusters + (size[0] if size else 0)
    return _verdict(plan, _draw(plan, clusters, rng))


def _looked_at(plan: Plan, rng: np.random.Generator) -> Outcome:
    run, base = _draw(plan, plan.clusters, rng)
    steps = range(8, plan.clusters + 1, 2 if plan.subject == "window" else plan.clusters // 20)
    for count in steps:
        verdict = judge(_first(run, count), _first(base, count), _rules(plan), Look(ALPHA, sequential=True))[0]
        if verdict.outcome != "inconclusive":
            return verdict.outcome
    return "inconclusive"


def _first(measured: Measured, clusters: int) -> Measured:
    """What a run held when it had so many clusters."""
    window, score = measured.window, measured.score
    if window:
        kept = window.trials[window.trials["haystack"] < clusters]
        return Measured(measured.path, window=LoadedRun(window.path, window.header, kept))
    assert score is not None
    kept = score.samples[score.samples["cluster"].astype(int) < clusters]
    return Measured(measured.path, score=_loaded(kept))


def _verdict(plan: Plan, sides: tuple[Measured, Measured]) -> Outcome:
    return judge(*sides, _rules(plan), Look(ALPHA))[0].outcome


def _rules(plan: Plan) -> list[Rule]:
    if plan.subject == "length":
        return [parse_rule(f"window.planted@half >= {2**_LOCATION:g}")]  # the same for every width, so also on average
    if plan.subject == "window":
        return [parse_rule(f"window.planted drop <= {plan.limit} octave")]
    return [parse_rule(f"score.task drop <= {100 * plan.limit:g} points")]


def _draw(plan: Plan, clusters: int, rng: np.random.Generator) -> tuple[Measured, Measured]:
    if plan.subject == "score":
        run, base = _scores(plan, clusters, rng, "task")
        return Measured(Path("run"), score=run), Measured(Path("base"), score=base)
    one, other = _windows(plan, clusters, rng)
    return Measured(Path("run"), window=one), Measured(Path("base"), window=other)


def _windows(plan: Plan, haystacks: int, rng: np.random.Generator) -> tuple[LoadedRun, LoadedRun]:
    """Run and baseline: the baseline's window lies around 4,096 tokens, the run's `drop` octaves below."""
    location = _LOCATION + (rng.uniform(-0.25, 0.25) if plan.subject == "window" else 0.0)
    h, x, k = (a.ravel() for a in np.meshgrid(range(haystacks), np.log2(_LENGTHS), range(plan.size), indexing="ij"))
    common, own = rng.normal(size=haystacks), rng.normal(size=(2, haystacks))
    alike, drawn = rng.random(len(h)), rng.random((3, len(h)))
    sides = []
    for i, drop in enumerate((plan.drop, 0.0)):
        shift = plan.spread * np.sqrt(0.5) * (common + own[i])
        p = score_at(x, location - drop + shift[h], np.array(_WIDTH), np.array(0.97), _CHANCE)
        score = np.where(alike < plan.shared, drawn[2], drawn[i]) < p
        table = pd.DataFrame({"haystack": h, "length": 2**x, "score": score.astype(float), "chance": _CHANCE})
        table["id"] = [f"planted/{a}/{b:.2f}/{c}" for a, b, c in zip(h, x, k, strict=True)]
        sides.append(LoadedRun(Path(str(i)), _HEADER, table.assign(probe="planted")))
    return sides[0], sides[1]


def _scores(plan: Plan, clusters: int, rng: np.random.Generator, task: str) -> tuple[LoadedScores, LoadedScores]:
    """Run and baseline: the baseline scores 0.6 on average, the run `drop` less; exactly so, by a latent normal."""
    cluster = np.repeat(np.arange(clusters), plan.size)
    common, own = rng.normal(size=clusters), rng.normal(size=(2, clusters))
    alike, drawn = rng.random(len(cluster)), rng.normal(size=(3, len(cluster)))
    sides = []
    for i, drop in enumerate((plan.drop, 0.0)):
        text = np.sqrt(0.5) * (common + own[i])
        question = np.where(alike < plan.shared, drawn[2], drawn[i])
        latent = np.sqrt(plan.spread) * text[cluster] + np.sqrt(1 - plan.spread) * question
        table = pd.DataFrame({"score": (latent < norm.ppf(0.6 - drop)).astype(float), "cluster": cluster.astype(str)})
        table["doc_id"] = [str(k) for k in range(len(cluster))]
        sides.append(_loaded(table.assign(task=task, prompt_hash=None)))
    return sides[0], sides[1]


def _loaded(samples: pd.DataFrame) -> LoadedScores:
    metrics = tuple(
        Metric(task=str(task), metric="acc", value=float(rows["score"].mean()), samples=len(rows))
        for task, rows in samples.groupby("task")
    )
    return LoadedScores(Path("scores"), "complete", {}, metrics, samples)


def _joined(parts: list[LoadedScores]) -> LoadedScores:
    return _loaded(pd.concat([p.samples for p in parts]))


_HEADER = Run(
    created="",
    status="complete",
    model=ModelInfo(name="planted", source="scripted"),
    settings=Settings(
        probes=("planted",),
        probe_hashes={},
        haystack="planted",
        haystack_hash="planted",
        min_length=None,
        max_length=int(_LENGTHS[-1]),
        criterion="relative",
        confidence=0.95,
        precision=0.0,
        budget=0,
        chunk=1,
        seed=0,
    ),
    environment={},
)
