"""A vLLM server of our own: started, waited for, tried, and stopped with everything it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import requests

from laid_eval.errors import UserError
from laid_eval.models.load import Described, takes_pictures
from laid_eval.serving.endpoint import Endpoint
from laid_eval.serving.flags import Pictures, vllm_flags, vllm_variables
from laid_eval.serving.installation import server_python

LAUNCH = Path(__file__).with_name("launch.py")
TAIL = 15
"""Lines of the log that are shown when a server dies."""
_PATIENCE = 20.0  # seconds for a clean end
_OURS = {
    "--served-model-name": "use --name.",
    "--max-model-len": "use --max-length.",
    "--api-key": "a server of ours listens at the loopback and takes no key; put a proxy with keys before it.",
}


@dataclass(frozen=True)
class Plan:
    """A server to be started."""

    described: Described
    command: tuple[str, ...]
    variables: dict[str, str]
    endpoint: Endpoint
    log: Path


def plan_server(
    described: Described,
    *,
    log: Path | None = None,
    env: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    name: str | None = None,
    max_length: int | None = None,
    pictures: Pictures | None = None,
    flags: Sequence[str] = (),
) -> Plan:
    """Find vLLM and a port, and write the command line; nothing is started.

    Args:
        described: The model; lengths, type and rope scaling are its own.
        log: File for what the server says. Default: `runs/serve-PORT.log`.
        env: See `installation.server_python`.
        host: Address to listen at; the loopback unless told otherwise.
        port: Default: one that is free.
        name: Under which the model is served. Default: as it was named.
        max_length: Longest context, tokens. Default: what the configuration states.
        pictures: How many of what size a prompt may hold, for models that take them.
        flags: More flags for vLLM, as they are: `--tensor-parallel-size 2`.

    Raises:
        UserError: No vLLM, no such port, no length, or pictures for a model that takes none.
    """
    taken = next((flag for flag in flags if flag.partition("=")[0] in _OURS), None)
    if taken:
        raise UserError(f"{taken} is set by laid-eval itself: {_OURS[taken.partition('=')[0]]}")
    python = server_python(env)
    served_as = name or described.source.name
    claimed = described.claimed_length
    length = max_length or claimed
    if not length:
        raise UserError(f"Model {served_as!r} states no maximum length; say how far contexts go: --max-length 8192.")
    if pictures and not takes_pictures(described):
        raise UserError(f"Model {served_as!r} takes no pictures. Leave --images out.")
    port = _free_port(host, port)
    flag_list = vllm_flags(described, length, served_as, host, port, pictures, flags)
    variables = vllm_variables(described, length)
    if claimed and length > claimed:
        variables["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # beyond the claim is what a window measurement looks at
    endpoint = Endpoint(f"http://{_reachable(host)}:{port}/v1", served_as, described.source.folder, length)
    command = (str(python), str(LAUNCH), *flag_list)
    return Plan(described, command, variables, endpoint, log or Path("runs") / f"serve-{port}.log")


@contextmanager
def running(plan: Plan, waiting: Callable[[str], None] = lambda _: None, patience: float = 1800.0) -> Iterator[Server]:
    """The server, ready; on leaving it is stopped with all its processes.

    Args:
        plan: From `plan_server`.
        waiting: Told the last line of the log while it comes up.
        patience: Seconds that it may take to come up.

    Raises:
        UserError: It died or did not come up; with the last lines of its log.
    """
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    with plan.log.open("wb") as log:
        server = Server(plan, _start(plan, log))
        try:
            server.wait_until_ready(waiting, patience)
            yield server
        finally:
            server.stop()


def _start(plan: Plan, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches us alone, and all that it starts can be ended together.
    # Its standard input is the pipe by which it notices that we are gone.
    return subprocess.Popen(
        plan.command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**{k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}, **plan.variables},
        start_new_session=True,
    )


class Server:
    """A server's process."""

    def __init__(self, plan: Plan, process: subprocess.Popen[bytes]) -> None:
        """`process` was started from `plan`."""
        self.plan = plan
        self.endpoint = plan.endpoint
        self.process = process
        self._session = requests.Session()
        self._session.trust_env = False  # it is on this machine: no proxy stands between

    def wait_until_ready(self, waiting: Callable[[str], None], patience: float) -> None:
        """Until it answers, and then a first token."""
        started = time.monotonic()
        while not self._answers():
            if self.process.poll() is not None:
                raise UserError(f"The server ended with code {self.process.returncode}. {self._tail()}")
            if time.monotonic() - started > patience:
                raise UserError(f"The server did not come up within {patience:.0f} s. {self._tail()}")
            lines = self._lines()
            waiting(lines[-1] if lines else "")
            time.sleep(0.5)
        body: dict[str, Any] = {"model": self.endpoint.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        try:
            answer = self._session.post(f"{self.endpoint.base_url}/completions", json=body, timeout=patience)
        except requests.RequestException as error:
            raise UserError(f"The server came up but did not answer ({type(error).__name__}). {self._tail()}") from None
        if answer.status_code != 200:
            raise UserError(f"The server came up but refused a first token: {answer.text[:200]} {self._tail()}")

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        return self.process.wait()

    def died(self) -> str:
        """What it last said, for an error."""
        return f"The server ended with code {self.process.poll()}. {self._tail()}"

    def stop(self) -> None:
        """End it and everything it started; harmless when it is gone."""
        family = self._family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # vLLM's own way to a clean end
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE)
        for end in (psutil.Process.terminate, psutil.Process.kill):  # workers that outlived it
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, family = psutil.wait_procs(family, timeout=5)
        self.process.wait()
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()

    def _family(self) -> list[psutil.Process]:
        """All processes of its session: children whose parent died stay in it."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def _answers(self) -> bool:
        try:
            return self._session.get(f"{self.endpoint.root}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _lines(self) -> list[str]:
        text = self.plan.log.read_text(errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def _tail(self) -> str:
        lines = self._lines()[-TAIL:]
        return f"The end of its log ({self.plan.log}):\n" + "\n".join(f"  {line[:300]}" for line in lines)


def _free_port(host: str, port: int | None) -> int:
    kind: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port or 0))
        except OSError as error:
            raise UserError(
                f"Port {port} at {host} can't be had ({error.strerror}). Choose another --port, or end what holds it."
            ) from None
        return int(trial.getsockname()[1])


def _reachable(host: str) -> str:
    """Where a server that listens at `host` is reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
