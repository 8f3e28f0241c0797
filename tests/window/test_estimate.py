"""The estimate: plant and recover, invariances, censoring, the fallback."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid_eval.errors import UserError
from laid_eval.window.curve import Criterion, crossing, marginal_width, parse_criterion, score_at
from laid_eval.window.estimate import estimate_window, fit_trials, windows_of
from laid_eval.window.posterior import cells, posterior

LENGTHS = [2.0**k for k in np.arange(8, 14.01, 0.5)]


def simulate(t, w=0.3, r=1.0, chance=0.125, haystacks=12, n=6, spread=0.0, seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    rows = []
    for h in range(haystacks):
        shift = spread * rng.normal()
        for length in lengths:
            p = score_at(np.log2(length), np.array(t + shift), np.array(w), np.array(r), chance)
            rows += [(length, float(rng.random() < p), chance, h) for _ in range(n)]
    return pd.DataFrame(rows, columns=["length", "score", "chance", "haystack"])


@pytest.mark.parametrize("name", ["relative", "half", "absolute:0.7", "chance"])
def test_a_planted_window_is_recovered_under_every_criterion(name):
    """Calibration proper is the self-check; here the four criteria, on ten data sets each."""
    rule = parse_criterion(name)
    truth = 2 ** float(crossing(rule, np.array(12.5), np.array(0.3), np.array(0.95), 0.125, 8.0))
    found = [estimate_window(simulate(12.5, r=0.95, haystacks=20, seed=seed), name) for seed in range(10)]
    assert sum(w.low < truth < w.high for w in found) >= 8
    assert np.median([abs(np.log2(w.length / truth)) for w in found]) < 0.1
    assert all(w.method == "posterior" and w.censored == "no" for w in found)
    assert np.mean([w.base_score for w in found]) == pytest.approx(0.125 + 0.95 * 0.875, abs=0.02)


def test_the_anchored_criterion_refers_to_another_models_base():
    table = simulate(12.0, r=0.9, haystacks=40)
    own = estimate_window(table, Criterion(name="relative", value=0.7))
    same = estimate_window(table, Criterion(name="anchored", value=0.7, anchor=0.9))
    assert abs(np.log2(own.length / same.length)) < 0.1
    higher = estimate_window(table, Criterion(name="anchored", value=0.7, anchor=1.0))
    assert higher.length < same.length


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 8, 1024]))
def test_the_estimate_scales_with_the_lengths(seed, factor):
    """Images or tokens, thousands or millions: only ratios of lengths matter."""
    table = simulate(11.0, seed=seed, haystacks=6)
    one = estimate_window(table)
    many = estimate_window(table.assign(length=table["length"] * factor))
    assert many.length == pytest.approx(one.length * factor, rel=0.02)
    assert many.high == pytest.approx(one.high * factor, rel=0.03)


def test_order_of_rows_and_names_of_haystacks_do_not_matter():
    table = simulate(11.5, spread=0.2)
    mixed = table.sample(frac=1, random_state=3).assign(haystack=lambda d: "h" + d["haystack"].astype(str))
    a, b = estimate_window(table), estimate_window(mixed)
    assert (a.length, a.low, a.high) == pytest.approx((b.length, b.low, b.high), rel=1e-9)


def test_the_same_input_gives_the_same_estimate_whatever_the_global_seed():
    table = simulate(11.5, spread=0.2)
    np.random.seed(1)  # noqa: NPY002  the point: global state must not matter
    first = windows_of(fit_trials(table), ["relative", "half"])
    np.random.seed(2)  # noqa: NPY002
    assert windows_of(fit_trials(table), ["relative", "half"]) == first


def test_more_haystacks_narrow_the_interval_and_more_confidence_widens_it():
    few, many = simulate(12, haystacks=8), simulate(12, haystacks=64)
    assert estimate_window(many).octaves < 0.6 * estimate_window(few).octaves
    assert estimate_window(few, confidence=0.99).octaves > estimate_window(few, confidence=0.8).octaves


def test_haystacks_count_as_clusters():
    """Repeating each haystack's answers four times adds no haystack, so it must hardly narrow the interval."""
    table = simulate(12, spread=0.5, haystacks=10)
    copied = pd.concat([table] * 4)
    independent = copied.assign(haystack=range(len(copied)))
    assert estimate_window(copied).octaves > 1.3 * estimate_window(independent).octaves
    assert estimate_window(copied).design_effect > 2
    assert estimate_window(simulate(12, haystacks=40)).design_effect < 1.5


def test_censoring_is_said_in_words_and_never_a_number():
    above = estimate_window(simulate(20))
    assert (above.censored, above.length, above.high) == ("above", None, None)
    assert above.low <= 16384
    assert "256" not in above.interval_text()
    assert above.value_text() == ">16,384"
    below = estimate_window(simulate(5, r=1.0), "half")
    assert (below.censored, below.length, below.low) == ("below", None, None)
    assert below.value_text() == "<256"
    edge = estimate_window(simulate(14.2, w=0.4, haystacks=4))
    assert edge.high is None
    assert ">16,384]" in edge.interval_text()


def test_a_model_at_chance_has_no_window():
    table = simulate(12, r=0.0)
    estimate = estimate_window(table)
    assert (estimate.censored, estimate.length, estimate.low, estimate.high) == ("below", None, None, 256)
    assert estimate.interval_text() == "[<256, 256]"
    assert "can't be told from chance" in estimate.method


