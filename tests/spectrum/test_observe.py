"""Sums taken on the way equal their definitions, written out the slow way (identities I1-I6 of exact O(N) methods)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Glm4Config, LlamaConfig, MistralConfig

from laid_eval.models.capture import Call, Mask, capture
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.spectrum.layout import BANDS, SINKS, log_distances, stationary_width
from laid_eval.spectrum.observe import observe, sample

N = 120
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**TINY),
    "yarn": LlamaConfig(
        **TINY,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "sliding": MistralConfig(**TINY, sliding_window=40),
    "softcap": Gemma2Config(**TINY, sliding_window=40, attn_logit_softcapping=5.0),
    "interleaved": Glm4Config(**TINY),
}


def captured(config, n=N):
    """Both layers' calls in float64, with their pairs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj")):
                parameter.mul_(20)
    calls = []
    with torch.no_grad(), capture(model, calls.append):
        model(torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(2)), use_cache=False)
    return calls, rotaries(model, n)


@pytest.fixture(scope="module", params=FAMILIES)
def layer(request):
    calls, found = captured(FAMILIES[request.param])
    return calls[0], found[0]


def brute(call, rotary):
    """All probabilities (H, N, N) and the logit of every pair (H, N, N, F)."""
    p = call.probabilities(torch.arange(call.query.shape[2]))[0]
    q = rotary.pairs(call.query[0])
    k = rotary.pairs(call.key[0]).repeat_interleave(call.group, dim=0)
    logits = call.scale * (q[:, :, None] * k[:, None].conj()).real
    return p, logits


def test_pair_logits_add_up_to_the_logit(layer):
    call, rotary = layer
    _, logits = brute(call, rotary)
    whole = call.logits(torch.arange(N))[0]
    rest = sorted(set(range(16)) - {*rotary.first, *rotary.second})  # channels that are in no pair
    q, k = call.query[0][..., rest], call.key[0][..., rest].repeat_interleave(call.group, dim=0)
    unrotated = call.scale * torch.einsum("hid,hjd->hij", q, k)
    assert (logits.sum(-1) + unrotated - whole).abs().max() < 1e-10


def test_rows_equal_their_definitions(layer):
    call, rotary = layer
    plan = sample(N, 30, seed=0)
    found = observe(call, rotary, plan)
    p, logits = brute(call, rotary)
    w = stationary_width(N)
    rows = plan.rows
    profile = torch.stack([p[:, rows, rows - d].mean(1) for d in range(w)], dim=1)
    np.testing.assert_allclose(found["profile"].mean(0), profile, atol=1e-6)
    np.testing.assert_allclose(found["sink"], p[:, rows, :SINKS].sum(-1).mean(1), atol=1e-6)
    total = found["profile"].mean(0).sum(1) + found["tail"] + found["sink"] + found["learned_sink"]
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    entropy = -(p[:, rows] * p[:, rows].clamp_min(1e-300).log()).sum(-1).mean(1)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-4, atol=1e-5)
    seen = call.mask.rows(rows)[0, 0].double()
    seen[:, :SINKS] = 0
    kept = p[:, rows] * seen
    attended = torch.einsum("hij,hijf->hif", kept / kept.sum(-1, keepdim=True), logits[:, rows])
    even = torch.einsum("ij,hijf->hif", seen / seen.sum(-1, keepdim=True), logits[:, rows])
    np.testing.assert_allclose(found["contribution"], (attended - even).mean(1), rtol=1e-3, atol=1e-4)


def test_logits_at_every_distance_equal_their_definitions(layer):
    call, rotary = layer
    found = observe(call, rotary, sample(N, 10, seed=0))
    _, logits = brute(call, rotary)
    w, theta = stationary_width(N), torch.as_tensor(rotary.theta)
    mean = torch.zeros(4, len(theta), w, dtype=torch.double)
    square = torch.zeros_like(mean)
    for d in range(w):
        i = torch.arange(d + SINKS, N)
        at = logits[:, i, i - d]
        mean[..., d], square[..., d] = at.mean(1), (at**2).mean(1)
    size = float(square.max().sqrt())
    np.testing.assert_allclose(found["logit"], mean.sum(1), atol=1e-5 * size)
    grid = torch.as_tensor(log_distances(N))
    moment = torch.view_as_complex(torch.from_numpy(found["moment"]).contiguous())
    turned = (moment * torch.exp(1j * theta[:, None] * grid)).real
    np.testing.assert_allclose(turned, mean[..., grid], atol=1e-5 * size)
    np.testing.assert_allclose(found["rms"], square[..., grid].sqrt(), atol=1e-3 * size)


