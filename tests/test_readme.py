"""The README is true: its commands run, its code runs, and its table is that of the run it shows."""

import io
import re
import runpy
import shlex
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console

import laid_eval
from laid_eval.cli.distill import show_distillation
from laid_eval.cli.spectrum import show_spectrum
from laid_eval.cli.why import show_why
from laid_eval.cli.window_table import show_window
from laid_eval.distillation.recipe import recipe_names
from laid_eval.runs import load_why_trials, why_table
from laid_eval.spectra import load_spectrum
from laid_eval.window.probes import load_probe, probe_names
from laid_eval.window.why import Study, explain

matplotlib.use("Agg")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
write_dataset = runpy.run_path(str(ROOT / "tests" / "window" / "published_haystacks.py"))["write_dataset"]
# The long commands, cut short; nothing else is changed.
SHORT = ["--max-length", "1200", "--budget", "1200"]
SHORT_IMAGES = ["--max-length", "8", "--budget", "1000"]
SHORT_ALL = ["--max-length", "2300", "--budget", "2300"]  # `aggregate` starts at 1,024 tokens

SHORT_DISTILL = ["--set", "training.steps=1", "--set", "training.accumulation=1", "--set", "data.lengths=[150,200]"]
SHORT_WHY = ["--why-haystacks", "2", "--why-questions", "4"]


def block(mark, language):
    return re.search(rf"<!-- {mark} -->\n```{language}\n(.*?)```", README, re.S).group(1)


