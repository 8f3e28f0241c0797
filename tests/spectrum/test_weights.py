"""Sizes of rotary pairs read off checkpoints, against plain loops over the loaded model and against its own queries."""

import math
import weakref

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from laid_eval.errors import UserError
from laid_eval.models.capture import capture
from laid_eval.models.rotary import Rotary, rotaries, rotaries_of_config
from laid_eval.spectrum import projections
from laid_eval.spectrum.weights import bias_kernel, weight_spectrum

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MANY = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**TINY),
    "llama-yarn": lambda: tf.LlamaConfig(**{**TINY, "max_position_embeddings": 256}, rope_parameters=YARN),
    "qwen2": lambda: tf.Qwen2Config(**TINY),
    "qwen3": lambda: tf.Qwen3Config(**TINY, head_dim=8),
    "phi3": lambda: tf.Phi3Config(**TINY),
    "gemma3": lambda: tf.Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, query_pre_attn_scalar=9),
    "glm4": lambda: tf.Glm4Config(**TINY, head_dim=8),
    "granite": lambda: tf.GraniteConfig(**TINY, attention_multiplier=0.1),
    "gpt-oss": lambda: tf.GptOssConfig(**TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**MANY, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "cohere-norms": lambda: tf.CohereConfig(**TINY, use_qk_norm=True),
    "nemotron": lambda: tf.NemotronConfig(**TINY),
    "olmo2": lambda: tf.Olmo2Config(**TINY),
    "apertus": lambda: tf.ApertusConfig(**TINY),
    "starcoder2": lambda: tf.Starcoder2Config(**TINY),
}
PLAIN = ["llama", "llama-yarn", "qwen2", "phi3", "glm4", "granite", "gpt-oss"]
"""RMS norm with its weight as stored, no norm on queries and keys."""


