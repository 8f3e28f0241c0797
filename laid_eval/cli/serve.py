"""`laid-eval serve`, and the options by which other commands reach servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from laid_eval.cli.console import Device, Dtype, Json, Revision, TrustRemoteCode, fail, stderr
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.serving.server import Plan, Server

EPILOG = """
**Examples**

`laid-eval serve --model smollm2`  at http://127.0.0.1:8000/v1, until Ctrl-C

`laid-eval serve --model ./student --images 150 --image-size 448`  a vision-language model

`laid-eval serve --model org/name --tensor-parallel-size 4 --data-parallel-size 2`  any flag of vLLM passes through

`laid-eval serve --model org/name --tensor-parallel-size 8 --distributed-executor-backend ray`  over several machines
"""
ServerEnv = Annotated[
    Path | None,
    typer.Option(help="Virtual environment with vLLM. Default: $LAID_EVAL_SERVER_ENV, .serve-env, this one."),
]
Patience = Annotated[float, typer.Option(help="Seconds that the server may take to come up.")]


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Reference model, local folder, .gguf file, or Hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name to serve it under. Default: as it was named.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest context, tokens. Default: what the model states.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Most images of a prompt.")] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Longest side of an image, pixels.")] = 448,
    rope_scaling: Annotated[str | None, typer.Option(help="yarn:2, linear:2 or dynamic:2.")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    server_env: ServerEnv = None,
    patience: Patience = 1800.0,
    log: Annotated[Path | None, typer.Option(help="File for the server's log. Default: runs/serve-PORT.log.")] = None,
    as_json: Json = False,
) -> None:
    """Serve a model through vLLM, with the right flags; every other flag passes through to vLLM."""
    from laid_eval.serving.flags import Pictures
    from laid_eval.serving.server import plan_server
    from laid_eval.window.model_session import prepare

    prepared = prepare(model, revision, dtype, device, rope_scaling, trust_remote_code, allow_pickle=False)
    plan = plan_server(
        prepared.described,
        log=log,
        env=server_env,
        host=host,
        port=port,
        name=name,
        max_length=max_length,
        pictures=Pictures(images, image_size, image_size) if images else None,
        flags=context.args,
    )
    with live_server(plan, patience) as server:
        endpoint = server.endpoint
        said = {"base_url": endpoint.base_url, "model": endpoint.model, "max_length": endpoint.max_length}
        said |= {"tokenizer": str(endpoint.tokenizer), "pid": server.process.pid, "log": str(plan.log)}
        if as_json:
            print(json.dumps(said), flush=True)
        stderr.print(f"{escape(endpoint.model)} is served at {endpoint.base_url}, log in {escape(str(plan.log))}")
        stderr.print(
            f"measure it: laid-eval window --base-url {endpoint.base_url} --model {escape(endpoint.model)}",
            soft_wrap=True,
        )
        stderr.print("Ctrl-C ends it.")
        try:
            server.wait()
        except KeyboardInterrupt:
            fail("the server is stopped", 130)
        raise UserError(server.died())


@contextmanager
def live_server(plan: Plan, patience: float) -> Iterator[Server]:
    """A server of our own, with a live line while it comes up."""
    from laid_eval.serving.server import running

    with stderr.status(f"starting vLLM for {escape(plan.endpoint.model)}") as status:

        def waiting(line: str) -> None:
            status.update(f"starting vLLM for {escape(plan.endpoint.model)}: [dim]{escape(line[:100])}[/dim]")

        with running(plan, waiting, patience) as server:
            status.stop()
            yield server
