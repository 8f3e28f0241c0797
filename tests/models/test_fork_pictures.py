"""Pictures read one by one and asked about on forks, against whole prompts through each family's own processor."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from laid_eval.errors import UserError
from laid_eval.models.fork_pictures import ForkedPictures, WholePictures, why_not_forked
from laid_eval.models.picture_frame import picture_frame
from laid_eval.window.scenes import Scene, draw

spec = importlib.util.spec_from_file_location("vision_families", Path(__file__).parent / "vision_families.py")
families = importlib.util.module_from_spec(spec)
sys.modules["vision_families"] = families
spec.loader.exec_module(families)

SCENES = [draw(Scene(("tiger", "bus", "pear"), seed), 48) for seed in range(5)]
CHOICES = ("a tiger", "a bus", "an umbrella")


@pytest.fixture(scope="module")
def made():
    return {name: families.make(name) for name in families.FAMILIES}


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_forks_equal_whole_prompts_or_are_not_used(made, name):
    model, processor = made[name]
    frame = picture_frame(name, processor)
    reason = why_not_forked(model, frame, SCENES[:3], 200)
    if name == "gemma3":  # its pictures see later tokens of themselves
        assert "differ from whole prompts" in reason
        half = copy.deepcopy(model).to(torch.bfloat16)  # rounding would hide it
        assert "later tokens" in why_not_forked(half, frame, SCENES[:3], 200)
        return
    assert reason is None
    half = why_not_forked(copy.deepcopy(model).to(torch.bfloat16), frame, SCENES[:3], 200)
    assert half is None
    forked, whole = ForkedPictures(model, frame), WholePictures(model, frame)
    branches = [frame.branch("Which is it?", lead, CHOICES) for lead in ("", "It is")]
    for count, picture in enumerate(SCENES, start=1):
        for text in (forked, whole):
            text.show(picture)
        if count in (1, 3, 5):
            a, b = torch.tensor(forked.ask(branches)), torch.tensor(whole.ask(branches))
            assert torch.allclose(a, b, atol=1e-4)
            assert len(set(a.flatten().tolist())) == 6
            assert (forked.length, forked.position) == (whole.length, whole.position)


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_pictures_are_seen(made, name):
    """Another picture, or another order, changes the answer."""
    model, processor = made[name]
    frame = picture_frame(name, processor)
    branch = frame.branch("Which is it?", "It is", CHOICES)
    other = draw(Scene(("rocket",), 9), 48)
    answers = []
    for shown in ([SCENES[0], other], [other, SCENES[0]], [other, other]):
        text = WholePictures(model, frame)
        for picture in shown:
            text.show(picture)
        answers.append(text.ask([branch])[0])
    assert (
        min(abs(a - b) for x, y in ((0, 1), (0, 2), (1, 2)) for a, b in zip(answers[x], answers[y], strict=True)) > 1e-4
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_the_models_own(made, name):
    """A picture moves what follows by its longer side (and its two markers), as in the whole prompt."""
    model, processor = made[name]
    frame = picture_frame(name, processor)
    wide = draw(Scene(("bus",), 1), 96).crop((0, 0, 96, 32))
    pictures = [SCENES[0], wide, SCENES[1]]
    whole = processor(text=[frame.before + frame.picture * 3], images=pictures, return_tensors="pt")
    positions, delta = model.base_model.get_rope_index(
        whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"]
    )
    forked = ForkedPictures(model, frame)
    for picture in pictures:
        forked.show(picture)
    assert forked.length == positions.shape[-1]
    assert forked.position == int(positions.max()) + 1 == forked.length + int(delta)
    assert forked.position < forked.length


def test_rotary_embeddings_that_change_with_the_length_are_not_forked(made):
    model, processor = made["llava_onevision"]
    changing = copy.deepcopy(model)
    text = changing.config.get_text_config(decoder=True)
    text.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    text.max_position_embeddings = 158
    assert "changes with the length" in why_not_forked(changing, picture_frame("x", processor), SCENES[:3], 200)


def test_questions_leave_no_trace(made):
    model, processor = made["qwen2_5_vl"]
    frame = picture_frame("x", processor)
    branch = frame.branch("Which is it?", "It is", CHOICES)
    quiet, noisy = ForkedPictures(model, frame), ForkedPictures(model, frame)
    for picture in SCENES[:3]:
        quiet.show(picture)
        noisy.show(picture)
        noisy.ask([branch])
    assert quiet.ask([branch]) == noisy.ask([branch])


def test_processors_that_can_not_be_used_are_told():
    _, processor = families.qwen2_5_vl()
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        picture_frame("mine", processor)
    processor.chat_template = families.template("<|vision_start|><|image_pad|><|vision_end|>").replace(
        "{% for p", "Number {{ m['content'] | length }}: {% for p"
    )
    with pytest.raises(UserError, match="one picture like the next"):
        picture_frame("mine", processor)
    with pytest.raises(UserError, match="takes no pictures"):
        picture_frame("mine", processor.tokenizer)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "gemma3", "internvl"])
def test_free_answers_equal_those_of_whole_prompts(made, name):
    """Token by token on the cache, and transformers' own loop over the whole prompt."""
    model, processor = made[name]
    frame = picture_frame(name, processor)
    forked, whole = ForkedPictures(model, frame), WholePictures(model, frame)
    for text in (forked, whole):
        for picture in SCENES[:3]:
            text.show(picture)
    stem = frame.stem("Is there a bus?")
    branch = frame.branch("Which is it?", "It is", CHOICES)
    before = forked.ask([branch])
    said = whole.say(stem, 12, set())
    assert len(said) == 12
    stop = {said[7]}
    assert whole.say(stem, 12, stop) == said[: said.index(said[7])]
    if name != "gemma3":  # its pictures see later tokens of themselves; it is never forked
        assert forked.say(stem, 12, set()) == said
        assert forked.say(stem, 12, stop) == said[: said.index(said[7])]
        assert forked.ask([branch]) == before
