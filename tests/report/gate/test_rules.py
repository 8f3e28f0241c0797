"""Rules: what they mean, and one clear line for each way to get them wrong."""

import pytest

from laid_eval.errors import UserError
from laid_eval.report.gate.rules import expand, has_rules, parse_rule, read_rules


def test_a_rule_says_what_is_held_against_what():
    rule = parse_rule("window.needle@half >= 8,000 tokens")
    assert (rule.subject, rule.name, rule.criterion, rule.relation, rule.limit) == (
        "window",
        "needle",
        "half",
        ">=",
        8000,
    )
    assert parse_rule("window.* drop<=0.25 octaves").limit == 0.25
    assert parse_rule("score.arc drop <= 2 points").limit == parse_rule("score.arc drop <= 2").limit == 0.02
    assert parse_rule("score.arc >= 0.6").limit == parse_rule("score.arc >= 60 points").limit == 0.6
    assert parse_rule("cost.seconds <= 1e3").limit == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not understood. A rule reads like: window.needle >= 8000"),
        ("window.needle", "is not understood"),
        ("windw.needle >= 8000", "'windw' is unknown .did you mean 'window'"),
        ("window.needle => 8000", "'=>' can't be asked of a window. Try: window.needle >= 8000"),
        ("window.needle dorp <= 0.25 octave", "'dorp <=' can't be asked of a window"),
        ("window.needle <= 8000", "'<=' can't be asked of a window"),
        ("window.needle drop <= 0.25 octvae", "unit 'octvae' is unknown .did you mean 'octave'"),
        ("window.needle drop <= 2 points", "unit 'points' is unknown"),
        ("window.needle >= 8k", "must be a number of 0 or more, got '8k'"),
        ("window.needle >= -8000", "must be a number of 0 or more"),
        ("window.needle >= inf", "must be a number"),
        ("window.needle >= 0", "a window is at least 1 long"),
        ("window.needle drop <= 0 octave", "no number of questions can show a drop of exactly 0"),
        ("score.arc >= 60", "lies between 0 and 1"),
        ("score.arc@half >= 0.6", "only a window has a criterion"),
        ("spectrum.d50 drop <= 2", "can't be asked of a spectrum"),
        ("cost.seconds <= 3 hours", "unit 'hours' is unknown; this rule takes none"),
    ],
)
def test_a_typo_gets_one_line_that_names_it(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_rule(text)
    assert "\n" not in str(error.value)


def test_a_star_stands_for_every_name_once():
    rules = [parse_rule("window.* drop <= 0.5 octave"), parse_rule("window.needle drop <= 0.5 octave")]
    found = expand(rules, {"window": ["needle", "multikey"]})
    assert [r.text for r in found] == ["window.needle drop <= 0.5 octave", "window.multikey drop <= 0.5 octave"]
    with pytest.raises(UserError, match="holds no score"):
        expand([parse_rule("score.* >= 0.5")], {"window": ["needle"]})


def test_rules_are_read_from_a_suite_and_from_a_project(tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text('[gate]\nrules = ["window.* drop <= 0.5 octave"]\nalpha = 0.01\nbaseline = "base"\n')
    declared = read_rules(suite)
    assert (declared.rules, declared.alpha, declared.baseline) == (("window.* drop <= 0.5 octave",), 0.01, "base")
    project = tmp_path / "pyproject.toml"
    assert not has_rules(project)
    project.write_text('[tool.laid-eval.gate]\nrules = ["window.needle >= 8000"]\n')
    assert has_rules(project)
    assert read_rules(project).alpha == 0.05


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[gate", "is not valid TOML"),
        ("[other]", r"has no table \[gate\]"),
        ("gate = 3", r"has no table \[gate\]"),
        ("[gate]\nrules = []", "'rules': Tuple should have at least 1 item"),
        ('[gate]\nrules = ["window.needle >= 1"]\nalhpa = 0.1', "'alhpa': .* .did you mean 'alpha'"),
        ('[gate]\nrules = ["window.needle >= 1"]\nalpha = 2', "'alpha': Input should be less than or equal to 0.5"),
    ],
)
def test_a_broken_rules_file_gets_one_line(tmp_path, content, message):
    (tmp_path / "r.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_rules(tmp_path / "r.toml")


def test_a_missing_rules_file_is_said(tmp_path):
    with pytest.raises(UserError, match="can't be read: No such file"):
        read_rules(tmp_path / "none.toml")
