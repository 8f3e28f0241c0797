"""What measurements of all kinds share: where they stand, the run already there, prompt after prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.models.capture import hidden_attention
from laid_eval.models.cost import empty_model
from laid_eval.models.load import Described
from laid_eval.records import ModelInfo
from laid_eval.runs import HEADER
from laid_eval.spectra import (
    SPECTRA,
    LoadedSpectrum,
    SpectrumCost,
    SpectrumRun,
    SpectrumSettings,
    load_spectrum,
    save_spectrum,
)
from laid_eval.spectrum.collect import Arrays, load_part, save_part

PARTS = "parts"


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands, for a live line."""

    folder: Path
    what: str
    done: int
    total: int


Report = Callable[[Progress], None]


def refuse_hidden(model: Described, teacher: Described | None) -> None:
    """Refuse models whose attention can't be captured, before anything is loaded.

    Raises:
        UserError: It does not go through transformers' attention interface.
    """
    for described, role in ((model, "model"), (teacher, "teacher")):
        if described and not empty_model(described)._can_set_attn_implementation():
            raise UserError(hidden_attention(f"{role} {described.source.name!r} ({described.config.model_type})"))


class Clock:
    """Seconds over all sessions of a run."""

    def __init__(self, before: float) -> None:
        self._started = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """So far."""
        return round(time.perf_counter() - self._started, 1)


def earlier(folder: Path, info: ModelInfo, settings: SpectrumSettings) -> LoadedSpectrum | None:
    """The run already in the folder, if it is of the same model and settings."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out '{folder}' is a file; give a folder.")
    if not (folder / HEADER).exists():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name not in ("teacher", PARTS, SPECTRA)):
            raise UserError(f"--out '{folder}' holds other files. Name a new or empty folder, or a spectrum run's.")
        return None
    found = load_spectrum(folder)
    head = found.header
    same = (head.model.fingerprint, head.model.dtype, head.model.rope_scaling, head.settings) == (
        info.fingerprint,
        info.dtype,
        info.rope_scaling,
        settings,
    )
    if not same:
        raise UserError(
            f"--out '{folder}' holds a spectrum of another model or with other settings. Choose another folder."
        )
    return found


def keeper(folder: Path, run: SpectrumRun, clock: Clock) -> Callable[[], None]:
    """What keeps a run that is under way in its folder; it was called once.

    Raises:
        UserError: The folder can't be written.
    """

    def keep() -> None:
        save_spectrum(folder, run.model_copy(update={"cost": SpectrumCost(seconds=clock.seconds)}))

    try:
        keep()
    except OSError as error:
        raise UserError(f"--out '{folder}' can't be written: {error.strerror}. Choose another folder.") from None
    return keep


def observed(
    count: int,
    layers: int,
    what: str,
    observe: Callable[[int, Callable[[int], None]], Arrays],
    folder: Path,
    report: Report,
    keep: Callable[[], None],
) -> list[Arrays]:
    """Raw arrays of every prompt, from the disk where an earlier session finished one.

    Args:
        count: Number of prompts.
        layers: Number of layers.
        what: A prompt is called so in reports.
        observe: The arrays of the prompt with this number; is given what to call with the number of each layer done.
        folder: Of the run.
        report: Called at every layer.
        keep: Called when a prompt is done.
    """
    parts = []
    for k in range(count):
        path = folder / PARTS / f"text-{k}.npz"
        part = load_part(path)
        if part is None:

            def step(layer: int, k: int = k) -> None:
                report(Progress(folder, f"{what} {k + 1} of {count}", k * layers + layer + 1, count * layers))

            part = observe(k, step)
            save_part(path, part)
            keep()
        parts.append(part)
    return parts
