"""Spectrum runs: what is stored of one, and reading it back. Needs no torch.

A run folder holds `run.json` (a `SpectrumRun`), `spectra.npz` (arrays; see `ARRAYS`), `heads.csv` (one row a head) and
figures. Unknown is `None` in records and tables; in arrays NaN fills what a layer or head does not have.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from laid_eval.errors import UserError
from laid_eval.records import SCHEMA_VERSION, ModelInfo, Record, Status
from laid_eval.runs import HEADER, read_header, validated, write_atomically

SPECTRA = "spectra.npz"
HEADS = "heads.csv"
COMPARISON = "comparison.npz"
UNREADABLE = (OSError, EOFError, ValueError, KeyError, BadZipFile, ZlibError)

ARRAYS = {
    "layers": "(L,) number of each layer that has attention",
    "theta": "(L, F) rotary frequencies, rad/token",
    "scale": "(L,) what the products of queries and keys are multiplied by",
    "distances": "(M,) tokens, log grid",
    "frequencies": "(K,) cycles/token, log grid",
    "octave": "(T, L, H, O) attention mass at distance 0, [1, 2), [2, 4), ... tokens and, last, beyond half the text",
    "sink": "(T, L, H) attention mass on the first tokens",
    "learned_sink": "(T, L, H) attention mass on learned sink logits",
    "entropy": "(T, L, H) entropy of attention rows over tokens, mass on learned sinks left out, nats",
    "power": "(T, L, H, K) |H|^2 at `frequencies`, transfer function of the distance profile (two half samples)",
    "d50": "(T, L, H) distance within which half of the mass outside sinks lies, tokens",
    "d90": "(T, L, H) the same for 90%",
    "log_distance": "(T, L, H) mean of log2(1 + distance) within half the text, octaves",
    "half_power": "(T, L, H) first frequency at which |H|^2 falls to 1/2 (nu_3dB), cycles/token; inf: it never does",
    "low_ratio": "(T, L, H) share of spectral power (two half samples, boxcar taper) at 0 < nu <= 4/W cycles/token",
    "low_ratio_64": "(T, L, H) the same at 0 < nu <= 1/64 cycles/token",
    "centroid": "(T, L, H) geometric mean frequency of the spectral power, cycles/token",
    "spectral_entropy": "(T, L, H) entropy of the spectral power over frequency, nats",
    "usage": "(T, L, H, F) mean |q| times mean |k| of each rotary pair, logit units (nats)",
    "concentration": "(T, L, H, F) |mean| over mean length of the un-rotated query pair, 0..1",
    "key_concentration": "(T, L, H, F) the same of the key pair",
    "contribution": "(T, L, H, F) mean logit of a pair under attention minus under even weights, nats",
    "utility": "(T, L, H, B) KL divergence to the attention with a band unrotated, nats",
    "profile": "(L, H, W) attention mass by distance, mean over texts",
    "logit": "(L, H, W) mean logit of the rotary pairs by distance, before softcap and mask, nats, first text",
    "moment": "(L, H, F, M, 2) un-rotated mean query x conjugate key at `distances`, nats, first text",
    "rms": "(L, H, F, M) root mean square logit of each pair at `distances`, nats, first text",
}
"""T texts, L layers, H heads, F pairs, W = half the text, M distances, K frequencies, O octaves, B bands."""


PICTURE_ARRAYS = {
    "axis": "(L, F) position axis that turns each pair: t, h, w; text where there is but one; none: it does not turn",
    "positions": "(A, N) RoPE positions of the first prompt",
    "spans": "(I, 2) tokens at which each picture of a prompt begins and ends",
    "needle": "(T,) number of the picture that the question asks about",
    "ahead": "(T, L, H) attention mass on later tokens (of the same picture, where a model lets them be seen)",
    "type_mass": "(T, L, H, 2, 2) mass from text and picture queries on text and picture keys, sinks left out",
    "type_sink": "(T, L, H, 2) mass from text and picture queries on the first tokens",
    "type_far": "(T, L, H, 2) mass from text and picture queries on keys a quarter of the prompt away or more",
    "type_share": "(T, L, 2, 2) share of text and picture among the keys these queries see, sinks left out",
    "image_mass": "(T, L, H, I) mass from the last tokens of the question on each picture",
    "image_share": "(T, L, I) share of each picture among the keys these see, sinks left out",
    "position_octave": "(T, L, H, A, P) mass outside sinks by distance in positions along each axis: 0, [1, 2), "
    "[2, 4), ... behind and, last, ahead",
}
"""What runs on pictures hold beside `ARRAYS`, whose kernels (logit, moment, rms) they lack. I pictures, A axes."""


class Estimate(Record):
    """A mean over texts with its interval."""

    value: float | None
    low: float | None = None
    """`None` where there is one text only."""
    high: float | None = None

    def __str__(self) -> str:
        """`0.412 [0.398, 0.426]`."""
        if self.value is None:
            return "unknown"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


class Metric(Estimate):
    """One number of a run, with its unit and its definition."""

    name: str
    unit: str
    definition: str


class Band(Record):
    """Rotary pairs of one range of wavelengths, over all rotating layers and heads."""

    low: float | None
    """Shortest wavelength, tokens; `None`: pairs that do not turn."""
    high: float | None
    """Longest wavelength (exclusive), tokens; `None`: no end."""
    pairs: float
    """Pairs of a layer that lie in it, mean over layers."""
    even: float
    """Share of all pairs: the usage share if every pair were used alike."""
    usage: Estimate
    """Share of usage (mean |q| times mean |k|)."""
    contribution: Estimate | None = None
    """Sum over its pairs: logit under attention minus under even weights, nats."""
    utility: Estimate | None = None
    """KL divergence to the attention with this band unrotated, nats."""
    knockout: Estimate | None = None
    """Rise of the loss with this band unrotated in every layer, nats/token."""
    knockout_window: str | None = None
    """Effective window with this band unrotated."""
    kind: Literal["positional", "semantic", "unused", "weak"] | None = None
    """By usage and utility; see `laid_eval.spectrum.summary.band_kind`."""


class Coverage(Record):
    """How far the rotary pairs of some layers turn within a length."""

    layers: tuple[int, ...]
    pairs: int
    factor: float
    """Factor on cosine and sine; logits grow by its square."""
    shortest: float | None
    """Wavelength, tokens."""
    longest: float | None
    axes: str | None
    """For M-RoPE: the position axis (t, h, w) of each pair, in order."""
    trained: int | None
    """Pairs with at least one full cycle within the claimed length (the critical pair)."""
    full: int
    """Pairs with at least one full cycle within the measured length."""
    partial: int
    """A quarter to one cycle."""
    quasi_dc: int
    """Less than a quarter."""
    none: int
    """Pairs that do not turn."""
    horizon: int | None
    """First distance, tokens, at which the sum of cosines over all pairs falls below zero; `None`: beyond 2^20."""
    horizon_by_usage: int | None
    """The same, weighted by usage."""


class Compared(Record):
    """Student against teacher under one measure."""

    name: str
    unit: str
    definition: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None
    """The same measure between the student's own odd and even texts: what texts alone do. `None`: fewer than two."""
    p: float | None
    """Permutation p-value over layers (sign flips): one-sided, that they differ by more than the floor; of signed
    measures (shift, gain) two-sided, against zero."""


