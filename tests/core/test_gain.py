"""A gain starts as nothing, commutes with the rotation, and disappears into a checkpoint of every family."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from laid_eval.core import FoldSite, GainNotFoldable, RopeGain, fold_gain, query_rows
from laid_eval.core.gain import LIMIT

H, D = 4, 16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(rotary=D, channels=D, heads=H, start=0):
    index = start + torch.arange(rotary // 2)
    return RopeGain(index, index + rotary // 2, channels, heads)


def interleaved(rotary=D, channels=D, heads=H, start=0):
    index = start + 2 * torch.arange(rotary // 2)
    return RopeGain(index, index + 1, channels, heads)


def planted(gain, seed=0):
    gain.set_log_gain((0.7 * random(*gain.parameter.shape, seed=seed)).clamp(-1.2, 1.2))
    return gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_gain_changes_no_bit(dtype):
    query = (10 * random(2, H, 7, D)).to(dtype)
    for gain in (half(), half(rotary=8), half(heads=None), interleaved()):
        assert torch.equal(gain(query), query)
        assert gain(query).dtype == dtype


def test_both_channels_of_a_pair_get_the_pairs_gain_and_others_none():
    gain = planted(interleaved(rotary=8, start=4))
    query = random(H, 3, D)
    factor = gain.log_gain().exp()
    expected = query.clone()
    for h in range(H):
        for f in range(4):
            expected[h, :, [4 + 2 * f, 5 + 2 * f]] *= factor[h, f]
    assert torch.allclose(gain(query), expected, rtol=1e-6)
    shared = planted(half(heads=None))
    assert shared.shared
    assert torch.allclose(shared(query)[2, :, :8] / query[2, :, :8], shared.log_gain().exp().expand(3, -1), rtol=1e-5)


@pytest.mark.parametrize(("layout", "other"), [(half, interleaved), (interleaved, half)])
def test_it_commutes_with_the_rotation_of_its_own_layout_only(layout, other):
    inv_freq = 100.0 ** -torch.linspace(0, 1, D // 2, dtype=torch.float64)
    angle = torch.arange(7).double()[:, None] * inv_freq
    query = random(H, 7, D, seed=3).double()

    def rotate(x):
        pair_of = layout().pair_of
        first = [(pair_of == f).nonzero()[0].item() for f in range(D // 2)]
        second = [(pair_of == f).nonzero()[1].item() for f in range(D // 2)]
        out = torch.empty_like(x)
        out[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
        out[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
        return out

    own, wrong = planted(layout()).double(), planted(other()).double()
    assert (own(rotate(query)) - rotate(own(query))).abs().max() < 1e-14
    assert (wrong(rotate(query)) - rotate(wrong(query))).abs().max() > 0.1


def test_gains_stay_within_a_factor_of_four_and_keep_a_gradient():
    gain = half()
    with torch.no_grad():
        gain.parameter.copy_(torch.linspace(-6, 6, 32).reshape(H, 8))
    assert gain.log_gain().abs().max() <= LIMIT == math.log(4)
    gain(random(H, 3, D)).square().sum().backward()
    assert gain.parameter.grad.abs().min() > 0


def test_near_one_the_parameter_is_the_logarithm_of_the_gain():
    gain = half()
    query = random(H, 3, D).double()
    (gain(query) * query).sum().backward()
    by_pair = query.square().sum(1)
    expected = (by_pair[:, :8] + by_pair[:, 8:]).float()
    assert torch.allclose(gain.parameter.grad, expected, rtol=1e-5)


def test_given_gains_are_taken_and_too_large_ones_refused():
    gain, wanted = half(), (0.5 * random(H, 8)).clamp(-1.3, 1.3)
    gain.set_log_gain(wanted)
    assert torch.allclose(gain.log_gain(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match=r"within \+-1\.3863 \(a factor of 4\), got 1\.5"):
        gain.set_log_gain(torch.full((H, 8), 1.5))
    with pytest.raises(ValueError, match="got nan"):
        gain.set_log_gain(torch.full((H, 8), math.nan))


def test_only_the_parameter_is_saved_and_it_comes_back():
    gain, other = planted(half()), half()
    assert list(gain.state_dict()) == ["parameter"]
    other.load_state_dict(gain.state_dict())
    assert torch.equal(other.channel_gain(), gain.channel_gain())


def test_queries_and_pairs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"queries \(3, 5, 16\) for gains \(4, 16\)"):
        half()(random(3, 5, D))
    with pytest.raises(ValueError, match=r"queries \(4, 5, 8\)"):
        half()(random(4, 5, 8))
    for first, second in ((range(4), range(3, 7)), (range(4), range(4, 7)), (range(4), range(13, 17))):
        with pytest.raises(ValueError, match="not disjoint among 16"):
            RopeGain(torch.tensor(first), torch.tensor(second), D, H)


# Folding, family by family ------------------------------------------------------------------------------------------

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


def projection(module):
    weights = [module.q_proj.weight] + ([] if module.q_proj.bias is None else [module.q_proj.bias])
    return FoldSite(weights, query_rows(H, D))


def fused(name, stride):
    def site(module):
        linear = getattr(module, name)
        tensors = [linear.weight] + ([] if linear.bias is None else [linear.bias])
        return FoldSite(tensors, query_rows(H, D, stride=stride))

    return site


def reordered(module):
    """DeepSeek's projection is interleaved, its rotated queries are half-split: the rotation changes the order."""
    order = torch.cat([torch.arange(8), 8 + 2 * torch.arange(4), 9 + 2 * torch.arange(4)])
    return FoldSite([module.q_b_proj.weight], query_rows(H, D)[:, order])


