"""The pocket model: a true Qwen2.5-VL checkpoint in the package, as good as its card says, and nothing without pictures."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from laid_eval.models.fork_pictures import ForkedPictures, WholePictures, why_not_forked
from laid_eval.models.load import describe, load_vision
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.reference import BUNDLED
from laid_eval.models.source import quiet, resolve
from laid_eval.runs import load_run
from laid_eval.window.picture_reading import asked_at, draw_haystack
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import draw

ROOT = Path(__file__).parents[2]
NAMES = [bundled.name for bundled in BUNDLED]
WHICH = load_probe("visual-which")


@pytest.fixture(scope="module")
def loaded():
    return {name: load_vision(describe(resolve(name), device="cpu")) for name in NAMES}


def answers(loaded, count, haystacks, seed=5, look=lambda picture: picture):
    """Share of right answers on haystacks of `count` pictures, each passed through `look`."""
    frame = picture_frame("pocket", loaded.processor)
    right = []
    for k in range(haystacks):
        story = draw_haystack(WHICH, seed, k, (count,))
        text = ForkedPictures(loaded.model, frame)
        for scene in story.scenes:
            text.show(look(draw(scene, WHICH.size)))
        asked = asked_at(WHICH, story, seed, k, count)
        logs = text.ask([frame.branch(a.question.prompt, a.question.lead, a.question.choices) for a in asked])
        right += [int(np.argmax(one)) == a.question.answer for one, a in zip(logs, asked, strict=True)]
    return np.mean(right)


@pytest.mark.parametrize("bundled", BUNDLED, ids=NAMES)
def test_it_is_an_ordinary_checkpoint(bundled):
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(bundled.folder)
        processor = AutoProcessor.from_pretrained(bundled.folder)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert (bundled.folder / "model.safetensors").stat().st_size < 8e6
    assert processor.tokenizer.decode(processor.tokenizer(" a tiger").input_ids) == " a tiger"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_good_at_few_pictures(loaded, name):
    assert answers(loaded[name], 2, 12) > 0.7


def test_it_loses_its_window(loaded):
    short, long = (answers(loaded["pocket-student"], *size) for size in ((2, 12), (120, 2)))
    assert long < short - 0.2


def test_the_teacher_holds_three_times_as_long():
    """Measured on these very weights, intervals apart."""
    windows = {}
    for name, folder in (("pocket-student", "pocket-window"), ("pocket-teacher", "pocket-teacher-window")):
        run = load_run(ROOT / "reports" / folder)
        assert run.header.model.fingerprint == resolve(name).fingerprint
        windows[name] = run.window(WHICH.name)
    student, teacher = windows["pocket-student"], windows["pocket-teacher"]
    assert {student.censored, teacher.censored} == {"no"}
    assert teacher.length >= 3 * student.length
    assert teacher.low > student.high


def test_without_the_pictures_it_is_at_chance(loaded):
    """Right answers can't be guessed from the words."""
    blank = Image.new("RGB", (WHICH.size, WHICH.size), "white")
    score = answers(loaded["pocket-student"], 5, 20, look=lambda _: blank)
    assert abs(score - 1 / 8) < 0.11


def test_forks_equal_whole_prompts(loaded):
    one = loaded["pocket-student"]
    frame = picture_frame("pocket", one.processor)
    story = draw_haystack(WHICH, 3, 0, (4,))
    assert why_not_forked(one.model, frame, [draw(scene, WHICH.size) for scene in story.scenes[:3]], 999) is None
    forked, whole = ForkedPictures(one.model, frame), WholePictures(one.model, frame)
    branches = []
    for scene in story.scenes:
        for text in (forked, whole):
            text.show(draw(scene, WHICH.size))
    for asked in asked_at(WHICH, story, 3, 0, 4)[:2]:
        branches.append(frame.branch(asked.question.prompt, asked.question.lead, asked.question.choices))
    assert np.allclose(forked.ask(branches), whole.ask(branches), atol=1e-4)


@pytest.mark.parametrize("bundled", BUNDLED, ids=NAMES)
def test_the_card_says_how_good(loaded, bundled):
    card = (bundled.folder / "README.md").read_text()
    counts, row = (
        re.search(rf"^\| {head} \|(.*)\|$", card, re.M).group(1).split("|") for head in ("images", WHICH.name)
    )
    said = {int(n): float(cell.split()[0]) for n, cell in zip(counts, row, strict=True)}
    assert set(said) >= {1, 5, 10, 20, 50, 100, 150}
    assert "Seed" in card
    assert abs(answers(loaded[bundled.name], 5, 12) - said[5]) < 0.2
