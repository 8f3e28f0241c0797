"""From arrays to numbers where pictures were shown: rotary pairs by axis, attention by type of token and by picture."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from laid_eval.spectra import AxisShare, Metric, PositionAudit, TypeMass
from laid_eval.spectrum.fourier import normalised
from laid_eval.spectrum.layout import far_distance
from laid_eval.spectrum.summary import estimate, metric, pair_sum, usage_share, wavelengths

if TYPE_CHECKING:
    from laid_eval.models.rotary import Rotary

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
AXES = ("t", "h", "w", "text", "none")
_TYPES: tuple[Literal["text", "image"], ...] = ("text", "image")


def axis_names(rotary: Sequence[Rotary | None], layers: Sequence[int], pairs: int) -> NDArray[np.str_]:
    """(L, F) position axis of every pair; empty where there is no pair."""
    names = np.full((len(layers), pairs), "", dtype="<U4")
    for row, layer in zip(names, layers, strict=True):
        own = rotary[layer]
        if own is not None:
            f = len(own.theta)
            row[:f] = own.axis or ["text"] * f
            row[:f][own.theta == 0] = "none"
    return names


def axis_usage(arrays: Arrays) -> tuple[tuple[str, ...], Floats]:
    """The axes there are, and (T, L, H, X) share of each in its head's usage."""
    found = tuple(axis for axis in AXES if (arrays["axis"] == axis).any())
    share = usage_share(arrays)
    parts = [_of_axis(share, arrays["axis"] == axis) for axis in found]
    return found, np.stack(parts, axis=-1)


def axis_shares(arrays: Arrays, confidence: float) -> tuple[AxisShare, ...]:
    """Usage and contribution by axis, means over rotating layers and heads."""
    if "usage" not in arrays:
        return ()
    turning = (arrays["axis"] != "").any(axis=1)
    wavelength = wavelengths(arrays)
    found, usage = axis_usage(arrays)
    out = []
    for k, axis in enumerate(found):
        own = arrays["axis"] == axis
        pairs, every = own[turning].sum(axis=1), (arrays["axis"][turning] != "").sum(axis=1)
        finite = wavelength[own & np.isfinite(wavelength)]
        contribution = _of_axis(arrays["contribution"].astype(np.float64), own)[:, turning]
        out.append(
            AxisShare(
                axis=axis,
                pairs=float(pairs.mean()),
                even=float((pairs / every).mean()),
                shortest=float(finite.min()) if len(finite) else None,
                longest=float(finite.max()) if len(finite) else None,
                usage=estimate(_per_text(usage[..., k][:, turning]), confidence, 0.0, 1.0),
                contribution=estimate(_per_text(contribution), confidence),
            )
        )
    return tuple(out)


def type_masses(arrays: Arrays, confidence: float) -> tuple[TypeMass, ...]:
    """Attention by type of query and key beside the share of the keys."""
    mass = normalised(_sum_over_heads(arrays["type_mass"]))  # (T, 2, 2), over keys
    share = np.nanmean(arrays["type_share"].astype(np.float64), axis=1)
    out = []
    for q, query in enumerate(_TYPES):
        for k, key in enumerate(_TYPES):
            own, there = mass[:, q, k], share[:, q, k]
            ratio = own / np.where(there > 0, there, np.nan)
            out.append(
                TypeMass(
                    query=query,
                    key=key,
                    mass=estimate(own, confidence, 0.0, 1.0),
                    share=estimate(there, confidence, 0.0, 1.0),
                    ratio=estimate(ratio, confidence, 0.0),
                )
            )
    return tuple(out)


def needle_share(arrays: Arrays) -> tuple[Floats, Floats]:
    """(T, L, H, 2) mass on the needle's picture and on all pictures; (T,) share of its tokens in those of all.

    Of the last tokens of the question.
    """
    mass, share = arrays["image_mass"].astype(np.float64), np.nanmean(arrays["image_share"], axis=1, dtype=np.float64)
    at = arrays["needle"].astype(np.int64)
    own = np.take_along_axis(mass, at[:, None, None, None], axis=-1)
    tokens = np.take_along_axis(share, at[:, None], axis=-1)[:, 0]
    return np.concatenate([own, mass.sum(-1, keepdims=True)], axis=-1), tokens / share.sum(-1)


