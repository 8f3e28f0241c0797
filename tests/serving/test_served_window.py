"""Windows over HTTP: the same trials as in process; what fails is no wrong answer; what was measured is kept."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from laid_eval.errors import UserError
from laid_eval.models.load import describe, load
from laid_eval.models.source import resolve
from laid_eval.runs import load_trials
from laid_eval.serving.client import Client, find_served
from laid_eval.serving.connect import connect, find_endpoint
from laid_eval.serving.window import measure_served
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.session import measure_window

SMALL = {"max_length": 600, "min_length": 280, "budget": 2500, "seed": 3}


@pytest.fixture
def endpoint(server, folder):
    return find_endpoint(server.url, "tiny", str(folder))


@pytest.fixture(scope="module")
def in_process(folder, tmp_path_factory):
    """The trials of a run in this process."""
    reader = ModelReader(load(describe(resolve(str(folder)), device="cpu")), 700)
    out = tmp_path_factory.mktemp("runs") / "hf"
    measure_window(reader, out=out, **SMALL)
    return {trial.id: trial for trial in load_trials(out)}


@pytest.mark.parametrize("api", ["tokens", "completions", "chat"])
def test_trials_equal_those_in_process(endpoint, in_process, tmp_path, api):
    budget = 25_000 if api == "completions" else SMALL["budget"]  # every question a whole prompt, for every choice
    run = measure_served(endpoint, api=api, out=tmp_path / "run", **{**SMALL, "budget": budget})
    trials = load_trials(tmp_path / "run")
    assert run.header.status == "complete"
    both = [trial for trial in trials if trial.id in in_process]
    assert len(both) > 8
    for trial in both:
        own = in_process[trial.id]
        assert trial.margin == pytest.approx(own.margin, abs=2e-4)
        assert (trial.chosen, trial.prompt_tokens, trial.depth) == (own.chosen, own.prompt_tokens, own.depth)
    assert run.header.model.fan_out.startswith("whole prompts" if api == "completions" else "shared")


def test_the_fastest_way_is_found_by_itself(endpoint, server):
    with_ids = connect(Client(endpoint), pictures=False)
    server.scale_out = False
    without = connect(Client(endpoint), pictures=False)
    assert (with_ids.info.server, without.info.server) == (
        "OpenAI-compatible server, tokens",
        "OpenAI-compatible server, chat",
    )


def test_requests_of_a_haystack_begin_alike(endpoint, server, tmp_path):
    measure_served(endpoint, out=tmp_path / "run", api="tokens", concurrency=1, **SMALL)
    prompts = [body["token_ids"] for path, body, _ in server.requests if path.endswith("/generate")][1:]
    shared = sum(
        next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))
        for one, two in itertools.pairwise(prompts)
    )
    assert shared > 0.7 * sum(len(prompt) for prompt in prompts)


@pytest.mark.parametrize("fault", [500, "garbage", "empty", "hang"])
def test_a_request_that_fails_for_good_is_a_failed_trial(endpoint, server, tmp_path, in_process, fault):
    bad = {}

    def fail(number):  # every request that contains one question's text, however often it is tried again
        ids = server.requests[-1][1].get("token_ids", [])
        text = server.tokenizer.decode(ids)
        if len(server.requests) > 4 and not bad:
            bad["question"] = text.rpartition("Question:")[2].partition("?")[0]
        return fault if bad and bad["question"] in text.rpartition("Question:")[2] else None

    server.fail = fail
    run = measure_served(endpoint, out=tmp_path / "run", api="tokens", retries=1, timeout=1, **SMALL)
    trials = load_trials(tmp_path / "run")
    failed = [trial for trial in trials if trial.error]
    assert 0 < len(failed) < len(trials) / 2
    assert all(trial.score is None and trial.chosen is None for trial in failed)
    assert all(trial.chosen == in_process[trial.id].chosen for trial in trials if not trial.error)
    assert any("count neither as right nor as wrong" in note for note in run.header.notes)


def test_a_busy_server_is_asked_again(endpoint, server, tmp_path, in_process):
    server.fail = lambda number: 503 if number % 7 == 0 else None
    measure_served(endpoint, out=tmp_path / "run", api="tokens", **SMALL)
    trials = load_trials(tmp_path / "run")
    assert not any(trial.error for trial in trials)
    assert all(trial.chosen == in_process[trial.id].chosen for trial in trials)


def test_a_server_that_truncates_is_refused(endpoint, server, tmp_path):
    server.fail = lambda number: "cut" if number > 12 else None
    with pytest.raises(UserError, match=r"read \d+ tokens where \d+ were sent: it truncates"):
        measure_served(endpoint, out=tmp_path / "run", api="tokens", **SMALL)
    assert all(trial.error is None for trial in load_trials(tmp_path / "run"))


def test_a_run_goes_on_when_its_server_is_back(make_server, folder, tmp_path):
    first, second = make_server(), make_server()

    def die(number):
        if number == 12:
            first.http.server_close()  # later connections are refused
        return 500 if number >= 12 else None

    measure_served(find_endpoint(second.url, "tiny", str(folder)), out=tmp_path / "whole", api="tokens", **SMALL)
    first.fail = die
    dying = find_endpoint(first.url, "tiny", str(folder))
    with pytest.raises(UserError, match=r"can't be reached.*same command goes on"):
        measure_served(dying, out=tmp_path / "cut", api="tokens", retries=0, **SMALL)
    before = len(load_trials(tmp_path / "cut"))
    whole = {trial.id: trial for trial in load_trials(tmp_path / "whole")}
    assert 0 < before < len(whole)
    measure_served(find_endpoint(second.url, "tiny", str(folder)), out=tmp_path / "cut", api="tokens", **SMALL)
    assert {trial.id: trial for trial in load_trials(tmp_path / "cut")} == whole


def test_generated_replies_are_searched_for_a_choice(endpoint, server, tmp_path):
    measure_served(endpoint, answers="generate", out=tmp_path / "run", **SMALL)
    trials = load_trials(tmp_path / "run")
    bodies = [body for path, body, _ in server.requests if path.endswith("/completions")]
    assert "Choose one of:" in server.tokenizer.decode(bodies[-1]["prompt"])
    assert all(trial.margin is None and trial.error is None for trial in trials)
    assert {trial.score for trial in trials} <= {0.0, 1.0}


def test_the_key_is_sent_and_kept_nowhere(endpoint, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret")
    measure_served(endpoint, out=tmp_path / "run", **SMALL)
    assert {key for _, _, key in server.requests} == {"Bearer sk-planted-secret"}
    assert not any("planted-secret" in path.read_text(errors="replace") for path in (tmp_path / "run").iterdir())


def test_a_run_in_process_is_not_continued_through_a_server(endpoint, folder, tmp_path):
    reader = ModelReader(load(describe(resolve(str(folder)), device="cpu")), 700)
    measure_window(reader, out=tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="another --out"):
        measure_served(endpoint, out=tmp_path / "run", **SMALL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-url", "nowhere", "--model", "tiny"], "is no URL"),
        (["--base-url", "http://127.0.0.1:9/v1", "--model", "tiny"], "can't be reached"),
        (["--base-url", "URL", "--model", "tini"], "serves no model 'tini' (did you mean 'tiny'?)"),
        (["--base-url", "URL", "--model", "tiny", "--dtype", "float16"], "--dtype is about weights"),
        (["--base-url", "URL", "--model", "tiny", "--why"], "no server lets out"),
        (["--base-url", "URL", "--model", "tiny", "--tokenizer", "FOLDER", "--max-length", "9000"], "more than the server takes"),
        (["--base-url", "URL", "--model", "tiny", "--tokenizer", "FOLDER", "--probe", "visual-which"], "takes no pictures"),
        (["--base-url", "URL", "--model", "tiny", "--tokenizer", "FOLDER", "--api", "ftp"], "Allowed: auto, tokens"),
        (["--backend", "vllm", "--model", "FOLDER", "--server-env", "nowhere"], "no environment with vLLM"),
        (["--backend", "tgi", "--model", "smollm2"], "Allowed: hf, vllm"),
        (["--model", "smollm2", "--api", "chat"], "is about servers"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(command_line, server, folder, tmp_path, words, message):
    words = [{"URL": server.url, "FOLDER": str(folder)}.get(word, word) for word in words]
    done = command_line("window", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(Path(tmp_path).rglob("trials.jsonl"))


def test_the_command_measures_a_running_server(command_line, server, folder, tmp_path):
    done = command_line(
        "window", "--base-url", server.url, "--model", "tiny", "--tokenizer", folder, "--max-length", 600,
        "--min-length", 280, "--budget", 1500, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    run = json.loads(done.stdout)
    assert run["model"]["server"] == "OpenAI-compatible server, tokens"
    assert run["model"]["source"] == "server"


def test_a_server_names_what_it_serves(endpoint):
    with pytest.raises(UserError, match=r"serves no model 'other'.*It serves: tiny"):
        find_served(Client(endpoint), "other")


def test_a_reply_without_text_is_no_wrong_answer(endpoint, server, tmp_path, monkeypatch):
    chat = server.chat
    monkeypatch.setattr(server, "chat", lambda body: _silent(*chat(body)))
    measure_served(endpoint, api="chat", answers="generate", out=tmp_path / "run", **SMALL)
    trials = load_trials(tmp_path / "run")
    assert trials
    assert all(trial.score is None and "no text in the reply" in trial.error for trial in trials)


def _silent(ids, choice, more):
    return ids, {**choice, "message": {"role": "assistant", "content": None}}, more


def test_two_models_of_servers_are_not_mixed(endpoint, server, folder, tmp_path):
    measure_served(endpoint, out=tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="another --out"):
        measure_served(replace(endpoint, model="other"), out=tmp_path / "run", **SMALL)
