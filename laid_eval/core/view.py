"""What rows see and how far away it is: masks, three kinds of distance, the sink, and which rows to look at.

"Distance" is a choice. Counted in tokens it measures dilution (how many keys compete); in rotary positions, what
RoPE sees (in a model with M-RoPE an image of 391 tokens may span 23 positions); in images, what a user means.

Octave b = 1, 2, ... holds distances with 2^(b-1) <= distance + 1 < 2^b. The first tokens of a document draw attention
whatever they say (Xiao et al. 2023, StreamingLLM), and are the farthest keys as well: they are kept apart, as b = 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""Document number of tokens that belong to none."""


@dataclass(frozen=True, eq=False)
class View:
    """What each of R rows sees of N keys.

    Raises:
        ValueError: Shapes differ, or a key that is seen lies at a negative distance.
    """

    seen: Tensor
    """(R, N) booleans: causal, same document, no padding, inside the sliding window."""
    distance: Tensor
    """(R, N) whole numbers; what they count is the caller's choice."""
    sink: Tensor
    """(N,) booleans: keys of the sink, no octave's."""

    def __post_init__(self) -> None:
        shapes = tuple(self.seen.shape), tuple(self.distance.shape), tuple(self.sink.shape)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0] or shapes[2] != shapes[0][1:]:
            raise ValueError(f"seen, distance and sink are {shapes}: wanted (R, N), (R, N) and (N,)")
        if bool((self.seen & (self.distance < 0)).any()):
            raise ValueError("a key that is seen lies at a negative distance")

    def bins(self, rows: slice, octaves: int) -> Tensor:
        """(R, N) bin of each key: 0 the sink, 1.. the octaves (the last holds all beyond), octaves + 1 unseen."""
        bins = _octave(self.distance[rows], octaves).masked_fill(self.sink, 0)
        return bins.masked_fill(~self.seen[rows], octaves + 1)


def seen_keys(rows: Tensor, documents: Tensor, window: int | None = None) -> Tensor:
    """(R, N) booleans: keys of the same document, not after the row, and within its sliding window.

    Args:
        rows: (R,) indices of the rows.
        documents: (N,) number of the document each token belongs to; -1 is padding.
        window: Tokens a row sees, itself included; all where `None`.

    >>> seen_keys(torch.tensor([3]), torch.tensor([-1, 0, 0, 0, 0])).int().tolist()
    [[0, 1, 1, 1, 0]]
    """
    index = torch.arange(len(documents), device=documents.device, dtype=torch.int32)
    back = rows.to(torch.int32)[:, None] - index
    own = documents[rows][:, None]
    seen = (back >= 0) & (own == documents) & (own != PADDING)
    return seen if window is None else seen & (back < window)


def index_distance(rows: Tensor, keys: int) -> Tensor:
    """(R, N) tokens between each row (R,) and each of N keys.

    >>> index_distance(torch.tensor([2]), 4).tolist()
    [[2, 1, 0, 1]]
    """
    index = torch.arange(keys, device=rows.device, dtype=torch.int32)
    return (rows.to(torch.int32)[:, None] - index).abs()


def rope_distance(rows: Tensor, positions: Tensor) -> Tensor:
    """(R, N) rotary positions between rows (R,) and keys: the largest over the axes of positions (N,) or (A, N).

    >>> rope_distance(torch.tensor([2]), torch.tensor([[0, 1, 2], [0, 5, 2]])).tolist()
    [[2, 3, 0]]
    """
    distance = torch.zeros(len(rows), positions.shape[-1], dtype=torch.int32, device=positions.device)
    for line in positions.to(torch.int32).reshape(-1, positions.shape[-1]):  # by axis: (R, N), never (A, R, N)
        distance = torch.maximum(distance, (line[rows][:, None] - line).abs())
    return distance


def image_distance(rows: Tensor, images: Tensor) -> Tensor:
    """(R, N) images from rows (R,) back to keys, from the number of the image each token (N,) belongs to.

    With what comes after the last image counted as one more, that image lies one back.

    >>> image_distance(torch.tensor([3]), torch.tensor([0, 1, 1, 2])).tolist()
    [[2, 1, 1, 0]]
    """
    return rope_distance(rows, images)  # a count of images is one more axis of positions


def sink_keys(documents: Tensor, first: int = 4) -> Tensor:
    """(N,) booleans: the first tokens of each document, padding (-1) aside; a document's tokens lie together.

    >>> sink_keys(torch.tensor([-1, 0, 0, 0, 1, 1]), first=2).int().tolist()
    [0, 1, 1, 0, 1, 1]
    """
    index = torch.arange(len(documents), device=documents.device)
    begins = documents != documents.roll(1)
    start = torch.where(begins, index, 0).cummax(dim=0).values
    return (index - start < first) & (documents != PADDING)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to look at, and how many rows each stands for."""

    index: Tensor
    """(R,) in ascending order."""
    weight: Tensor
    """(R,) float32; the sum is the number of rows that could have been drawn."""


def sample_rows(
    candidates: Tensor, count: int, *, seed: int, step: int, example: Hashable, always: Tensor | None = None
) -> Rows:
    """Draws `count` rows, as many from each octave of row position as it can give; all of `always` come on top.

    A weighted mean over the rows (`octave_matching(..., weights=)`) is an unbiased estimate of the mean over all
    candidates: each row weighs size of its octave / rows drawn from it. The draw is a pure function of
    (seed, step, example), so a resumed run looks at the same rows.

    Args:
        candidates: (C,) positions of rows that may be drawn, each once: real tokens that see at least two keys.
        count: Rows to draw; at least one per octave of positions, or all candidates.
        seed: Of the run.
        step: Of the optimiser.
        example: Identity of the text, printed the same in every run.
        always: (A,) rows taken whatever is drawn (the answer's), each once, weighing 1.

    Raises:
        ValueError: `count` leaves an octave without a row: the mean would be biased.

    >>> rows = sample_rows(torch.arange(1, 100), 12, seed=0, step=3, example="a")
    >>> len(rows.index), round(float(rows.weight.sum()), 3)
    (12, 99.0)
    """
    sure = candidates.new_empty(0) if always is None else always.to(candidates)
    candidates = candidates[~torch.isin(candidates, sure)].sort().values
    sizes = torch.bincount(_octave(candidates, 31))
    strata = torch.split(candidates, sizes[sizes > 0].tolist())
    if count < len(strata):
        raise ValueError(f"{count} rows can't cover {len(strata)} octaves of row position: draw at least that many")
    generator = torch.Generator().manual_seed(_number(seed, step, example))
    index, weight = [sure], [torch.ones(len(sure))]
    left = count
    # the smallest octaves first: what they can't give goes to the larger ones
    for i, stratum in enumerate(sorted(strata, key=len)):
        share = min(len(stratum), left // (len(strata) - i))
        left -= share
        drawn = torch.randperm(len(stratum), generator=generator)[:share]
        index.append(stratum[drawn.to(stratum.device)])
        weight.append(torch.full((share,), len(stratum) / share))
    order = torch.argsort(torch.cat(index))
    return Rows(torch.cat(index)[order], torch.cat(weight).to(order.device)[order])


def _octave(distance: Tensor, octaves: int) -> Tensor:
    """Octave 1.. of each distance; the last holds all beyond."""
    starts = 2 ** torch.arange(octaves, device=distance.device, dtype=distance.dtype)
    return torch.bucketize(distance + 1, starts, right=True)


def _number(*parts: Hashable) -> int:
    """A seed from anything that prints the same in every run; Python's own hash of a string does not."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
