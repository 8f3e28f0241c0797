"""Measuring on a data set: a planted window, both protocols, kill and resume, what a run keeps, the command line."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from laid_eval import ScriptedReader, UserError, measure_window, visual_haystacks
from laid_eval.report import plot
from laid_eval.window.length_scores import length_scores

spec = importlib.util.spec_from_file_location("published_haystacks", Path(__file__).parent / "published_haystacks.py")
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

PLANTED = 8
LENGTHS = (1, 2, 5, 10, 20)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same pictures in every case: what is measured is scripted."""
    folder = tmp_path_factory.mktemp("vhs")
    (file,), images = published.write_dataset(folder, lengths=(5,), cases=4, size=48)
    four = json.loads(file.read_text())
    files = []
    for length in LENGTHS:
        entries = []
        for k in range(24):
            entry = four[k % 4]
            others = (entry["neg_image"] * 5)[: length - 1]
            question = {"from": "human", "value": f"{entry['conversations'][0]['value']} ({k}, {length})"}
            entries.append(
                entry | {"id": k, "neg_image": others, "conversations": [question, entry["conversations"][1]]}
            )
        files.append(folder / f"visual_haystack_{length}.json")
        files[-1].write_text(json.dumps(entries))
    return files, images


def scripted(**planted):
    return ScriptedReader(location=np.log2(PLANTED), **planted)


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
    return measure_window(scripted(), visual_haystacks(*written), out=tmp_path_factory.mktemp("run") / "a")


def test_a_planted_window_is_found(run):
    window = run.window(None, "half")
    assert window.low < PLANTED < window.high
    assert (window.unit, window.chance, window.trials) == ("images", 0.5, 120)
    assert run.window(None, "chance").criterion == "chance 0.5"
    assert run.header.stopped == {"visual-haystacks-seeded": "all 120 questions of the data set were asked"}
    assert "the right answer is yes in 60 of 120 cases" in run.header.notes


def test_every_case_is_one_trial_with_its_place(run):
    trials = run.trials
    assert list(trials.groupby("length").size()) == [24] * 5
    assert trials["id"].is_unique
    assert trials["complied"].isna().all()
    long = trials[trials["length"] == 20]
    assert np.histogram(long["depth"], bins=4, range=(0, 1))[0].min() > 1
    assert set(trials[trials["length"] == 1]["depth"]) == {0.5}


def test_scores_by_length_are_kept_with_intervals(run):
    for score in run.header.scores:
        own = run.trials[run.trials["length"] == score.length]["score"]
        assert score.score.value == own.mean()
        assert score.score.low < own.mean() <= score.score.high
        assert score.complied is None
        assert (score.questions, score.haystacks) == (24, 24)


def test_intervals_count_haystacks(run):
    four = run.trials.assign(haystack=run.trials["haystack"] % 8)
    one, other = (length_scores(table, "visual-haystacks-seeded", 0.95)[0].score for table in (run.trials, four))
    assert one.value == other.value
    assert other.high - other.low > 1.4 * (one.high - one.low)


@pytest.mark.parametrize("kept", [1, 60])
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(written, run, tmp_path, kept):
    again = tmp_path / "cut"
    again.mkdir()
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (again / "trials.jsonl").write_text("".join(lines[:kept]) + lines[-1][:20])
    header = json.loads((run.path / "run.json").read_text())
    header |= {"status": "partial", "windows": [], "curves": [], "scores": None}
    (again / "run.json").write_text(json.dumps(header))
    done = measure_window(scripted(), visual_haystacks(*written), out=again)
    assert (done.windows, done.header.scores) == (run.windows, run.header.scores)
    assert done.header.cost.prefill_tokens == run.header.cost.prefill_tokens
    assert (again / "trials.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("options", "seed", "field"),
    [
        ({"protocol": "published"}, 0, "settings.probes"),
        ({"positions": True}, 0, "settings.probes"),
        ({"questions": 7}, 0, "settings.haystack "),
        ({}, 1, "settings.seed"),
    ],
)
def test_changed_settings_are_refused(written, run, options, seed, field):
    with pytest.raises(UserError, match="holds a run with") as caught:
        measure_window(scripted(), visual_haystacks(*written, **options), out=run.path, seed=seed)
    assert field in str(caught.value)


class Talker(ScriptedReader):
    """Says one thing, whatever it sees."""

    said = ""

    def say(self, asked, limit):
        assert limit == 128
        return self.said


@pytest.mark.parametrize(
    ("said", "score", "complied"),
    [("Yes and no.", 1, 1), ("Yes, there is.", 0.5, 1), ("yes/no", 0, 0), ("I see.", 0, 0)],
)
def test_the_published_protocol_keeps_compliance_apart(written, tmp_path, monkeypatch, said, score, complied):
    monkeypatch.setattr(Talker, "said", said)
    data = visual_haystacks(*written, protocol="published", questions=4)
    run = measure_window(Talker(location=9), data, out=tmp_path / "p")
    assert set(run.trials["chosen"]) == {said}
    assert set(run.trials["complied"]) == {bool(complied)}
    for row in run.header.scores:
        assert (row.score.value, row.complied.value) == (score, complied)
    assert run.trials["margin"].isna().all()


