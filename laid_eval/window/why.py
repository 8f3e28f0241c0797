"""Why a window ends: the score lost from a short text to a long one, split by cause. Pure, from a table of trials.

The same questions about the same facts are asked in six ways:

    short    the short text
    far      the short text; the question stands at a later position, so that its needle is as far away as in the long
             text by position ids alone
    full     the long text
    crowded  the long text; its tokens are moved toward the question after they were read, filler to a fraction of a
             position a token, so that the needle is as near as in the short text and all the filler is there
    alone    the long text; the statements of all other facts are hidden from the question
    near     the long text; the needle's statement is hidden from the question and told right before it instead

What is hidden or moved is so for the question; tokens read after a statement have seen it at its place. What is lost is
split, in shares of the score above chance, (score - chance) / (1 - chance):

    comprehension = 1 - short                 position    = short - far
    loss          = short - full              dilution    = short - crowded
    recovered     = near - full               distractors = alone - full
    remainder     = loss - position - dilution - distractors

The remainder is what two causes do only together (above 0), or what either of them does alone (below 0).

Intervals are mean +- t_(k-1) sqrt(k / (k - 1)) s, where s is the standard error that a bootstrap over the k haystacks
gives, whose questions are one cluster: percentiles of so few clusters could not reach far enough (Hesterberg 2015,
"What teachers should know about the bootstrap", The American Statistician 69). Where haystacks happen to score alike a
bootstrap sees no error at all, so no interval of n scores is narrower than what n equal answers still allow,
1 - (alpha / 2)^(1 / n) (the rule of three).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t

from laid_eval.errors import UserError
from laid_eval.records import Condition, Why, WhyValue

Floats = npt.NDArray[np.float64]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
WORDS: dict[Condition, str] = {
    "short": "short text",
    "far": "short text, needle as far as in the long one",
    "crowded": "long text, needle as near as in the short one",
    "full": "long text",
    "alone": "long text, other facts hidden",
    "near": "long text, needle told next to the question",
}
LEAST_HAYSTACKS = 2
_DRAWS = 10_000


@dataclass(frozen=True)
class Part:
    """A sum of conditions, in shares of the score above chance."""

    name: str
    words: str
    weights: dict[Condition, int]
    constant: int = 0


PARTS = (
    Part("comprehension", "lost in the short text already", {"short": -1}, 1),
    Part("loss", "lost from short to full", {"short": 1, "full": -1}),
    Part("position", "lost by distance alone: short - far", {"short": 1, "far": -1}),
    Part("dilution", "lost by filler alone: short - crowded", {"short": 1, "crowded": -1}),
    Part("distractors", "lost by other facts: alone - full", {"alone": 1, "full": -1}),
    Part("remainder", "the rest of the loss", {"short": -1, "far": 1, "crowded": 1, "alone": -1}),
    Part("recovered", "won back next to the question: near - full", {"near": 1, "full": -1}),
)
CAUSES = ("position", "dilution", "distractors", "remainder")
"""The parts that add up to the loss."""


@dataclass(frozen=True)
class Study:
    """What is asked to learn why the window of one probe ends."""

    probe: str
    length: int
    """Of the long text, tokens."""
    short_length: int
    haystacks: int
    questions: int
    """Most questions on one haystack."""


def explain(
    trials: pd.DataFrame,
    study: Study,
    confidence: float = 0.95,
    seed: int = 0,
    tokens: int = 0,
    seconds: float | None = None,
) -> Why:
    """The split with its intervals.

    Args:
        trials: One row an answer; columns `condition`, `haystack`, `question` (which fact), `score` (0..1, missing
            where the trial failed), `margin` (nats) and `chance`.
        study: Goes into the record.
        confidence: Mass of the intervals.
        seed: Of the bootstrap.
        tokens: Goes into the record.
        seconds: Goes into the record.

    Raises:
        UserError: No question was answered in all six ways on at least two haystacks.
    """
    scores = trials.pivot(index=["haystack", "question"], columns="condition", values="score").reindex(
        columns=list(CONDITIONS)
    )
    whole = scores.notna().all(axis=1)
    scores = scores[whole]
    margins = trials.pivot(index=["haystack", "question"], columns="condition", values="margin")
    margins = margins.reindex(columns=list(CONDITIONS))[whole]
    haystack = scores.index.get_level_values("haystack")
    if haystack.nunique() < LEAST_HAYSTACKS:
        raise UserError(
            f"Why the window of probe {study.probe!r} ends can't be said: questions were answered in all six ways on "
            f"{haystack.nunique()} haystack(s), needed are {LEAST_HAYSTACKS}."
        )
    chance = float(trials["chance"].iloc[0])
    weights = _resamples(haystack, seed)
    raw, nats = scores.to_numpy(dtype=float), margins.to_numpy(dtype=float)
    above = (raw - chance) / (1 - chance)
    conditions = []
    for k, name in enumerate(CONDITIONS):
        score = _interval(raw[:, k], haystack, weights, confidence, (0.0, 1.0), 1.0)
        conditions.append(_value(name, WORDS[name], score, _interval(nats[:, k], haystack, weights, confidence)))
    parts = []
    for part in PARTS:
        signs = np.array([part.weights.get(name, 0) for name in CONDITIONS], dtype=float)
        # Without a constant: a margin has no upper end that comprehension could be counted from.
        margin = None if part.constant else _interval(nats @ signs, haystack, weights, confidence)
        bounds = (0.0, 1 / (1 - chance)) if part.constant else (-np.inf, np.inf)
        step = 1 / (1 - chance)
        share = _interval(part.constant + above @ signs, haystack, weights, confidence, bounds, step)
        parts.append(_value(part.name, part.words, share, margin))
    return Why(
        **vars(study),
        asked=len(scores),
        failed=int((~whole).sum()),
        chance=chance,
        confidence=confidence,
        conditions=tuple(conditions),
        parts=tuple(parts),
        tokens=tokens,
        seconds=None if seconds is None else round(seconds, 2),
    )


def verdict(why: Why) -> str:
    """The split in one sentence, claiming nothing whose interval holds 0."""
    loss = why.part("loss")
    if loss.low <= 0:
        return f"At {why.length:,} tokens no loss can be told from 0; ask at a longer --why-length."
    alone = [why.part(name) for name in ("position", "dilution", "distractors")]
    sure = sorted((p for p in alone if p.low > 0), key=lambda p: -p.value)
    unsure = [p.name for p in alone if p.low <= 0]
    rest = why.part("remainder")
    told = ", ".join(f"{p.name} alone {p.value:.2f}" for p in sure) or "no cause alone can be told from 0"
    said = f"Of {loss.value:.2f} lost: {told}"
    if rest.high < 0:
        said += ", which overlap"
    if rest.low > 0:
        said += f", only together {rest.value:.2f}"
    if sure and unsure:
        said += f"; {' and '.join(unsure)} can't be told from 0"
    return f"{said}."


def _value(name: str, words: str, share: Floats, margin: Floats | None) -> WhyValue:
    value, low, high = (float(v) for v in share)
    nats = {} if margin is None else dict(zip(("margin", "margin_low", "margin_high"), map(float, margin), strict=True))
    return WhyValue(name=name, words=words, value=value, low=low, high=high, **nats)


def _resamples(haystack: pd.Index[int], seed: int) -> Floats:
    """(draws, haystacks) how often each haystack is drawn."""
    k = haystack.nunique()
    rng = np.random.default_rng([seed, 11])
    return rng.multinomial(k, np.full(k, 1 / k), size=_DRAWS).astype(np.float64)


def _interval(
    values: Floats,
    haystack: pd.Index[int],
    weights: Floats,
    confidence: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    step: float = 0.0,
) -> Floats:
    """Mean of one value a question, low and high end; `step` is the change that one whole question makes, 0: none."""
    mean, n, k = float(values.mean()), len(values), weights.shape[1]
    alpha = 1 - confidence
    _, cluster = np.unique(haystack, return_inverse=True)
    sums, counts = np.bincount(cluster, values), np.bincount(cluster).astype(float)
    error = np.std((weights @ sums) / (weights @ counts)) * np.sqrt(k / (k - 1))
    reach = max(float(t.ppf(1 - alpha / 2, k - 1) * error), step * (1 - (alpha / 2) ** (1 / n)))
    return np.array([mean, max(mean - reach, bounds[0]), min(mean + reach, bounds[1])])
