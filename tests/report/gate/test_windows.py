"""Windows in the gate: planted drops are found, pairs count, censored windows are bounds."""

import numpy as np
import pytest

from laid_eval.errors import UserError
from laid_eval.report.gate.evidence import Look
from laid_eval.report.gate.rules import parse_rule
from laid_eval.report.gate.verdicts import gate
from laid_eval.report.gate.windows import correlation, drop, side
from laid_eval.runs import load_run

RULE = parse_rule("window.needle drop <= 0.5 octave")
ONCE = Look(0.05)


@pytest.fixture(scope="module")
def sides(planted):
    return {name: side(load_run(planted / name), RULE, ONCE) for name in ("base", "same", "worse", "open")}


def test_a_planted_drop_of_an_octave_fails_and_a_rise_passes(planted):
    worse = gate(planted / "worse", planted / "base", [RULE.text]).verdicts[0]
    assert worse.outcome == "fail"
    assert worse.low < 1.0 < worse.high
    assert worse.low > 0.5
    assert worse.p_fail < 0.05 < worse.p_pass
    better = gate(planted / "base", planted / "worse", [RULE.text]).verdicts[0]
    assert better.outcome == "pass"
    assert better.change == pytest.approx(-worse.change, abs=0.05)


def test_a_run_against_itself_passes_but_is_not_certain_to_be_equal(planted):
    found = gate(planted / "base", planted / "base", ["window.needle drop <= 0.25 octave"]).verdicts[0]
    assert (found.outcome, found.change) == ("pass", 0.0)
    assert -0.2 < found.low < -0.005 < 0.005 < found.high < 0.2


def test_shared_questions_narrow_the_drop(sides):
    """The same answers under other ids are no pairs any more: the difference is that of two independent windows."""
    base, same = sides["base"], sides["same"]
    alone = drop(base, base, 0.5, ONCE)
    stripped = base.trials.assign(id="x" + base.trials["id"])
    apart = drop(base, type(base)(base.fit, stripped, base.criterion, base.estimate, base.seed), 0.5, ONCE)
    assert apart.pairs == 0
    assert alone.pairs == len(base.trials)
    assert (apart.high - apart.low) > 3 * (alone.high - alone.low)
    width = np.log2(base.estimate.high / base.estimate.low)
    assert apart.high - apart.low == pytest.approx(np.sqrt(2) * width, rel=0.1)
    assert drop(same, base, 0.5, ONCE).high < apart.high + 0.5


def test_correlation_is_that_of_the_answers_and_never_taken_high(sides):
    base = sides["base"]
    shared = base.trials.merge(base.trials, on="id", suffixes=("", "_baseline"))
    assert 0.9 < correlation(base, base, shared) < 1.0
    few = shared[shared["haystack"] < 2]
    assert correlation(base, base, few) < 0.6  # what only one run was asked moves that run alone
    rng = np.random.default_rng(0)
    mixed = base.trials.assign(score=rng.permutation(base.trials["score"].to_numpy()))
    other = type(base)(base.fit, mixed, base.criterion, base.estimate, base.seed)
    assert correlation(base, other, shared) < 0.3
    assert correlation(base, base, shared.iloc[:0]) == 0.0


def test_two_windows_beyond_the_longest_length_settle_no_drop_and_the_words_say_so(planted):
    found = gate(planted / "open", planted / "open", [RULE.text]).verdicts[0]
    assert (found.outcome, found.change, found.low, found.high) == ("inconclusive", None, None, None)
    assert found.more_clusters is None
    assert "is a bound, and no number of questions makes a drop of it" in found.sentence
    assert "--max-length" in found.sentence


def test_a_window_beyond_the_longest_length_still_says_at_least_so_much(planted):
    fallen = gate(planted / "base", planted / "open", [RULE.text]).verdicts[0]
    assert fallen.outcome == "fail"
    assert fallen.high is None
    risen = gate(planted / "open", planted / "base", [RULE.text]).verdicts[0]
    assert (risen.outcome, risen.low) == ("pass", None)
    long = gate(planted / "open", rules=["window.needle >= 16000", "window.needle >= 20000"]).verdicts
    assert [v.outcome for v in long] == ["pass", "inconclusive"]
    assert "beyond the longest tested length (16,384): measure with --max-length" in long[1].sentence
    short = gate(planted / "open", rules=["window.needle >= 100"]).verdicts[0]
    assert short.outcome == "pass"


def test_a_length_is_passed_failed_or_open_by_its_interval(planted):
    window = load_run(planted / "base").window()
    limits = [window.low * 0.9, window.length, window.high * 1.1]
    found = gate(planted / "base", rules=[f"window.needle >= {limit:.0f}" for limit in limits]).verdicts
    assert [v.outcome for v in found] == ["pass", "inconclusive", "fail"]
    assert found[0].low < found[0].change < found[0].high
    near = gate(planted / "base", rules=[f"window.needle >= {window.length * 0.9:.0f}"]).verdicts[0]
    assert near.outcome == "inconclusive"
    assert near.more_clusters > 0
    assert near.more_questions > near.more_clusters
    assert f"about {near.more_clusters:,} more haystacks" in near.sentence


def test_the_criterion_of_a_rule_is_used(planted):
    run = load_run(planted / "base")
    half = gate(planted / "base", rules=[f"window.needle@half >= {run.window().high:.0f}"]).verdicts[0]
    assert half.change == pytest.approx(run.window(criterion="half").length, rel=0.01)
    with pytest.raises(UserError, match=r"Unknown criterion 'hlaf' .did you mean 'half'"):
        gate(planted / "base", rules=["window.needle@hlaf >= 4000"])


def test_order_of_trials_does_not_matter(planted, edited):
    copy = edited("same")
    lines = (copy / "trials.jsonl").read_text().splitlines(keepends=True)
    (copy / "trials.jsonl").write_text("".join(reversed(lines)))
    one, other = (gate(f, planted / "base", [RULE.text]).verdicts[0] for f in (planted / "same", copy))
    assert (one.low, one.high, one.p_pass) == (other.low, other.high, other.p_pass)
