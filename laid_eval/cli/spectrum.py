"""`laid-eval spectrum`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from laid_eval.cli.console import (
    GIB,
    AllowPickle,
    Device,
    Dtype,
    Haystack,
    Json,
    Revision,
    Steps,
    TrustRemoteCode,
    print_run,
    stderr,
)
from laid_eval.cli.picture_spectrum import show_pictures
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.spectra import Band, Estimate, LoadedSpectrum, SpectrumRun
    from laid_eval.spectrum.running import Progress as Step

_WIDE = 130  # columns from which definitions stand beside the numbers

EPILOG = """
**Examples**

`laid-eval spectrum --model smollm2`  attention and rotary pairs at 8,192 tokens

`laid-eval spectrum --model student --teacher teacher`  what of the teacher's reach the student keeps

`laid-eval spectrum --model smollm2 --knockout loss`  what each band of wavelengths is worth

`laid-eval spectrum --model smollm2 --what-if yarn:2 --what-if base:4`  predicted, then tried

`laid-eval spectrum --model pocket-student --images 40`  a vision-language model, shown haystacks of pictures

`laid-eval spectrum --model org/large --weights-only`  from the weights alone, without loading the model
"""


def spectrum(
    model: Annotated[
        str | None,
        typer.Option(help="Reference model (see `laid-eval models`), local folder, .gguf file, or Hub id."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A second model to compare with, named the same way.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of each text. Default: the claimed length, at most 8192.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Pictures of each haystack (vision-language models). Default: 40; text with --length."),
    ] = None,
    texts: Annotated[
        int, typer.Option(help="Number of texts, or of haystacks of pictures; intervals are over them.")
    ] = 4,
    queries: Annotated[int, typer.Option(help="Rows of attention sampled per text.")] = 128,
    knockout: Annotated[
        str, typer.Option(help="no, loss, or window: what happens with each band of pairs unrotated.")
    ] = "no",
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="Predict another scaling, then try it: yarn:2, linear:2, dynamic:2, base:4. Repeatable."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Only what the weights say; the model is not loaded.")
    ] = False,
    haystack: Haystack = None,
    confidence: Annotated[float, typer.Option(help="Mass of the intervals.")] = 0.95,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    rope_scaling: Annotated[
        str | None, typer.Option(help="yarn:2, linear:2 or dynamic:2: measure the model as if scaled.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; resumed if it holds the same run. Default: a new one in runs/.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of texts and sampled rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Analyse attention and rotary pairs in the frequency domain, at real lengths, in linear memory."""
    if model is None:
        raise UserError("Which model? Pass --model; try: laid-eval spectrum --model smollm2")
    wanted = _knockout(knockout)
    # Imported here: --help needs none of it.
    from laid_eval.report.plot.spectra import save_spectra
    from laid_eval.runs import HEADER
    from laid_eval.spectra import load_spectrum

    with _live() as step:
        try:
            if weights_only:
                run = _weights(
                    model, teacher, images, length, wanted, what_if, out, revision, rope_scaling, trust_remote_code
                )
            else:
                from laid_eval.spectrum.session import measure_spectrum

                run = measure_spectrum(
                    model,
                    teacher=teacher,
                    length=length,
                    images=images,
                    texts=texts,
                    queries=queries,
                    knockout=wanted,
                    what_if=what_if or [],
                    haystack=haystack or [],
                    confidence=confidence,
                    out=out,
                    seed=seed,
                    revision=revision,
                    dtype=dtype,
                    device=device,
                    rope_scaling=rope_scaling,
                    trust_remote_code=trust_remote_code,
                    allow_pickle=allow_pickle,
                    progress=step,
                )
        except KeyboardInterrupt:
            step.interrupted()
    figures = save_spectra(run)
    if (run.path / "teacher" / HEADER).is_file():
        save_spectra(load_spectrum(run.path / "teacher"))
    if as_json:
        print_run(run.path, run.header)
    show_spectrum(run, Console(stderr=as_json, highlight=False), [f.name for f in figures])


def _knockout(name: str) -> Literal["no", "loss", "window"]:
    for known in ("no", "loss", "window"):
        if name == known:
            return known
    raise UserError(f"Unknown --knockout {name!r}. Allowed: no, loss, window.")


