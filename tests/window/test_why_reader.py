"""The study why a window ends on real models: the whole way at short lengths, and models that can't be asked."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from laid_eval import UserError, load_run, measure_window
from laid_eval.window.haystack import load_corpus
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.probes import load_probe
from laid_eval.window.why import Study
from laid_eval.window.why_reader import MovingReader
from laid_eval.window.why_texts import Posed, texts

TINY = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "pad_token_id": 2,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.fixture(scope="module")
def readers(smollm2):
    plain = ModelReader(smollm2, 1024)
    return plain, MovingReader(plain, 1024)


@pytest.mark.slow
def test_asked_in_the_ordinary_way_it_answers_as_the_window_does(readers):
    plain, moving = readers
    short, long = texts(moving, load_probe("needle"), load_corpus(), 0, Study("needle", 700, 350, 2, 4), 0)
    ordinary = [way.posed for way in (*short.ways, *long.ways) if way.condition in ("short", "full")]
    for text in (short, long):
        posed = [p for p in ordinary if p in [way.posed for way in text.ways]]
        for reader in readers:
            reader.begin()
            reader.read(text.tokens)
        found, expected = moving.pose(posed), plain.ask([p.asked for p in posed])
        assert np.abs(np.array(found) - np.array(expected)).max() < 1e-4


@pytest.mark.slow
def test_what_is_hidden_is_unknown_and_what_is_told_is_known(readers):
    """On the real model: a needle that is hidden is guessed, one told next to the question is found."""
    _, moving = readers
    right = {"full": [], "near": [], "blind": []}
    for haystack in range(3):
        _, long = texts(moving, load_probe("needle"), load_corpus(), 0, Study("needle", 700, 350, 2, 8), haystack)
        moving.begin()
        moving.read(long.tokens)
        near = [way.posed for way in long.ways if way.condition == "near"]
        blind = [Posed(p.asked, hidden=p.hidden) for p in near]
        full = [way.posed for way in long.ways if way.condition == "full"]
        for name, posed in (("full", full), ("near", near), ("blind", blind)):
            for p, logs in zip(posed, moving.pose(posed), strict=True):
                right[name].append(int(np.argmax(logs)) == p.asked.question.answer)
    assert np.mean(right["full"]) > 0.8
    assert np.mean(right["near"]) > 0.9
    assert np.mean(right["blind"]) < 0.5


@pytest.mark.slow
def test_from_the_command_line_to_the_figure_and_again_from_disk(tmp_path, command_line):
    out = tmp_path / "run"
    command = ["window", "--model", "smollm2", "--max-length", "768", "--budget", "1536", "--out", out]
    assert command_line(*command, cwd=tmp_path).returncode == 0
    before = load_run(out)
    assert before.header.why is None
    why = [*command, "--why", "--why-haystacks", "2", "--why-questions", "4", "--json"]
    done = command_line(*why, cwd=tmp_path)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    (split,) = document["why"]
    assert (split["length"], split["short_length"], split["asked"]) == (768, 256, 8)
    assert [p["name"] for p in split["parts"]][:3] == ["comprehension", "loss", "position"]
    assert "why the window ends, probe needle" in done.stderr
    assert (out / "why.png").read_bytes().startswith(b"\x89PNG")
    assert load_run(out).trials.equals(before.trials), "the finished run was reused"
    lines = (out / "why.jsonl").read_text()
    again = command_line(*why, cwd=tmp_path)
    assert json.loads(again.stdout)["why"] == document["why"]
    assert (out / "why.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlamaConfig(**TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            r"'dynamic' can't: whole prompts: its rotary embedding \(dynamic\) changes with the length",
        ),
    ],
    ids=["dynamic"],
)
def test_models_that_cannot_be_moved_are_told_before_anything_is_measured(config, message, smollm2, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dynamic")
    smollm2.tokenizer.save_pretrained(tmp_path / "dynamic")
    with pytest.raises(UserError, match=message):
        measure_window(str(tmp_path / "dynamic"), out=tmp_path / "run", device="cpu", max_length=1024, why=True)
    assert not (tmp_path / "run").exists()
