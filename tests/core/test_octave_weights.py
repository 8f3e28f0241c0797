"""Weights of distance ramp outward with training and keep their mean."""

import pytest
import torch

from laid_eval.core import distance_weight
from laid_eval.core.matching import octave_weights


@pytest.mark.parametrize("octaves", range(4, 21))
def test_weights_move_outward_with_training_and_keep_their_mean(octaves):
    filled = torch.ones(1, octaves + 1)
    last = torch.zeros(octaves - 1)
    for step in range(0, 1001, 50):
        weights = octave_weights(filled, distance_weight(step, 1000))[0]
        assert weights[0] == 1
        assert weights[1:].mean().item() == pytest.approx(1, abs=1e-6)
        ratios = weights[2:] / weights[1:-1]
        assert (ratios >= last - 1e-6).all()
        last = ratios
    assert (weights[-1] / weights[1]).item() == pytest.approx(64, rel=1e-5)


def test_octaves_that_a_row_lacks_take_no_part_in_the_mean():
    filled = torch.tensor([[True, True, True, False, False], [False, False, True, False, True]])
    weights = octave_weights(filled.float(), 1.0)
    for row, here in zip(weights, filled, strict=True):
        assert row[1:][here[1:]].mean().item() == pytest.approx(1)
        assert (row[1:][~here[1:]] == 0).all()
    assert torch.equal(octave_weights(filled.float(), 0.0)[:, 1:], filled[:, 1:].float())


def test_the_ramp_is_a_function_of_the_optimisers_step():
    values = [distance_weight(step, 200, maximum=2.0) for step in range(260)]
    assert values == sorted(values)
    assert values[:11] == [0.0] * 11
    assert values[160:] == [2.0] * 100
    assert distance_weight(85, 200) == pytest.approx(0.5)
    with pytest.raises(
        ValueError, match="total_steps is 0: the ramp of the distance weight needs the length of the run"
    ):
        distance_weight(3, 0)
    with pytest.raises(ValueError, match=r"from 0\.8 to 0\.1"):
        distance_weight(3, 10, start=0.8, end=0.1)