def _weights(
    model: str,
    teacher: str | None,
    images: int | None,
    length: int | None,
    knockout: str,
    what_if: list[str] | None,
    out: Path | None,
    revision: str | None,
    rope_scaling: str | None,
    trust_remote_code: bool,
) -> LoadedSpectrum:
    from laid_eval.spectrum.weights_session import measure_weights

    if teacher or images is not None or knockout != "no" or what_if:
        raise UserError(
            "--weights-only reads no text: it can't be combined with --teacher, --images, --knockout or --what-if."
        )
    return measure_weights(
        model,
        length=length,
        out=out,
        revision=revision,
        rope_scaling=rope_scaling,
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def _live() -> Iterator[Steps[Step]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
    )
    task = bar.add_task("loading", total=None)
    with bar:
        yield Steps(lambda s: bar.update(task, total=s.total, completed=s.done, description=s.what))


def show_spectrum(run: LoadedSpectrum, console: Console, files: list[str]) -> None:
    """The result for people: metrics, bands, heads, comparison, cost, where it lies."""
    header = run.header
    model, settings = header.model, header.settings
    size = f", {model.parameters / 1e6:,.0f}M parameters" if model.parameters else ""
    console.print(f"[bold]{escape(model.name)}[/bold] ({escape(model.source)}{size})")
    console.print(f"claimed length {model.claimed_length or 'unknown'}; {_how(header)}\n")
    wide = console.width >= _WIDE
    console.print(_metrics_table(header, wide))
    if header.bands:
        console.print("\n[bold]rotary pairs by wavelength[/bold] (nats; intervals over texts in run.json)")
        console.print(_bands_table(header.bands))
    reach, unit = settings.length, "tokens"
    if header.pictures:
        reach, unit = show_pictures(header.pictures, console), "positions"
    if header.knockout_baseline:
        console.print(f"window with nothing unrotated: {header.knockout_baseline}")
    for c in header.coverage:
        where = "all rotating layers" if len(header.coverage) == 1 else f"layers {', '.join(map(str, c.layers))}"
        horizon = "beyond 1,048,576" if c.horizon is None else f"{c.horizon:,}"
        weighted = "beyond 1,048,576" if c.horizon_by_usage is None else f"{c.horizon_by_usage:,}"
        console.print(
            f"{where}: {c.full} of {c.pairs} pairs turn fully within {reach:,} {unit}, {c.partial} by a "
            f"quarter or more, {c.quasi_dc} less, {c.none} not at all; discrimination horizon {horizon} {unit}, "
            f"{weighted} by usage"
        )
    if header.top_heads:
        console.print("\n[bold]heads[/bold] (highest scores as layer.head; all in heads.csv)")
        for kind, found in header.top_heads.items():
            console.print(f"{kind:11}" + "  ".join(f"{h.layer}.{h.head} {h.score:.2f}" for h in found))
    if header.comparison and header.teacher:
        console.print(f"\n[bold]against the teacher {escape(header.teacher.name)}[/bold]")
        console.print(_comparison_table(header, wide))
    for w in header.what_if:
        console.print(
            f"what if {w.scaling}: mean logits change by {w.change:.2g} nats (RMS)"
            + ("" if w.agreement is None else f"; the prediction explains {w.agreement:.0%} of it")
            + f", and is off by {w.first_layer_error:.1g} in the first layer, where it is exact"
        )
    cost = header.cost
    memory = f", peak memory {cost.peak_memory_bytes / GIB:.1f} GiB" if cost.peak_memory_bytes else ""
    console.print(f"\ncost: {cost.tokens:,} tokens in {cost.seconds / 60:.1f} min{memory}")
    if header.checks:
        console.print(
            f"checks: captured attention gives the model's own logits within {header.checks['logit_gap']:.1g}; every "
            f"row's mass sums to 1 within {header.checks['mass_residual']:.1g}"
        )
    for note in header.notes:
        console.print(f"note: {escape(note)}")
    if not wide:
        console.print("every number's definition: run.json, --json, or a terminal of 130 columns")
    console.print(f"run: {escape(str(run.path))} ({', '.join(['run.json', *files])})", soft_wrap=True)


def _how(header: SpectrumRun) -> str:
    model, settings = header.model, header.settings
    if not settings.texts:
        return f"from the weights alone; coverage at {settings.length:,} tokens"
    rows = f"{settings.queries} rows each, {model.dtype} on {model.device}"
    if settings.pictures:
        shown = f"{settings.pictures.images} pictures ({settings.pictures.size} px) and a question"
        return f"{settings.texts} haystacks of {shown}, {settings.length:,} tokens or more, {rows}"
    return f"{settings.texts} texts of {settings.length:,} tokens, {rows}"


def _metrics_table(header: SpectrumRun, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for column, justify in (("metric", "left"), ("mean", "right"), ("interval", "left"), ("unit", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    if wide:
        table.add_column("definition")
    for m in header.metrics:
        table.add_row(m.name, _number(m.value), _interval(m), m.unit, *([m.definition] if wide else []))
    return table


def _bands_table(found: tuple[Band, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    measured = found[0].utility is not None
    knocked = found[0].knockout is not None
    windowed = any(b.knockout_window for b in found)
    columns = ["wavelength", "pairs", "usage", "even"]
    columns += ["contribution", "utility", "kind"] if measured else []
    columns += ["loss unrotated"] if knocked else []
    columns += ["window unrotated"] if windowed else []
    for column in columns:
        table.add_column(column, justify="left" if column in ("wavelength", "kind") else "right")
    for b in found:
        span = "do not turn" if b.low is None else f"{b.low:,.0f} and more"
        span = span if b.low is None or b.high is None else f"{b.low:,.0f} - {b.high:,.0f}"
        row = [span, f"{b.pairs:g}", f"{b.usage.value or 0:.1%}", f"{b.even:.1%}"]
        if measured:
            row += [_number(b.contribution), _number(b.utility), b.kind or ""]
        if knocked:
            rise = b.knockout.value if b.knockout else None
            row.append("" if rise is None else f"{rise:+.3f}")
        if windowed:
            row.append(b.knockout_window or "")
        table.add_row(*row)
    return table


def _comparison_table(header: SpectrumRun, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("measure", "value", "interval", "texts alone", "p", "unit", *(["definition"] if wide else [])):
        table.add_column(column, justify="right" if column in ("value", "texts alone", "p") else "left")
    for c in header.comparison:
        interval = "" if c.low is None or c.high is None else f"[{c.low:.3g}, {c.high:.3g}]"
        p = "" if c.p is None else f"{c.p:.2g}"
        row = (c.name, f"{c.value:.3g}", interval, _number(c.floor), p, c.unit)
        table.add_row(*row, *([c.definition] if wide else []))
    return table


def _number(x: Estimate | float | None) -> str:
    value = x if x is None or isinstance(x, float) else x.value
    return "unknown" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _interval(x: Estimate) -> str:
    return "" if x.low is None or x.high is None else f"[{_number(x.low)}, {_number(x.high)}]"
