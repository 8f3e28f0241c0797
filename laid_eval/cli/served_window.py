"""`laid-eval window` through a server: a running one, or one that is started for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape

from laid_eval.cli.console import stderr
from laid_eval.cli.serve import live_server
from laid_eval.errors import UserError

if TYPE_CHECKING:
    from laid_eval.runs import LoadedRun


@dataclass(frozen=True)
class ServerOptions:
    """How a model behind HTTP is reached and asked; see `laid-eval window --help`."""

    backend: str
    base_url: str | None
    tokenizer: str | None
    api: str
    answers: str
    concurrency: int
    timeout: float
    env: Path | None

    @property
    def used(self) -> bool:
        """Whether a server is to be asked at all.

        Raises:
            UserError: Options that mean nothing together.
        """
        if self.backend not in ("hf", "vllm"):
            raise UserError(f"Unknown --backend {self.backend!r}. Allowed: hf, vllm (or a running server: --base-url).")
        if self.base_url and self.backend == "vllm":
            raise UserError("--backend vllm starts a server of its own; --base-url names a running one. Give one.")
        used = self.backend == "vllm" or self.base_url is not None
        if not used:
            given: dict[str, Any] = {"--tokenizer": self.tokenizer, "--server-env": self.env}
            given |= {"--api": self.api != "auto", "--answers": self.answers != "logprobs"}
            for name, value in given.items():
                if value:
                    raise UserError(f"{name} is about servers; add --base-url URL or --backend vllm.")
        if self.tokenizer and not self.base_url:
            raise UserError("--tokenizer is for running servers (--base-url); a server of our own has its model's.")
        return used


def measure_behind(
    model: str, server: ServerOptions, of_model: dict[str, Any], asked: dict[str, Any]
) -> LoadedRun:  # fmt: skip
    """Measure through a server; `of_model` and `asked` are options of `measure_window`.

    Raises:
        UserError: As `measure_served`; options about weights with a server that has them already.
    """
    from laid_eval.serving.connect import Answers, Api, find_endpoint
    from laid_eval.serving.window import measure_served, plan_for_window
    from laid_eval.window.model_session import prepare

    for name, value, allowed in (("api", server.api, get_args(Api)), ("answers", server.answers, get_args(Answers))):
        if value not in allowed:
            raise UserError(f"Unknown --{name} {value!r}. Allowed: {', '.join(allowed)}.")
    how: dict[str, Any] = {
        "api": server.api, "answers": server.answers, "concurrency": server.concurrency, "timeout": server.timeout,
        "announce": lambda text: stderr.print(escape(text), soft_wrap=True),
    }  # fmt: skip
    if server.base_url:
        for name, value in of_model.items():
            if value not in (None, False, "auto"):
                option = name.replace("_", "-")
                raise UserError(f"--{option} is about weights that the server at --base-url has loaded. Leave it out.")
        return measure_served(find_endpoint(server.base_url, model, server.tokenizer), **how, **asked)
    plan = plan_for_window(prepare(model, **of_model), asked["probe"], asked["max_length"], server.env)
    with live_server(plan, patience=1800.0) as running:
        return measure_served(running.endpoint, known=plan.described.info, **how, **asked)
