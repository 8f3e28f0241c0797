"""Frequencies changed: predictions meet what a forward pass shows, and the model is left as it was."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from laid_eval.errors import UserError
from laid_eval.models.frame import frame_of
from laid_eval.models.rotary import rotaries
from laid_eval.spectrum.causes import knockout_losses, predicted_logit, rescaled, what_if
from laid_eval.spectrum.collect import finish, observe_text
from laid_eval.spectrum.layout import BANDS
from laid_eval.spectrum.texts import prose
from laid_eval.window.haystack import load_corpus

N = 400
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
GEMMA = {
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
MODELS = {
    "llama": LlamaConfig(**TINY),
    "yarn": LlamaConfig(**TINY, rope_parameters=YARN),
    "gemma3": Gemma3TextConfig(**TINY | GEMMA),
}
IDS = torch.randint(3, 97, (N,), generator=torch.Generator().manual_seed(3)).tolist()


def sharp(config):
    """A random model whose attention is far from even."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module", params=MODELS)
def measured(request):
    model = sharp(MODELS[request.param])
    rotary = rotaries(model, N)
    part = observe_text(model, IDS, rotary, queries=16, seed=0, kernels=True)
    return request.param, model, rotary, finish([part], rotary, N)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits


def test_at_its_own_frequencies_a_model_is_predicted_as_it_was_measured(measured):
    _, _, rotary, arrays = measured
    # moments hold the factor of the model's own module already
    own = np.array([r.factor**2 for r in rotary])[:, None, None]
    found = predicted_logit(arrays, rotary) / own
    seen = arrays["logit"][..., arrays["distances"]]
    np.testing.assert_allclose(found, seen, atol=1e-5 * np.abs(seen).max())


@pytest.mark.parametrize("scaling", ["yarn:2", "linear:3", "base:4"])
def test_the_prediction_is_exact_where_inputs_do_not_change_and_the_model_is_left_as_it_was(measured, scaling):
    kind, model, rotary, arrays = measured
    if scaling == "base:4" and kind == "gemma3":  # two bases: refused
        with pytest.raises(UserError, match="one rotary base"):
            what_if(model, scaling, IDS, arrays, rotary)
        return
    before = logits(model)
    record, predicted, seen = what_if(model, scaling, IDS, arrays, rotary)
    assert record.first_layer_error < 1e-5
    assert record.change > 1e-3, "the scaling must do something for the prediction to mean anything"
    own = np.array([r.factor**2 for r in rotary])[:, None, None]
    still = predicted_logit(arrays, rotary) / own
    assert np.abs(predicted - seen)[0].max() < 1e-3 * np.abs(still - seen)[0].max()
    assert torch.equal(logits(model), before)


def test_a_scaling_that_changes_nothing_yet_is_foretold_to_change_nothing():
    """Dynamic scaling sets in beyond the claimed length: at a shorter one rounding is all there is."""
    model = sharp(MODELS["llama"])
    rotary = rotaries(model, N)
    arrays = finish([observe_text(model, IDS, rotary, queries=8, seed=0, kernels=True)], rotary, N)
    record, _, _ = what_if(model, "dynamic:2", IDS, arrays, rotary)
    assert record.change < 1e-5
    assert record.agreement is None or record.agreement == 1.0


def test_a_larger_base_stretches_the_longest_wavelength_and_leaves_the_shortest():
    model = sharp(MODELS["llama"])
    (before, _) = rotaries(model, N)
    with rescaled(model, "base:4"):
        (inside, _) = rotaries(model, N)
    stretch = inside.wavelength / before.wavelength
    assert stretch[0] == pytest.approx(1, abs=1e-6)
    assert stretch[-1] == pytest.approx(4, rel=1e-5)
    assert (np.diff(stretch) > 0).all()


@pytest.mark.parametrize("scaling", ["yarm:2", "yarn", "yarn:0.5", "base:0", "base:x", "base:-1", ""])
def test_a_scaling_that_is_none_is_refused_by_the_name_of_its_option(scaling):
    model = sharp(MODELS["llama"])
    before = logits(model)
    with pytest.raises(UserError, match=r"^--what-if '") as caught, rescaled(model, scaling):
        pass
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


def test_a_model_without_rotary_pairs_can_not_be_rescaled():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for scaling in ("yarn:2", "base:2"):
        with pytest.raises(UserError, match="--what-if"), rescaled(model, scaling):
            pass


def test_a_model_is_itself_again_after_something_went_wrong_inside():
    model = sharp(MODELS["llama"])
    before = logits(model)

    def interrupted():
        with rescaled(model, "linear:2"):
            assert not torch.equal(logits(model), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits(model), before)


def test_only_bands_that_the_model_uses_are_missed_when_knocked_out():
    """Pairs whose queries are zero in every layer can stop turning at no cost; others can not."""
    model = sharp(MODELS["llama"])
    silent = slice(2, 4)  # wavelengths 63 and 199
    wavelength = rotaries(model, N)[0].wavelength
    assert [16 < wavelength[1] < 64, 16 < wavelength[2] < 64, 64 < wavelength[3] < 256] == [True] * 3
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.view(4, 2, 8, 64)[:, :, silent] = 0
    before = logits(model)
    rise = knockout_losses(model, [IDS, IDS[::-1]], list(pairwise(BANDS))[:3])
    assert set(rise) == {0.0, 16.0, 64.0}
    assert np.abs(rise[64.0]).max() == 0
    for low in (0.0, 16.0):
        assert np.abs(rise[low]).min() > 1e-6
    assert torch.equal(logits(model), before)


def test_a_real_model_needs_its_fastest_pairs_and_is_unharmed_afterwards(smollm2):
    (ids,), _ = prose(load_corpus(), frame_of(smollm2.tokenizer), 256, 1, seed=0)
    short = torch.tensor([ids[:32]])
    with torch.no_grad():
        before = smollm2.model(short).logits
        rise = knockout_losses(smollm2.model, [ids], list(pairwise(BANDS)))
        assert torch.equal(smollm2.model(short).logits, before)
    assert rise[0.0][0] > 0.05
    assert rise[0.0][0] == max(values[0] for values in rise.values())
