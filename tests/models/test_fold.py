"""A model with gains becomes an ordinary checkpoint that computes the same, in every family, or stays as it was."""

import copy
import json
import re
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    ChameleonConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    PersimmonConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SmolLM3Config,
    StableLmConfig,
)

from laid_eval.core import GainNotFoldable, RopeGain
from laid_eval.models import fold as fold_module
from laid_eval.models.fold import FILE, Drift, fold, write_certificate
from laid_eval.models.fold_sites import fold_layer, fold_sites
from laid_eval.models.gained import GAIN, add_gains, attention_modules, drop_gains, gainable, gains_of
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import quiet
from laid_eval.models.trial import in_other_layout

H, D = 4, 16
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXT = {k: v for k, v in TINY.items() if "token_id" not in k}
MHA = TINY | {"num_key_value_heads": H}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PARTIAL = ROPE | {"partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
VQ = {"embed_dim": 8, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
      "latent_channels": 8, "resolution": 16}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16}
MLA = MHA | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": D,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, **EXPERTS,
}  # fmt: skip
LLAMA4 = TINY | {
    "head_dim": D, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
    "attention_chunk_size": 16, "moe_layers": [],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    config: object
    site: str
    per_head: bool = True
    layout: str = "half-split"
    layers: tuple[int, ...] = (0, 1)
    build: object = AutoModelForCausalLM.from_config


def qwen_vl(kind, rope, **more):
    text = TEXT | more | {"rope_parameters": ROPE | rope}
    return kind(text_config=text, vision_config=VISION)


NEIGHBOURS = {"layout": "interleaved"}
SHARED = {"per_head": False}
SEEING = {"build": AutoModelForImageTextToText.from_config}
# What the note on distillation lists in 3.2, and families that are made otherwise. Those where nothing folds (Llama 4
# with its query norm, NanoChat, HunYuan, DiffLlama) are in test_fold_sites.py, each with the reason.
FAMILIES = {
    "llama": lambda: Family(LlamaConfig(**TINY), "q_proj.weight"),
    "smollm2-yarn": lambda: Family(LlamaConfig(**TINY, attention_bias=True, rope_parameters=YARN), "q_proj.weight+bias"),
    "smollm3": lambda: Family(SmolLM3Config(**TINY, no_rope_layers=[1, 0]), "q_proj.weight", layers=(0,)),
    "mistral-sliding": lambda: Family(MistralConfig(**TINY, sliding_window=16), "q_proj.weight"),
    "qwen2": lambda: Family(Qwen2Config(**TINY), "q_proj.weight+bias"),
    "qwen2.5-vl": lambda: Family(
        qwen_vl(Qwen2_5_VLConfig, {"mrope_section": [2, 3, 3]}), "q_proj.weight+bias", **SEEING
    ),
    "phi3": lambda: Family(Phi3Config(**TINY), "qkv_proj.weight"),
    "phi4-mini": lambda: Family(Phi3Config(**TINY, rope_parameters=PARTIAL), "qkv_proj.weight"),
    "cohere": lambda: Family(CohereConfig(**TINY), "q_proj.weight", **NEIGHBOURS),
    "cohere-qk-norm": lambda: Family(CohereConfig(**TINY, use_qk_norm=True), "q_norm.weight", **NEIGHBOURS),
    "cohere2": lambda: Family(
        Cohere2Config(**TINY, sliding_window=16, layer_types=MIXED), "q_proj.weight", layers=(0,), **NEIGHBOURS
    ),
    "glm4": lambda: Family(
        Glm4Config(**TINY, head_dim=D, attention_bias=True, rope_parameters=PARTIAL), "q_proj.weight+bias", **NEIGHBOURS
    ),
    "gpt-neox": lambda: Family(GPTNeoXConfig(**MHA, rope_parameters=PARTIAL), "query_key_value.weight+bias"),
    "gpt-oss": lambda: Family(
        GptOssConfig(
            **TINY, head_dim=D, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=MIXED,
            rope_parameters=ROPE,
        ), "q_proj.weight+bias",
    ),
    "olmo2": lambda: Family(Olmo2Config(**TINY), "q_norm.weight"),
    "olmo3": lambda: Family(Olmo3Config(**TINY, sliding_window=16, layer_types=MIXED), "q_norm.weight"),
    "flex-olmo": lambda: Family(FlexOlmoConfig(**TINY, num_experts=4, num_experts_per_tok=2), "q_norm.weight"),
    "minimax-m2": lambda: Family(
        MiniMaxM2Config(
            **TINY, head_dim=D, num_local_experts=4, num_experts_per_tok=2, rope_parameters=PARTIAL
        ), "q_norm.weight",
    ),
    "qwen3": lambda: Family(Qwen3Config(**TINY, head_dim=D), "q_norm.weight", **SHARED),
    "qwen3-moe": lambda: Family(
        Qwen3MoeConfig(**TINY, head_dim=D, num_experts=4, **EXPERTS), "q_norm.weight", **SHARED
    ),
    "qwen3-vl": lambda: Family(
        qwen_vl(Qwen3VLConfig, {"mrope_section": [4, 2, 2], "mrope_interleaved": True}, head_dim=D),
        "q_norm.weight", **SHARED, **SEEING,
    ),
    "qwen3-next": lambda: Family(
        Qwen3NextConfig(
            **TINY, head_dim=D, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
            rope_parameters=PARTIAL,
        ), "q_norm.weight (1 + w)", layers=(1,), **SHARED,
    ),
    "qwen3.5": lambda: Family(
        Qwen3_5TextConfig(
            **TINY, head_dim=D, layer_types=["linear_attention", "full_attention"],
            rope_parameters=PARTIAL | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        ), "q_norm.weight (1 + w)", layers=(1,), **SHARED,
    ),
    "gemma2": lambda: Family(
        Gemma2Config(**TINY, head_dim=D, sliding_window=16, layer_types=MIXED), "q_proj.weight"
    ),
    "gemma3": lambda: Family(
        Gemma3TextConfig(**TINY, head_dim=D, sliding_window=16, layer_types=MIXED), "q_norm.weight (1 + w)", **SHARED
    ),
    "gemma3n": lambda: Family(
        Gemma3nTextConfig(
            **TINY, **PER_LAYER, head_dim=D, sliding_window=16, layer_types=MIXED, num_kv_shared_layers=0,
            laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0],
        ), "q_norm.weight", **SHARED,
    ),
    "gemma4": lambda: Family(
        Gemma4TextConfig(
            **TINY, **PER_LAYER, head_dim=D, global_head_dim=2 * D, sliding_window=16, layer_types=MIXED,
            num_kv_shared_layers=0,
        ), "q_norm.weight", **SHARED,
    ),
    "stablelm": lambda: Family(StableLmConfig(**TINY, use_qkv_bias=True), "q_proj.weight+bias"),
    "stablelm-qk-norm": lambda: Family(StableLmConfig(**TINY, qk_layernorm=True), "q_layernorm.norms.*.weight"),
    "persimmon": lambda: Family(PersimmonConfig(**MHA, qk_layernorm=True), "q_layernorm.weight+bias", **SHARED),
    "chameleon": lambda: Family(
        ChameleonConfig(**TINY, vocabulary_map={"<image>": 4}, vq_config=VQ), "q_norm.weight+bias", **SEEING
    ),
    "llama4": lambda: Family(Llama4TextConfig(**LLAMA4, use_qk_norm=False), "q_proj.weight", **NEIGHBOURS),
    "deepseek-v3": lambda: Family(DeepseekV3Config(**MLA), "q_b_proj.weight"),
    "deepseek-v3-whole": lambda: Family(DeepseekV3Config(**MLA | {"q_lora_rank": None}), "q_proj.weight"),
}  # fmt: skip


