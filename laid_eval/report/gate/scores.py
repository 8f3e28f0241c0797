"""Scores against a limit, or against those of a baseline, document by document.

Once: a score test (in the sense of Rao: the variance is that under the limit) on sums by cluster, with Student's t
for as many degrees as there are clusters less one. Where answers are right or wrong, a mean difference of m needs at
least a share m of answers that differ; the variance is never taken below that of so many, as in the binomial score
test, else a few documents without a difference would show equality. Half an answer is held back for continuity.
Again and again: exact betting, see `sequential`.

Why not a bootstrap or a permutation of signs: the limit is not zero, so differences are not symmetric around it, and
with few discordant answers a resample knows no more of the tail than the sample does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from laid_eval.errors import UserError
from laid_eval.records import Metric
from laid_eval.report.gate.evidence import Evidence, Look, further, inverted
from laid_eval.report.gate.rules import Rule
from laid_eval.report.gate.sequential import betting_p
from laid_eval.scores import SAMPLES, LoadedScores
from laid_eval.window.curve import Floats


@dataclass(frozen=True)
class Sums:
    """Values summed by cluster."""

    total: Floats
    """(G,)"""
    count: Floats
    """(G,) documents of each."""
    least: float
    """Least possible value of a document: 0 of a score, -1 of a difference."""

    @property
    def mean(self) -> float:
        """Over documents."""
        return float(self.total.sum() / self.count.sum())

    @property
    def cluster_mean(self) -> float:
        """Over clusters, each counted once."""
        return float((self.total / self.count).mean())

    def variance(self, mean: float) -> float:
        """Of the grand total, were `mean` true."""
        sandwich = float(np.square(self.total - mean * self.count).sum())
        return max(sandwich, float(self.count.sum() * abs(mean) * (1 - abs(mean))))

    def p(self, mean: float, above: bool, look: Look) -> float:
        """P-value against the true mean being at most (`above`) or at least `mean`."""
        if look.sequential:
            return betting_p(self.total / self.count, self.least, 1.0, mean, above)
        excess = (1 if above else -1) * float((self.total - mean * self.count).sum()) - 0.5
        variance = self.variance(mean)
        free = len(self.count) - 1
        if excess <= 0 or free < 1 or variance <= 0:
            return 1.0
        return float(student.sf(excess / np.sqrt(variance), free))


def at_least(run: LoadedScores, rule: Rule, look: Look) -> Evidence:
    """The score of a task against a limit."""
    metric = run.metric(rule.name)
    rows = _answered(run, rule.name)
    if rows.empty:
        return _by_errors(rule, look, metric, None)
    return _by_documents(_sums(rows["score"], rows["cluster"], 0.0), rule, look, metric, None)


def drop(run: LoadedScores, baseline: LoadedScores, rule: Rule, look: Look) -> Evidence:
    """The drop of a score, baseline minus run, against a limit; by pairs where both runs kept their documents.

    Raises:
        UserError: No such task, other prompts, or neither documents nor standard errors.
    """
    metric, before = run.metric(rule.name), baseline.metric(rule.name)
    if metric.metric != before.metric:
        raise UserError(
            f"Rule {rule.text!r}: not comparable: the run's metric is {metric.metric!r}, the baseline's "
            f"{before.metric!r}. Score both alike."
        )
    shared = _answered(run, rule.name).merge(_answered(baseline, rule.name), on="doc_id", suffixes=("", "_baseline"))
    if shared.empty:
        return _by_errors(rule, look, metric, before)
    other = shared[shared["prompt_hash"].notna() & (shared["prompt_hash"] != shared["prompt_hash_baseline"])]
    if len(other):
        raise UserError(
            f"Rule {rule.text!r}: not comparable: prompt_hash of document {other['doc_id'].iloc[0]!r} differs "
            f"({len(other)} of {len(shared)} do). Score both with the same prompts."
        )
    return _by_documents(
        _sums(shared["score_baseline"] - shared["score"], shared["cluster"], -1.0), rule, look, metric, before
    )


def _answered(run: LoadedScores, task: str) -> pd.DataFrame:
    """Documents of a task that have a score; one without a cluster is its own."""
    rows = run.samples[run.samples["task"] == task]
    rows = rows[rows["score"].notna()]
    return rows.assign(cluster=rows["cluster"].where(rows["cluster"].notna(), "document " + rows["doc_id"]))


def _sums(values: pd.Series[float], clusters: pd.Series[str], least: float) -> Sums:
    grouped = values.astype(float).groupby(clusters.to_numpy())
    total, count = (np.asarray(x, dtype=np.float64) for x in (grouped.sum(), grouped.count()))
    return Sums(total, count, least)


def _by_documents(sums: Sums, rule: Rule, look: Look, metric: Metric, before: Metric | None) -> Evidence:
    worse_above = rule.needs_baseline
    estimate = sums.cluster_mean if look.sequential else sums.mean
    low, high = _interval(lambda limit, above: sums.p(limit, above, look), sums.least, estimate, look.alpha)
    clusters, documents = len(sums.count), int(sums.count.sum())
    deviation = float(np.sqrt(sums.variance(estimate))) / documents
    statistic = "betting on the mean over clusters, anytime-valid" if look.sequential else "score test"
    kinds = "documents" if documents == clusters else f"documents in {clusters} clusters"
    return Evidence(
        run=_shown(metric),
        baseline=_shown(before) if before else None,
        change=100 * estimate,
        low=100 * low,
        high=100 * high,
        unit="points",
        p_fail=sums.p(rule.limit, worse_above, look),
        p_pass=sums.p(rule.limit, not worse_above, look),
        method=f"{statistic} on {documents} {'pairs of ' if before else ''}{kinds}",
        clusters=clusters,
        cluster_name="documents" if documents == clusters else "clusters",
        pairs=documents if before else None,
        more=further(clusters, documents, deviation, rule.limit - estimate, look.tail(clusters)),
    )


def _by_errors(rule: Rule, look: Look, metric: Metric, before: Metric | None) -> Evidence:
    """Without documents: the standard errors alone, and nothing paired."""
    both = [metric] if before is None else [metric, before]
    if any(m.stderr is None for m in both):
        raise UserError(
            f"Rule {rule.text!r}: task {rule.name!r} has neither documents in {SAMPLES} nor a standard error, so a "
            "difference can't be told from chance. Score again with samples kept."
        )
    if look.sequential:
        raise UserError(f"Rule {rule.text!r}: --sequential needs the documents of both runs ({SAMPLES}).")
    error = float(np.hypot(metric.stderr or 0.0, (before.stderr or 0.0) if before else 0.0))
    estimate = metric.value if before is None else before.value - metric.value
    worse = 1 if before else -1
    z = worse * (estimate - rule.limit) / error if error else np.inf * np.sign(worse * (estimate - rule.limit))
    half = float(norm.isf(look.alpha)) * error
    samples = min(m.samples or 0 for m in both)
    return Evidence(
        run=_shown(metric),
        baseline=_shown(before) if before else None,
        change=100 * estimate,
        low=100 * (estimate - half),
        high=100 * (estimate + half),
        unit="points",
        p_fail=float(norm.sf(z)),
        p_pass=float(norm.cdf(z)),
        method="standard errors, unpaired" if before else "standard error",
        clusters=samples or None,
        cluster_name="documents",
        more=further(samples, samples, error, rule.limit - estimate, look.alpha) if samples else None,
        note="" if before is None else "unpaired: with samples kept, far fewer documents would do",
    )


def _interval(p: Callable[[float, bool], float], least: float, middle: float, alpha: float) -> tuple[float, float]:
    """Limits that the data reject from neither side, cut at what is possible."""
    low = inverted(lambda limit: p(limit, True), alpha, middle, least)
    high = inverted(lambda limit: p(limit, False), alpha, middle, 1.0)
    return least if low is None else low, 1.0 if high is None else high


def _shown(metric: Metric) -> str:
    error = "" if metric.stderr is None else f" ± {100 * metric.stderr:.1f}"
    return f"{100 * metric.value:.1f}{error} points ({metric.metric})"
