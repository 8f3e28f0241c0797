"""Finding queries and keys in the files of a checkpoint, and refusing what can't be read."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from laid_eval.errors import UserError
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.spectrum.projections import blocks_of
from laid_eval.spectrum.weights import weight_spectrum

MANY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY = {**MANY, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder, loaded model and rotary pairs."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder, model, rotaries(model, 64)


def test_shards_and_types_do_not_matter(llama, tmp_path):
    folder, model, rotary = llama
    whole = weight_spectrum(folder, model.config, rotary)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    in_shards = weight_spectrum(tmp_path / "shards", model.config, rotary)
    np.testing.assert_array_equal(in_shards.amplitude, whole.amplitude)
    half = {n: t.to(torch.bfloat16) for n, t in load_file(folder / "model.safetensors").items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half" / "model.safetensors")
    np.testing.assert_allclose(
        weight_spectrum(tmp_path / "half", model.config, rotary).amplitude, whole.amplitude, rtol=0.01
    )


def test_reading_leaves_the_files_as_they_are(llama):
    folder, model, rotary = llama
    before = (folder / "model.safetensors").read_bytes()
    first, second = (weight_spectrum(folder, model.config, rotary) for _ in range(2))
    np.testing.assert_array_equal(first.amplitude, second.amplitude)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["model.layers.0.self_attn.q_proj.weight"], "model.layers."),
        (["model.language_model.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.attn.qkv.weight",
          "model.visual.blocks.1.attn.qkv.weight"], "model.language_model.layers."),
        (["language_model.model.layers.11.self_attn.q_proj.weight",
          "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"], "language_model.model.layers."),
        (["gpt_neox.layers.0.attention.query_key_value.weight"], "gpt_neox.layers."),
        (["layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn.q_proj.weight"], "layers."),
        (["lm_head.weight"], ""),
    ],
)  # fmt: skip
def test_the_language_model_is_found_among_other_stacks(names, blocks):
    assert blocks_of(names) == blocks


def test_a_vision_language_checkpoint(tmp_path):
    """Old and new naming of the language model's tensors around the same weights."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    small = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = tf.Qwen2_5_VLConfig(text_config={**TINY, "rope_parameters": rope}, vision_config=small)
    torch.manual_seed(0)
    model = tf.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    i = np.arange(4)
    pairs = [Rotary(1e6 ** (-i / 4), 1.0, i, i + 4, ("t", "h", "w", "w"))] * 2
    found = weight_spectrum(tmp_path, config, pairs)
    q = model.model.language_model.layers[1].self_attn.q_proj.weight.detach()
    assert found.query_norm[1, 3, 2] == pytest.approx(float(q[[24 + 2, 24 + 6]].norm()), rel=1e-5)
    state = load_file(tmp_path / "model.safetensors")
    named = {
        n.replace("model.language_model.", "model.").replace("model.visual", "visual"): t for n, t in state.items()
    }
    for other in (named, {n.replace("model.language_model.", "language_model.model."): t for n, t in state.items()}):
        save_file(other, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(weight_spectrum(tmp_path, config, pairs).amplitude, found.amplitude)


def test_missing_projections_are_named(llama, tmp_path):
    folder, model, rotary = llama
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    message = (
        r"'model.layers.1.' of this llama checkpoint has no query and key projections that can be read; looked for "
        r"q_proj and k_proj, qkv_proj or query_key_value \(.weight\) under self_attn, attention"
    )
    with pytest.raises(UserError, match=message):
        weight_spectrum(tmp_path, model.config, rotary)
    renamed = {n.replace("q_proj", "wq"): t for n, t in state.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'model.layers.0.' of this llama checkpoint has no query and key"):
        weight_spectrum(tmp_path, model.config, rotary)


def test_families_with_latent_attention_are_refused(tmp_path):
    config = tf.DeepseekV3Config(
        **MANY, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    i = np.arange(4)
    with pytest.raises(UserError, match="deepseek_v3"):
        weight_spectrum(tmp_path, config, [Rotary(np.ones(4), 1.0, 8 + i, 12 + i)] * 2)


def test_what_cannot_be_read_is_refused(llama, tmp_path):
    folder, model, rotary = llama
    with pytest.raises(UserError, match="has no safetensors weights"):
        weight_spectrum(tmp_path, model.config, rotary)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks 1 of 1 weight files, e.g. '../x.safetensors'"):
        weight_spectrum(tmp_path, model.config, rotary)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is not an index of weights"):
        weight_spectrum(tmp_path, model.config, rotary)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"Weights 'model\.safetensors' can't be read"):
        weight_spectrum(tmp_path, model.config, rotary)
    state = load_file(folder / "model.safetensors")
    state = {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is stored as torch.float8_e4m3fn: quantized weights"):
        weight_spectrum(tmp_path, model.config, rotary)
    config = tf.LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="are quantized: their norms can't be read"):
        weight_spectrum(folder, config, rotary)


def test_a_family_whose_queries_are_made_otherwise_is_refused(llama, monkeypatch):
    """The check on a small model of the family, here with the model's queries doubled behind our back."""
    folder, model, rotary = llama
    own = tf.models.llama.modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        lambda q, k, *rest, **more: own(2 * q, k, *rest, **more),
    )
    with pytest.raises(UserError, match="of the llama family are not what its q/k projections and norms give"):
        weight_spectrum(folder, model.config, rotary)
