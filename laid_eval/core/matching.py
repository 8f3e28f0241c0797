"""Progressive distance-weighted attention matching: a student's attention is drawn to a teacher's, octave by octave.

The obvious loss, KL with a weight on every key, is no divergence: its minimum lies at P ~ weight * target. Here a row
is split exactly (chain rule of KL) into the mass M_b of each octave of distance and the distribution P(j|b) within
it, and only the second part is weighted. For a row of one head, with target P' (a mixture of teacher heads):

    L = KL(M' || M) + sum_b  w_b * M'_b^(1 - kappa) * KL(P'(.|b) || P(.|b))
    w_b ~ rho^(gamma (b - 1) / (octaves - 1)),  mean 1 over the octaves b >= 1 that the row has;  w_0 = 1 (the sink)

Zero, with zero gradient, at P = P' for every weight. kappa = 0 and gamma = 0 is the row's KL(P' || P); kappa = 1
trains the choice *within* a far octave however little mass the teacher puts there; gamma grows with training, so
that weight moves outward. With respect to the scaled student logit of key k in octave b:

    dL/ds_k = P(k|b) (M_b - M'_b) + w_b M'_b^(1 - kappa) (P(k|b) - P'(k|b))

Exact on the rows given, in memory linear in rows x keys: rows go in chunks, recomputed in the backward pass.
Source: the loss named in LAid (AAAI 2026, vol. 40(34), pp. 28955-28963) is not specified there; this form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from laid_eval.core.heads import Heads, wide
from laid_eval.core.view import View

TINY = 1e-30  # below this a sum of probabilities has underflowed; float32 still holds it
EMPTY = -1e30  # logit of a bin without keys: no infinity, whose differences are not numbers


@dataclass(frozen=True, eq=False)
class Matched:
    """The loss and its parts, nats, mean over rows and heads."""

    loss: Tensor
    """Scalar, to be minimised."""
    mass: Tensor
    """Scalar KL of the masses of sink and octaves, for logs."""
    selectivity: Tensor
    """(octaves + 1,) KL within the sink and each octave, unweighted, for logs; 0 where no row has such keys."""
    rows: Tensor
    """(octaves + 1,) rows that have keys there."""


def octave_matching(
    student: Heads,
    teacher: Heads,
    mixture: Tensor,
    view: View,
    *,
    gamma: float,
    kappa: float = 0.5,
    rho: float = 64.0,
    octaves: int = 17,
    weights: Tensor | None = None,
    chunk: int = 16,
) -> Matched:
    """How far a student layer's attention is from a mixture of a teacher layer's heads, on the rows of one text.

    Rows that see fewer than two keys have nothing to match and are left out of the mean. The teacher gets no
    gradient. Everything is computed in float32 (float64 stays), also under autocast.

    Args:
        student: Its queries (Hs, R, D) and keys (Gs, N, D).
        teacher: The same of the teacher, of the same rows and tokens; heads and channels may differ in number.
        mixture: (Hs, Ht) share of each teacher head in a student head's target, rows summing to 1 (`HeadMixer`).
        view: What the rows see, and how far away.
        gamma: Weight of distance, 0 none, as `distance_weight` gives it.
        kappa: 0..1, how much of the teacher's mass is dropped from an octave's weight.
        rho: Ratio of the weights of the last octave and the first at gamma = 1.
        octaves: Fixed for a run: 17 reach 131k tokens. The last holds all that is farther.
        weights: (R,) rows that each row stands for, as from `sample_rows`; all alike where `None`.
        chunk: Rows at a time.

    Raises:
        ValueError: Shapes don't fit; or the student carries no gradient while gradients are on.

    >>> heads = Heads(torch.eye(3)[:2, None], torch.eye(3)[None], scale=1.0)
    >>> seen = torch.ones(1, 3, dtype=torch.bool)
    >>> view = View(seen, torch.tensor([[2, 1, 0]]), torch.tensor([True, False, False]))
    >>> own, other = torch.eye(2), 1 - torch.eye(2)  # head to head, and crossed
    >>> with torch.no_grad():
    ...     losses = [octave_matching(heads, heads, m, view, gamma=1.0).loss for m in (own, other)]
    >>> [abs(round(float(x), 2)) for x in losses]
    [0.0, 0.36]
    """
    _check(student, teacher, mixture, view, weights, kappa, octaves)
    if not len(view.seen):
        nothing = wide(student.query).sum()  # joins the graph: other processes wait for it
        empty = nothing.detach().new_zeros(octaves + 1)
        return Matched(nothing, nothing.detach(), empty, empty.long())
    student, teacher = student.widened(), teacher.detached().widened()
    parts = []
    # Trainers run losses under autocast, which would take these products in half precision.
    with torch.autocast(student.query.device.type, enabled=False):
        mixture = mixture.to(student.query.dtype)
        for start in range(0, len(view.seen), chunk):
            rows = slice(start, start + chunk)
            part = checkpoint(
                _octaves, student, teacher, mixture, view, rows, octaves,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            parts.append(part)
    target, own, within, filled = (torch.cat(column) for column in zip(*parts, strict=True))

    mass = torch.where(filled[:, None], target.exp() * (target - own), 0.0).sum(dim=-1)
    factor = octave_weights(filled.to(within.dtype), gamma, rho)[:, None] * torch.exp((1 - kappa) * target)
    row = (mass + (factor * within).sum(dim=-1)).mean(dim=1)  # mean over heads: (R,)

    share = row.new_ones(len(row)) if weights is None else weights.to(row)
    share = share * (view.seen.sum(dim=1) >= 2)
    with torch.no_grad():
        here = share[:, None] * filled
        selectivity = (here[:, None] * within).mean(dim=1).sum(dim=0) / here.sum(dim=0).clamp_min(TINY)
        mass_mean = (share * mass.mean(dim=1)).sum() / share.sum().clamp_min(TINY)
    return Matched((share * row).sum() / share.sum().clamp_min(TINY), mass_mean, selectivity, (here > 0).sum(dim=0))


def distance_weight(
    step: int, total_steps: int, *, maximum: float = 1.0, start: float = 0.05, end: float = 0.8
) -> float:
    """Gamma after `step` of `total_steps` steps of the optimiser: 0 up to `start`, then smoothly up to `maximum`.

    A function of the optimiser's step alone (not of micro-batches, not of the clock): a resumed run goes on as it
    would have gone.

    Args:
        step: Steps of the optimiser taken so far.
        total_steps: Of the whole run.
        maximum: Gamma at the end.
        start: Share of the run at which the ramp begins.
        end: Share of the run at which it ends.

    Raises:
        ValueError: The length of the run is not known, or the ramp ends before it begins.

    >>> [distance_weight(s, 100) for s in (0, 5, 80, 100)]
    [0.0, 0.0, 1.0, 1.0]
    """
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: the ramp of the distance weight needs the length of the run")
    if not 0 <= start < end <= 1:
        raise ValueError(f"the ramp runs from {start} to {end} of the run: wanted 0 <= start < end <= 1")
    x = min(max((step / total_steps - start) / (end - start), 0.0), 1.0)
    return maximum * x * x * (3 - 2 * x)


def octave_weights(filled: Tensor, gamma: float, rho: float = 64.0) -> Tensor:
    """(R, B + 1) weights of the sink (always 1) and of B octaves, mean 1 over those that a row has.

    Not 2^(gamma * octave) with a clip: once two octaves saturate, their ratio falls back to 1 while gamma grows.

    Args:
        filled: (R, B + 1) floats, 1 where a row has keys, else 0.
        gamma: Weight of distance; the ratio of two octaves' weights never falls as it grows.
        rho: Ratio of the last octave's weight and the first's at gamma = 1.

    >>> octave_weights(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), gamma=0.5)
    tensor([[1.0000, 0.2222, 0.0000, 1.7778]])
    """
    here = filled[:, 1:]
    place = torch.linspace(0, 1, here.shape[1], dtype=here.dtype, device=here.device)  # one octave alone: 0
    far = rho ** (gamma * place) * here
    count = here.sum(dim=1, keepdim=True)
    far = far * count / far.sum(dim=1, keepdim=True).clamp_min(TINY)
    return torch.cat([torch.ones_like(far[:, :1]), far], dim=1)


def _check(
    student: Heads, teacher: Heads, mixture: Tensor, view: View, weights: Tensor | None, kappa: float, octaves: int
) -> None:
    size = tuple(view.seen.shape)
    for name, heads in (("student", student), ("teacher", teacher)):
        if (heads.query.shape[1], heads.key.shape[1]) != size:
            raise ValueError(
                f"the {name} has {heads.query.shape[1]} rows and {heads.key.shape[1]} keys, the view is (R, N) = {size}"
            )
    if tuple(mixture.shape) != (len(student.query), len(teacher.query)):
        raise ValueError(
            f"the mixture is {tuple(mixture.shape)}: wanted (student, teacher) heads "
            f"({len(student.query)}, {len(teacher.query)})"
        )
    if weights is not None and tuple(weights.shape) != size[:1]:
        raise ValueError(f"{tuple(weights.shape)} weights for {size[0]} rows")
    if not 0 <= kappa <= 1 or not 1 <= octaves <= 31:
        raise ValueError(f"kappa {kappa} must lie in 0..1, octaves {octaves} in 1..31")
    if torch.is_grad_enabled() and not student.has_gradient:
        # What reentrant checkpointing hands over trains nothing, and says nothing.
        raise ValueError(
            "the student's queries and keys carry no gradient: checkpoint the model with use_reentrant=False, or "
            "measure under torch.no_grad()"
        )


def _octaves(
    student: Heads, teacher: Heads, mixture: Tensor, view: View, rows: slice, octaves: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log masses (R, Hs, B + 1) of target and student, KL within each bin (R, Hs, B + 1), and which bins (R, B + 1)."""
    bins = view.bins(rows, octaves)
    # Sums over bins are products with this matrix: unlike scattered sums, the same on every run. Unseen keys: no bin.
    member = student.query.new_zeros(*bins.shape, octaves + 2).scatter_(2, bins[..., None], 1.0)[..., :-1]
    filled = member.amax(dim=1) > 0

    below, top = _below_top(teacher.logits(rows), bins, octaves)
    log_sum = _log(below.exp() @ member) + top
    row = log_sum.logsumexp(dim=-1, keepdim=True)
    # In units of the largest mass a head has in the bin: a far octave with 1e-40 of a row keeps its shape.
    unit = (log_sum - row).amax(dim=1, keepdim=True)
    shift = (top - row - unit).masked_fill(~filled[:, None], 0.0)
    probability = _at(shift, bins.clamp_max(octaves)).add_(below).exp_()
    target = mixture @ probability.to(mixture.dtype)  # (R, Hs, N)
    total = target @ member
    log_target = _log(total) + unit

    below, top = _below_top(student.logits(rows), bins, octaves)
    log_sum = _log(below.exp() @ member)
    log_mass = (log_sum + top).log_softmax(dim=-1)

    # sum_j P'(j|b) (log P'(j|b) - log P(j|b)), with P' = target / total and log P = below - log_sum
    within = (target * (_log(target) - below)) @ member / total.clamp_min(TINY) - _log(total) + log_sum
    # Where all of the mixture has underflowed there is nothing to imitate.
    within = torch.where(filled[:, None] & (total > TINY), within, 0.0)
    return log_target, log_mass, within, filled


def _below_top(logits: Tensor, bins: Tensor, octaves: int) -> tuple[Tensor, Tensor]:
    """Logits (R, H, N) below the largest of their bin, and those largest (R, H, B + 1)."""
    with torch.no_grad():  # a softmax is the same whatever is subtracted
        top = logits.new_full((*logits.shape[:2], octaves + 2), EMPTY)
        top = top.scatter_reduce(2, bins[:, None].expand_as(logits), logits, "amax")
        at = _at(top, bins)
    return logits - at, top[..., :-1]


def _at(table: Tensor, bins: Tensor) -> Tensor:
    """(R, H, N) entries of a table (R, H, bins) at each key's bin (R, N)."""
    return table.gather(2, bins[:, None].expand(-1, table.shape[1], -1))


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(TINY).log()
