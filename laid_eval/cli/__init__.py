"""The command line: parses, calls one function, prints, chooses the exit code. Nothing else prints or exits.

Exit codes: 0 done, 1 gate failed, 2 the user can mend it, 3 inconclusive, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from laid_eval.cli import distill, gate, lists, serve, spectrum, window
from laid_eval.cli.console import fail
from laid_eval.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Long-context evaluation and diagnostics for language models: how far can a model really read?",
)


def main() -> None:
    """Entry point of the `laid-eval` script."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)
    except typer.Abort:
        fail("interrupted", 130)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        # typer's own usage errors, whichever click they come from: message, usage, exit code
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()
        sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("laid-eval"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


app.command(epilog=window.EPILOG)(window.window)
app.command(epilog=spectrum.EPILOG)(spectrum.spectrum)
app.command(epilog=distill.EPILOG)(distill.distill)
app.command(epilog=serve.EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
app.command(epilog=gate.EPILOG)(gate.gate)
app.command()(lists.models)
app.command()(lists.probes)
app.command()(lists.recipes)
