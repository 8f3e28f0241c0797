"""The real SmolLM2: it can do the task, and without the fact it can't."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from transformers import AutoModelForCausalLM

from laid_eval import measure_window
from laid_eval.window.haystack import build, load_corpus
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.probes import load_probe, text_probe_names
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
@pytest.mark.parametrize("name", text_probe_names())
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


def _families():
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    tiny = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "pad_token_id": 2,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return {
        "llama": LlamaConfig(**tiny),
        "qwen2": Qwen2Config(**tiny),
        "qwen3": Qwen3Config(**tiny, head_dim=8),
        "gemma3": Gemma3TextConfig(**tiny, head_dim=8, sliding_window=64),
        "mistral-sliding": MistralConfig(**tiny, sliding_window=64),
        "phi3": Phi3Config(**tiny),
        "llama-dynamic": LlamaConfig(
            **tiny, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        ),
    }


@pytest.mark.parametrize("family", _families())
def test_any_causal_model_is_measured_from_a_local_folder(family, smollm2, tmp_path):
    """Random models know nothing: at chance, censored below, and the run says how it was asked."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_families()[family]).save_pretrained(tmp_path / family)
    smollm2.tokenizer.save_pretrained(tmp_path / family)
    run = measure_window(
        str(tmp_path / family),
        out=tmp_path / "run",
        device="cpu",
        max_length=640,
        budget=2000 if "dyn" not in family else None,
    )
    assert run.window().censored == "below"
    assert (run.header.model.fan_out == "forked") == (family != "llama-dynamic")
    assert run.header.cost.question_tokens > 0


@pytest.mark.slow
def test_prompts_are_as_long_as_asked_for(reader, tmp_path):
    run = measure_window(reader, "needle", out=tmp_path / "run", max_length=512, budget=1024)
    assert (run.trials["prompt_tokens"] <= run.trials["length"]).all()
    assert (run.trials["prompt_tokens"] > run.trials["length"] - 40).all()
    assert run.header.cost.whole_prompt_tokens == run.trials["prompt_tokens"].sum()
    assert run.trials["margin"].notna().all()
