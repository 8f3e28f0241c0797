"""Teacher against student: equal models are equal, and what is planted between two is found and nothing else."""

import shutil
from pydoc_data import topics

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, SmolLM3Config

from laid_eval.errors import UserError
from laid_eval.spectra import ARRAYS, load_spectrum, save_arrays
from laid_eval.spectrum.compare import compare_spectra, matched_layers
from laid_eval.spectrum.fourier import normalised
from laid_eval.spectrum.layout import far_bins
from laid_eval.spectrum.mixing import mix_keys, mixture
from laid_eval.spectrum.session import measure_spectrum

LENGTH, GAIN = 256, 1.5
TINY = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
SLOW = slice(3, 8)  # pairs with wavelengths from 64 tokens: what counts as low at 256 tokens
PERFECT = {
    "far_mass_preservation": 1.0,
    "spectral_divergence": 0.0,
    "frequency_leakage": 0.0,
    "low_frequency_utility": 1.0,
    "low_frequency_energy": 1.0,
    "usage_distance": 0.0,
    "usage_shift": 0.0,
    "low_frequency_gain": 0.0,
}


def louder(model):
    """Slow pairs of layer 1 times GAIN in queries and keys; nothing that layers hand on depends on it."""
    for side in ("q_proj", "k_proj"):
        weight = getattr(model.model.layers[1].self_attn, side).weight
        weight.view(-1, 2, 8, 64)[:, :, SLOW] *= GAIN  # heads, halves, pairs


