"""From two models that see to an ordinary checkpoint of the whole student."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import laid_eval
from laid_eval import UserError
from laid_eval.distillation.train import put_trained, trained_weights
from laid_eval.models.gained import add_gains, gainable
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import quiet
from laid_eval.window.scenes import Scene, draw

FULL = {"matching.layers": "last", "matching.heads": "all", "data.stretch": "600", "training.learning_rate": "1e-3"}


def run(seeing, out, changes, family="qwen2_5_vl", recipe="laid", **options):
    return laid_eval.distill(
        str(seeing(family)), str(seeing(family, True)), recipe, out=out, changes=changes, device="cpu", **options
    )


def vision(weights):
    return {n: w for n, w in weights.items() if "visual" in n or "vision" in n}


@pytest.fixture(scope="module")
def whole(seeing, tiny_probe, tmp_path_factory):
    changes = {
        "data.source": tiny_probe, "data.images": "[2,4]", "data.questions": "2", "training.steps": "4",
        "training.accumulation": "2", "training.save_every": "2", **FULL,
    }  # fmt: skip
    return run(seeing, tmp_path_factory.mktemp("whole") / "run", changes), changes


def asked(folder, model):
    """Logits on a prompt of two pictures, made and positioned by the checkpoint's own processor and model."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "With a tiger?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [draw(Scene(("tiger", "pig"), k), 48) for k in range(2)]
    with torch.no_grad():
        return model.eval()(**processor(text=[text], images=pictures, return_tensors="pt")).logits


def test_plain_transformers_loads_what_was_trained(whole, seeing):
    """Gains and weights of the last checkpoint at run time, against the exported files alone."""
    done, _ = whole
    source = seeing("qwen2_5_vl")
    with quiet():
        trained = AutoModelForImageTextToText.from_pretrained(source)
        turning = rotaries(trained, 600)
        gainable(trained)
        add_gains(trained, dict(enumerate(turning)), False)
        language = set(dict(trained.named_parameters())) - set(vision(dict(trained.named_parameters())))
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(name in language)
        tensors = trained_weights(done.path / "checkpoints" / "checkpoint-4")
        put_trained(trained, {n.removeprefix("model."): w for n, w in tensors.items() if "mixers" not in n})
        found = AutoModelForImageTextToText.from_pretrained(done.path)
        before = AutoModelForImageTextToText.from_pretrained(source)
    wanted = asked(source, trained)
    assert torch.allclose(asked(done.path, found), wanted, atol=1e-4)
    assert not torch.allclose(asked(source, before), wanted, atol=1e-2)
    assert done.header.export["largest_difference"] < 1e-5
    assert done.header.certificate["passed"]
    assert done.header.sharing == "head"
    assert np.abs(done.log_gain).max() > 0
    names = {p.name for p in done.path.iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"} <= names


def test_the_vision_side_stays_as_it_was_unless_asked(whole, seeing, tmp_path):
    done, changes = whole
    before, after = (load_file(f / "model.safetensors") for f in (seeing("qwen2_5_vl"), done.path))
    assert before.keys() == after.keys()
    assert vision(before)
    assert all(torch.equal(w, after[n]) for n, w in vision(before).items())
    assert any(not torch.equal(w, after[n]) for n, w in before.items())
    asked_for = {**changes, "training.vision": "trained", "training.steps": "1"}
    trained = run(seeing, tmp_path / "run", asked_for, recipe="sft-kl")
    moved = load_file(trained.path / "model.safetensors")
    assert any(not torch.equal(w, moved[n]) for n, w in vision(before).items())


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, seeing, tmp_path):
    done, changes = whole

    def stop(report):
        if report.step and report.step.step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(seeing, tmp_path / "run", changes, progress=stop)
    again = run(seeing, tmp_path / "run", changes)
    same = [c for c in done.steps if c != "seconds"]
    assert again.steps[same].equals(done.steps[same])
    assert np.array_equal(again.log_gain, done.log_gain)
    ours, theirs = (load_file(r.path / "model.safetensors") for r in (again, done))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_windows_are_measured_on_the_way_and_of_the_checkpoint(whole, seeing, tmp_path, tiny_probe):
    done, changes = whole
    watched = run(seeing, tmp_path / "run", {**changes, "training.window_every": "2", "training.window_images": "8"})
    assert [w.step for w in watched.header.windows] == [2, 4]
    assert "images" in watched.header.windows[0].text
    same = [c for c in done.steps if c != "seconds"]
    assert watched.steps[same].equals(done.steps[same])
    measured = laid_eval.measure_window(
        str(done.path), tiny_probe, max_length=8, budget=1500, device="cpu", out=tmp_path / "window"
    )
    assert measured.header.model.fan_out == "forked"
    assert measured.windows


