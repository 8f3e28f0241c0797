"""What `laid-eval spectrum` prints where pictures were shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from laid_eval.spectra import PictureFindings


def show_pictures(found: PictureFindings, console: Console) -> int:
    """Axes, types of token and positions, for people; the positions of a prompt, in which coverage is told."""
    if found.axes:
        console.print("\n[bold]rotary pairs by position axis[/bold] (wavelengths in positions; contribution in nats)")
        table = _table("axis", "pairs", "wavelengths", "usage", "even", "contribution")
        for a in found.axes:
            span = "" if a.shortest is None or a.longest is None else f"{a.shortest:,.0f} - {a.longest:,.0f}"
            table.add_row(a.axis, f"{a.pairs:g}", span, str(a.usage), f"{a.even:.3g}", str(a.contribution))
        console.print(table)
    console.print("\n[bold]attention by type of token[/bold] (outside sinks; queries of the second half)")
    table = _table("from", "on", "mass", "share of keys", "ratio")
    for t in found.types:
        table.add_row(t.query, t.key, str(t.mass), f"{t.share.value or 0:.3g}", str(t.ratio))
    console.print(table)
    audit = found.audit
    steps = " or ".join(map(str, audit.picture_steps))
    order = "never fall back" if audit.monotone else "FALL BACK: a later token stands before an earlier one"
    counted = (
        f"counted by {_COUNTED[audit.counted]} (transformers {audit.transformers or 'unknown'}, hash {audit.hash})"
    )
    console.print(
        f"\npositions: {audit.tokens:,} tokens take {audit.positions:,} ({audit.positions_per_token:.2g} a token), a "
        f"picture of {audit.picture_tokens} takes {steps}; they {order}; {counted}"
    )
    return audit.positions


_COUNTED = {"get_rope_index": "the model's own get_rope_index", "slots": "token, on one axis"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 or column in ("on", "wavelengths") else "right")
    return table
