"""`laid-eval gate`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from laid_eval.cli.console import Json, fail, show, stderr
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.records import Gate
    from laid_eval.report.gate.rules import Declared

EPILOG = """
**Examples**

`laid-eval gate runs/new --baseline baselines/smollm2 --rule 'window.* drop <= 0.25 octave'`

`laid-eval gate runs/new --rule 'window.needle >= 8000' --rule 'cost.prefill_tokens <= 100000'`

`laid-eval gate runs/new --rules benchmarks/suites/gate.toml --junit gate.xml`

`laid-eval gate runs/new --baseline baselines/smollm2 --sequential`  while the run grows

`laid-eval gate runs/new --baseline baselines/smollm2 --accept`  the run becomes the baseline

Exit codes: 0 pass, 1 fail, 2 not comparable or otherwise to be mended, 3 inconclusive.
"""
_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
_PROJECT = Path("pyproject.toml")


def gate(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder, or a folder with one run of each command.", show_default=False)
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Run folder to compare with.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="E.g. 'window.needle >= 8000'. Repeatable.")] = None,
    rules: Annotated[
        Path | None,
        typer.Option(help="TOML file with a table [gate]. Default: [tool.laid-eval.gate] in pyproject.toml."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Most false alarms, all rules together. Default: the file's, else 0.05.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Look again and again while the run grows; the verdict stays valid.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Make the run the new baseline; nothing is judged.")] = False,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Simulate comparisons with a known truth; nothing else is read.")
    ] = False,
    comparisons: Annotated[int, typer.Option(min=1, help="Of each kind, in the self-check.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the self-check.")] = 0,
    as_json: Json = False,
) -> None:
    """Hold a run against rules and a baseline: pass, fail or inconclusive."""
    if self_check:
        _self_check(comparisons, seed, as_json)
        return
    if run is None:
        raise UserError("Which run? Name its folder; try: laid-eval gate runs/mine --rule 'window.needle >= 8000'")
    # Imported here: --help needs none of it.
    from laid_eval.report.gate.output import append_summary, save_junit, workflow_commands
    from laid_eval.report.gate.verdicts import gate as judge

    if accept:
        _accept(run, baseline or _declared(rules, rule)[1], as_json)
        return
    declared, default = _declared(rules, rule)
    asked = [*(declared.rules if declared else ()), *(rule or [])]
    level = alpha if alpha is not None else declared.alpha if declared else 0.05
    found = judge(run, baseline or default, asked, alpha=level, sequential=sequential)
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=1, allow_nan=False))
    show_gate(found, Console(stderr=as_json, highlight=False))
    if junit:
        save_junit(found, junit)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_summary(found, Path(summary))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(found):
            stderr.print(line, markup=False, soft_wrap=True)
    if found.outcome != "pass":
        sys.exit(1 if found.outcome == "fail" else 3)


def _declared(file: Path | None, given: list[str] | None) -> tuple[Declared | None, Path | None]:
    """Rules of the file named (else, where none are given, of the project's), and the baseline it names."""
    from laid_eval.report.gate.rules import has_rules, read_rules

    if file is None and not given and has_rules(_PROJECT):
        file = _PROJECT
    if file is None:
        return None, None
    declared = read_rules(file)
    return declared, file.parent / declared.baseline if declared.baseline else None


def show_gate(found: Gate, console: Console) -> None:
    """The verdicts for people: a table, then each in words."""
    from laid_eval.report.gate.verdicts import ends, number

    against = f" against {escape(found.baseline)}" if found.baseline else ""
    console.print(f"[bold]{escape(found.run)}[/bold]{against}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("rule", "left"),
        ("verdict", "left"),
        ("seen", "right"),
        (f"{100 * (1 - 2 * found.alpha):g}% interval", "left"),
        ("clusters", "right"),
        ("pairs", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for v in found.verdicts:
        table.add_row(
            escape(v.rule),
            f"[{_STYLE[v.outcome]}]{v.outcome}[/]",
            f"{number(v.change, v.unit)} {v.unit}".rstrip(),
            escape(ends(v.low, v.high, v.unit)) if (v.low, v.high) != (v.change, v.change) else "",
            "" if v.clusters is None else str(v.clusters),
            "" if v.pairs is None else str(v.pairs),
        )
    console.print(table)
    for v in found.verdicts:
        console.print(f"{v.outcome}: {escape(v.sentence)} ({escape(v.method)})", soft_wrap=True)
    looks = ", however often one looks" if found.sequential else ""
    style = _STYLE[found.outcome]
    console.print(f"[{style}]gate: {found.outcome}[/] (false alarms at most {found.alpha:.1%}{looks})")


def _accept(run: Path, baseline: Path | None, as_json: bool) -> None:
    from laid_eval.report.gate.accept import accept

    if baseline is None:
        raise UserError("--accept copies the run to the baseline: name its folder with --baseline.")
    files = accept(run, baseline)
    if as_json:
        print(json.dumps({"run": str(run), "baseline": str(baseline), "files": files}, indent=1))
    else:
        show(f"'{escape(str(run))}' is now the baseline '{escape(str(baseline))}' ({', '.join(files)}); commit it.")


def _self_check(comparisons: int, seed: int, as_json: bool) -> None:
    """Simulate; exit 1 where the gate errs more often than it promises."""
    from laid_eval.report.gate.simulate import check_all

    with _live() as advance:
        results = check_all(comparisons, seed, advance)
    if as_json:
        print(json.dumps([r.as_dict() for r in results], indent=1, allow_nan=False))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("comparison", "times", "fail", "pass", "must hold", "in bounds"):
            table.add_column(column, justify="left" if column in ("comparison", "must hold") else "right")
        for r in results:
            shares = [f"{count / r.comparisons:.1%}" for count in (r.failed, r.passed)]
            table.add_row(r.plan, str(r.comparisons), *shares, r.bound, "yes" if r.in_bounds else "NO")
        show(table)
    if not all(r.in_bounds for r in results):
        fail("the gate errs more often than it promises", 1)


@contextmanager
def _live() -> Iterator[Callable[[str], None]]:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=stderr, transient=True)
    task = bar.add_task("self-check", total=None)
    with bar:
        yield lambda name: bar.update(task, description=f"self-check: {name} done")