def test_curves_of_another_shape_fall_back_to_isotonic_and_say_so():
    rows = []
    rng = np.random.default_rng(0)
    for h in range(20):
        for length in LENGTHS:
            p = 0.2 if length < 700 else 0.95 if length < 6000 else 0.15  # U-shaped at tiny lengths
            rows += [(length, float(rng.random() < p), 0.125, h) for _ in range(6)]
    estimate = estimate_window(pd.DataFrame(rows, columns=["length", "score", "chance", "haystack"]))
    assert estimate.method.startswith("isotonic: the scores do not follow")
    good = simulate(12, haystacks=20)
    assert estimate_window(good).method == "posterior"


def test_isotonic_recovers_a_plant_too():
    from laid_eval.window import isotonic

    table = simulate(11.7, w=0.3, haystacks=60, n=10)
    found = isotonic.crossings(cells(table), Criterion(name="half", value=0.5), seed=0)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    assert low < 11.7 < high
    assert high - low < 0.5


def test_yes_no_tasks_reach_the_chance_criterion_only_by_the_free_curve():
    estimate = estimate_window(simulate(11, chance=0.5, haystacks=20), "chance")
    assert "isotonic: the fitted curve never falls to its own chance level" in estimate.method


def test_failed_trials_count_neither_as_right_nor_as_wrong():
    table = simulate(12)
    failed = table.copy()
    failed.loc[failed.index[::5], "score"] = None
    estimate = estimate_window(failed)
    dropped = estimate_window(table.drop(table.index[::5]))
    assert (estimate.length, estimate.low) == (dropped.length, dropped.low)
    assert estimate.failed_trials == len(table.index[::5])
    assert estimate.trials + estimate.failed_trials == len(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.drop(columns="chance"),
            r"lack the column\(s\) chance; needed are length, score, chance, haystack",
        ),
        (lambda t: t.assign(score=2.0), r"Column 'score' must lie between 0 and 1"),
        (lambda t: t.assign(length=0), r"Column 'length' must lie between 1 and inf"),
        (lambda t: t.head(5), r"at least 8 valid trials at 2 lengths; given were 5 trials at 1"),
        (lambda t: t.assign(chance=[0.1, 0.2] * (len(t) // 2)), r"mix chance levels"),
        (lambda t: t.assign(chance=1.0), r"Column 'chance' must lie between 0 and 0.99"),
        (lambda t: t.assign(probe=["a", "b"] * (len(t) // 2)), r"are of several probes \(a, b\)"),
    ],
)
def test_tables_that_cannot_be_estimated(change, message):
    with pytest.raises(UserError, match=message):
        estimate_window(change(simulate(12)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relatve", r"Unknown criterion 'relatve' \(did you mean 'relative'\?\)\. Allowed: relative, half, absolute, chance, anchored\."),
        ("half:2", r"the value must be a number above 0 and at most 1"),
        ("half:x", r"the value must be a number"),
        ("anchored", r"pass the run folder of that model with --anchor"),
    ],
)  # fmt: skip
def test_criteria_that_are_not_understood(text, message):
    with pytest.raises(UserError, match=message):
        parse_criterion(text)


def test_the_crossing_is_where_the_curve_meets_the_level():
    t, w, r = np.array(12.0), np.array(0.4), np.array(0.9)
    x = crossing(Criterion(name="absolute", value=0.6), t, w, r, 0.125, 8.0)
    assert score_at(x, t, w, r, 0.125) == pytest.approx(0.6)
    base = score_at(np.array(8.0), t, w, r, 0.125) - 0.125
    x = crossing(Criterion(name="relative", value=0.85), t, w, r, 0.125, 8.0)
    assert score_at(x, t, w, r, 0.125) - 0.125 == pytest.approx(0.85 * base)
    assert crossing(Criterion(name="absolute", value=0.95), t, w, r, 0.125, 8.0) == -np.inf
    assert crossing(Criterion(name="absolute", value=0.1), t, w, r, 0.125, 8.0) == np.inf


def test_the_marginal_width_is_that_of_the_averaged_curve():
    """Against a slow plain reference: the average over many shifted curves."""
    shifts = np.random.default_rng(0).normal(size=20000) * 0.5
    x = np.linspace(9, 15, 40)
    averaged = score_at(x[:, None], 12 + shifts[None], np.array(0.25), np.array(1.0), 0.0).mean(axis=1)
    width = marginal_width(np.array(0.25), np.array(0.5))
    assert np.abs(score_at(x, np.array(12.0), width, np.array(1.0), 0.0) - averaged).max() < 0.015


def test_the_grid_posterior_agrees_with_a_slow_plain_reference():
    """Independent questions, known width and ceiling: the posterior of t by brute force."""
    table = simulate(12, w=0.3, haystacks=30, n=6, seed=4)
    fit = posterior(cells(table))
    t = np.linspace(10, 14, 2001)
    x = np.log2(table["length"].to_numpy())
    right = table["score"].to_numpy()
    p = np.clip(score_at(x[None], t[:, None], np.array(0.3), np.array(1.0), 0.125), 1e-9, 1 - 1e-9)
    log = (right * np.log(p) + (1 - right) * np.log1p(-p)).sum(axis=1)
    mass = np.exp(log - log.max())
    mean = (t * mass).sum() / mass.sum()
    assert float(fit.weight @ fit.t) == pytest.approx(mean, abs=0.08)
