"""`laid-eval distill`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from laid_eval.cli.console import (
    GIB,
    AllowPickle,
    Device,
    Dtype,
    Json,
    Steps,
    TrustRemoteCode,
    fail,
    print_run,
    stderr,
)
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.distillation.session import Report
    from laid_eval.distillations import LoadedDistillation

EPILOG = """
**Examples**

`laid-eval distill --teacher org/large --student org/small --recipe laid --out student`  resumes if killed

`laid-eval distill --teacher smollm2 --student ./damaged --recipe gain-only --out mended`

`laid-eval distill --student smollm2 --recipe sft --set data.source=mine.jsonl --set training.steps=500`

`laid-eval distill --teacher org/large-vl --student org/small-vl --set data.source=visual-which --set
'data.images=[2, 20]'`  on pictures; haystacks of 2 to 20 images

`accelerate launch --num_processes 8 -m laid_eval distill ...`  several accelerators, the same options
"""


def distill(
    student: Annotated[
        str | None,
        typer.Option(help="Model to train: reference model, local folder, .gguf file, or Hub id."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Model to learn from, of the same tokenizer.")] = None,
    recipe: Annotated[
        str, typer.Option(help="What is minimised: a name from `laid-eval recipes`, or a .toml file.")
    ] = "laid",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Field of the recipe set anew: training.steps=50. Repeatable.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the student on the Hub.")] = None,
    teacher_revision: Annotated[str | None, typer.Option(help="The same of the teacher.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of run and checkpoint; resumed if it holds the same run. Default: a new one in runs/."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples, sampled rows and mixtures.")] = 0,
    as_json: Json = False,
) -> None:
    """Distil a teacher's long-range attention into a student; leaves an ordinary checkpoint."""
    if student is None:
        raise UserError("Which student? Pass --student; try: laid-eval distill --help")
    changes = {}
    for text in setting or ():
        name, mark, value = text.partition("=")
        if not mark:
            raise UserError(f"--set {text!r} is not understood. Allowed: TABLE.FIELD=VALUE, e.g. training.steps=50.")
        changes[name] = value
    # Imported here: --help needs none of it.
    from laid_eval.distillation.processes import is_first
    from laid_eval.distillation.session import distill as run_distillation
    from laid_eval.report.plot.distillations import save_distillation_figures

    with _live() as step:
        try:
            run = run_distillation(
                student,
                teacher,
                recipe,
                out=out,
                changes=changes,
                seed=seed,
                revision=revision,
                teacher_revision=teacher_revision,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                progress=step,
            )
        except KeyboardInterrupt:
            fail(_how_to_go_on(step.folder), 130)
    if not is_first():
        return  # one of several processes: the first writes and tells
    figures = save_distillation_figures(run)
    if as_json:
        print_run(run.path, run.header)
    show_distillation(run, Console(stderr=as_json, highlight=False), [f.name for f in figures])


def _how_to_go_on(folder: Path | None) -> str:
    """What Ctrl-C has left of a training."""
    if folder is None:
        return "interrupted."
    from laid_eval.distillation.train import newest_checkpoint, step_of

    step = step_of(newest_checkpoint(folder))
    if step:
        return f"interrupted. The same command with --out '{folder}' goes on after step {step}."
    return (
        f"interrupted before the first checkpoint; the same command with --out '{folder}' starts again. How often one "
        "is written: --set training.save_every=10."
    )


@contextmanager
def _live() -> Iterator[Steps[Report]]:
    """A live line with the losses so far, on stderr."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
        console=stderr,
        transient=True,
    )
    task = bar.add_task("reading", total=None, values="")

    from laid_eval.distillations import TERMS

    def update(report: Report) -> None:
        window = f"window {report.window}" if report.window else ""
        if report.step is None:
            bar.update(task, description=report.doing, values=window)
            return
        values = report.step.values
        shown = [f"{n} {v:.3f}" for n, v in values.items() if n in ("loss", *TERMS)]
        serving = [v for n, v in values.items() if n.startswith("effective_heads")]
        shown += [f"teacher heads {sum(serving) / len(serving):.1f}"] if serving else []
        bar.update(
            task, total=report.step.steps, completed=report.step.step,
            description=f"step {report.step.step}/{report.step.steps}", values="  ".join([*shown, window]),
        )  # fmt: skip

    with bar:
        yield Steps(update)


def show_distillation(run: LoadedDistillation, console: Console, files: list[str]) -> None:
    """The result for people: what was trained, how the terms fell, what was folded, where it lies."""
    header = run.header
    teacher = f"teacher {escape(header.teacher.name)}" if header.teacher else "no teacher"
    console.print(
        f"[bold]{escape(header.student.name)}[/bold], {teacher}, recipe {escape(header.recipe['name'])}, data "
        f"{escape(header.data.split(':')[0])}"
    )
    kinds = [f"{count:,} {kind}" for kind, count in header.trained.items() if count]
    cost = header.cost
    console.print(f"trained: {', '.join(kinds)}; {cost.steps:,} steps, {cost.tokens:,} tokens")
    if header.pairs:
        shown = ", ".join(f"{a} on {b}" for a, b in header.pairs[:4])
        rest = f" and {len(header.pairs) - 4} more" if len(header.pairs) > 4 else ""
        console.print(f"layers matched (student on teacher): {shown}{rest}")
    console.print()
    console.print(_terms_table(run))
    for window in header.windows[-3:]:
        console.print(f"window after step {window.step:,}: {escape(window.text)}")
    if header.gains:
        low, high = min(g.lowest_db for g in header.gains), max(g.highest_db for g in header.gains)
        per = "by head and pair" if header.sharing == "head" else "by pair, shared by a layer's heads"
        shown = " to ".join(f"{round(db, 1) + 0.0:+.1f}" for db in (low, high))  # no minus zero
        console.print(f"gains {per}: {shown} dB, folded into the checkpoint")
    if header.certificate:
        layers, drift = header.certificate["layers"], header.certificate["drift"]
        console.print(
            f"fold certificate: queries within {max(x['error'] for x in layers):.1e} of the gained model's (wrong "
            f"layout: {min(x['control'] for x in layers):.1e}), log-probabilities within {drift['log_probability']:.1e}"
        )
    if header.export:
        console.print(
            f"checkpoint in {header.export['dtype']}, loaded anew: log-probabilities within "
            f"{header.export['largest_difference']:.1e}"
        )
    memory = f", peak memory {cost.peak_memory_bytes / GIB:.1f} GiB" if cost.peak_memory_bytes else ""
    console.print(f"cost: {cost.tokens:,} tokens in {cost.seconds / 60:.1f} min{memory}")
    for note in header.notes:
        console.print(f"note: {escape(note)}")
    console.print(
        f"checkpoint and run: {escape(str(run.path))} ({', '.join(['run.json', 'steps.jsonl', *files])})",
        soft_wrap=True,
    )


def _terms_table(run: LoadedDistillation) -> Table:
    """First and last values of the loss and its terms, and of the effective teacher heads."""
    table = Table(box=None, pad_edge=False)
    heads = any(name.startswith("effective_heads") for name in run.header.losses or {})
    table.add_column("nats; of effective heads, their number" if heads else "nats")
    table.add_column("first step", justify="right")
    table.add_column("last tenth", justify="right")
    for name, last in (run.header.losses or {}).items():
        if name in run.steps:
            table.add_row(name.replace("_", " "), f"{run.steps[name].iloc[0]:.4g}", f"{last:.4g}")
    return table
