"""Plots of spectra show what the run holds, with labelled axes, and say what is missing."""

from datetime import UTC, datetime

import matplotlib
import numpy as np
import pandas as pd
import pytest

from laid_eval.errors import UserError
from laid_eval.records import ModelInfo
from laid_eval.report.plot import bands, gain, heads, pairs, save_spectra, transfer, what_if
from laid_eval.spectra import (
    Band,
    Estimate,
    SpectrumRun,
    SpectrumSettings,
    WhatIf,
    load_spectrum,
    save_arrays,
    save_spectrum,
)

matplotlib.use("Agg")
N, LAYERS, HEADS, PAIRS = 1024, 3, 4, 8
THETA = 10000.0 ** -(np.arange(PAIRS) / PAIRS)


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    at = np.unique(np.geomspace(1, 500, 20).astype(int))
    kernel = rng.normal(size=(LAYERS, HEADS, len(at)))
    arrays = {
        "layers": np.arange(LAYERS),
        "theta": np.tile(THETA, (LAYERS, 1)),
        "usage": rng.gamma(2, size=(2, LAYERS, HEADS, PAIRS)),
        "power": rng.uniform(size=(2, LAYERS, HEADS, 16)),
        "frequencies": np.geomspace(1 / 1020, 0.5, 16),
        "distances": at,
        "logit": rng.normal(size=(LAYERS, HEADS, 510)),
        "what_if_0_predicted": kernel,
        "what_if_0_measured": kernel + 0.1,
    }
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(LAYERS), HEADS),
            "head": np.tile(np.arange(HEADS), LAYERS),
            **{name: rng.uniform(size=LAYERS * HEADS) for name in ("sink", "local", "global", "retrieval")},
            "d50": [np.nan, *rng.integers(1, 500, LAYERS * HEADS - 1)],
        }
    )
    settings = SpectrumSettings(
        length=N, texts=2, queries=8, haystack="x", haystack_hash="x", confidence=0.95, seed=0, knockout="no",
        what_if=("yarn:2",),
    )  # fmt: skip
    one = Estimate(value=0.5, low=0.4, high=0.6)
    header = SpectrumRun(
        created=datetime.now(UTC).isoformat(),
        status="complete",
        model=ModelInfo(name="planted", source="test", claimed_length=512),
        settings=settings,
        environment={},
        bands=(
            Band(low=0.0, high=16.0, pairs=1, even=0.125, usage=one, contribution=one, utility=one, kind="positional"),
            Band(low=None, high=None, pairs=1, even=0.125, usage=one),
        ),
        what_if=(WhatIf(scaling="yarn:2", first_layer_error=0.0, agreement=0.9, change=0.1),),
    )
    save_arrays(tmp_path / "spectra.npz", arrays)
    save_arrays(
        tmp_path / "comparison.npz",
        {"gain_db": rng.normal(size=(LAYERS, PAIRS)), "wavelength": np.tile(2 * np.pi / THETA, (LAYERS, 1))},
    )
    table.to_csv(tmp_path / "heads.csv", index=False)
    save_spectrum(tmp_path, header)
    return load_spectrum(tmp_path)


@pytest.mark.parametrize("draw", [heads, pairs, bands, transfer, gain, what_if])
def test_every_axis_is_labelled(run, draw):
    ax = draw(run)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title(loc="left")


def test_pairs_mark_the_measured_and_the_claimed_length(run):
    texts = [t.get_text() for t in pairs(run).get_legend().get_texts()]
    assert any("1,024" in t for t in texts)
    assert any("512" in t for t in texts)


def test_the_usage_drawn_is_the_share_of_the_run(run):
    usage = run.arrays["usage"]
    share = (usage / usage.sum(-1, keepdims=True)).mean(axis=(0, 1, 2))
    line = next(line for line in pairs(run).lines if line.get_label() == "mean over heads")
    np.testing.assert_allclose(line.get_ydata(), share, rtol=1e-6)
    np.testing.assert_allclose(line.get_xdata(), 2 * np.pi / THETA)


def test_a_score_that_is_not_there_is_named(run):
    with pytest.raises(UserError, match="no head score 'taste'; it holds: sink"):
        heads(run, score="taste")


def test_what_is_missing_is_said(run):
    with pytest.raises(UserError, match="tried no scaling 'base:2'"):
        what_if(run, scaling="base:2")
    (run.path / "comparison.npz").unlink()
    with pytest.raises(UserError, match="measure with --teacher"):
        gain(run)


def test_all_figures_are_written(run):
    names = {p.name for p in save_spectra(run)}
    assert names == {"heads.png", "pairs.png", "transfer.png", "what-if.png", "gain.png"}
