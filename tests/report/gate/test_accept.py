"""Renewing a baseline never loses one."""

import os

import pytest

from laid_eval.errors import UserError
from laid_eval.report.gate.accept import accept
from laid_eval.report.gate.verdicts import gate
from laid_eval.runs import load_run


def test_the_run_becomes_the_baseline_without_its_figures(planted, edited, tmp_path):
    run = edited("same")
    (run / "window.png").write_text("x")
    baseline = tmp_path / "deep" / "base"
    assert accept(run, baseline) == ["run.json", "trials.jsonl"]
    assert sorted(p.name for p in baseline.iterdir()) == ["run.json", "trials.jsonl"]
    assert load_run(baseline).trials.equals(load_run(run).trials)
    assert [p.name for p in baseline.parent.iterdir()] == ["base"]
    assert gate(run, baseline, ["window.* drop <= 0.25 octave"]).outcome == "pass"


def test_an_older_baseline_is_replaced_whole_and_notes_beside_it_stay(planted, edited):
    baseline, run = edited("base", "baseline"), edited("worse")
    (baseline / "README.md").write_text("why")
    (baseline / "samples.jsonl").write_text("of the old run")
    accept(run, baseline)
    assert sorted(p.name for p in baseline.iterdir()) == ["README.md", "run.json", "trials.jsonl"]
    assert load_run(baseline).trials.equals(load_run(run).trials)


def test_runs_of_several_commands_are_copied_each_to_its_folder(bench, edited, tmp_path):
    (tmp_path / "all").mkdir()
    edited("base", "all/windows")
    bench("all/scores", {"arc": [1.0, 0.0]})
    assert sorted(accept(tmp_path / "all", tmp_path / "kept")) == [
        "scores/run.json",
        "scores/samples.jsonl",
        "windows/run.json",
        "windows/trials.jsonl",
    ]


def test_a_failure_in_the_last_step_leaves_the_old_baseline(edited, monkeypatch):
    baseline, run = edited("base", "baseline"), edited("worse")
    before = (baseline / "trials.jsonl").read_text()
    replace = os.replace

    def fails(source, target):
        if ".new-" in str(source):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        accept(run, baseline)
    assert (baseline / "trials.jsonl").read_text() == before
    assert sorted(p.name for p in baseline.parent.iterdir()) == ["baseline", "run"]


def test_what_is_no_finished_run_is_refused_and_nothing_is_touched(planted, edited, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    good = edited("base", "good")
    with pytest.raises(UserError, match="is not a run folder"):
        accept(tmp_path / "notes", tmp_path / "baseline")
    with pytest.raises(UserError, match="is not a run folder"):
        accept(good, tmp_path / "notes")
    with pytest.raises(UserError, match="is not complete"):
        accept(edited("base", "part", status="partial"), tmp_path / "baseline")
    with pytest.raises(UserError, match="one folder contains the other"):
        accept(good, good / "baseline")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        accept(good, tmp_path / "file")
    assert not (tmp_path / "baseline").exists()
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "years of work"
