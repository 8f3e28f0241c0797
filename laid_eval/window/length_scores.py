"""Scores by length: the table that data sets are told by, with intervals."""

from __future__ import annotations

import pandas as pd
from scipy.stats import beta

from laid_eval.records import LengthScore, Share


def length_scores(trials: pd.DataFrame, probe: str, confidence: float) -> tuple[LengthScore, ...]:
    """Mean score and compliance at every length.

    Args:
        trials: As `trial_table` makes them; failed ones are left out.
        probe: Which one is told.
        confidence: Mass of the intervals.
    """
    valid = trials[(trials["probe"] == probe) & trials["score"].notna()]
    out = []
    for length, group in valid.groupby("length"):
        free = group["complied"].notna().all()
        out.append(
            LengthScore(
                probe=probe,
                length=int(str(length)),
                questions=len(group),
                haystacks=group["haystack"].nunique(),
                score=_share(group["score"], group["haystack"], confidence),
                complied=_share(group["complied"].astype(float), group["haystack"], confidence) if free else None,
            )
        )
    return tuple(out)


def _share(values: pd.Series[float], haystacks: pd.Series[int], confidence: float) -> Share:
    """The mean, with the Jeffreys interval of as many observations as there are haystacks.

    Several questions on one haystack, as in the position experiment, are no more evidence than one.
    """
    mean, count = float(values.mean()), haystacks.nunique()
    seen = beta(count * mean + 0.5, count * (1 - mean) + 0.5)
    low, high = (float(seen.ppf(level)) for level in ((1 - confidence) / 2, (1 + confidence) / 2))
    return Share(value=mean, low=min(low, mean), high=max(high, mean))