def sharp(config, build=AutoModelForCausalLM.from_config, dtype=torch.float32):
    """A random model whose attention is sharp, with no neutral norm or bias."""
    torch.manual_seed(0)
    model = build(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.get_decoder().named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
            elif any(
                part in name for part in ("q_proj", "k_proj", "qkv", "query_key", "q_a_proj", "q_b", "kv_a", "kv_b")
            ):
                parameter.mul_(5)
    return model


def planted(gains, spread=0.7, seed=0):
    """Gives gains random logarithms."""
    generator = torch.Generator().manual_seed(seed)
    for gain in gains.values():
        gain.set_log_gain((spread * torch.randn(gain.parameter.shape, generator=generator)).clamp(-1.2, 1.2))
    return gains


def with_gains(model, shared=False, spread=0.7):
    """The model made gainable, random gains on every layer that rotates; gives the rotaries."""
    found = rotaries(model, 60)
    gainable(model)
    by_layer = {layer: rotary for layer, rotary in enumerate(found) if rotary is not None}
    if model.config.model_type == "deepseek_v3":  # its head_dim is that of what rotates only
        for layer, rotary in by_layer.items():
            first, second = torch.as_tensor(rotary.first), torch.as_tensor(rotary.second)
            attention_modules(model)[layer].add_module(GAIN, RopeGain(first, second, D, None if shared else H))
    else:
        add_gains(model, by_layer, shared)
    planted(gains_of(model), spread)
    return found


def tokens(batch=2, size=40):
    return torch.randint(5, 97, (batch, size), generator=torch.Generator().manual_seed(2))


def logits(model, **inputs):
    with torch.no_grad():
        return model(tokens(), use_cache=False, **inputs).logits


def gap(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_checkpoint_is_the_gained_model(name):
    family = FAMILIES[name]()
    model = sharp(family.config, family.build)
    names, base = set(model.state_dict()), logits(model)
    found = with_gains(model, shared=not family.per_head)
    gained = copy.deepcopy(model)
    wanted = logits(gained)
    certificate = fold(model, found)

    assert [layer.layer for layer in certificate.layers] == list(family.layers)
    assert {layer.site for layer in certificate.layers} == {family.site}
    assert {layer.layout for layer in certificate.layers} == {family.layout}
    assert max(layer.error for layer in certificate.layers) < 2e-6
    assert min(layer.control for layer in certificate.layers) > 0.1
    assert {layer.control_gains for layer in certificate.layers} == {"own"}
    assert certificate.passed
    assert certificate.sharing == ("head" if family.per_head else "layer")

    assert set(model.state_dict()) == names
    assert gap(wanted, logits(model)) < 1e-5
    assert gap(wanted, base) > 1e-2  # the gain does something
    assert gap(wanted, logits(_folded_wrongly(gained, found))) > 1e-2  # and the check can fail


def _folded_wrongly(gained, found):
    """Folded as if pairs were those of the other layout, unchecked."""
    wrong = copy.deepcopy(gained)
    gains = gains_of(wrong)
    sites = fold_sites(wrong, found)
    for layer, gain in gains.items():
        with torch.no_grad():
            fold_layer(in_other_layout(gain), sites[layer].parts)
    drop_gains(wrong)
    return wrong


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_it_holds_where_time_height_and_width_go_their_own_ways(name):
    family = FAMILIES[name]()
    model = sharp(family.config, family.build)
    positions = torch.randint(0, 50, (3, 2, 40), generator=torch.Generator().manual_seed(3))
    base = logits(model, position_ids=positions)
    found = with_gains(model, shared=not family.per_head)
    wanted = logits(model, position_ids=positions)
    wrong = logits(_folded_wrongly(model, found), position_ids=positions)
    fold(model, found)
    assert gap(wanted, logits(model, position_ids=positions)) < 1e-5
    assert gap(wanted, base) > 1e-2
    assert gap(wanted, wrong) > 1e-2


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family().per_head])
def test_gains_per_head_are_refused_where_heads_share_a_norm(name):
    family = FAMILIES[name]()
    model = sharp(family.config, family.build)
    found = with_gains(model)
    before, gains = snapshot(model), gains_of(model)
    message = rf"layer {family.layers[0]}: gains of 4 heads can't fold into {re.escape(family.site)}, which all heads share: use gains shared by heads$"
    with pytest.raises(GainNotFoldable, match=message):
        fold(model, found)
    assert same_bits(model, before)
    assert gains_of(model) == gains


