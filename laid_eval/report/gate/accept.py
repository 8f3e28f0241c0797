"""Renewing a baseline: a run becomes what later runs are compared with."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.report.gate.comparable import check_finished, load_measured
from laid_eval.runs import HEADER, TRIALS
from laid_eval.scores import SAMPLES
from laid_eval.spectra import SPECTRA

KEPT = (HEADER, TRIALS, SAMPLES, SPECTRA)
"""What a comparison reads; figures and checkpoints stay with the run."""


def accept(run: Path, baseline: Path) -> list[str]:
    """Copy a run to the folder of the baseline; names of the files copied.

    The new folder is finished under another name, then renamed; the old one is moved aside first and removed last, so
    a whole baseline is on disk at every moment. What else the old folder holds (a README) comes along.

    Raises:
        UserError: `run` is no finished run, `baseline` holds something else, or one contains the other.
    """
    source, target = run.resolve(), baseline.resolve()
    measured = load_measured(run)
    runs = [one for one in (measured.window, measured.spectrum, measured.score) if one is not None]
    for one in runs:
        check_finished(one, sequential=False)
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"'{run}' can't become the baseline '{baseline}': one folder contains the other.")
    if target.exists() and not target.is_dir():
        raise UserError(f"--baseline '{baseline}' is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()):
        load_measured(baseline)  # whatever is no run is not overwritten
    folders = [one.path.resolve() for one in runs]
    files = [folder / name for folder in folders for name in KEPT if (folder / name).is_file()]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new-"))
    try:
        if target.is_dir():
            shutil.copytree(target, fresh, dirs_exist_ok=True, ignore=_old_run)
        for file in files:
            copy = fresh / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        fresh.chmod(0o755)
        _swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return [str(file.relative_to(source)) for file in files]


def _old_run(_: str, names: list[str]) -> set[str]:
    """Files of the old run: they would speak of another than the new."""
    return {name for name in names if name in KEPT or name.endswith((".jsonl", ".npz", ".png", ".svg", ".csv"))}


def _swap(fresh: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(fresh, target)
    except OSError:
        if aside.is_dir():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
