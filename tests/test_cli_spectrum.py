"""`laid-eval spectrum` from the outside: one document on stdout, one line for a mistake."""

import json
import subprocess
import sys

import pytest


def laid_eval(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "laid_eval", *words], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectrum") / "run"
    command = ["spectrum", "--model", "smollm2", "--length", "256", "--texts", "2", "--what-if", "linear:2"]
    return laid_eval(*command, "--out", str(folder), "--json"), folder


@pytest.mark.slow
def test_json_prints_one_document_and_the_rest_goes_to_stderr(done):
    result, folder = done
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["command"] == "spectrum"
    assert document["run"] == str(folder)
    assert "rotary pairs by wavelength" in result.stderr
    for metric in document["metrics"]:
        assert metric["unit"]
        assert metric["definition"]


@pytest.mark.slow
def test_a_run_folder_holds_numbers_tables_and_figures(done):
    _, folder = done
    names = {p.name for p in folder.iterdir()}
    assert names == {"run.json", "spectra.npz", "heads.csv", "heads.png", "pairs.png", "transfer.png", "what-if.png"}


@pytest.mark.slow
def test_the_same_command_again_reads_what_is_there(done, command_line, tmp_path):
    result, folder = done
    stamp = (folder / "run.json").stat().st_mtime
    command = ["spectrum", "--model", "smollm2", "--length", "256", "--texts", "2", "--what-if", "linear:2"]
    again = command_line(*command, "--out", folder, "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == json.loads(result.stdout)
    assert (folder / "run.json").stat().st_mtime == stamp


@pytest.mark.slow
def test_weights_only_reads_no_text(tmp_path, command_line):
    words = ["spectrum", "--model", "smollm2", "--weights-only", "--out", tmp_path / "run", "--json"]
    result = command_line(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["cost"]["tokens"] == 0
    assert document["coverage"][0]["pairs"] == 32
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "spectra.npz", "pairs.png"}


@pytest.mark.slow
def test_pictures_are_shown_to_a_vision_language_model(tmp_path, command_line):
    words = ["spectrum", "--model", "pocket-student", "--texts", "2", "--queries", "16"]
    result = command_line(*words, "--out", tmp_path / "run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    found = document["pictures"]
    assert [a["axis"] for a in found["axes"]] == ["t", "h", "w"]
    assert found["audit"]["monotone"]
    assert "counted by the model's own get_rope_index" in " ".join(result.stderr.split())
    assert {"images.png", "axes.png", "pairs.png", "heads.csv"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Which model?"),
        (["--model", "smollm2", "--knockout", "all"], "Allowed: no, loss, window"),
        (["--model", "smollm2", "--length", "100"], "--length must be at least 256"),
        (["--model", "smollm2", "--texts", "0"], "--texts must lie between"),
        (["--model", "smollm2", "--what-if", "magic:2"], "--what-if 'magic:2' can't be done"),
        (["--model", "smollm2", "--length", "100000000"], "GiB are free"),
        (["--model", "smollm2", "--weights-only", "--teacher", "smollm2"], "can't be combined"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "smollm2", "--images", "20"], "takes no pictures. Leave --images out"),
        (["--model", "pocket-student", "--images", "0"], "--images must be at least 4 pictures, got 0"),
        (["--model", "pocket-student", "--images", "99999"], "'pocket-student' has 8,192. Measure with --images"),
        (["--model", "pocket-student", "--teacher", "smollm2"], "takes no pictures"),
    ],
)
def test_a_mistake_gets_one_line(words, says, tmp_path, command_line):
    result = command_line("spectrum", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())
