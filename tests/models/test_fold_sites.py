"""Where a gain folds is found by behaviour, whatever the order of rows, and refused with what stands in the way."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    LlamaConfig,
    NanoChatConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from laid_eval.core import GainNotFoldable, RopeGain
from laid_eval.errors import UserError
from laid_eval.models.fold_sites import fold_layer, fold_sites, written
from laid_eval.models.gained import attention_modules
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.models.trial import at_rest, in_other_layout, layout_of, miss, pairs_of, random_gain, recorded, replay

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
HALF = Rotary(100.0 ** -(np.arange(8) / 8), 1.0, np.arange(8), 8 + np.arange(8))
NEIGHBOURS = Rotary(HALF.theta, 1.0, 2 * np.arange(8), 2 * np.arange(8) + 1)


def tiny(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def llama(**more):
    return tiny(LlamaConfig(**TINY | more))


def attention(model, layer=0):
    return attention_modules(model)[layer]


def text(model):
    ids = torch.randint(5, 97, (2, 30), generator=torch.Generator().manual_seed(2))
    return recorded(model, ids)


def folds(model, site, rotary=HALF):
    """The worst error of a random gain that is written into a site of the model itself."""
    module, inputs = attention(model, site.layer), text(model)[site.layer]
    gain = random_gain(torch.tensor(rotary.first), torch.tensor(rotary.second), D, H if site.per_head else None)
    with torch.no_grad(), written(gain, site.parts):
        folded = replay(model, module, inputs)
    return miss(folded.query, gain(replay(model, module, inputs).query), gain.pair_of)


# What is found ------------------------------------------------------------------------------------------------------


def test_sites_of_every_layer_that_rotates():
    model = tiny(SmolLM3Config(**TINY | {"num_hidden_layers": 3}, no_rope_layers=[1, 0, 1]))
    found = fold_sites(model, rotaries(model, 60))
    assert list(found) == [0, 2]
    for layer, site in found.items():
        assert (site.layer, site.name, site.per_head, site.layout) == (layer, "q_proj.weight", True, "half-split")
        assert site.error < 1e-6
        assert site.control > 0.1
        assert site.parts[0].tensors[0].data_ptr() == attention(model, layer).q_proj.weight.data_ptr()
        assert folds(model, site) < 1e-6
    assert list(fold_sites(model, rotaries(model, 60), layers=[2])) == [2]


class Shuffled(nn.Module):
    """A projection whose rows are in an order no family uses, with rows in between that make no query."""

    def __init__(self, rows):
        super().__init__()
        self.inner = nn.Linear(64, 100)
        self.rows = rows

    def forward(self, x):
        return self.inner(x)[..., self.rows]


def test_rows_are_found_in_any_order():
    model = llama()
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(5))[: H * D]
    attention(model).q_proj = Shuffled(rows)
    site = fold_sites(model, rotaries(model, 60), [0])[0]
    assert site.name == "q_proj.inner.weight+bias"
    assert torch.equal(site.parts[0].rows, rows.reshape(H, D))
    assert folds(model, site) < 1e-6


def test_what_is_neutral_or_alike_now_does_not_hide_what_it_will_be():
    """A bias of zero would fold wherever it is left out, and of two equal heads either might be meant."""
    model = tiny(Qwen2Config(**TINY))
    with torch.no_grad():
        attention(model).q_proj.bias.zero_()
        weight = attention(model).q_proj.weight.reshape(H, D, -1)
        weight[1:] = weight[:1]
        attention(model, 1).q_proj.weight.zero_()
    found = fold_sites(model, rotaries(tiny(Qwen2Config(**TINY)), 60))
    for site in found.values():
        assert site.name == "q_proj.weight+bias"
        assert torch.equal(site.parts[0].rows, torch.arange(H * D).reshape(H, D))


def test_a_text_that_says_nothing_is_enough():
    """Trained models hold nearly one and the same state wherever a text begins; here it is the same for all tokens."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(64).expand(97, -1))
    for site in fold_sites(model, [HALF, HALF]).values():
        assert site.error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_looked_at_in_float32_at_least(dtype):
    model = tiny(Qwen3Config(**TINY, head_dim=D), dtype)
    for site in fold_sites(model, [HALF, HALF]).values():
        assert (site.name, site.per_head) == ("q_norm.weight", False)
        assert site.error < 1e-6
        assert site.parts[0].tensors[0].dtype == dtype


def test_reordered_channels_are_rows_of_their_own_order():
    """DeepSeek's projection makes neighbours a pair; its rotated queries are half-split, behind what does not turn."""
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": D}
    heads = {"num_key_value_heads": H, "first_k_dense_replace": 2}
    for interleave, turned in ((True, [8, 10, 12, 14, 9, 11, 13, 15]), (False, list(range(8, 16)))):
        model = tiny(DeepseekV3Config(**TINY | ranks | experts | heads, rope_interleave=interleave))
        site = fold_sites(model, rotaries(model, 60))[1]
        order = torch.tensor([*range(8), *turned])
        assert site.name == "q_b_proj.weight"
        assert torch.equal(site.parts[0].rows, torch.arange(H)[:, None] * D + order)


