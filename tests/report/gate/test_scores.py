"""Scores in the gate: pairs, clusters, small numbers."""

import numpy as np
import pytest
from scipy.stats import norm

from laid_eval.errors import UserError
from laid_eval.report.gate.verdicts import gate


def answers(n, share, seed=0):
    return list((np.random.default_rng(seed).permutation(n) < share * n).astype(float))


def flipped(scores, count):
    """The first `count` right answers made wrong."""
    right = [i for i, s in enumerate(scores) if s == 1][:count]
    return [0.0 if i in right else s for i, s in enumerate(scores)]


def judge(bench, run, base, rule="score.arc drop <= 2 points", **options):
    a, b = bench("run", {"arc": run}, **options), bench("base", {"arc": base}, **options)
    return gate(a, b, [rule]).verdicts[0]


def test_equal_answers_pass_only_when_there_are_enough_of_them(bench, tmp_path):
    enough, few = answers(400, 0.6), answers(60, 0.6)
    assert judge(bench, enough, enough).outcome == "pass"
    a = bench("few", {"arc": few})
    found = gate(a, a, ["score.arc drop <= 2 points"]).verdicts[0]
    assert (found.outcome, found.change) == ("inconclusive", 0.0)  # 60 alike: a share of 5% may still differ
    assert found.high > 2


def test_a_planted_drop_fails_and_pairs_see_what_unpaired_scores_do_not(bench):
    base = answers(600, 0.6)
    paired = judge(bench, flipped(base, 36), base)
    assert (paired.outcome, paired.pairs) == ("fail", 600)
    assert paired.change == pytest.approx(6.0)
    error = (0.6 * 0.4 / 600) ** 0.5
    a = bench("a", {"arc": flipped(base, 36)}, stderr=error, samples=False)
    b = bench("b", {"arc": base}, stderr=error, samples=False)
    alone = gate(a, b, ["score.arc drop <= 2 points"]).verdicts[0]
    assert (alone.outcome, alone.pairs) == ("inconclusive", None)
    assert alone.p_fail == pytest.approx(norm.sf(0.04 / (error * 2**0.5)))
    assert "with samples kept, far fewer documents would do" in alone.sentence


def test_documents_of_one_cluster_count_as_one(bench):
    base = answers(600, 0.6)
    run = flipped(base, 36)
    lost = [a != b for a, b in zip(run, base, strict=True)]
    order = np.argsort(lost, kind="stable")
    clusters = [""] * 600
    for place, i in enumerate(order):
        clusters[i] = f"c{place // 20}"  # what was lost was lost on two texts
    together = judge(bench, run, base, clusters=clusters)
    assert (together.outcome, together.clusters, together.pairs) == ("inconclusive", 30, 600)
    assert together.change == pytest.approx(6.0)
    assert together.low < 2 < together.high


def test_the_interval_holds_the_limits_that_neither_test_rejects(bench):
    base = answers(500, 0.7, 1)
    found = judge(bench, flipped(base, 20), base)
    at_low = gate(*_again(bench), [f"score.arc drop <= {found.low - 0.05:.3f} points"]).verdicts[0]
    at_high = gate(*_again(bench), [f"score.arc drop <= {found.high + 0.05:.3f} points"]).verdicts[0]
    assert (at_low.outcome, at_high.outcome) == ("fail", "pass")


def _again(bench):
    base = answers(500, 0.7, 1)
    return bench("run2", {"arc": flipped(base, 20)}), bench("base2", {"arc": base})


def test_a_score_against_a_limit(bench):
    run = bench("run", {"arc": answers(400, 0.6)})
    found = gate(run, rules=["score.arc >= 0.5", "score.arc >= 60 points", "score.arc >= 0.7"])
    assert [v.outcome for v in found.verdicts] == ["pass", "inconclusive", "fail"]
    assert found.outcome == "fail"
    assert found.verdicts[0].change == pytest.approx(60)


def test_failed_documents_are_left_out(bench):
    base = answers(400, 0.6)
    found = judge(bench, [None, *base[1:]], base)
    assert found.pairs == 399


def test_sequential_bets_are_wider_and_hold_out(bench):
    base = answers(900, 0.6)
    run, before = bench("run", {"arc": flipped(base, 90)}), bench("base", {"arc": base})
    rule = ["score.arc drop <= 5 points"]
    once, anytime = (gate(run, before, rule, sequential=s).verdicts[0] for s in (False, True))
    assert (once.outcome, anytime.outcome) == ("fail", "fail")
    assert anytime.low < once.low < 10 < once.high < anytime.high
    assert anytime.high - anytime.low < 10


@pytest.mark.parametrize(
    ("run", "base", "message"),
    [
        ({}, {"settings": {"num_fewshot": 5}}, "not comparable: settings.num_fewshot is 0 in"),
        ({}, {"metric": "acc_norm"}, "the run's metric is 'acc', the baseline's 'acc_norm'"),
        ({"prompts": ["p"] * 60}, {"prompts": ["q"] * 60}, "prompt_hash of document '0' differs .60 of 60 do"),
        ({"samples": False}, {}, "has neither documents in samples.jsonl nor a standard error"),
    ],
)
def test_what_can_not_be_compared_is_said(bench, run, base, message):
    one, other = bench("run", {"arc": answers(60, 0.5)}, **run), bench("base", {"arc": answers(60, 0.5)}, **base)
    with pytest.raises(UserError, match=message):
        gate(one, other, ["score.arc drop <= 2 points"])


def test_an_unknown_task_and_a_damaged_file_are_said(bench):
    run = bench("run", {"arc": answers(60, 0.5)})
    with pytest.raises(UserError, match=r"no score of task 'acr' .did you mean 'arc'"):
        gate(run, rules=["score.acr >= 0.5"])
    lines = (run / "samples.jsonl").read_text().splitlines()
    (run / "samples.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(UserError, match=r"damaged at line 2"):
        gate(run, rules=["score.arc >= 0.5"])
