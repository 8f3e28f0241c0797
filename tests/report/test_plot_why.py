"""The figure of why a window ends: drawn from a run alone, into any axes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import laid_eval
from laid_eval import ScriptedReader, UserError, load_run, measure_window
from laid_eval.report.plot import save_why
from laid_eval.runs import save_header
from laid_eval.window.why import CONDITIONS, Study, explain

RIGHT = {"short": 0.95, "far": 0.4, "crowded": 0.9, "full": 0.35, "alone": 0.45, "near": 0.9}


def split(probe):
    rng = np.random.default_rng(0)
    rows = [
        (name, h, f"fact{q}", float(rng.random() < RIGHT[name]), rng.normal(), 0.125)
        for h in range(6)
        for q in range(12)
        for name in CONDITIONS
    ]
    table = pd.DataFrame(rows, columns=["condition", "haystack", "question", "score", "margin", "chance"])
    return explain(table, Study(probe, 8192, 512, 6, 12))


@pytest.fixture
def run(tmp_path):
    found = measure_window(ScriptedReader(location=11), out=tmp_path / "run", max_length=4096, budget=4096)
    save_header(found.path, found.header.model_copy(update={"why": (split("needle"), split("multikey"))}))
    return load_run(found.path)


def test_every_part_is_a_bar_with_its_interval_and_its_number(run):
    figure, ax = plt.subplots()
    assert laid_eval.plot.why(run, ax=ax) is ax
    why = run.header.why[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    for name in ("position", "dilution", "distractors"):
        part = why.part(name)
        (row,) = [k for k, label in enumerate(labels) if label.startswith(name)]
        assert ax.patches[row].get_width() == pytest.approx(part.value)
        ends = [line.get_xdata() for line in ax.lines if list(line.get_ydata()) == [row, row]]
        assert [part.low, part.high] in [list(e) for e in ends]
        assert ax.texts[row].get_text() == f"{part.value:.2f}"
    assert "lost from 512 to 8,192 tokens" in labels
    assert "share of the score above chance" in ax.get_xlabel()
    assert "95% interval" in ax.get_xlabel()
    plt.close(figure)


def test_probes_are_chosen_by_name_and_one_that_was_not_asked_is_told(run):
    ax = laid_eval.plot.why(run.path, probe="multikey")
    assert "'multikey'" in ax.get_title(loc="left")
    plt.close(ax.figure)
    with pytest.raises(
        UserError, match=r"does not say why the window of multihop ends \(it does for: needle, multikey\)"
    ):
        laid_eval.plot.why(run, probe="multihop")


def test_the_figure_is_saved_where_there_is_something_to_show(run):
    (path,) = save_why(run)
    assert path == run.path / "why.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(run.path.glob(".*"))
    save_header(run.path, run.header.model_copy(update={"why": None}))
    assert save_why(load_run(run.path)) == []