def picture_metrics(arrays: Arrays, length: int, confidence: float) -> tuple[Metric, ...]:
    """Far attention by type of query, attention on pictures and on the needle's; over all layers and heads."""
    far = far_distance(length, 4)
    outside = _sum_over_heads(arrays["type_mass"]).sum(-1)  # (T, 2)
    distant = _sum_over_heads(arrays["type_far"]) / outside
    masses, expected = needle_share(arrays)
    needle, all_pictures = np.moveaxis(np.nansum(masses, axis=(1, 2)), -1, 0)
    found = needle / all_pictures
    who = "the question's last 4 tokens"
    rows = [
        ("text_far_mass", distant[:, 0], "share", f"mass outside sinks at {far:,} tokens or more, text queries"),
        ("image_far_mass", distant[:, 1], "share", "the same, picture queries"),
        ("question_image_mass", np.nanmean(masses[..., 1], axis=(1, 2)), "share", f"attention of {who} on pictures"),
        ("needle_mass", found, "share", f"of the attention of {who} on pictures, what falls on the needle's picture"),
        ("needle_share", expected, "share", "the needle's picture's share of all pictures' tokens"),
        ("needle_ratio", found / expected, "ratio", "needle_mass over needle_share: 1 is a picture like any other"),
    ]
    out = [metric(*row, confidence) for row in rows]
    if arrays["ahead"].any():
        ahead = np.nanmean(arrays["ahead"].astype(np.float64), axis=(1, 2))
        out.append(metric("ahead_mass", ahead, "share", "attention on later tokens of the same picture", confidence))
    return tuple(out)


def with_needles(table: pd.DataFrame, arrays: Arrays) -> pd.DataFrame:
    """The table of heads with their attention on pictures, and what of it falls on the needle's (means over haystacks).

    Columns: image_mass, attention of the question's last tokens on pictures; needle, the needle's part of it; null
    where a head looks at no picture (1e-6 and less).
    """
    masses, _ = needle_share(arrays)
    own, every = np.moveaxis(masses.mean(axis=0), -1, 0)
    needle = np.where(every > 1e-6, own / np.maximum(every, 1e-6), np.nan)
    rows = table.index.to_numpy()  # of the whole grid of layers and heads
    return table.assign(image_mass=every.ravel()[rows], needle=needle.ravel()[rows])


def audit(
    positions: Sequence[NDArray[np.int64]], spans: NDArray[np.int64], library: str | None, counted: bool
) -> PositionAudit:
    """What the positions of all prompts (axes, N) say; `spans` (I, 2) are the same in all."""
    first = positions[0]
    line = first.max(axis=0)
    before = np.concatenate([[-1], np.maximum.accumulate(line)[:-1]])  # the largest position so far
    text = np.ones(first.shape[1], dtype=bool)
    for start, end in spans:
        text[start + 1 : end] = False
    least = first.min(axis=0)
    steps = [int(least[end] - least[start]) for start, end in spans]
    digest = hashlib.sha256()
    for one in positions:
        digest.update(np.ascontiguousarray(one, dtype=np.int64).tobytes())
    return PositionAudit(
        counted="get_rope_index" if counted else "slots",
        axes=len(first),
        tokens=first.shape[1],
        positions=int(first.max()) + 1,
        positions_per_token=round((int(first.max()) + 1) / first.shape[1], 4),
        picture_tokens=int(spans[0, 1] - spans[0, 0]),
        picture_steps=tuple(sorted(set(steps))),
        monotone=bool((least[text] > before[text]).all()),
        hash=digest.hexdigest()[:16],
        transformers=library,
    )


def _of_axis(x: Floats, own: NDArray[np.bool_]) -> Floats:
    """(T, L, H) sum over the pairs of one axis (L, F); NaN for a head without pairs."""
    return pair_sum(np.where(own[None, :, None], x, x * 0))


def _per_text(x: Floats) -> Floats:
    return np.asarray(np.nanmean(x.reshape(len(x), -1), axis=1))


def _sum_over_heads(x: NDArray[Any]) -> Floats:
    return np.asarray(np.nansum(x.astype(np.float64), axis=(1, 2)))