def test_a_layer_that_does_not_rotate_takes_no_gain():
    model = sharp(SmolLM3Config(**TINY, no_rope_layers=[1, 0]))
    found = with_gains(model)
    attention_modules(model)[1].add_module(GAIN, gains_of(model)[0])
    with pytest.raises(GainNotFoldable, match="layer 1 does not rotate and has no pairs"):
        fold(model, found)


def test_a_model_without_gains_is_no_one_to_fold():
    model = sharp(LlamaConfig(**TINY))
    with pytest.raises(ValueError, match="LlamaForCausalLM carries no gains to fold"):
        fold(model, rotaries(model, 60))


def refused(model, found, message):
    """A fold that fails leaves weights, gains and predictions as they were, bit for bit."""
    before, gains, wanted = snapshot(model), gains_of(model), logits(model)
    with pytest.raises(GainNotFoldable, match=message):
        fold(model, found)
    assert same_bits(model, before)
    assert gains_of(model).keys() == gains.keys()
    assert all(gain is gains[layer] for layer, gain in gains_of(model).items())
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3"])
def test_gains_on_pairs_of_the_wrong_layout_are_found_out(name):
    """Only in the last layer: the first is folded by then."""
    family = FAMILIES[name]()
    model = sharp(family.config, family.build)
    found = with_gains(model, shared=not family.per_head)
    module = attention_modules(model)[1]
    module.rope_gain = in_other_layout(module.rope_gain)
    refused(
        model,
        found,
        r"layer 1: folded into \S+.*, its queries miss the gain by .* \(allowed 1e-05\); nothing was folded",
    )