class WhatIf(Record):
    """The logit kernel predicted under other frequencies, and what a forward pass then showed."""

    scaling: str
    first_layer_error: float
    """Relative RMS error of the predicted mean logit in the first rotating layer, where the prediction is exact."""
    agreement: float | None
    """Share of the variance (over layers, heads, distances) of the measured change that the prediction explains;
    `None` where nothing changed."""
    change: float
    """RMS of the measured change of the mean logit, nats."""


class HeadScore(Record):
    """A head and a score."""

    layer: int
    head: int
    score: float


class AxisShare(Record):
    """Rotary pairs of one position axis, over all rotating layers and heads."""

    axis: str
    """t, h, w; `text` where there is but one axis; `none`: pairs that do not turn."""
    pairs: float
    """Pairs of a layer, mean over layers."""
    even: float
    """Share of all pairs."""
    shortest: float | None
    """Wavelength, positions."""
    longest: float | None
    usage: Estimate
    """Share of usage (mean |q| times mean |k|)."""
    contribution: Estimate
    """Sum over its pairs: logit under attention minus under even weights, nats."""


class TypeMass(Record):
    """Attention from queries of one type on keys of one type, all layers and heads, sinks left out."""

    query: Literal["text", "image"]
    key: Literal["text", "image"]
    mass: Estimate
    """Share of the attention outside sinks."""
    share: Estimate
    """Share of the keys that are visible."""
    ratio: Estimate
    """Mass over share: 1 is attention that does not mind the type."""


class PositionAudit(Record):
    """How the model counts positions, checked against its own `get_rope_index` prompt by prompt."""

    counted: Literal["get_rope_index", "slots"]
    axes: int
    tokens: int
    """Of the first prompt."""
    positions: int
    positions_per_token: float
    picture_tokens: int
    """Tokens of each picture, the markers around it included."""
    picture_steps: tuple[int, ...]
    """Positions that the pictures take, each number once: what follows stands so many further."""
    monotone: bool
    """Every text token, and every picture with its first token, stands beyond all before it."""
    hash: str
    """SHA-256 of the positions of all prompts (int64, axes by tokens), 16 digits."""
    transformers: str | None
    """Version of the library: positions have changed between versions."""


