"""Starting, watching and stopping a server; with a fake vLLM, since what is tested is the process around it."""

import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from laid_eval.errors import UserError
from laid_eval.models.load import describe
from laid_eval.models.source import resolve
from laid_eval.serving.flags import Pictures, vllm_flags
from laid_eval.serving.installation import server_python
from laid_eval.serving.server import plan_server, running

FAKE = """
import json, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
MODE = "{mode}"
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a worker
print("loading weights", flush=True)
if MODE == "dies":
    print("RuntimeError: out of planted memory", flush=True)
    sys.exit(7)
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400 if MODE == "refuses" else 200); self.end_headers()
        self.wfile.write(b"planted refusal" if MODE == "refuses" else b"{{}}")
    def log_message(self, *_): pass

if MODE != "silent":
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path):
    """Makes a folder that looks like an environment with vLLM in it."""

    def make(mode="works"):
        packages = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
        inner = packages / "vllm" / "entrypoints" / "openai"
        inner.mkdir(parents=True)
        for folder in (packages / "vllm", packages / "vllm" / "entrypoints", inner):
            (folder / "__init__.py").touch()
        (inner / "api_server.py").write_text(FAKE.format(mode=mode))
        python = tmp_path / "env" / "bin" / "python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IEXEC)
        return tmp_path / "env"

    return make


@pytest.fixture
def described(folder):
    return describe(resolve(str(folder)), device="cpu")


def session_of(pid):
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            pass
    return found


def test_it_is_ready_then_stopped_with_all_it_started(environment, described, tmp_path):
    plan = plan_server(described, env=environment(), log=tmp_path / "server.log")
    lines = []
    with running(plan, lines.append) as server:
        pid = server.process.pid
        assert len(session_of(pid)) == 2
        assert "loading weights" in plan.log.read_text()
    assert session_of(pid) == []
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("127.0.0.1", int(plan.endpoint.root.rpartition(":")[2])))


@pytest.mark.parametrize(
    ("mode", "message"),
    [("dies", r"(?s)ended with code 7.*out of planted memory"), ("refuses", "refused a first token: planted refusal"),
     ("silent", r"(?s)did not come up within 3 s.*loading weights")],
)  # fmt: skip
def test_one_that_does_not_come_up_says_why(environment, described, tmp_path, mode, message):
    plan = plan_server(described, env=environment(mode), log=tmp_path / "server.log")
    with pytest.raises(UserError, match=message), running(plan, patience=3):
        pass


def test_an_error_inside_stops_it_too(environment, described, tmp_path):
    plan = plan_server(described, env=environment(), log=tmp_path / "server.log")
    started = []

    def interrupted():
        with running(plan) as server:
            started.append(server.process.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert session_of(started[0]) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_command(environment, folder, tmp_path, how):
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    command = [sys.executable, "-m", "laid_eval", "serve", "--model", str(folder), "--device", "cpu"]
    command += ["--server-env", str(environment()), "--port", str(port), "--log", str(tmp_path / "log"), "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said = process.stdout.readline()
    assert f'"base_url": "http://127.0.0.1:{port}/v1"' in said
    child = psutil.Process(process.pid).children()[0].pid
    assert len(session_of(child)) == 2
    process.send_signal(how)
    process.communicate(timeout=30)
    until = time.monotonic() + 30
    while session_of(child) and time.monotonic() < until:
        time.sleep(0.2)
    assert session_of(child) == []
    if how == signal.SIGINT:
        assert process.returncode == 130


def test_the_flags_say_what_the_model_is(described):
    flags = vllm_flags(described, 4096, "mine", "127.0.0.1", 8000, None, ["--tensor-parallel-size", "2"])
    pairs = dict(itertools.pairwise(flags))
    assert (pairs["--served-model-name"], pairs["--max-model-len"], pairs["--dtype"]) == ("mine", "4096", "float32")
    assert flags[-2:] == ["--tensor-parallel-size", "2"]
    assert "--hf-overrides" not in flags


def test_rope_scaling_keeps_what_vllm_would_replace(folder):
    flags = vllm_flags(
        describe(resolve(str(folder)), device="cpu", rope_scaling="yarn:2"), 4096, "m", "::", 1, None, []
    )
    import json

    rope = json.loads(flags[flags.index("--hf-overrides") + 1])["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.0, 2048)
    assert rope["rope_theta"] > 0


def test_pictures_are_given_room():
    flags = vllm_flags(
        describe(resolve("pocket-student"), device="cpu"), 4096, "m", "127.0.0.1", 1, Pictures(150, 96, 96), []
    )
    assert '{"image": {"count": 150, "width": 96, "height": 96}, "video": 0}' in flags


def test_mistakes(environment, described, command_line, tmp_path, folder, monkeypatch):
    env = environment()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"Port \d+ at 127.0.0.1 can't be had"):
            plan_server(described, env=env, port=taken.getsockname()[1])
    with pytest.raises(UserError, match="takes no pictures"):
        plan_server(described, env=env, pictures=Pictures(3, 96, 96))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("laid_eval.serving.installation.__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.delenv("LAID_EVAL_SERVER_ENV", raising=False)
    with pytest.raises(UserError, match=r"No vLLM found.*make serve-env"):
        server_python(None)
    monkeypatch.setenv("LAID_EVAL_SERVER_ENV", str(env))
    assert server_python(None) == env / "bin" / "python"
    done = command_line("serve", "--model", "nowhere", "--server-env", env, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_launcher_needs_nothing_of_ours(tmp_path):
    import laid_eval.serving.launch as launch

    script = textwrap.dedent(f"""
        import runpy, sys
        before = set(sys.modules)
        runpy.run_path({launch.__file__!r}, run_name="imported")
        assert not any(name.split(".")[0] in ("laid_eval", "torch") for name in set(sys.modules) - before)
    """)
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, cwd=tmp_path)