def norm(heads, offset=0.0):
    return lambda module: FoldSite([module.q_norm.weight.data.view(-1)], query_rows(heads, D), offset)


@dataclass(frozen=True)
class Family:
    config: object
    site: object
    gain: object = half
    wrong: object = interleaved
    rotary: int = D
    channels: int = D
    heads: int | None = H
    start: int = 0
    layers: tuple[int, ...] = (0, 1)
    build: object = AutoModel.from_config

    def new_gain(self, layout):
        return layout(self.rotary, self.channels, self.heads, self.start)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = ["sliding_attention", "full_attention"]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILIES = {
    "llama": lambda: Family(LlamaConfig(**TINY), projection),
    "llama-bias-yarn": lambda: Family(LlamaConfig(**TINY, attention_bias=True, rope_parameters=YARN), projection),
    "mistral-sliding": lambda: Family(MistralConfig(**TINY, sliding_window=16), projection),
    "qwen2": lambda: Family(Qwen2Config(**TINY), projection),
    "qwen2.5-vl": lambda: Family(
        Qwen2_5_VLTextConfig(**TINY, rope_parameters=MROPE), projection, build=Qwen2_5_VLTextModel._from_config
    ),
    "phi3": lambda: Family(Phi3Config(**TINY), fused("qkv_proj", D)),
    "phi4-mini": lambda: Family(Phi3Config(**TINY, rope_parameters=PARTIAL), fused("qkv_proj", D), rotary=8),
    "cohere": lambda: Family(CohereConfig(**TINY), projection, interleaved, half),
    "cohere-qk-norm": lambda: Family(CohereConfig(**TINY, use_qk_norm=True), norm(H), interleaved, half),
    "cohere2": lambda: Family(Cohere2Config(**TINY, sliding_window=16, layer_types=MIXED), projection, interleaved, half),
    "glm4": lambda: Family(
        Glm4Config(**TINY, head_dim=D, attention_bias=True, rope_parameters=PARTIAL), projection, interleaved, half, rotary=8
    ),
    "gpt-neox": lambda: Family(
        GPTNeoXConfig(
            **{k: v for k, v in TINY.items() if k != "num_key_value_heads"}, rope_parameters=PARTIAL, attention_bias=True
        ), fused("query_key_value", 3 * D), rotary=8,
    ),
    "olmo2": lambda: Family(Olmo2Config(**TINY), norm(H)),
    "qwen3": lambda: Family(Qwen3Config(**TINY, head_dim=D), norm(1), heads=None),
    "gemma3": lambda: Family(
        Gemma3TextConfig(**TINY, head_dim=D, sliding_window=16, layer_types=MIXED), norm(1, offset=1.0), heads=None
    ),
    "qwen3-next": lambda: Family(
        Qwen3NextConfig(
            **TINY, head_dim=D, layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1],
            rope_parameters=PARTIAL,
        ), norm(1, offset=1.0), heads=None, rotary=8,
    ),
    "deepseek-v3": lambda: Family(
        DeepseekV3Config(
            **TINY | {"num_key_value_heads": H}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=D, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
            first_k_dense_replace=2,
        ), reordered, rotary=8, start=8, wrong=lambda r, c, h, s: half(r, c, h, 0),
    ),
}  # fmt: skip


