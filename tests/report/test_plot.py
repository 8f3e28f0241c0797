"""Figures: drawn from a run alone, into any axes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import laid_eval
from laid_eval import ScriptedReader, UserError, measure_window
from laid_eval.report.plot import save_figures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    probes = ["needle", "aggregate"]
    return measure_window(ScriptedReader(location=11.5), probes, out=folder, max_length=8192, budget=120_000)


def test_the_window_plot_shows_curve_trials_criteria_chance_and_claimed_length(run):
    figure, ax = plt.subplots()
    assert laid_eval.plot.window(run, ax=ax) is ax
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any("95% interval" in t for t in labels)
    assert any("chance" in t for t in labels)
    assert "claimed length (8,192)" in labels
    texts = " ".join(t.get_text() for t in ax.texts)
    for window in run.windows[:4]:
        assert window.value_text() in texts
    assert ax.get_xlabel() == "context length (tokens)"
    (offsets,) = [c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 3][:1]
    needle = run.trials[run.trials["probe"] == "needle"].groupby("length")["score"].mean()
    assert np.allclose(sorted(offsets[:, 1]), sorted(needle))
    plt.close(figure)


def test_the_depth_map_counts_every_question(run):
    ax = laid_eval.plot.depth(run.path)
    counts = [int(t.get_text()[2:]) for t in ax.texts if t.get_text().startswith("n=")]
    assert sum(counts) == (run.trials["probe"] == "needle").sum()
    plt.close(ax.figure)


def test_a_probe_without_depth_says_so(run):
    ax = laid_eval.plot.depth(run, probe="aggregate")
    assert "no depth" in ax.texts[0].get_text()
    plt.close(ax.figure)


def test_figures_are_saved_beside_the_run_one_panel_a_probe(run):
    paths = save_figures(run)
    assert [p.name for p in paths] == ["window.png", "depth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    assert not list(run.path.glob(".*"))


def test_a_probe_that_was_not_measured_is_told(run):
    with pytest.raises(UserError, match=r"holds no trials of probe 'multihop'; it measured needle, aggregate\."):
        laid_eval.plot.window(run, probe="multihop")
