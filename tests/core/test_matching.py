"""Attention matching is a divergence that weighs distance as it says."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from laid_eval.core import (
    HeadMixer,
    Heads,
    View,
    index_distance,
    octave_matching,
    rope_distance,
    seen_keys,
    sink_keys,
)

N = 48


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def free(logits):
    """Heads whose scaled logits are the numbers given, (H, R, N): the queries, seen by unit keys."""
    return Heads(logits, torch.eye(logits.shape[-1], dtype=logits.dtype)[None], scale=1.0)


def causal(rows, keys=N, sink=4, documents=None, window=None):
    documents = torch.zeros(keys, dtype=torch.long) if documents is None else documents
    return View(seen_keys(rows, documents, window), index_distance(rows, keys), sink_keys(documents, sink))


def mixture(students, teachers, seed=5):
    return torch.softmax(2 * random(students, teachers, seed=seed), dim=1)


def probabilities(logits, view):
    return logits.masked_fill(~view.seen, -torch.inf).softmax(dim=-1)


ROWS = torch.tensor([5, 11, 23, 40, 47])
VIEW = causal(ROWS)
BINS = VIEW.bins(slice(None), 17)
STUDENT = 2 * random(3, 5, N, seed=1)
TEACHER = 2 * random(4, 5, N, seed=2)
MIXTURE = mixture(3, 4)
TARGET = torch.einsum("st,trn->srn", MIXTURE, probabilities(TEACHER, VIEW))


def match(student, teacher=TEACHER, pi=MIXTURE, view=VIEW, **options):
    return octave_matching(free(student), free(teacher), pi, view, **{"gamma": 0.7} | options)


def gradient(loss, of):
    (found,) = torch.autograd.grad(loss, of)
    return found


def test_without_weights_it_is_the_kl_of_the_row():
    student = STUDENT.clone().requires_grad_()
    log_own = student.masked_fill(~VIEW.seen, -torch.inf).log_softmax(dim=-1)
    row = sum(
        F.kl_div(log_own[:, i, VIEW.seen[i]], TARGET[:, i, VIEW.seen[i]], reduction="sum") for i in range(len(ROWS))
    )
    plain = row / 15  # heads x rows
    ours = match(student, gamma=0.0, kappa=0.0).loss
    assert ours.item() == pytest.approx(plain.item(), abs=1e-12)
    assert (gradient(ours, student) - gradient(plain, student)).abs().max() < 1e-12


@pytest.mark.parametrize("weights", [{"gamma": 0.0, "kappa": 0.0}, {"gamma": 0.4, "kappa": 0.5},
                                     {"gamma": 1.0, "kappa": 1.0}, {"gamma": 2.0, "kappa": 0.3, "rho": 500.0}])  # fmt: skip
def test_nothing_is_left_to_learn_at_the_target_whatever_the_weights(weights):
    at = TARGET.clamp_min(1e-300).log().requires_grad_()
    found = match(at, **weights)
    assert abs(found.loss.item()) < 1e-12
    assert gradient(found.loss, at).abs().max() < 1e-12
    away = (at.detach() + 0.3 * random(3, 5, N, seed=9)).requires_grad_()
    assert match(away, **weights).loss > 1e-3


def test_the_gradient_is_the_closed_form():
    kappa, gamma = 0.4, 0.8
    student = STUDENT.clone().requires_grad_()
    found = gradient(match(student, kappa=kappa, gamma=gamma).loss, student)
    own = probabilities(STUDENT, VIEW)
    for r in range(len(ROWS)):
        bins = BINS[r]
        octaves = sorted({b for b in bins.tolist() if 1 <= b <= 17})
        raw = {b: 64 ** (gamma * (b - 1) / 16) for b in octaves}
        omega = {b: raw[b] * len(octaves) / sum(raw.values()) for b in octaves} | {0: 1.0}
        for a in range(3):
            p, t = own[a, r], TARGET[a, r]
            for k in VIEW.seen[r].nonzero().flatten().tolist():
                same = bins == bins[k]
                mass, wanted = p[same].sum(), t[same].sum()
                weight = omega[int(bins[k])] * wanted ** (1 - kappa)
                expected = p[k] / mass * (mass - wanted) + weight * (p[k] / mass - t[k] / wanted)
                assert found[a, r, k].item() == pytest.approx(expected.item() / 15, abs=1e-14)
    assert found[:, ~VIEW.seen].abs().max() == 0


def test_a_constant_on_a_rows_logits_changes_nothing():
    base = match(STUDENT.clone().requires_grad_()).loss
    lifted = match((STUDENT + 50 * random(3, 5, 1)).requires_grad_(), TEACHER - 30 * random(4, 5, 1, seed=3)).loss
    assert lifted.item() == pytest.approx(base.item(), rel=1e-12)


def test_chunks_and_the_order_of_keys_within_an_octave_do_not_matter():
    base = match(STUDENT.clone().requires_grad_()).loss.item()
    for chunk in (1, 2, 3, 5, 100):
        assert match(STUDENT.clone().requires_grad_(), chunk=chunk).loss.item() == pytest.approx(base, rel=1e-13)
    row = slice(4, 5)  # a single row: its octaves are the same for every shuffle within them
    view = View(VIEW.seen[row], VIEW.distance[row], VIEW.sink)
    student, teacher = STUDENT[:, row].clone().requires_grad_(), TEACHER[:, row]
    shuffled = torch.arange(N)
    for b in range(18):
        inside = (BINS[4] == b).nonzero().flatten()
        shuffled[inside] = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(b))]
    assert (shuffled != torch.arange(N)).sum() > 30
    one = match(student, teacher, view=view).loss
    other = match(student[..., shuffled], teacher[..., shuffled], view=view).loss
    assert other.item() == pytest.approx(one.item(), rel=1e-12)
    across = shuffled.roll(3)  # and it does matter across octaves
    assert match(student[..., across], teacher[..., across], view=view).loss.item() != pytest.approx(
        one.item(), rel=1e-3
    )


def test_the_farthest_octaves_share_of_the_gradient_grows_with_gamma_and_kappa():
    """By finite differences, on a teacher with a sink and attention falling as distance^-1.2."""
    keys, row = 64, torch.tensor([63])
    view = causal(row, keys)
    fall = -1.2 * torch.log1p(view.distance.double())[None]
    fall[..., :4] = 2.0
    student = fall + 0.5 * random(1, 1, keys, seed=4)
    far = (view.bins(slice(None), 6)[0] == 6).nonzero().flatten()

    def share(**weights):
        def loss(logits):
            with torch.no_grad():
                return match(logits, fall, torch.ones(1, 1).double(), view, octaves=6, **weights).loss

        step = 1e-5 * torch.eye(keys, dtype=torch.float64)
        slopes = torch.stack([(loss(student + s) - loss(student - s)).abs() for s in step])
        return (slopes[far].sum() / slopes.sum()).item()

    shares = [share(gamma=g, kappa=0.5) for g in (0.0, 0.5, 1.0, 1.5)]
    assert shares == sorted(shares)
    assert shares[2] > 1.3 * shares[0]
    assert share(gamma=1.0, kappa=1.0) > shares[2] > share(gamma=1.0, kappa=0.0)


def test_what_happens_inside_the_sink_is_no_octaves_matter():
    """The first token is the farthest key of every row, and would be most of the farthest octave."""
    moved = STUDENT.clone()
    moved[..., :4] = STUDENT[..., :4].logsumexp(-1, keepdim=True) + random(3, 5, 4, seed=8).log_softmax(-1)
    with torch.no_grad():
        base, other = match(STUDENT), match(moved)
    assert torch.allclose(other.selectivity[1:], base.selectivity[1:], rtol=1e-12, atol=0)
    assert other.mass.item() == pytest.approx(base.mass.item(), rel=1e-12)
    assert (other.selectivity[0] - base.selectivity[0]).abs() > 1e-2


def test_unseen_keys_change_no_bit_of_the_loss():
    documents = torch.tensor([-1] * 5 + [0] * 20 + [1] * 23)
    rows = torch.tensor([9, 20, 30, 45])
    view = causal(rows, documents=documents, window=15)
    student, teacher = random(3, 4, N, seed=1).float(), random(4, 4, N, seed=2).float()
    hidden = ~view.seen.expand(3, -1, -1)
    other, other_teacher = student.clone(), teacher.clone()
    other[hidden] += 100 * random(int(hidden.sum()), seed=3).float()
    other_teacher[~view.seen.expand(4, -1, -1)] -= 7.0
    pi = MIXTURE.float()
    losses = []
    for s, t in ((student, teacher), (other, other_teacher)):
        s.requires_grad_()
        loss = match(s, t, pi, view).loss
        losses.append((loss.item(), gradient(loss, s)))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_padding_left_and_packing_equal_the_text_alone():
    """Rows of a padded, packed sequence match as the rows of each text by itself; empty rows don't count."""
    short = torch.arange(3, 20)
    alone = causal(short, 20)
    student, teacher = random(3, 17, 20, seed=1), random(4, 17, 20, seed=2)
    base = match(student.requires_grad_(), teacher, view=alone).loss
    documents = torch.tensor([-1] * 6 + [7] * 20 + [8] * 10)
    rows = torch.cat([torch.arange(4), short + 6])  # four rows of padding see nothing
    packed = causal(rows, 36, documents=documents)
    wide = [F.pad(x.detach(), (6, 10, 4, 0), value=3.0).requires_grad_() for x in (student, teacher)]
    loss = match(*wide, view=packed).loss
    assert loss.item() == pytest.approx(base.item(), rel=1e-12)
    slope = gradient(loss, wide[0])
    assert slope.isfinite().all()
    assert slope[:, :4].abs().max() == 0