def build(family):
    """A random model, sharp and with no neutral norm or bias, in float64."""
    torch.manual_seed(0)
    model = family.build(family.config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            elif any(
                part in name for part in ("q_proj", "k_proj", "qkv", "query_key", "q_a_proj", "q_b", "kv_a", "kv_b")
            ):
                parameter.mul_(15)
    return model


def attention(model):
    return {
        m.layer_idx: m for m in model.modules() if hasattr(m, "scaling") and getattr(m, "layer_idx", None) is not None
    }


def gained(gains):
    """An attention function that multiplies rotated queries by the gain of their layer."""

    def function(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, gains[module.layer_idx](query), *args, **kwargs)

    AttentionInterface.register("core_test_gained", function)
    AttentionMaskInterface.register("core_test_gained", sdpa_mask)
    return "core_test_gained"


@pytest.fixture(autouse=True)
def _forget_the_attention_function():
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("core_test_gained", None)


def outputs(model, implementation="sdpa"):
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    inputs = {}
    if isinstance(model, Qwen2_5_VLTextModel):  # time, height and width each on their own way
        inputs["position_ids"] = torch.randint(0, 50, (3, 2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).last_hidden_state


def folded(model, gains, family):
    copied = copy.deepcopy(model)
    for layer, module in attention(copied).items():
        fold_gain(gains[layer], family.site(module))
    return copied


def gap(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_checkpoint_is_the_gained_model(name):
    family = FAMILIES[name]()
    model = build(family)
    assert sorted(attention(model)) == [0, 1]
    gains = {layer: planted(family.new_gain(family.gain), seed=layer).double() for layer in (0, 1)}
    wrong = {layer: planted(family.new_gain(family.wrong), seed=layer).double() for layer in (0, 1)}
    base, wanted = outputs(model), outputs(model, gained(gains))
    assert gap(wanted, outputs(folded(model, gains, family))) < 1e-6
    assert gap(wanted, base) > 1e-2  # the gain does something
    assert gap(wanted, outputs(folded(model, wrong, family))) > 1e-2  # and the check can fail
    names = set(model.state_dict())
    assert set(folded(model, gains, family).state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl", "glm4", "gemma3"])
def test_a_model_with_new_gains_is_the_model_bit_by_bit(name, dtype):
    family = FAMILIES[name]()
    model = build(family).to(dtype)
    base = outputs(model)
    assert torch.equal(outputs(model, gained({layer: family.new_gain(family.gain) for layer in (0, 1)})), base)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3-next"])
def test_gains_per_head_are_refused_where_heads_share_a_norm(name):
    family = FAMILIES[name]()
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        GainNotFoldable, match=r"gains of 4 heads can't fold into numbers that all heads share .* \(heads=None\)"
    ):
        fold_gain(planted(half()), family.site(attention(model)[0]))
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_a_norm_behind_is_refused_for_it_would_undo_the_fold():
    """Llama 4 normalises after the rotation, Qwen3 between projection and rotation."""
    config = Llama4TextConfig(
        **TINY, head_dim=D, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64,
        attention_chunk_size=16, moe_layers=[], no_rope_layers=[1, 1],
    )  # fmt: skip
    for family in (Family(config, projection, interleaved), FAMILIES["qwen3"]()):
        model = build(family)
        same = {layer: planted(half(heads=None)) for layer in (0, 1)}
        for gain in same.values():  # one factor for all channels: what a norm takes out altogether
            gain.set_log_gain(torch.full((1, 8), 1.0))
        erased = folded(model, same, Family(None, projection))
        assert gap(outputs(model), outputs(erased)) < 1e-3
        site = projection(attention(model)[0])
        with pytest.raises(GainNotFoldable, match=r"a norm follows on the way .* behind the rotation there is nothing"):
            fold_gain(same[0], FoldSite(site.tensors, site.rows, normed_after=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_packed_weights_are_refused_and_nothing_is_half_done(dtype):
    weight, packed = torch.ones(H * D, 8), torch.zeros(H * D, 8).to(dtype)
    with pytest.raises(GainNotFoldable, match=r"packed or quantised \(torch\.\w+\): fold first, then quantise"):
        fold_gain(planted(half()), FoldSite([weight, packed], query_rows(H, D)))
    assert torch.equal(weight, torch.ones(H * D, 8))


def test_numbers_are_rounded_once_from_single_precision():
    weight = random(H * D, 32).bfloat16()
    gain = planted(half())
    expected = (weight.float() * gain.channel_gain().detach().reshape(-1, 1)).bfloat16()
    fold_gain(gain, FoldSite([weight], query_rows(H, D)))
    assert torch.equal(weight, expected)


def test_shared_gains_fold_into_every_heads_rows_and_gates_stay():
    """Qwen3-Next's projection holds a gate behind each head's query."""
    weight = torch.ones(H * 2 * D, 3)
    gain = planted(half(heads=None))
    fold_gain(gain, FoldSite([weight], query_rows(H, D, stride=2 * D)))
    by_head = weight.reshape(H, 2, D, 3)
    assert torch.equal(by_head[:, 1], torch.ones(H, D, 3))
    assert torch.equal(by_head[:, 0, :, 0], gain.channel_gain().expand(H, -1))


def test_an_unmerged_adapter_folds_with_its_base():
    weight, up, down = random(H * D, 12), random(H * D, 2, seed=1), random(2, 12, seed=2)
    gain = planted(half())
    merged = (weight + 2.0 * up @ down) * gain.channel_gain().detach().reshape(-1, 1)
    fold_gain(gain, FoldSite([weight, up], query_rows(H, D)))
    assert torch.allclose(weight + 2.0 * up @ down, merged, atol=1e-5)


def test_sites_that_do_not_fit_are_named():
    gain = planted(half())
    with pytest.raises(ValueError, match=r"gains \(H, D\) = \(4, 16\) do not fit rows \(8, 16\)"):
        fold_gain(gain, FoldSite([torch.ones(8 * D, 2)], query_rows(8, D)))
    with pytest.raises(ValueError, match=r"rows up to 111 in a tensor \(64, 2\)"):
        fold_gain(gain, FoldSite([torch.ones(H * D, 2)], query_rows(H, D, stride=32)))
    with pytest.raises(ValueError, match="two query channels claim the same row"):
        fold_gain(gain, FoldSite([torch.ones(H * D, 2)], query_rows(H, D, stride=8)))
