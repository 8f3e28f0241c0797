"""`laid-eval window`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from laid_eval.cli.console import (
    GIB,
    PROGRAM,
    AllowPickle,
    Device,
    Dtype,
    Haystack,
    Json,
    Revision,
    Steps,
    TrustRemoteCode,
    fail,
    print_run,
    show,
    stderr,
)
from laid_eval.cli.serve import ServerEnv
from laid_eval.cli.served_window import ServerOptions, measure_behind
from laid_eval.cli.window_table import show_window
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.window.reading import Progress as Step
    from laid_eval.window.session import Quote
    from laid_eval.window.visual_haystacks import DatasetProbe

EPILOG = """
**Examples**

`laid-eval window --model smollm2`  the reference model, probe `needle`

`laid-eval window --model ./checkpoint --probe needle --probe multikey --out runs/mine`  resumes if killed

`laid-eval window --model org/name --max-length 32768 --precision 0.25 --budget 2000000`

`laid-eval window --model smollm2 --rope-scaling yarn:2`  what the window would be if

`laid-eval window --model smollm2 --out runs/mine --why`  why it ends

`laid-eval window --model ./checkpoint --backend vllm`  through vLLM, started and stopped for it

`laid-eval window --base-url http://127.0.0.1:8000/v1 --model NAME`  through a server that runs

`laid-eval window --model VLM --dataset visual_haystack_5.json --dataset visual_haystack_50.json --images coco`
"""


def window(
    model: Annotated[
        str | None,
        typer.Option(help="Reference model (see `laid-eval models`), local folder, .gguf file, or Hub id."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="What is asked: a name from `laid-eval probes`, a .toml file, or `all`. Repeatable."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest context, tokens or images. Default: 1.5 x the claimed length; 150 images."),
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Shortest context, tokens or images. Default: the probe's.")
    ] = None,
    precision: Annotated[
        float, typer.Option(help="Stop when the interval is this narrow, in octaves (doublings).")
    ] = 0.5,
    budget: Annotated[
        int | None, typer.Option(help="Stop after this many tokens. Default: 6 x max-length for every probe.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="relative, half, absolute, chance or anchored; with a value: relative:0.9.")
    ] = "relative",
    anchor: Annotated[Path | None, typer.Option(help="Run folder whose base score `anchored` refers to.")] = None,
    confidence: Annotated[float, typer.Option(help="Mass of the interval.")] = 0.95,
    haystack: Haystack = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option(help="visual_haystack_*.json of the published Visual Haystacks instead of a probe. Repeatable."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with the data set's pictures: train2017, val2017.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="seeded: forced choice. published: free answers, scored as published.")
    ] = "seeded",
    positions: Annotated[
        bool, typer.Option("--positions", help="The published position experiment: the needle at about ten places.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out cases of the data set whose pictures are not there.")
    ] = False,
    questions: Annotated[int | None, typer.Option(help="Cases of each file, from its start. Default: all.")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    rope_scaling: Annotated[
        str | None, typer.Option(help="yarn:2, linear:2 or dynamic:2: what the window would be if.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; resumed if it holds the same run. Default: a new one in runs/.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of texts, facts and questions.")] = 0,
    why: Annotated[
        bool, typer.Option("--why", help="Also find out why the window ends; reuses a finished run in --out.")
    ] = False,
    why_length: Annotated[
        int | None, typer.Option(help="Length at which to ask why, tokens. Default: the window under `half`.")
    ] = None,
    why_haystacks: Annotated[int | None, typer.Option(help="Texts to read for --why. Default: 6.")] = None,
    why_questions: Annotated[int | None, typer.Option(help="Most questions on each of them. Default: 12.")] = None,
    backend: Annotated[
        str, typer.Option(help="hf: in this process. vllm: through a vLLM server that is started and stopped.")
    ] = "hf",
    base_url: Annotated[
        str | None, typer.Option(help="Running OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a served model: folder or Hub id. Default: the server's checkpoint.")
    ] = None,
    api: Annotated[str, typer.Option(help="How a server is asked: auto, tokens, completions or chat.")] = "auto",
    answers: Annotated[
        str, typer.Option(help="logprobs: of the choices. generate: replies, for servers that give none.")
    ] = "logprobs",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to a server under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer of a server.")] = 600.0,
    server_env: ServerEnv = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Measure readers with known windows instead of a model.")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Runs per kind of reader in the self-check.")] = 300,
    as_json: Json = False,
) -> None:
    """Measure how long a context a model can really use: window, interval, picture, cost."""
    if self_check:
        _self_check(runs, seed, as_json)
        return
    if model is None:
        raise UserError("Which model? Pass --model; try: laid-eval window --model smollm2")
    given: dict[str, Any] = {"why_length": why_length, "why_haystacks": why_haystacks, "why_questions": why_questions}
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and not why:
        raise UserError(f"--{next(iter(chosen)).replace('_', '-')} only means something with --why; add it.")
    data = _dataset(dataset, images, protocol, positions, allow_missing, questions)
    if data and probe:
        raise UserError("--dataset brings its own questions; leave --probe out.")
    # Imported here: --help needs none of it.
    from laid_eval.report.plot.causes import save_why
    from laid_eval.report.plot.pictures import save_pictures
    from laid_eval.report.plot.windows import save_figures
    from laid_eval.runs import TRIALS, WHY
    from laid_eval.window.session import measure_window

    asked: dict[str, Any] = {
        "probe": data or probe or ["needle"], "out": out, "max_length": max_length, "min_length": min_length,
        "haystack": haystack or [], "criterion": criterion, "anchor": anchor, "confidence": confidence,
        "precision": precision, "budget": budget, "seed": seed,
    }  # fmt: skip
    of_model: dict[str, Any] = {
        "revision": revision, "dtype": dtype, "device": device, "rope_scaling": rope_scaling,
        "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
    }  # fmt: skip
    server = ServerOptions(backend, base_url, tokenizer, api, answers, concurrency, timeout, server_env)
    if server.used and data:
        raise UserError("--dataset is measured in this process so far. Leave --backend and --base-url out.")
    if server.used and why:
        raise UserError("--why turns keys of the model's cache, which no server lets out. Measure with --backend hf.")
    with _live() as (announce, step):
        try:
            if server.used:
                run = measure_behind(model, server, of_model, {**asked, "progress": step})
            else:
                run = measure_window(model, **asked, **of_model, why=why, **chosen, announce=announce, progress=step)
        except KeyboardInterrupt:
            step.interrupted()
    figures = [*save_figures(run), *save_why(run), *save_pictures(run, data)]
    if as_json:
        print_run(run.path, run.header)
    files = [TRIALS, *([WHY] if run.header.why else []), *(f.name for f in figures)]
    show_window(run, Console(stderr=as_json, highlight=False), files)
    if why and not run.header.why:
        fail("the window was measured, but it can't be said why it ends; the notes tell the reason.", 3)


def _dataset(
    files: list[Path] | None,
    images: Path | None,
    protocol: str,
    positions: bool,
    allow_missing: bool,
    questions: int | None,
) -> DatasetProbe | None:
    """What `--dataset` and its own options ask for."""
    given = {
        "images": images is not None,
        "protocol": protocol != "seeded",
        "positions": positions,
        "allow-missing": allow_missing,
        "questions": questions is not None,
    }
    if not files:
        for name, there in given.items():
            if there:
                raise UserError(f"--{name} only means something with --dataset; add it.")
        return None
    if images is None:
        raise UserError("--dataset needs --images: the folder with its pictures, which holds train2017 and val2017.")
    from laid_eval.window.visual_haystacks import visual_haystacks

    return visual_haystacks(files, images, protocol, positions, allow_missing, questions)


@contextmanager
def _live() -> Iterator[tuple[Callable[[Quote], None], Steps[Step]]]:
    """The quote and a live line with the estimate so far, on stderr."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}% of budget"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[estimate]}"),
        console=stderr,
        transient=True,
    )
    task = bar.add_task("loading", total=None, estimate="")

    def announce(quote: Quote) -> None:
        minutes = f"{quote.minutes:.0f}" if quote.minutes > 1 else "1"
        stderr.print(
            f"Quote: up to about {quote.tokens:,} tokens (contexts up to {quote.max_length:,}), {quote.questions:,} "
            f"questions, {minutes} min and {quote.memory_bytes / GIB + PROGRAM:.1f} GiB on this machine.",
            soft_wrap=True,
        )

    def update(step: Step) -> None:
        window = f"window {step.estimate}" if step.estimate else ""
        bar.update(
            task,
            total=step.budget,
            completed=min(step.used, step.budget),
            description=f"{step.probe}, haystack {step.haystack + 1}: {step.length:,}/{step.longest:,} {step.unit}, "
            f"{step.questions} answers",
            estimate=window,
        )

    with bar:
        yield announce, Steps(update)


