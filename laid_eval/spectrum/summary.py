"""From arrays to numbers: metrics, bands of wavelengths, coverage, one row a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from laid_eval.spectra import Band, Coverage, Estimate, HeadScore, Metric
from laid_eval.spectrum.coverage import coverage_class, discrimination_horizon, low_band
from laid_eval.spectrum.distance import octave_edges
from laid_eval.spectrum.fourier import normalised
from laid_eval.spectrum.intervals import mean_there, text_interval
from laid_eval.spectrum.layout import BANDS, far_bins, far_distance, stationary_width

if TYPE_CHECKING:
    from laid_eval.models.rotary import Rotary

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

LOCAL = 64
"""Tokens: mass nearer than this is local."""
KINDS = {"sink": 0.5, "local": 0.8, "positional": 0.5, "global": 0.3, "retrieval": 0.1}
"""A head is of a kind from this score on; a head may be of several kinds. 0.1 for retrieval: Wu et al. 2024."""
CONTENT_FREE = 0.05
"""A positional head's profile moves less than this (nats, Jensen-Shannon) when the words are shuffled."""
_USEFUL = 1e-3  # nats of rotation utility
_TOP = 5


def outside_sinks(arrays: Arrays) -> Floats:
    """(T, L, H, O) octave masses as shares of what lies outside sinks."""
    return normalised(arrays["octave"])


def usage_share(arrays: Arrays) -> Floats:
    """(T, L, H, F) share of each pair in its head's usage."""
    usage = arrays["usage"].astype(np.float64)
    total = np.nansum(usage, axis=-1, keepdims=True)
    return np.asarray(usage / np.where(total > 0, total, np.nan))


def wavelengths(arrays: Arrays) -> Floats:
    """(L, F) tokens per turn; infinite where a pair does not turn, NaN where there is none."""
    with np.errstate(divide="ignore"):
        return np.asarray(2 * np.pi / arrays["theta"])


def metrics(arrays: Arrays, length: int, confidence: float, reach: int | None = None) -> tuple[Metric, ...]:
    """Means over layers and heads (medians for distances), with intervals over texts.

    Args:
        arrays: Of the run.
        length: N, tokens.
        confidence: Of the intervals.
        reach: RoPE positions of the text where those are not tokens (pictures).
    """
    octave, far, near = outside_sinks(arrays), far_distance(length, 4), 4 / stationary_width(length)
    far_mass = octave[..., far_bins(length, 4)].sum(-1)
    low = f"spectral power of the distance profile at 0 < nu <= {near:.2g} cycles/token (boxcar taper); mean over heads"
    found = [
        ("sink_mass", _mean(arrays["sink"]), "share", "attention on the first 4 tokens; mean over heads"),
        ("attention_entropy", _mean(arrays["entropy"]), "nats", "entropy of an attention row; mean over heads"),
        ("d50", _median(arrays["d50"]), "tokens", "distance that holds half of the mass outside sinks; median head"),
        ("d90", _median(arrays["d90"]), "tokens", "the same for 90% of the mass; unknown beyond half the text"),
        ("far_mass", _mean(far_mass), "share", f"mass outside sinks at {far:,} tokens or more; mean over heads"),
        ("low_frequency_ratio", _mean(arrays["low_ratio"]), "share", low),
        ("low_frequency_ratio_64", _mean(arrays["low_ratio_64"]), "share", "the same at 0 < nu <= 1/64 cycles/token"),
        (
            "spectral_centroid",
            np.exp(_mean(np.log(arrays["centroid"]))),
            "cycles/token",
            "geometric mean frequency of that power; geometric mean over heads",
        ),
        ("spectral_entropy", _mean(arrays["spectral_entropy"]), "nats", "entropy of that power over frequency"),
        (
            "half_power_frequency",
            _median(arrays["half_power"]),
            "cycles/token",
            "where |H|^2 falls to 1/2; median head",
        ),
        ("log_distance", _mean(arrays["log_distance"]), "octaves", "mean of log2(1 + distance); mean over heads"),
    ]
    out = tuple(metric(*one, confidence) for one in found)
    return out + usage_metrics(arrays, length, confidence, reach) if "usage" in arrays else out


