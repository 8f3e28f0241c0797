"""The runs in a folder, and whether those of two folders may be compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laid_eval.errors import UserError
from laid_eval.report.gate.rules import Rule
from laid_eval.runs import HEADER, LoadedRun, load_run, read_header
from laid_eval.scores import LoadedScores, load_scores
from laid_eval.spectra import LoadedSpectrum, load_spectrum

Place = str | os.PathLike[str] | LoadedRun
_FREE = {
    "window": {
        *("probes", "probe_hashes", "haystack", "criterion", "confidence", "precision", "budget", "max_trials", "chunk")
    },
    "spectrum": {"confidence", "knockout", "what_if", "queries"},
    "score": {"base_url", "batch_size", "concurrency", "retries", "timeout", "limit"},
}
"""Settings that decide how much is asked, or how, but not what: these may differ."""


@dataclass(frozen=True)
class Measured:
    """What a folder holds: one run, or one of each command in its subfolders."""

    path: Path
    window: LoadedRun | None = None
    spectrum: LoadedSpectrum | None = None
    score: LoadedScores | None = None

    @property
    def names(self) -> dict[str, list[str]]:
        """What `*` may stand for, by subject."""
        return {
            "window": list(self.window.header.settings.probes) if self.window else [],
            "score": list(dict.fromkeys(m.task for m in self.score.metrics)) if self.score else [],
        }


_LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "window": ("window", load_run),
    "spectrum": ("spectrum", load_spectrum),
    "bench": ("score", load_scores),
}


def load_measured(place: Place) -> Measured:
    """Read a run folder, or a folder of run folders.

    Raises:
        UserError: No run in it, one that is damaged or no measurement, or two of one command.
    """
    if isinstance(place, LoadedRun):
        return Measured(place.path, window=place)
    folder = Path(place)
    folders = [folder]
    if not (folder / HEADER).is_file() and folder.is_dir():
        folders = sorted(f.parent for f in folder.glob(f"*/{HEADER}")) or folders
    found: dict[str, Any] = {}
    for one in folders:
        command = str(read_header(one).get("command", "window"))
        if command not in _LOADERS:
            raise UserError(f"'{one}' is a {command} run; the gate reads runs of {', '.join(_LOADERS)}.")
        subject, load = _LOADERS[command]
        if subject in found:
            raise UserError(f"'{folder}' holds two {command} runs ({found[subject].path.name}, {one.name}); name one.")
        found[subject] = load(one)
    return Measured(folder, **found)


def pick(measured: Measured, rule: Rule) -> Any:
    """The run that a rule speaks of.

    Raises:
        UserError: The folder holds none of that kind.
    """
    subject = rule.subject
    if subject == "cost":
        if measured.window is None:
            raise UserError(f"Rule {rule.text!r}: costs are read from a window run; '{measured.path}' holds none.")
        return measured.window
    run = getattr(measured, subject)
    if run is None:
        held = ", ".join(kind for kind in _FREE if getattr(measured, kind)) or "nothing"
        raise UserError(f"Rule {rule.text!r} asks for a {subject}; '{measured.path}' holds: {held}.")
    return run


def check_finished(run: Any, sequential: bool) -> None:
    """Refuse a run that is not complete, unless it is looked at while it grows.

    Raises:
        UserError: It is partial or failed.
    """
    status = run.status if isinstance(run, LoadedScores) else run.header.status
    if status == "failed" or (status != "complete" and not sequential):
        raise UserError(
            f"'{run.path}' is not complete (status {status}). Resume it with the command that began it"
            + (", or look at it as it grows with --sequential." if status == "partial" else ".")
        )


def check_comparable(run: Any, baseline: Any, rule: Rule) -> None:
    """Refuse to compare what was asked differently; names the field.

    Raises:
        UserError: Another probe, seed, length, criterion or other setting that decides what is asked.
    """
    own, other = _decisive(run, rule), _decisive(baseline, rule)
    for name in dict.fromkeys([*own, *other]):
        mine, theirs = own.get(name), other.get(name)
        if mine != theirs:
            raise UserError(
                f"Rule {rule.text!r}: not comparable: {name} is {_short(mine)} in '{run.path}' and {_short(theirs)} in "
                f"the baseline '{baseline.path}'. Measure both alike, or renew the baseline with --accept."
            )


def _decisive(run: Any, rule: Rule) -> dict[str, Any]:
    settings = run.settings if isinstance(run, LoadedScores) else run.header.settings.model_dump()
    kept: dict[str, Any] = {}
    if rule.subject == "window":
        asked = run.header.settings
        kept["probe"] = rule.name if rule.name in asked.probes else ", ".join(asked.probes)
        kept[f"settings.probe_hashes.{rule.name}"] = asked.probe_hashes.get(rule.name)
        kept["image"] = run.header.image and run.header.image.model_dump()
        if rule.criterion is None:
            kept["settings.criterion"] = asked.criterion
    return kept | {f"settings.{k}": v for k, v in sorted(settings.items()) if k not in _FREE[rule.subject]}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
