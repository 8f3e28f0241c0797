"""RoPE gain: one learnable factor per rotary pair and query head, and how it disappears into a checkpoint.

A factor that is equal on both channels of a rotary pair commutes with the rotation, so it can be applied to rotated
queries in training and to what *makes* the queries afterwards:

    g R(p) (W x + c) = R(p) ((g W) x + g c)

Only queries need one: attention sees the product of a query's gain and a key's, and every query head has its own.
An attention layer then has H x P more parameters, and the exported model has none.

Where the factor goes differs by family, but is always "entries of some tensors that each make one query channel":
rows of a projection's weight and bias, or entries of the norm behind it. `FoldSite` says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LIMIT = math.log(4)
"""Largest |log gain|."""


class RopeGain(nn.Module):
    """Multiplies the rotated queries of one layer by a learnable factor per rotary pair; 1 everywhere at the start.

    The parameter is (heads or 1, P); the logarithm of the gain is LIMIT * tanh(parameter / LIMIT): the parameter itself
    near 0, bounded, and never without a gradient, as a clip would be. It wants no weight decay: that
    is a pull toward the unchanged model.

    Args:
        first: (P,) channel of each pair's real part within a head.
        second: (P,) channel of its imaginary part: i + D/2 in the half-split layout, the neighbour in the interleaved.
        channels: Of a head, D. Those in no pair are left alone.
        heads: Query heads, each with gains of its own; `None` for gains shared by all heads, the only ones that fold
            into a norm shared by heads (Qwen3, Gemma 3).

    Raises:
        ValueError: The pairs are not disjoint channels of a head.

    >>> gain = RopeGain(torch.arange(2), torch.arange(2, 4), channels=4, heads=3)
    >>> query = torch.randn(1, 3, 5, 4)
    >>> bool((gain(query) == query).all())
    True
    """

    pair_of: Tensor

    def __init__(self, first: Tensor, second: Tensor, channels: int, heads: int | None) -> None:
        super().__init__()
        both = [*first.tolist(), *second.tolist()]
        if len(first) != len(second) or len(set(both)) < len(both) or not set(both) <= set(range(channels)):
            raise ValueError(f"{len(first)} and {len(second)} channels of pairs are not disjoint among {channels}")
        pair_of = torch.full((channels,), len(first))  # one past the pairs: a channel that does not turn
        pair_of[first] = pair_of[second] = torch.arange(len(first))
        self.register_buffer("pair_of", pair_of, persistent=False)
        self.parameter = nn.Parameter(torch.zeros(1 if heads is None else heads, len(first)))

    @property
    def shared(self) -> bool:
        """All heads have the same gains."""
        return len(self.parameter) == 1

    def log_gain(self) -> Tensor:
        """(H or 1, P) natural logarithms of the gains; times 20 / ln 10 they are decibels."""
        return LIMIT * torch.tanh(self.parameter / LIMIT)

    def channel_gain(self) -> Tensor:
        """(H or 1, D) factor of every channel."""
        log = self.log_gain()
        return torch.cat([log, log.new_zeros(len(log), 1)], dim=1)[:, self.pair_of].exp()

    def set_log_gain(self, log_gain: Tensor) -> None:
        """Starts from given gains (H or 1, P).

        Raises:
            ValueError: A logarithm is not within LIMIT.
        """
        if not bool((log_gain.abs() < LIMIT).all()):
            raise ValueError(
                f"log gains must lie within +-{LIMIT:.4f} (a factor of 4), got {float(log_gain.abs().max())}"
            )
        with torch.no_grad():
            self.parameter.copy_(LIMIT * torch.atanh(log_gain.double() / LIMIT))

    def forward(self, query: Tensor) -> Tensor:
        """Queries (..., H, R, D) after the rotation, scaled, in their own dtype.

        Raises:
            ValueError: Queries of another number of heads or channels.
        """
        factor = self.channel_gain()
        if query.shape[-1] != factor.shape[1] or (not self.shared and query.shape[-3] != len(factor)):
            raise ValueError(f"queries {tuple(query.shape)} for gains {tuple(factor.shape)}: wanted (..., H, R, D)")
        return (query * factor[:, None]).to(query.dtype)


class GainNotFoldable(ValueError):
    """The gain can't become part of the checkpoint; the message says why."""


