"""A gate as JUnit XML, and in GitHub's terms: a Markdown summary of the step and annotations."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from laid_eval.records import Gate, Verdict
from laid_eval.runs import write_atomically

_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2
_LEVEL = {"fail": "error", "inconclusive": "warning"}


def save_junit(gate: Gate, path: Path) -> None:
    """Write one test case a rule: a failed one is a failure, an inconclusive one an error, never green by accident."""
    outcomes = [v.outcome for v in gate.verdicts]
    counts = {"failures": outcomes.count("fail"), "errors": outcomes.count("inconclusive")}
    suite = ElementTree.Element("testsuite", name="laid-eval gate", tests=str(len(outcomes)))
    suite.attrib.update({name: str(count) for name, count in counts.items()})
    for verdict in gate.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="laid-eval.gate", name=_xml(verdict.rule))
        if verdict.outcome == "pass":
            ElementTree.SubElement(case, "system-out").text = _xml(verdict.sentence)
        else:
            tag = "failure" if verdict.outcome == "fail" else "error"
            ElementTree.SubElement(case, tag, type=verdict.outcome, message=_xml(verdict.sentence))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    write_atomically(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def append_summary(gate: Gate, path: Path) -> None:
    """Append a Markdown table to the summary of the step (`GITHUB_STEP_SUMMARY`)."""
    against = f", baseline `{_cell(gate.baseline)}`" if gate.baseline else ""
    lines = [
        f"### laid-eval gate: {gate.outcome}",
        "",
        f"run `{_cell(gate.run)}`{against}; false alarms at most {gate.alpha:.1%}",
        "",
        "| | rule | verdict in words |",
        "|---|---|---|",
        *(f"| {v.outcome} | `{_cell(v.rule)}` | {_cell(v.sentence)} |" for v in gate.verdicts),
        "",
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def workflow_commands(gate: Gate) -> list[str]:
    """Workflow commands that GitHub shows beside the step: an error a failed rule, a warning an inconclusive one."""
    return [_annotation(v) for v in gate.verdicts if v.outcome != "pass"]


def _annotation(verdict: Verdict) -> str:
    title = _escaped(f"{verdict.outcome}: {verdict.rule}").replace(":", "%3A").replace(",", "%2C")
    return f"::{_LEVEL[verdict.outcome]} title={title}::{_escaped(verdict.sentence)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _xml(text: str) -> str:
    return _UNPRINTABLE.sub("?", text)


def _cell(text: str) -> str:
    """In a cell of a table: what a run or a path says is neither markup nor a new column."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.replace("`", "'").split())