def usage_metrics(arrays: Arrays, length: int, confidence: float, reach: int | None = None) -> tuple[Metric, ...]:
    """What the usage of the rotary pairs says, means over rotating layers and heads; arguments as for `metrics`."""
    turned, unit = (length, "tokens") if reach is None else (reach, "positions")
    turning = ~np.isnan(arrays["theta"]).all(axis=1)
    share = usage_share(arrays)[:, turning]
    entropy = -pair_sum(share * np.log(np.where(share > 0, share, 1)))
    low = pair_sum(np.where(_low(arrays, turned)[None, turning, None], share, share * 0))
    found = [
        ("effective_pairs", _mean(np.exp(entropy)), "pairs", "exp of the entropy of usage over pairs; mean over heads"),
        ("low_pairs_usage", _mean(low), "share", f"usage of pairs that turn less than once in {turned:,} {unit}"),
    ]
    if "concentration" in arrays:
        definition = "|mean| over mean length of the un-rotated query pair: 1 is content-free"
        found.append(("phase_concentration", _mean(arrays["concentration"]), "0..1", definition))
        found.append(
            ("key_phase_concentration", _mean(arrays["key_concentration"]), "0..1", "the same of the key pair")
        )
    dominant = _dominant(arrays["theta"][turning], share)
    if dominant is not None:
        definition = "wavelength of the pair with the highest usage, mean over layers and heads"
        found.append(("dominant_wavelength", dominant, unit, definition))
    return tuple(metric(*one, confidence) for one in found)


def bands(arrays: Arrays, confidence: float) -> tuple[Band, ...]:
    """Usage, contribution and utility by range of wavelengths."""
    if "usage" not in arrays:
        return ()
    wavelength, share = wavelengths(arrays), usage_share(arrays)
    out = []
    for b, (low, high) in enumerate(pairwise(BANDS)):
        inside = (wavelength >= low) & (wavelength < high)
        if inside.any():
            band = _band(arrays, share, inside, confidence, low, None if np.isinf(high) else high)
            out.append(_with_utility(band, arrays, inside, b, confidence) if "utility" in arrays else band)
    if np.isinf(wavelength).any():
        out.append(_band(arrays, share, np.isinf(wavelength), confidence, None, None))
    return tuple(out)


def _band(
    arrays: Arrays,
    share: Floats,
    inside: NDArray[np.bool_],
    confidence: float,
    low: float | None,
    high: float | None,
) -> Band:
    """The pairs `inside` (L, F), over all layers that rotate; `share` from `usage_share`."""
    turning = ~np.isnan(arrays["theta"]).all(axis=1)
    share = share[:, turning]
    pick = inside[None, turning, None]
    pairs = (~np.isnan(arrays["theta"][turning])).sum(axis=1)
    usage = _mean(pair_sum(np.where(pick, share, share * 0)))
    return Band(
        low=low,
        high=high,
        pairs=float(inside[turning].sum(axis=1).mean()),
        even=float((inside[turning].sum(axis=1) / pairs).mean()),
        usage=estimate(usage, confidence, 0.0, 1.0),
    )


def _with_utility(band: Band, arrays: Arrays, inside: NDArray[np.bool_], b: int, confidence: float) -> Band:
    """The band with contribution and utility, means over the layers that have pairs in it."""
    have = inside.any(axis=1)
    part = arrays["contribution"][:, have]
    contribution = pair_sum(np.where(inside[None, have, None], part, part * 0))
    utility = _mean(arrays["utility"][:, have, :, b])
    measured = {
        "contribution": estimate(_mean(contribution), confidence),
        "utility": estimate(utility, confidence, 0.0),
        "kind": band_kind(band.usage.value or 0.0, band.even, float(utility.mean())),
    }
    return band.model_copy(update=measured)


