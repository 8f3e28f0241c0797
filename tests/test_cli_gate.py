"""`laid-eval gate`: exit codes, JSON, rules of a project, GitHub."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RUN = ROOT / "reports" / "smollm2-window"
PASSES, FAILS, OPEN = "window.needle >= 2000", "window.needle >= 9000", "window.needle >= 6300"


@pytest.mark.parametrize(("rule", "code"), [(PASSES, 0), (FAILS, 1), (OPEN, 3)])
def test_the_exit_code_is_the_verdict(command_line, tmp_path, rule, code):
    done = command_line("gate", RUN, "--rule", rule, "--json", "--junit", "g.xml", cwd=tmp_path)
    assert done.returncode == code
    (verdict,) = json.loads(done.stdout)["verdicts"]
    assert verdict["outcome"] == {0: "pass", 1: "fail", 3: "inconclusive"}[code]
    assert verdict["rule"] == rule
    assert rule.replace(">", "&gt;") in (tmp_path / "g.xml").read_text()
    assert f"gate: {verdict['outcome']}" in done.stderr


def test_rules_and_baseline_of_a_project_are_found_and_given_ones_go_first(command_line, tmp_path):
    (tmp_path / "base").symlink_to(RUN)
    table = '[tool.laid-eval.gate]\nbaseline = "base"\nrules = ["window.* drop <= 0.25 octave"]\n'
    (tmp_path / "pyproject.toml").write_text(table)
    done = command_line("gate", RUN, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert [v["rule"] for v in json.loads(done.stdout)["verdicts"]] == ["window.needle drop <= 0.25 octave"]
    alone = command_line("gate", RUN, "--json", "--rule", FAILS, cwd=tmp_path)
    assert [v["rule"] for v in json.loads(alone.stdout)["verdicts"]] == [FAILS]
    both = command_line("gate", RUN, "--json", "--rule", FAILS, "--rules", "pyproject.toml", cwd=tmp_path)
    assert len(json.loads(both.stdout)["verdicts"]) == 2


def test_on_github_the_step_gets_a_summary_and_annotations(command_line, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = command_line("gate", RUN, "--rule", FAILS, "--json", cwd=tmp_path)
    assert "\n::error title=fail%3A window.needle >= 9000::window.needle is" in done.stderr
    json.loads(done.stdout)
    assert "### laid-eval gate: fail" in (tmp_path / "summary.md").read_text()


def test_a_run_is_accepted_as_the_new_baseline(command_line, tmp_path):
    done = command_line("gate", RUN, "--baseline", "baselines/smollm2", "--accept", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rule = "window.* drop <= 0.25 octave"
    assert command_line("gate", RUN, "--baseline", "baselines/smollm2", "--rule", rule, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Which run?"),
        (["nowhere", "--rule", PASSES], "'nowhere' is not a run folder"),
        (["."], "No rules. Pass one"),
        (["empty", "--rule", PASSES], "'empty' is not a run folder"),
        ([RUN, "--rule", "window.nedle >= 8000"], "did you mean 'needle'?"),
        ([RUN, "--rule", "window.needle > 8000"], "can't be asked of a window"),
        ([RUN, "--rule", PASSES, "--alpha", "0.7"], "alpha must lie above 0"),
        ([RUN, "--rules", "none.toml"], "can't be read"),
        ([RUN, "--accept"], "name its folder with --baseline"),
        ([RUN, "--rule", PASSES, "--baseline", "broken"], "is damaged"),
        (
            [RUN, "--rule", "window.* drop <= 1", "--baseline", ROOT / "reports" / "pocket-window"],
            "not comparable: probe is 'needle'",
        ),
        ([ROOT / "reports" / "planted-gain" / "run", "--rule", PASSES], "is a distill run; the gate reads runs of"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(command_line, tmp_path, words, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    done = command_line("gate", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_action_passes_every_input_it_declares_through_the_environment():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = action["runs"]["steps"]
    passed = " ".join(str(v) for step in steps for v in [*step.get("env", {}).values(), *step.get("with", {}).values()])
    scripts = "".join(step.get("run", "") for step in steps)
    assert "${{" not in scripts
    for name in action["inputs"]:
        assert f"inputs.{name} " in passed
    assert all("shell" in step for step in steps if "run" in step)