@dataclass(frozen=True, eq=False)
class FoldSite:
    """Where a checkpoint makes one layer's query channels."""

    tensors: Sequence[Tensor]
    """All that write the channel's value, changed together: weight (rows, in) and bias (rows,) of a projection, or
    the weight of the norm behind it; of an adapter not yet merged, `lora_B` too."""
    rows: Tensor
    """(H, D) index along the first dimension of what makes channel d of head h, counted after the rotation (DeepSeek's
    changes the order of channels); (1, D) where all heads share one."""
    offset: float = 0.0
    """What the model adds to the stored number: 1 where a norm's weight is stored as 1 + w (Gemma)."""
    normed_after: bool = False
    """A norm follows on the way to the logits: behind `q_proj` (Qwen3) or behind the rotation (Llama 4)."""


def query_rows(heads: int, channels: int, *, stride: int | None = None) -> Tensor:
    """(H, D) rows that make the queries, heads one after the other.

    Args:
        heads: Query heads; 1 for a norm that heads share.
        channels: Of a head.
        stride: Rows from one head to the next where others lie between: 3 * channels where each head's query, key
            and value are fused (GPT-NeoX), 2 * channels where a gate follows each query (Qwen3-Next).

    >>> query_rows(2, 2, stride=6).tolist()
    [[0, 1], [6, 7]]
    """
    return torch.arange(heads)[:, None] * (stride or channels) + torch.arange(channels)


def fold_gain(gain: RopeGain, site: FoldSite) -> None:
    """Writes a layer's gain into the tensors that make its queries, in place; the `RopeGain` is then to be dropped.

    Computed in float32 and rounded once to the tensor's own dtype. Nothing is written unless all of it can be.

    Args:
        gain: Of the layer.
        site: Where its queries are made.

    Raises:
        GainNotFoldable: Gains per head into numbers that heads share; packed or quantised weights; a norm behind.
        ValueError: Heads, channels or rows don't fit.

    >>> gain = RopeGain(torch.tensor([0]), torch.tensor([1]), channels=2, heads=1)
    >>> gain.set_log_gain(torch.tensor([[2.0]]).log())
    >>> weight = torch.ones(2, 3)
    >>> fold_gain(gain, FoldSite([weight], query_rows(1, 2)))
    >>> weight[:, 0].tolist()
    [2.0, 2.0]
    """
    factor = gain.channel_gain().detach()
    _check(gain, factor, site)
    folded = [_scaled(tensor, factor.expand(len(site.rows), -1), site) for tensor in site.tensors]
    with torch.no_grad():
        for tensor, new in zip(site.tensors, folded, strict=True):
            tensor.copy_(new)


def _scaled(tensor: Tensor, factor: Tensor, site: FoldSite) -> Tensor:
    """The whole tensor with its query rows times the gain, in float32 at least."""
    new = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    rows = site.rows.flatten().to(tensor.device)
    by_row = factor.to(new).flatten().reshape(-1, *[1] * (tensor.ndim - 1))
    new[rows] = new[rows] * by_row + site.offset * (by_row - 1)  # exact where the gain is 1
    return new


def _check(gain: RopeGain, factor: Tensor, site: FoldSite) -> None:
    heads, channels = site.rows.shape
    if site.normed_after:
        raise GainNotFoldable(
            "a norm follows on the way from these weights to the logits and would take the gain out again: fold into "
            "that norm's weight if it comes before the rotation; behind the rotation there is nothing to fold into"
        )
    if not gain.shared and heads == 1:
        raise GainNotFoldable(
            f"gains of {len(factor)} heads can't fold into numbers that all heads share (a query norm of one head's "
            "size): use gains shared by heads (heads=None)"
        )
    if channels != factor.shape[1] or (not gain.shared and heads != len(factor)):
        raise ValueError(f"gains (H, D) = {tuple(factor.shape)} do not fit rows {(heads, channels)}")
    if len(set(site.rows.flatten().tolist())) < site.rows.numel():
        raise ValueError("two query channels claim the same row")
    for tensor in site.tensors:
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise GainNotFoldable(f"weights are packed or quantised ({tensor.dtype}): fold first, then quantise")
        if not 0 <= int(site.rows.min()) <= int(site.rows.max()) < len(tensor):
            raise ValueError(f"rows up to {int(site.rows.max())} in a tensor {tuple(tensor.shape)}")
