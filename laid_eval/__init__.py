"""Long-context evaluation and diagnostics for language models.

The names below are the stable interface; everything else is private. Each is imported when it is first used, so
that `laid-eval --help` loads neither torch nor matplotlib, and reading runs needs no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laid_eval.errors import UserError
    from laid_eval.records import Run, Trial, WindowEstimate
    from laid_eval.report import plot
    from laid_eval.runs import LoadedRun, load_run
    from laid_eval.window.curve import Criterion
    from laid_eval.window.estimate import estimate_window
    from laid_eval.window.readers import ScriptedReader
    from laid_eval.window.session import measure_window

_HOMES = {
    "Criterion": "laid_eval.window.curve",
    "LoadedRun": "laid_eval.runs",
    "Run": "laid_eval.records",
    "ScriptedReader": "laid_eval.window.readers",
    "Trial": "laid_eval.records",
    "UserError": "laid_eval.errors",
    "WindowEstimate": "laid_eval.records",
    "estimate_window": "laid_eval.window.estimate",
    "load_run": "laid_eval.runs",
    "measure_window": "laid_eval.window.session",
    "plot": "laid_eval.report",
}

__all__ = [
    "Criterion",
    "LoadedRun",
    "Run",
    "ScriptedReader",
    "Trial",
    "UserError",
    "WindowEstimate",
    "estimate_window",
    "load_run",
    "measure_window",
    "plot",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        return metadata.version("laid-eval")
    if name not in _HOMES:
        raise AttributeError(f"module 'laid_eval' has no attribute {name!r}")
    if name == "plot":
        return import_module("laid_eval.report.plot")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
