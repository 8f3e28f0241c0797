"""Plots of runs: `laid_eval.plot.window(run)`. Each takes `ax=None` and returns the Axes."""

from laid_eval.report.plot.causes import save_why, why
from laid_eval.report.plot.windows import depth, save_figures, window

__all__ = ["depth", "save_figures", "save_why", "why", "window"]
