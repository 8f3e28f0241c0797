"""The command line as people use it: exit codes, one clear line for every mistake, kills and Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "laid_eval"]
QUICK = ["window", "--model", "smollm2", "--max-length", "768", "--budget", "1536"]


def run(*words, timeout=300, cwd=None):
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=timeout, cwd=cwd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["window"], "Which model? Pass --model"),
        (["window", "--model", "smolm2"], "Unknown model 'smolm2' (did you mean 'smollm2'?)"),
        (["window", "--model", "no/such"], "Model 'no/such' can't be had"),
        (["window", "--model", "smollm2", "--probe", "nedle"], "Unknown probe 'nedle' (did you mean 'needle'?)"),
        (["window", "--model", "smollm2", "--probe", "none.toml"], "Probe file 'none.toml' can't be read"),
        (["window", "--model", "smollm2", "--haystack", "none.txt"], "Haystack file 'none.txt' can't be read"),
        (["window", "--model", "smollm2", "--max-length", "100000000"], "needs about"),
        (["window", "--model", "smollm2", "--max-length", "300"], "--max-length 300 is too short"),
        (["window", "--model", "smollm2", "--rope-scaling", "yarm:2"], "--rope-scaling 'yarm:2' is not understood"),
        (["window", "--model", "smollm2", "--dtype", "int3"], "Unknown --dtype 'int3'"),
        (["window", "--model", "smollm2", "--criterion", "haf"], "Unknown criterion 'haf' (did you mean 'half'?)"),
        (["window", "--model", "smollm2", "--anchor", "nowhere"], "'nowhere' is not a run folder"),
        (["window", "--model", "smollm2", "--max-length", "0"], "--max-length 0 is too short"),
        (["window", "--model", "smollm2", "--min-length", "-5"], "--min-length must be above 0 tokens, got -5"),
        (["window", "--model", "smollm2", "--min-length", "64"], "leaves no room for text"),
        (["window", "--model", "smollm2", "--precision", "inf"], "--precision must lie between 0 and 100 octaves"),
        (["window", "--model", "smollm2", "--revision", "main"], "--revision is for Hub ids"),
        (["window", "--model", "smollm2", "--out", "/proc/nowhere"], "--out '/proc/nowhere' can't be written"),
        (
            ["window", "--self-check", "--runs", "0"],
            "Invalid value for '--runs': Input should be greater than or equal to 1",
        ),
        (["window", "--model", "smollm2", "--probe", "aggregate", "--why"], "--why needs a probe with a needle"),
        (["window", "--model", "smollm2", "--why", "--why-length", "300"], "--why-length 300 is too short"),
        (
            ["window", "--model", "smollm2", "--why", "--why-haystacks", "1"],
            "--why-haystacks must be at least 2, got 1",
        ),
        (["window", "--model", "smollm2", "--why-length", "3000"], "--why-length only means something with --why"),
        (["window", "--modle", "x"], "No such option"),
        (["windw"], "No such command"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_gets_one_clear_line_and_exit_code_2(tmp_path, command_line, words, message):
    done = command_line(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if done.stderr.startswith("laid-eval:"):
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_a_short_haystack_and_a_foreign_folder_are_told(tmp_path, command_line):
    text = tmp_path / "short.txt"
    text.write_text("Only this sentence. And this one.")
    done = command_line(*QUICK, "--haystack", text, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "Haystack text 'short.txt' is too short: it has" in done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    done = command_line(*QUICK, "--out", tmp_path / "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "run.json").write_text('{"schema_version": 7}')
    done = command_line(*QUICK, "--out", tmp_path / "newer", cwd=tmp_path)
    assert done.returncode == 2
    assert "schema version 7" in done.stderr


def test_help_has_examples_and_version_is_printed():
    done = run("window", "--help")
    assert done.returncode == 0
    assert "laid-eval window --model smollm2" in done.stdout
    assert run("--version").stdout.strip().count(".") == 2


@pytest.mark.parametrize("command", ["models", "probes"])
def test_lists_are_tables_for_people_and_json_for_programs(command):
    assert run(command).stdout.strip()
    rows = json.loads(run(command, "--json").stdout)
    assert {"name", "summary"} <= set(rows[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The real model on short contexts, uninterrupted."""
    folder = tmp_path_factory.mktemp("cli") / "whole"
    done = run(*QUICK, "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, done


def estimates(folder):
    header = json.loads((Path(folder) / "run.json").read_text())
    return header["windows"], header["curves"], header["stopped"]


@pytest.mark.slow
def test_json_is_one_document_and_everything_else_goes_to_stderr(whole):
    folder, done = whole
    document = json.loads(done.stdout)
    assert document["run"] == str(folder)
    assert document["model"]["name"] == "smollm2"
    assert document["model"]["fan_out"] == "forked"
    assert document["status"] == "complete"
    assert [w["criterion"].split()[0] for w in document["windows"]] == ["relative", "half", "absolute", "chance"]
    assert document["windows"][0]["base_score"] > 0.9, "the real model finds needles in short texts"
    assert document["cost"]["peak_memory_bytes"] < 3 * 1024**3
    assert "Quote: up to about 1,536 tokens" in done.stderr
    assert "effective context window in tokens" in done.stderr
    assert {p.name for p in folder.iterdir()} == {"run.json", "trials.jsonl", "window.png", "depth.png"}


@pytest.mark.slow
def test_a_real_run_killed_without_warning_resumes_bit_for_bit(whole, tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [*COMMAND, *QUICK, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    trials = folder / "trials.jsonl"
    deadline = time.monotonic() + 240
    while not (trials.exists() and trials.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(trials.read_text().splitlines()) > 0
    assert json.loads((folder / "run.json").read_text())["status"] == "partial"
    again = run(*QUICK, "--out", folder)
    assert again.returncode == 0, again.stderr
    assert estimates(folder) == estimates(whole[0])
    assert sorted(trials.read_text().splitlines()) == sorted((whole[0] / "trials.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path):
    # Jobs started in the background of a shell inherit an ignored SIGINT; a person at a terminal does not.
    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    folder = tmp_path / "cut"
    process = subprocess.Popen(
        [*COMMAND, *QUICK, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    )
    trials = folder / "trials.jsonl"
    deadline = time.monotonic() + 240
    while not (trials.exists() and trials.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"What was measured is kept; the same command with --out '{folder}' goes on." in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert trials.read_text().strip()


@pytest.mark.slow
def test_a_finished_run_answers_at_once(whole):
    started = time.monotonic()
    done = run(*QUICK, "--out", whole[0])
    assert done.returncode == 0
    assert time.monotonic() - started < 30
    assert "Quote" not in done.stderr
    assert "relative 0.85" in done.stdout
