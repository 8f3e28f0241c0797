"""Teacher against student: what of the teacher's reach and of its low frequencies the student keeps.

Layers are matched by relative depth. Beside each number stands its noise floor (the same between the student's own
odd and even texts) and a permutation p-value, whole layers flipped. Each definition is spelled out in
its record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laid_eval.errors import UserError
from laid_eval.spectra import ARRAYS, PICTURE_ARRAYS, Compared, LoadedSpectrum
from laid_eval.spectrum.distance import js_divergence, wasserstein_octaves
from laid_eval.spectrum.fourier import normalised
from laid_eval.spectrum.intervals import mean_there, sign_flip_p, text_interval
from laid_eval.spectrum.layout import BANDS, far_bins, far_distance
from laid_eval.spectrum.mixing import Mixing
from laid_eval.spectrum.picture_summary import AXES, axis_usage
from laid_eval.spectrum.summary import outside_sinks, usage_share, wavelengths

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
_NOTHING = 1e-4  # share of mass or usage, or nats of utility


@dataclass(frozen=True)
class Comparison:
    """Measures, and arrays for a picture."""

    measures: tuple[Compared, ...]
    arrays: Arrays
    """gain_db and wavelength (tokens), (L, F) both, where pairs agree; key_r2 (L, F) where keys were compared."""
    notes: tuple[str, ...]


def compare_spectra(
    student: LoadedSpectrum, teacher: LoadedSpectrum, mixing: Mixing | None = None, seed: int = 0
) -> Comparison:
    """Compare two spectrum runs of the same length.

    Args:
        student: A run.
        teacher: A run.
        mixing: Of both models' keys on one text, from `mix_keys`; `None`: no mixing residual.
        seed: Of the permutations.

    Raises:
        UserError: The runs have other lengths, or one of them read no text.
    """
    length = student.header.settings.length
    if not student.header.settings.texts or not teacher.header.settings.texts:
        raise UserError(
            "A run of the weights alone can't be compared: it read no text. Measure without --weights-only."
        )
    if teacher.header.settings.length != length:
        raise UserError(
            f"The runs can't be compared: the student was measured at {length:,} tokens, the teacher at "
            f"{teacher.header.settings.length:,}. Measure both at one --length."
        )
    confidence = student.header.settings.confidence
    own, other = student.arrays, teacher.arrays
    match = matched_layers(len(own["layers"]), len(other["layers"]))
    other = {name: _at_layers(name, x, match) for name, x in other.items() if name in ARRAYS or name in PICTURE_ARRAYS}
    notes: list[str] = []
    tried = [_compared(m, own, other, confidence, seed) for m in _measures(own, other, length, notes)]
    found = [measure for measure in tried if measure is not None]
    arrays: Arrays = {}
    if _same_pairs(own, other):
        gain = _gain(own, other)
        arrays = {"gain_db": gain, "wavelength": wavelengths(own)}
    if mixing is not None:
        found += _mixing(mixing, seed)
        arrays["key_r2"] = mixing.by_pair
    return Comparison(tuple(found), arrays, tuple(notes))


def matched_layers(student: int, teacher: int) -> NDArray[np.int64]:
    """(student,) the teacher's layer at the same relative depth.

    >>> matched_layers(3, 5).tolist()
    [0, 2, 4]
    """
    return np.round(np.linspace(0, teacher - 1, student)).astype(np.int64)


@dataclass(frozen=True)
class _Measure:
    name: str
    unit: str
    definition: str
    per_layer: Callable[[Arrays, Arrays], Floats]
    """Of two sets of arrays: (T, L) values."""
    perfect: float
    """Its value where both are equal."""
    signed: bool = False


def _measures(own: Arrays, other: Arrays, length: int, notes: list[str]) -> list[_Measure]:
    far = far_distance(length, 8)
    near = 8 / length
    out = [
        _Measure(
            "far_mass_preservation",
            "0..1",
            f"attention outside sinks at {far:,} tokens or more: overlap of student's and teacher's octave masses over "
            "the teacher's mass; mean over layers",
            lambda s, t: _overlap(_layer_mean(outside_sinks(s)), _layer_mean(outside_sinks(t)), far_bins(length, 8)),
            1.0,
        ),
        _Measure(
            "spectral_divergence",
            "nats",
            "Jensen-Shannon divergence between the layer-mean |H|^2, each scaled to sum one over the frequency grid",
            lambda s, t: js_divergence(_layer_mean(s["power"]), _layer_mean(t["power"])),
            0.0,
        ),
        _Measure(
            "frequency_leakage",
            "share",
            f"what the teacher's scaled |H|^2 has more than the student's at nu <= {near:.2g} cycles/token",
            lambda s, t: _leakage(s, t, near),
            0.0,
        ),
    ]
    if "image_mass" in own and "image_mass" in other:
        out.append(
            _Measure(
                "image_mass_overlap",
                "0..1",
                "attention of the question's last tokens by picture, scaled to sum one: the lesser of both models'; "
                "mean over layers",
                lambda s, t: _overlap(_by_picture(s), _by_picture(t), slice(None)),
                1.0,
            )
        )
    if "usage" not in own or "usage" not in other:
        notes.append("one of the models has no rotary pairs: only attention is compared")
        return out
    low = max(edge for edge in BANDS if edge <= max(length / 2, BANDS[1]))
    pick = slice(BANDS.index(low), None)
    out.append(
        _Measure(
            "low_frequency_utility",
            "0..1",
            f"rotation utility of pairs with wavelengths from {low:,.0f} tokens: the lesser of both models' over the "
            "teacher's; mean over layers",
            lambda s, t: _overlap(_layer_mean(s["utility"]), _layer_mean(t["utility"]), pick),
            1.0,
        )
    )
    if "axis" in own and "axis" in other:
        out.append(
            _Measure(
                "axis_usage_overlap",
                "0..1",
                "share of usage by position axis (t, h, w, or one for all): lesser of both models'; mean over layers",
                lambda s, t: _overlap(_by_axis(s), _by_axis(t), slice(None)),
                1.0,
            )
        )
    if not _same_pairs(own, other):
        notes.append("rotary frequencies or head sizes differ: pairs are not compared one by one, only by band")
        out.append(
            _Measure(
                "low_frequency_energy",
                "0..1",
                f"share of usage in pairs with wavelengths from {low:,.0f} tokens: the lesser of both over the "
                "teacher's; mean over layers",
                lambda s, t: _overlap(_low_share(s, low), _low_share(t, low), slice(None)),
                1.0,
            )
        )
        return out
    wavelength = wavelengths(own)
    finite = np.isfinite(wavelength)  # (L, F)
    chosen = finite & (wavelength >= low)
    out += [
        _Measure(
            "low_frequency_energy",
            "0..1",
            f"usage shares of pairs with wavelengths from {low:,.0f} tokens: overlap over the teacher's; mean over "
            "layers",
            lambda s, t: _overlap(_within(s, chosen), _within(t, chosen), slice(None)),
            1.0,
        ),
        _Measure(
            "usage_distance",
            "octaves",
            "Wasserstein-1 distance between usage shares over log2 wavelength; mean over layers",
            lambda s, t: _transport(s, t, wavelength)[0],
            0.0,
        ),
        _Measure(
            "usage_shift",
            "octaves",
            "mean log2 wavelength of usage, student minus teacher: negative is a loss of long wavelengths",
            lambda s, t: _transport(s, t, wavelength)[1],
            0.0,
            signed=True,
        ),
    ]
    if not chosen.any():
        notes.append(f"no rotary pair has a wavelength from {low:,.0f} tokens: nothing of low frequency is compared")
        return out
    out.append(
        _Measure(
            "low_frequency_gain",
            "dB",
            f"10 log10 of student's over teacher's usage of pairs with wavelengths from {low:,.0f} tokens; mean over "
            "layers and pairs",
            lambda s, t: _mean_of(_gain_per_text(s, t), chosen),
            0.0,
            signed=True,
        )
    )
    return out


def _compared(m: _Measure, own: Arrays, other: Arrays, confidence: float, seed: int) -> Compared | None:
    """One measure with interval, floor and p over layers; `None` where no matched layers both have what it needs."""
    texts = min(len(own["sink"]), len(other["sink"]))
    values = m.per_layer(_texts(own, slice(texts)), _texts(other, slice(texts)))  # (T, L)
    there = ~np.isnan(values).all(axis=0)  # layers; one that does not rotate has no pairs
    if not there.any():
        return None
    interval = text_interval(mean_there(values, 1), confidence)
    floor, p = None, None
    if texts >= 2:
        half = texts // 2
        even, odd = _texts(own, slice(0, 2 * half, 2)), _texts(own, slice(1, 2 * half, 2))
        floors = m.per_layer(odd, even)[:, there]
        floor = float(np.nanmean(floors)) if not np.isnan(floors).all() else None
        # signed measures are tested against zero, distances against what texts alone do
        beyond = mean_there(values[:, there], 0) - m.perfect
        if m.signed:
            p = sign_flip_p(beyond, seed)
        else:
            p = _one_sided(np.abs(beyond) - np.abs(mean_there(floors, 0) - m.perfect), seed)
    low, high = (float(x) if np.isfinite(x) else None for x in (interval.low, interval.high))
    return Compared(
        name=m.name,
        unit=m.unit,
        definition=m.definition,
        value=float(interval.mean),
        low=low,
        high=high,
        floor=floor,
        p=p,
    )


def _one_sided(excess: Floats, seed: int) -> float | None:
    """Permutation p-value over layers that the mean excess is above zero."""
    p = sign_flip_p(excess, seed)
    if p is None:
        return None
    return p / 2 if np.nanmean(excess) > 0 else 1.0  # nearer than texts are to each other is no difference


_PER_LAYER = ("layers", "theta", "scale", "profile", "logit", "moment", "rms", "axis")
_GRIDS = ("distances", "frequencies", "positions", "spans")


def _at_layers(name: str, x: NDArray[Any], match: NDArray[np.int64]) -> NDArray[Any]:
    if name in _GRIDS or name == "needle":
        return x
    return x[match] if name in _PER_LAYER else x[:, match]


def _texts(arrays: Arrays, pick: slice) -> Arrays:
    return {name: x if name in (*_PER_LAYER, *_GRIDS) else x[pick] for name, x in arrays.items()}


def _layer_mean(x: NDArray[Any]) -> Floats:
    """(T, L, ...) mean over heads of (T, L, H, ...); NaN where no head has a value (layers that do not rotate)."""
    return mean_there(x, 2)


def _overlap(student: Floats, teacher: Floats, pick: Any) -> Floats:
    """(T, L) sum of the lesser of two (T, L, K) over the sum of the second, within `pick`.

    NaN, so left out of every mean, where the teacher has next to nothing (1e-4): there is nothing to keep.
    """
    whole = teacher[..., pick].sum(-1)
    both = np.minimum(student, teacher)[..., pick].sum(-1)
    return np.where(whole > _NOTHING, both / np.where(whole > _NOTHING, whole, 1.0), np.nan)


def _by_picture(arrays: Arrays) -> Floats:
    """(T, L, I) mean over heads, scaled to sum one."""
    return normalised(_layer_mean(arrays["image_mass"]))


def _by_axis(arrays: Arrays) -> Floats:
    """(T, L, X) share of usage of every axis that there may be, mean over heads."""
    found, usage = axis_usage(arrays)
    mean = np.nan_to_num(_layer_mean(usage))
    return np.stack([mean[..., found.index(a)] if a in found else mean[..., 0] * 0 for a in AXES], axis=-1)


def _leakage(student: Arrays, teacher: Arrays, cut: float) -> Floats:
    low = teacher["frequencies"] <= cut
    own, other = (normalised(_layer_mean(a["power"])) for a in (student, teacher))
    return np.asarray(np.maximum(other - own, 0)[..., low].sum(-1))


def _within(arrays: Arrays, chosen: NDArray[np.bool_]) -> Floats:
    """(T, L, F) mean usage share over heads, 0 outside the chosen pairs (L, F)."""
    return np.where(chosen, np.nan_to_num(_layer_mean(usage_share(arrays))), 0.0)


def _mean_of(x: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """(T, L) mean of (T, L, F) over the chosen pairs of each layer; NaN where there is none."""
    count = chosen.sum(axis=1)
    total = np.where(chosen, np.nan_to_num(x), 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _same_pairs(own: Arrays, other: Arrays) -> bool:
    if "usage" not in own or "usage" not in other:
        return False
    return own["theta"].shape[1] == other["theta"].shape[1] and bool(
        np.allclose(own["theta"], other["theta"], rtol=1e-5, atol=0, equal_nan=True)
    )


def _low_share(arrays: Arrays, low: float) -> Floats:
    """(T, L, 1) mean over heads of the usage share of wavelengths from `low` tokens."""
    wavelength = wavelengths(arrays)
    chosen = np.isfinite(wavelength) & (wavelength >= low)
    return np.asarray(_within(arrays, chosen).sum(axis=-1, keepdims=True))


def _transport(student: Arrays, teacher: Arrays, wavelength: Floats) -> tuple[Floats, Floats]:
    """(T, L) distance and shift of usage over log2 wavelength; NaN for layers that do not rotate."""
    own, other = (_layer_mean(usage_share(a)) for a in (student, teacher))
    moved = np.full((2, *own.shape[:2]), np.nan)
    for layer, row in enumerate(wavelength):
        finite = np.isfinite(row)
        if finite.any():
            found = wasserstein_octaves(own[:, layer, finite], other[:, layer, finite], np.log2(row[finite]))
            moved[:, :, layer] = found.distance, found.shift
    return moved[0], moved[1]


def _gain_per_text(student: Arrays, teacher: Arrays) -> Floats:
    """(T, L, F) dB of usage, mean over heads, student over teacher."""
    own, other = (_layer_mean(a["usage"]) for a in (student, teacher))
    return np.asarray(10 * np.log10(np.maximum(own, 1e-20) / np.maximum(other, 1e-20)))


def _gain(student: Arrays, teacher: Arrays) -> Floats:
    return np.asarray(_gain_per_text(student, teacher).mean(axis=0))


def _mixing(mixing: Mixing, seed: int) -> list[Compared]:
    out = [
        Compared(
            name="key_mixing_r2",
            unit="R^2",
            definition="share of the student's key energy that the best mixture of the matched teacher layer's key "
            "heads gives, on held-out tokens; mean over layers. Floor: the teacher reads another text",
            value=float(np.nanmean(mixing.by_layer)),
            floor=float(np.nanmean(mixing.floor)),
            p=_one_sided(mixing.by_layer - mixing.floor, seed),
        )
    ]
    if not np.isnan(mixing.low).all():
        out.append(
            Compared(
                name="key_mixing_r2_low",
                unit="R^2",
                definition=f"the same over pairs with wavelengths above the {mixing.tokens:,} tokens of the text that "
                "keys are compared on",
                value=float(np.nanmean(mixing.low)),
                floor=float(np.nanmean(mixing.low_floor)),
                p=_one_sided(mixing.low - mixing.low_floor, seed),
            )
        )
    return out
