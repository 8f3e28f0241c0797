"""From arrays to numbers: what is planted in profiles and pairs is what the tables say."""

import numpy as np
import pytest

from laid_eval.models.rotary import Rotary
from laid_eval.spectra import Metric
from laid_eval.spectrum.collect import finish
from laid_eval.spectrum.distance import octave_edges
from laid_eval.spectrum.layout import BANDS, far_bins, far_distance, stationary_width
from laid_eval.spectrum.summary import bands, coverage, head_table, metrics, top_heads

N = 512
W = stationary_width(N)
THETA = 10000.0 ** -(np.arange(8) / 8)
ROTARY = Rotary(THETA, 1.0, np.arange(8), np.arange(8) + 8)
HEADS = ("sink", "previous", "far", "beyond", "edge of local", "past local")


def part(profile, tail, sink, **more):
    """What one text gives for one layer of heads (H, W)."""
    heads = len(profile)
    return {
        "layers": np.array([0]),
        "scale": np.array([0.25], dtype=np.float32),
        "profile": np.stack([profile, profile])[None].astype(np.float32),  # both samples alike
        "tail": tail[None].astype(np.float32),
        "sink": sink[None].astype(np.float32),
        "learned_sink": np.zeros((1, heads), dtype=np.float32),
        "entropy": np.ones((1, heads), dtype=np.float32),
        **{name: value[None].astype(np.float32) for name, value in more.items()},
    }


def planted():
    """One text with a head of each kind."""
    profile, tail, sink = np.zeros((6, W)), np.zeros(6), np.zeros(6)
    sink[0] = 1.0
    profile[1, 1] = 1.0
    profile[2, 128:] = 1 / (W - 128)
    profile[3, 0], tail[3] = 0.3, 0.7
    profile[4, 63] = profile[5, 64] = 1.0
    return part(profile, tail, sink)


def table(content=0.0):
    arrays = finish([planted(), planted()], [None], N)
    return head_table(arrays, N, 0.95, None, np.full((1, 6), content)).set_index("head")


def test_planted_heads_are_of_the_kinds_that_they_were_planted_as():
    kinds = [set(found.split()) for found in table()["kinds"]]
    assert kinds[0] == {"sink"}
    assert kinds[1] == {"local", "positional"}
    assert kinds[2] == {"global"}
    assert kinds[3] == {"global"}
    assert kinds[4] == {"local"}
    assert kinds[5] == set()


def test_a_head_whose_place_depends_on_the_words_is_not_positional():
    assert table(content=0.2)["kinds"][1] == "local"


def test_a_sink_takes_nothing_from_the_scores_of_what_lies_outside_it():
    """Halving a head's mass outside sinks changes none of its scores but the sink's."""
    profile, tail = np.zeros((2, W)), np.array([0.08, 0.04])
    profile[0, [1, 200]] = 0.46
    profile[1] = profile[0] / 2
    arrays = finish([part(profile, tail, np.array([0.0, 0.5]))], [None], N)
    whole, half = head_table(arrays, N, 0.95, None, None).to_dict("records")
    assert half["sink"] == pytest.approx(0.5)
    for score in ("local", "global", "positional", "d50", "d90", "low_frequency_ratio", "centroid"):
        assert half[score] == pytest.approx(whole[score], rel=1e-5), score