MARKS = (
    "tested", "tested: vision", "tested: dataset", "tested: why", "tested: spectrum", "tested: spectrum of pictures",
    "tested: distill", "tested: distill of pictures",
)  # fmt: skip
COMMANDS = [line.split("#")[0].strip() for mark in MARKS for line in block(mark, "bash").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, tmp_path, command_line):
    program, *words = shlex.split(command)
    assert program == ".venv/bin/laid-eval"
    if "--dataset" in words:
        write_dataset(tmp_path, lengths=(1, 5), cases=2)
    elif words[0] == "window":
        short = SHORT_ALL if "all" in words else SHORT_IMAGES if "pocket-student" in words else SHORT
        words += [*short, *(SHORT_WHY if "--why" in words else [])]
    if words[0] == "distill":
        words += [*SHORT_DISTILL, "--set", "training.weights=lora"]  # optimiser states of all weights take a minute
    if words[0] == "spectrum":
        words += ["--texts", "2"] if "--images" in words else ["--length", "256", "--texts", "1"]
    done = command_line(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_gate_says_what_is_shown(command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    first, shown = block("tested: gate", "console").split("\n", 1)
    done = command_line(*shlex.split(first)[2:], cwd=ROOT)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).split() == shown.split()


def test_the_python_code_runs(tmp_path, monkeypatch):
    (tmp_path / "reports").symlink_to(ROOT / "reports")
    monkeypatch.chdir(tmp_path)
    exec(compile(block("tested: python", "python"), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "planted" / "run.json").is_file()


def test_the_probe_of_the_readme_works(tmp_path):
    file = tmp_path / "planets.toml"
    file.write_text(block("tested: probe", "toml"))
    assert load_probe(str(file)).name == "planets"
    reader = laid_eval.ScriptedReader(location=11)
    run = laid_eval.measure_window(reader, str(file), out=tmp_path / "run", max_length=4096)
    assert run.trials["chance"].eq(0.25).all()


@pytest.mark.parametrize("name", ["smollm2-window", "pocket-window", "pocket-teacher-window"])
def test_the_table_is_that_of_the_run_it_shows(name):
    run = laid_eval.load_run(ROOT / "reports" / name)
    out = io.StringIO()
    show_window(run, Console(file=out, width=110, highlight=False), ["trials.jsonl", "window.png", "depth.png"])
    shown = block(f"run: reports/{name}", "console").split("\n", 1)[1]
    tidy = [line.rstrip() for line in out.getvalue().splitlines() if not line.startswith("run:")]
    given = [line.rstrip() for line in shown.splitlines() if not line.startswith("run:")]
    assert given == tidy


def test_the_spectrum_is_that_of_the_run_it_shows():
    run = load_spectrum(ROOT / "reports" / "smollm2-spectrum")
    assert (run.header.settings.length, run.header.status) == (8192, "complete")
    out = io.StringIO()
    show_spectrum(run, Console(file=out, width=110, highlight=False), ["heads.png", "transfer.png", "pairs.png"])
    shown = block("run: reports/smollm2-spectrum", "console").split("\n", 1)[1]
    tidy = [line.rstrip() for line in out.getvalue().splitlines() if not line.startswith("run:")]
    given = [line.rstrip() for line in shown.splitlines() if not line.startswith("run:")]
    assert given == tidy


def test_the_distillation_is_that_of_the_run_it_shows():
    run = laid_eval.load_distillation(ROOT / "reports" / "planted-gain" / "run")
    assert run.header.status == "complete"
    assert run.header.certificate["passed"]
    out = io.StringIO()
    show_distillation(run, Console(file=out, width=110, highlight=False), ["losses.png", "rope-gain.png"])
    shown = block("run: reports/planted-gain/run", "console").split("\n", 1)[1]
    tidy = [line.rstrip() for line in out.getvalue().splitlines() if not line.startswith("checkpoint and run:")]
    given = [line.rstrip() for line in shown.splitlines() if not line.startswith("checkpoint and run:")]
    assert given == tidy


def test_recipes_of_the_readme_are_complete():
    for name in recipe_names():
        assert f"| `{name}` |" in README


def test_why_the_window_ends_is_said_by_the_run_it_shows():
    run = laid_eval.load_run(ROOT / "reports" / "smollm2-why")
    (why,) = run.header.why
    out = io.StringIO()
    show_why(why, Console(file=out, width=110, highlight=False))
    shown = block("run: reports/smollm2-why", "console").split("\n", 1)[1]
    tidy = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    assert [line.rstrip() for line in shown.splitlines()] == tidy
    study = Study(why.probe, why.length, why.short_length, why.haystacks, why.questions)
    again = explain(why_table(load_why_trials(run.path)), study, seed=run.header.settings.seed)
    assert (again.parts, again.conditions) == (why.parts, why.conditions)
    assert why.length == round(run.window(criterion="half").length)
    assert (run.path / "why.png").is_file()


def test_why_by_distance_is_that_of_the_answers_it_shows():
    table = why_table(load_why_trials(ROOT / "reports" / "smollm2-why"))
    wide = table.pivot(index=["haystack", "question"], columns="condition", values=["score", "distance"])
    back = wide["distance"]["full"]
    rows = re.findall(r"^\| (?:up to|beyond|[\d,]+-[\d,]+).*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    for (low, high), shown in zip([(0, 2000), (2000, 6000), (6000, 8000), (8000, 10**6)], rows, strict=True):
        mean = wide["score"][(back > low) & (back <= high)].mean()
        assert tuple(f"{mean[name]:.2f}" for name in ("full", "far", "crowded")) == shown


def test_the_run_it_shows_is_what_the_issue_of_the_tool_promises():
    run = laid_eval.load_run(ROOT / "reports" / "smollm2-window")
    window = run.window("needle")
    assert (window.censored, run.header.settings.max_length) == ("no", 12288)
    again = laid_eval.estimate_window(run.trials, probe="needle")
    assert (again.length, again.low, again.high) == pytest.approx((window.length, window.low, window.high), rel=1e-6)
    assert {"window.png", "depth.png"} <= {p.name for p in run.path.iterdir()}


def test_probes_and_words_of_the_readme_are_complete():
    for name in probe_names():
        assert f"| `{name}` |" in README
    for criterion in ("relative", "half", "absolute", "chance", "anchored"):
        assert f"| `{criterion}`" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
