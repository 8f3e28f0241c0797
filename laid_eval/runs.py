"""Run folders: append, resume, load, upgrade.

`run.json` is written to a temporary name and renamed; `trials.jsonl` is appended, a group of lines at a time.
A line torn by a kill is dropped on read, so a run can be resumed from any moment.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pandas as pd
from pydantic import ValidationError

from laid_eval.errors import UserError
from laid_eval.records import SCHEMA_VERSION, Record, Run, Trial, WhyTrial, WindowEstimate

HEADER = "run.json"
TRIALS = "trials.jsonl"
WHY = "why.jsonl"
_Line = TypeVar("_Line", bound=Trial)
_Header = TypeVar("_Header", bound=Record)

# Upgrades by the version they start from; each returns the document of the next version. None is needed yet.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class LoadedRun:
    """A run read back: its header and its trials."""

    path: Path
    header: Run
    trials: pd.DataFrame
    """One row a trial, columns as in `Trial`."""

    @property
    def windows(self) -> tuple[WindowEstimate, ...]:
        """All estimates of the run."""
        return self.header.windows

    def window(self, probe: str | None = None, criterion: str | None = None) -> WindowEstimate:
        """One estimate; by default of the first probe under the run's own criterion."""
        return self.header.window(probe or self.header.settings.probes[0], criterion)


def run_folder(out: str | os.PathLike[str] | None, model: str, command: str) -> Path:
    """The folder asked for, or a new name in `runs/`; nothing is made.

    Raises:
        UserError: `out` is a file.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out '{out}' is a file; give a folder.")
        return folder
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "model"
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path("runs") / f"{now}-{command}-{name}-{uuid4().hex[:6]}"


def write_atomically(path: Path, content: str) -> None:
    """Write under a temporary name beside `path`, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file, readable to whom new files are: temporary ones are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)


def save_header(folder: Path, run: Run) -> None:
    """Write `run.json`."""
    write_atomically(folder / HEADER, run.model_dump_json(indent=1) + "\n")


def append_trials(folder: Path, trials: Iterable[Trial], file_name: str = TRIALS) -> None:
    """Append trials and push them to the disk."""
    append_lines(folder / file_name, (trial.model_dump_json() for trial in trials))


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines and push them to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def load_header(folder: Path) -> Run:
    """Read `run.json`, upgraded to the present schema.

    Raises:
        UserError: No run folder, a damaged header, or one from a newer version of the program.
    """
    document = read_header(folder, f"Its trials are in {TRIALS}; restore the header from a copy, or measure")
    other = {"spectrum": "load_spectrum", "distill": "load_distillation", "bench": "load_scores"}.get(
        str(document.get("command"))
    )
    if other:
        raise UserError(f"'{folder}' is a {document['command']} run, not a window; read it with laid_eval.{other}.")
    return validated(Run, document, folder)


def read_header(folder: Path, mend: str = "Measure") -> dict[str, Any]:
    """The document in `run.json`, of any command, upgraded to the present schema.

    Args:
        folder: Of the run.
        mend: Begins what is advised for a damaged one: `... again into another folder.`

    Raises:
        UserError: No run folder, a damaged header, or one from a newer version of the program.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(
            f"'{folder}' is not a run folder: it holds no {HEADER}. "
            "Name the folder of a run, or for --out a new or empty one."
        )
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = document["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged ({type(error).__name__}). {mend} again into another folder.") from None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"'{path}' has schema version {version}, this laid-eval reads up to {SCHEMA_VERSION}. Upgrade laid-eval."
        )
    while version < SCHEMA_VERSION:
        document = UPGRADES[version](document)
        version = document["schema_version"]
    return document


def validated(kind: type[_Header], document: dict[str, Any], folder: Path) -> _Header:
    """The header as a record.

    Raises:
        UserError: A field is missing or wrong; names it.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{folder / HEADER}' is damaged: field {where!r}: {first['msg']}.") from None


def load_trials(folder: Path) -> list[Trial]:
    """Read the trials; the last line may be torn by a kill and is then left out.

    Raises:
        UserError: A line other than the last can't be read.
    """
    return _load_lines(folder / TRIALS, Trial)


def load_why_trials(folder: Path) -> list[WhyTrial]:
    """Read the trials of the study why the window ends. Errors as for `load_trials`."""
    return _load_lines(folder / WHY, WhyTrial)


def _load_lines(path: Path, kind: type[_Line]) -> list[_Line]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged ({error}). Restore it from a copy, or measure again.") from None
    out: dict[str, _Line] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            trial = kind.model_validate_json(line)
        except ValidationError:
            if number == len(lines):
                break
            raise UserError(
                f"'{path}' is damaged at line {number}. Remove that line, then run the command again."
            ) from None
        out[trial.id] = trial
    return list(out.values())


def drop_torn_line(folder: Path, file_name: str = TRIALS) -> None:
    """Cut an unfinished last line off the trials, so that appending goes on with a whole line."""
    path = folder / file_name
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def trial_table(trials: Iterable[Trial]) -> pd.DataFrame:
    """Trials as a table with the columns of `Trial`."""
    rows = [trial.model_dump() for trial in trials]
    return pd.DataFrame(rows, columns=list(Trial.model_fields))


def why_table(trials: Iterable[WhyTrial]) -> pd.DataFrame:
    """Trials of the study why the window ends as a table with the columns of `WhyTrial`."""
    rows = [trial.model_dump() for trial in trials]
    return pd.DataFrame(rows, columns=list(WhyTrial.model_fields))


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Read a run folder. Needs no torch.

    Raises:
        UserError: Not a run folder, damaged, or written by a newer version.
    """
    folder = Path(path)
    return LoadedRun(folder, load_header(folder), trial_table(load_trials(folder)))
