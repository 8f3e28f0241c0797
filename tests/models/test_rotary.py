"""Rotary pairs are found by behaviour and agree with the library, whatever the family, layout and scaling."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from laid_eval.errors import UserError
from laid_eval.models.rotary import rotaries, rotaries_of_config, unrotated

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}


def build(config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(config).eval()


@pytest.mark.parametrize("length", [60, 400])
@pytest.mark.parametrize("kind", sorted(ROPE_INIT_FUNCTIONS | {"default": None}))
def test_frequencies_are_those_of_the_library_at_the_measured_length(kind, length):
    family = Phi3Config if kind == "longrope" else LlamaConfig  # checks of longrope parameters live in Phi-3
    config = family(**TINY, rope_parameters=ROPES[kind])
    if kind == "longrope":
        config.max_position_embeddings = 256
        config.original_max_position_embeddings = 64
    if kind == "proportional":
        config.head_dim = 16
    found = rotaries(build(config), length)
    if kind == "default":
        expected, factor = 10000.0 ** -(np.arange(0, 16, 2) / 16), 1.0
    else:
        theta, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        expected = theta.double().numpy()
    for rotary in found:
        np.testing.assert_allclose(rotary.theta, expected, rtol=2e-6, atol=1e-12)
        assert rotary.factor == pytest.approx(factor, rel=1e-6)


def test_a_pair_that_does_not_turn_has_an_infinite_wavelength():
    (first, *_) = rotaries(build(LlamaConfig(**TINY, head_dim=16, rope_parameters=ROPES["proportional"])), 100)
    assert (first.theta == 0).sum() == 6
    assert np.isinf(first.wavelength).sum() == 6


def test_layers_without_rotation_are_told_apart():
    config = SmolLM3Config(**TINY | {"num_hidden_layers": 4})
    found = rotaries(build(config), 100)
    assert [r is None for r in found] == [False, False, False, True]


def test_every_kind_of_layer_has_its_own_frequencies():
    kinds = ["sliding_attention", "full_attention"]
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = Gemma3TextConfig(**TINY, head_dim=16, layer_types=kinds, rope_parameters=ropes)
    local, reach = rotaries(build(config), 100)
    np.testing.assert_allclose(local.theta, 1e4 ** -(np.arange(8) / 8), rtol=1e-6)
    np.testing.assert_allclose(reach.theta, 1e6 ** -(np.arange(8) / 8) / 8, rtol=1e-6)


def test_a_model_without_rotary_embeddings_has_no_pairs():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    assert rotaries(build(config), 100) == [None] * 3


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}


def vision_language(kind):
    text = {k: v for k, v in TINY.items() if "token_id" not in k}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    if kind == "qwen2.5-vl":
        return Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=VISION)
    rope |= {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    return Qwen3VLConfig(text_config={**text, "head_dim": 16, "rope_parameters": rope}, vision_config=VISION)


@pytest.mark.parametrize(("kind", "axes"), [("qwen2.5-vl", "tthhhwww"), ("qwen3-vl", "thwthwtt")])
def test_axes_of_multimodal_pairs(kind, axes):
    for rotary in rotaries(build(vision_language(kind), AutoModelForImageTextToText), 100):
        assert "".join(rotary.axis) == axes
        np.testing.assert_allclose(rotary.theta, 1e6 ** -(np.arange(8) / 8), rtol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_equal_axes_are_one_axis(kind):
    (rotary, _) = rotaries(build(vision_language(kind), AutoModelForImageTextToText), 100)
    line = torch.arange(20)
    assert torch.equal(rotary.turns(line), rotary.turns(line.expand(3, 20)))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, rope_parameters=ROPES["llama3"]),
        Gemma3TextConfig(**TINY, head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        Phi3Config(**TINY),
    ],
    ids=["llama", "gemma3", "phi3"],
)
def test_a_shrunken_model_has_the_pairs_of_the_whole_one(config):
    whole, small = rotaries(build(config), 100), rotaries_of_config(config, 100)
    assert all(a.same(b) for a, b in zip(whole, small, strict=True))


def test_a_family_that_turns_otherwise_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q, k, cos**3, sin))
    with pytest.raises(UserError, match="Layer 0 of LlamaForCausalLM"):
        rotaries(build(LlamaConfig(**TINY)), 100)


def test_unrotated_pairs_stand_still_inside_and_turn_again_outside():
    model = build(LlamaConfig(**TINY))
    before = model(torch.arange(3, 40)[None]).logits
    whole = rotaries(model, 100)[0]
    with unrotated(model, 100, np.inf) as stopped:
        inside = rotaries(model, 100)[0]
        np.testing.assert_array_equal(inside.theta == 0, whole.wavelength >= 100)
        assert stopped == (whole.wavelength >= 100).sum() > 0
        assert not torch.equal(model(torch.arange(3, 40)[None]).logits, before)
    assert torch.equal(model(torch.arange(3, 40)[None]).logits, before)


def test_unrotated_refuses_frequencies_that_change():
    model = build(LlamaConfig(**TINY, rope_parameters=ROPES["dynamic"]))
    with pytest.raises(UserError, match="change with the length"), unrotated(model, 0, np.inf):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_in_the_layers_below_does_not_hide_that_a_layer_stands_still(dtype):
    """Sharp attention and far positions: a still layer's input moves a little, since those below it rotate."""
    model = build(SmolLM3Config(**TINY | {"num_hidden_layers": 4})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(15 if dtype == torch.float32 else 1)
    assert [r is None for r in rotaries(model, 4096)] == [False, False, False, True]
