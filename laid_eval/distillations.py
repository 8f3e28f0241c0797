"""What a distillation leaves behind: its record, the losses step by step, the windows on the way. Needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from laid_eval.errors import UserError
from laid_eval.records import SCHEMA_VERSION, ModelInfo, Record, Status
from laid_eval.runs import HEADER, read_header, validated, write_atomically

STEPS = "steps.jsonl"
WINDOWS = "windows.jsonl"
GAINS = "gains.npz"
TERMS = ("sft", "kl", "attention", "qk")
"""Terms of the loss that compare with the teacher or the labels."""
DECIBEL = 20 / np.log(10)
"""Of one unit of a log gain."""


class LayerGains(Record):
    """The gains of one layer, summed up."""

    layer: int
    rms_db: float
    """Root mean square over heads and pairs."""
    lowest_db: float
    highest_db: float


class StepWindow(Record):
    """A quick estimate of the student's window during training."""

    step: int
    text: str
    """`1,120 tokens [900, 1,400]`, or the censoring in words."""
    length: float | None
    low: float | None
    high: float | None


class DistillCost(Record):
    """What training took, all sessions together."""

    steps: int = 0
    tokens: int = 0
    """Read by the student."""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None


class DistillRun(Record):
    """Header of a distillation, beside the exported checkpoint."""

    schema_version: int = SCHEMA_VERSION
    command: Literal["distill"] = "distill"
    created: str
    status: Status
    student: ModelInfo
    teacher: ModelInfo | None
    recipe: dict[str, Any]
    """Whole, with its defaults filled in."""
    recipe_hash: str
    data: str
    """Source of the samples and a hash of its content."""
    seed: int
    processes: int = 1
    sharded: bool = False
    """Weights lay in shards on the processes (FSDP)."""
    trained: dict[str, int]
    """Parameters that train: `weights`, `gains`, `mixtures`."""
    pairs: tuple[tuple[int, int], ...]
    """Student and teacher layers whose attention is matched."""
    sharing: Literal["head", "layer"] | None
    """Of the gains; `None` without."""
    losses: dict[str, float] | None = None
    """Means over the last tenth of the steps: the loss and its terms, unweighted."""
    gains: tuple[LayerGains, ...] | None = None
    certificate: dict[str, Any] | None = None
    """Of the fold, as in `laid_fold.json`."""
    export: dict[str, Any] | None = None
    """How far the exported checkpoint, loaded anew, is from the trained student."""
    windows: tuple[StepWindow, ...] = ()
    cost: DistillCost = DistillCost()
    environment: dict[str, str | None]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedDistillation:
    """A distillation read back."""

    path: Path
    """Also the folder of the exported checkpoint, when it is complete."""
    header: DistillRun
    steps: pd.DataFrame
    """One row a step of the optimiser: `step`, `loss`, terms, rates, `effective_heads`."""
    log_gain: NDArray[np.float64] | None
    """(layers with gains, H or 1, P) natural logarithms; `None` without."""
    wavelength: NDArray[np.float64] | None
    """(layers with gains, P) tokens per turn of each pair."""


def save_distillation(folder: Path, run: DistillRun) -> None:
    """Write `run.json`."""
    write_atomically(folder / HEADER, run.model_dump_json(indent=1) + "\n")


def load_distillation(path: str | os.PathLike[str]) -> LoadedDistillation:
    """Read the folder of a distillation. Needs no torch.

    Raises:
        UserError: Not such a folder, damaged, or written by a newer version.
    """
    folder = Path(path)
    document = read_header(folder, "Distil")
    if document.get("command") != "distill":
        raise UserError(f"'{folder}' is no distillation; read it with laid_eval.load_run.")
    header = validated(DistillRun, document, folder)
    log_gain = wavelength = None
    if (folder / GAINS).is_file():
        with np.load(folder / GAINS) as arrays:
            log_gain, wavelength = arrays["log_gain"], arrays["wavelength"]
    return LoadedDistillation(folder, header, pd.DataFrame(read_lines(folder / STEPS)), log_gain, wavelength)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Documents of a file with one a line; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            break
    return out


def keep_steps(path: Path, last: int) -> None:
    """Drop what was logged after step `last`: a resumed run logs it again."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line["step"] <= last]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
