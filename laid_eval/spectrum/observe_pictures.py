"""What is taken from one layer while a prompt with pictures goes through: who looks at what, and how far in positions.

Tokens are text or picture; rotary positions run along axes of their own (M-RoPE: time, height, width) and advance by
the longer side of a picture, not by its tokens. Each statistic is a mean over rows of exact probabilities; what falls
on the first tokens (sinks) is counted apart.

Shape letters: N tokens, H query heads, R rows, I pictures, A position axes, P bins of position distance.
Sources: Wang et al. 2024 (M-RoPE), arXiv 2409.12191.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from laid_eval.models.capture import ROWS, Call
from laid_eval.spectrum.layout import SINKS
from laid_eval.spectrum.observe import Arrays, Sample

LAST = 4
"""Last tokens of a prompt, whose look at each picture is taken: the end of the question, where the answer comes."""
TYPES = ("text", "image")


@dataclass(frozen=True)
class Sights:
    """Which rows of a prompt are asked what they look at, and where its pictures lie."""

    types: Tensor
    """(N, 2) ones where a token is text, is picture; sinks are neither."""
    owners: Tensor
    """(N, I) ones where a token belongs to a picture."""
    rows: tuple[Tensor, Tensor]
    """Queries in the second half that are text, and that are picture."""
    far: int
    """Tokens from which on a key is far."""
    edges: Tensor
    """(P - 2,) lower edges of the bins of position distance from the second on: 1, 2, 4, ..."""


def sights(image: Tensor, spans: Tensor, queries: int, seed: int, far: int, reach: int) -> Sights:
    """How a prompt is looked at.

    Args:
        image: (N,) which tokens are picture.
        spans: (I, 2) where each picture's tokens begin and end, markers around it included.
        queries: Most rows of each type.
        seed: Of their draw.
        far: Tokens from which on a key is far.
        reach: Positions of the longest prompt, which decides the bins.
    """
    n = len(image)
    slots = torch.arange(n)
    types = torch.stack([~image, image], dim=1) & (slots >= SINKS)[:, None]
    owners = (slots[:, None] >= spans[:, 0]) & (slots[:, None] < spans[:, 1]) & (image & (slots >= SINKS))[:, None]
    rng = np.random.default_rng([seed, n, 2])
    rows = []
    for kind in (~image, image):
        there = slots[kind & (slots >= n // 2)].numpy()
        chosen = np.sort(rng.permutation(there)[:queries])
        rows.append(torch.from_numpy(chosen))
    edges = 2 ** torch.arange(max(reach - 1, 1).bit_length())
    return Sights(types.float(), owners.float(), (rows[0], rows[1]), far, edges)


def observe_pictures(call: Call, plan: Sample, where: Sights) -> Arrays:
    """Everything taken from one layer; see `type_rows`, `picture_rows` and `position_rows` for the arrays."""
    out = (
        type_rows(call, where) | picture_rows(call, plan, where) | {"position_octave": position_rows(call, plan, where)}
    )
    return {name: x.float().cpu().numpy() for name, x in out.items()}


def type_rows(call: Call, where: Sights) -> dict[str, Tensor]:
    """Means over text queries and over picture queries of the second half (second to last dimension, that order).

    Returns:
        type_mass (H, 2, 2): mass on text keys and on picture keys; type_sink (H, 2): mass on the first tokens;
        type_far (H, 2): mass on keys `where.far` tokens away or more; type_share (2, 2): share of text and of picture
        among the keys that are visible, sinks left out.
    """
    device = call.query.device
    types = where.types.to(device)
    slots = torch.arange(len(types), device=device)
    found: dict[str, list[Tensor]] = {"type_mass": [], "type_sink": [], "type_far": [], "type_share": []}
    for chosen in where.rows:
        sums: dict[str, Tensor] = {}
        for rows in torch.split(chosen.to(device), ROWS):
            p = call.probabilities(rows)[0]
            seen = call.mask.rows(rows)[0, 0].to(p.dtype) @ types.to(p.dtype)  # (R, 2)
            away = (slots >= SINKS) & (rows[:, None] - slots >= where.far)
            _add(sums, "type_mass", (p @ types.to(p.dtype)).sum(1))
            _add(sums, "type_sink", p[..., :SINKS].sum((1, 2)))
            _add(sums, "type_far", (p * away).sum((1, 2)))
            _add(sums, "type_share", (seen / seen.sum(-1, keepdim=True).clamp_min(1)).sum(0))
        for name, values in found.items():
            values.append(sums[name] / len(chosen))
    return {name: torch.stack(values, dim=0 if name == "type_share" else 1) for name, values in found.items()}


def picture_rows(call: Call, plan: Sample, where: Sights) -> dict[str, Tensor]:
    """Means over the prompt's last tokens.

    Returns:
        image_mass (H, I): mass on each picture; image_share (I,): each picture's share of the keys that are visible,
        sinks left out.
    """
    device = call.query.device
    rows = torch.arange(plan.length - LAST, plan.length, device=device)
    p = call.probabilities(rows)[0]
    owners = where.owners.to(device, p.dtype)
    seen = call.mask.rows(rows)[0, 0].to(p.dtype)
    visible = seen[:, SINKS:].sum(-1, keepdim=True)
    return {"image_mass": (p @ owners).mean(1), "image_share": (seen @ owners / visible).mean(0)}


def position_rows(call: Call, plan: Sample, where: Sights) -> Tensor:
    """(H, A, P) mass by distance in RoPE positions along each axis, mean over the sampled rows, sinks left out.

    Bins: the same position, [1, 2), [2, 4), ... behind, and last all that lies ahead (a column further right in a row
    above).
    """
    device = call.query.device
    positions = plan.positions.reshape(-1, plan.length).to(device)
    edges = where.edges.to(device)
    bins = len(edges) + 2
    sums: dict[str, Tensor] = {}
    for rows in torch.split(plan.rows.to(device), ROWS):
        p = call.probabilities(rows)[0][..., SINKS:]
        for axis, line in enumerate(positions):
            back = line[rows][:, None] - line[SINKS:]
            index = torch.where(back < 0, bins - 1, torch.bucketize(back, edges, right=True))
            binned = torch.zeros(*p.shape[:2], bins, device=device, dtype=p.dtype)
            _add(sums, str(axis), binned.scatter_add_(2, index.expand(len(p), -1, -1), p).sum(1))
    return torch.stack([sums[str(axis)] for axis in range(len(positions))], dim=1) / len(plan.rows)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
