"""The real SmolLM2: it can do the task, and without the fact it can't."""

import numpy as np
import pytest
from scipy.stats import binom

from laid_eval import measure_window
from laid_eval.window.haystack import build, load_corpus
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.probes import load_probe, probe_names
from laid_eval.window.questions import draw_story
from laid_eval.window.readers import Asked


@pytest.fixture(scope="module")
def reader(smollm2):
    reader = ModelReader(smollm2, 1024)
    assert reader.info.fan_out == "forked"
    return reader


def score(answers, questions):
    return sum(float(np.argmax(logs)) == q.answer for logs, q in zip(answers, questions, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", probe_names())
def test_without_the_haystack_the_model_scores_at_chance(reader, name):
    """Every question, asked straight after the instruction: within the 99% binomial interval of chance."""
    probe = load_probe(name)
    right = total = 0
    for seed in range(20):
        rng = np.random.default_rng([seed, 77])
        story = draw_story(probe, rng)
        questions = story.questions(range(len(story.statements)), rng)[:12]
        reader.begin()
        reader.read(reader.opening(probe.instruction))
        right += score(reader.ask([Asked("", q, 0, 0, None) for q in questions]), questions)
        total += len(questions)
        if total >= 120:
            break
    low, high = binom.interval(0.99, total, 1 / probe.choices)
    assert low <= right <= high, f"{right} of {total} right without the text"


@pytest.mark.slow
def test_with_the_haystack_it_finds_needles(reader):
    probe, corpus = load_probe("needle"), load_corpus()
    right = total = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        story = draw_story(probe, rng)
        text = build(corpus, story.statements, [256, 700], reader.encode, rng)
        questions = story.questions(text.read(700), rng)
        reader.begin()
        reader.read([*reader.opening(probe.instruction), *text.tokens])
        right += score(reader.ask([Asked("", q, 0, 0, None) for q in questions]), questions)
        total += len(questions)
    assert right / total > 0.9


@pytest.mark.slow
def test_prompts_are_as_long_as_asked_for(reader, tmp_path):
    run = measure_window(reader, "needle", out=tmp_path / "run", max_length=512, budget=1024)
    assert (run.trials["prompt_tokens"] <= run.trials["length"]).all()
    assert (run.trials["prompt_tokens"] > run.trials["length"] - 40).all()
    assert run.header.cost.whole_prompt_tokens == run.trials["prompt_tokens"].sum()
    assert run.trials["margin"].notna().all()
