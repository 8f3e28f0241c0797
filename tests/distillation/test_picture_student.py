"""The loss on haystacks of pictures, against a slow reference; gains planted and found again."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import laid_eval
from laid_eval.distillation.batches import batch_of, like
from laid_eval.distillation.pairs import choose_pairs, start_mixers
from laid_eval.distillation.picture_heads import picture_retrieval
from laid_eval.distillation.picture_samples import visual_probe
from laid_eval.distillation.recipe import changed, load_recipe
from laid_eval.distillation.sides import find_side, load_side
from laid_eval.distillation.sources import open_data
from laid_eval.distillation.student import Student, Teacher
from laid_eval.models.fold import fold
from laid_eval.models.gained import add_gains, gainable, gains_of
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import quiet

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "smolvlm"]


@pytest.fixture
def make(seeing, few):
    """A student, its samples, and the recipe."""

    def build(family, recipe="laid", changes=None):
        plan = changed(load_recipe(recipe), {**few, **(changes or {})})
        options = ("cpu", False, False, plan.data)
        sides = [
            find_side(role, str(seeing(family, role == "teacher")), None, "float32", *options)
            for role in ("student", "teacher")
        ]
        source = open_data(visual_probe(plan.data), plan.data, *sides, 0)
        own, theirs = (load_side(side).model for side in sides)
        turning, other = rotaries(own, 600), rotaries(theirs, 600)
        pairs = choose_pairs(plan, own, theirs, turning, other, (None, None), 0, source.examples)
        gainable(own)
        gainable(theirs)
        theirs.requires_grad_(False)
        mixers = start_mixers(plan, pairs, own, theirs, source.samples(0), 0)
        vocabulary = int(own.config.get_text_config(decoder=True).vocab_size)
        return Student(own, Teacher(theirs, vocabulary), plan, pairs, mixers, 0), source.samples

    return build


def looked(folder, sample, question):
    """A model's logits and attention (layers, heads, N, N) on the pictures and one question alone; its tokens."""
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    kept = (sample.shown.branches == 0) | (sample.shown.branches == question)
    ids = torch.tensor(sample.tokens)[torch.as_tensor(kept)][None]
    positions = torch.as_tensor(sample.positions[..., kept])[..., None, :]
    with torch.no_grad():
        out = model(
            input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), output_attentions=True,
            use_cache=False, **sample.shown.inputs,
        )  # fmt: skip
    return out.logits[0], torch.stack(list(out.attentions))[:, 0], np.flatnonzero(kept)


