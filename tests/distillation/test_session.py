"""From names to an ordinary checkpoint, on tiny models: trained, killed, resumed, exported, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import laid_eval
from laid_eval import UserError
from laid_eval.distillation import session, train
from laid_eval.distillation.train import DONE, newest_checkpoint
from laid_eval.models.source import quiet

FULL = {"losses.coverage": "0.1", "matching.layers": "last", "matching.heads": "all", "gain.sharing": "head"}


def weights(folder):
    return load_file(folder / "model.safetensors")


def run(models, out, quick, recipe="laid", changes=None, student="student", **options):
    teacher = None if recipe == "sft" else str(models["teacher"])
    return laid_eval.distill(
        str(models[student]), teacher, recipe, out=out, changes={**quick, **(changes or {})}, device="cpu", **options
    )


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    quick = {
        "training.steps": "4",
        "training.accumulation": "1",
        "training.save_every": "2",
        "data.lengths": "[100,160]",
    }
    return run(models, tmp_path_factory.mktemp("whole") / "run", quick, changes=FULL), {**quick, **FULL}


def test_it_leaves_an_ordinary_checkpoint(whole, models):
    done, _ = whole
    with quiet():
        found = AutoModelForCausalLM.from_pretrained(done.path)
        source = AutoModelForCausalLM.from_pretrained(models["student"])
    assert set(found.state_dict()) == set(source.state_dict())
    assert any(
        not torch.equal(a, b) for a, b in zip(found.state_dict().values(), source.state_dict().values(), strict=True)
    )
    header = done.header
    assert header.status == "complete"
    assert header.certificate["passed"]
    assert header.export["largest_difference"] < 1e-5
    assert json.loads((done.path / "laid_fold.json").read_text())["passed"]
    assert not list(done.path.glob(".export*"))


def test_the_record_tells_what_was_done(whole):
    done, _ = whole
    header = done.header
    assert header.trained["weights"] > 0
    assert header.trained["gains"] == 2 * 4 * 4  # layers, heads, pairs
    assert header.trained["mixtures"] == 4 * 6
    assert header.pairs == ((1, 2),)
    assert list(done.steps["step"]) == [1, 2, 3, 4]
    assert {"loss", "sft", "kl", "attention", "coverage", "gamma", "effective_heads_1-2"} <= set(done.steps)
    assert 1 <= done.steps["effective_heads_1-2"].iloc[0] <= 6
    assert header.cost.steps == 4
    assert header.cost.tokens == done.steps["tokens"].sum()
    assert done.log_gain.shape == (2, 4, 4)
    assert np.abs(done.log_gain).max() > 0
    assert list((done.path / "tensorboard").rglob("events*"))


def test_each_kind_of_parameter_has_its_own_rate_and_moves(whole):
    """Note's test 17: mixtures and gains are in the optimiser and in the checkpoint."""
    done, _ = whole
    for kind in ("weights", "mixtures", "gains"):
        assert done.steps[f"rate_{kind}"].max() > 0
    recipe = done.header.recipe["training"]
    ratio = done.steps["rate_gains"] / done.steps["rate_weights"]
    assert np.allclose(ratio, recipe["gain_rate"] / recipe["learning_rate"])
    first = load_file(done.path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    last = load_file(done.path / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert first.keys() == last.keys()
    for mark in ("mixers.", "rope_gain.", "mlp."):
        names = [n for n in first if mark in n]
        assert names, mark
        assert any(not torch.equal(first[n], last[n]) for n in names), mark


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, models, tmp_path, at):
    """Note's test 18: losses, gains, weights; before and after the first checkpoint."""
    done, changes = whole

    def stop(report):
        if report.step and report.step.step == at:
            raise Stop

    with pytest.raises(Stop):
        run(models, tmp_path / "run", changes, progress=stop)
    again = run(models, tmp_path / "run", changes)
    same = [c for c in done.steps if c != "seconds"]
    assert again.steps[same].equals(done.steps[same])
    assert np.array_equal(again.log_gain, done.log_gain)
    ours, theirs = weights(again.path), weights(done.path)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_finished_run_answers_at_once_and_others_are_refused(whole, models):
    done, changes = whole
    stamp = (done.path / "model.safetensors").stat().st_mtime
    assert run(models, done.path, changes).header == done.header
    assert (done.path / "model.safetensors").stat().st_mtime == stamp
    with pytest.raises(UserError, match=r"holds a distillation with recipe training\.steps = 4, asked was 5"):
        run(models, done.path, {**changes, "training.steps": "5"})
    with pytest.raises(UserError, match="holds a distillation with seed = 0, asked was 1"):
        run(models, done.path, changes, seed=1)
    with pytest.raises(UserError, match="is a distill run, not a window; read it with"):
        laid_eval.load_run(done.path)


def test_a_damaged_checkpoint_is_told_and_nothing_is_lost(whole, models, tmp_path):
    done, changes = whole
    broken = tmp_path / "run"
    shutil.copytree(done.path, broken)
    header = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**header, "status": "partial"}))
    shutil.rmtree(broken / "checkpoints" / "checkpoint-4")
    file = broken / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    before = (broken / "steps.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"checkpoint-2' is damaged .* Nothing was changed: remove that folder"):
        run(models, broken, changes)
    assert (broken / "steps.jsonl").read_bytes() == before
    shutil.rmtree(broken / "checkpoints" / "checkpoint-2")
    assert run(models, broken, changes).header.status == "complete"


def test_a_checkpoint_that_was_not_finished_is_passed_over(whole, tmp_path):
    done, _ = whole
    shutil.copytree(done.path / "checkpoints", tmp_path / "checkpoints")
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoints" / "checkpoint-4" / DONE).unlink()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_full_disk_is_told_before_and_during(models, quick, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=1000))
    with pytest.raises(UserError, match=r"has 0.0 GiB free; checkpoints and export take about"):
        run(models, tmp_path / "a", quick, "sft")
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(UserError, match=r"stopped at step 2: No space left on device. Make room"):
        run(models, tmp_path / "b", quick, "sft")
    monkeypatch.undo()
    assert run(models, tmp_path / "b", quick, "sft").header.status == "complete"


def test_only_what_trains_changes(models, quick, tmp_path):
    before = weights(models["student"])
    done = run(
        models,
        tmp_path / "gain",
        quick,
        "gain-only",
        {"matching.mixture": "similarity", "gain.layers": "matched", "gain.start": "one"},
    )
    after = weights(done.path)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all(n.endswith("q_proj.weight") for n in moved)


def test_an_adapter_is_merged(models, quick, tmp_path):
    done = run(
        models, tmp_path / "lora", quick, "laid", {**FULL, "training.weights": "lora", "training.learning_rate": "1e-2"}
    )
    assert done.header.trained["weights"] < 20_000
    assert set(weights(done.path)) == set(weights(models["student"]))
    assert done.header.certificate["passed"]
    assert done.header.export["largest_difference"] < 1e-5
    saved = load_file(done.path / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert any("lora_A" in n for n in saved)
    assert not any("embed_tokens" in n for n in saved)


def test_half_precision_trains_and_keeps_what_trains_in_float32(models, quick, tmp_path):
    done = run(models, tmp_path / "run", quick, changes={**FULL, "training.precision": "bfloat16"})
    assert done.header.certificate["passed"]
    saved = load_file(done.path / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_without_its_extra_the_command_says_what_to_install(models, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .laid-eval\[distill\]"):
        run(models, tmp_path / "run", quick, "sft")


def test_a_student_that_shares_a_norm_gets_shared_gains(models, quick, tmp_path):
    done = run(models, tmp_path / "run", quick, changes={**FULL, "gain.sharing": "auto"}, student="qwen3")
    assert done.header.sharing == "layer"
    assert done.log_gain.shape == (2, 1, 4)
    with pytest.raises(UserError, match=r'gain.sharing = "head" can\'t be folded'):
        run(models, tmp_path / "other", quick, changes={**FULL, "gain.sharing": "head"}, student="qwen3")
    assert not (tmp_path / "other").exists()


def test_windows_are_measured_on_the_way_and_disturb_nothing(whole, models, tmp_path):
    done, changes = whole
    watched = run(models, tmp_path / "run", {**changes, "training.window_every": "2", "training.window_length": "1024"})
    assert [w.step for w in watched.header.windows] == [2, 4]
    assert (watched.path / "windows" / "step-000002" / "trials.jsonl").is_file()
    same = [c for c in done.steps if c != "seconds"]
    assert watched.steps[same].equals(done.steps[same])


def test_tokenizers_must_agree(models, quick, tmp_path, tokenizer):
    other = tmp_path / "other"
    shutil.copytree(models["teacher"], other)
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    words = content["model"]["vocab"]
    (a, i), (b, j) = list(words.items())[500], list(words.items())[600]
    words[a], words[b] = j, i
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"The tokenizers differ: token \d+ is .* to the student and"):
        laid_eval.distill(str(models["student"]), str(other), "laid", out=tmp_path / "run", changes=quick)
    assert not (tmp_path / "run").exists()


def test_more_rows_in_the_teachers_vocabulary_do_not_matter(models, quick, tmp_path, tokenizer):
    padded = tmp_path / "padded"
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(models["teacher"])
        torch.manual_seed(0)
        model.resize_token_embeddings(49280)
        model.save_pretrained(padded)
        tokenizer.save_pretrained(padded)
    args = {"changes": {**quick, "training.steps": "1"}, "device": "cpu"}
    a = laid_eval.distill(str(models["student"]), str(padded), "sft-kl", out=tmp_path / "a", **args)
    b = laid_eval.distill(str(models["student"]), str(models["teacher"]), "sft-kl", out=tmp_path / "b", **args)
    assert a.steps["kl"].iloc[0] == pytest.approx(b.steps["kl"].iloc[0], rel=1e-4)


def test_what_is_missing_or_wrong_is_told(models, quick, tmp_path):
    student = str(models["student"])
    with pytest.raises(UserError, match="Recipe 'laid' learns from a teacher"):
        laid_eval.distill(student, recipe="laid", out=tmp_path / "x")
    with pytest.raises(UserError, match="names layer 9 of the student, which has layers 0 to 1"):
        run(models, tmp_path / "x", quick, changes={"matching.layers": "[[9, 0]]"})
    with pytest.raises(UserError, match="needs as many heads"):
        run(models, tmp_path / "x", quick, "gain-only")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no distillation"):
        run(models, tmp_path / "full", quick, "sft")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_no_number_stops_the_run(models, quick, tmp_path):
    with pytest.raises(UserError, match=r"The (loss|gradient) is not finite at step \d+"):
        run(
            models,
            tmp_path / "run",
            quick,
            "sft",
            {"training.learning_rate": "9.9", "training.clip": "1e30", "training.warmup": "0", "training.steps": "30"},
        )


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(whole, models, tmp_path):
    done, changes = whole
    words = [
        sys.executable,
        "-m",
        "laid_eval",
        "distill",
        "--student",
        models["student"],
        "--teacher",
        models["teacher"],
    ]
    words += ["--device", "cpu", "--out", tmp_path / "run", "--json"]
    words += [w for name, value in changes.items() for w in ("--set", f"{name}={value}")]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mark = tmp_path / "run" / "checkpoints" / "checkpoint-2" / DONE
    for _ in range(2400):
        if mark.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert mark.exists()
    result = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["status"] == "complete"
    assert document["losses"] == done.header.losses
    again = laid_eval.load_distillation(tmp_path / "run")
    same = [c for c in done.steps if c != "seconds"]
    assert again.steps[same].equals(done.steps[same])
    assert {"losses.png", "rope-gain.png"} <= {p.name for p in again.path.iterdir()}


def test_what_can_not_be_done_is_told_before_anything_is_written(models, quick, tmp_path, monkeypatch):
    cases = [
        ("sft-kl", {"matching.ramp": "[0.9, 0.1]", "losses.attention": "1"}, "`ramp` must be"),
        ("laid", {"matching.layers": "[]"}, "names no pair of layers"),
        ("sft-kl", {"gain.start": "queries"}, "no attention is matched"),
        ("sft-kl", {"data.lengths": "[1, 1]"}, "greater than or equal to 16"),
    ]
    for recipe, changes, says in cases:
        with pytest.raises(UserError, match=says):
            laid_eval.distill(
                str(models["qwen3"]), str(models["teacher"]), recipe, out=tmp_path / "x", changes={**quick, **changes}
            )
    slower = tmp_path / "slower"
    shutil.copytree(models["student"], slower)
    config = json.loads((slower / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (slower / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"can't be compared: head sizes \(8 and 8\), rotary frequencies"):
        laid_eval.distill(str(models["student"]), str(slower), "paper", out=tmp_path / "x", changes=quick)
    assert not (tmp_path / "x").exists()


def test_a_students_layers_that_see_a_window_are_not_matched(models, quick, tmp_path, tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=32, pad_token_id=None,
    )  # fmt: skip
    with quiet():
        MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
        tokenizer.save_pretrained(tmp_path / "mistral")
    with pytest.raises(UserError, match="Layer 1 of the student sees only part of the text"):
        laid_eval.distill(
            str(tmp_path / "mistral"), str(models["teacher"]), "sft-kl-attn", out=tmp_path / "x", changes=quick
        )


def test_a_half_precision_checkpoint_is_the_student_rounded_once(models, quick, tmp_path, tokenizer):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "half")
        tokenizer.save_pretrained(tmp_path / "half")
    done = laid_eval.distill(
        str(tmp_path / "half"), str(models["teacher"]), "laid", out=tmp_path / "run", device="cpu",
        changes={**quick, **FULL},
    )  # fmt: skip
    assert done.header.export["dtype"] == "bfloat16"
    assert done.header.export["largest_difference"] < 1e-3
    assert {t.dtype for t in weights(done.path).values()} == {torch.bfloat16}


def test_a_disk_that_is_really_full_is_told():
    import safetensors

    error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert train.write_failure(error) == "No space left on device (os error 28)"
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4992 vs 4884")
    assert train.write_failure(error) == "the disk is full"
    assert train.write_failure(RuntimeError("CUDA out of memory")) is None
