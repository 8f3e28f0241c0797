"""Questions at positions of one's choosing, texts moved, and parts hidden, against plain forward passes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from laid_eval.models.fork import ForkedText, why_not_forked, why_not_moved
from laid_eval.models.frame import Branch
from laid_eval.models.rotary import rotaries

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
TEXT = list(range(3, 83))
BRANCHES = [Branch((1, 2, 3), ((4,), (5, 6, 7), (8, 9))), Branch((7,), ((4, 5), (6,)))]


def tiny(config):
    """A random model with sharp attention: default initialisation hides mistakes of masks and positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn")):
                parameter.mul_(15)
    return model


@pytest.fixture(scope="module")
def llama():
    return tiny(LlamaConfig(**TINY))


@torch.inference_mode()
def plain(model, branch, positions, start, hidden=()):
    """One fresh pass a choice over text, stem and choice: the given positions, and a mask to add where text is hidden."""
    out = []
    for ending in branch.endings:
        ids = [*TEXT, *branch.stem, *ending]
        asked = len(ids) - len(TEXT)
        where = [*positions, *(start + k for k in range(asked))]
        mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
        for first, end in hidden:
            mask[len(TEXT) :, first:end] = torch.finfo(torch.float32).min
        logits = model(
            torch.tensor([ids]), position_ids=torch.tensor([where]), attention_mask=mask[None, None], use_cache=False
        ).logits[0]
        logs = torch.log_softmax(logits, -1)
        at = len(ids) - len(ending)
        out.append(sum(float(logs[at + k - 1, t]) for k, t in enumerate(ending)))
    return out


def read(model):
    forked = ForkedText(model)
    for at in range(0, len(TEXT), 30):
        forked.read(TEXT[at : at + 30])
    return forked


def flat(logs):
    return [value for choices in logs for value in choices]


def assert_close(found, expected, tolerance=1e-4):
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < tolerance


def assert_differ(found, expected):
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 1e-2


def test_a_question_at_a_later_position_equals_a_fresh_prompt_with_those_position_ids(llama):
    forked = read(llama)
    found = forked.ask(BRANCHES, at=[400, 211])
    for branch, start, logs in zip(BRANCHES, (400, 211), found, strict=True):
        assert_close(logs, plain(llama, branch, range(len(TEXT)), start))
        assert_differ(logs, plain(llama, branch, range(len(TEXT)), len(TEXT)))
    assert_close(forked.ask(BRANCHES)[0], plain(llama, BRANCHES[0], range(len(TEXT)), len(TEXT)))


def one_layer(config):
    """With a single layer what a token takes in does not depend on distances: moving it equals reading it elsewhere."""
    return tiny(type(config)(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": None}))


@pytest.mark.parametrize("step", [0.25, 0.9, 3])
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**TINY), CohereConfig(**TINY, logit_scale=1.0), Phi3Config(**TINY, **PARTIAL)],
    ids=["llama", "cohere", "phi3"],
)
def test_a_moved_text_equals_a_plain_forward_with_those_position_ids_in_one_layer(config, step):
    model = one_layer(config)
    positions = [step * k for k in range(len(TEXT))]
    forked = read(model)
    before = forked.ask(BRANCHES)
    pairs = rotaries(model, 512)
    forked.move([p - k for k, p in enumerate(positions)], pairs)
    found = forked.ask(BRANCHES, at=[positions[-1] + 1] * 2)
    for branch, logs, own in zip(BRANCHES, found, before, strict=True):
        assert_close(logs, plain(model, branch, positions, positions[-1] + 1))
        assert_differ(logs, own)
    forked.move([k - p for k, p in enumerate(positions)], pairs)
    assert_close(flat(forked.ask(BRANCHES)), flat(before))


def test_a_text_moved_as_a_whole_meets_the_question_farther_away(llama):
    """In any number of layers: 30 positions back is the question 30 positions on."""
    forked = read(llama)
    expected = forked.ask(BRANCHES, at=[len(TEXT) + 30] * 2)
    forked.move([-30] * len(TEXT), rotaries(llama, 512))
    assert_close(flat(forked.ask(BRANCHES)), flat(expected))


def test_hidden_spans_equal_a_mask_that_hides_them_from_the_question_only(llama):
    forked = read(llama)
    hidden = [[(10, 25), (60, 70)], []]
    found = forked.ask(BRANCHES, hidden=hidden)
    for branch, spans, logs in zip(BRANCHES, hidden, found, strict=True):
        assert_close(logs, plain(llama, branch, range(len(TEXT)), len(TEXT), spans))
    assert_differ(found[0], plain(llama, BRANCHES[0], range(len(TEXT)), len(TEXT)))


def test_what_is_hidden_and_where_a_question_stands_go_together(llama):
    found = read(llama).ask(BRANCHES, at=[300, 301], hidden=[[(0, 40)], [(40, 80)]])
    assert_close(found[0], plain(llama, BRANCHES[0], range(len(TEXT)), 300, [(0, 40)]))
    assert_close(found[1], plain(llama, BRANCHES[1], range(len(TEXT)), 301, [(40, 80)]))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, attn_implementation="eager"),
        Qwen3Config(**TINY, head_dim=8),
        Gemma2Config(**TINY, head_dim=8, sliding_window=16),
        MistralConfig(**TINY, sliding_window=16),
        CohereConfig(**TINY),
        LlamaConfig(**TINY, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}),
    ],
    ids=["llama-eager", "qwen3", "gemma2", "mistral-sliding", "cohere", "llama-yarn"],
)
def test_rotary_families_can_be_moved(config):
    model = tiny(config)
    assert why_not_moved(model, rotaries(model, 512)) is None


def test_models_with_absolute_positions_cannot_and_say_so():
    model = tiny(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
    assert why_not_forked(model, 100) is None
    assert "positions can't be chosen freely" in why_not_moved(model, rotaries(model, 512))


def test_a_model_that_ignores_position_ids_is_not_taken_for_one_that_stands_far_reaches(llama, monkeypatch):
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda ids, position_ids=None, **rest: forward(ids, **rest))
    assert why_not_moved(llama, rotaries(llama, 512)) == "its answers do not depend on position ids"