def test_what_happens_outside_attention_is_found_out():
    """Weights of the queries that something else reads too: every layer's queries are right, the predictions not."""
    model = sharp(LlamaConfig(**TINY))
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.lm_head.register_forward_hook(lambda module, args, out: out * weight.norm())
    refused(
        model, with_gains(model), r"predictions differ from those under the gain: KL .* nats a token \(allowed 1e-05\)"
    )


def test_a_check_without_power_is_no_check():
    """One token, at position 0: nothing turns, and any layout would pass."""
    model = sharp(LlamaConfig(**TINY))
    found = with_gains(model)
    before = snapshot(model)
    with pytest.raises(
        GainNotFoldable, match=r"the check has no power, .* give a longer probe text; nothing was folded"
    ):
        fold(model, found, ids=torch.tensor([[5]]))
    assert same_bits(model, before)


@pytest.mark.parametrize("where", ["drop_gains", "_drift", "_demand"])
def test_what_breaks_off_is_undone(where, monkeypatch):
    model = sharp(FAMILIES["stablelm-qk-norm"]().config)
    found = with_gains(model)
    before, gains, wanted = snapshot(model), gains_of(model), logits(model)

    def broken_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fold_module, where, broken_off)
    with pytest.raises(KeyboardInterrupt):
        fold(model, found)
    assert same_bits(model, before)
    assert gains_of(model) == gains
    assert torch.equal(logits(model), wanted)


# Small and large gains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl", "glm4", "olmo2", "gemma3", "stablelm-qk-norm"])
def test_new_gains_fold_to_the_very_same_bits(name, dtype):
    family = FAMILIES[name]()
    model = sharp(family.config, family.build, dtype)
    before, base = snapshot(model), logits(model)
    found = with_gains(model, shared=not family.per_head, spread=0.0)
    assert torch.equal(logits(model), base)  # already while it runs
    certificate = fold(model, found)
    assert same_bits(model, before)
    assert torch.equal(logits(model), base)
    assert {layer.error for layer in certificate.layers} == {0.0}
    assert {layer.control_gains for layer in certificate.layers} == {"random"}
    assert min(layer.control for layer in certificate.layers) > 0.125
    assert certificate.drift == Drift(kl=0.0, top1=1.0, log_probability=0.0)


def test_the_control_takes_random_gains_only_where_the_own_ones_are_too_small():
    model = sharp(LlamaConfig(**TINY))
    found = with_gains(model, spread=0.7)
    gains_of(model)[1].set_log_gain(1e-4 * torch.randn(H, D // 2))
    first, second = fold(model, found).layers
    assert (first.control_gains, second.control_gains) == ("own", "random")
    assert min(first.control, second.control) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_half_precision_has_bounds_of_its_own(name, dtype):
    family = FAMILIES[name]()
    torch.manual_seed(0)
    model = family.build(family.config).to(dtype).eval()
    gainable(model)
    found = rotaries(sharp(family.config, family.build), 60)
    add_gains(model, dict(enumerate(found)), shared=not family.per_head)
    planted(gains_of(model))
    certificate = fold(model, found)
    assert certificate.passed
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert certificate.bound == 4 * torch.finfo(dtype).eps
    assert certificate.power >= 4 * certificate.bound
    assert 1e-4 < max(layer.error for layer in certificate.layers) < certificate.bound / 2
    assert model.dtype == dtype


# The certificate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def certified():
    model = sharp(LlamaConfig(**TINY))
    found = with_gains(model)
    return model, fold(model, found, export_dtype=torch.bfloat16)


def test_what_a_cast_costs_is_told_beside_what_it_costs_without_gains(certified):
    model, certificate = certified
    assert certificate.export_dtype == "bfloat16"
    assert certificate.export_plain.kl == pytest.approx(cast_costs(sharp(LlamaConfig(**TINY))), rel=1e-3)
    assert certificate.export.kl == pytest.approx(cast_costs(model), rel=1e-3)
    assert 0 < certificate.export.kl < 4 * certificate.export_plain.kl
    assert certificate.drift.kl < 1e-6 * certificate.export.kl
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def cast_costs(model):
    """KL of a model and its bfloat16 self, as loaded from a checkpoint: buffers are computed anew."""
    ids = fold_module._probe(model)
    cast = copy.deepcopy(model)
    for parameter in cast.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        p, q = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, cast))
    return nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / ids.numel()


