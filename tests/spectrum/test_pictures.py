"""Spectra on pictures: every statistic equals the slow way, text alone is one axis, and a run holds what it says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from laid_eval.errors import UserError
from laid_eval.models.capture import capture
from laid_eval.models.picture_frame import Piece
from laid_eval.models.positions import counted_positions, is_picture, positions_held_to
from laid_eval.models.rotary import rotaries
from laid_eval.spectra import ARRAYS, PICTURE_ARRAYS, SpectrumRun, SpectrumSettings, load_spectrum
from laid_eval.spectrum.collect import observe_text
from laid_eval.spectrum.distance import octave_edges
from laid_eval.spectrum.layout import SINKS, far_distance, stationary_width
from laid_eval.spectrum.observe import observe, pair_norms, sample
from laid_eval.spectrum.observe_pictures import LAST, position_rows, sights
from laid_eval.spectrum.picture_measure import observe_prompt
from laid_eval.spectrum.picture_summary import audit, axis_names, axis_shares
from laid_eval.spectrum.pictures import plan_gallery
from laid_eval.spectrum.session import measure_spectrum

families_file = Path(__file__).parent.parent / "models" / "vision_families.py"
spec = importlib.util.spec_from_file_location("vision_families", families_file)
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
make = families.make

IMAGES = 30
QUICK = {"images": IMAGES, "texts": 2, "queries": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models on the disk, by family."""
    root = tmp_path_factory.mktemp("models")

    def folder(family):
        path = root / family
        if not path.exists():
            model, processor = make(family)
            model.save_pretrained(path)
            processor.save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3"])
def seen(request, folders):
    """A tiny model that was shown a haystack: what was taken, and its own eager attention."""
    from laid_eval.models.load import describe, load_vision
    from laid_eval.models.source import resolve

    described = describe(resolve(folders(request.param)), device="cpu")
    gallery = plan_gallery(described, IMAGES, 1, 0)
    model = load_vision(described, gallery.processor).model
    prompt, n = gallery.prompt(0), gallery.lengths[0]
    settings = SpectrumSettings(
        length=n, texts=1, queries=10**6, haystack=None, haystack_hash=None, confidence=0.95, seed=0, knockout="no",
        what_if=(),
    )  # fmt: skip
    found = observe_prompt(model, prompt, rotaries(model, gallery.reach), settings, 0, gallery.reach)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        out = model(**prompt.piece.on(model), use_cache=False, output_attentions=True)
    p = torch.stack(out.attentions)[:, 0].double().numpy()  # (L, H, N, N)
    return request.param, model, gallery, prompt, found, p


