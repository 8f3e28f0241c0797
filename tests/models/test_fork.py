"""Asking forks of one cache must equal asking with a fresh full prompt, for every family."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from laid_eval.models.fork import ForkedText, WholePrompts, why_not_forked
from laid_eval.models.frame import Branch

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama-eager": lambda: LlamaConfig(**TINY, attn_implementation="eager"),
    "qwen2": lambda: Qwen2Config(**TINY),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=8),
    "gemma2": lambda: Gemma2Config(**TINY, head_dim=8, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, layer_types=MIXED),
    "mistral-sliding": lambda: MistralConfig(**TINY, sliding_window=16),
    "phi3": lambda: Phi3Config(**TINY),
    "cohere2": lambda: Cohere2Config(**TINY, sliding_window=16),
    "gpt-oss": lambda: GptOssConfig(
        **TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=MIXED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip
BRANCHES = [
    Branch((1, 2, 3), ((4,), (5, 6, 7), (8, 9))),
    Branch((7,), ((4, 5), (6,))),
    Branch((1, 2), ((3, 4), (3, 9), (10,))),
]


def tiny(config):
    """A random model whose attention is sharp: default initialisation hides mistakes of masks and positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value")):
                parameter.mul_(15)
            if "sinks" in name:
                parameter.normal_()
    return model


def gap(found, expected):
    return max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_equal_whole_prompts(family):
    """Beyond the sliding window (16) and beyond max_position_embeddings (64), asked at several cut points."""
    model = tiny(FAMILIES[family]())
    tokens = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    assert why_not_forked(model, longest=150) is None
    forked = ForkedText(model)
    for start, end in [(0, 5), (5, 40), (40, 41), (41, 90), (90, 150)]:
        forked.read(tokens[start:end])
        whole = WholePrompts(model)
        whole.read(tokens[:end])
        expected = whole.ask(BRANCHES)
        assert gap(forked.ask(BRANCHES), expected) < 1e-4
        assert gap(forked.ask(BRANCHES), expected) < 1e-4, "asking must leave the text read as it was"
    other = WholePrompts(model)
    other.read([*tokens[:-5], 50, *tokens[-4:]])
    assert gap(other.ask(BRANCHES), expected) > 1e-3, "the answers must depend on the text"


def test_logits_of_the_last_position_agree():
    """The acceptance figure on raw logits: the next-token distribution after each stem, all of the vocabulary."""
    model = tiny(LlamaConfig(**TINY))
    tokens = list(range(3, 90))
    every = Branch((5, 6), tuple((t,) for t in range(97)))
    forked = ForkedText(model)
    forked.read(tokens[:30])
    forked.read(tokens[30:])
    with torch.inference_mode():
        logits = model(torch.tensor([[*tokens, 5, 6]])).logits[0, -1]
    found = torch.tensor(forked.ask([every, every])[1])
    assert (found - torch.log_softmax(logits, -1)).abs().max() < 1e-4


def test_branches_do_not_see_each_other():
    model = tiny(Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, layer_types=MIXED))
    forked = ForkedText(model)
    forked.read(list(range(3, 60)))
    alone = [forked.ask([branch])[0] for branch in BRANCHES]
    assert gap(forked.ask(BRANCHES), alone) < 1e-5
    assert gap(forked.ask(BRANCHES[::-1])[::-1], alone) < 1e-5


def test_summed_log_probability_is_that_of_the_whole_answer():
    """Against a plain reference: one forward pass over the whole text, log-probabilities added token by token."""
    model = tiny(Qwen2Config(**TINY))
    tokens, branch = list(range(10, 50)), BRANCHES[0]
    forked = ForkedText(model)
    forked.read(tokens)
    for ending, found in zip(branch.endings, forked.ask([branch])[0], strict=True):
        ids = [*tokens, *branch.stem, *ending]
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        start = len(ids) - len(ending)
        assert found == pytest.approx(sum(float(logs[start + k - 1, t]) for k, t in enumerate(ending)), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2),
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ],
    ids=["mamba", "bloom"],
)
def test_models_that_cannot_be_forked_say_so(config):
    model = tiny(config)
    reason = why_not_forked(model, longest=100)
    assert reason is not None
    assert "fork" in reason
    whole = WholePrompts(model)
    whole.read([5, 6, 7])
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([[5, 6, 7, 1, 2, 3]])).logits[0, -1], -1)
    assert whole.ask(BRANCHES)[0][0] == pytest.approx(float(logs[4]), abs=1e-5)
    assert whole.pass_tokens(BRANCHES[0], 3) == (3 + 3) + (3 + 3 + 2) + (3 + 3 + 1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_with_length_are_not_forked(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    config = LlamaConfig(**{**TINY, "max_position_embeddings": 64}, rope_parameters=rope)
    model = tiny(config)
    assert why_not_forked(model, longest=64) is None
    assert f"({kind}) changes with the length" in why_not_forked(model, longest=65)


def test_the_mask_function_is_put_back_even_after_an_error():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    model = tiny(LlamaConfig(**TINY))
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    forked = ForkedText(model)
    forked.read([1, 2, 3])
    with pytest.raises(IndexError):
        forked.ask([Branch((1000,), ((1,),))])
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before


def test_real_model_forks_equal_whole_prompts(smollm2):
    text = smollm2.tokenizer("The quick brown fox jumps over the lazy dog. " * 60).input_ids
    forked, whole = ForkedText(smollm2.model), WholePrompts(smollm2.model)
    for at in range(0, len(text), 256):
        forked.read(text[at : at + 256])
    whole.read(text)
    branches = [Branch((28, 253), ((1, 2), (30,))), Branch((40, 41, 42), ((7,), (8, 9)))]
    assert gap(forked.ask(branches), whole.ask(branches)) < 1e-4
