"""Plots of runs: `laid_eval.plot.window(run)`. Each takes `ax=None` and returns the Axes."""

from laid_eval.report.plot.causes import save_why, why
from laid_eval.report.plot.distillations import losses, rope_gain, save_distillation_figures
from laid_eval.report.plot.picture_spectra import axes, axis_shares, images
from laid_eval.report.plot.pictures import haystack, save_pictures
from laid_eval.report.plot.spectra import bands, gain, heads, pairs, save_spectra, transfer, what_if
from laid_eval.report.plot.windows import depth, save_figures, window

__all__ = [
    "axes",
    "axis_shares",
    "bands",
    "depth",
    "gain",
    "haystack",
    "heads",
    "images",
    "losses",
    "pairs",
    "rope_gain",
    "save_distillation_figures",
    "save_figures",
    "save_pictures",
    "save_spectra",
    "save_why",
    "transfer",
    "what_if",
    "why",
    "window",
]
