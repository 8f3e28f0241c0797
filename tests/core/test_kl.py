"""KL on the shared vocabulary: exact, of no phantom tokens, and never holding all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from laid_eval.core import Unembedding, label_loss, shared_vocab_kl

N, V = 40, 50
ROWS = torch.tensor([3, 7, 8, 9, 20, 21, 39])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = random(N, 6, seed=1), random(N, 10, seed=2)
OWN, OTHER = random(V, 6, seed=3), random(V + 7, 10, seed=4)


def test_it_is_the_kl_of_truncated_logits_times_temperature_squared():
    hidden, weight = STUDENT.clone().requires_grad_(), OWN.clone().requires_grad_()
    found = shared_vocab_kl(hidden, Unembedding(weight), TEACHER, Unembedding(OTHER), ROWS, temperature=2.0, chunk=3)
    p = torch.softmax((TEACHER @ OTHER.T)[ROWS, :V] / 2, dim=-1)
    plain = 4 * (p * (p.log() - torch.log_softmax((hidden @ weight.T)[ROWS] / 2, dim=-1))).sum() / 7
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, plain)), strict=True):
        assert (one - other).abs().max() < 1e-13


def test_identical_models_of_different_padding_have_nothing_to_learn():
    """Padding the smaller logits with zeros would put probability on tokens that don't exist."""
    padded = torch.cat([OWN, random(9, 6, seed=8)])
    low = OWN - 3 * STUDENT.mean(0)  # logits far below zero: phantom tokens would take much
    for own, other in ((OWN, padded), (padded, OWN), (low, torch.cat([low, padded[V:]]))):
        hidden = STUDENT.clone().requires_grad_()
        loss = shared_vocab_kl(hidden, Unembedding(own), STUDENT, Unembedding(other), ROWS)
        assert loss.item() == pytest.approx(0, abs=1e-15)
        loss.backward()
        assert hidden.grad.abs().max() < 1e-14


def test_a_constant_on_all_logits_changes_nothing():
    base = shared_vocab_kl(STUDENT, Unembedding(OWN), TEACHER, Unembedding(OTHER), ROWS)
    one, other = (Unembedding(w, bias=torch.full((len(w),), c).double()) for w, c in ((OWN, -8.0), (OTHER, 5.0)))
    assert shared_vocab_kl(STUDENT, one, TEACHER, other, ROWS).item() == pytest.approx(base.item(), rel=1e-12)


def test_scale_softcap_and_bias_are_each_models_own():
    bias = random(V + 7, seed=6)
    found = shared_vocab_kl(
        STUDENT, Unembedding(OWN, scale=0.25), TEACHER, Unembedding(OTHER, bias, 2.0, 5.0), ROWS, vocabulary=30
    )
    log_p = (5 * torch.tanh((TEACHER @ OTHER.T + bias) * 2 / 5))[ROWS, :30].log_softmax(-1)
    log_q = (0.25 * STUDENT @ OWN.T)[ROWS, :30].log_softmax(-1)
    assert found.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item() / 7, rel=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in made)])
        return out


def test_the_logits_of_all_rows_are_never_held():
    hidden, rows = random(300, 2).requires_grad_(), torch.arange(300)
    own, other = Unembedding(random(400, 2, seed=1)), Unembedding(random(410, 2, seed=2))
    with Largest() as seen:
        shared_vocab_kl(hidden, own, hidden.detach(), other, rows, chunk=16).backward()
    assert seen.size == 16 * 400
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        shared_vocab_kl(hidden, own, hidden.detach(), other, rows, chunk=16)
    assert sum(saved) < 16 * 400  # nor kept for the backward pass


def test_the_teacher_gets_no_gradient_and_tokens_without_label_none_either():
    teacher, weight = TEACHER.clone().requires_grad_(), OTHER.clone().requires_grad_()
    hidden = STUDENT.clone().requires_grad_()
    shared_vocab_kl(hidden, Unembedding(OWN), teacher, Unembedding(weight), ROWS).backward()
    assert teacher.grad is None
    assert weight.grad is None
    assert hidden.grad.abs().sum(1).nonzero().flatten().tolist() == ROWS.tolist()


def test_half_precision_logits_are_compared_in_single_precision():
    hidden, weight = STUDENT.bfloat16(), OWN.bfloat16()
    found = shared_vocab_kl(hidden, Unembedding(weight), hidden + 0.1, Unembedding(weight), ROWS)
    logs = [(x @ weight.T).float()[ROWS].log_softmax(-1) for x in (hidden, hidden + 0.1)]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx((logs[1].exp() * (logs[1] - logs[0])).sum().item() / 7, rel=1e-3)


def test_a_batch_without_labels_costs_nothing_and_still_has_a_gradient():
    hidden = STUDENT.clone().requires_grad_()
    loss = shared_vocab_kl(hidden, Unembedding(OWN), TEACHER, Unembedding(OTHER), ROWS[:0])
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.abs().max() == 0


def test_what_cannot_be_compared_is_refused():
    own, other = Unembedding(OWN), Unembedding(OTHER)
    with pytest.raises(ValueError, match="a vocabulary of 51 tokens: the models share at most 50"):
        shared_vocab_kl(STUDENT, own, TEACHER, other, ROWS, vocabulary=51)
    with pytest.raises(ValueError, match="40 tokens of the student, 39 of the teacher"):
        shared_vocab_kl(STUDENT, own, TEACHER[1:], other, ROWS)
    with pytest.raises(ValueError, match=r"temperature 0\.0 must be positive"):
        shared_vocab_kl(STUDENT, own, TEACHER, other, ROWS, temperature=0.0)


def test_label_loss_is_the_cross_entropy_of_the_labelled_tokens_and_so_are_its_gradients():
    torch.manual_seed(0)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    rows, labels = torch.tensor([2, 5, 19]), torch.tensor([4, 49, 0])
    loss = label_loss(hidden, Unembedding(weight, scale=0.5), rows, labels, chunk=2)
    plain = torch.nn.functional.cross_entropy(hidden[rows] @ weight.T * 0.5, labels)
    assert torch.allclose(loss, plain)
    ours = torch.autograd.grad(loss, (weight, hidden))
    theirs = torch.autograd.grad(plain, (weight, hidden))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    nothing = label_loss(hidden, Unembedding(weight), rows[:0], labels[:0])
    assert nothing.item() == 0
    nothing.backward()  # still part of the graph
