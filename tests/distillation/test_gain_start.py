"""Gains that were planted are found again in one pass."""

import copy

import numpy as np
import pytest
import torch

from laid_eval import UserError
from laid_eval.core import RopeGain
from laid_eval.distillation.gain_start import best_log_gain, start_gains
from laid_eval.distillation.pairs import batch_of, choose_pairs
from laid_eval.distillation.recipe import load_recipe
from laid_eval.distillation.samples import Sample
from laid_eval.models.fold_sites import fold_layer, fold_sites
from laid_eval.models.gained import add_gains, gainable
from laid_eval.models.load import describe, load
from laid_eval.models.rotary import rotaries
from laid_eval.models.source import resolve


def planted_pair(folder, frame, shared):
    """A model, a copy with random gains folded in, the log gains, and what start_gains needs."""
    teacher = load(describe(resolve(str(folder)), device="cpu")).model
    student = copy.deepcopy(teacher)
    turning = rotaries(teacher, 128)
    generator = torch.Generator().manual_seed(0)
    planted = []
    for layer, site in fold_sites(student, turning).items():
        rotary = turning[layer]
        heads = None if shared else 4
        gain = RopeGain(torch.as_tensor(rotary.first), torch.as_tensor(rotary.second), 8, heads)
        gain.set_log_gain(0.4 * torch.randn(gain.parameter.shape, generator=generator))
        fold_layer(gain, site.parts)
        planted.append(gain.log_gain().detach())
    pairs = choose_pairs(load_recipe("gain-only"), student, teacher, turning, turning, (frame, frame), 0)
    gainable(student)
    gainable(teacher)
    ids = torch.randint(5, 49000, (96,), generator=generator)
    batch = batch_of(Sample("x", tuple(ids.tolist()), (1,), np.arange(96)), torch.device("cpu"))
    return student, teacher, turning, pairs, batch, torch.stack(planted)


@pytest.mark.parametrize(("name", "shared"), [("student", False), ("qwen3", True)])
def test_planted_gains_are_found_in_one_pass(models, frame, name, shared):
    student, teacher, turning, pairs, batch, planted = planted_pair(models[name], frame, shared)
    gains = add_gains(student, dict(enumerate(turning)), shared)
    start_gains(student, teacher, pairs, batch)
    found = torch.stack([gains[i].log_gain().detach() for i in sorted(gains)])
    assert float((found + planted).abs().max()) < 1e-3
    ids = batch.input_ids
    with torch.no_grad():
        assert torch.allclose(student(ids).logits, teacher(ids).logits, atol=1e-3)
        before = [g.log_gain().clone() for g in gains.values()]
        student(ids[:, :20])  # nothing is solved again afterwards
    assert all(torch.equal(a, g.log_gain()) for a, g in zip(before, gains.values(), strict=True))


def test_a_factor_is_the_least_squares_one_and_bounded():
    gain = RopeGain(torch.tensor([0, 1]), torch.tensor([2, 3]), channels=5, heads=2)
    torch.manual_seed(0)
    query, target = torch.randn(1, 2, 30, 5), torch.randn(1, 2, 30, 5)
    query[:, :, :, 1] = query[:, :, :, 3] = 0  # a pair without energy keeps 1
    found = best_log_gain(gain, query, target).exp()
    q, t = (x[0, 0][:, [0, 2]].flatten().double() for x in (query, target))
    grid = torch.linspace(0.25, 4, 20001, dtype=torch.float64)
    errors = ((grid[:, None] * q - t) ** 2).sum(1)
    assert float(found[0, 0]) == pytest.approx(float(grid[errors.argmin()]), abs=1e-3)
    assert found[:, 1].tolist() == [1.0, 1.0]
    assert float(best_log_gain(gain, target, 100 * target).exp().max()) <= 4
    gain.set_log_gain(best_log_gain(gain, target, 100 * target))


def test_layers_that_do_not_correspond_are_refused(models, frame):
    student, _, turning, _, batch, _ = planted_pair(models["student"], frame, False)
    teacher = load(describe(resolve(str(models["teacher"])), device="cpu")).model
    other = rotaries(teacher, 128)
    pairs = choose_pairs(load_recipe("gain-only"), student, teacher, turning, other, (frame, frame), 0)
    gainable(teacher)
    add_gains(student, dict(enumerate(turning)), False)
    with pytest.raises(UserError, match="needs students whose heads correspond"):
        start_gains(student, teacher, pairs, batch)
