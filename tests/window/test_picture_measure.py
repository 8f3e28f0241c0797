"""Windows in images: a planted one is found, a run goes on after a kill, mistakes are told."""

import json

import numpy as np
import pytest

import laid_eval
from laid_eval import ScriptedReader, UserError, measure_window
from laid_eval.report import plot

PLANTED = 40


def scripted(**planted):
    return ScriptedReader(location=np.log2(PLANTED), **planted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return measure_window(scripted(), "visual-which", out=tmp_path_factory.mktemp("run") / "a", max_length=150)


def test_a_planted_window_is_found(run):
    w = run.window("visual-which", "half")
    assert w.unit == "images"
    assert w.censored == "no"
    assert w.low < PLANTED < w.high
    assert w.octaves < 1
    assert str(w).split()[1] == "images"
    assert run.header.image.tokens == 1
    assert run.trials["length"].max() <= 150


def test_every_depth_is_asked_about(run):
    long = run.trials[run.trials["length"] > 20]
    counts = np.histogram(long["depth"], bins=4, range=(0, 1))[0]
    assert counts.min() > 0.1 * counts.sum()


@pytest.mark.parametrize("name", ["visual-haystack", "visual-all"])
def test_yes_and_no_take_longer_and_end_at_the_same_place(tmp_path, name):
    found = measure_window(scripted(), name, out=tmp_path / "b", max_length=150).window(name, "half")
    assert found.chance == 0.5
    assert found.low < PLANTED < found.high


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(run, tmp_path):
    again = tmp_path / "cut"
    again.mkdir()
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (again / "trials.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])
    header = json.loads((run.path / "run.json").read_text()) | {"status": "partial", "windows": [], "curves": []}
    (again / "run.json").write_text(json.dumps(header))
    done = measure_window(scripted(), "visual-which", out=again, max_length=150)
    assert done.windows == run.windows
    assert (again / "trials.jsonl").read_text() == "".join(lines)


def test_the_pictures_of_a_run_can_be_looked_at(run):
    figure = plot.haystack(run)
    texts = [t.get_text() for part in figure.subfigs for ax in part.axes for t in ax.texts]
    assert any("an object" in t or "Which object is in the same image" in t for t in texts)
    assert sum("right answer: " in t for t in texts) >= 2
    axes = plot.window(run)
    assert axes.get_xlabel() == "context length (images)"
    assert len(axes.child_axes) == 2


def test_of_a_run_about_text_there_are_none(tmp_path):
    text = measure_window(ScriptedReader(location=9), "needle", out=tmp_path / "t", max_length=1024)
    with pytest.raises(UserError, match="about text"):
        plot.haystack(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"probe": "visual-which", "haystack": ["x.txt"]}, "--haystack is filler text"),
        ({"probe": "visual-which", "why": True}, "--why explains windows in text"),
        ({"probe": ["visual-which", "needle"]}, "counted in tokens"),
        ({"probe": "visual-which", "max_length": 1}, "needs at least one octave, 8"),
        ({"probe": "visual-all", "min_length": 2}, "--min-length must be at least 3"),
        ({"probe": "visual-which", "min_length": 0}, "above 0 images"),
        ({"probe": "visual-wich"}, "did you mean 'visual-which'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, options, says):
    with pytest.raises(UserError) as caught:
        measure_window(scripted(), out=tmp_path / "x", **{"max_length": 60, **options})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_model_of_text_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"smollm2' \(llama\) takes no pictures"):
        laid_eval.measure_window("smollm2", "visual-which", out=tmp_path / "x", max_length=8)
    assert not (tmp_path / "x").exists()
