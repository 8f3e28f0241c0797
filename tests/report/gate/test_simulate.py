"""The promises of the gate, in simulation. At full size: laid-eval gate --self-check."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from laid_eval.report.gate.evidence import further
from laid_eval.report.gate.sequential import anytime, betting_p, once
from laid_eval.report.gate.simulate import PLANS, Errors, simulate

# Scores are cheap, so at a size that tells 5% from 15%; of windows, which take the fit of two curves each, the hardest.
WINDOWS = (
    "windows, drop at the limit, haystacks differ",
    "windows, drop at the limit, 8 haystacks, answers alike",
    "power: windows, no drop, haystacks differ",
)
TIMES = {p.name: 40 for p in PLANS if p.subject == "score" and not p.sequential} | dict.fromkeys(WINDOWS, 8)


@pytest.mark.parametrize("plan", [p for p in PLANS if p.name in TIMES], ids=lambda p: p.name)
def test_the_gate_errs_no_more_than_it_promises(plan):
    found = simulate(plan, TIMES[plan.name], seed=7)
    assert found.in_bounds, found


@pytest.mark.parametrize("plan", [p for p in PLANS if p.sequential], ids=lambda p: p.subject)
def test_looking_again_and_again_errs_no_more(plan):
    """Two looks; the whole plan is run by the self-check."""
    clusters = 10 if plan.subject == "window" else 40
    assert simulate(replace(plan, clusters=clusters), 3, seed=7).in_bounds


def test_the_check_can_fail():
    assert Errors("", 1000, failed=45, passed=55, bound="fail and pass <= 5%").in_bounds
    assert not Errors("", 1000, failed=80, passed=0, bound="fail <= 5%").in_bounds
    assert not Errors("", 1000, failed=0, passed=80, bound="fail and pass <= 5%").in_bounds
    assert not Errors("", 1000, failed=0, passed=750, bound="pass >= 80%").in_bounds


def test_sizes_are_those_of_the_textbook():
    """Non-inferiority of paired answers, 80% power, one-sided 5%: 771 pairs for 2 points where 5% differ."""
    n = 100
    more, questions = further(n, n, np.sqrt(0.05 / n), 0.02, 0.05)
    assert n + more == pytest.approx(0.05 * (norm.isf(0.05) + norm.isf(0.2)) ** 2 / 0.02**2, abs=1)
    assert n + more == pytest.approx(771, abs=3)
    assert questions == more
    assert further(10, 400, 0.1, 0.0, 0.05) is None
    assert further(10, 400, 0.1, 0.001, 0.05) is None
    assert further(10, 400, float("inf"), 0.1, 0.05) is None


def test_looking_again_and_again_costs_a_wider_interval_and_inverts_exactly():
    for n in (8, 24, 100):
        assert once(0.05, n) < 0.01
        assert anytime(once(0.05, n), n) == pytest.approx(0.05, rel=1e-6)
    assert anytime(0.6, 24) == 1.0
    assert anytime(0.03, 24) > 0.05


def test_a_random_walk_crosses_the_anytime_bound_at_most_as_often_as_promised():
    """The same walk looked at as if once is stopped several times as often."""
    rng = np.random.default_rng(3)
    steps = np.arange(8, 400)
    z = np.cumsum(rng.normal(size=(1000, 400)), axis=1)[:, steps - 1] / np.sqrt(steps)
    bound = norm.isf([once(0.05, int(n)) for n in steps])
    assert (z > bound).any(axis=1).mean() <= 0.05
    assert (z > norm.isf(0.05)).any(axis=1).mean() > 0.2


def test_betting_holds_for_skewed_scores_and_gains_on_a_true_difference():
    rng = np.random.default_rng(5)
    rare = -(rng.random((200, 300)) < 0.02).astype(float)  # the mean is -0.02, by few and large losses
    crossed = [
        min(betting_p(row[:n], -1.0, 1.0, -0.02, above=True) for n in range(10, 300, 10)) <= 0.05 for row in rare
    ]
    assert np.mean(crossed) <= 0.05
    assert betting_p(np.zeros(300), -1.0, 1.0, -0.02, above=True) < 0.05  # exp(-6) by luck
    assert betting_p(np.zeros(100), -1.0, 1.0, -0.02, above=True) > 0.05  # exp(-2)
    assert betting_p(np.ones(5), 0.0, 1.0, 1.0, above=False) == 1.0