def test_a_certificate_says_what_was_folded_where_and_with_what(certified, tmp_path):
    _, certificate = certified
    path = write_certificate(tmp_path / "checkpoint", certificate)
    assert path == tmp_path / "checkpoint" / FILE
    assert [p.name for p in path.parent.iterdir()] == ["laid_fold.json"]
    told = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert told == json.loads(json.dumps(certificate.as_dict()))
    assert (told["schema_version"], told["passed"], told["sharing"], told["dtype"]) == (1, True, "head", "float32")
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    assert {(layer["site"], layer["layout"]) for layer in told["layers"]} == {("q_proj.weight", "half-split")}
    assert told["tokens"] == 64
    assert told["torch"] == torch.__version__
    assert told["transformers"] == transformers.__version__
    assert re.fullmatch("[0-9a-f]{64}", told["gains"])


def test_a_certificate_holds_no_number_that_json_lacks(certified, tmp_path):
    _, certificate = certified
    with pytest.raises(ValueError, match="JSON compliant"):
        write_certificate(tmp_path, replace(certificate, drift=replace(certificate.drift, top1=float("nan"))))
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_of_the_gains():
    def one(spread, wrong=False):
        model = sharp(LlamaConfig(**TINY))
        with_gains(model, spread=spread)
        gains = gains_of(model)
        return fold_module._fingerprint({n: in_other_layout(g) for n, g in gains.items()} if wrong else gains)

    assert one(0.7) == one(0.7)
    assert len({one(0.7), one(0.6), one(0.7, wrong=True)}) == 3


def test_a_certificate_fails_where_any_bound_is_broken(certified):
    _, good = certified
    first, second = good.layers
    assert good.passed
    for layer in (replace(second, error=2e-5), replace(second, control=5e-3)):
        assert not replace(good, layers=(first, layer)).passed
    assert not replace(good, drift=replace(good.drift, kl=1e-4)).passed


def test_a_text_of_ones_own_is_read():
    model = sharp(Qwen2Config(**TINY))
    found = with_gains(model)
    own = fold(copy.deepcopy(model), found, ids=tokens(3, 20))
    assert own.tokens == 60
    assert own.layers != fold(model, found).layers


def test_the_same_fold_twice_gives_the_same_bits():
    model = sharp(Qwen2Config(**TINY))
    found = with_gains(model)
    other = copy.deepcopy(model)
    assert fold(model, found) == fold(other, found)
    assert same_bits(other, snapshot(model))


def test_a_training_model_trains_on():
    model = sharp(LlamaConfig(**TINY)).train()
    model.lm_head.requires_grad_(False)
    found = with_gains(model)
    fold(model, found)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    model(tokens(), use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("name", ["llama", "gemma3", "chameleon"])
def test_the_checkpoint_is_an_ordinary_one(name, tmp_path):
    family = FAMILIES[name]()
    model = sharp(family.config, family.build)
    found = with_gains(model, shared=not family.per_head)
    fold(model, found)
    with quiet():
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert "laid" not in (tmp_path / "config.json").read_text()
    assert same_bits(again, snapshot(model))
    assert torch.equal(logits(again), logits(model))


def test_a_real_model_folds(smollm2):
    """SmolLM2-135M with gains per head (log s.d. 0.15) on all 30 layers."""
    model = copy.deepcopy(smollm2.model)
    text = "The lighthouse keeper wrote down the weather every evening. " * 8
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids[:, :64]
    found = with_gains(model, spread=0.15)
    certificate = fold(model, found, ids=ids, export_dtype=torch.bfloat16)
    assert len(certificate.layers) == 30
    assert certificate.tokens == 64
    assert max(layer.error for layer in certificate.layers) < 2e-6
    assert {layer.control_gains for layer in certificate.layers} == {"own"}
    assert certificate.drift.log_probability <= 1e-3
    assert certificate.drift.top1 == 1.0
    assert certificate.export.kl < 2 * certificate.export_plain.kl + 1e-3
    with torch.no_grad():
        own, folded = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (smollm2.model, model))
    assert (own - folded).abs().max() > 0.5  # the gain did something
