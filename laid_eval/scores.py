"""Scores of a benchmark run: metrics by task, and samples by document. Needs no torch.

The folder holds `run.json` (with `"command": "bench"`, a list of `metrics`, and `settings`) and `samples.jsonl`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from laid_eval.errors import UserError, nearest
from laid_eval.records import Metric, Sample
from laid_eval.runs import HEADER, read_header

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class LoadedScores:
    """A benchmark run read back."""

    path: Path
    status: str
    settings: dict[str, Any]
    metrics: tuple[Metric, ...]
    samples: pd.DataFrame
    """One row a document, columns as in `Sample`; empty where none were kept."""

    def metric(self, task: str) -> Metric:
        """The (first) metric of a task.

        Raises:
            UserError: The run holds no such task.
        """
        for metric in self.metrics:
            if metric.task == task:
                return metric
        held = list(dict.fromkeys(m.task for m in self.metrics))
        raise UserError(f"The run holds no score of task {task!r}{nearest(task, held)}; it holds: {', '.join(held)}.")


def load_scores(path: str | os.PathLike[str]) -> LoadedScores:
    """Read the folder of a benchmark run.

    Raises:
        UserError: Not such a folder, damaged, or written by a newer version.
    """
    folder = Path(path)
    document = read_header(folder, "Score")
    if document.get("command") != "bench":
        raise UserError(f"'{folder}' is no benchmark run; read it with laid_eval.load_run.")
    try:
        metrics = tuple(Metric.model_validate(m) for m in document["metrics"])
        settings, status = dict(document.get("settings") or {}), str(document["status"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        what = type(error).__name__
        raise UserError(f"'{folder / HEADER}' is damaged: its metrics can't be read ({what}). Score again.") from None
    return LoadedScores(folder, status, settings, metrics, _samples(folder / SAMPLES))


def _samples(path: Path) -> pd.DataFrame:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            sample = Sample.model_validate_json(line)
        except ValidationError:
            if number == len(lines):
                break  # torn by a kill
            raise UserError(f"'{path}' is damaged at line {number}. Restore it from a copy, or score again.") from None
        rows[sample.task, sample.doc_id] = sample.model_dump()
    return pd.DataFrame(list(rows.values()), columns=list(Sample.model_fields))