# What is refused ----------------------------------------------------------------------------------------------------


def refusal(model, found=None):
    """The message; nothing of the model may have changed."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(GainNotFoldable) as caught:
        fold_sites(model, found or [HALF, HALF])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    return str(caught.value)


def test_a_norm_without_weights_takes_the_gain_out_again():
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 16}
    model = tiny(Llama4TextConfig(**TINY, **more, head_dim=D, moe_layers=[], use_qk_norm=True))
    wanted = r"layer 0 of Llama4ForCausalLM: its queries come out of qk_norm, a norm without weights"
    assert refusal(model, rotaries(model, 60)).startswith(wanted)


def test_nanochat_is_refused_for_its_norm_and_turns_the_other_way_besides():
    model = tiny(NanoChatConfig(**TINY))
    with pytest.raises(UserError, match="turns its queries and keys in a way that no known rotary layout"):
        rotaries(model, 60)
    assert "its queries come out of q_norm, a norm without weights" in refusal(model)


def test_a_norm_behind_the_rotation_is_refused():
    """HunYuan's has weights: they take up any gain, but its queries are rotated pairs only while they are neutral."""
    model = tiny(HunYuanDenseV1Config(**TINY, head_dim=D))
    assert "query_layernorm.weight: pairs of the other layout miss by" in refusal(model, rotaries(model, 60))
    with torch.no_grad():
        attention(model).query_layernorm.weight += torch.randn(D)
    with pytest.raises(UserError, match="no known rotary layout"):
        rotaries(model, 60)


def test_heads_that_share_their_rows_are_refused():
    """DiffLlama's attention is called with half as many keys, twice over."""
    model = tiny(DiffLlamaConfig(**TINY))
    assert "does not carry a gain" in refusal(model, rotaries(model, 60))


def test_a_text_on_which_nothing_turns_is_no_trial():
    model = llama()
    model.model.rotary_emb.inv_freq.zero_()
    assert "pairs of the other layout miss by" in refusal(model)


def test_pairs_of_the_wrong_layout_are_refused():
    assert "q_proj.weight: queries miss the gain by" in refusal(llama(), [NEIGHBOURS, NEIGHBOURS])


def test_weights_that_make_keys_too_are_refused():
    model = llama(num_key_value_heads=H)
    attention(model).k_proj = attention(model).q_proj
    assert "q_proj.weight: it makes keys or values too" in refusal(model)


def test_weights_that_make_a_gate_too_are_refused():
    model, seen = llama(), []
    attention(model).q_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    attention(model).o_proj.register_forward_hook(lambda module, args, out: out * seen[-1].sigmoid())
    assert "it also acts on the layer's output otherwise than through the queries" in refusal(model)


def test_something_that_normalises_in_between_is_refused():
    model = llama()
    attention(model).q_proj.register_forward_hook(lambda module, args, out: nn.functional.normalize(out, dim=-1))
    assert "q_proj.weight: queries miss the gain by" in refusal(model)


def test_queries_made_by_no_module_are_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q.tanh(), k, cos, sin))
    model = llama()
    with torch.no_grad():
        attention(model).q_proj.weight.mul_(50)
    wanted = r"its queries are the output of none of its modules (q_proj, k_proj, v_proj, o_proj)"
    assert wanted in refusal(model)


@pytest.mark.parametrize("whole", [False, True], ids=["weight", "module"])
def test_weights_that_layers_share_are_refused(whole):
    model = llama()
    first, second = attention(model, 0), attention(model, 1)
    if whole:
        second.q_proj = first.q_proj
    else:
        second.q_proj.weight = first.q_proj.weight
    wanted = "q_proj.weight is shared with model.layers.1.self_attn.q_proj.weight: folding one would change the other"
    assert wanted in refusal(model)


def test_weights_that_overlap_in_memory_are_refused_and_neighbours_are_not():
    model = llama(num_key_value_heads=H)
    both = torch.randn(2 * H * D, 64)
    attention(model).q_proj.weight = nn.Parameter(both[: H * D])
    attention(model).k_proj.weight = nn.Parameter(both[H * D :])
    assert folds(model, fold_sites(model, [HALF, HALF])[0]) < 1e-6
    attention(model).k_proj.weight = nn.Parameter(both[1 : H * D + 1])
    assert "q_proj.weight is shared with model.layers.0.self_attn.k_proj.weight" in refusal(model)


class Adapted(nn.Module):
    """A projection as peft wraps it, at the start: the adapter gives nothing yet."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_is_to_be_merged_first():
    model = llama()
    attention(model).q_proj = Adapted(attention(model).q_proj)
    assert "an adapter (LoRA) sits on q_proj: merge it into the weights first" in refusal(model)


class Quantised(torch.Tensor):
    """Looks like the dtype it came from, as torchao's do."""


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        (torch.zeros(H * D, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(H * D, 64).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(H * D, 8, dtype=torch.int32), "torch.int32"),
        (torch.zeros(H * D, 64).as_subclass(Quantised), "Quantised"),
    ],
    ids=["uint8", "float8", "int32", "subclass"],
)
def test_packed_weights_are_refused(packed, kind):
    """Before any pass is tried, which might need a kernel that this machine lacks."""
    model = llama()
    attention(model, 1).q_proj.weight = nn.Parameter(packed, requires_grad=False)
    wanted = f"layer 1 of LlamaForCausalLM: q_proj.weight is packed or quantised ({kind}): fold first, then quantise"
    assert refusal(model) == wanted