def silent(model):
    """Layers hand on nothing of what their attention found."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()


def gpt2():
    return GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)


KINDS = {
    "llama": (LlamaConfig(**TINY), [silent]),
    "loud": (LlamaConfig(**TINY), [silent, louder]),
    "deep": (LlamaConfig(**TINY | {"num_hidden_layers": 5}), [silent]),
    "wide heads": (LlamaConfig(**TINY, head_dim=32), []),
    "fast": (LlamaConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 10.0}), []),
    "other tokens": (LlamaConfig(**TINY | {"vocab_size": 260}), []),
    "short": (LlamaConfig(**TINY | {"max_position_embeddings": 256}), [silent]),
    "nope": (SmolLM3Config(**TINY | {"num_hidden_layers": 4}), []),  # its last layer does not rotate
    "gpt2": (gpt2(), []),
}


def byte_tokenizer():
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, smollm2):
    return Lab(tmp_path_factory.mktemp("models"), smollm2.tokenizer)


class Lab:
    """Models saved to disk, each measured once."""

    def __init__(self, root, tokenizer):
        self.root, self.tokenizer = root, tokenizer
        self.text = root / "text.txt"
        self.text.write_text("\n\n".join(topics.topics[key] for key in ("assignment", "calls", "class")))

    def model(self, kind):
        folder = self.root / kind
        if not folder.exists():
            config, changes = KINDS[kind]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for change in changes:
                    change(model)
            model.save_pretrained(folder)
            (byte_tokenizer() if kind == "other tokens" else self.tokenizer).save_pretrained(folder)
        return str(folder)

    def run(self, kind, length=LENGTH, texts=2, **options):
        """One model alone, in a folder of its own that the next test finds again."""
        name = "-".join(map(str, [kind, length, texts, *options])).replace(" ", "-")
        return measure_spectrum(
            self.model(kind), length=length, texts=texts, queries=16, haystack=[self.text],
            out=self.root / f"run-{name}", **options,
        )  # fmt: skip

    def against(self, student, teacher, out, **options):
        """Student and teacher with their keys; what is known of either is not measured again."""
        shutil.copytree(self.run(student).path, out)
        shutil.copytree(self.run(teacher).path, out / "teacher")
        return measure_spectrum(
            self.model(student), teacher=self.model(teacher), length=LENGTH, texts=2, queries=16,
            haystack=[self.text], out=out, **options,
        )  # fmt: skip


def values(found):
    return {m.name: m.value for m in found}


def altered(run, folder, change):
    """The run with other arrays."""
    shutil.copytree(run.path, folder)
    save_arrays(folder / "spectra.npz", run.arrays | change(run.arrays))
    return load_spectrum(folder)


@pytest.mark.parametrize("kind", ["llama", "nope"])
def test_a_model_is_its_own_perfect_student(lab, tmp_path, kind):
    run = lab.against(kind, kind, tmp_path / "run")
    found = {m.name: m for m in run.header.comparison}
    assert set(found) == {*PERFECT, "key_mixing_r2", "key_mixing_r2_low"}
    for name, perfect in PERFECT.items():
        assert found[name].value == pytest.approx(perfect, abs=1e-9), name
        assert found[name].p == 1.0, name
    assert found["key_mixing_r2"].value == pytest.approx(1, abs=1e-6)
    assert found["key_mixing_r2"].floor < 0.5
    with np.load(run.path / "comparison.npz") as arrays:
        rotating = ~np.isnan(run.arrays["theta"]).all(axis=1)
        assert np.abs(arrays["gain_db"][rotating]).max() == 0
    assert run.header.teacher.fingerprint == run.header.model.fingerprint
    assert load_spectrum(run.path).header == run.header


def test_a_louder_band_is_found_in_its_layer_and_nowhere_else(lab):
    found = compare_spectra(lab.run("loud"), lab.run("llama"))
    gain = found.arrays["gain_db"]
    expected = np.zeros_like(gain)
    expected[1, SLOW] = 20 * np.log10(GAIN)
    np.testing.assert_allclose(gain, expected, atol=1e-3)
    assert values(found.measures)["low_frequency_gain"] == pytest.approx(20 * np.log10(GAIN) / 3, abs=1e-3)
    assert values(found.measures)["usage_shift"] > 0.1
    back = compare_spectra(lab.run("llama"), lab.run("loud"))
    np.testing.assert_allclose(back.arrays["gain_db"], -expected, atol=1e-3)
    assert values(back.measures)["low_frequency_energy"] < values(found.measures)["low_frequency_energy"]


def test_what_is_left_of_far_mass_is_what_is_preserved(lab, tmp_path):
    run, kept, far = lab.run("llama"), 0.3, far_bins(LENGTH, 8)

    def drawn_near(arrays):
        octave = arrays["octave"].astype(np.float64)
        octave[..., 1] += (1 - kept) * octave[..., far].sum(-1)
        octave[..., far] *= kept
        return {"octave": octave}

    found = compare_spectra(altered(run, tmp_path / "near", drawn_near), run)
    assert values(found.measures)["far_mass_preservation"] == pytest.approx(kept, abs=1e-6)


def test_leakage_is_the_low_share_that_the_teacher_has_more(lab, tmp_path):
    run = lab.run("llama")

    def only_low(arrays):
        return {"power": np.broadcast_to(arrays["frequencies"] <= 8 / LENGTH, arrays["power"].shape).astype(np.float32)}

    def flat(arrays):
        return {"power": np.ones_like(arrays["power"])}

    low = only_low(run.arrays)["power"][0, 0, 0].mean()
    teacher, student = altered(run, tmp_path / "low", only_low), altered(run, tmp_path / "flat", flat)
    assert values(compare_spectra(student, teacher).measures)["frequency_leakage"] == pytest.approx(1 - low)
    assert values(compare_spectra(teacher, student).measures)["frequency_leakage"] == 0


def test_usage_moved_by_a_pair_is_a_shift_of_its_octaves(lab, tmp_path):
    run = lab.run("llama")

    def moved(arrays):
        usage = arrays["usage"].copy()
        usage[..., -1] = 0
        return {"usage": usage}

    def moved_down(arrays):
        return {"usage": np.roll(moved(arrays)["usage"], 1, axis=-1)}

    octaves = np.log2(10000) / 8  # between neighbouring pairs
    found = compare_spectra(altered(run, tmp_path / "a", moved), altered(run, tmp_path / "b", moved_down))
    assert values(found.measures)["usage_shift"] == pytest.approx(-octaves, rel=1e-5)
    assert values(found.measures)["usage_distance"] == pytest.approx(octaves, rel=1e-5)


def test_a_difference_of_all_layers_is_significant_and_that_of_texts_alone_is_not(lab, tmp_path):
    """Eight layers of three texts, drawn alike for student and teacher, then with less far mass in the student."""
    run, rng = lab.run("llama"), np.random.default_rng(0)

    def wide(arrays):
        """The first text and layer over and over."""
        out = {}
        for name, x in arrays.items():
            if ARRAYS[name].startswith("(T, L"):
                out[name] = np.tile(x[:1, :1], (4, 8, *[1] * (x.ndim - 2)))
            elif ARRAYS[name].startswith("(L"):
                out[name] = np.tile(x[:1], (8, *[1] * (x.ndim - 1)))
        return out

    def drawn(keep):
        def arrays(own):
            mass = rng.gamma(20, size=(4, 8, 4, own["octave"].shape[-1]))
            mass[..., far_bins(LENGTH, 8)] *= keep
            return wide(own) | {"octave": normalised(mass)}

        return arrays

    student, alike, reaching = (
        altered(run, tmp_path / name, drawn(keep)) for name, keep in [("a", 1.0), ("b", 1.0), ("c", 3.0)]
    )
    far = {
        kind: next(m for m in compare_spectra(student, teacher).measures if m.name == "far_mass_preservation")
        for kind, teacher in [("alike", alike), ("reaching", reaching)]
    }
    assert far["alike"].p > 0.05
    assert far["reaching"].p == 1 / 2**8
    assert far["reaching"].value < far["reaching"].floor - 0.1 < far["alike"].value


def test_models_with_other_heads_or_without_pairs_are_compared_as_far_as_possible(lab, tmp_path):
    attention = {"far_mass_preservation", "spectral_divergence", "frequency_leakage"}
    heads = lab.against("llama", "wide heads", tmp_path / "heads")
    assert set(values(heads.header.comparison)) == attention | {"low_frequency_utility", "low_frequency_energy"}
    assert "rotary frequencies or head sizes differ: keys are not mixed" in heads.header.notes
    for student, teacher in [("llama", "gpt2"), ("gpt2", "llama")]:
        run = lab.against(student, teacher, tmp_path / student)
        assert set(values(run.header.comparison)) == attention
        assert "one of the models has no rotary pairs: only attention is compared" in run.header.notes
        assert not any("tokenizers" in note for note in run.header.notes)
        assert load_spectrum(run.path).header == run.header


def test_models_that_read_other_tokens_are_compared_but_for_their_keys(lab, tmp_path):
    run = lab.against("llama", "other tokens", tmp_path / "run")
    assert set(values(run.header.comparison)) == set(PERFECT)
    assert "tokenizers differ: keys are not compared token by token" in run.header.notes


def test_keys_of_models_that_claim_other_lengths_are_still_mixed(lab, tmp_path):
    run = lab.against("llama", "short", tmp_path / "run")
    assert values(run.header.comparison)["key_mixing_r2"] == pytest.approx(1, abs=1e-6)


def test_without_slow_pairs_there_is_no_low_gain_and_no_made_up_number(lab):
    found = compare_spectra(lab.run("fast"), lab.run("fast"))
    assert set(values(found.measures)) == set(PERFECT) - {
        "low_frequency_gain",
        "low_frequency_energy",
        "low_frequency_utility",
    }
    assert np.isfinite([m.value for m in found.measures]).all()
    assert found.notes == ("no rotary pair has a wavelength from 64 tokens: nothing of low frequency is compared",)


def test_layers_that_do_not_rotate_neither_help_nor_harm(lab, tmp_path):
    """What the one still layer holds counts for nothing: the mean is that of the others."""
    run = lab.run("nope")

    def halved(arrays):
        return {"utility": arrays["utility"] / 2}

    found = values(compare_spectra(altered(run, tmp_path / "half", halved), run).measures)
    assert found["low_frequency_utility"] == pytest.approx(0.5, rel=1e-5)


def test_layers_are_matched_by_relative_depth(lab):
    assert matched_layers(1, 7).tolist() == [0]
    assert matched_layers(5, 3).tolist() == [0, 0, 1, 2, 2]
    for s in range(2, 9):
        for t in range(1, 9):
            match = matched_layers(s, t)
            assert (match[0], match[-1]) == (0, t - 1)
            assert (np.diff(match) >= 0).all()
    deep, small = compare_spectra(lab.run("deep"), lab.run("llama")), compare_spectra(lab.run("llama"), lab.run("deep"))
    assert deep.arrays["gain_db"].shape == (5, 8)
    assert small.arrays["gain_db"].shape == (3, 8)


def test_one_text_has_no_floor_and_no_interval(lab):
    run = lab.run("llama", texts=1)
    for measure in compare_spectra(run, run).measures:
        assert (measure.low, measure.high, measure.floor, measure.p) == (None,) * 4


def test_runs_with_predictions_in_them_are_compared_like_any_other(lab):
    run = lab.run("deep", what_if=("yarn:2",))
    assert values(compare_spectra(lab.run("llama"), run).measures)["far_mass_preservation"] > 0.5


def test_runs_of_other_lengths_are_refused(lab):
    with pytest.raises(UserError, match="was measured at 256 tokens, the teacher at 320") as caught:
        compare_spectra(lab.run("llama"), lab.run("llama", length=320))
    assert "\n" not in str(caught.value)


def keys(rng, heads, tokens=400, pairs=8):
    """Heads of different strength whose pairs vary."""
    z = rng.normal(size=(heads, tokens, pairs)) + 1j * rng.normal(size=(heads, tokens, pairs))
    return z * rng.uniform(0.5, 2, size=(heads, 1, pairs))


def test_a_known_mixture_of_teacher_heads_is_recovered():
    rng = np.random.default_rng(0)
    teacher, other = keys(rng, 4), keys(rng, 4)
    weights = rng.normal(size=(3, 4))
    student = np.einsum("gh,hnf->gnf", weights, teacher)
    np.testing.assert_allclose(mixture(student, teacher), weights, atol=1e-4)
    low = np.arange(8) >= 5
    found = mix_keys([student], [teacher], [other], low[None], 400)
    np.testing.assert_allclose([found.by_layer[0], found.low[0], *found.by_pair[0]], 1.0, atol=1e-6)
    assert found.floor[0] < 0.05


def test_what_no_mixture_can_give_is_missing_from_the_share_and_from_its_pair_alone():
    """Noise as strong as the keys, on one pair of the student: half of that pair's energy is out of reach."""
    rng = np.random.default_rng(1)
    teacher = keys(rng, 4, tokens=4000)
    student = np.einsum("gh,hnf->gnf", rng.normal(size=(3, 4)), teacher)
    noise = rng.normal(size=student.shape[:2]) + 1j * rng.normal(size=student.shape[:2])
    size = np.sqrt((np.abs(student[..., 6]) ** 2).mean(axis=1) / (np.abs(noise) ** 2).mean(axis=1))
    student[..., 6] += noise * size[:, None]
    found = mix_keys([student], [teacher], [keys(rng, 4, tokens=4000)], (np.arange(8) == 6)[None], 4000)
    assert found.by_pair[0, 6] == pytest.approx(0.5, abs=0.05)
    assert found.low[0] == pytest.approx(found.by_pair[0, 6])
    np.testing.assert_allclose(np.delete(found.by_pair[0], 6), 1.0, atol=1e-2)


def test_a_mixture_is_judged_on_tokens_it_was_not_fitted_to():
    """Keys of chance, many teacher heads, few tokens: what is explained of the fitted half is not of the other."""
    rng = np.random.default_rng(2)
    student, teacher = keys(rng, 1, tokens=16), keys(rng, 60, tokens=16)
    found = mix_keys([student], [teacher], [teacher], np.ones((1, 8), dtype=bool), 400)
    assert found.by_layer[0] < 0.1
