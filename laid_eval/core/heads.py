"""What an attention layer hands over for one text: queries and keys after the rotation, never scores.

Shape letters, here and in the modules beside: H query heads, G key heads, R rows (the queries that are looked at),
N keys, D channels of a head, B octaves of distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Heads:
    """One layer's queries and keys of one text, as its model rotates, scales and caps them.

    Raises:
        ValueError: The shapes don't belong to one layer.
    """

    query: Tensor
    """(H, R, D) of the rows to match."""
    key: Tensor
    """(G, N, D) of all tokens; each serves H / G query heads in a row (grouped-query attention)."""
    scale: float
    """Factor on the products, the model's own: D ** -0.5 for most families."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap) (Gemma 2)."""

    def __post_init__(self) -> None:
        q, k = tuple(self.query.shape), tuple(self.key.shape)
        if len(q) != 3 or len(k) != 3 or q[2] != k[2] or k[0] == 0 or q[0] % k[0]:
            raise ValueError(
                f"queries {q} and keys {k} are not one layer's: wanted (H, R, D) and (G, N, D), H a multiple of G"
            )

    @property
    def has_gradient(self) -> bool:
        """A loss on these heads would train something."""
        return self.query.requires_grad or self.key.requires_grad

    def widened(self) -> Heads:
        """The same in float32 (float64 stays), so that softmax and sums over chunks are exact enough."""
        return Heads(wide(self.query), wide(self.key), self.scale, self.softcap)

    def detached(self) -> Heads:
        """The same, cut off from what made it."""
        return Heads(self.query.detach(), self.key.detach(), self.scale, self.softcap)

    def logits(self, rows: slice) -> Tensor:
        """(R, H, N) scaled and capped logits of some rows, unmasked.

        Query heads of one group share a product: keys are never repeated.
        """
        g, n, d = self.key.shape
        query = self.query[:, rows] * self.scale
        products = torch.matmul(query.reshape(g, -1, d), self.key.transpose(1, 2))
        logits = products.reshape(len(query), -1, n).transpose(0, 1)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()
