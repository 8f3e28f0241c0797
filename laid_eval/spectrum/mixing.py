"""The mixing residual: how well the teacher's key heads, mixed, give the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.complex128]


@dataclass(frozen=True)
class Mixing:
    """How well mixtures of the teacher's key heads give the student's, on held-out tokens. L layers, F pairs."""

    by_layer: Floats
    """(L,) R^2."""
    floor: Floats
    """(L,) the same with the teacher's keys of another text."""
    by_pair: Floats
    """(L, F) R^2 of each rotary pair."""
    low: Floats
    """(L,) R^2 over pairs with wavelengths above the text's length; NaN without such."""
    low_floor: Floats
    tokens: int
    """Length of the text."""


def mix_keys(
    student: Sequence[Keys | None],
    teacher: Sequence[Keys | None],
    other_text: Sequence[Keys | None],
    low: NDArray[np.bool_],
    tokens: int,
) -> Mixing:
    """Closed-form best real mixture of teacher key heads for every student key head, layer by layer.

    minimise ||K_s - sum_g w_g K_t,g||^2 over w on the first half of the tokens (ridge 1e-6 of the trace), judged on
    the second half: what LAid's learned mixture can reach at best (its alignment loss, arXiv 2512.21576).

    Args:
        student: Per layer (G, N, F) complex key pairs; `None` where it does not rotate.
        teacher: Per matched layer (G', N, F), same tokens.
        other_text: The teacher's on another text: the floor.
        low: (L, F) pairs that count as low.
        tokens: N of the text, sinks included.
    """
    pairs = low.shape[1]
    found = [_residual(s, t, pairs) for s, t in zip(student, teacher, strict=True)]
    floors = [_residual(s, t, pairs) for s, t in zip(student, other_text, strict=True)]
    return Mixing(
        by_layer=np.array([_explained(*x) for x in found]),
        floor=np.array([_explained(*x) for x in floors]),
        by_pair=np.array([1 - left / np.maximum(whole, 1e-30) for left, whole in found]),
        low=np.array([_explained(left[k], whole[k]) for (left, whole), k in zip(found, low, strict=True)]),
        low_floor=np.array([_explained(left[k], whole[k]) for (left, whole), k in zip(floors, low, strict=True)]),
        tokens=tokens,
    )


def _explained(left: Floats, whole: Floats) -> float:
    if not len(whole) or np.isnan(whole).all():
        return float("nan")
    return float(1 - np.nansum(left) / max(np.nansum(whole), 1e-30))


def mixture(student: NDArray[np.complex128], teacher: NDArray[np.complex128]) -> Floats:
    """(G, G') weights of the least-squares mixture of teacher key heads (G', N, F) for student heads (G, N, F)."""
    gram = np.einsum("gnf,hnf->gh", teacher.conj(), teacher).real
    right = np.einsum("gnf,hnf->gh", teacher.conj(), student).real
    ridge = 1e-6 * np.trace(gram) / len(gram)
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(len(gram)), right).T)


def _residual(student: Keys | None, teacher: Keys | None, pairs: int) -> tuple[Floats, Floats]:
    """(F,) energy left unexplained, and the whole, on the second half of the tokens; NaN without keys."""
    if student is None or teacher is None:
        return np.full(pairs, np.nan), np.full(pairs, np.nan)
    half = student.shape[1] // 2
    weights = mixture(student[:, :half], teacher[:, :half])
    left = student[:, half:] - np.einsum("gh,hnf->gnf", weights, teacher[:, half:])
    fill = np.full(pairs - student.shape[-1], np.nan)
    energies = ((np.abs(x) ** 2).sum(axis=(0, 1)) for x in (left, student[:, half:]))
    unexplained, whole = (np.concatenate([x, fill]) for x in energies)
    return unexplained, whole
