"""The psychometric curve: how a score falls with context length, and where it crosses a criterion.

    P(L) = g + r * (1 - g) * S((t - x) / w),      x = log2 L,   S(z) = 1 / (1 + exp(-z))

`g` is the chance level (known from the task), `r` the ceiling after correction for chance (one minus the
lapse rate, rescaled to 0..1), `t` the location and `w` the width, both in octaves (doublings of length).
"Accuracy at 32k" is one point of this curve; a window is where the whole curve crosses a stated level.

Source of the form: Wichmann & Hill 2001 (lapse and guess rates); Schuett et al. 2016 (Bayesian fit).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import expit, logit

from laid_eval.errors import UserError, nearest

Floats = NDArray[np.float64]
CriterionName = Literal["relative", "half", "absolute", "chance", "anchored"]
CRITERIA: tuple[CriterionName, ...] = ("relative", "half", "absolute", "chance", "anchored")


class Criterion(BaseModel):
    """The level at which a context length stops counting as usable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: CriterionName
    """`relative`, `half` and `anchored` are chance-corrected shares; `absolute` and `chance` raw scores."""
    value: Annotated[float, Field(gt=0, le=1)]
    """The share of the base score, or the raw score."""
    anchor: Annotated[float, Field(gt=0, le=1)] | None = None
    """`anchored` only: the other model's chance-corrected base score."""

    def __str__(self) -> str:
        """The name with its value, e.g. `relative 0.85`."""
        return f"{self.name} {self.value:g}"

    @property
    def definition(self) -> str:
        """What the criterion means, in one line for people."""
        return {
            "relative": f"score above chance falls to {self.value:.0%} of its base value",
            "half": "score above chance falls to half of its base value",
            "absolute": f"raw score falls to {self.value:g}",
            "chance": f"raw score falls to {self.value:g}, the chance level of a yes/no task",
            "anchored": f"score above chance falls to {self.value:.0%} of another model's base value",
        }[self.name]


DEFAULT_VALUES: dict[CriterionName, float] = {
    "relative": 0.85,  # NoLiMa's share, here corrected for chance
    "half": 0.5,
    "absolute": 0.856,  # RULER: the score of Llama-2-7B-chat at 4k
    "chance": 0.5,  # the LAid paper's figure
    "anchored": 0.85,
}


def parse_criterion(text: str, anchor: float | None = None) -> Criterion:
    """Read `NAME` or `NAME:VALUE`, e.g. `relative` or `absolute:0.9`.

    Args:
        text: The criterion as typed.
        anchor: The chance-corrected base score of the model to compare with; only for `anchored`.

    Raises:
        UserError: Unknown name, a value outside (0, 1], or `anchored` without an anchor.
    """
    name, _, value = text.partition(":")
    if name not in CRITERIA:
        raise UserError(f"Unknown criterion {name!r}{nearest(name, CRITERIA)}. Allowed: {', '.join(CRITERIA)}.")
    try:
        number = float(value) if value else DEFAULT_VALUES[name]
    except ValueError:
        number = float("nan")
    if not 0 < number <= 1:
        raise UserError(f"Criterion {text!r}: the value must be a number above 0 and at most 1, e.g. {name}:0.85.")
    if name == "anchored" and anchor is None:
        raise UserError(
            "Criterion 'anchored' compares with another model: pass the run folder of that model with --anchor."
        )
    return Criterion(name=name, value=number, anchor=anchor if name == "anchored" else None)


def score_at(x: Floats, t: Floats, w: Floats, r: Floats, chance: float) -> Floats:
    """Expected score at log2 length `x`; all arguments broadcast together."""
    return np.asarray(chance + r * (1 - chance) * expit((t - x) / w))


def marginal_width(w: Floats, spread: Floats) -> Floats:
    """Width of the curve averaged over haystacks whose locations spread normally by `spread` octaves.

    A logistic averaged over normal shifts is again nearly logistic; the factor 16*sqrt(3)/(15*pi) keeps the
    error of the score below 0.01 (MacKay 1992; Demidenko 2004, section 7.1).
    """
    return np.asarray(np.sqrt(w**2 + (0.588 * spread) ** 2))


def crossing(criterion: Criterion, t: Floats, w: Floats, r: Floats, chance: float, base: float) -> Floats:
    """Log2 length at which the curve crosses the criterion.

    Args:
        criterion: The level.
        t: Location, octaves.
        w: Width, octaves.
        r: Chance-corrected ceiling, 0..1.
        chance: Chance level of the task.
        base: Log2 of the base length (the shortest one tested), where the base score is read off.

    Returns:
        Same shape as the broadcast of `t`, `w`, `r`; minus infinity where the curve lies below the level at
        every length, plus infinity where it never comes down to it.
    """
    t, w, r = np.broadcast_arrays(t, w, r)
    if criterion.name in ("relative", "half"):
        share = criterion.value * expit((t - base) / w)
    elif criterion.name == "anchored":
        share = criterion.value * float(criterion.anchor or 0.0) / r
    else:
        share = np.full(t.shape, (criterion.value - chance) / (1 - chance)) / r
    with np.errstate(divide="ignore"):
        # logit(0) = -inf and logit(1) = inf give the two infinities of the contract by themselves.
        return np.asarray(t - w * logit(np.clip(share, 0.0, 1.0)))
