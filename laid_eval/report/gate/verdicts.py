"""From rules and runs to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from laid_eval.errors import UserError
from laid_eval.records import Gate, Outcome, Verdict
from laid_eval.report.gate import figures, scores, windows
from laid_eval.report.gate.comparable import Measured, Place, check_comparable, check_finished, load_measured, pick
from laid_eval.report.gate.evidence import Evidence, Look
from laid_eval.report.gate.rules import Rule, expand, parse_rule
from laid_eval.report.gate.sequential import FEWEST
from laid_eval.runs import LoadedRun


def gate(
    run: Place,
    baseline: Place | None = None,
    rules: Sequence[str] = (),
    *,
    alpha: float = 0.05,
    sequential: bool = False,
) -> Gate:
    """Hold a run against rules.

    Args:
        run: A window run, a run folder, or a folder with one run of each command in its subfolders.
        baseline: The same of the run to compare with; needed by rules on a drop.
        rules: Such as `window.needle >= 8000`, `window.* drop <= 0.25 octave`, `score.laid_needle drop <= 2 points`.
        alpha: Highest probability of a false alarm (all rules together), and of passing a broken rule.
        sequential: The verdict holds however often it is asked for while the run grows.

    Returns:
        A verdict a rule: pass, fail or inconclusive; see the package for what is promised.

    Raises:
        UserError: No run, a broken one, one that can't be compared (names the field), or a rule that is none.
    """
    if not 0 < alpha <= 0.5:
        raise UserError(f"alpha must lie above 0 and be at most 0.5, got {alpha}.")
    if not rules:
        raise UserError("No rules. Pass one, e.g. --rule 'window.* drop <= 0.25 octave', or a file with --rules.")
    asked = [parse_rule(text) for text in rules]
    measured, before = load_measured(run), load_measured(baseline) if baseline is not None else None
    verdicts = judge(measured, before, asked, Look(alpha, sequential))
    return Gate(
        outcome=_together([v.outcome for v in verdicts]),
        alpha=alpha,
        sequential=sequential,
        run=str(measured.path),
        baseline=str(before.path) if before else None,
        verdicts=verdicts,
    )


def judge(measured: Measured, before: Measured | None, rules: Sequence[Rule], look: Look) -> tuple[Verdict, ...]:
    """A verdict a rule, of runs already read. Errors as for `gate`."""
    wanted = expand(rules, measured.names)
    found = [_evidence(rule, measured, before, look) for rule in wanted]
    corrected = holm([e.p_fail for e in found])
    return tuple(_verdict(r, e, p, look) for r, e, p in zip(wanted, found, corrected, strict=True))


def assert_window(
    run: Place, at_least: float, probe: str = "*", *, criterion: str | None = None, alpha: float = 0.05
) -> Gate:
    """Assert, in a test, that the window of a run is at least so long.

    Args:
        run: A window run as `measure_window` returns it, or its folder.
        at_least: Tokens or images.
        probe: Whose window; all of the run by default.
        criterion: E.g. `half`; the run's own by default.
        alpha: Highest probability of passing a window that is shorter.

    Raises:
        AssertionError: The window is shorter, or it is not settled that it is not; the sentence says which.
        UserError: No run, or no such probe.
    """
    at = f"@{criterion}" if criterion else ""
    found = gate(run, rules=[f"window.{probe}{at} >= {at_least:.17g}"], alpha=alpha)
    if found.outcome != "pass":
        raise AssertionError("; ".join(v.sentence for v in found.verdicts if v.outcome != "pass"))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): reject those at most alpha.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = [float(p[i]) * (len(p) - k) for k, i in enumerate(order)]
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(x) for x in out]


def _evidence(rule: Rule, measured: Measured, before: Measured | None, look: Look) -> Evidence:
    run = pick(measured, rule)
    check_finished(run, look.sequential)
    if rule.subject == "cost":
        return figures.cost(run.header.cost, rule)
    if rule.subject == "spectrum":
        teacher = before.spectrum if before else None
        return figures.spectrum(run, teacher, rule, look)
    if not rule.needs_baseline:
        if rule.subject == "window":
            return windows.at_least(windows.side(run, rule, look), rule.limit, look)
        return scores.at_least(run, rule, look)
    if before is None:
        raise UserError(f"Rule {rule.text!r} compares with another run: name its folder with --baseline.")
    other = pick(before, rule)
    check_finished(other, look.sequential)
    if isinstance(run, LoadedRun):
        own = windows.side(run, rule, look)
        check_comparable(run, other, rule)
        return windows.drop(own, windows.side(other, rule, look), rule.limit, look)
    check_comparable(run, other, rule)
    return scores.drop(run, other, rule, look)


def _verdict(rule: Rule, e: Evidence, p_fail: float, look: Look) -> Verdict:
    outcome: Outcome = "inconclusive"
    if p_fail <= look.alpha:
        outcome = "fail"
    elif e.p_pass <= look.alpha:
        outcome = "pass"
    more = e.more if outcome == "inconclusive" and not e.note else None
    limit = 100 * rule.limit if rule.subject == "score" else rule.limit
    return Verdict(
        rule=rule.text,
        outcome=outcome,
        sentence=_sentence(rule, e, outcome, limit, more, look),
        run=e.run,
        baseline=e.baseline,
        change=e.change,
        low=e.low,
        high=e.high,
        unit=e.unit,
        limit=limit,
        confidence=1 - 2 * look.alpha,
        p_fail=p_fail,
        p_pass=e.p_pass,
        clusters=e.clusters,
        pairs=e.pairs,
        more_clusters=more[0] if more else None,
        more_questions=more[1] if more else None,
        method=e.method,
    )


def _sentence(rule: Rule, e: Evidence, outcome: Outcome, limit: float, more: tuple[int, int] | None, look: Look) -> str:
    what = f"{rule.subject}.{rule.name}"
    seen = f"{what} {'dropped by' if rule.needs_baseline else 'is'} {figure(e.change, e.low, e.high, e.unit)}"
    if rule.needs_baseline:
        seen += f", from {e.baseline} to {e.run}"
    kept, broken = ("at least", "less than") if rule.relation == ">=" else ("at most", "more than")
    asked = f"{limit:,.10g} {e.unit}".rstrip()
    words = {"pass": kept, "fail": broken, "inconclusive": f"not settled whether {kept}"}
    out = f"{seen}: {words[outcome]} {asked}"
    if outcome != "inconclusive":
        return out
    if e.note:
        return f"{out}; {e.note}"
    if look.sequential and (e.clusters or 0) < FEWEST:
        return f"{out}; the first verdict is given at {FEWEST} {e.cluster_name}, so far there are {e.clusters}"
    if more is None:
        return f"{out}; it lies so near the limit that no reasonable number of questions would settle it"
    count = f"{more[0]:,} more {e.cluster_name}"
    questions = "" if more[1] == more[0] else f" ({more[1]:,} questions)"
    return f"{out}; about {count}{questions} would settle it if the change is as seen"


def figure(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    """`0.21 octaves [0.05, 0.37]`; open ends as `...`, no interval for a plain count."""
    shown = f"{number(value, unit)} {unit}".rstrip()
    return shown if (low, high) == (value, value) else f"{shown} {ends(low, high, unit)}"


def number(value: float | None, unit: str) -> str:
    """A figure with as many digits as its unit deserves."""
    if value is None:
        return "unknown"
    digits = {"octaves": ",.2f", "points": ",.1f"}.get(unit, ",.4g")
    return f"{value:,.0f}" if unit in ("tokens", "images", "seconds", "bytes") else f"{value:{digits}}"


def ends(low: float | None, high: float | None, unit: str) -> str:
    """`[0.05, 0.37]`; an open end as `...`."""
    shown = ["..." if end is None else number(end, unit) for end in (low, high)]
    return f"[{shown[0]}, {shown[1]}]"


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    for worst in ("fail", "inconclusive"):
        if worst in outcomes:
            return worst
    return "pass"