def grouped(seed, heads, groups, channels, rows=5):
    return Heads(random(heads, rows, channels, seed=seed), random(groups, N, channels, seed=seed + 1), channels**-0.5)


def test_grouped_heads_equal_repeated_keys():
    student, teacher = grouped(1, 6, 2, 8), grouped(3, 8, 4, 16)
    pi = mixture(6, 8)

    def repeated(x):
        return Heads(x.query, x.key.repeat_interleave(len(x.query) // len(x.key), dim=0), x.scale)

    with torch.no_grad():
        ours = octave_matching(student, teacher, pi, VIEW, gamma=0.5).loss
        same = octave_matching(repeated(student), repeated(teacher), pi, VIEW, gamma=0.5).loss
        logits = [torch.einsum("hrd,hnd->hrn", h.query, h.key) * h.scale for h in map(repeated, (student, teacher))]
        free_form = match(*logits, pi, gamma=0.5).loss
        inside = torch.tensor([2, 0, 1, 4, 5, 3])  # heads change places within their group, and so do their targets
        moved = Heads(student.query[inside], student.key, student.scale)
        again = octave_matching(moved, teacher, pi[inside], VIEW, gamma=0.5).loss
    for other in (same, free_form, again):
        assert other.item() == pytest.approx(ours.item(), rel=1e-12)


def test_teacher_heads_may_be_numbered_in_any_order():
    order = torch.tensor([2, 3, 0, 1])
    with torch.no_grad():
        base, permuted = match(STUDENT), match(STUDENT, TEACHER[order], MIXTURE[:, order])
        wrong = match(STUDENT, TEACHER[order])
    assert permuted.loss.item() == pytest.approx(base.loss.item(), rel=1e-12)
    assert wrong.loss.item() != pytest.approx(base.loss.item(), rel=1e-3)


def test_scale_and_softcap_are_each_models_own():
    student, teacher = random(3, 5, N, seed=1), random(4, 5, N, seed=2)
    eye = torch.eye(N, dtype=torch.float64)[None]
    with torch.no_grad():
        ours = octave_matching(
            Heads(student, eye, 3.0), Heads(teacher, eye, 9.0, softcap=5.0), MIXTURE, VIEW, gamma=0.3
        ).loss
        plain = match(3.0 * student, 5.0 * torch.tanh(9.0 * teacher / 5.0), gamma=0.3).loss
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)


def rotate(x, positions, inv_freq):
    """Half-split RoPE of (heads, tokens, D)."""
    angle = positions.double()[:, None] * inv_freq
    cos, sin = (torch.cat([f(angle)] * 2, dim=1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def test_shifted_positions_change_nothing():
    inv_freq = 100.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    gaps = torch.randint(1, 9, (N,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    losses = []
    for shift in (0, 1000):
        positions = gaps + shift
        view = View(VIEW.seen, rope_distance(ROWS, positions), VIEW.sink)
        sides = []
        for seed, heads in ((1, 3), (3, 4)):
            query = rotate(random(heads, 5, 8, seed=seed), positions[ROWS], inv_freq)
            sides.append(
                Heads(query.float(), rotate(random(1, N, 8, seed=seed + 1), positions, inv_freq).float(), 0.35)
            )
        with torch.no_grad():
            losses.append(octave_matching(*sides, MIXTURE, view, gamma=1.0).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_rows_weigh_what_they_stand_for():
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0])
    with torch.no_grad():
        each = torch.stack([match(STUDENT[:, i : i + 1], TEACHER[:, i : i + 1], view=causal(ROWS[i : i + 1])).loss
                            for i in range(5)])  # fmt: skip
        found = match(STUDENT, weights=weight).loss
    assert found.item() == pytest.approx(((weight * each).sum() / 11).item(), rel=1e-12)


def test_gradients_through_row_chunks_are_those_of_the_whole():
    """Every chunk is recomputed in the backward pass; queries, shared keys and mixture get the same gradient."""
    pi = mixture(6, 8)
    teacher = grouped(3, 8, 4, 16)
    gradients = []
    for chunk in (2, 5):
        leaves = [x.clone().requires_grad_() for x in (grouped(1, 6, 2, 8).query, grouped(1, 6, 2, 8).key, pi)]
        octave_matching(
            Heads(leaves[0], leaves[1], 0.3), teacher, leaves[2], VIEW, gamma=1.0, chunk=chunk
        ).loss.backward()
        gradients.append([x.grad for x in leaves])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-14

    def by_hand(query, key, pi):
        log_own = (torch.einsum("gmrd,gnd->gmrn", query.unflatten(0, (2, 3)), key).flatten(0, 1) * 0.3).masked_fill(
            ~VIEW.seen, -torch.inf).log_softmax(-1)  # fmt: skip
        keys = teacher.key.repeat_interleave(2, dim=0)
        target = torch.einsum("st,trn->srn", pi,
                              probabilities(torch.einsum("hrd,hnd->hrn", teacher.query, keys) * 0.25, VIEW))  # fmt: skip
        total = 0.0
        for r in range(5):
            seen = VIEW.seen[r]
            p, t = log_own[:, r, seen].exp(), target[:, r, seen]
            here = BINS[r, seen]
            octaves = sorted(set(here.tolist()))
            raw = {b: 64 ** ((b - 1) / 16) for b in octaves if b}
            for b in octaves:
                mass, wanted = (x[:, here == b].sum(1, keepdim=True) for x in (p, t))
                inside = t[:, here == b] / wanted
                kl = (inside * (inside / (p[:, here == b] / mass)).log()).sum(1)
                omega = raw[b] * len(raw) / sum(raw.values()) if b else 1.0
                total = (
                    total + ((wanted * (wanted / mass).log()).squeeze(1) + omega * wanted.squeeze(1) ** 0.5 * kl).sum()
                )
        return total / 30

    leaves = [x.clone().requires_grad_() for x in (grouped(1, 6, 2, 8).query, grouped(1, 6, 2, 8).key, pi)]
    by_hand(*leaves).backward()
    for x, found in zip(leaves, gradients[0], strict=True):
        assert (x.grad - found).abs().max() < 1e-12


def test_what_reentrant_checkpointing_hands_over_is_refused():
    """It runs the layer without gradients first: a loss on what is captured there would train nothing, silently."""
    weight = random(8, 3 * 8).requires_grad_()
    hidden = random(N, 8, seed=6).requires_grad_()

    def loss(use_reentrant):
        caught = {}

        def layer(x):
            query = (x[ROWS] @ weight).unflatten(1, (3, 8)).transpose(0, 1)
            caught.setdefault("heads", Heads(query, (x @ weight[:, :8])[None], 8**-0.5))
            return x

        checkpoint(layer, hidden, use_reentrant=use_reentrant)
        return octave_matching(caught["heads"], free(TEACHER), MIXTURE, VIEW, gamma=0.0).loss

    loss(False).backward()
    assert weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="carry no gradient: checkpoint the model with use_reentrant=False"):
        loss(True)
    with torch.no_grad():
        assert loss(True) > 0  # a held-out check may


def test_the_teacher_gets_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    student, pi = STUDENT.clone().requires_grad_(), MIXTURE.clone().requires_grad_()
    match(student, teacher, pi).loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    assert pi.grad.abs().max() > 0


def test_bits_stay_single_precision_under_autocast_and_for_half_precision_models():
    student, teacher = random(3, 5, N, seed=1).bfloat16(), random(4, 5, N, seed=2).bfloat16()
    with torch.no_grad():
        wide = match(student.float(), teacher.float(), MIXTURE.float()).loss
        assert torch.equal(octave_matching(
            Heads(student, torch.eye(N).bfloat16()[None], 1.0), free(teacher), MIXTURE.float(), VIEW, gamma=0.7
        ).loss, wide)  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(match(student.float(), teacher.float(), MIXTURE.float()).loss, wide)
    leaf = student.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = match(leaf, teacher.float(), MIXTURE.float()).loss
    inside = gradient(loss, leaf)  # recomputed outside of autocast's scope
    assert torch.equal(inside, gradient(match(leaf, teacher.float(), MIXTURE.float()).loss, leaf))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_an_octave_the_teacher_hardly_looks_at_keeps_its_shape(kappa):
    """Float32 probabilities underflow 88 nats below the largest; the choice within such an octave is still defined."""
    student = random(3, 5, N, seed=1)
    teacher = random(4, 5, N, seed=2)
    far = (BINS >= 5) & VIEW.seen
    teacher[:, far] -= 120
    expected = match(student.clone().requires_grad_(), teacher, kappa=kappa)
    low, pi = student.float().requires_grad_(), MIXTURE.float().requires_grad_()
    found = match(low, teacher.float(), pi, kappa=kappa)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.allclose(found.selectivity.double(), expected.selectivity, rtol=1e-4, atol=1e-6)
    found.loss.backward()
    assert low.grad.isfinite().all()
    assert pi.grad.isfinite().all()
    one, near = torch.ones(3, 1), random(4, 5, N, seed=2)  # with one teacher head, what lies within is as it was
    with torch.no_grad():
        lowered, base = (match(student.float(), x[:1].float(), one, kappa=kappa).selectivity for x in (teacher, near))
    assert torch.allclose(lowered, base, rtol=1e-4, atol=1e-6)
    assert base[5] > 0.1


def test_short_texts_and_rows_with_nothing_to_match_are_defined():
    for keys in range(1, 8):
        rows = torch.arange(keys)
        view = causal(rows, keys)
        student = random(3, keys, keys, seed=keys).requires_grad_()
        found = match(student, random(4, keys, keys, seed=50), view=view)
        assert found.loss.isfinite()
        assert (found.loss > 0) == (keys > 1)
        assert gradient(found.loss, student).isfinite().all()
    nothing = View(torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4).int(), torch.zeros(4, dtype=torch.bool))
    student = random(3, 2, 4).requires_grad_()
    found = match(student, random(4, 2, 4), view=nothing)
    assert found.loss.item() == 0
    assert gradient(found.loss, student).abs().max() == 0
    assert found.rows.tolist() == [0] * 18


def test_a_row_with_one_key_does_not_dilute_the_mean():
    with torch.no_grad():
        rows = torch.tensor([0, 20])
        view = causal(rows)
        both = match(STUDENT[:, :2], TEACHER[:, :2], view=view).loss
        one = match(STUDENT[:, 1:2], TEACHER[:, 1:2], view=causal(rows[1:])).loss
    assert both.item() == pytest.approx(one.item(), rel=1e-12)


def test_one_teacher_head_and_more_student_heads_than_teachers():
    mixer = HeadMixer(3, 1)
    student = STUDENT.float().requires_grad_()
    match(student, TEACHER[:1].float(), mixer()).loss.backward()
    assert mixer().flatten().tolist() == [1.0, 1.0, 1.0]
    assert mixer.logits.grad.abs().max() < 1e-7


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"queries \(3, 5, 8\) and keys \(2, 48, 8\) are not one layer's"):
        Heads(random(3, 5, 8), random(2, N, 8), 1.0)
    with pytest.raises(ValueError, match=r"the teacher has 4 rows and 48 keys, the view is \(R, N\) = \(5, 48\)"):
        match(STUDENT, TEACHER[:, :4])
    with pytest.raises(ValueError, match=r"mixture is \(4, 3\): wanted \(student, teacher\) heads \(3, 4\)"):
        match(STUDENT, pi=MIXTURE.T)
    with pytest.raises(ValueError, match=r"\(3,\) weights for 5 rows"):
        match(STUDENT, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"kappa 1\.5"):
        match(STUDENT, kappa=1.5)