def pair_sum(x: NDArray[Any]) -> Floats:
    """Sum over pairs; NaN for a head that is not there."""
    return np.where(np.isnan(x).all(axis=-1), np.nan, np.nansum(x, axis=-1))


def band_kind(usage: float, even: float, utility: float) -> Literal["positional", "semantic", "unused", "weak"]:
    """What a band is for.

    `positional`: unrotating it changes attention (1e-3 nats or more); `semantic`: used (half its even share or more),
    but as if it did not turn; `unused`: less than a tenth of its even share; `weak`: between.
    """
    if utility >= _USEFUL:
        return "positional"
    if usage >= even / 2:
        return "semantic"
    return "unused" if usage < even / 10 else "weak"


def coverage(rotary: Sequence[Rotary | None], arrays: Arrays, length: int, claimed: int | None) -> tuple[Coverage, ...]:
    """How far pairs turn, one entry for all layers that share their frequencies."""
    groups: list[tuple[Rotary, list[int]]] = []
    for layer, own in enumerate(rotary):
        if own is None:
            continue
        for first, layers in groups:
            if own.same(first):
                layers.append(layer)
                break
        else:
            groups.append((own, [layer]))
    row = {int(layer): i for i, layer in enumerate(arrays["layers"])}
    out = []
    for first, layers in groups:
        kinds = coverage_class(first.theta, length)
        finite = first.wavelength[np.isfinite(first.wavelength)]
        rows = [row[layer] for layer in layers if layer in row]
        weights = np.nanmean(usage_share(arrays)[:, rows], axis=(0, 1, 2))[: len(first.theta)]
        out.append(
            Coverage(
                layers=tuple(layers),
                pairs=len(first.theta),
                factor=first.factor,
                shortest=float(finite.min()) if len(finite) else None,
                longest=float(finite.max()) if len(finite) else None,
                axes="".join(first.axis) if first.axis else None,
                trained=int((coverage_class(first.theta, claimed) == "full").sum()) if claimed else None,
                full=int((kinds == "full").sum()),
                partial=int((kinds == "partial").sum()),
                quasi_dc=int((kinds == "quasi-dc").sum()),
                none=int((kinds == "none").sum()),
                horizon=discrimination_horizon(first.theta),
                horizon_by_usage=discrimination_horizon(first.theta, weights),
            )
        )
    return tuple(out)


def head_table(
    arrays: Arrays, length: int, confidence: float, retrieval: Floats | None, content: Floats | None
) -> pd.DataFrame:
    """One row a head: scores (sink, local, positional, global, retrieval), distances, and their intervals.

    Args:
        arrays: Of the run.
        length: N, tokens.
        confidence: Of the intervals over texts.
        retrieval: (L, H) copy scores on needle questions, or `None`.
        content: (L, H) divergence of the profile between a text and its shuffled tokens, nats, or `None`.
    """
    octave, profile = outside_sinks(arrays), arrays["profile"].astype(np.float64)
    layers, heads = profile.shape[:2]
    local_bins = slice(0, int(np.searchsorted(octave_edges(stationary_width(length)), LOCAL)))
    scores: dict[str, Floats] = {
        "sink": arrays["sink"] + arrays["learned_sink"],
        "local": octave[..., local_bins].sum(-1),
        "global": octave[..., far_bins(length, 4)].sum(-1),
        "d50": arrays["d50"],
        "d90": arrays["d90"],
        "entropy": arrays["entropy"],
        "low_frequency_ratio": arrays["low_ratio"],
        "centroid": arrays["centroid"],
    }
    table: dict[str, Any] = {
        "layer": np.repeat(arrays["layers"], heads),
        "head": np.tile(np.arange(heads), layers),
    }
    for name, values in scores.items():
        interval = text_interval(np.where(np.isfinite(values), values, np.nan), confidence)
        every = np.isfinite(values).all(axis=0)  # a distance beyond half the text in some text is unknown
        table[name] = np.where(every, interval.mean, np.nan).ravel()
        most = 1.0 if name in ("sink", "local", "global", "low_frequency_ratio") else np.inf
        table[f"{name}_low"] = np.where(every, np.clip(interval.low, 0, None), np.nan).ravel()
        table[f"{name}_high"] = np.where(every, np.clip(interval.high, None, most), np.nan).ravel()
    inside = 1 - np.mean(arrays["sink"] + arrays["learned_sink"], axis=0, dtype=np.float64)
    table["positional"] = (profile[..., :9].max(-1) / np.maximum(inside, 1e-12)).ravel()
    if content is not None:
        table["content_shift"] = content.ravel()
    if retrieval is not None:
        table["retrieval"] = retrieval.ravel()
    frame = pd.DataFrame(table)
    frame = frame[~np.isnan(profile[..., 0]).ravel()]
    frame["kinds"] = [" ".join(_kinds(row)) for _, row in frame.iterrows()]
    return frame