def test_attention_outside_the_interface_is_refused():
    config = FalconConfig(vocab_size=97, hidden_size=64, num_attention_heads=H, num_hidden_layers=2)
    assert "The attention of FalconForCausalLM can't be seen" in refusal(tiny(config))


def test_a_layer_that_does_not_go_through_the_interface_is_refused():
    model = llama()
    attention(model).forward = lambda hidden_states, **kwargs: (hidden_states, None)
    assert "layer 0 of LlamaForCausalLM: its attention can't be seen" in refusal(model)


# What stays as it was -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True], ids=["found", "broken off"])
def test_nothing_of_the_model_changes(broken, monkeypatch):
    model = tiny(Phi3Config(**TINY), torch.bfloat16)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: (x.data_ptr(), x.dtype, x.clone()) for name, x in model.state_dict().items()}
    if broken:
        monkeypatch.setattr("laid_eval.models.fold_sites.miss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fold_sites(model, [HALF, HALF])
    else:
        assert fold_sites(model, [HALF, HALF])[0].name == "qkv_proj.weight"
    for name, x in model.state_dict().items():
        where, dtype, bits = before[name]
        assert (x.data_ptr(), x.dtype) == (where, dtype)
        assert torch.equal(x, bits)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_what_is_written_for_a_trial_is_taken_back_bit_by_bit():
    model = llama().bfloat16()
    site = fold_sites(model, [HALF, HALF], [0])[0]
    weight = attention(model).q_proj.weight
    own = weight.clone()
    gain = random_gain(torch.arange(8), 8 + torch.arange(8), D, H)

    def broken_off():
        with torch.no_grad(), written(gain, site.parts):
            assert not torch.equal(weight, own)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert torch.equal(weight, own)


# What it is measured with -------------------------------------------------------------------------------------------


def test_a_quiet_pair_is_heard_beside_a_loud_one():
    gain = random_gain(torch.arange(8), 8 + torch.arange(8), D, H)
    wanted = torch.randn(2, H, 30, D)
    wanted[..., 3] *= 1000
    seen = wanted.clone()
    assert miss(seen, wanted, gain.pair_of) == 0
    seen[:, 2, :, [5, 13]] *= 1.01
    assert miss(seen, wanted, gain.pair_of) == pytest.approx(0.01, rel=0.1)
    seen[0, 0, 0, 0] = torch.nan
    assert np.isnan(miss(seen, wanted, gain.pair_of))


def test_channels_in_no_pair_count_too():
    gain = random_gain(torch.arange(4), 4 + torch.arange(4), D, H)
    wanted = torch.randn(2, H, 30, D)
    seen = wanted.clone()
    seen[..., 8:] *= 1.1
    assert miss(seen, wanted, gain.pair_of) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(("start", "pairs"), [(0, 8), (8, 4), (0, 4)])
def test_the_other_layout_keeps_gains_and_place(start, pairs):
    line = torch.arange(pairs)
    half = random_gain(start + line, start + pairs + line, D, H)
    woven = in_other_layout(half)
    assert (layout_of(half), layout_of(woven)) == ("half-split", "interleaved")
    assert torch.equal(woven.log_gain(), half.log_gain())
    assert torch.equal(pairs_of(woven)[0], start + 2 * line)
    assert torch.equal(in_other_layout(woven).pair_of, half.pair_of)
    assert in_other_layout(random_gain(line, pairs + line, D, None)).shared


def test_random_gains_have_a_size_and_are_the_same_each_time():
    one, other = (random_gain(torch.arange(8), 8 + torch.arange(8), D, H) for _ in range(2))
    assert torch.equal(one.parameter, other.parameter)
    assert one.log_gain().std().item() == pytest.approx(0.7, abs=0.15)


def test_a_gain_tried_in_a_replay_is_the_gain_at_run_time():
    model = llama()
    module, inputs = attention(model), text(model)[0]
    gain = random_gain(torch.arange(8), 8 + torch.arange(8), D, H)
    plain, tried = replay(model, module, inputs), replay(model, module, inputs, gain)
    assert torch.equal(tried.query, gain(plain.query))
    assert torch.equal(tried.key, plain.key)
    assert not torch.allclose(tried.output, plain.output, rtol=1e-3)


def test_gains_per_head_do_not_go_into_a_shared_norm():
    model = tiny(Qwen3Config(**TINY, head_dim=D))
    site = fold_sites(model, [HALF, HALF])[0]
    assert not site.per_head
    with pytest.raises(GainNotFoldable, match="can't fold into numbers that all heads share"):
        fold_layer(RopeGain(torch.arange(8), 8 + torch.arange(8), D, H), site.parts)


def test_rest_ends_as_it_began():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with at_rest(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]
