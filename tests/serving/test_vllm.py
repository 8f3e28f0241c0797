"""The real vLLM: it answers as transformers does, shares prefixes, starts and stops by our commands."""

import json
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from laid_eval.models.load import describe, load, load_vision
from laid_eval.models.source import resolve
from laid_eval.runs import load_run, load_trials
from laid_eval.serving.flags import Pictures
from laid_eval.serving.server import plan_server, running
from laid_eval.serving.window import measure_served
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.picture_reader import ModelPictureReader
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import Scene, draw
from laid_eval.window.session import measure_window

pytestmark = pytest.mark.vllm
EAGER = ["--enforce-eager"]  # the compiler takes a minute, and answers the same
TOLERANCE = 2e-3  # nats, float32 on both sides
TEXT = {"max_length": 1500, "budget": 9_000, "seed": 1}
SHOWN = {"probe": "visual-which", "max_length": 24, "budget": 9_000, "seed": 1}


@pytest.fixture(scope="module")
def text_server(tmp_path_factory):
    described = describe(resolve("smollm2"), device="cpu")
    plan = plan_server(described, max_length=2048, log=tmp_path_factory.mktemp("log") / "server.log", flags=EAGER)
    with running(plan, patience=600) as server:
        yield server


def margins(folder):
    return {trial.id: trial.margin for trial in load_trials(folder)}


def assert_same(there, here):
    """The same questions, margins within the tolerance, and each window inside the other's interval."""
    a, b = margins(there), margins(here)
    shared = sorted(set(a) & set(b))
    assert len(shared) > 40
    gap = np.array([a[k] - b[k] for k in shared])
    assert np.abs(gap).max() < TOLERANCE
    one, two = (load_run(folder).header.windows[0] for folder in (there, here))
    for own, other in ((one, two), (two, one)):
        assert own.censored == other.censored
        if own.length is not None:
            assert (other.low or 0) <= own.length <= (other.high or np.inf)


@pytest.fixture(scope="module")
def through_server(text_server, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "vllm"
    said = []
    run = measure_served(text_server.endpoint, out=out, announce=said.append, **TEXT)
    return out, run, said


def test_text_is_answered_as_in_process(through_server, smollm2, tmp_path):
    out, run, _ = through_server
    measure_window(ModelReader(smollm2, 2048), out=tmp_path / "hf", **TEXT)
    assert run.header.model.server == "vllm 0.32.0, tokens"
    assert_same(out, tmp_path / "hf")


def test_prefixes_are_shared(through_server):
    _, _, said = through_server
    share = int(said[-1].rpartition("(")[2].removesuffix("%)"))
    assert share > 70


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_other_ways_agree(text_server, through_server, tmp_path, api):
    measure_served(text_server.endpoint, api=api, out=tmp_path / api, **{**TEXT, "max_length": 512, "budget": 3_000})
    ours, theirs = margins(through_server[0]), margins(tmp_path / api)
    shared = set(ours) & set(theirs)
    assert len(shared) >= 5
    assert max(abs(ours[k] - theirs[k]) for k in shared) < TOLERANCE


def test_a_server_killed_in_mid_run_loses_nothing(through_server, tmp_path):
    out, run, _ = through_server
    command = [
        sys.executable,
        "-m",
        "laid_eval",
        "window",
        "--model",
        "smollm2",
        "--backend",
        "vllm",
        "--device",
        "cpu",
    ]
    command += ["--max-length", "1500", "--budget", "9000", "--seed", "1", "--out", str(tmp_path / "run"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = None
    while process.poll() is None and not (tmp_path / "run" / "trials.jsonl").exists():
        children = psutil.Process(process.pid).children()
        server = children[0] if children else server
    for child in [*server.children(recursive=True), server]:
        child.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "can't be reached" in errors
    cut = margins(tmp_path / "run")
    assert 0 < len(cut) < len(margins(out))
    again = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(again.stdout)["windows"][0]["trials"] == run.header.windows[0].trials
    whole = margins(tmp_path / "run")
    assert cut.items() <= whole.items()
    assert max(abs(whole[k] - margin) for k, margin in margins(out).items()) < TOLERANCE


def test_pictures_are_answered_as_in_process(tmp_path):
    probe = load_probe("visual-which")
    described = describe(resolve("pocket-student"), device="cpu")
    room = Pictures(24, probe.size, probe.size)
    plan = plan_server(described, max_length=2048, pictures=room, log=tmp_path / "server.log", flags=EAGER)
    with running(plan, patience=600) as server:
        measure_served(server.endpoint, out=tmp_path / "vllm", **SHOWN)
    sample = [draw(Scene(probe.objects[k : k + 3], k), probe.size) for k in range(3)]
    measure_window(ModelPictureReader(load_vision(described), sample, 2048), out=tmp_path / "hf", **SHOWN)
    assert_same(tmp_path / "vllm", tmp_path / "hf")


def test_a_server_is_loaded_from_a_folder_of_ours(text_server):
    """What vLLM says of itself is what was planned."""
    loaded = load(describe(resolve("smollm2"), device="cpu"))
    assert text_server.endpoint.max_length == 2048
    assert text_server.plan.described.source.fingerprint == loaded.info.fingerprint
