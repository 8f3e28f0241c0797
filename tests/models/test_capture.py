"""Captured attention is the model's own: outputs, probabilities and masks, for every family."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.masking_utils import AttentionMaskInterface

from laid_eval.errors import UserError
from laid_eval.models import capture as capture_module
from laid_eval.models.capture import NAME, capture, check_capture

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
    "qwen2": lambda: Qwen2Config(**TINY),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=8),
    "mistral-sliding": lambda: MistralConfig(**TINY, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**TINY, head_dim=8, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, layer_types=MIXED),
    "gpt-oss": lambda: GptOssConfig(
        **TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=MIXED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "phi3": lambda: Phi3Config(**TINY),
    "glm4": lambda: Glm4Config(**TINY, head_dim=8),
    "cohere2": lambda: Cohere2Config(**TINY, sliding_window=16),
    "smollm3": lambda: SmolLM3Config(**TINY),
    "deepseek-v3": lambda: DeepseekV3Config(
        **TINY | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
    ),
    "llama4": lambda: Llama4TextConfig(
        **TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64,
        attention_chunk_size=16, moe_layers=[],
    ),
    "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128),
}  # fmt: skip


def tiny(config, implementation="eager", build=AutoModelForCausalLM):
    """A random model whose attention is sharp: default initialisation hides mistakes of masks and positions."""
    torch.manual_seed(0)
    config._attn_implementation = implementation
    model = build.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv", "q_b_proj", "kv_b_proj", "c_attn")):
                parameter.mul_(15)
            if "sinks" in name:
                parameter.normal_()
    return model


def tokens(batch, size):
    return torch.randint(3, 97, (batch, size), generator=torch.Generator().manual_seed(1))


class Seen:
    """All rows of every layer, as the eager backend returns them."""

    def __init__(self):
        self.layers = {}

    def __call__(self, call):
        self.layers[call.layer] = call.probabilities(torch.arange(call.query.shape[2]))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_probabilities_equal_the_eager_backend(family, padded):
    model = tiny(FAMILIES[family]())
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :13] = 0
    with torch.no_grad():
        own = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
        seen = Seen()
        with capture(model, seen, exact=True):
            ours = model(ids, attention_mask=mask, use_cache=False)
    real = mask.bool()
    assert (own.logits - ours.logits)[real].abs().max() < 1e-6 * own.logits.abs().max()
    assert sorted(seen.layers) == [0, 1, 2]
    for layer, weights in enumerate(own.attentions):
        gap = (weights - seen.layers[layer]).transpose(1, 2)[real].abs().max()
        assert gap < 1e-6, layer


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_unchanged(family):
    model = tiny(FAMILIES[family]())
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    own = model.generate(ids, **options)
    with capture(model, lambda call: None):
        ours = model.generate(ids, **options)
    assert torch.equal(own, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_and_the_backend_comes_back(family):
    model = tiny(FAMILIES[family]())
    before = model.config._attn_implementation
    assert check_capture(model) < 1e-4
    assert model.config._attn_implementation == before


def test_blocks_of_image_tokens_see_each_other():
    text = Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, layer_types=MIXED)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
    model = tiny(config, build=AutoModelForImageTextToText)
    ids = tokens(1, 40).clamp(max=90)
    ids[0, 10:14] = 96
    kinds = (ids == 96).long()
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": kinds, "use_cache": False}
    with torch.no_grad():
        own = model(ids, output_attentions=True, **inputs)
        seen = Seen()
        with capture(model, seen, exact=True):
            ours = model(ids, **inputs)
    assert (own.logits - ours.logits).abs().max() < 1e-5
    assert max((w - seen.layers[i]).abs().max() for i, w in enumerate(own.attentions)) < 1e-6
    assert seen.layers[1][0, :, 10, 13].min() > 0  # a later token of the same image
    assert seen.layers[1][0, :, 9, 13].max() == 0


def test_a_lost_mask_is_detected(monkeypatch):
    """The trap: an attention function without a mask function runs every layer as if it were plainly causal."""
    model = tiny(MistralConfig(**TINY, sliding_window=16), "sdpa")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    with pytest.raises(UserError, match="mask"):
        check_capture(model)


def test_a_wrong_softmax_is_refused(monkeypatch):
    model = tiny(LlamaConfig(**TINY))
    monkeypatch.setattr(capture_module.Call, "scale", property(lambda self: 0.1), raising=False)
    monkeypatch.setattr(capture_module.Call, "__init__", lambda self, **kw: self.__dict__.update(
        {k: v for k, v in kw.items() if k != "scale"}))  # fmt: skip
    with pytest.raises(UserError, match="not the model's own"):
        check_capture(model)


def test_a_family_outside_the_interface_is_named():
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="BloomForCausalLM"), capture(model, lambda call: None):
        pass


def test_the_stock_kernel_runs_where_the_mask_is_plain_and_agrees():
    model = tiny(Qwen2Config(**TINY), "sdpa")
    ids = tokens(1, 50)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
        with capture(model, lambda call: None):
            ours = model(ids, use_cache=False).logits
    assert torch.equal(own, ours)


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny(LlamaConfig(**TINY), "sdpa")

    def broken(call):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"), capture(model, broken):
        model(tokens(1, 8))
    assert model.config._attn_implementation == "sdpa"
    model(tokens(1, 8))
