"""The split of a lost score: arithmetic and intervals on planted answers."""

import re

import numpy as np
import pandas as pd
import pytest

from laid_eval.errors import UserError
from laid_eval.window.why import CAUSES, CONDITIONS, PARTS, Study, explain, verdict

STUDY = Study("needle", 8192, 512, 6, 12)
CHANCE = 0.125


def answers(right, haystacks=6, questions=12, seed=0, spread=0.0):
    """Independent answers: `right` is the probability of each condition, moved by a normal draw a haystack."""
    rng = np.random.default_rng(seed)
    rows = []
    for h in range(haystacks):
        shift = spread * rng.normal()
        for q in range(questions):
            for name in CONDITIONS:
                p = right[name] if right[name] in (0, 1) else np.clip(right[name] + shift, 0, 1)
                score = float(rng.random() < p)
                rows.append((name, h, f"fact{q}", score, 4 * score - 2 + rng.normal(), CHANCE))
    return pd.DataFrame(rows, columns=["condition", "haystack", "question", "score", "margin", "chance"])


ONLY = {
    "position": {"short": 0.95, "far": 0.4, "crowded": 0.95, "full": 0.4, "alone": 0.4, "near": 0.95},
    "dilution": {"short": 0.95, "far": 0.95, "crowded": 0.4, "full": 0.4, "alone": 0.4, "near": 0.95},
    "distractors": {"short": 0.95, "far": 0.95, "crowded": 0.95, "full": 0.4, "alone": 0.95, "near": 0.95},
    "remainder": {"short": 0.95, "far": 0.95, "crowded": 0.95, "full": 0.4, "alone": 0.4, "near": 0.95},
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_loss_of_one_cause_is_told_as_that_cause_alone(cause):
    why = explain(answers(ONLY[cause], seed=3), STUDY)
    assert why.part("loss").low > 0
    assert {name for name in CAUSES if why.part(name).low > 0} == {cause}
    assert all(why.part(name).low <= 0 <= why.part(name).high for name in CAUSES if name != cause)
    assert why.part("recovered").low > 0
    value = f"{why.part(cause).value:.2f}"
    told = (
        f"no cause alone can be told from 0, only together {value}"
        if cause == "remainder"
        else f"{cause} alone {value}"
    )
    assert told in verdict(why)
    assert not [name for name in CAUSES if name != cause and f"{name} alone" in verdict(why)]


def test_the_parts_are_those_of_the_definition_and_add_up():
    table = answers({name: 0.9 - 0.12 * k for k, name in enumerate(CONDITIONS)}, seed=1)
    why = explain(table, STUDY)
    mean = table.groupby("condition")["score"].mean()
    nats = table.groupby("condition")["margin"].mean()
    above = (mean - CHANCE) / (1 - CHANCE)
    assert {c.name: c.value for c in why.conditions} == pytest.approx(mean.to_dict())
    assert {c.name: c.margin for c in why.conditions} == pytest.approx(nats.to_dict())
    assert why.part("comprehension").value == pytest.approx((1 - mean["short"]) / (1 - CHANCE))
    assert why.part("comprehension").margin is None
    assert why.part("position").value == pytest.approx(above["short"] - above["far"])
    assert why.part("dilution").value == pytest.approx(above["short"] - above["crowded"])
    assert why.part("distractors").value == pytest.approx(above["alone"] - above["full"])
    assert why.part("recovered").margin == pytest.approx(nats["near"] - nats["full"])
    for figure in ("value", "margin"):
        total = sum(getattr(why.part(name), figure) for name in CAUSES)
        assert getattr(why.part("loss"), figure) == pytest.approx(total)
    assert why.part("comprehension").value + why.part("loss").value + above["full"] == pytest.approx(1)


def test_intervals_cover_what_was_planted_also_where_haystacks_differ():
    """95% intervals of six haystacks that shift alike in all ways: at least 90% hold the truth."""
    held = 0
    for seed in range(150):
        why = explain(answers({**ONLY["position"], "far": 0.5}, seed=seed, spread=0.1), STUDY)
        part = why.part("position")
        held += part.low <= (0.95 - 0.5) / (1 - CHANCE) <= part.high
    assert held >= 0.9 * 150


def test_questions_of_one_haystack_are_one_cluster():
    """All answers of a haystack alike: twelve times as many questions must not narrow the interval."""
    one = answers(ONLY["position"], questions=1, seed=5)
    many = pd.concat([one.assign(question=f"fact{k}") for k in range(12)])
    a, b = explain(one, STUDY).part("loss"), explain(many, STUDY).part("loss")
    assert (b.low, b.high) == pytest.approx((a.low, a.high))
    assert b.high > b.low


def test_equal_answers_leave_the_doubt_of_their_number():
    right = answers(dict.fromkeys(CONDITIONS, 1))
    loss = explain(right, STUDY).part("loss")
    reach = (1 - 0.025 ** (1 / 72)) / (1 - CHANCE)
    assert (loss.low, loss.value, loss.high) == pytest.approx((-reach, 0, reach))
    short = explain(right, STUDY).conditions[0]
    assert (short.low, short.high) == pytest.approx((0.025 ** (1 / 72), 1))
    assert explain(right, STUDY).part("comprehension").low == 0
    assert verdict(explain(right, STUDY)).startswith("At 8,192 tokens no loss can be told")


def test_causes_that_each_suffice_overlap():
    right = {"short": 0.95, "far": 0.3, "crowded": 0.3, "full": 0.3, "alone": 0.3, "near": 0.95}
    why = explain(answers(right), STUDY)
    assert why.part("remainder").high < 0
    assert re.search(r"(position|dilution) alone 0\.\d\d, (position|dilution) alone .*, which overlap", verdict(why))


def test_haystacks_that_happen_to_score_alike_do_not_make_a_sure_thing():
    """One wrong answer in each of six haystacks: a bootstrap over haystacks alone would see no error."""
    table = answers(dict.fromkeys(CONDITIONS, 1))
    table.loc[(table["condition"] == "full") & (table["question"] == "fact0"), "score"] = 0.0
    loss = explain(table, STUDY).part("loss")
    assert loss.high - loss.low == pytest.approx(2 * (1 - 0.025 ** (1 / 72)) / (1 - CHANCE))


def test_fewer_haystacks_leave_more_doubt():
    table = answers(ONLY["position"], spread=0.1)
    widths = [
        part.high - part.low for k in (2, 3, 6) for part in [explain(table[table["haystack"] < k], STUDY).part("loss")]
    ]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 3 * widths[2]


def test_a_question_that_failed_in_one_way_is_left_out_of_all():
    table = answers(ONLY["position"])
    worse = table.copy()
    failed = (worse["haystack"] == 2) & (worse["question"] == "fact3") & (worse["condition"] == "near")
    worse.loc[failed, ["score", "margin"]] = np.nan
    why = explain(worse, STUDY)
    assert (why.asked, why.failed) == (71, 1)
    kept = table[~((table["haystack"] == 2) & (table["question"] == "fact3"))]
    assert why.parts == explain(kept, STUDY).parts


def test_the_same_seed_gives_the_same_intervals_in_any_order_of_rows():
    table = answers(ONLY["dilution"], spread=0.1)
    assert explain(table, STUDY) == explain(table.sample(frac=1, random_state=1), STUDY)
    assert explain(table, STUDY) != explain(table, STUDY, seed=1)


def test_one_haystack_is_refused():
    with pytest.raises(UserError, match=r"on 1 haystack\(s\), needed are 2"):
        explain(answers(ONLY["position"], haystacks=1), STUDY)


def test_causes_sum_to_the_loss_by_their_weights():
    by_name = {part.name: part.weights for part in PARTS}
    total = {name: sum(by_name[cause].get(name, 0) for cause in CAUSES) for name in CONDITIONS}
    assert {name: w for name, w in total.items() if w} == by_name["loss"]