def by_type(prompt, model):
    """(N,) which tokens are picture; rows of the second half that are text, that are picture."""
    image = is_picture(model, prompt.piece.ids).numpy()
    rows = np.arange(len(image) // 2, len(image))
    return image, (rows[~image[rows]], rows[image[rows]])


def test_attention_by_type_of_token_is_that_of_the_eager_model(seen):
    _, model, _, prompt, found, p = seen
    image, rows = by_type(prompt, model)
    n = len(image)
    far = far_distance(n, 4)
    for q, chosen in enumerate(rows):
        mass, share = np.zeros((*p.shape[:2], 2)), np.zeros((len(p), 2))
        distant = np.zeros(p.shape[:2])
        for i in chosen:
            for j in range(SINKS, n):
                mass[..., int(image[j])] += p[:, :, i, j] / len(chosen)
                distant += p[:, :, i, j] / len(chosen) * (i - j >= far)
            visible = p[:, 0, i, SINKS:] > 0
            for k, kind in enumerate((~image[SINKS:], image[SINKS:])):
                share[:, k] += (visible & kind).sum(1) / visible.sum(1) / len(chosen)
        np.testing.assert_allclose(found["type_mass"][:, :, q], mass, atol=1e-5)
        np.testing.assert_allclose(found["type_far"][:, :, q], distant, atol=1e-5)
        np.testing.assert_allclose(found["type_share"][:, q], share, atol=1e-5)
        np.testing.assert_allclose(found["type_sink"][:, :, q], p[:, :, chosen, :SINKS].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["type_mass"].sum(-1) + found["type_sink"], 1, atol=1e-5)


def test_attention_by_picture_is_that_of_the_eager_model(seen):
    _, model, gallery, prompt, found, p = seen
    image, _ = by_type(prompt, model)
    last = p[:, :, -LAST:].mean(2)
    for k, (start, end) in enumerate(prompt.spans.tolist()):
        own = [j for j in range(start, end) if image[j]]
        assert own
        np.testing.assert_allclose(found["image_mass"][..., k], last[..., own].sum(-1), atol=1e-5)
        shares = [len(own) / (len(image) - SINKS - LAST + 1 + row) for row in range(LAST)]
        np.testing.assert_allclose(found["image_share"][:, k], np.mean(shares), atol=1e-5)
    assert found["needle"] == gallery.asked[0].question.needle
    words = gallery.processor.tokenizer.decode(prompt.piece.ids[0, prompt.spans[-1, 1] :])
    anchor = next(g.anchor for g in gallery.stories[0].groups if g.images == (found["needle"],))
    assert anchor in words, "the question is about the needle's picture"


def test_attention_by_distance_in_tokens_and_in_positions_is_that_of_the_eager_model(seen):
    _, model, gallery, prompt, found, p = seen
    n = p.shape[-1]
    w, positions = stationary_width(n), counted_positions(model, prompt.piece).numpy()
    rows = sample(n, 10**6, 0).rows.numpy()
    bins = found["position_octave"].shape[-1]
    profile, ahead = np.zeros((*p.shape[:2], w)), np.zeros(p.shape[:2])
    octave = np.zeros(found["position_octave"].shape)
    for i in rows:
        for j in range(n):
            if j > i:
                ahead += p[:, :, i, j]
            elif i - j < w:
                profile[..., i - j] += p[:, :, i, j]
            for axis, line in enumerate(positions if j >= SINKS else []):
                back = int(line[i] - line[j])
                octave[:, :, axis, bins - 1 if back < 0 else back.bit_length()] += p[:, :, i, j]
    np.testing.assert_allclose(found["profile"].mean(1), profile / len(rows), atol=1e-5)
    np.testing.assert_allclose(found["ahead"], ahead / len(rows), atol=1e-5)
    np.testing.assert_allclose(found["position_octave"], octave / len(rows), atol=1e-5)
    total = found["profile"].mean(1).sum(-1) + found["tail"] + found["sink"] + found["ahead"]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert gallery.reach == positions.max() + 1


def test_only_a_family_whose_pictures_see_themselves_looks_ahead(seen):
    family, *_, found, _ = seen
    assert (found["ahead"].max() > 1e-3) == (family == "gemma3")


def test_pairs_are_unrotated_by_the_positions_of_their_own_axis(seen):
    """In the first layer a prompt whose tokens all stand at the same place has the un-rotated vectors."""
    _, model, gallery, prompt, *_ = seen
    positions = counted_positions(model, prompt.piece)
    embedded = torch.randn(1, positions.shape[1], 32, generator=torch.Generator().manual_seed(3))
    means = []
    for given in (positions, positions * 0):
        calls = []
        with torch.inference_mode(), capture(model, calls.append):
            where = given[:, None] if len(given) > 1 else given
            model.get_decoder()(inputs_embeds=embedded, position_ids=where, use_cache=False)
        means.append(pair_norms(calls[0], rotaries(model, gallery.reach)[0], given))
    for name in means[0]:
        torch.testing.assert_close(means[0][name], means[1][name], atol=1e-5, rtol=1e-4)


def test_positions_are_those_the_rotary_module_is_given_or_the_model_is_refused(seen):
    _, model, _, prompt, *_ = seen
    positions = counted_positions(model, prompt.piece)
    other = positions.clone()
    other[-1, 40] += 1
    with torch.inference_mode():
        with positions_held_to(model, positions):
            model(**prompt.piece.on(model), use_cache=False)
        with (
            pytest.raises(UserError, match="rotates by other positions than it counts"),
            positions_held_to(model, other),
        ):
            model(**prompt.piece.on(model), use_cache=False)
        model(**prompt.piece.on(model), use_cache=False)  # nothing of the check is left


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_alone_is_one_axis(family):
    model, _ = make(family)
    ids, n = list(range(100, 228)), 128
    rotary = rotaries(model, n)
    plain = observe_text(model, ids, rotary, queries=16, seed=0, kernels=False)
    positions = counted_positions(model, Piece(torch.tensor([ids]), {}))
    assert torch.equal(positions, torch.arange(n).expand(3, n))
    plan, calls = sample(n, 16, 0, positions=positions), []
    with torch.inference_mode(), capture(model, calls.append), positions_held_to(model, positions):
        model(torch.tensor([ids]), use_cache=False)
    for row, call in enumerate(calls):
        for name, x in observe(call, rotary[call.layer], plan, kernels=False).items():
            np.testing.assert_allclose(x, plain[name][row], atol=1e-6, err_msg=name)
        where = sights(torch.arange(n) % 2 == 0, torch.zeros(0, 2, dtype=torch.long), 8, 0, 32, n)
        t, h, w = position_rows(call, plan, where).unbind(1)
        assert torch.equal(t, h)
        assert torch.equal(t, w)
        edges = octave_edges(plan.width)
        near = plain["profile"][row].mean(0)
        for b in range(1, 5):  # whole octaves that no sink lies in
            inside = near[:, edges[b] : edges[b + 1]].sum(-1)
            np.testing.assert_allclose(t[:, b].numpy(), inside, atol=1e-5)


def test_rows_moved_along_an_axis_move_the_mass_of_that_axis_alone(folders):
    """Other rows of the pictures (their h positions in another order) change the profile along h, not along t or w."""
    model, _ = make("qwen2_5_vl")
    n = 120
    calls = []
    with torch.inference_mode(), capture(model, calls.append):
        model(torch.arange(100, 100 + n)[None], use_cache=False)
    positions = torch.arange(n).expand(3, n).clone()
    where = sights(torch.arange(n) % 2 == 0, torch.zeros(0, 2, dtype=torch.long), 8, 0, 32, n)
    before = position_rows(calls[0], sample(n, 16, 0, positions=positions), where)
    positions[1, 40:80] = positions[1, 40:80].flip(0)
    after = position_rows(calls[0], sample(n, 16, 0, positions=positions), where)
    changed = (before - after).abs().amax(dim=(0, 2))
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() == 0


@pytest.mark.parametrize(("family", "axes"), [("qwen2_5_vl", "thww"), ("qwen3_vl", "thwthwtt"), ("smolvlm", None)])
def test_a_run_holds_what_it_says(folders, tmp_path, family, axes):
    run = measure_spectrum(folders(family), **QUICK, out=tmp_path / "run")
    arrays, header = run.arrays, run.header
    documented = {**ARRAYS, **PICTURE_ARRAYS}
    assert set(arrays) == set(documented) - {"logit", "moment", "rms"}
    sizes = {"T": 2, "L": 2, "H": 4, "I": IMAGES}
    for name in arrays:
        text = documented[name]
        letters = [x for x in text[1 : text.index(")")].replace(" ", "").split(",") if x]
        for letter, size in zip(letters, arrays[name].shape, strict=True):
            assert sizes.setdefault(letter, size) == (size if not letter.isdigit() else int(letter)), name
    assert {"".join(row) for row in arrays["axis"]} == ({axes} if axes else {"text" * 8})
    assert load_spectrum(run.path).header == header == SpectrumRun.model_validate_json(header.model_dump_json())
    assert sum(a.usage.value for a in header.pictures.axes) == pytest.approx(1)
    assert sum(a.even for a in header.pictures.axes) == pytest.approx(1)
    assert all(a.usage.low <= a.usage.value <= a.usage.high for a in header.pictures.axes)
    whole = np.nansum(arrays["contribution"], axis=-1).mean()
    assert sum(a.contribution.value for a in header.pictures.axes) == pytest.approx(whole, abs=1e-5)
    assert [(t.query, t.key) for t in header.pictures.types][1] == ("text", "image")
    assert header.checks["mass_residual"] < 1e-4
    audited = header.pictures.audit
    assert audited.monotone
    assert audited.picture_tokens * IMAGES < audited.tokens
    assert (audited.positions < audited.tokens) == bool(axes)
    assert audited.counted == ("get_rope_index" if axes else "slots")
    assert audited.transformers == header.environment["transformers"]
    assert header.metric("needle_share").value == pytest.approx(1 / IMAGES)
    assert {"image_mass", "needle"} <= set(run.heads)
    assert measure_spectrum(folders(family), **QUICK, out=tmp_path / "run").header == header


def test_a_killed_run_goes_on_where_it_was(folders, tmp_path):
    whole = measure_spectrum(folders("qwen2_5_vl"), **QUICK, out=tmp_path / "whole")

    def killed(step):
        if step.what.startswith("haystack 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_spectrum(folders("qwen2_5_vl"), **QUICK, out=tmp_path / "run", progress=killed)
    steps = []
    run = measure_spectrum(
        folders("qwen2_5_vl"), **QUICK, out=tmp_path / "run", progress=lambda s: steps.append(s.what)
    )
    assert set(steps) == {"haystack 2 of 2"}
    assert (run.path / "spectra.npz").read_bytes() == (whole.path / "spectra.npz").read_bytes()


def test_a_teacher_that_is_the_student_is_its_equal(folders, tmp_path):
    model = folders("qwen2_5_vl")
    run = measure_spectrum(model, teacher=model, **QUICK, out=tmp_path / "run")
    found = {m.name: m.value for m in run.header.comparison}
    for name in ("axis_usage_overlap", "image_mass_overlap", "far_mass_preservation"):
        assert found[name] == pytest.approx(1)
    assert found["usage_distance"] == pytest.approx(0, abs=1e-9)
    assert any("keys are not mixed" in note for note in run.header.notes)


def test_a_teacher_of_another_family_is_compared_or_refused_in_one_line(folders, tmp_path):
    other = measure_spectrum(folders("qwen2_5_vl"), teacher=folders("qwen3_vl"), **QUICK, out=tmp_path / "run")
    found = {m.name: m.value for m in other.header.comparison}
    assert 0 < found["axis_usage_overlap"] < 1
    with pytest.raises(UserError, match="can't be compared on pictures: 30 of them"):
        measure_spectrum(folders("qwen2_5_vl"), teacher=folders("smolvlm"), **QUICK, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "--images must be at least 4 pictures, got 0."),
        ({"images": 4}, "too few for a spectrum. Measure with --images"),
        ({"images": 10**7}, "'.*' has 4,096. Measure with --images"),
        ({"length": 300}, "can't be combined with --length or --haystack"),
        ({"knockout": "loss"}, "--knockout is tried on text, not on pictures"),
        ({"what_if": ("yarn:2",)}, "--what-if is tried on text, not on pictures"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_a_mistake_gets_one_line_before_anything_is_measured(folders, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        measure_spectrum(folders("qwen2_5_vl"), **{**QUICK, **options}, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_named_as_enough_or_as_possible_is(folders):
    """The number of pictures that a refusal names is one that is measured."""
    from laid_eval.models.load import describe
    from laid_eval.models.source import resolve

    described = describe(resolve(folders("qwen2_5_vl")), device="cpu")
    for images in (4, 10**6):
        with pytest.raises(UserError) as caught:
            plan_gallery(described, images, 2, 0)
        named = int(str(caught.value).split("Measure with --images ")[1].split()[0])
        assert plan_gallery(described, named, 2, 0).images == named


def test_an_audit_sees_positions_that_fall_back():
    spans = np.array([[4, 8], [8, 12]])
    line = np.array([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9])
    good = audit([np.stack([line] * 3)], spans, "5", counted=True)
    assert good.monotone
    assert good.picture_steps == (2,)
    assert (good.tokens, good.positions, good.picture_tokens) == (14, 10, 4)
    back = line.copy()
    back[12:] -= 3
    bad = audit([np.stack([line, line, back])], spans, "5", counted=True)
    assert not bad.monotone
    assert bad.hash != good.hash


def test_usage_and_contribution_add_up_by_axis():
    """Planted usage: each pair's own share, in layers of one axis order, pairs that do not turn apart."""
    from laid_eval.models.rotary import Rotary

    theta = np.array([1.0, 0.5, 0.25, 0.0])
    rotary = Rotary(theta, 1.0, np.arange(4), np.arange(4) + 4, ("t", "h", "w", "w"))
    axis = axis_names([rotary, None], [0, 1], 4)
    assert axis.tolist() == [["t", "h", "w", "none"], [""] * 4]
    usage = np.full((2, 2, 3, 4), np.nan)
    usage[:, 0] = [1.0, 2.0, 3.0, 4.0]
    arrays = {"axis": axis, "usage": usage, "contribution": usage * 10, "theta": np.array([theta, [np.nan] * 4])}
    found = {a.axis: a for a in axis_shares(arrays, 0.95)}
    assert {name: a.usage.value for name, a in found.items()} == pytest.approx(
        {"t": 0.1, "h": 0.2, "w": 0.3, "none": 0.4}
    )
    assert found["w"].contribution.value == pytest.approx(30)
    assert (found["none"].shortest, found["t"].shortest) == (None, pytest.approx(2 * np.pi))
