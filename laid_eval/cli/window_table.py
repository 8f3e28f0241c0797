"""The result of `laid-eval window` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laid_eval.cli.console import GIB
from laid_eval.cli.why import show_why

if TYPE_CHECKING:
    from laid_eval.records import ImageExtent, Run, WindowEstimate
    from laid_eval.runs import LoadedRun


def show_window(run: LoadedRun, console: Console, files: list[str]) -> None:
    """The result for people: windows, how they were measured, what it cost, where it lies."""
    header = run.header
    model = header.model
    size = f", {model.parameters / 1e6:,.0f}M parameters" if model.parameters else ""
    console.print(f"[bold]{escape(model.name)}[/bold] ({escape(model.source)}{size})")
    console.print(f"claimed length {model.claimed_length or 'unknown'}, {model.dtype} on {model.device}\n")
    for name in header.settings.probes:
        found = [w for w in header.windows if w.probe == name]
        if not found:
            console.print(f"{name}: too few answers for an estimate, which takes 8 at two lengths")
            _show_scores(header, name, console)
            continue
        first = found[0]
        table = Table(box=None, pad_edge=False)
        for column, justify in (
            ("criterion", "left"),
            ("window", "right"),
            (f"{100 * first.confidence:g}% interval", "left"),
            ("definition", "left"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for k, w in enumerate(found):
            style = "bold" if k == 0 else ""
            table.add_row(w.criterion, w.value_text(), w.interval_text(), w.definition, style=style)
        console.print(f"[bold]probe {name}[/bold]: effective context window in {first.unit}")
        console.print(table)
        plural = "" if first.haystacks == 1 else "s"
        effect = f", design effect {first.design_effect:.2f}" if first.design_effect else ""
        console.print(
            f"base score {first.base_score:.2f} [{first.base_low:.2f}, {first.base_high:.2f}], chance "
            f"{first.chance:.3g}; {first.trials} questions on {first.haystacks} haystack{plural}"
            f"{effect}; method: {first.method}"
        )
        if header.image:
            console.print(_in_tokens(first, header.image))
        if header.stopped and name in header.stopped:
            console.print(f"stopped because {header.stopped[name]}")
        _show_scores(header, name, console)
        console.print()
    for why in header.why or ():
        show_why(why, console)
    cost = header.cost
    read = cost.prefill_tokens + cost.question_tokens
    memory = f", peak memory {cost.peak_memory_bytes / GIB:.1f} GiB" if cost.peak_memory_bytes else ""
    console.print(
        f"cost: {read:,} tokens in {cost.seconds / 60:.1f} min{memory}; one whole prompt per question would be "
        f"{cost.whole_prompt_tokens:,} tokens ({cost.whole_prompt_tokens / max(read, 1):.0f} times as many)"
    )
    for note in header.notes:
        console.print(f"note: {escape(note)}")
    console.print(f"run: {escape(str(run.path))} ({', '.join(['run.json', *files])})", soft_wrap=True)


def _show_scores(header: Run, probe: str, console: Console) -> None:
    """A data set's own table: raw score by number of images, and how many answers say yes or no at all."""
    scores = [score for score in header.scores or () if score.probe == probe]
    if not scores:
        return
    interval = f"{100 * header.settings.confidence:g}% interval"
    free = any(score.complied for score in scores)
    table = Table(box=None, pad_edge=False)
    for column in (
        "images",
        "score",
        interval,
        *(("says yes/no", interval) if free else ()),
        "questions",
        "haystacks",
    ):
        table.add_column(column, justify="left" if column == interval else "right")
    for score in scores:
        shares = (score.score, *((score.complied,) if score.complied else ()))
        cells = [cell for s in shares for cell in (f"{s.value:.2f}", escape(f"[{s.low:.2f}, {s.high:.2f}]"))]
        table.add_row(str(score.length), *cells, str(score.questions), str(score.haystacks))
    console.print(table)


def _in_tokens(window: WindowEstimate, image: ImageExtent) -> str:
    """The window in images said in the two other measures of a context."""
    size = f"an image of {image.width} x {image.height} pixels takes" if image.width else "an image takes on average"
    size += f" {image.tokens} tokens and moves on by "
    size += f"{image.positions} RoPE positions"
    if window.length is None:
        return size
    return (
        f"{size}: {window.length * image.tokens:,.0f} tokens, {window.length * image.positions:,.0f} positions "
        f"({window.criterion})"
    )