def _self_check(runs: int, seed: int, as_json: bool) -> None:
    """Calibrate on readers with planted windows; exit 1 where an interval or an error is out of bounds."""
    from laid_eval.window.calibrate import check_all

    with _live_check() as advance:
        results = check_all(runs, seed, advance)
    if as_json:
        print(json.dumps([r.as_dict() for r in results], indent=1, allow_nan=False))
    else:
        table = Table(box=None, pad_edge=False)
        for column in (
            "reader",
            "planted",
            "runs",
            "questions",
            "coverage",
            "median error",
            "median width",
            "in bounds",
        ):
            table.add_column(column, justify="left" if column == "reader" else "right")
        for r in results:
            table.add_row(
                r.family,
                f"{r.planted:,.0f}",
                str(r.runs),
                f"{r.trials:.0f}",
                f"{r.coverage:.1%}",
                f"{r.median_error:.3f} oct",
                f"{r.median_width:.2f} oct",
                "yes" if r.in_bounds else "NO",
            )
        show(table)
    if not all(r.in_bounds for r in results):
        fail("some readers are out of bounds", 1)


@contextmanager
def _live_check() -> Iterator[Callable[[str], None]]:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=stderr, transient=True)
    task = bar.add_task("self-check", total=None)
    with bar:
        yield lambda name: bar.update(task, description=f"self-check: {name} done")
