"""From a model's name to a run folder: the same twice, the same after a kill, and one line for every mistake."""

import json
import shutil
import subprocess
import sys
from pydoc_data import topics

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from laid_eval.errors import UserError
from laid_eval.spectra import ARRAYS, SpectrumRun, load_spectrum
from laid_eval.spectrum.session import measure_spectrum
from laid_eval.spectrum.weights_session import measure_weights

TINY = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
PLAIN = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
KINDS = {
    "llama": LlamaConfig(**TINY),
    "sliding": MistralConfig(**TINY, sliding_window=32),
    "dynamic": LlamaConfig(**TINY, rope_parameters=DYNAMIC),
    "gpt2": GPT2Config(**PLAIN, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "bloom": BloomConfig(**PLAIN, hidden_size=32, n_layer=2, n_head=4),
    "bert": BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ),
}
QUICK = {"length": 256, "texts": 2, "queries": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm2):
    """Tiny random models on the disk, by kind."""
    root = tmp_path_factory.mktemp("models")
    for kind, config in KINDS.items():
        torch.manual_seed(0)
        model = BertForMaskedLM(config) if kind == "bert" else AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / kind)
        smollm2.tokenizer.save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def haystack(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(topics.topics[key] for key in ("assignment", "calls", "class")))
    return file


@pytest.fixture(scope="module")
def measured(models, haystack, tmp_path_factory):
    """One run with everything but windows."""
    return measure_spectrum(
        str(models / "llama"), **QUICK, haystack=[haystack], knockout="loss", what_if=("yarn:2",),
        out=tmp_path_factory.mktemp("run") / "run",
    )  # fmt: skip


