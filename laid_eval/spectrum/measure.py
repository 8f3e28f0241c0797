"""One model's spectrum into one run folder, a text at a time; goes on where a killed run was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from laid_eval.environment import environment
from laid_eval.errors import UserError
from laid_eval.models.capture import ROWS, check_capture
from laid_eval.models.cost import Shape, free_memory, peak_memory, shape_of
from laid_eval.models.fork import why_not_forked
from laid_eval.models.frame import Frame, frame_of
from laid_eval.models.load import Described, LoadedModel, load
from laid_eval.models.rotary import Rotary, rotaries, unrotated
from laid_eval.records import ModelInfo
from laid_eval.runs import write_atomically
from laid_eval.spectra import (
    HEADS,
    SPECTRA,
    Estimate,
    LoadedSpectrum,
    SpectrumCost,
    SpectrumRun,
    SpectrumSettings,
    WhatIf,
    load_spectrum,
    save_arrays,
    save_spectrum,
)
from laid_eval.spectrum.causes import knockout_losses, rescaled, what_if
from laid_eval.spectrum.collect import Arrays, finish, mass_residual, observe_text
from laid_eval.spectrum.fourier import taper_leakage
from laid_eval.spectrum.heads import content_shift, retrieval_scores
from laid_eval.spectrum.intervals import text_interval
from laid_eval.spectrum.knockout_window import knockout_windows
from laid_eval.spectrum.layout import SINKS, stationary_width
from laid_eval.spectrum.running import PARTS, Clock, Progress, Report, earlier, keeper, observed
from laid_eval.spectrum.summary import bands, coverage, head_table, metrics, top_heads
from laid_eval.spectrum.texts import needles, prose, shuffled
from laid_eval.window.haystack import Corpus
from laid_eval.window.probes import load_probe

LENGTH = 8192
"""Default length, tokens, where the model claims more."""
SHORTEST = 256
"""Tokens: below, half a text holds too few octaves of distance."""
_HEADS_LENGTH = 2048  # of needle texts
_CONTENT_LENGTH = 1024  # of the text that is shuffled
_NEEDLE_TEXTS = 2
_GIB = 1024**3
_SPARE = 16  # rows a table of positions may have beyond the claimed length (OPT: 2)


def measure(
    described: Described, settings: SpectrumSettings, corpus: Corpus, folder: Path, report: Report
) -> LoadedSpectrum:
    """One model, into one folder."""
    before = earlier(folder, described.info, settings)
    if before and before.header.status == "complete":
        return before
    check_memory(described, shape_of(described), settings.length)
    if before is None:
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of no run that is known
    clock = Clock(before.header.cost.seconds if before else 0.0)
    loaded = load(described)
    gap = check_capture(loaded.model)
    rotary = rotaries(loaded.model, settings.length)
    _check_possible(loaded, rotary, settings)
    frame = frame_of(loaded.tokenizer)
    ids, notes = prose(corpus, frame, settings.length, settings.texts, settings.seed)
    run = SpectrumRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="partial",
        model=loaded.info,
        settings=settings,
        environment=environment(),
        notes=(*header_notes(loaded.info, settings.length), *notes),
    )
    keep = keeper(folder, run, clock)

    def observe(k: int, step: Callable[[int], None]) -> Arrays:
        return observe_text(loaded.model, ids[k], rotary, settings.queries, settings.seed + k, k == 0, step)

    parts = observed(len(ids), len(rotary), "text", observe, folder, report, keep)
    arrays = finish(parts, rotary, settings.length)
    run = summarised(run, arrays, rotary, parts, gap)
    table, more = _heads(loaded, arrays, ids, rotary, settings, corpus, frame, folder, report)
    run = _knocked_out(loaded, run, ids, folder, report)
    guesses, kernels = _guesses(loaded.model, ids[0], arrays, rotary, settings, folder, report)
    save_arrays(folder / SPECTRA, arrays | kernels)
    write_atomically(folder / HEADS, table.to_csv(index=False, float_format="%.6g"))
    run = run.model_copy(
        update={
            "status": "complete",
            "top_heads": top_heads(table),
            "what_if": guesses,
            "notes": (*run.notes, *more),
            "cost": SpectrumCost(
                tokens=_tokens(run),
                seconds=clock.seconds,
                peak_memory_bytes=peak_memory(loaded.model.device),
            ),
        }
    )
    save_spectrum(folder, run)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return load_spectrum(folder)


def _tokens(run: SpectrumRun) -> int:
    """Tokens of all passes, knockout windows (runs of their own) left out."""
    settings = run.settings
    passes = settings.texts + len(settings.what_if)
    if settings.knockout != "no":
        passes += settings.texts * (1 + sum(b.knockout is not None for b in run.bands))
    heads = 2 * min(_CONTENT_LENGTH, settings.length) + _NEEDLE_TEXTS * min(_HEADS_LENGTH, settings.length)
    return passes * settings.length + heads


def _check_possible(loaded: LoadedModel, rotary: Sequence[Rotary | None], settings: SpectrumSettings) -> None:
    """Refuse what the model does not allow before anything is measured.

    Raises:
        UserError: Changes of rotary pairs that there aren't or that can't be made, or more tokens than positions.
    """
    model, info = loaded.model, loaded.info
    if any(rotary):
        for scaling in settings.what_if:
            with rescaled(model, scaling):
                pass
        if settings.knockout != "no":
            with unrotated(model, 0.0, float("inf")):
                pass
        return
    asked = "--what-if" if settings.what_if else "--knockout"
    if settings.what_if or settings.knockout != "no":
        raise UserError(f"{asked} needs rotary position embeddings; {info.name!r} has none.")
    longest = info.claimed_length
    if longest is None or settings.length <= longest:
        return
    tables = [m.num_embeddings for m in model.get_decoder().modules() if isinstance(m, torch.nn.Embedding)]
    if any(longest <= rows < longest + _SPARE for rows in tables):
        raise UserError(
            f"{info.name!r} has learned positions for {longest:,} tokens, --length asks for {settings.length:,}. "
            f"Measure at --length {longest}."
        )


def summarised(
    run: SpectrumRun,
    arrays: Arrays,
    rotary: Sequence[Rotary | None],
    parts: list[Arrays],
    gap: float,
    reach: int | None = None,
) -> SpectrumRun:
    """The run with what its arrays say; `reach` as for `metrics`."""
    n, confidence = run.settings.length, run.settings.confidence
    notes = list(run.notes)
    still = [int(i) for i in arrays["layers"] if rotary[i] is None]
    if not any(rotary):
        notes.append("the model has no rotary pairs: only its attention is analysed")
    elif still:
        notes.append(f"layers without rotation: {', '.join(map(str, still))}")
    missing = sorted(set(range(len(rotary))) - set(arrays["layers"].tolist()))
    if missing:
        notes.append(f"layers without attention: {', '.join(map(str, missing))}")
    has_pairs = "usage" in arrays
    return run.model_copy(
        update={
            "checks": {
                "logit_gap": gap,
                "mass_residual": mass_residual(parts),
                "taper_main_lobe_on_bin": taper_leakage("boxcar", stationary_width(n)).on_bin,
                "taper_main_lobe_half_bin": taper_leakage("boxcar", stationary_width(n)).half_bin,
            },
            "metrics": metrics(arrays, n, confidence, reach),
            "bands": bands(arrays, confidence),
            "coverage": coverage(rotary, arrays, reach or n, run.model.claimed_length) if has_pairs else (),
            "notes": tuple(notes),
        }
    )


def _heads(
    loaded: LoadedModel,
    arrays: Arrays,
    ids: Sequence[Sequence[int]],
    rotary: Sequence[Rotary | None],
    settings: SpectrumSettings,
    corpus: Corpus,
    frame: Frame,
    folder: Path,
    report: Report,
) -> tuple[pd.DataFrame, list[str]]:
    """The table of heads, with what needs texts of its own."""
    notes: list[str] = []
    n, seed = settings.length, settings.seed
    report(Progress(folder, "heads: shuffled text", 0, 2))
    text = list(ids[0][: min(_CONTENT_LENGTH, n)])
    content = content_shift(loaded.model, text, shuffled(text, SINKS, seed), len(rotary), seed)
    report(Progress(folder, "heads: needles", 1, 2))
    retrieval = None
    reason = why_not_forked(loaded.model, n)
    if reason:
        notes.append(f"no retrieval scores: {reason}")
    else:
        probe = load_probe("needle")
        size = min(_HEADS_LENGTH, n)
        retrieval = retrieval_scores(
            loaded.model, [needles(probe, corpus, frame, size, seed + k) for k in range(_NEEDLE_TEXTS)]
        )
    return head_table(arrays, n, settings.confidence, retrieval, content), notes


def _knocked_out(
    loaded: LoadedModel,
    run: SpectrumRun,
    ids: Sequence[Sequence[int]],
    folder: Path,
    report: Report,
) -> SpectrumRun:
    """The run with what happens when each band does not turn."""
    settings = run.settings
    if settings.knockout == "no":
        return run
    edges = [(b.low, float("inf") if b.high is None else b.high) for b in run.bands if b.low is not None]
    total = len(edges) * (2 if settings.knockout == "window" else 1) + 1
    done = 0

    def step(what: str) -> None:
        nonlocal done
        report(Progress(folder, what, done, total))
        done += 1

    losses = knockout_losses(loaded.model, ids, edges, step)
    baseline: str | None = None
    windows: dict[float, str] = {}
    if settings.knockout == "window":
        baseline, windows = knockout_windows(loaded, edges, settings, folder, step)
    out = []
    for band in run.bands:
        if band.low is not None:
            interval = text_interval(losses[band.low], settings.confidence)
            mean, low, high = (float(x) if np.isfinite(x) else None for x in interval)
            rise = Estimate(value=mean, low=low, high=high)
            band = band.model_copy(update={"knockout": rise, "knockout_window": windows.get(band.low)})
        out.append(band)
    return run.model_copy(update={"bands": tuple(out), "knockout_baseline": baseline})


def _guesses(
    model: PreTrainedModel,
    ids: Sequence[int],
    arrays: Arrays,
    rotary: Sequence[Rotary | None],
    settings: SpectrumSettings,
    folder: Path,
    report: Report,
) -> tuple[tuple[WhatIf, ...], Arrays]:
    """Predictions under other scalings, with the kernels they predicted and that were seen."""
    records, kernels = [], {}
    for k, scaling in enumerate(settings.what_if):
        report(Progress(folder, f"what if {scaling}", k, len(settings.what_if)))
        record, predicted, measured = what_if(model, scaling, ids, arrays, rotary)
        records.append(record)
        kernels[f"what_if_{k}_predicted"] = predicted.astype(np.float32)
        kernels[f"what_if_{k}_measured"] = measured.astype(np.float32)
    return tuple(records), kernels


def check_memory(described: Described, shape: Shape, length: int, each: int = 0) -> None:
    """Refuse a length before anything is allocated; of pictures that take `each` tokens, where there are any.

    Raises:
        UserError: More is needed than is free; names a length that fits.
    """
    text = described.text_config
    wide = getattr(text, "intermediate_size", None) or 4 * shape.hidden
    per_token = (4 * wide + 12 * shape.hidden + 8 * shape.heads * shape.head_dim) * shape.itemsize
    per_token += ROWS * shape.heads * 4 * 8  # rows of probabilities and their copies
    per_token += 2 * shape.head_dim * 8 * 12  # FFTs of one head
    weights = shape.parameters * shape.itemsize
    free = free_memory(described.device)
    if weights + per_token * length > free:
        fits = int((free - weights) / per_token) // 256 * 256
        option = f"--images {fits // each}" if each else f"--length {fits}"
        room = f"About {fits:,} tokens fit: {option}." if fits >= SHORTEST else "Take a smaller model."
        raise UserError(
            f"A spectrum of {described.source.name!r} at {length:,} tokens needs about "
            f"{(weights + per_token * length) / _GIB:.1f} GiB; {free / _GIB:.1f} GiB are free. {room}"
        )


def header_notes(info: ModelInfo, length: int) -> tuple[str, ...]:
    """What is to be said of any measurement at a length; positions, where those are not tokens."""
    notes = []
    if info.dtype != "float32":
        notes.append(f"computed in {info.dtype}: small differences drown in its rounding")
    if info.claimed_length and length > info.claimed_length:
        notes.append(f"measured beyond the claimed length of {info.claimed_length:,} tokens")
    return tuple(notes)
