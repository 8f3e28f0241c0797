"""Figures that a run states by itself: of a spectrum with an interval over texts, of the cost as a plain number."""

from __future__ import annotations

from scipy.stats import t as student

from laid_eval.errors import UserError, nearest
from laid_eval.records import Cost
from laid_eval.report.gate.comparable import check_comparable
from laid_eval.report.gate.evidence import Evidence, Look
from laid_eval.report.gate.rules import Rule
from laid_eval.spectra import Compared, LoadedSpectrum, Metric
from laid_eval.spectrum.compare import compare_spectra

SAME = {"low_frequency_preservation": "low_frequency_energy"}
"""Measures that go by another name where a student is compared with a teacher."""


def spectrum(run: LoadedSpectrum, baseline: LoadedSpectrum | None, rule: Rule, look: Look) -> Evidence:
    """A metric of the run, or a measure of it against its teacher (else: against the baseline).

    The interval over texts is Student's; the p-values are those of the same t.

    Raises:
        UserError: The run holds no such figure, or looks again and again are asked for.
    """
    if look.sequential:
        raise UserError(f"Rule {rule.text!r}: --sequential is for windows and scores; leave this rule out.")
    found = _figure(run, baseline, rule)
    if isinstance(found, Compared) and run.header.comparison:
        origin = "against the teacher of the run"
    else:
        origin = "against the baseline" if isinstance(found, Compared) else "of the run"
    texts, confidence = run.header.settings.texts, run.header.settings.confidence
    shown = f"{found.value:.3g}" if found.value is not None else "unknown"
    p_fail = p_pass = 1.0
    low = high = None
    note = "one text has no interval: measure with more --texts"
    if found.value is not None and found.low is not None and found.high is not None and texts > 1:
        error = (found.high - found.low) / 2 / float(student.isf((1 - confidence) / 2, texts - 1))
        worse = 1 if rule.relation == "<=" else -1
        away = worse * (found.value - rule.limit)
        z = away / error if error > 0 else float("inf") * (1 if away > 0 else -1)
        p_fail, p_pass = float(student.sf(z, texts - 1)), float(student.cdf(z, texts - 1))
        half = float(student.isf(look.alpha, texts - 1)) * error
        low, high, note = found.value - half, found.value + half, ""
    return Evidence(
        run=shown,
        baseline=None,
        change=found.value,
        low=low,
        high=high,
        unit=found.unit,
        p_fail=p_fail,
        p_pass=p_pass,
        method=f"Student's t over {texts} texts; {origin}",
        clusters=texts,
        cluster_name="texts",
        note=note,
    )


def _figure(run: LoadedSpectrum, baseline: LoadedSpectrum | None, rule: Rule) -> Metric | Compared:
    name = SAME.get(rule.name, rule.name)
    own = {m.name: m for m in run.header.metrics}
    if name in own:
        return own[name]
    measures = {m.name: m for m in run.header.comparison}
    if not measures and baseline is not None:
        check_comparable(run, baseline, rule)
        measures = {m.name: m for m in compare_spectra(run, baseline).measures}
    if name in measures:
        return measures[name]
    held = [*own, *measures]
    missing = "" if measures else " Measures against a teacher need --teacher or --baseline."
    raise UserError(
        f"Rule {rule.text!r}: '{run.path}' holds no measure {rule.name!r}{nearest(rule.name, held)}; "
        f"it holds: {', '.join(held)}.{missing}"
    )


def cost(spent: Cost, rule: Rule) -> Evidence:
    """A field of the cost against a limit: a plain number, so there is nothing to test.

    Raises:
        UserError: No such field.
    """
    fields = list(Cost.model_fields)
    if rule.name not in fields:
        hint = nearest(rule.name, fields)
        raise UserError(f"Rule {rule.text!r}: no cost is called {rule.name!r}{hint}; there are: {', '.join(fields)}.")
    value = getattr(spent, rule.name)
    unit = next((u for u in ("tokens", "seconds", "bytes") if rule.name.endswith(u)), "")
    broken = value is not None and value > rule.limit
    return Evidence(
        run="unknown" if value is None else f"{value:,.10g} {unit}",
        baseline=None,
        change=value,
        low=value,
        high=value,
        unit=unit,
        p_fail=0.0 if broken else 1.0,
        p_pass=0.0 if value is not None and not broken else 1.0,
        method="as counted",
        note="" if value is not None else "the run does not know it",
    )
