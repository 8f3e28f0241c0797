"""The gate as a whole: several rules, what may be compared, what may not, and where it runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import laid_eval
from laid_eval.errors import UserError
from laid_eval.records import ModelInfo
from laid_eval.report.gate.rules import read_rules
from laid_eval.report.gate.verdicts import assert_window, gate, holm
from laid_eval.spectra import Compared, Metric, SpectrumRun, SpectrumSettings, save_spectrum

ROOT = Path(__file__).parents[3]
DROP = "window.needle drop <= 0.5 octave"


def test_one_failed_rule_fails_the_gate_and_an_open_one_keeps_it_from_passing(planted):
    passing, failing, open_ = "window.needle >= 1000", "window.needle >= 9000", "window.needle >= 3700"
    assert gate(planted / "base", rules=[passing]).outcome == "pass"
    assert gate(planted / "base", rules=[passing, open_]).outcome == "inconclusive"
    assert gate(planted / "base", rules=[passing, open_, failing]).outcome == "fail"


def test_several_rules_need_stronger_evidence_to_fail_and_no_more_to_pass(planted):
    window = laid_eval.load_run(planted / "base").window()
    rule = f"window.needle >= {window.high * 1.005:.0f}"
    alone = gate(planted / "base", rules=[rule]).verdicts[0]
    many = gate(planted / "base", rules=[rule, *(f"window.needle >= {k}" for k in range(1000, 1009))]).verdicts
    assert alone.outcome == "fail"
    assert many[0].outcome == "inconclusive"
    assert many[0].p_fail == pytest.approx(10 * alone.p_fail)
    assert all(v.outcome == "pass" for v in many[1:])


def test_holm_agrees_with_its_definition_step_by_step():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = list(rng.random(6) ** 3)
        rejected, left = set(), sorted(range(6), key=lambda i: p[i])
        for k, i in enumerate(left):
            if p[i] > 0.05 / (6 - k):
                break
            rejected.add(i)
        assert {i for i, q in enumerate(holm(p)) if q <= 0.05} == rejected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"probes": ["needle", "extra"], "seed": 1}}, "settings.seed is 1 in .* and 0 in the baseline"),
        ({"settings": {"probe_hashes": {"needle": "new"}}}, "settings.probe_hashes.needle is 'new'"),
        ({"settings": {"max_length": 32768}}, "settings.max_length is 32768"),
        ({"settings": {"haystack_hash": "other"}}, "settings.haystack_hash is 'other'"),
        ({"settings": {"criterion": "half"}}, "settings.criterion is 'half'"),
    ],
)
def test_what_was_asked_otherwise_is_not_compared_and_the_field_is_named(planted, edited, changes, message):
    run = edited("base", **changes)
    with pytest.raises(UserError, match=f"not comparable: {message}"):
        gate(run, planted / "base", [DROP])


def test_what_only_says_when_to_stop_may_differ_and_so_may_the_criterion_if_the_rule_names_one(planted, edited):
    run = edited("base", settings={"precision": 0.1, "budget": 7, "criterion": "half"})
    assert gate(run, planted / "base", ["window.needle@relative drop <= 0.5 octave"]).outcome == "pass"


def test_a_run_that_is_not_finished_is_refused_unless_it_is_looked_at_as_it_grows(planted, edited):
    run = edited("base", status="partial")
    with pytest.raises(UserError, match=r"is not complete .status partial.*--sequential"):
        gate(run, planted / "base", [DROP])
    assert gate(run, planted / "base", [DROP], sequential=True).outcome == "pass"
    with pytest.raises(UserError, match="status failed"):
        gate(edited("base", "other", status="failed"), planted / "base", [DROP], sequential=True)


def test_a_growing_run_is_open_at_first_and_then_settled(planted, edited):
    run = edited("worse", status="partial")
    lines = (run / "trials.jsonl").read_text().splitlines(keepends=True)
    outcomes = []
    for haystacks in (4, 7, 14):
        (run / "trials.jsonl").write_text("".join(lines[: haystacks * 13 * 4]))
        found = gate(run, planted / "base", ["window.needle drop <= 0.2 octave"], sequential=True).verdicts[0]
        outcomes.append(found.outcome)
        if haystacks < 8:
            assert "the first verdict is given at 8 haystacks, so far there are" in found.sentence
    assert outcomes == ["inconclusive", "inconclusive", "fail"]


@pytest.mark.parametrize(
    ("rules", "baseline", "message"),
    [
        ([], None, "No rules. Pass one"),
        ([DROP], None, "name its folder with --baseline"),
        (["window.nedle >= 100"], None, "holds no probe 'nedle' .did you mean 'needle'"),
        (["score.arc >= 0.5"], None, "asks for a score; .* holds: window"),
        (["spectrum.d50 >= 5"], None, "asks for a spectrum"),
        (["cost.prefil_tokens <= 5"], None, "no cost is called 'prefil_tokens' .did you mean 'prefill_tokens'"),
        ([DROP], "nowhere", "is not a run folder: it holds no run.json"),
    ],
)
def test_bad_input_gets_one_line(planted, rules, baseline, message):
    with pytest.raises(UserError, match=message) as error:
        gate(planted / "base", baseline and planted / baseline, rules)
    assert "\n" not in str(error.value)


def test_costs_are_plain_numbers_and_an_unknown_one_settles_nothing(planted):
    limits = ["cost.prefill_tokens <= 50000", "cost.prefill_tokens <= 49999", "cost.peak_memory_bytes <= 10"]
    found = gate(planted / "base", rules=limits).verdicts
    assert [v.outcome for v in found] == ["pass", "fail", "inconclusive"]
    assert "does not know it" in found[2].sentence


def test_a_folder_of_runs_is_held_against_rules_of_every_kind(planted, bench, tmp_path):
    bench("all/scores", {"arc": [1.0, 0.0] * 40})
    (tmp_path / "all" / "windows").symlink_to(planted / "base")
    found = gate(tmp_path / "all", rules=["window.needle >= 1000", "score.* >= 0.1"])
    assert found.outcome == "pass"
    assert [v.rule for v in found.verdicts] == ["window.needle >= 1000", "score.arc >= 0.1"]
    (tmp_path / "all" / "more").symlink_to(planted / "same")
    with pytest.raises(UserError, match="holds two window runs"):
        gate(tmp_path / "all", rules=["window.needle >= 1000"])


def spectrum_run(folder, texts=8, comparison=(), interval=True):
    settings = SpectrumSettings(
        length=1024,
        texts=texts,
        queries=8,
        haystack="h",
        haystack_hash="h",
        confidence=0.95,
        seed=0,
        knockout="no",
        what_if=(),
    )
    ends = {"low": 200.0, "high": 300.0} if interval else {}
    metric = Metric(name="d50", unit="tokens", definition="d", value=250.0, **ends)
    model = ModelInfo(name="m", source="s")
    folder.mkdir()
    run = SpectrumRun(created="", status="complete", model=model, settings=settings, environment={}, metrics=(metric,))
    save_spectrum(folder, run.model_copy(update={"comparison": comparison}))
    return folder


def test_spectra_are_held_against_limits_by_their_interval_over_texts(tmp_path):
    kept = Compared(
        name="low_frequency_energy", unit="0..1", definition="d", value=0.95, low=0.93, high=0.97, floor=None, p=None
    )
    run = spectrum_run(tmp_path / "s", comparison=(kept,))
    rules = ["spectrum.low_frequency_preservation >= 0.9", "spectrum.d50 >= 240", "spectrum.d50 <= 150"]
    found = gate(run, rules=rules).verdicts
    assert [v.outcome for v in found] == ["pass", "inconclusive", "fail"]
    edge = gate(run, rules=["spectrum.d50 <= 300"]).verdicts[0]
    assert edge.p_pass == pytest.approx(0.025, abs=1e-6)  # the upper end of a 95% interval
    with pytest.raises(UserError, match=r"holds no measure 'd5' .did you mean 'd50'"):
        gate(run, rules=["spectrum.d5 >= 3"])
    alone = gate(spectrum_run(tmp_path / "one", 1, interval=False), rules=["spectrum.d50 >= 3"]).verdicts[0]
    assert alone.outcome == "inconclusive"
    assert "one text has no interval" in alone.sentence


def test_assert_window_is_for_tests_of_others(planted):
    assert assert_window(planted / "base", at_least=1000, probe="needle").outcome == "pass"
    assert assert_window(laid_eval.load_run(planted / "base"), at_least=1000).run == str(planted / "base")
    with pytest.raises(AssertionError, match=r"window.needle is .* less than 9,000 tokens"):
        assert_window(planted / "base", at_least=9000)
    with pytest.raises(AssertionError, match=r"not settled whether at least 3,700 tokens.* more haystacks"):
        assert_window(planted / "base", at_least=3700)
    with pytest.raises(UserError, match="holds no probe 'multikey'"):
        assert_window(planted / "base", at_least=100, probe="multikey")


def test_the_gate_runs_where_torch_is_not_installed(planted, tmp_path):
    for name in ("torch", "transformers", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from laid_eval.cli import main
sys.argv = ["laid-eval", "gate", {str(planted / "base")!r}, "--baseline", {str(planted / "base")!r}, "--rule", {DROP!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "gate: pass" in done.stdout) == (0, True), done.stderr


def test_the_example_rules_judge_the_committed_run():
    run = ROOT / "reports" / "smollm2-window"
    declared = read_rules(ROOT / "benchmarks" / "suites" / "gate.toml")
    found = gate(run, run, declared.rules, alpha=declared.alpha)
    assert found.outcome == "pass"
    assert json.loads(found.model_dump_json())["verdicts"][0]["change"] == 0.0
    assert [v.outcome for v in found.verdicts] == ["pass"] * 3