def told(**arguments):
    """The one line of a refusal, and that nothing was left in the folder asked for."""
    with pytest.raises(UserError) as caught:
        measure_spectrum(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_holds_every_array_as_it_is_documented_and_nothing_left_over(measured):
    arrays = measured.arrays
    assert set(arrays) == {*ARRAYS, "what_if_0_predicted", "what_if_0_measured"}
    sizes = {"T": 2, "L": 2, "H": 4, "F": 4}
    for name, text in ARRAYS.items():
        letters = [x for x in text[1 : text.index(")")].replace(" ", "").split(",") if x]
        assert arrays[name].ndim == len(letters), name
        for letter, size in zip(letters, arrays[name].shape, strict=True):
            assert sizes.setdefault(letter, size) == size, name
    assert sorted(p.name for p in measured.path.iterdir()) == ["heads.csv", "run.json", "spectra.npz"]


def test_a_run_reads_back_as_it_was_written_and_has_units_and_finite_numbers(measured):
    header = load_spectrum(measured.path).header
    assert header == measured.header
    assert SpectrumRun.model_validate_json(header.model_dump_json()) == header
    text = (measured.path / "run.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert header.status == "complete"
    assert all(m.unit and m.definition for m in header.metrics)
    assert all(band.knockout.value is not None for band in header.bands)
    assert header.checks["logit_gap"] < 1e-4
    assert header.checks["mass_residual"] < 1e-4
    assert len(measured.heads) == 8
    assert header.metric("d50").unit == "tokens"
    with pytest.raises(UserError, match="holds no metric 'd51'; it holds: "):
        header.metric("d51")


def test_the_same_measurement_twice_gives_the_same_bytes(measured, models, haystack, tmp_path):
    again = measure_spectrum(
        str(models / "llama"), **QUICK, haystack=[haystack], knockout="loss", what_if=("yarn:2",), out=tmp_path / "run"
    )
    for name in ("spectra.npz", "heads.csv"):
        assert (again.path / name).read_bytes() == (measured.path / name).read_bytes(), name
    assert stable(again) == stable(measured)


def test_another_seed_gives_other_texts(measured, models, haystack, tmp_path):
    other = measure_spectrum(str(models / "llama"), **QUICK, haystack=[haystack], out=tmp_path / "run", seed=1)
    assert not np.array_equal(other.arrays["entropy"], measured.arrays["entropy"])


def stable(run):
    """A header without what two runs may differ in."""
    return run.header.model_dump(exclude={"created", "cost", "environment"})


def killed(at, **arguments):
    """A measurement that is interrupted when it comes to `at`."""

    def progress(step):
        if step.what.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_spectrum(**arguments, progress=progress)


@pytest.mark.parametrize("at", ["text 2", "heads", "loss without", "what if"])
def test_a_killed_run_goes_on_where_it_was(measured, models, haystack, tmp_path, at):
    arguments = {
        "model": str(models / "llama"), **QUICK, "haystack": [haystack], "knockout": "loss", "what_if": ("yarn:2",),
        "out": tmp_path / "run",
    }  # fmt: skip
    killed(at, **arguments)
    assert load_spectrum(tmp_path / "run").header.status == "partial"
    parts = list((tmp_path / "run" / "parts").iterdir())
    assert len(parts) == (1 if at == "text 2" else 2)
    steps = []
    whole = measure_spectrum(**arguments, progress=lambda step: steps.append(step.what))
    assert ("text 1 of 2" in steps, "text 2 of 2" in steps) == (False, at == "text 2")
    assert (whole.path / "spectra.npz").read_bytes() == (measured.path / "spectra.npz").read_bytes()
    assert (whole.path / "heads.csv").read_bytes() == (measured.path / "heads.csv").read_bytes()
    assert stable(whole) == stable(measured)
    steps.clear()
    measure_spectrum(**arguments, progress=lambda step: steps.append(step.what))
    assert not steps, "a finished run is not measured again"


@pytest.mark.parametrize("left", [0, 3, 200, -100])
def test_a_text_whose_file_was_torn_is_measured_again(measured, models, haystack, tmp_path, left):
    arguments = {"model": str(models / "llama"), **QUICK, "haystack": [haystack], "out": tmp_path / "run"}
    killed("heads", **arguments)
    part = tmp_path / "run" / "parts" / "text-0.npz"
    part.write_bytes(part.read_bytes()[:left])
    whole = measure_spectrum(**arguments)
    found, expected = whole.arrays, measured.arrays
    assert all(np.array_equal(found[name], expected[name], equal_nan=True) for name in found)


def test_a_student_killed_at_its_teacher_keeps_its_own_measurement(models, haystack, tmp_path):
    arguments = {
        "model": str(models / "llama"), "teacher": str(models / "sliding"), **QUICK, "haystack": [haystack],
        "out": tmp_path / "run",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        measure_spectrum(**arguments, progress=lambda step: interrupt(step.folder.name == "teacher"))
    assert load_spectrum(tmp_path / "run").header.status == "complete"
    steps = []
    run = measure_spectrum(**arguments, progress=lambda step: steps.append(step))
    assert {step.folder.name for step in steps if step.what.startswith(("text", "heads"))} == {"teacher"}
    assert run.header.teacher.name.endswith("sliding")
    assert {m.name for m in run.header.comparison} >= {"spectral_divergence", "key_mixing_r2"}
    steps.clear()
    again = measure_spectrum(**arguments, progress=lambda step: steps.append(step))
    assert not steps
    assert again.header == run.header


def interrupt(now):
    if now:
        raise KeyboardInterrupt


def test_a_model_without_rotary_pairs_has_its_attention_measured(models, haystack, tmp_path):
    run = measure_spectrum(str(models / "gpt2"), **QUICK, haystack=[haystack], out=tmp_path / "run")
    assert "the model has no rotary pairs: only its attention is analysed" in run.header.notes
    assert run.header.metric("far_mass").value > 0
    assert run.header.bands == run.header.coverage == ()
    assert {"usage", "logit", "moment"}.isdisjoint(run.arrays)
    assert load_spectrum(run.path).header == run.header


def test_a_sliding_window_is_seen_in_the_masses(models, haystack, tmp_path):
    """Nothing is attended beyond the window of 32 tokens, sinks included."""
    run = measure_spectrum(str(models / "sliding"), **QUICK, haystack=[haystack], out=tmp_path / "run")
    assert np.abs(run.arrays["profile"][..., 32:]).max() == 0
    assert np.abs(run.arrays["sink"]).max() == 0
    assert run.header.metric("far_mass").value < 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"length": 255}, "--length must be at least 256 tokens, got 255."),
        ("llama", {"length": -1}, "--length must be at least 256 tokens, got -1."),
        ("llama", {"length": 10**9}, "needs about"),
        ("llama", {"texts": 0}, "--texts must lie between 1 and 1000, got 0."),
        ("llama", {"queries": 7}, "--queries must be at least 8, got 7."),
        ("llama", {"confidence": 1.0}, "--confidence must lie between 0 and 1"),
        ("llama", {"seed": -1}, "--seed must lie between 0 and"),
        ("llama", {"what_if": ("yarm:2",)}, "--what-if 'yarm:2' can't be done"),
        ("llama", {"rope_scaling": "yarm:2"}, "--rope-scaling 'yarm:2' is not understood"),
        ("llama", {"teacher": "no/such"}, "Model 'no/such' can't be had"),
        ("llama", {"haystack": ["none.txt"]}, "Haystack file 'none.txt' can't be read"),
        ("dynamic", {"knockout": "loss"}, "--knockout needs rotary frequencies that stay as they are"),
        ("gpt2", {"what_if": ("yarn:2",)}, "--what-if needs rotary position embeddings"),
        ("gpt2", {"knockout": "loss"}, "--knockout needs rotary position embeddings"),
        (
            "gpt2",
            {"length": 513},
            "has learned positions for 512 tokens, --length asks for 513. Measure at --length 512",
        ),
        ("bloom", {}, "The attention of model 'bloom' (bloom) can't be seen: it does not go through"),
        ("bert", {}, "is a BertForMaskedLM, not a causal language model"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_a_mistake_gets_one_line_before_anything_is_measured(models, haystack, tmp_path, kind, options, message):
    arguments = {"model": str(models / kind), **QUICK, "haystack": [haystack], "out": tmp_path / "run", **options}
    assert message in told(**arguments, progress=lambda step: pytest.fail(f"measured {step.what}"))
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_a_text_shorter_than_the_length_is_refused(models, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Only this sentence. And this one.")
    message = told(model=str(models / "llama"), **QUICK, haystack=[short], out=tmp_path / "run")
    assert message.startswith("Haystack text 'short.txt' is too short: it has 8 tokens")
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_just_long_enough_serves_a_comparison_too(models, haystack, tmp_path):
    """Keys are mixed on no more than the length that was asked for."""
    words = haystack.read_text().split()
    tight = tmp_path / "tight.txt"
    tight.write_text(" ".join(words[:300]))
    run = measure_spectrum(
        str(models / "llama"), teacher=str(models / "llama"), **QUICK, haystack=[tight], out=tmp_path / "run"
    )
    assert "key_mixing_r2" in {m.name for m in run.header.comparison}


def test_folders_that_hold_something_else_are_left_alone(measured, models, haystack, tmp_path):
    arguments = {"model": str(models / "llama"), **QUICK, "haystack": [haystack]}
    other = tmp_path / "other"
    shutil.copytree(measured.path, other)
    before = {p.name: p.read_bytes() for p in other.iterdir()}
    for options in ({}, {"seed": 3}, {"model": str(models / "sliding")}):
        message = told(**arguments | options, out=other)
        assert "holds a spectrum of another model or with other settings" in message
    assert {p.name: p.read_bytes() for p in other.iterdir()} == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    assert "holds other files" in told(**arguments, out=tmp_path / "letters")
    assert "is a file" in told(**arguments, out=tmp_path / "letters" / "dear.txt")
    assert "can't be written" in told(**arguments, out="/proc/nowhere")


def damage(text):
    return text[: len(text) // 2]


def newer(text):
    return json.dumps(json.loads(text) | {"schema_version": 99})


def of_a_window(text):
    return json.dumps(json.loads(text) | {"command": "window"})


def without_settings(text):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "settings"})


def with_a_field_more(text):
    return json.dumps(json.loads(text) | {"mood": "good"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "is damaged"),
        (lambda _: "", "is damaged"),
        (lambda _: "[]", "is damaged"),
        (newer, "has schema version 99, this laid-eval reads up to"),
        (of_a_window, "is a window run, not a spectrum; read it with laid_eval.load_run"),
        (without_settings, "field 'settings'"),
        (with_a_field_more, "field 'mood'"),
    ],
)
def test_a_header_that_is_none_is_told_apart(measured, models, haystack, tmp_path, change, message):
    folder = tmp_path / "run"
    shutil.copytree(measured.path, folder)
    header = folder / "run.json"
    header.write_text(change(header.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_spectrum(folder)
    assert "\n" not in str(caught.value)
    assert message in told(model=str(models / "llama"), **QUICK, haystack=[haystack], out=folder)


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it holds no run\.json"):
        load_spectrum(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        load_spectrum(tmp_path / "nowhere")


@pytest.mark.parametrize("left", [None, 0, 3, 500, -500])
def test_torn_arrays_are_told(measured, tmp_path, left):
    folder = tmp_path / "run"
    shutil.copytree(measured.path, folder)
    for name in ("spectra.npz", "heads.csv"):
        file = folder / name
        file.unlink() if left is None else file.write_bytes(file.read_bytes()[:left])
    run = load_spectrum(folder)
    with pytest.raises(UserError, match=r"spectra.npz' can't be read \(\w+\); measure again"):
        _ = run.arrays
    if not left:
        with pytest.raises(UserError, match=r"heads.csv' can't be read \(\w+\); measure again"):
            _ = run.heads


def test_weights_alone_make_a_run_and_know_of_no_text(models, tmp_path):
    run = measure_weights(str(models / "llama"), out=tmp_path / "run")
    assert (run.header.settings.texts, run.header.settings.length) == (0, 1024)
    assert sum(band.usage.value for band in run.header.bands) == pytest.approx(1)
    assert load_spectrum(run.path).header == run.header
    assert run.header.cost.tokens == 0
    assert measure_weights(str(models / "llama"), out=tmp_path / "run").header.created == run.header.created
    with pytest.raises(UserError, match="holds a spectrum of another model or with other settings"):
        measure_spectrum(str(models / "llama"), length=1024, out=tmp_path / "run")


def test_weights_alone_of_a_model_without_rotary_pairs_are_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"No layer of this gpt2 model rotates|can't be found") as caught:
        measure_weights(str(models / "gpt2"), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


MEMORY = """
import json, multiprocessing, sys
import laid_eval, psutil, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from laid_eval.models.cost import peak_memory
from laid_eval.models.rotary import rotaries
from laid_eval.spectrum.collect import observe_text

torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=8, head_dim=4, max_position_embeddings=1 << 16,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval()

def grown(n):
    start = psutil.Process().memory_info().rss
    ids = torch.randint(3, 97, (n,)).tolist()
    observe_text(model, ids, rotaries(model, n), queries=64, seed=0, kernels=True)
    return peak_memory(torch.device("cpu")) - start

observe_text(model, list(range(3, 90)), rotaries(model, 87), queries=64, seed=0, kernels=True)
for n in map(int, sys.argv[1:]):  # a process each: a peak never falls
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(json.dumps(pool.apply(grown, (n,))), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted per process, in KiB, on Linux")
def test_memory_grows_no_faster_than_the_text():
    sizes = [2048, 4096, 8192]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, sizes)], capture_output=True, text=True, timeout=300, check=True
    )
    small, middle, large = (int(line) for line in done.stdout.split())
    assert large < 2.5 * middle < 6.25 * small, (small, middle, large)
    matrix = 8 * 8192**2 * 4  # all heads' attention, float32: what is never held
    assert large < matrix / 10, large / matrix