def octave_loss(own, target, images, sink, gamma, kappa, rho, octaves):
    """One row of one head: loops over keys and octaves."""
    bins = [0 if sink[j] else min(1 + int(math.log2(images[j] + 1)), octaves) for j in range(len(own))]
    weight = {b: rho ** (gamma * (b - 1) / (octaves - 1)) for b in set(bins) if b}
    mean = sum(weight.values()) / len(weight)
    loss = 0.0
    for b in set(bins):
        keys = [j for j in range(len(own)) if bins[j] == b]
        mass, wanted = sum(own[j] for j in keys), sum(target[j] for j in keys)
        inside = sum(target[j] / wanted * math.log(target[j] / wanted / (own[j] / mass)) for j in keys)
        loss += wanted * math.log(wanted / mass)
        loss += (weight[b] / mean if b else 1.0) * wanted ** (1 - kappa) * inside
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_a_plain_slow_reference(make, seeing, family):
    """Questions one by one in models of their own, softmaxes as matrices, octaves of images in loops."""
    student, samples = make(
        family, changes={"matching.layers": "[[1, 0]]", "matching.heads": "all", "data.stretch": "500"}
    )
    sample = samples(1)
    student.eval()
    step = 3
    out = student(**batch_of(sample, torch.device("cpu")).as_inputs(), step=step)
    x = (step / student.recipe.training.steps - 0.05) / 0.75
    gamma = 1.0 * x * x * (3 - 2 * x)
    assert out["terms"]["gamma"] == pytest.approx(gamma)
    mixture = student.mixers["1-0"]().detach().double()
    labels = np.array(sample.labels)
    sft, kl, attention = [], [], []
    for question in sorted(set(sample.shown.branches) - {0}):
        (mine, seen, kept), (theirs, shown, _) = (
            looked(seeing(family, teacher), sample, question) for teacher in (False, True)
        )
        places = sample.shown.places[kept]
        for label in labels[sample.shown.branches[labels] == question]:
            row = int(np.flatnonzero(kept == label)[0]) - 1
            p, q = (z[row].double().log_softmax(0) for z in (mine, theirs))
            sft.append(-float(p[sample.tokens[label]]))
            kl.append(float((q.exp() * (q - p)).sum()))
            images = places[row] - places[: row + 1]
            sink = [j < 4 or places[j] == 0 for j in range(row + 1)]
            targets = mixture @ shown[0, :, row, : row + 1].double()
            for head in range(len(mixture)):
                attention.append(
                    octave_loss(
                        seen[1, head, row, : row + 1].tolist(), targets[head].tolist(), images, sink, gamma, 0.5, 64, 8
                    )
                )
    assert len(sft) == len(labels)
    assert out["terms"]["sft"] == pytest.approx(np.mean(sft), rel=1e-4)
    assert out["terms"]["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert out["terms"]["attention"] == pytest.approx(np.mean(attention), rel=1e-3)
    losses = student.recipe.losses
    total = np.mean(sft) + np.mean(kl) + 0.3 * np.mean(attention) + losses.entropy * out["terms"]["entropy"]
    assert float(out["loss"].detach()) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("distance", ["index", "rope"])
def test_other_distances_count_what_a_question_alone_would(make, distance):
    """Of the second question: the first one's tokens are not between."""
    changes = {"matching.layers": "last", "matching.heads": "all", "matching.distance": distance}
    student, samples = make("qwen2_5_vl", changes=changes)
    from laid_eval.distillation.student import view_of

    sample = samples(0)
    batch = batch_of(sample, torch.device("cpu"))
    size = len(sample.tokens)
    view = view_of(student.recipe.matching, batch, 0, torch.tensor([size - 1]), size)
    kept = np.flatnonzero((sample.shown.branches == 0) | (sample.shown.branches == sample.shown.branches[-1]))
    assert np.flatnonzero(view.seen[0]).tolist() == kept.tolist()
    wanted = np.arange(len(kept))[::-1]
    if distance == "rope":
        wanted = (sample.positions[:, -1:] - sample.positions[:, kept]).max(axis=0)
    assert view.distance[0, kept].tolist() == wanted.tolist()


def test_models_without_a_mask_of_their_own_kind_read_the_same(make):
    """An eager model adds its mask, sdpa takes booleans."""
    student, samples = make("qwen2_5_vl", "sft-kl")
    inputs = batch_of(samples(2), torch.device("cpu")).as_inputs()
    losses = []
    for name in ("sdpa", "eager"):
        with quiet():
            student.model.set_attn_implementation(name)
        gainable(student.model)
        losses.append(float(student(**inputs)["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_heads_that_look_at_the_answers_picture_are_found(make):
    """Planted: a layer whose first two heads look at a picture of 9 tokens with all their attention."""
    student, samples = make("qwen2_5_vl", changes={"matching.layers": "last", "matching.heads": "all"})
    haystack = samples(0)
    model = student.model
    before = picture_retrieval(model, [haystack])
    assert before.shape == (2, 4)
    assert (before > 0).all()
    assert (before < 1).all()
    layer = model.get_decoder().layers[1].self_attn
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj):
            part.weight[: part.weight.shape[0] // 2].zero_()
            part.bias.zero_()  # the first key head's two query heads look everywhere alike
    after = picture_retrieval(model, [haystack])
    rows = np.array(haystack.labels) - 1
    branches, places = haystack.shown.branches, haystack.shown.places
    shares = []
    for row, needle in zip(rows, haystack.shown.needles, strict=True):
        seen = ((branches == 0) | (branches == branches[row])) & (np.arange(len(places)) <= row)
        shares.append((seen & (places == needle)).sum() / seen.sum())
    assert after[1, :2] == pytest.approx([np.mean(shares)] * 2, rel=1e-4)


def test_layers_and_heads_that_retrieve_are_chosen(make):
    student, _ = make("qwen2_5_vl")
    (pair,) = student.pairs
    assert 0 < len(pair.student_heads) <= 4
    assert pair.student in (0, 1)


def test_a_gain_planted_in_a_teacher_is_found_again(seeing, few, tmp_path):
    """gain-only, from the least-squares start; a head-by-head gain of Qwen2.5-VL, folded into the teacher."""
    folder = seeing("qwen2_5_vl")
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder)
    turning = rotaries(model, 600)
    gainable(model)
    generator = torch.Generator().manual_seed(1)
    planted = {}
    for layer, gain in add_gains(model, dict(enumerate(turning)), False).items():
        planted[layer] = 0.4 * torch.randn(gain.parameter.shape, generator=generator)
        gain.set_log_gain(planted[layer])
    fold(model, turning)
    assert not gains_of(model)
    with quiet():
        model.set_attn_implementation("sdpa")
        model.save_pretrained(tmp_path / "teacher")
        find_side("x", str(folder), None, "auto", "cpu", False, False, load(few)).processor.save_pretrained(
            tmp_path / "teacher"
        )
    changes = {**few, "training.accumulation": "1"}
    done = laid_eval.distill(
        str(folder), str(tmp_path / "teacher"), "gain-only", out=tmp_path / "run", changes=changes, device="cpu"
    )
    wanted = np.stack([planted[layer].numpy() for layer in sorted(planted)])
    assert np.abs(wanted).mean() > 0.2
    assert np.abs(done.log_gain - wanted).max() < 0.02
    assert done.steps["attention"].max() < 1e-3


def load(changes):
    return changed(load_recipe("sft"), changes).data


def test_vision_inputs_are_in_the_type_of_the_model():
    given = like(
        {"pixel_values": torch.ones(2), "grid": torch.ones(2, dtype=torch.long), "k": 3}, torch.zeros(1).half()
    )
    assert given["pixel_values"].dtype == torch.float16
    assert given["grid"].dtype == torch.long
    assert given["k"] == 3


def test_a_few_steps_lower_the_loss(make):
    student, samples = make("smolvlm", "laid", {"matching.layers": "last", "matching.heads": "all"})
    inputs = [batch_of(samples(n), torch.device("cpu")).as_inputs() for n in range(3)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        total = sum(student(**given)["loss"] for given in inputs)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.8 * losses[0]