def test_a_family_with_a_shared_norm_gets_shared_gains(seeing, few, tmp_path):
    done = run(seeing, tmp_path / "run", {**few, **FULL}, "qwen3_vl")
    assert done.header.sharing == "layer"
    assert done.log_gain.shape == (2, 1, 8)
    assert done.header.export["largest_difference"] < 1e-5
    with pytest.raises(UserError, match=r'gain.sharing = "head" can\'t be folded'):
        run(seeing, tmp_path / "other", {**few, **FULL, "gain.sharing": "head"}, "qwen3_vl")


def test_an_adapter_sits_on_the_language_side(seeing, few, tmp_path):
    changes = {**few, **FULL, "training.weights": "lora", "training.learning_rate": "1e-2"}
    done = run(seeing, tmp_path / "run", changes, "llava_onevision")
    saved = load_file(done.path / "checkpoints" / "checkpoint-4" / "model.safetensors")
    adapted = [n for n in saved if "lora_A" in n]
    assert adapted
    assert not any("vision" in n or "projector" in n for n in adapted)
    before, after = (load_file(f / "model.safetensors") for f in (seeing("llava_onevision"), done.path))
    assert before.keys() == after.keys()
    assert all(torch.equal(w, after[n]) for n, w in vision(before).items())
    assert done.header.export["largest_difference"] < 1e-4


def copied(seeing, tmp_path, name, change):
    """The teacher's folder with one JSON file changed."""
    out = tmp_path / name
    shutil.copytree(seeing("qwen2_5_vl", True), out)
    file = out / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return str(out)


def test_what_does_not_fit_together_is_told(seeing, models, few, tmp_path, tiny_probe):
    student, teacher = str(seeing("qwen2_5_vl")), str(seeing("qwen2_5_vl", True))
    text = {"data.source": "facts", "data.lengths": "[100,160]"}

    def larger(content):
        content["image_processor"]["size"] = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}

    def darker(content):
        content["image_processor"]["image_mean"] = [0.2, 0.2, 0.2]

    def shorter(content):
        content["text_config"]["max_position_embeddings"] = 40

    large = copied(seeing, tmp_path / "a", "processor_config.json", larger)
    dark = copied(seeing, tmp_path / "b", "processor_config.json", darker)
    short = copied(seeing, tmp_path / "c", "config.json", shorter)
    other = str(tmp_path / "worded")
    shutil.copytree(teacher, other)
    template = tmp_path / "worded" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "."))
    cases = [
        (student, str(models["teacher"]), few, r"The teacher .* \(llama\) takes no pictures"),
        (str(models["student"]), teacher, few, r"The student .* \(llama\) takes no pictures"),
        (student, teacher, text, r"The student .* \(qwen2_5_vl\) takes pictures, training data 'facts' shows none"),
        (str(models["student"]), teacher, text, r"The teacher .* \(qwen2_5_vl\) takes pictures"),
        (student, teacher, {"data.source": tiny_probe}, "shows pictures: say how many"),
        (student, teacher, {**few, "data.source": "prose"}, "training data 'prose' shows none"),
        (student, teacher, {**few, "data.images": "[0,4]"}, "greater than or equal to 1"),
        (student, teacher, {**few, "data.images": "[9,4]"}, r"`images` must be \[fewest, most\], at most 1,000"),
        (student, teacher, {**few, "data.images": "[2,2000]"}, r"`images` must be \[fewest, most\], at most 1,000"),
        (student, teacher, {**few, "training.batch": "2"}, "`training.batch` must be 1 with pictures"),
        (student, teacher, {**few, "data.stretch": "9000"}, "take positions up to 9,000; the student states 4,096"),
        (student, short, few, r"4 pictures would take positions up to \d+; the teacher states 40"),
        (student, large, few, "4 pictures take 44 tokens of the student and .* of the teacher"),
        (student, dark, few, "they make other pixels of the same pictures"),
        (student, other, few, "chat templates put the same haystack in other tokens"),
        (student, str(seeing("smolvlm", True)), few, "The tokenizers differ"),
        (str(models["student"]), None, {**text, "matching.distance": "image"}, "nothing shows pictures"),
    ]
    for own, theirs, changes, says in cases:
        with pytest.raises(UserError, match=says):
            laid_eval.distill(own, theirs, "laid", out=tmp_path / "x", changes=changes, device="cpu")
    assert not (tmp_path / "x").exists()
