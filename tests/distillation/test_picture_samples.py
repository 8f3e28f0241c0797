"""Haystacks to train on: what evaluation reads, from scenes that it never shows."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL.Image import new
from transformers import AutoProcessor

from laid_eval import UserError
from laid_eval.distillation import picture_samples
from laid_eval.distillation.batches import Batch, Numbered, padded
from laid_eval.distillation.picture_samples import open_pictures, places_of, visual_probe
from laid_eval.distillation.recipe import Data
from laid_eval.distillation.sides import find_side
from laid_eval.models.cost import empty_model
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.source import quiet
from laid_eval.window.picture_reading import draw_haystack
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import draw


def opened(folder, data, seed=0):
    side = find_side("student", str(folder), None, "float32", "cpu", False, False, data)
    frame = picture_frame("x", side.processor)
    return open_pictures(visual_probe(data), data, frame, places_of(empty_model(side.described)), seed), frame


@pytest.fixture
def stories(monkeypatch):
    """Every story that training draws, in order."""
    seen, own = [], picture_samples.draw_pictures

    def watched(*args):
        seen.append(own(*args))
        return seen[-1]

    monkeypatch.setattr(picture_samples, "draw_pictures", watched)
    return seen


def test_a_sample_is_a_pure_function_of_its_number(seeing, tiny_probe):
    data = Data(source=tiny_probe, images=(1, 4), stretch=400)
    a, b, other = (opened(seeing("qwen2_5_vl"), data, seed)[0].samples for seed in (5, 5, 6))
    for number in (3, 0, 3):
        one, two = a(number), b(number)
        assert one.tokens == two.tokens
        assert np.array_equal(one.positions, two.positions)
        assert torch.equal(one.shown.inputs["pixel_values"], two.shown.inputs["pixel_values"])
    assert a(0).tokens != a(1).tokens
    assert a(0).tokens != other(0).tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm"])
def test_it_reads_what_processor_and_template_write(seeing, tiny_probe, stories, family):
    data = Data(source=tiny_probe, images=(3, 3), questions=1)
    source, _ = opened(seeing(family), data)
    stories.clear()
    sample = source.samples(0)
    (story,) = stories
    with quiet():
        processor = AutoProcessor.from_pretrained(seeing(family))
    pictures = [draw(scene, story.probe.size) for scene in story.scenes]
    answered = processor.decode(np.array(sample.tokens)[list(sample.labels)])
    (question,) = [
        q
        for q in story.questions(3, np.random.default_rng(0))
        if q.needle == sample.shown.needles[0] - 1
        if q.prompt in processor.decode(sample.tokens)
    ]
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    (beside,) = set(story.scenes[question.needle].objects) - {question.prompt.split()[-1].rstrip("?")}
    article = "an" if beside[0] in "aeiou" else "a"
    whole = processor(text=[f"{text}Also {article} {beside}"], images=pictures, return_tensors="pt")
    assert sample.tokens == tuple(whole["input_ids"][0].tolist())
    assert f"{article} {beside}".endswith(answered)
    assert answered
    for name, value in sample.shown.inputs.items():
        assert torch.equal(value, whole[name]), name


def test_each_question_stands_right_after_the_pictures(seeing, tiny_probe):
    source, frame = opened(seeing("qwen2_5_vl"), Data(source=tiny_probe, images=(4, 4), questions=3))
    sample = source.samples(0)
    branches, places = sample.shown.branches, sample.shown.places
    assert sorted(set(branches)) == [0, 1, 2, 3]
    assert (places[branches > 0] == 5).all()
    assert (np.diff(places) >= 0).all()
    assert Counter(places[branches == 0]) == {0: len(frame.opening()), 1: 11, 2: 11, 3: 11, 4: 11}
    starts = {tuple(sample.positions[:, branches == k][:, 0]) for k in (1, 2, 3)}
    assert starts == {(sample.positions[0, branches == 0].max() + 1,) * 3}
    for k in (1, 2, 3):  # the answer ends its question
        own = np.flatnonzero(branches == k)
        assert (np.diff(sample.positions[:, own]) == 1).all()
        assert own[-1] in sample.labels
    assert len(sample.shown.needles) == len(sample.labels)


def test_training_never_sees_a_scene_of_an_evaluation(seeing, stories, monkeypatch):
    monkeypatch.setattr(picture_samples, "draw", lambda scene, size: new("RGB", (32, 32)))
    trained, asked = set(), set()
    for name in ("visual-which", "visual-haystack"):
        for seed in range(3):
            source, _ = opened(seeing("smolvlm"), Data(source=name, images=(20, 20)), seed)
            for number in range(8):
                source.samples(number)
            for haystack in range(40):
                for cuts in ((20,), (4, 40)):  # of one length with training's: numbers alone keep them apart
                    asked |= set(draw_haystack(load_probe(name), seed, haystack, cuts).scenes)
    trained = {scene for story in stories for scene in story.scenes}
    assert len(trained) > 700
    assert len(asked) > 9000
    assert not trained & asked


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_stretching_moves_pictures_whole(seeing, tiny_probe, family):
    """All axes by the same, so text stays on the diagonal; an image keeps its layout; far positions are used."""
    plain, far = (
        opened(seeing(family), Data(source=tiny_probe, images=(2, 4), questions=2, stretch=stretch))[0].samples
        for stretch in (None, 3000)
    )
    last = []
    for number in range(12):
        a, b = plain(number), far(number)
        assert a.tokens == b.tokens
        places, branches = a.shown.places, a.shown.branches
        gaps = np.atleast_2d(b.positions - a.positions)
        assert (gaps == gaps[:1]).all()
        for place in set(places):
            assert len(set(gaps[0, places == place])) == 1
        assert (gaps[0, places == 0] == 0).all()
        assert (np.diff(gaps[0]) >= 0).all()
        if a.positions.ndim > 1:
            assert (b.positions[:, branches > 0] == b.positions[:1, branches > 0]).all()
            assert any((a.positions[:, places == 1][0] != a.positions[:, places == 1][2]).tolist())
        last.append(int(b.positions.max()))
    assert max(last) < 3000
    assert max(last) > 2000
    assert len(set(last)) > 10


def test_numbers_of_pictures_and_sources_go_together(tiny_probe):
    assert visual_probe(Data()) is None
    assert visual_probe(Data(source="visual-any", images=(3, 4))).needles == 3
    for given, says in [
        ({"source": "visual-which"}, "shows pictures: say how many"),
        ({"source": "facts", "images": (2, 4)}, "training data 'facts' shows none. Allowed with pictures: visual-all"),
        ({"source": "visual-any", "images": (2, 4)}, "asks about 3 pictures at once"),
    ]:
        with pytest.raises(UserError, match=says):
            visual_probe(Data(**given))


def test_models_whose_pictures_can_not_be_told_apart_are_refused(seeing, tiny_probe):
    with pytest.raises(UserError, match="see later tokens of themselves"):
        opened(seeing("gemma3"), Data(source=tiny_probe, images=(2, 4)))


def test_positions_stretched_below_the_pictures_own_are_refused(seeing, tiny_probe):
    with pytest.raises(UserError, match=r"data.stretch 20 is below what 4 pictures take of themselves, \d+ positions"):
        opened(seeing("qwen2_5_vl"), Data(source=tiny_probe, images=(2, 4), stretch=20))


def test_batches_hold_one_haystack(seeing, tiny_probe):
    source, _ = opened(seeing("qwen2_5_vl"), Data(source=tiny_probe, images=(2, 2)))
    batch = Batch(**padded([Numbered(source.samples, 5)[2]]))
    size = batch.input_ids.shape[1]
    assert batch.position_ids.shape == (3, 1, size)
    assert batch.places.shape == batch.branches.shape == (1, size)
    assert int((batch.labels != -100).sum()) == len(source.samples(2).labels)