def test_a_distance_beyond_half_the_text_is_unknown_and_becomes_null():
    assert np.isnan(table()["d50"][3])
    assert table()["d50"][2] == pytest.approx((128 + W) // 2, abs=1)
    profile = np.zeros((1, W))
    profile[0, 5] = 0.6
    arrays = finish([part(profile, np.array([0.4]), np.zeros(1))], [None], N)
    found = {m.name: m for m in metrics(arrays, N, 0.95)}
    assert found["d50"].value == 5
    assert found["d90"].value is None
    assert found["d90"].low is None
    assert str(found["d90"]) == "unknown"
    assert Metric.model_validate_json(found["d90"].model_dump_json()) == found["d90"]


@pytest.mark.parametrize("length", [256, 300, 511, 512, 1000, 4096, 6000, 8192, 12345])
def test_far_bins_are_those_at_and_beyond_the_far_distance(length):
    edges = octave_edges(stationary_width(length))
    for share in (4, 8):
        far = far_distance(length, share)
        assert edges[far_bins(length, share).start] == far
        assert length / share / 2 < far <= length / share


def random_parts(texts, rng):
    out = []
    for _ in range(texts):
        mass = rng.dirichlet(np.full(W + 2, 0.02), size=3)  # some texts have nearly all of their mass in one place
        usage = rng.lognormal(0, 2, size=(2, 3, 8))
        more = {
            "query_norm": usage[0],
            "key_norm": usage[1],
            "query_mean": rng.normal(size=(3, 8, 2)) * usage[0][..., None] / 3,
            "key_mean": np.zeros((3, 8, 2)),
            "contribution": rng.normal(size=(3, 8)),
            "utility": rng.exponential(0.1, size=(3, len(BANDS) - 1)),
        }
        out.append(part(mass[:, :W], mass[:, W], mass[:, W + 1], **more))
    return out


def test_intervals_hold_the_value_and_stay_within_what_is_possible():
    rng = np.random.default_rng(0)
    clipped = 0
    for _ in range(20):
        arrays = finish(random_parts(2, rng), [ROTARY], N)
        for m in metrics(arrays, N, 0.99):
            if m.value is None:
                continue
            top = 1.0 if m.unit in ("share", "0..1") else np.inf
            assert 0 <= m.low <= m.value <= m.high <= top, m
            clipped += m.low == 0 or m.high == top
        for band in bands(arrays, 0.99):
            assert 0 <= band.usage.low <= band.usage.value <= band.usage.high <= 1
        rows = head_table(arrays, N, 0.99, None, None)
        for score in ("sink", "local", "global"):
            known = rows[~rows[score].isna()]
            assert (known[f"{score}_low"] >= 0).all()
            assert (known[f"{score}_high"] <= 1).all()
    assert clipped > 20, "two texts this different must reach the bounds"


def test_one_text_has_values_and_no_intervals():
    arrays = finish(random_parts(1, np.random.default_rng(1)), [ROTARY], N)
    for m in metrics(arrays, N, 0.95):
        assert (m.low, m.high) == (None, None)
    assert all(band.usage.value is not None and band.usage.low is None for band in bands(arrays, 0.95))


def usage_of(shares):
    """Arrays of a run of one layer with one head whose usage has these shares."""
    profile = np.zeros((1, W))
    profile[0, 0] = 1.0
    utility = np.zeros((1, len(BANDS) - 1))
    utility[0, 0] = 0.01
    pairs = {
        "query_norm": np.asarray(shares)[None],
        "key_norm": np.ones((1, 8)),
        "query_mean": np.zeros((1, 8, 2)),
        "key_mean": np.zeros((1, 8, 2)),
        "contribution": np.zeros((1, 8)),
        "utility": utility,
    }
    return finish([part(profile, np.zeros(1), np.zeros(1), **pairs)], [ROTARY], N)


def test_bands_share_out_all_pairs_and_all_usage():
    found = bands(usage_of(np.arange(1.0, 9.0)), 0.95)
    assert sum(b.pairs for b in found) == 8
    assert sum(b.even for b in found) == pytest.approx(1)
    assert sum(b.usage.value for b in found) == pytest.approx(1)
    for band in found:
        inside = (ROTARY.wavelength >= band.low) & (ROTARY.wavelength < (band.high or np.inf))
        assert band.usage.value == pytest.approx(np.arange(1.0, 9.0)[inside].sum() / 36)
        assert band.pairs == inside.sum()


def test_a_band_is_positional_by_its_utility_and_else_named_by_its_usage():
    shares = np.array([1.0, 1.0, 8.0, 0.01, 0.01, 0.5, 0.5, 0.5])
    kinds = {band.low: band.kind for band in bands(usage_of(shares), 0.95)}
    assert kinds[0.0] == "positional"
    assert kinds[16.0] == "semantic"  # pairs 1 and 2: much used, though turning them does nothing
    assert kinds[64.0] == "unused"  # pair 3
    assert kinds[16384.0] == "weak"  # pair 7


@pytest.mark.parametrize(("shares", "pairs"), [(np.ones(8), 8.0), (np.eye(8)[3], 1.0)])
def test_effective_pairs_count_the_pairs_in_use(shares, pairs):
    found = {m.name: m.value for m in metrics(usage_of(shares), N, 0.95)}
    assert found["effective_pairs"] == pytest.approx(pairs, rel=1e-5)


def test_low_pairs_are_those_that_turn_less_than_once_in_the_text():
    shares = np.arange(1.0, 9.0)
    found = {m.name: m.value for m in metrics(usage_of(shares), N, 0.95)}
    assert found["low_pairs_usage"] == pytest.approx(shares[ROTARY.wavelength > N].sum() / 36)


def test_layers_that_share_their_frequencies_are_described_together():
    slow = Rotary(THETA / 4, 1.0, ROTARY.first, ROTARY.second)
    parts = random_parts(1, np.random.default_rng(2))
    arrays = finish(parts, [ROTARY], N)
    arrays = {k: np.repeat(v, 3, axis=1) if k == "usage" else v for k, v in arrays.items()} | {"layers": np.arange(3)}
    found = coverage([ROTARY, slow, ROTARY, None], arrays, N, N)
    assert [c.layers for c in found] == [(0, 2), (1,)]
    assert found[1].longest == pytest.approx(4 * found[0].longest)
    for one in found:
        assert one.full + one.partial + one.quasi_dc + one.none == one.pairs == 8


def test_top_heads_are_the_highest_scores():
    found = top_heads(table().reset_index())
    assert (found["sink"][0].layer, found["sink"][0].head, found["sink"][0].score) == (0, 0, 1.0)
    assert {h.head for h in found["local"][:2]} == {1, 4}
    for heads in found.values():
        assert [h.score for h in heads] == sorted((h.score for h in heads), reverse=True)
