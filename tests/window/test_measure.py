"""The measurement from end to end on readers with planted windows."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from laid_eval import ScriptedReader, UserError, estimate_window, load_run, measure_window
from laid_eval.window.calibrate import FAMILIES, Family, calibrate, planted_window
from laid_eval.window.plan import at_chance, coarse_cuts, length_grid
from laid_eval.window.reading import _chunks

READER = ScriptedReader(location=11.5, width=0.3, spread=0.1)
OPTIONS = {"max_length": 8192, "budget": 40_000, "precision": 0.3}


def without_times(run):
    header = run.header.model_dump(mode="json")
    header["created"] = header["cost"]["seconds"] = None
    return header


def test_a_planted_window_is_measured_within_its_interval(tmp_path):
    run = measure_window(READER, out=tmp_path / "run", **OPTIONS)
    window = run.window()
    truth = 2 ** planted_window(READER, 8, 256)
    assert window.low < truth < window.high
    assert window.censored == "no"
    assert run.header.status == "complete"
    assert {w.criterion.split()[0] for w in run.windows} == {"relative", "half", "absolute", "chance"}
    assert run.header.stopped["needle"].startswith("the interval is") or "of the budget" in run.header.stopped["needle"]


def test_the_estimate_of_a_run_is_that_of_its_trials(tmp_path):
    run = measure_window(READER, out=tmp_path / "run", **OPTIONS)
    again = estimate_window(run.trials, probe="needle")
    assert again == run.window()


def test_a_smaller_budget_leaves_a_finished_run_as_it_is(tmp_path):
    first = measure_window(READER, out=tmp_path / "run", **OPTIONS)
    again = measure_window(READER, out=tmp_path / "run", **{**OPTIONS, "budget": 9000, "precision": 0.5})
    assert again.header == first.header


def test_a_criterion_of_ones_own_can_be_looked_up_and_anchored_to(tmp_path):
    run = measure_window(READER, out=tmp_path / "run", criterion="relative:0.9", **OPTIONS)
    assert run.window().criterion == "relative 0.9"
    assert run.window(criterion="relative:0.85").criterion == "relative 0.85"
    assert run.window(criterion="relative:0.85").length > run.window().length
    measure_window(READER, out=tmp_path / "b", criterion="anchored", anchor=run.path, **OPTIONS)


def test_readers_that_cannot_be_forked_are_counted_and_stopped_by_what_they_really_read(tmp_path):
    class Whole(ScriptedReader):
        @property
        def info(self):
            return super().info.model_copy(update={"fan_out": "whole prompts: to test"})

        def pass_tokens(self, question, read):
            return read + self.question_tokens(question)

    reader = Whole(location=10.5, width=0.3)
    run = measure_window(reader, out=tmp_path / "run", max_length=4096)
    cost = run.header.cost
    assert cost.prefill_tokens == 0
    assert cost.question_tokens == cost.whole_prompt_tokens
    assert run.header.settings.budget == 8 * 6 * 4096
    assert cost.question_tokens < run.header.settings.budget
    assert run.window().haystacks >= 3
    assert any("asked with whole prompts: to test" in note for note in run.header.notes)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.45, 0.9])
def test_a_killed_run_resumes_to_the_same_result_bit_for_bit(tmp_path, share):
    whole = measure_window(READER, out=tmp_path / "whole", **OPTIONS)
    broken = tmp_path / "broken"
    shutil.copytree(whole.path, broken)
    lines = (broken / "trials.jsonl").read_bytes()
    (broken / "trials.jsonl").write_bytes(lines[: int(len(lines) * share)])  # usually tears a line
    header = json.loads((broken / "run.json").read_text())
    header |= {"status": "partial", "windows": [], "curves": [], "stopped": None}
    (broken / "run.json").write_text(json.dumps(header))
    resumed = measure_window(READER, out=broken, **OPTIONS)
    assert without_times(resumed) == without_times(whole)
    assert sorted((broken / "trials.jsonl").read_text().splitlines()) == sorted(lines.decode().splitlines())


def test_a_run_interrupted_in_the_middle_keeps_its_trials_and_resumes(tmp_path):
    whole = measure_window(READER, out=tmp_path / "whole", **OPTIONS)
    steps = 0

    def interrupt(step):
        nonlocal steps
        steps += 1
        if steps == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_window(READER, out=tmp_path / "cut", progress=interrupt, **OPTIONS)
    kept = load_run(tmp_path / "cut")
    assert kept.header.status == "partial"
    assert len(kept.trials) > 0
    assert kept.windows, "the estimate so far is kept too"
    assert without_times(measure_window(READER, out=tmp_path / "cut", **OPTIONS)) == without_times(whole)


def test_a_finished_run_is_not_measured_again(tmp_path):
    first = measure_window(READER, out=tmp_path / "run", **OPTIONS)
    calls = []
    again = measure_window(READER, out=tmp_path / "run", progress=calls.append, **OPTIONS)
    assert not calls
    assert again.header == first.header


def test_a_larger_budget_carries_a_finished_run_on(tmp_path):
    first = measure_window(READER, out=tmp_path / "run", **{**OPTIONS, "budget": 16384})
    more = measure_window(READER, out=tmp_path / "run", **{**OPTIONS, "precision": 0.1, "budget": 80_000})
    assert len(more.trials) > len(first.trials)
    assert set(first.trials["id"]) <= set(more.trials["id"])
    assert more.window().octaves < first.window().octaves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"holds a run with settings\.seed = 0, asked was 1\. Give the same options"),
        ({"max_length": 4096}, r"settings\.max_length = 8192, asked was 4096"),
        ({"probe": "multikey"}, r"settings\.probes = \('needle',\), asked was \('multikey',\)"),
    ],
)
def test_another_run_in_the_folder_is_not_mixed_with(tmp_path, change, message):
    measure_window(READER, out=tmp_path / "run", **OPTIONS)
    with pytest.raises(UserError, match=message):
        measure_window(READER, out=tmp_path / "run", **{**OPTIONS, **change})


def test_the_budget_is_kept_and_shared_by_the_probes(tmp_path):
    reader = ScriptedReader(location=11.5, width=0.5)
    run = measure_window(
        reader,
        ["needle", "multikey", "aggregate"],
        out=tmp_path / "run",
        max_length=8192,
        budget=90_000,
        precision=0.01,
    )
    cost = run.header.cost
    assert cost.prefill_tokens + cost.question_tokens < 90_000 * 1.2
    assert set(run.header.stopped.values()) == {"what is left of the budget does not reach through another text"}
    assert {w.probe for w in run.windows} == {"needle", "multikey", "aggregate"}
    assert cost.whole_prompt_tokens > 8 * (cost.prefill_tokens + cost.question_tokens)


def test_a_model_at_chance_is_not_read_to_the_end(tmp_path):
    run = measure_window(ScriptedReader(location=2.0), out=tmp_path / "run", max_length=65536)
    assert run.window().censored == "below"
    assert run.header.cost.prefill_tokens < 65536
    assert run.trials["length"].max() <= 65536 / 4


def test_a_window_beyond_the_longest_length_is_censored_above(tmp_path):
    run = measure_window(ScriptedReader(location=20.0), out=tmp_path / "run", max_length=4096)
    window = run.window()
    assert (window.censored, window.length, window.high) == ("above", None, None)
    assert window.value_text() == ">4,096"


def test_depth_bias_shows_in_the_trials(tmp_path):
    run = measure_window(
        ScriptedReader(location=11.5, depth_bias=3.0, lapse=0.0),
        out=tmp_path / "run",
        max_length=8192,
        budget=120_000,
        precision=0.01,
    )
    far = run.trials[run.trials["length"] > 2048]
    assert far[far["depth"] > 0.7]["score"].mean() > far[far["depth"] < 0.3]["score"].mean() + 0.3


def test_answers_that_are_not_finite_are_failed_trials(tmp_path):
    class Broken(ScriptedReader):
        def _answer(self, asked):
            logs = super()._answer(asked)
            return [float("nan")] * len(logs) if asked.haystack == 1 else logs

    run = measure_window(Broken(location=11.5), out=tmp_path / "run", **OPTIONS)
    failed = run.trials[run.trials["score"].isna()]
    assert set(failed["haystack"]) == {1}
    assert failed["error"].eq("the model gave a log-probability that is not finite").all()
    assert run.window().failed_trials == len(failed) > 0
    assert any("failed and count neither as right nor as wrong" in note for note in run.header.notes)


def test_trials_do_not_depend_on_what_else_is_measured(tmp_path):
    """Equal seeds give equal questions to any two runs: the pairing that comparisons need."""
    alone = measure_window(READER, "multikey", out=tmp_path / "a", **OPTIONS).trials
    among = measure_window(READER, ["needle", "multikey"], out=tmp_path / "b", **{**OPTIONS, "budget": 80_000}).trials
    shared = alone.merge(among, on="id", suffixes=("", "_b"))
    assert len(shared) > 50
    assert (shared["answer"] == shared["answer_b"]).all()
    assert (shared["score"] == shared["score_b"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 300},
            r"--max-length 300 is too short: probe 'needle' starts at 256 tokens and needs at least one octave, 512",
        ),
        ({"max_length": 8192, "budget": 10}, r"--budget 10 does not reach the longest context once \(8192 tokens\)"),
        ({"confidence": 1.5}, r"--confidence must lie between 0 and 1, got 1\.5"),
        ({"precision": 0}, r"--precision must lie between 0 and 100 octaves, got 0"),
        ({"seed": -1}, r"--seed must lie between 0 and 4294967295, got -1"),
        ({"criterion": "anchored"}, r"pass the run folder of that model with --anchor"),
        (
            {"min_length": 64},
            r"A context of 64 tokens leaves no room for text: the frame and the question of probe 'needle' take",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        measure_window(READER, out=tmp_path / "run", **options)


def test_an_anchor_is_the_base_score_of_another_run(tmp_path):
    strong = measure_window(ScriptedReader(location=11.5, lapse=0.0), out=tmp_path / "strong", **OPTIONS)
    weak = measure_window(
        ScriptedReader(location=11.5, lapse=0.1),
        out=tmp_path / "weak",
        criterion="anchored",
        anchor=strong.path,
        **OPTIONS,
    )
    own, anchored = weak.window(criterion="relative"), weak.window()
    assert anchored.criterion == "anchored 0.85"
    assert anchored.length < own.length
    with pytest.raises(UserError, match=r"holds no estimate for probe 'multikey'"):
        measure_window(READER, "multikey", out=tmp_path / "x", criterion="anchored", anchor=strong.path, **OPTIONS)


def test_lengths_and_chunks():
    grid = length_grid(256, 12288)
    assert (grid[0], grid[-1]) == (256, 12288)
    assert all(1.05 < b / a < 1.6 for a, b in pairwise(grid))
    assert {*coarse_cuts(grid, 0), *coarse_cuts(grid, 1)} <= set(grid)
    assert coarse_cuts(grid, 0)[-1] == 12288
    assert _chunks([5, 12], 4) == [(0, 4), (4, 5), (5, 9), (9, 12)]


def test_at_chance_needs_six_answers(tmp_path):
    import pandas as pd

    assert not at_chance(pd.DataFrame({"score": [0.0] * 5, "chance": 0.125}))
    assert at_chance(pd.DataFrame({"score": [0.0] * 6, "chance": 0.125}))
    assert not at_chance(pd.DataFrame({"score": [1.0] * 3 + [0.0] * 3, "chance": 0.125}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["typical", "yes/no", "haystacks differ"])
def test_intervals_cover_the_plant(name):
    """A short form of `laid-eval window --self-check`, whose 300 runs of ten families are in benchmarks/results."""
    family = next(f for f in FAMILIES if f.name == name)
    result = calibrate(family, runs=24, trials=400, seed=1000)
    assert result.coverage >= 0.83  # 20 of 24; 0.6% of the time below that if the true coverage is 95%
    assert result.median_error < result.error_bound * 1.3


def test_the_calibration_can_fail(monkeypatch):
    """Against a plant that is not there it must say so."""
    family = Family("moved", ScriptedReader(location=12.0, width=0.3))
    monkeypatch.setattr("laid_eval.window.calibrate.planted_window", lambda *args: planted_window(*args) + 0.7)
    result = calibrate(family, runs=10, trials=200)
    assert result.coverage < 0.5
    assert not result.in_bounds


def test_the_default_folder_is_named_after_command_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = measure_window(READER, **OPTIONS)
    assert run.path.parent == Path("runs")
    assert "-window-scripted-" in run.path.name
