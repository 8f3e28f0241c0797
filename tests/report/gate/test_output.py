"""What other programs read: JUnit XML, a Markdown summary, annotations."""

from xml.etree import ElementTree

from laid_eval.report.gate.output import append_summary, save_junit, workflow_commands
from laid_eval.report.gate.verdicts import gate


def found(planted):
    return gate(planted / "base", rules=["window.needle >= 1000", "window.needle >= 9000", "window.needle >= 3700"])


def test_junit_counts_failures_and_open_questions(planted, tmp_path):
    save_junit(found(planted), tmp_path / "deep" / "g.xml")
    suite = ElementTree.parse(tmp_path / "deep" / "g.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    passed, failed, open_ = suite.findall("testcase")
    assert passed.find("failure") is passed.find("error") is None
    assert "less than 9,000 tokens" in failed.find("failure").get("message")
    assert "not settled" in open_.find("error").get("message")
    assert failed.get("name") == "window.needle >= 9000"


def test_the_summary_is_a_table_that_names_can_not_break(planted, tmp_path):
    gate_ = found(planted)
    nasty = gate_.verdicts[1].model_copy(update={"rule": "a|b`<img src=x>\n|"})
    append_summary(gate_.model_copy(update={"verdicts": (nasty,)}), tmp_path / "s.md")
    append_summary(gate_, tmp_path / "s.md")
    text = (tmp_path / "s.md").read_text()
    assert text.count("### laid-eval gate: fail") == 2
    assert "| fail | `a\\|b'&lt;img src=x> \\|` | window.needle is" in text
    assert "| inconclusive | `window.needle >= 3700` |" in text


def test_annotations_are_one_line_each(planted):
    gate_ = found(planted)
    lines = workflow_commands(gate_)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]
    broken = gate_.verdicts[1].model_copy(update={"sentence": "90%\n::error::", "rule": "a,b:c"})
    (line,) = workflow_commands(gate_.model_copy(update={"verdicts": (broken,)}))
    assert line == "::error title=fail%3A a%2Cb%3Ac::90%25%0A::error::"