def top_heads(table: pd.DataFrame, kinds: Iterable[str] = KINDS) -> dict[str, tuple[HeadScore, ...]]:
    """The five highest scores of each kind (column)."""
    out = {}
    for kind in kinds:
        if kind in table:
            best = table.nlargest(_TOP, kind)
            out[kind] = tuple(
                HeadScore(layer=int(r["layer"]), head=int(r["head"]), score=round(float(r[kind]), 4))
                for _, r in best.iterrows()
            )
    return out


def _kinds(row: pd.Series[Any]) -> list[str]:
    found = [kind for kind, least in KINDS.items() if kind in row and row[kind] >= least]
    if "positional" in found and not row.get("content_shift", 1.0) < CONTENT_FREE:
        found.remove("positional")
    return found


def metric(name: str, per_text: NDArray[Any], unit: str, definition: str, confidence: float) -> Metric:
    """A number from one value a text; unit and definition as they are shown."""
    most = 1.0 if unit in ("share", "0..1") else np.inf
    found = estimate(per_text, confidence, 0.0, most)
    return Metric(name=name, unit=unit, definition=definition, **found.model_dump())


def _mean(x: NDArray[Any]) -> Floats:
    return mean_there(x.reshape(len(x), -1), 1)


def _median(x: NDArray[Any]) -> Floats:
    rows = x.reshape(len(x), -1)
    return np.array([np.nan if np.isnan(row).all() else np.nanmedian(row) for row in rows])


def _dominant(theta: Floats, share: Floats) -> Floats | None:
    """(T,) wavelength of the most used pair; `None` where layers differ in their frequencies."""
    if not np.allclose(theta, theta[0], rtol=1e-5, equal_nan=True):
        return None
    best = np.nanargmax(np.nanmean(share, axis=(1, 2)), axis=-1)
    return np.asarray(2 * np.pi / theta[0][best]) if (theta[0][best] > 0).all() else None


def _low(arrays: Arrays, length: int) -> NDArray[np.bool_]:
    """(L, F) pairs that turn, but less than once in `length` tokens."""
    return low_band(np.nan_to_num(arrays["theta"]), length)


def estimate(per_text: NDArray[Any], confidence: float, least: float = -np.inf, most: float = np.inf) -> Estimate:
    """Mean and interval, the latter within what is possible; unknown where a text's value is (a distance beyond W)."""
    if not np.isfinite(per_text).all():
        return Estimate(value=None)
    interval = text_interval(per_text, confidence)
    low, high = np.clip([interval.low, interval.high], least, most)
    ends = [float(x) if np.isfinite(x) else None for x in (low, high)]
    return Estimate(value=float(interval.mean), low=ends[0], high=ends[1])