def test_the_position_experiment(written, tmp_path):
    files, images = written
    data = visual_haystacks(files[3:], images, positions=True, questions=3)
    run = measure_window(scripted(depth_bias=3), data, out=tmp_path / "p")
    assert list(run.trials["depth"][:10]) == [round(k / 10 + 0.05, 4) for k in range(10)]
    assert list(run.trials[run.trials["length"] == 20]["depth"])[:2] == [0.025, 0.125]
    assert len(run.trials) == 3 * 20
    assert [(s.questions, s.haystacks) for s in run.header.scores] == [(30, 3), (30, 3)]


def test_one_length_gives_scores_but_no_window(written, tmp_path):
    files, images = written
    run = measure_window(scripted(), visual_haystacks(files[:1], images), out=tmp_path / "one")
    assert run.windows == ()
    assert len(run.header.scores) == 1
    assert plot.window(run).get_xlabel() == "context length (images)"


def test_max_length_leaves_longer_cases_out(written, tmp_path):
    run = measure_window(scripted(), visual_haystacks(*written, questions=4), out=tmp_path / "m", max_length=5)
    assert set(run.trials["length"]) == {1, 2, 5}


def test_a_case_without_its_pictures_is_left_out_and_told(tmp_path):
    files, images = published.write_dataset(tmp_path, lengths=(2, 5), cases=6, size=48)
    (images / json.loads(files[0].read_text())[0]["neg_image"][0]).unlink()
    run = measure_window(scripted(), visual_haystacks(files, images, allow_missing=True), out=tmp_path / "r")
    assert len(run.trials) == 11
    assert any(note.startswith("1 of 12 cases were left out: 1 of 42 pictures (") for note in run.header.notes)


def test_its_pictures_can_be_looked_at_with_the_data_set(written, run):
    figure = plot.haystack(run, probe=visual_haystacks(*written))
    titles = [ax.get_title() for part in figure.subfigs for ax in part.axes]
    assert titles.count("") == 1
    assert sum("(needle)" in title for title in titles) == 1
    assert len(titles) == 6
    with pytest.raises(UserError, match=r"give it: probe=visual_haystacks"):
        plot.haystack(run)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 9}, "--budget has no meaning for a data set"),
        ({"min_length": 2}, "--min-length has no meaning"),
        ({"precision": 0.1}, "--precision has no meaning"),
        ({"haystack": ["x.txt"]}, "is about pictures"),
        ({"why": True}, "--why explains windows in text"),
        ({"max_length": 0}, "leaves no case"),
    ],
)
def test_options_of_probes_are_refused(written, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        measure_window(scripted(), visual_haystacks(*written), out=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_more_images_than_the_model_holds_are_refused(written, tmp_path):
    reader = ScriptedReader(location=3, claimed=8)
    with pytest.raises(
        UserError, match=r"20 images of .* take 20 tokens; 'scripted' claims 8\. .*--max-length 12\."
    ) as caught:
        measure_window(reader, visual_haystacks(*written), out=tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert measure_window(reader, visual_haystacks(*written, questions=2), out=tmp_path / "y", max_length=12)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return published.write_dataset(tmp_path_factory.mktemp("small"), lengths=(2, 5), cases=6, size=96)


def words(small, *more):
    files, images = small
    return [
        "window",
        "--model",
        "pocket-student",
        *(w for f in files for w in ("--dataset", f)),
        "--images",
        images,
        *more,
    ]


def test_the_bundled_model_from_the_command_line(small, tmp_path, command_line):
    done = command_line(*words(small, "--out", "r", "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["haystack"] == "visual_haystack_2.json, visual_haystack_5.json (12 cases)"
    assert [row["length"] for row in document["scores"]] == [2, 5]
    assert "12 questions" in done.stderr
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "run.json", "trials.jsonl", "window.png", "depth.png", "haystack.png",
    }  # fmt: skip
    whole = (tmp_path / "r" / "trials.jsonl").read_text()
    shutil.copytree(tmp_path / "r", tmp_path / "cut")
    (tmp_path / "cut" / "trials.jsonl").write_text("".join(whole.splitlines(keepends=True)[:5]))
    (tmp_path / "cut" / "run.json").write_text(
        json.dumps({k: v for k, v in document.items() if k != "run"} | {"status": "partial"})
    )
    assert command_line(*words(small, "--out", "cut"), cwd=tmp_path).returncode == 0
    assert (tmp_path / "cut" / "trials.jsonl").read_text() == whole


def test_free_answers_of_the_bundled_model(small, tmp_path, command_line):
    done = command_line(*words(small, "--protocol", "published", "--questions", 1, "--out", "p"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "says yes/no" in done.stdout
    trials = [json.loads(line) for line in (tmp_path / "p" / "trials.jsonl").read_text().splitlines()]
    assert [t["complied"] for t in trials] == [False, False]  # it never learned to stop
    assert all("YesYes" in t["chosen"] or "NoNo" in t["chosen"] for t in trials)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dataset", "none.json"], "Data set 'none.json' can't be read"),
        (["--probe", "needle"], "--dataset brings its own questions"),
        (["--protocol", "exact"], "Unknown --protocol 'exact'"),
        (["--model", "smollm2"], "takes no pictures"),
        (["--max-length", "1"], "leaves no case"),
        (["--haystack", "x.txt"], "--haystack is filler text"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(small, tmp_path, command_line, more, says):
    done = command_line(*words(small, *more), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--positions"], "--positions only means something with --dataset"),
        (["--images", "x"], "--images only means something with --dataset"),
        (["--dataset", "x.json"], "--dataset needs --images"),
    ],
)
def test_options_that_need_each_other(tmp_path, command_line, given, says):
    done = command_line("window", "--model", "pocket-student", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
