"""The module whose forward pass is the loss, on tiny models."""

import pytest
import torch

from laid_eval.distillation.pairs import batch_of, choose_pairs, start_mixers
from laid_eval.distillation.recipe import changed, load_recipe
from laid_eval.distillation.samples import Sample, open_source
from laid_eval.distillation.student import Student, Teacher, checkpoint_layers, read
from laid_eval.distillation.train import Numbered, padded, trained
from laid_eval.models.gained import add_gains, gainable
from laid_eval.models.load import describe, load
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import resolve

EVERYTHING = {
    "losses.sft": "1.0", "losses.kl": "1.0", "losses.attention": "1.0", "losses.coverage": "0.1",
    "losses.entropy": "0.1", "matching.rows": "sampled", "matching.sample": "32", "matching.layers": "all",
    "matching.heads": "all",
}  # fmt: skip


def model_in(folder):
    return load(describe(resolve(str(folder)), device="cpu")).model


@pytest.fixture
def make(models, frame):
    """A student with everything a recipe asks for."""

    def build(recipe="laid", changes=None, student="student", teacher="teacher"):
        plan = changed(load_recipe(recipe), {"data.lengths": "[160,220]", **(changes or {})})
        own, theirs = model_in(models[student]), model_in(models[teacher])
        turning, other = rotaries(own, 128), rotaries(theirs, 128)
        pairs = choose_pairs(plan, own, theirs, turning, other, (frame, frame), 0) if plan.matches else []
        gainable(own)
        gainable(theirs)
        theirs.requires_grad_(False)
        samples = open_source(plan.data, frame, 0).samples
        mixers = start_mixers(plan, pairs, own, theirs, samples(0), 0)
        own.requires_grad_(plan.training.weights == "all")
        if plan.gain:
            add_gains(own, dict(enumerate(turning)), False)
        return Student(own, Teacher(theirs, 49152), plan, pairs, mixers, 0), samples

    return build


def batch(samples, *numbers):
    return padded([Numbered(samples, 100)[n] for n in numbers])


@pytest.mark.parametrize("recipe", ["sft", "sft-kl", "sft-kl-attn", "paper", "laid", "gain-only"])
def test_every_recipe_gives_its_terms_and_gradients_to_all_that_trains(make, recipe):
    one_to_one = recipe in ("paper", "gain-only")  # these compare head with head
    changes = {"matching.heads": "all", "data.source": "facts"}
    student, samples = make(recipe, changes, teacher="student" if one_to_one else "teacher")
    if one_to_one:
        with torch.no_grad():
            student.model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    out = student(**batch(samples, 0, 1), step=2)
    losses = student.recipe.losses
    wanted = {n for n in ("sft", "kl", "attention", "qk") if getattr(losses, n)}
    assert wanted <= set(out["terms"])
    assert not {"sft", "kl", "attention", "qk"} - wanted & set(out["terms"])
    out["loss"].backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and "mixers" not in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0 or name.endswith("bias"), name
    assert sum(trained(student).values()) == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(make):
    student, samples = make("gain-only", {"losses.kl": "1.0"}, teacher="student")
    out = student(**batch(samples, 0, 1), step=50)
    assert abs(out["terms"]["attention"]) < 1e-6
    assert abs(out["terms"]["kl"]) < 1e-6
    out["loss"].backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.requires_grad) < 1e-6


def test_a_padded_batch_is_the_mean_of_its_texts(make):
    """Note's test 20, with the attention function that distillation puts into the model."""
    student, samples = make("laid", EVERYTHING)
    lengths = {len(samples(n).tokens) for n in (0, 1, 2)}
    assert len(lengths) > 1
    together = student(**batch(samples, 0, 1, 2), step=2)
    alone = [student(**batch(samples, n), step=2) for n in (0, 1, 2)]
    mean = sum(float(out["loss"].detach()) for out in alone) / 3
    assert float(together["loss"].detach()) == pytest.approx(mean, rel=1e-5)
    together["loss"].backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    (sum(out["loss"] for out in alone) / 3).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_the_teacher_learns_nothing_and_is_in_no_checkpoint(make):
    student, samples = make("laid", EVERYTHING)
    (teacher,) = student._outside
    before = {n: p.clone() for n, p in teacher.model.state_dict().items()}
    student.train()
    student(**batch(samples, 0), step=1)["loss"].backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not teacher.model.training
    assert all(torch.equal(before[n], p) for n, p in teacher.model.state_dict().items())
    ids = {id(p) for p in teacher.model.parameters()}
    assert not ids & {id(p) for p in student.parameters()}


@pytest.mark.parametrize("recipe", ["laid", "sft-kl-attn"])
def test_layers_computed_again_give_the_same_gradients(make, recipe):
    """Note's test 15 on a whole model: attention is tapped in the first pass, and only there."""
    grads = []
    for again in (False, True):
        student, samples = make(recipe, EVERYTHING)
        if again:
            checkpoint_layers(student.model)
        student.train()
        student(**batch(samples, 0, 1), step=3)["loss"].backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-7), name


def test_gaps_in_the_positions_cut_no_attention(make):
    """transformers takes gaps for borders of packed texts where no mask is given."""
    student, samples = make("sft")
    sample = samples(0)
    size = len(sample.tokens)
    positions = torch.arange(size) + 500 * (torch.arange(size) >= size // 2)
    changed_tokens = (sample.tokens[1], *sample.tokens[1:])
    ends = []
    for tokens in (sample.tokens, changed_tokens):
        given = batch_of(Sample("x", tokens, sample.labels, positions.numpy()), torch.device("cpu"))
        ends.append(read(student.model, given, [])[0][0, -1])
    assert not torch.allclose(ends[0], ends[1])


def test_stretching_is_seen_by_the_model_and_moving_is_not(make):
    student, samples = make("sft")
    sample = samples(0)
    size = len(sample.tokens)
    outs = []
    for positions in (torch.arange(size), torch.arange(size) + 700, torch.arange(size) * 3):
        given = batch_of(Sample("x", sample.tokens, sample.labels, positions.numpy()), torch.device("cpu"))
        outs.append(read(student.model, given, [])[0])
    assert torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.allclose(outs[0], outs[2], atol=1e-2)


def test_rows_that_answer_are_always_matched(make):
    from laid_eval.distillation.student import rows_to_match

    how = changed(load_recipe("laid"), {"matching.rows": "sampled", "matching.sample": "32"}).matching
    answers = torch.tensor([40, 41])
    rows, weight = rows_to_match(how, 60, answers, 0, 3, 7)
    assert set(answers.tolist()) <= set(rows.tolist())
    assert float(weight.sum()) == pytest.approx(59)
    again, _ = rows_to_match(how, 60, answers, 0, 3, 7)
    assert torch.equal(rows, again)
    other, _ = rows_to_match(how, 60, answers, 0, 4, 7)
    assert not torch.equal(rows, other)
    every = torch.arange(1, 400)  # a text whose tokens are all labels is sampled too
    for rule in ("sampled", "answers"):
        how = changed(load_recipe("laid"), {"matching.rows": rule, "matching.sample": "32"}).matching
        rows, weight = rows_to_match(how, 400, every, 0, 3, 7)
        assert len(rows) == 32
        assert float(weight.sum()) == pytest.approx(399)
    only = load_recipe("laid").matching
    assert torch.equal(rows_to_match(only, 60, answers, 0, 3, 7)[0], answers)
