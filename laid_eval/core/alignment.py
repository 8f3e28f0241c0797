"""The paper's own loss: a student's rotated queries and keys drawn to a learned mixture of the teacher's heads.

    loss = mean (Q_a - sum_t pi[a, t] Q'_t)^2 + mean (K_a - sum_t pi[a, t] K'_t)^2

over student heads a, tokens and channels: squared Frobenius norms by size, so that the loss does not grow with the
length. Source: LAid (AAAI 2026, vol. 40(34), pp. 28955-28963), last layer; how the mixture is shared between queries
and keys, and its normalisation, are not specified there.

Two things to know. Rotations are linear, orthogonal and the same for all heads, so where teacher and student share
RoPE this loss is the same before and after the rotation: it knows nothing of distance (`octave_matching` does). And
it is no function of attention: queries times c and keys by c give the same attention and another loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laid_eval.core.heads import Heads


@dataclass(frozen=True, eq=False)
class Alignment:
    """The loss and what no student key can mend."""

    loss: Tensor
    """Scalar: queries plus keys, to be minimised."""
    constant: Tensor
    """Scalar: the part of `loss` that no student key can mend, the mean square of what heads that share a key want
    differently. Only the mixture moves it; for logs."""


def qk_alignment(
    student: Heads,
    teacher: Heads,
    mixture: Tensor,
    *,
    student_frequencies: Tensor,
    teacher_frequencies: Tensor,
) -> Alignment:
    """Mean squared distance of queries and keys from the mixture of the teacher's, in float32 (float64 stays).

    Keys are repeated to query heads (grouped-query attention), as in the paper: a shared key can only reach the mean
    of what its heads want. What is left is `constant`, computed without a target per student head.

    Args:
        student: Its queries (Hs, R, D) and keys (Gs, N, D), after the rotation.
        teacher: The same of the teacher, for the same rows and tokens; gets no gradient.
        mixture: (Hs, Ht) weights of teacher heads; rows need not sum to 1.
        student_frequencies: (P,) rad/token of the rotary pairs.
        teacher_frequencies: (P,) of the teacher's.

    Raises:
        ValueError: Head sizes or frequencies differ, so channels of both don't mean the same; or shapes don't fit.

    >>> heads = Heads(torch.ones(2, 3, 4), torch.ones(1, 3, 4), scale=0.5)
    >>> half = {"student_frequencies": torch.ones(2), "teacher_frequencies": torch.ones(2)}
    >>> float(qk_alignment(heads, heads, torch.full((2, 2), 0.25), **half).loss)  # (1 - 1/2)^2 twice
    0.5
    """
    _check(student, teacher, mixture, student_frequencies, teacher_frequencies)
    student, teacher = student.widened(), teacher.detached().widened()
    with torch.autocast(student.query.device.type, enabled=False):
        mixture = mixture.to(student.query.dtype)
        queries = student.query - torch.einsum("st,trd->srd", mixture, teacher.query)

        # Teacher heads that share a key add their weights; student heads that share one get the mean of their targets.
        by_key = mixture.reshape(len(mixture), len(teacher.key), -1).sum(dim=2)  # (Hs, Gt)
        grouped = by_key.reshape(len(student.key), -1, len(teacher.key))  # (Gs, Hs / Gs, Gt)
        shared = grouped.mean(dim=1)
        keys = student.key - torch.einsum("gh,hnd->gnd", shared, teacher.key)

        # |sum_h (w - w') K_h|^2 from the products of teacher keys: (Gt, Gt), no target per student head
        flat = teacher.key.flatten(1)
        products = flat @ flat.T / flat.shape[1]
        apart = (grouped - shared[:, None]).flatten(0, 1)
        constant = ((apart @ products) * apart).sum(dim=1).mean()
    return Alignment(queries.square().mean() + keys.square().mean() + constant, constant.detach())


def _check(student: Heads, teacher: Heads, mixture: Tensor, own: Tensor, other: Tensor) -> None:
    sizes = student.key.shape[2], teacher.key.shape[2]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's heads have {sizes[0]} channels, the teacher's {sizes[1]}: queries and keys can't be "
            "compared; match attention instead (octave_matching)"
        )
    if own.shape != other.shape or not torch.allclose(own.double(), other.double(), rtol=1e-5, atol=0):
        raise ValueError(
            f"the rotary frequencies of student ({len(own)} pairs) and teacher ({len(other)}) differ: equal channels "
            "turn at different speeds; match attention instead (octave_matching)"
        )
    if student.query.shape[1] != teacher.query.shape[1] or student.key.shape[1] != teacher.key.shape[1]:
        raise ValueError(
            f"student {tuple(student.query.shape)}, {tuple(student.key.shape)} and teacher "
            f"{tuple(teacher.query.shape)}, {tuple(teacher.key.shape)} are not of the same rows and tokens"
        )
    if tuple(mixture.shape) != (len(student.query), len(teacher.query)):
        raise ValueError(
            f"the mixture is {tuple(mixture.shape)}: wanted (student, teacher) heads "
            f"({len(student.query)}, {len(teacher.query)})"
        )