def test_norms_and_means_do_not_depend_on_the_rotation(layer):
    """A pair's length is its length before the rotation (times the module's factor)."""
    call, rotary = layer
    found = observe(call, rotary, sample(N, 10, seed=0))
    turns = rotary.turns(torch.arange(N))
    q = rotary.pairs(call.query[0]) * turns.conj()
    np.testing.assert_allclose(found["query_norm"], q.abs()[:, SINKS:].mean(1), rtol=1e-5)
    mean = torch.view_as_complex(torch.from_numpy(found["query_mean"]).contiguous())
    np.testing.assert_allclose(mean, q[:, SINKS:].mean(1), atol=1e-5 * float(q.abs().max()))


def test_utility_is_the_divergence_to_unrotated_pairs(layer):
    call, rotary = layer
    plan = sample(N, 30, seed=0)
    found = observe(call, rotary, plan)["utility"]
    rows, positions = plan.few, torch.arange(N)
    p = call.probabilities(rows)[0]
    for b, (low, high) in enumerate(pairwise(BANDS)):
        band = (rotary.wavelength >= low) & (rotary.wavelength < high)
        if not band.any():
            assert (found[:, b] == 0).all()
            continue
        back = torch.where(torch.as_tensor(band), rotary.turns(positions).conj(), 1.0)

        def turned(x, back=back):
            z, out = rotary.pairs(x) * back, x.clone()
            out[..., torch.as_tensor(rotary.first)], out[..., torch.as_tensor(rotary.second)] = z.real, z.imag
            return out

        other = Call(**{**call.__dict__, "query": turned(call.query), "key": turned(call.key)})
        q = other.probabilities(rows)[0]
        divergence = torch.where(p > 0, p * (p.log() - q.clamp_min(1e-300).log()), 0).sum(-1).mean(1)
        np.testing.assert_allclose(found[:, b], divergence, rtol=1e-2, atol=2e-5)


def planted(query, key):
    """A call of one head over vectors (N, D)."""
    n = len(query)
    mask = Mask(lambda b, h, q, k: k <= q, 1, n, n, 0, 0, True, False, torch.device("cpu"))
    return Call(0, torch.nn.Identity(), query[None, None], key[None, None], key[None, None], 1.0, mask, None, None)


def test_a_planted_pair_is_found_at_its_distance():
    """Keys that equal the query turned by d0 positions on one pair: all contribution and the kernel's peak lie there."""
    n, pair, d0 = 400, 3, 37
    rotary = Rotary(10000.0 ** -(np.arange(8) / 8), 1.0, np.arange(8), np.arange(8) + 8)
    turns = rotary.turns(torch.arange(n))
    z = torch.zeros(n, 8, dtype=torch.complex128)
    z[:, pair] = 3.0
    query = z * turns
    key = z * torch.exp(1j * torch.as_tensor(rotary.theta) * d0) * turns
    query, key = (torch.cat([x.real, x.imag], dim=-1) for x in (query, key))
    found = observe(planted(query, key), rotary, sample(n, 60, 0))
    assert found["contribution"][0].argmax() == pair
    others = np.delete(found["contribution"][0], pair)
    assert np.abs(others).max() < 1e-6 < found["contribution"][0][pair]
    wavelength = rotary.wavelength[pair]
    peak = found["logit"][0].argmax()
    assert min((peak - d0) % wavelength, -(peak - d0) % wavelength) <= 1


def test_random_vectors_use_every_pair_alike_and_none_contributes():
    n = 1024
    rotary = Rotary(10000.0 ** -(np.arange(8) / 8), 1.0, np.arange(8), np.arange(8) + 8)
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 16, generator=rng, dtype=torch.double) * 0.3 for _ in range(2))
    found = observe(planted(query, key), rotary, sample(n, 128, 0))
    usage = found["query_norm"][0] * found["key_norm"][0]
    share = usage / usage.sum()
    assert np.abs(share - 1 / 8).max() < 4 * 0.03 / np.sqrt(8)
    assert np.abs(found["contribution"]).max() < 0.02


def test_sampled_rows_approach_all_rows():
    calls, found = captured(LlamaConfig(**TINY), n=600)
    every = observe(calls[0], found[0], sample(600, 10**6, 0))
    errors = []
    for queries in (16, 64, 256):
        gaps = [observe(calls[0], found[0], sample(600, queries, s))["sink"] - every["sink"] for s in range(6)]
        errors.append(np.sqrt(np.mean(np.square(gaps))))
    assert errors[0] > errors[1] > errors[2]
