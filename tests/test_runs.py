"""Run folders: what is written is read back, and damage is told, never guessed away."""

import json

import pytest

from laid_eval import ScriptedReader, UserError, load_run, measure_window
from laid_eval.records import Run, Trial, WindowEstimate
from laid_eval.runs import append_trials, drop_torn_line, load_trials, write_atomically


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return measure_window(ScriptedReader(location=11.0), out=folder, max_length=4096)


def trial(k):
    return Trial(id=f"needle/0/256/{k}", probe="needle", haystack=0, length=256, prompt_tokens=250, depth=0.5,
                 score=1.0, chance=0.125, answer="a")  # fmt: skip


def copy(run, tmp_path, **changes):
    document = json.loads((run.path / "run.json").read_text()) | changes
    (tmp_path / "run.json").write_text(json.dumps(document))
    (tmp_path / "trials.jsonl").write_bytes((run.path / "trials.jsonl").read_bytes())
    return tmp_path


def test_what_is_written_is_read_back(run):
    again = load_run(run.path)
    assert again.header == run.header
    assert again.trials.equals(run.trials)
    assert Run.model_validate_json(run.header.model_dump_json()) == run.header


def test_json_holds_no_nan_and_no_path_of_this_machine(run):
    text = (run.path / "run.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert str(run.path.parent) not in text


def test_every_field_of_every_record_is_explained_or_obvious():
    obvious = {"probe", "haystack", "length", "unit", "confidence", "answer", "chosen", "error", "trials", "chance",
               "failed_trials", "haystacks", "tested_min", "tested_max"}  # fmt: skip
    import ast
    import inspect

    for record in (Trial, WindowEstimate):
        body = ast.parse(inspect.getsource(record)).body[0].body
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and field.target.id not in obvious | {"base_low", "base_high"}:
                assert isinstance(after, ast.Expr), f"{record.__name__}.{field.target.id} has no docstring"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a run folder: it holds no run\.json\. Name the folder of a run"),
        ("{", r"is damaged \(JSONDecodeError\)"),
        ("[]", r"is damaged \(TypeError\)"),
        ("{}", r"is damaged \(KeyError\)"),
        ('{"schema_version": 99}', r"has schema version 99, this laid-eval reads up to 1\. Upgrade laid-eval\."),
        ('{"schema_version": 1}', r"is damaged: field 'created': Field required"),
    ],
)
def test_a_header_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_a_wrong_field_of_a_header_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"field 'status': Input should be 'partial', 'complete' or 'failed'"):
        load_run(copy(run, tmp_path, status="done"))


def test_a_torn_last_line_is_left_out_and_a_torn_middle_line_is_told(tmp_path):
    append_trials(tmp_path, [trial(k) for k in range(4)])
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [t.id for t in load_trials(tmp_path)] == [trial(k).id for k in range(3)]
    drop_torn_line(tmp_path)
    append_trials(tmp_path, [trial(3)])
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(UserError, match=r"is damaged at line 2\. Remove that line"):
        load_trials(tmp_path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_the_record_reads_well():
    run = {"criterion": "relative 0.85", "definition": "", "unit": "tokens", "tested_min": 256, "tested_max": 4096,
           "base_score": 0.9, "chance": 0.125, "trials": 9, "failed_trials": 0, "haystacks": 3, "method": "posterior",
           "probe": "needle"}  # fmt: skip
    assert str(WindowEstimate(length=1000.4, low=800, high=None, **run)) == "1,000 tokens [800, >4,096]"
    assert str(WindowEstimate(length=None, low=None, high=300, censored="below", **run)) == "<256 tokens [<256, 300]"
    with pytest.raises(UserError, match="no window of probe 'x' under criterion 'relative'; it holds: none"):
        Run.model_construct(windows=(), settings=type("S", (), {"criterion": "relative"})()).window("x")