def model_of(config, seed=0):
    """Random, with no parameter at its usual value: default norms and biases hide mistakes."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim > 1 else p.normal_(mean=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder, loaded model and rotary pairs of a family, made once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = model_of(FAMILIES[family]())
            model.save_pretrained(folder)
            made[family] = folder, model, rotaries(model, 64)
        return made[family]

    return make


def spectrum(made, **options):
    folder, model, rotary = made
    return weight_spectrum(folder, model.config, rotary, **options)


def plain_projections(model, layer):
    """Rows of queries and keys by head, written out family by family."""
    block = model.model.layers[layer]
    attention, norm = block.self_attn, block.input_layernorm.weight
    d = attention.head_dim
    if hasattr(attention, "qkv_proj"):
        whole = attention.qkv_proj.weight
        q, k = whole[: 4 * d], whole[4 * d : 6 * d]
    else:
        q, k = attention.q_proj.weight, attention.k_proj.weight
    return [[[row * norm for row in w[h * d : (h + 1) * d]] for h in range(len(w) // d)] for w in (q, k)]


@pytest.mark.parametrize("family", PLAIN)
def test_pair_norms_agree_with_plain_loops(checkpoint, family):
    _, model, rotary = made = checkpoint(family)
    found = spectrum(made)
    assert found.layers.tolist() == [0, 1]
    for layer in range(2):
        pairs = rotary[layer]
        queries, keys = plain_projections(model, layer)
        scale = model.model.layers[layer].self_attn.scaling
        for f, (a, b) in enumerate(zip(pairs.first, pairs.second, strict=True)):
            for h in range(4):
                q = math.sqrt(sum(float(queries[h][c].double().square().sum()) for c in (a, b)))
                k = math.sqrt(sum(float(keys[h // 2][c].double().square().sum()) for c in (a, b)))
                assert found.query_norm[layer, h, f] == pytest.approx(q, rel=1e-5)
                assert found.key_norm[layer, h // 2, f] == pytest.approx(k, rel=1e-5)
                assert found.amplitude[layer, h, f] == pytest.approx(scale * pairs.factor**2 * q * k, rel=1e-5)
    np.testing.assert_allclose(found.usage.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.inv_freq, [r.theta for r in rotary], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_pair_norms_are_the_size_of_the_models_own_queries(checkpoint, family):
    """RMS of captured queries less their mean, for random layer inputs: every norm, layout and bias included."""
    _, model, rotary = made = checkpoint(family)
    found = spectrum(made)
    block = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    noise = torch.randn(4000, 1, 32, generator=torch.Generator().manual_seed(3))
    seen = []
    hook = block.register_forward_pre_hook(lambda _, args: (noise, *args[1:]))
    with torch.inference_mode(), capture(model, lambda call: seen.append(call)):
        model.get_decoder()(input_ids=torch.ones(4000, 1, dtype=torch.long), use_cache=False)
    hook.remove()
    call, pairs = seen[0], rotary[0]
    # Norms on queries make sizes an average of ratios, biases and weights of 8 channels far from even.
    normed = family in ("qwen3", "gemma3", "cohere-norms", "olmo2", "apertus")
    for side, expected in ((call.query, found.query_norm[0]), (call.key, found.key_norm[0])):
        z = pairs.pairs(side[:, :, 0].double()) / pairs.factor
        z = z if normed else z - z.mean(0)
        np.testing.assert_allclose(z.abs().square().mean(0).sqrt(), expected, rtol=0.4 if normed else 0.06)
    expected = call.scale * pairs.factor**2 * found.query_norm[0] * np.repeat(found.key_norm[0], call.group, axis=0)
    np.testing.assert_allclose(found.amplitude[0], expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4", "qwen3"])
def test_a_band_times_g_changes_that_band_alone(checkpoint, tmp_path, family):
    folder, model, rotary = made = checkpoint(family)
    before = spectrum(made)
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if ".0." in n and n.endswith(("q_proj.weight", "qkv_proj.weight")))
    band = np.r_[rotary[0].first[1], rotary[0].second[1]]
    state[name][8 * 2 + band] *= 3.0  # pair 1 of head 2
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = weight_spectrum(tmp_path, model.config, rotary)
    ratio = after.amplitude / before.amplitude
    if family == "qwen3":  # its norm keeps the size of the head: the band grows against the others
        ratio[0, 2] /= ratio[0, 2, 0]
    expected = np.ones_like(ratio)
    expected[0, 2, 1] = 3.0
    np.testing.assert_allclose(ratio, expected, rtol=2e-6)


@pytest.mark.parametrize("family", ["qwen2", "gpt-oss", "gpt-neox", "nemotron"])
def test_bias_kernel_equals_rotated_biases(checkpoint, family):
    """Against queries and keys of a layer whose projections see nothing but biases, rotated by the model itself."""
    _, model, rotary = made = checkpoint(family)
    distances = [0, 1, 2, 7, 30, 63]
    found = spectrum(made, distances=distances)
    block = next(m for n, m in model.named_modules() if n.endswith("layers.1"))
    seen = []
    # A constant vector has nothing left under a layer norm; zeros have nothing under an RMS norm.
    hook = block.register_forward_pre_hook(lambda _, args: (torch.zeros(1, 64, 32), *args[1:]))
    with torch.inference_mode(), capture(model, lambda call: seen.append(call)):
        model.get_decoder()(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)
    hook.remove()
    call, turned = seen[1], np.r_[rotary[1].first, rotary[1].second]
    q, k = call.query[0, :, :, turned].double(), call.key[0, :, :, turned].double()
    brute = call.scale * np.array([[q[h, d] @ k[h // call.group, 0] for d in distances] for h in range(4)])
    # The model's own angles are float32: some 1e-6 rad off at position 63.
    np.testing.assert_allclose(found.bias_kernel[1], brute, rtol=0, atol=1e-5 * np.abs(brute).max())
    assert found.distances.tolist() == distances


def test_bias_kernel_is_an_angle_difference():
    """One pair, |b_q| = 2, |b_k| = 3, the query 0.4 rad ahead."""
    pair = Rotary(np.array([0.01]), 1.0, np.array([1]), np.array([0]))
    q = torch.tensor([[2 * np.sin(0.5), 2 * np.cos(0.5)]], dtype=torch.float64)
    k = torch.tensor([[3 * np.sin(0.1), 3 * np.cos(0.1)]], dtype=torch.float64)
    at = np.array([0, 10, 100])
    np.testing.assert_allclose(bias_kernel(q, k, pair, 0.5, at)[0], 0.5 * 6 * np.cos(0.01 * at + 0.4), rtol=1e-12)


def test_bias_kernel_equals_rotation_matrices():
    """Brute force in float64: two heads a key head, three pairs of eight channels, query at i and key at i - d."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(4, 8)), rng.normal(size=(2, 8))
    pairs = Rotary(np.array([1.0, 0.03, 0.0]), 1.2, np.array([0, 2, 4]), np.array([1, 3, 5]))

    def rotated(x, position):
        out = np.zeros(8)
        for w, a, b in zip(pairs.theta, pairs.first, pairs.second, strict=True):
            c, s = pairs.factor * np.cos(w * position), pairs.factor * np.sin(w * position)
            out[a], out[b] = c * x[a] - s * x[b], s * x[a] + c * x[b]
        return out

    at = np.array([0, 1, 5, 300])
    brute = [[0.3 * rotated(q[h], 1000) @ rotated(k[h // 2], 1000 - d) for d in at] for h in range(4)]
    found = bias_kernel(torch.tensor(q), torch.tensor(k), pairs, 0.3, at)
    np.testing.assert_allclose(found, brute, rtol=0, atol=1e-10)


def test_kernels_only_where_biases_act_alone(checkpoint):
    llama, qwen3 = spectrum(checkpoint("llama")), spectrum(checkpoint("qwen3"))
    assert llama.bias_kernel is None
    assert "bias_kernel" not in llama.arrays()
    assert llama.notes == ()
    assert qwen3.notes == (
        "Queries and keys are normed: sizes hold for an average input, and biases have no closed form.",
    )
    qwen2 = spectrum(checkpoint("qwen2"))
    assert qwen2.distances[0] == 0
    assert qwen2.distances[-1] == 64
    assert qwen2.bias_kernel.shape == (2, 4, len(qwen2.distances))


def test_arrays_go_into_an_npz(checkpoint, tmp_path):
    found = spectrum(checkpoint("qwen2"))
    np.savez(tmp_path / "w.npz", **found.arrays())
    with np.load(tmp_path / "w.npz") as stored:
        assert sorted(stored) == sorted(found.arrays())
        np.testing.assert_array_equal(stored["usage"], found.usage)
    assert found.amplitude.dtype == np.float32
    assert found.amplitude.shape == (2, 4, 4)


def test_memory_does_not_grow_with_layers(tmp_path, monkeypatch):
    """Most bytes of tensors read from shards that are alive at one time."""
    peaks = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        config = tf.Qwen2Config(**{**TINY, "num_hidden_layers": layers})
        model_of(config).save_pretrained(folder)
        alive, peak = [0], [0]

        def counted(tensors, alive=alive, peak=peak):
            def read(name, start, stop):
                tensor = tensors.read(name, start, stop)
                size = tensor.nbytes
                alive[0] += size
                peak[0] = max(peak[0], alive[0])
                weakref.finalize(tensor.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
                return tensor

            return projections.Tensors(tensors.names, read)

        own = projections.tensors_of
        with monkeypatch.context() as patch:
            patch.setattr("laid_eval.spectrum.weights.tensors_of", lambda f, own=own, c=counted: c(own(f)))
            weight_spectrum(folder, config, rotaries_of_config(config, 64))
        peaks.append(peak[0])
    queries_and_keys = (32 + 16) * 32 * 4
    assert peaks[0] == peaks[1]
    assert queries_and_keys < peaks[0] < 1.1 * queries_and_keys


def test_from_the_configuration_alone(checkpoint):
    """End to end as the command does it: pairs without weights, sizes without a model."""
    for family in ("llama", "glm4", "gemma3"):
        folder, _, _ = made = checkpoint(family)
        config = tf.AutoConfig.from_pretrained(folder)
        found = weight_spectrum(folder, config, rotaries_of_config(config, 64))
        np.testing.assert_allclose(found.amplitude, spectrum(made).amplitude, rtol=1e-5)


def test_a_real_model(smollm2):
    from laid_eval.models.source import resolve

    folder = resolve("smollm2").folder
    found = weight_spectrum(folder, smollm2.model.config, rotaries_of_config(smollm2.model.config, 8192))
    assert found.usage.shape == (30, 9, 32)
    layer, head, pair = 7, 4, 20
    block = smollm2.model.model.layers[layer]
    rows = [(block.self_attn.q_proj.weight[head * 64 + c] * block.input_layernorm.weight) for c in (pair, pair + 32)]
    expected = float(torch.stack(rows).detach().norm())
    assert found.query_norm[layer, head, pair] == pytest.approx(expected, rel=1e-5)


def test_a_head_of_zeros_has_no_usage(checkpoint, tmp_path):
    folder, model, rotary = checkpoint("llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][:8] = 0
    save_file(state, tmp_path / "model.safetensors")
    usage = weight_spectrum(tmp_path, model.config, rotary).usage
    assert np.isnan(usage[0, 0]).all()
    assert np.isfinite(usage[0, 1:]).all()


def test_what_a_layer_norm_removes_does_not_count(checkpoint, tmp_path):
    """Adding to a row what meets only the input's mean changes no query, so no size."""
    folder, model, rotary = made = checkpoint("nemotron")
    state = load_file(folder / "model.safetensors")
    at = "model.layers.0."
    state[f"{at}self_attn.q_proj.weight"] += 5 / (1 + state[f"{at}input_layernorm.weight"])
    save_file(state, tmp_path / "model.safetensors")
    changed = weight_spectrum(tmp_path, model.config, rotary)
    np.testing.assert_allclose(changed.query_norm, spectrum(made).query_norm, rtol=1e-3)


def test_queries_beside_their_gate(tmp_path):
    """Qwen3-Next: only one layer attends, and each head's rows are its queries, then its gate."""
    config = tf.Qwen3NextConfig(**{**TINY, "num_hidden_layers": 4}, head_dim=8)
    model = model_of(config)
    model.save_pretrained(tmp_path)
    found = weight_spectrum(tmp_path, config, rotaries(model, 64))
    assert found.layers.tolist() == [3]
    block = model.model.layers[3]
    pairs = rotaries(model, 64)[3]
    rows = block.self_attn.q_proj.weight[2 * 16 : 2 * 16 + 8] * (1 + block.input_layernorm.weight)
    size = rows.square().sum(-1)
    size = size / size.mean() * (1 + block.self_attn.q_norm.weight).square()
    assert found.query_norm[0, 2, 0] == pytest.approx(
        float(size[[pairs.first[0], pairs.second[0]]].sum().sqrt()), rel=1e-5
    )


def test_layers_that_do_not_rotate_are_left_out(checkpoint):
    folder, model, rotary = checkpoint("llama")
    found = weight_spectrum(folder, model.config, [None, rotary[1]])
    assert found.layers.tolist() == [1]
    assert found.notes == ("Left out, as they don't rotate: layers 0.",)
    with pytest.raises(UserError, match="No layer of this llama model rotates its queries and keys"):
        weight_spectrum(folder, model.config, [None, None])
