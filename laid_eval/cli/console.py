"""What the commands share: where they print, how they fail, options of the same meaning."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, Protocol, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from laid_eval.records import Record

stderr = Console(stderr=True, highlight=False)
GIB = 1024**3
PROGRAM = 0.5  # GiB that Python, torch and the tokenizer take beside the model

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")]
Haystack = Annotated[
    list[Path] | None, typer.Option(help="File with filler text. Repeatable. Default: Python's reference.")
]


class Step(Protocol):
    """What a measurement reports of itself."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        ...


AnyStep = TypeVar("AnyStep", bound=Step)


class Steps(Generic[AnyStep]):
    """Feeds a live line; remembers where the run lies for the message on Ctrl-C."""

    def __init__(self, update: Callable[[AnyStep], None]) -> None:
        """`update` shows one step."""
        self.folder: Path | None = None
        self._update = update

    def __call__(self, step: AnyStep) -> None:
        """One step on."""
        self.folder = step.folder
        self._update(step)

    def interrupted(self) -> NoReturn:
        """Say how to go on, and exit."""
        kept = f" What was measured is kept; the same command with --out '{self.folder}' goes on."
        fail(f"interrupted.{kept if self.folder else ''}", 130)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    print(f"laid-eval: {message}", file=sys.stderr)
    sys.exit(code)


def print_run(folder: Path, header: Record) -> None:
    """A run as the one JSON document on stdout."""
    print(json.dumps({"run": str(folder), **header.model_dump(mode="json")}, indent=1, allow_nan=False))


def show(what: Any) -> None:
    """Print on stdout."""
    Console(highlight=False).print(what)
