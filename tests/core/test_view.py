"""What rows see, how far away it is, and which rows stand for all."""

import pytest
import torch

from laid_eval.core import (
    View,
    image_distance,
    index_distance,
    rope_distance,
    sample_rows,
    seen_keys,
    sink_keys,
)

DOCUMENTS = torch.tensor([-1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])


def test_a_row_sees_its_own_document_up_to_itself():
    seen = seen_keys(torch.arange(12), DOCUMENTS)
    for i in range(12):
        for j in range(12):
            assert seen[i, j] == (j <= i and DOCUMENTS[i] == DOCUMENTS[j] != -1)


def test_a_sliding_window_counts_the_row_itself():
    seen = seen_keys(torch.tensor([7]), DOCUMENTS, window=3)
    assert seen[0].nonzero().flatten().tolist() == [5, 6, 7]


def test_the_sink_is_the_start_of_every_document_not_of_the_padding():
    assert sink_keys(DOCUMENTS, first=2).nonzero().flatten().tolist() == [2, 3, 8, 9]
    assert sink_keys(torch.zeros(6, dtype=torch.long)).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_octaves_begin_at_powers_of_two_and_the_last_holds_the_rest():
    distance = torch.tensor([[0, 1, 2, 3, 6, 7, 14, 15, 1000]], dtype=torch.int32)
    view = View(torch.ones_like(distance, dtype=torch.bool), distance, torch.zeros(9, dtype=torch.bool))
    assert view.bins(slice(0, 1), 4).tolist() == [[1, 2, 2, 3, 3, 4, 4, 4, 4]]
    assert view.bins(slice(0, 1), 20).tolist() == [[1, 2, 2, 3, 3, 4, 4, 5, 10]]


def test_three_distances_of_one_text_with_pictures():
    """Tokens 2-5 and 7-10 are images on one grid position of time each (M-RoPE)."""
    time = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5, 5, 5, 5, 7])
    height = torch.tensor([0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7])
    width = torch.tensor([0, 1, 2, 3, 2, 3, 4, 5, 6, 5, 6, 7])
    begun = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    row = torch.tensor([11, 10])
    assert index_distance(row, 12)[0].tolist() == list(range(11, -1, -1))
    rope = rope_distance(row, torch.stack([time, height, width]))
    assert rope[0].tolist() == [7, 6, 5, 5, 5, 5, 3, 2, 2, 2, 2, 0]
    assert rope[1, 2].item() == 4  # (5, 6, 6) from (2, 2, 2)
    assert image_distance(row, begun)[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_a_view_of_other_shapes_or_of_the_future_is_refused():
    seen = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"seen, distance and sink are \(\(2, 3\), \(2, 3\), \(2,\)\)"):
        View(seen, seen.int(), seen[:, 0])
    with pytest.raises(ValueError, match="negative distance"):
        View(seen, -seen.int(), seen[0])
    View(~seen, -seen.int(), seen[0])  # what is not seen may lie anywhere


def test_weighted_rows_estimate_the_mean_over_all_rows_without_bias():
    """Losses grow with the row, as they do: rows drawn without weights would favour the early ones."""
    candidates = torch.arange(5, 700)
    loss = (candidates.double() / 700) ** 2 + 0.2 * torch.rand(695, generator=torch.Generator().manual_seed(0))
    always = torch.arange(690, 700)
    estimates = []
    for seed in range(2000):
        rows = sample_rows(candidates, 24, seed=seed, step=0, example="x", always=always)
        assert len(rows.index) == 34
        weight = rows.weight.double()
        assert weight.sum().item() == pytest.approx(695)
        estimates.append(((weight * loss[rows.index - 5]).sum() / weight.sum()).item())
    estimates = torch.tensor(estimates, dtype=torch.float64)
    error = estimates.std() / 2000**0.5
    assert (estimates.mean() - loss.mean()).abs() < 3 * error
    assert estimates.std() < 0.7 * loss.std() / 24**0.5  # strata help


def test_rows_are_a_function_of_seed_step_and_example():
    def draw(*key):
        seed, step, example = key
        return sample_rows(torch.arange(1, 500), 20, seed=seed, step=step, example=example).index.tolist()

    torch.manual_seed(0)
    first = draw(1, 2, "a")
    torch.manual_seed(1)  # no part of it
    assert draw(1, 2, "a") == first
    assert len({tuple(draw(*key)) for key in [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (1, 3, "a"), (1, 2, 7)]}) == 5


def test_every_row_is_taken_where_all_fit():
    rows = sample_rows(torch.arange(1, 7), 50, seed=0, step=0, example=0, always=torch.tensor([6]))
    assert rows.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert rows.weight.tolist() == [1.0] * 6


def test_too_few_rows_to_be_unbiased_are_refused():
    with pytest.raises(ValueError, match="3 rows can't cover 8 octaves"):
        sample_rows(torch.arange(1, 500), 3, seed=0, step=0, example=0)
