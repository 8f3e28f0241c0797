"""The split of `laid-eval window --why` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from laid_eval.records import Why, WhyValue


def show_why(why: Why, console: Console) -> None:
    """How the questions were asked, how the loss splits, and the sentence that sums it up."""
    from laid_eval.window.why import verdict

    console.print(
        f"[bold]why the window ends, probe {why.probe}[/bold]: the same {why.asked} questions on {why.haystacks} "
        f"haystacks of {why.short_length:,} and of {why.length:,} tokens"
    )
    console.print(_table("asked", "score", why.conditions, f"{100 * why.confidence:g}% interval"))
    console.print()
    console.print(_table("share of the score above chance", "share", why.parts, f"{100 * why.confidence:g}% interval"))
    console.print(verdict(why))
    took = f" in {why.seconds / 60:.1f} min" if why.seconds else ""
    console.print(f"cost of this: {why.tokens:,} tokens of text read{took}")
    if why.failed:
        console.print(f"{why.failed} question(s) failed in one of the six ways and are left out")
    console.print()


def _table(what: str, figure: str, values: tuple[WhyValue, ...], interval: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column(what)
    table.add_column(figure, justify="right")
    table.add_column(interval)
    table.add_column("margin, nats", justify="right")
    for v in values:
        nats = "" if v.margin is None else f"{v.margin:+.2f} [{v.margin_low:+.2f}, {v.margin_high:+.2f}]"
        table.add_row(v.name, v.words, f"{v.value:.2f}", f"[{v.low:.2f}, {v.high:.2f}]", nats)
    return table
