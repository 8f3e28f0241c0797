"""One vision-language model's spectrum into one run folder, a haystack of pictures at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from laid_eval.environment import environment
from laid_eval.models.capture import Call, check_capture
from laid_eval.models.cost import peak_memory, shape_of
from laid_eval.models.load import Described, load_vision
from laid_eval.models.positions import counted_positions, is_picture, own_positions, positions_held_to
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.runs import write_atomically
from laid_eval.spectra import (
    HEADS,
    PICTURE_ARRAYS,
    SPECTRA,
    LoadedSpectrum,
    PictureFindings,
    SpectrumCost,
    SpectrumRun,
    SpectrumSettings,
    load_spectrum,
    save_arrays,
    save_spectrum,
)
from laid_eval.spectrum.collect import Arrays, finish, observe_layers
from laid_eval.spectrum.layout import far_distance, stationary_width
from laid_eval.spectrum.measure import check_memory, header_notes, summarised
from laid_eval.spectrum.observe import observe, sample
from laid_eval.spectrum.observe_pictures import observe_pictures, sights
from laid_eval.spectrum.picture_summary import (
    audit,
    axis_names,
    axis_shares,
    picture_metrics,
    type_masses,
    with_needles,
)
from laid_eval.spectrum.pictures import Gallery, PicturePrompt
from laid_eval.spectrum.running import PARTS, Clock, Report, earlier, keeper, observed
from laid_eval.spectrum.summary import KINDS, head_table, top_heads

_PROMPT = ("positions", "spans", "needle")
"""Of a prompt, not of its layers."""


def measure_pictures(
    described: Described, settings: SpectrumSettings, gallery: Gallery, folder: Path, report: Report
) -> LoadedSpectrum:
    """One model, into one folder."""
    before = earlier(folder, described.info, settings)
    if before and before.header.status == "complete":
        return before
    check_memory(described, shape_of(described), max(gallery.lengths), gallery.each)
    if before is None:
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of no run that is known
    clock = Clock(before.header.cost.seconds if before else 0.0)
    loaded = load_vision(described, gallery.processor)
    model = loaded.model
    few = gallery.few().piece
    with positions_held_to(model, counted_positions(model, few)):
        gap = check_capture(model, few.on(model))
    gap = max(gap, check_capture(model))  # longer than a short sliding window
    rotary = rotaries(model, gallery.reach)
    run = SpectrumRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="partial",
        model=loaded.info,
        settings=settings,
        environment=environment(),
        notes=(
            *header_notes(loaded.info, gallery.reach),
            "the language model's attention alone: the vision tower's is not measured",
        ),
    )
    keep = keeper(folder, run, clock)

    def look(k: int, step: Callable[[int], None]) -> Arrays:
        return observe_prompt(model, gallery.prompt(k), rotary, settings, settings.seed + k, gallery.reach, step)

    parts = observed(settings.texts, len(rotary), "haystack", look, folder, report, keep)
    arrays = finish(parts, rotary, settings.length) | _joined(parts, rotary)
    run = summarised(run, arrays, rotary, parts, gap, gallery.reach)
    confidence = settings.confidence
    findings = PictureFindings(
        axes=axis_shares(arrays, confidence),
        types=type_masses(arrays, confidence),
        audit=audit(
            [part["positions"] for part in parts],
            arrays["spans"],
            run.environment.get("transformers"),
            own_positions(model, few) is not None,
        ),
    )
    table = with_needles(head_table(arrays, settings.length, confidence, None, None), arrays)
    save_arrays(folder / SPECTRA, arrays)
    write_atomically(folder / HEADS, table.to_csv(index=False, float_format="%.6g"))
    run = run.model_copy(
        update={
            "status": "complete",
            "metrics": (*run.metrics, *picture_metrics(arrays, settings.length, confidence)),
            "pictures": findings,
            "top_heads": top_heads(table, (*KINDS, "needle")),
            "cost": SpectrumCost(
                tokens=sum(gallery.lengths),
                seconds=clock.seconds,
                peak_memory_bytes=peak_memory(model.device),
            ),
        }
    )
    save_spectrum(folder, run)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return load_spectrum(folder)


def observe_prompt(
    model: PreTrainedModel,
    prompt: PicturePrompt,
    rotary: Sequence[Rotary | None],
    settings: SpectrumSettings,
    seed: int,
    reach: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Arrays:
    """One haystack with its question through the model: the raw arrays of all its layers, and its positions.

    Args:
        model: A vision-language model whose attention can be captured.
        prompt: The pictures and the question.
        rotary: Pairs of every layer.
        settings: Of the run: the shortest prompt's length decides which distances are looked at.
        seed: Of the samples.
        reach: Positions of the longest prompt.
        progress: Called with the number of each layer done.

    Raises:
        UserError: The model's rotary modules are given other positions than it counts, or values are not finite.
    """
    piece = prompt.piece
    positions = counted_positions(model, piece)
    n = piece.ids.shape[1]
    plan = sample(n, settings.queries, seed, stationary_width(settings.length), positions)
    where = sights(
        is_picture(model, piece.ids), prompt.spans, settings.queries, seed, far_distance(settings.length, 4), reach
    )

    def look(call: Call) -> Arrays:
        return observe(call, rotary[call.layer], plan, kernels=False) | observe_pictures(call, plan, where)

    with positions_held_to(model, positions):
        part = observe_layers(model, piece.on(model), look, progress)
    return part | {
        "positions": positions.numpy(),
        "spans": prompt.spans.numpy(),
        "needle": np.array(prompt.needle),
    }


def _joined(parts: Sequence[Arrays], rotary: Sequence[Rotary | None]) -> Arrays:
    """The arrays of `laid_eval.spectra.PICTURE_ARRAYS` from those of each prompt."""
    layers = parts[0]["layers"]
    pairs = max((len(r.theta) for r in rotary if r), default=0)
    out: Arrays = {
        name: np.stack([part[name] for part in parts]).astype(np.float32)
        for name in PICTURE_ARRAYS
        if name in parts[0] and name not in _PROMPT
    }
    return out | {
        "axis": axis_names(rotary, layers.tolist(), pairs),
        "positions": parts[0]["positions"],
        "spans": parts[0]["spans"],
        "needle": np.array([int(part["needle"]) for part in parts]),
    }
