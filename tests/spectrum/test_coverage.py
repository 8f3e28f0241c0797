"""T11: closed forms for published models (table 7.2 of the note), from transformers' own rotary frequencies."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from laid_eval.spectrum.coverage import (
    coverage_class,
    critical_pair,
    cycles,
    discrimination_horizon,
    low_band,
)


def plain(base, head_dim):
    return base ** (-2 * np.arange(head_dim // 2) / head_dim)


def scaled(head_dim, **rope):
    """Frequencies of a scaled RoPE, as transformers makes them."""
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters=rope,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0].double().numpy()


def llama31():
    return scaled(
        128, rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip


def gemma3_global():
    return scaled(256, rope_type="linear", rope_theta=1e6, factor=8.0)


TABLE = {  # name: (inv_freq, context, pairs with a longer wavelength, longest wavelength, discrimination horizon)
    "Llama-2-7B": (lambda: plain(1e4, 128), 4096, 18, 54e3, 1707),
    "Gemma-7B": (lambda: plain(1e4, 256), 8192, 28, 58e3, 2653),
    "Llama-3-8B": (lambda: plain(5e5, 128), 8192, 29, 2.56e6, 18438),
    "Llama-3.1": (llama31, 131072, 25, None, 85133),
    "Mistral-7B-v0.1": (lambda: plain(1e4, 128), 8192, 14, 54e3, None),
    "Mistral-7B-v0.2": (lambda: plain(1e6, 128), 32768, 24, 5.1e6, None),
    "Qwen2.5": (lambda: plain(1e6, 128), 32768, 24, 5.06e6, 27115),
    "Qwen3-VL": (lambda: plain(5e6, 128), 262144, 19, 24.7e6, 82999),
    "Qwen2.5-VL time": (lambda: plain(1e6, 128)[:16], 32768, 0, 160, 16),
    "Gemma-3 global": (gemma3_global, 131072, 55, 45e6, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_closed_forms_of_published_models(name):
    make, length, uncovered, longest, horizon = TABLE[name]
    inv_freq = make()
    assert low_band(inv_freq, length).sum() == uncovered
    if longest:
        assert 2 * np.pi / inv_freq[-1] == pytest.approx(longest, rel=0.02)
    if horizon:
        assert discrimination_horizon(inv_freq) == horizon


@pytest.mark.parametrize(
    ("base", "head_dim", "length", "pair"),
    [(1e4, 128, 4096, 46), (5e5, 128, 8192, 35), (1e4, 96, 2048, 31), (1e4, 96, 4096, 34)],
    ids=["Llama-2", "Llama-3", "Phi-3-mini 2k", "Phi-3-mini 4k"],
)
def test_critical_pair(base, head_dim, length, pair):
    assert critical_pair(base, head_dim, length) == pair
    assert (~low_band(plain(base, head_dim), length)).sum() == pair


def test_llama31_leaves_29_pairs_unchanged():
    assert (np.abs(llama31() / plain(5e5, 128) - 1) < 1e-5).sum() == 29


def test_gemma4_global_layers_have_no_slow_pairs_but_many_that_stand():
    inv_freq = scaled(512, rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25)
    turning = inv_freq > 0
    assert (turning.sum(), (~turning).sum()) == (64, 192)
    assert 2 * np.pi / inv_freq[turning].min() == pytest.approx(188, rel=0.01)
    assert low_band(inv_freq, 131072).sum() == 0
    assert (coverage_class(inv_freq, 131072) == "none").sum() == 192


def test_coverage_classes_at_their_edges():
    length = 1000
    turns = np.array([5.0, 1.0, 0.999, 0.25, 0.249, 0.0])
    inv_freq = turns * 2 * np.pi / length * (1 + 1e-12)
    np.testing.assert_allclose(cycles(inv_freq, length), turns)
    assert coverage_class(inv_freq, length).tolist() == ["full", "full", "partial", "partial", "quasi-dc", "none"]
    assert low_band(inv_freq, length).tolist() == [False, False, True, True, True, False]


def test_horizon_is_not_monotone_in_the_base():
    """The note's example at L = 1024, D = 128: 4.3e3 reaches it, some larger base up to 6e3 does not."""
    reach = [discrimination_horizon(plain(base, 128)) > 1024 for base in (4.3e3, *np.arange(4.4e3, 6.1e3, 100))]
    assert reach[0]
    assert not all(reach)


def test_weighted_horizon():
    inv_freq = np.array([np.pi / 2, np.pi / 1000])
    assert discrimination_horizon(inv_freq, [1, 0]) == 2
    assert discrimination_horizon(inv_freq, [0, 1]) == 501
    assert discrimination_horizon(inv_freq, [0, 1], limit=500) is None
    assert discrimination_horizon([0.0, 0.0]) is None
    far = np.array([np.pi / 20000])
    assert discrimination_horizon(far) == 10001  # beyond one chunk
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        discrimination_horizon(inv_freq, [1, 2, 3])
