"""Mixtures of teacher heads: where they start, and that they can be kept from collapsing."""

import math

import pytest
import torch

from laid_eval.core import (
    HeadMixer,
    Heads,
    View,
    head_similarity,
    index_distance,
    octave_matching,
    seen_keys,
    sink_keys,
)

ROWS, N = torch.arange(8, 40, 4), 40
DOCUMENTS = torch.zeros(N, dtype=torch.long)
VIEW = View(seen_keys(ROWS, DOCUMENTS), index_distance(ROWS, N), sink_keys(DOCUMENTS))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def free(logits):
    return Heads(logits, torch.eye(N)[None], scale=1.0)


def test_a_uniform_start_is_nearly_uniform_but_no_two_rows_are_equal():
    mixer = HeadMixer(6, 5, generator=torch.Generator().manual_seed(0))
    pi = mixer()
    assert torch.allclose(pi.sum(1), torch.ones(6))
    assert (pi - 0.2).abs().max() < 0.02
    assert len({tuple(row) for row in pi.tolist()}) == 6
    again = HeadMixer(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(), pi)
    assert [name for name, _ in mixer.named_parameters()] == ["logits"]


def test_shares_and_entropies_are_those_of_the_mixture():
    mixer = HeadMixer(3, 4, similarity=random(3, 4, seed=1), temperature=0.5)
    pi = mixer()
    assert torch.allclose(pi, torch.softmax(2 * random(3, 4, seed=1), dim=1))
    share = pi.mean(0)
    assert mixer.coverage().item() == pytest.approx((0.25 * (0.25 / share).log()).sum().item(), rel=1e-5)
    assert mixer.effective_heads() == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-5)
    assert mixer.entropy().item() == pytest.approx(-(pi * pi.log()).sum(1).mean().item(), rel=1e-5)
    one_each = HeadMixer(4, 4, similarity=200 * torch.eye(4))
    assert one_each.effective_heads() == pytest.approx(4)
    assert one_each.coverage().item() == pytest.approx(0, abs=1e-6)
    assert one_each.entropy().item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        one_each.logits.copy_(torch.tensor([[200.0, 0, 0, 0]]))
    assert one_each.effective_heads() == pytest.approx(1)
    assert one_each.coverage().isfinite()


def test_similarity_is_minus_the_kl_of_every_pair_of_heads():
    student, teacher = random(3, 8, N, seed=1), random(4, 8, N, seed=2)
    found = head_similarity(free(student), free(teacher), VIEW, chunk=3)
    for a in range(3):
        for t in range(4):
            total = 0.0
            for r in range(8):
                seen = VIEW.seen[r]
                p, q = (x[i, r, seen].softmax(0) for x, i in ((teacher, t), (student, a)))
                total += (p * (p / q).log()).sum().item()
            assert found[a, t].item() == pytest.approx(-total / 8, rel=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    found = head_similarity(free(teacher[order]), free(teacher), VIEW)
    assert found.argmax(1).tolist() == order.tolist()
    assert torch.equal(HeadMixer(4, 4, similarity=found)().argmax(1), order)


def test_similarity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"similarity is \(4, 3\): wanted \(student, teacher\) heads \(3, 4\)"):
        HeadMixer(3, 4, similarity=torch.zeros(4, 3))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_coverage_keeps_mixtures_off_the_one_easy_teacher_head(weight):
    """The student attends almost uniformly; one teacher head does too, and imitating it alone costs nothing."""
    student = 0.1 * random(4, 8, N, seed=1)
    teacher = 4 * random(4, 8, N, seed=2)
    teacher[1] = 0.0
    mixer = HeadMixer(4, 4, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(mixer.parameters(), lr=0.3)
    for _ in range(60):
        optimiser.zero_grad()
        queries = student.clone().requires_grad_()  # frozen in effect: nothing steps it
        loss = octave_matching(free(queries), free(teacher), mixer(), VIEW, gamma=1.0).loss
        (loss + weight * mixer.coverage()).backward()
        optimiser.step()
    assert mixer().argmax(dim=1).tolist() == [1, 1, 1, 1]  # still the favourite
    if weight:
        assert mixer.effective_heads() > 1.5
    else:
        assert mixer.effective_heads() < 1.1


def test_logs_are_in_nats():
    assert HeadMixer(2, 8, similarity=torch.zeros(2, 8)).entropy().item() == pytest.approx(math.log(8))
