"""Long-context evaluation and diagnostics for language models.

The names below are the stable interface; everything else is private. Each is imported when it is first used, so
that `laid-eval --help` loads neither torch nor matplotlib, and reading runs needs no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from laid_eval.models.torchvision_mend import mend_torchvision

mend_torchvision()  # here, before anything of ours imports transformers

if TYPE_CHECKING:
    from laid_eval.distillation.session import distill
    from laid_eval.distillations import DistillRun, LoadedDistillation, load_distillation
    from laid_eval.errors import UserError
    from laid_eval.records import Gate, Metric, Run, Sample, Trial, Verdict, WindowEstimate
    from laid_eval.report import plot
    from laid_eval.report.gate.verdicts import assert_window, gate
    from laid_eval.runs import LoadedRun, load_run
    from laid_eval.scores import LoadedScores, load_scores
    from laid_eval.spectra import LoadedSpectrum, SpectrumRun, load_spectrum
    from laid_eval.spectrum.compare import compare_spectra
    from laid_eval.spectrum.session import measure_spectrum
    from laid_eval.window.curve import Criterion
    from laid_eval.window.estimate import estimate_window
    from laid_eval.window.readers import ScriptedReader
    from laid_eval.window.session import measure_window
    from laid_eval.window.visual_haystacks import visual_haystacks

_HOMES = {
    "Criterion": "laid_eval.window.curve",
    "DistillRun": "laid_eval.distillations",
    "Gate": "laid_eval.records",
    "LoadedDistillation": "laid_eval.distillations",
    "LoadedRun": "laid_eval.runs",
    "LoadedScores": "laid_eval.scores",
    "LoadedSpectrum": "laid_eval.spectra",
    "Metric": "laid_eval.records",
    "Run": "laid_eval.records",
    "Sample": "laid_eval.records",
    "ScriptedReader": "laid_eval.window.readers",
    "SpectrumRun": "laid_eval.spectra",
    "Trial": "laid_eval.records",
    "UserError": "laid_eval.errors",
    "Verdict": "laid_eval.records",
    "WindowEstimate": "laid_eval.records",
    "assert_window": "laid_eval.report.gate.verdicts",
    "compare_spectra": "laid_eval.spectrum.compare",
    "distill": "laid_eval.distillation.session",
    "estimate_window": "laid_eval.window.estimate",
    "gate": "laid_eval.report.gate.verdicts",
    "load_distillation": "laid_eval.distillations",
    "load_run": "laid_eval.runs",
    "load_scores": "laid_eval.scores",
    "load_spectrum": "laid_eval.spectra",
    "measure_spectrum": "laid_eval.spectrum.session",
    "measure_window": "laid_eval.window.session",
    "plot": "laid_eval.report",
    "visual_haystacks": "laid_eval.window.visual_haystacks",
}

__all__ = [
    "Criterion",
    "DistillRun",
    "Gate",
    "LoadedDistillation",
    "LoadedRun",
    "LoadedScores",
    "LoadedSpectrum",
    "Metric",
    "Run",
    "Sample",
    "ScriptedReader",
    "SpectrumRun",
    "Trial",
    "UserError",
    "Verdict",
    "WindowEstimate",
    "assert_window",
    "compare_spectra",
    "distill",
    "estimate_window",
    "gate",
    "load_distillation",
    "load_run",
    "load_scores",
    "load_spectrum",
    "measure_spectrum",
    "measure_window",
    "plot",
    "visual_haystacks",
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
