"""Scores of heads from texts of their own: copying from a needle, and looking at places whatever stands there."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from laid_eval.models.frame import Branch, frame_of
from laid_eval.models.rotary import rotaries
from laid_eval.spectrum.heads import _steps, content_shift, retrieval_scores
from laid_eval.spectrum.layout import SINKS
from laid_eval.spectrum.texts import NeedleText, needles, shuffled
from laid_eval.window.haystack import load_corpus
from laid_eval.window.probes import load_probe

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_every_token_of_an_answer_is_looked_for_from_the_token_before_it():
    """Questions are packed one after the other, each without the last token of its answer."""
    text = NeedleText(
        tokens=list(range(50)),
        branches=(Branch((60, 61, 62), ((70, 71),)), Branch((63, 64), ((72,),)), Branch((65,), ((73, 74, 75),))),
        spans=((4, 9), (20, 25), (30, 40)),
    )
    packed = [60, 61, 62, 70, 63, 64, 65, 73, 74]
    steps = _steps(text)
    assert [(packed[step.row], step.token) for step in steps] == [
        (62, 70), (70, 71), (64, 72), (65, 73), (73, 74), (74, 75),
    ]  # fmt: skip
    assert [(step.start, step.end) for step in steps] == [(4, 9)] * 2 + [(20, 25)] + [(30, 40)] * 3
    assert sum(step.share for step in steps) == pytest.approx(3)


@pytest.fixture(scope="module")
def text(smollm2):
    return needles(load_probe("needle"), load_corpus(), frame_of(smollm2.tokenizer), 384, seed=0)


@pytest.fixture(scope="module")
def scores(smollm2, text):
    return retrieval_scores(smollm2.model, [text])


def test_needles_stand_where_they_are_said_to_and_hold_their_answers(smollm2, text):
    assert len(text.branches) >= 4
    for branch, (start, end) in zip(text.branches, text.spans, strict=True):
        needle = smollm2.tokenizer.decode(text.tokens[start:end])
        assert smollm2.tokenizer.decode(branch.endings[0]).strip() in needle


def test_a_real_model_has_a_few_heads_that_copy(scores):
    assert scores.shape == (30, 9)
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.max() > 0.3
    assert np.mean(scores > 0.1) < 0.2, "retrieval heads are few"


def test_scores_equal_those_of_whole_prompts_read_with_plain_attention(smollm2, text):
    """One question at a time, full attention matrices, the highest of each row by hand."""
    text = dataclasses.replace(text, branches=text.branches[:2], spans=text.spans[:2])
    model, expected = smollm2.model, np.zeros((30, 9))
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for branch, (start, end) in zip(text.branches, text.spans, strict=True):
            ending = branch.endings[0]
            prompt = [*text.tokens, *branch.stem, *ending[:-1]]
            with torch.inference_mode():
                seen = model(torch.tensor([prompt]), output_attentions=True, logits_to_keep=1).attentions
            for k, token in enumerate(ending):
                row = len(prompt) - len(ending) + k
                best = torch.stack([a[0, :, row].argmax(-1) for a in seen]).numpy()
                hit = (best >= start) & (best < end) & (np.array(prompt)[best] == token)
                expected += hit / len(ending) / len(text.branches)
    finally:
        model.set_attn_implementation(own)
    found = retrieval_scores(model, [text])
    assert found.max() == 1.0
    # float32 sums in another order may swap the two highest weights of a row
    assert np.mean(np.abs(found - expected) > 1e-9) < 0.01
    swapped = retrieval_scores(model, [dataclasses.replace(text, spans=text.spans[::-1])])
    assert swapped.max() == 0, "looking at the answer outside of its needle is no retrieval"


def test_with_other_answers_in_the_haystack_nothing_is_copied(smollm2, text, scores):
    """The needles stand, but each holds the answer of the next one: what is to be said is not in it."""
    tokens = list(text.tokens)
    for (branch, (start, end)), other in zip(
        zip(text.branches, text.spans, strict=True), [*text.branches[1:], text.branches[0]], strict=True
    ):
        for at in range(start, end):
            if tokens[at] in branch.endings[0]:
                tokens[at] = other.endings[0][0]
    found = retrieval_scores(smollm2.model, [dataclasses.replace(text, tokens=tokens)])
    assert found.max() < scores.max() / 3


def test_heads_that_see_no_content_do_not_move_when_words_are_shuffled():
    """Equal embeddings of all tokens make every head blind to words; of random ones, heads follow them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
    ids = torch.randint(3, 97, (300,), generator=torch.Generator().manual_seed(1)).sort().values.tolist()
    other = shuffled(ids, SINKS, 0)
    assert sorted(other) == sorted(ids)
    assert other[:SINKS] == ids[:SINKS]
    assert other != ids
    rotary = rotaries(model, 300)
    assert content_shift(model, ids, ids, len(rotary), 0).max() == 0
    seeing = content_shift(model, ids, other, len(rotary), 0)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:] = table[5].clone()
    blind = content_shift(model, ids, other, len(rotary), 0)
    assert blind.max() < 1e-9
    assert seeing.max() > 0.01
    assert (seeing >= 0).all()
    assert (seeing <= np.log(2)).all()