class PictureFindings(Record):
    """What a spectrum on haystacks of pictures says beside that on text."""

    axes: tuple[AxisShare, ...]
    types: tuple[TypeMass, ...]
    audit: PositionAudit


class PictureSettings(Record):
    """What the haystacks of pictures are."""

    images: int
    """Pictures of a haystack."""
    size: int
    """Side of a picture, pixels."""
    probe: str
    probe_hash: str


class SpectrumSettings(Record):
    """What decides which texts and rows are looked at."""

    length: int
    """Tokens; of the shortest prompt where pictures are shown."""
    texts: int
    """0: only the weights were read."""
    queries: int
    haystack: str | None
    haystack_hash: str | None
    confidence: float
    seed: int
    knockout: Literal["no", "loss", "window"]
    what_if: tuple[str, ...]
    pictures: PictureSettings | None = None
    """`None`: text was read."""


class SpectrumCost(Record):
    """What the measurement took."""

    tokens: int = 0
    """Tokens through the model, all passes."""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None


class SpectrumRun(Record):
    """The header of a spectrum's run folder, `run.json`."""

    schema_version: int = SCHEMA_VERSION
    command: Literal["spectrum"] = "spectrum"
    created: str
    status: Status
    model: ModelInfo
    settings: SpectrumSettings
    environment: dict[str, str | None]
    checks: dict[str, float] = Field(default_factory=dict)
    """Residuals that show the measurement can be trusted; see the README."""
    coverage: tuple[Coverage, ...] = ()
    metrics: tuple[Metric, ...] = ()
    bands: tuple[Band, ...] = ()
    knockout_baseline: str | None = None
    """Effective window with nothing unrotated, measured the way `Band.knockout_window` is."""
    top_heads: dict[str, tuple[HeadScore, ...]] = Field(default_factory=dict)
    """Highest scores of each kind; all are in `heads.csv`."""
    pictures: PictureFindings | None = None
    """`None`: text was read."""
    teacher: ModelInfo | None = None
    comparison: tuple[Compared, ...] = ()
    what_if: tuple[WhatIf, ...] = ()
    cost: SpectrumCost = SpectrumCost()
    notes: tuple[str, ...] = ()

    def metric(self, name: str) -> Metric:
        """A metric by name.

        Raises:
            UserError: The run holds no such metric.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise UserError(f"The run holds no metric {name!r}; it holds: {', '.join(m.name for m in self.metrics)}.")


@dataclass(frozen=True)
class LoadedSpectrum:
    """A spectrum run read back."""

    path: Path
    header: SpectrumRun

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of `ARRAYS`; where pictures were shown, those of `PICTURE_ARRAYS` too.

        Raises:
            UserError: They are not there, or damaged.
        """
        return self._read(SPECTRA)

    @property
    def comparison(self) -> dict[str, NDArray[Any]]:
        """Arrays of the comparison with a teacher (gain_db, wavelength, key_r2); none without one.

        Raises:
            UserError: They are damaged.
        """
        return self._read(COMPARISON) if (self.path / COMPARISON).is_file() else {}

    def _read(self, name: str) -> dict[str, NDArray[Any]]:
        try:
            return read_arrays(self.path / name)
        except UNREADABLE as error:
            raise UserError(f"'{self.path / name}' can't be read ({type(error).__name__}); measure again.") from None

    @property
    def heads(self) -> pd.DataFrame:
        """One row a head: scores and distances with their intervals."""
        try:
            return pd.read_csv(self.path / HEADS)
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.path / HEADS}' can't be read ({type(error).__name__}); measure again.") from None


def save_spectrum(folder: Path, run: SpectrumRun) -> None:
    """Write `run.json`."""
    write_atomically(folder / HEADER, run.model_dump_json(indent=1) + "\n")


def save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a compressed `.npz` under another name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a `.npz`; raises one of `UNREADABLE` where it is torn or not there."""
    # a handle of our own: numpy leaves a torn file open
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        return dict(file)


def load_spectrum(path: str | os.PathLike[str]) -> LoadedSpectrum:
    """Read a spectrum's run folder. Needs no torch.

    Raises:
        UserError: Not a spectrum run, damaged, or written by a newer version.
    """
    folder = Path(path)
    document = read_header(folder)
    if document.get("command", "spectrum") != "spectrum":
        raise UserError(f"'{folder}' is a {document['command']} run, not a spectrum; read it with laid_eval.load_run.")
    return LoadedSpectrum(folder, validated(SpectrumRun, document, folder))
