"""The paper's loss on queries and keys: what it reaches under grouped heads, and what it can't see."""

import pytest
import torch

from laid_eval.core import Heads, qk_alignment

INV_FREQ = torch.tensor([1.0, 0.01], dtype=torch.float64)
SAME = {"student_frequencies": INV_FREQ, "teacher_frequencies": INV_FREQ}
D, N = 4, 30


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(seed, query_heads, key_heads, rows=N):
    return Heads(random(query_heads, rows, D, seed=seed), random(key_heads, N, D, seed=seed + 1), 0.5)


def rotate(x, inv_freq):
    angle = torch.arange(x.shape[1]).double()[:, None] * inv_freq
    cos, sin = (torch.cat([f(angle)] * 2, dim=1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def turned(x, inv_freq):
    return Heads(rotate(x.query, inv_freq), rotate(x.key, inv_freq), x.scale)


STUDENT, TEACHER = heads(1, 6, 2), heads(3, 8, 4)
MIXTURE = torch.softmax(random(6, 8, seed=9), dim=1)


def test_it_is_the_loss_of_repeated_keys_also_to_the_mixture():
    query, key = STUDENT.query.clone().requires_grad_(), STUDENT.key.clone().requires_grad_()
    pi = MIXTURE.clone().requires_grad_()
    found = qk_alignment(Heads(query, key, 0.5), TEACHER, pi, **SAME)
    targets = [torch.einsum("st,tnd->snd", pi, x) for x in (TEACHER.query, TEACHER.key.repeat_interleave(2, 0))]
    repeated = (query - targets[0]).square().mean() + (key.repeat_interleave(3, 0) - targets[1]).square().mean()
    assert found.loss.item() == pytest.approx(repeated.item(), rel=1e-12)
    assert found.constant > 0
    ours, theirs = (torch.autograd.grad(x, (query, key, pi), retain_graph=True) for x in (found.loss, repeated))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-14
    # with every key where it can best be, nothing but the constant is left
    best = targets[1].unflatten(0, (2, 3)).mean(1)
    least = qk_alignment(Heads(targets[0], best, 0.5), TEACHER, MIXTURE, **SAME)
    assert least.loss.item() == pytest.approx(least.constant.item(), rel=1e-12)


def test_it_is_blind_to_rotation_where_both_rotate_alike_and_only_there():
    plain = qk_alignment(STUDENT, TEACHER, MIXTURE, **SAME).loss
    after = qk_alignment(turned(STUDENT, INV_FREQ), turned(TEACHER, INV_FREQ), MIXTURE, **SAME).loss
    assert after.item() == pytest.approx(plain.item(), rel=1e-12)
    apart = qk_alignment(turned(STUDENT, INV_FREQ), turned(TEACHER, 0.5 * INV_FREQ), MIXTURE, **SAME).loss
    assert apart.item() != pytest.approx(plain.item(), rel=1e-2)


def test_the_same_model_has_nothing_to_align_and_a_teacher_gets_no_gradient():
    query, key = STUDENT.query.clone().requires_grad_(), STUDENT.key.clone().requires_grad_()
    student = Heads(query, key, 0.5)
    own = qk_alignment(student, student, torch.eye(6).double(), **SAME)
    assert own.loss.item() == 0
    assert own.constant.item() == 0
    teacher = Heads(TEACHER.query.clone().requires_grad_(), TEACHER.key.clone().requires_grad_(), 0.5)
    pi = MIXTURE.clone().requires_grad_()
    qk_alignment(student, teacher, pi, **SAME).loss.backward()
    assert teacher.query.grad is None
    assert teacher.key.grad is None
    assert min(x.grad.abs().max() for x in (query, key, pi)) > 0


def test_half_precision_is_compared_in_single_also_under_autocast():
    student, teacher = (Heads(x.query.bfloat16(), x.key.bfloat16(), 0.5) for x in (STUDENT, TEACHER))
    single = qk_alignment(student.widened(), teacher.widened(), MIXTURE.float(), **SAME)
    with torch.autocast("cpu", torch.bfloat16):
        found = qk_alignment(student, teacher, MIXTURE.float(), **SAME)
    assert torch.equal(found.loss, single.loss)
    assert torch.equal(found.constant, single.constant)


def test_models_whose_channels_mean_other_things_are_refused():
    wide = Heads(random(6, N, 8), random(2, N, 8), 0.5)
    with pytest.raises(ValueError, match=r"student's heads have 4 channels, the teacher's 8: .* \(octave_matching\)"):
        qk_alignment(STUDENT, wide, MIXTURE, **SAME)
    for other in (INV_FREQ * torch.tensor([1.0, 1.001]), INV_FREQ[:1]):
        with pytest.raises(ValueError, match=r"rotary frequencies of student .* differ"):
            qk_alignment(STUDENT, TEACHER, MIXTURE, student_frequencies=INV_FREQ, teacher_frequencies=other)
    qk_alignment(STUDENT, TEACHER, MIXTURE, student_frequencies=INV_FREQ.float(), teacher_frequencies=INV_FREQ)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="not of the same rows and tokens"):
        qk_alignment(STUDENT, heads(3, 8, 4, rows=7), MIXTURE, **SAME)
    with pytest.raises(ValueError, match=r"mixture is \(8, 6\): wanted \(student, teacher\) heads \(6, 8\)"):
        qk_alignment(STUDENT, TEACHER, MIXTURE.T, **SAME)
