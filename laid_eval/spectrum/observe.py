"""What is taken from one layer while a text goes through: sums in memory linear in the length.

Two kinds of queries are used. A sample of rows from the text's second half gives everything that depends on the
softmax: every one of them sees every distance below half the text, so no distance is favoured (stationary range).
All queries give what does not: norms and means of the pairs, and by FFT the logit at every distance.

The first tokens of a text are attention sinks; their mass is kept apart and they count nowhere else.

Shape letters: N tokens, W distances, H query heads, F rotary pairs, R sampled rows, M distances on a log grid,
B bands of wavelengths. Definitions: Barbero et al. 2024 (usage), arXiv 2410.06205; the rest is stated where it is
computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from laid_eval.core.heads import wide
from laid_eval.models.capture import ROWS, Call
from laid_eval.models.rotary import Rotary
from laid_eval.spectrum.layout import BANDS, SINKS, log_distances, stationary_width

FEW = 16
"""Rows whose softmax is computed once per band."""

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Sample:
    """Which rows of a text of N tokens are looked at."""

    length: int
    rows: Tensor
    """(R,) queries whose probabilities are computed, ascending, all in the second half."""
    few: Tensor
    """Some of them, for what costs a softmax per band."""
    width: int
    """W: every sampled query sees every distance below this, sinks not counted."""
    positions: Tensor
    """(N,) RoPE positions, or (axes, N)."""


def sample(length: int, queries: int, seed: int, width: int | None = None, positions: Tensor | None = None) -> Sample:
    """Rows drawn one from each of `queries` equal slices of the second half.

    Args:
        length: N.
        queries: Rows, about.
        seed: Of the draw.
        width: Distances looked at, where they are to be fewer than this text allows.
        positions: RoPE positions where they are not the tokens' numbers.
    """
    start = stationary_width(length) + SINKS
    count = max(min(queries, length - start) // 2 * 2, 2)  # two halves of equal size
    edges = np.linspace(start, length, count + 1)
    rng = np.random.default_rng([seed, length])
    rows = torch.from_numpy((edges[:-1] + rng.uniform(size=count) * np.diff(edges)).astype(np.int64))
    few = rows[:: max(count // FEW, 1)]
    return Sample(
        length, rows, few, width or stationary_width(length), torch.arange(length) if positions is None else positions
    )


def observe(call: Call, rotary: Rotary | None, plan: Sample, kernels: bool = True) -> Arrays:
    """Everything taken from one layer; see `attention_rows`, `pair_norms` and `pair_kernels` for the arrays.

    Args:
        call: One text (batch 1) of N tokens, whole (no cache).
        rotary: The layer's pairs, or `None` if it does not rotate: then only what needs none.
        plan: The rows to look at.
        kernels: Also what costs FFTs over all tokens.
    """
    out = attention_rows(call, rotary, plan)
    if rotary is not None:
        out |= pair_norms(call, rotary, plan.positions)
        if kernels:
            out |= pair_kernels(call, rotary)
    return {name: x.float().cpu().numpy() for name, x in out.items()}


def attention_rows(call: Call, rotary: Rotary | None, plan: Sample) -> dict[str, Tensor]:
    """Means over the sampled rows. Masses sum to one: profile + tail + sink + learned_sink + ahead.

    Returns:
        profile (2, H, W): mass at each distance, of every other row and of the rest (two independent samples: their
        cross-power holds no sampling noise); tail (H,): mass beyond W, sinks not counted; sink (H,): mass on the
        first tokens; learned_sink (H,): mass on learned sink logits; ahead (H,): mass on later tokens
        (of the same picture, where a model lets them be seen); entropy (H,): of a row, nats;
        contribution (H, F): mean logit of a pair under attention minus under even weights over the visible keys,
        sinks left out of both, nats (needs `rotary`); utility (H, B): KL divergence from the attention to that with
        the band's pairs unrotated, nats, rows of `plan.few` (needs `rotary`).
    """
    device, w = call.query.device, plan.width
    key = wide(call.key[0])
    k_sum = _running_sum(key[:, SINKS:]) if call.mask.plain and rotary is not None else None
    back = torch.arange(w, device=device)
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    for rows in torch.split(plan.rows.to(device), ROWS):  # ROWS is even: halves alternate over all rows
        p = call.probabilities(rows)[0]  # (H, R, N)
        at = (rows[:, None] - back).expand(len(p), -1, -1)
        aligned = p.gather(2, at)
        near = aligned.sum(1)
        sink, seen = p[..., :SINKS].sum(-1), p.sum(-1)
        add("profile", torch.stack([aligned[:, ::2].sum(1), aligned[:, 1::2].sum(1)]))
        add("sink", sink.sum(1))
        add("learned_sink", (1 - seen).sum(1) if call.sinks is not None else torch.zeros_like(sink[:, 0]))
        ahead = torch.zeros_like(sink) if call.mask.plain else _ahead(p, rows)
        add("ahead", ahead.sum(1))
        add("tail", (seen - sink - ahead).sum(1) - near.sum(1))
        add("entropy", torch.special.entr(p).sum((1, 2)))
        if rotary is not None:
            kept = p[..., SINKS:]
            attended = _by_group(kept, key[:, SINKS:]) / kept.sum(-1, keepdim=True).clamp_min(1e-12)
            even = _even_mean(call, key, k_sum, rows)
            query = call.query[0][:, rows]
            product = rotary.pairs(query) * (rotary.pairs(attended) - rotary.pairs(even)).conj()
            add("contribution", call.scale * product.real.sum(1))
    sums["profile"] *= 2  # each half holds half of the rows
    out = {name: value / len(plan.rows) for name, value in sums.items()}
    if rotary is not None:
        out["utility"] = rotation_utility(call, rotary, plan.few.to(device), BANDS, plan.positions)
    return out


def rotation_utility(call: Call, rotary: Rotary, rows: Tensor, edges: tuple[float, ...], positions: Tensor) -> Tensor:
    """(H, B) mean KL divergence, nats, from the attention of `rows` to that with one band of pairs unrotated.

    A band's pairs are turned back by their own positions, in queries and keys; 0 where a band holds no pair.
    """
    logits = call.logits(rows)
    own = call.log_softmax(logits, rows)
    p = own.exp()
    out = torch.zeros(p.shape[1], len(edges) - 1, device=p.device, dtype=p.dtype)
    for b, (low, high) in enumerate(pairwise(edges)):
        band = np.flatnonzero((rotary.wavelength >= low) & (rotary.wavelength < high) & (rotary.theta > 0))
        if not len(band):
            continue
        pick = torch.as_tensor(band, device=p.device)
        query, key = rotary.pairs(call.query[0][:, rows])[..., pick], rotary.pairs(call.key[0])[..., pick]
        back = rotary.turns(positions.to(p.device)).conj()[:, pick].to(key.dtype)
        # one product for both: the band's turned-back logits minus its own
        change = _dot(torch.cat([query * back[rows], -query], dim=-1), torch.cat([key * back, key], dim=-1))
        other = call.log_softmax(logits + call.scale * change, rows)
        out[:, b] = (p * (own - other))[0].sum(-1).clamp_min(0).mean(1)
    return out


def pair_norms(call: Call, rotary: Rotary, positions: Tensor) -> dict[str, Tensor]:
    """What the rotary pairs of a layer carry, over all tokens but the sinks.

    Un-rotated means turned back by the token's own position.

    Returns:
        query_norm, key_norm (H, F): mean length of the pair's vector; query_mean, key_mean (H, F, 2): mean un-rotated
        vector (real, imaginary).
    """
    turns = _turns(call, rotary, positions).conj()
    sides: dict[str, list[Tensor]] = {"query_norm": [], "query_mean": [], "key_norm": [], "key_mean": []}
    for name, vectors in (("query", call.query[0]), ("key", call.key[0])):
        for head in vectors:  # one at a time: memory
            z = (rotary.pairs(head) * turns)[SINKS:]
            sides[f"{name}_norm"].append(z.abs().mean(0))
            sides[f"{name}_mean"].append(torch.view_as_real(z.mean(0)))
    out = {name: torch.stack(values) for name, values in sides.items()}
    shared = {name: value.repeat_interleave(call.group, dim=0) for name, value in out.items() if name[0] == "k"}
    return out | shared


def pair_kernels(call: Call, rotary: Rotary) -> dict[str, Tensor]:
    """Mean and root mean square logit of every pair by distance, over all tokens but the sinks, by FFT.

    Of text alone: positions are the tokens' numbers.

    Returns:
        moment (H, F, M, 2): scaled mean of un-rotated query x conjugate key at the distances of `log_distances`,
        whose turn by e^(i theta d) has the mean logit as its real part; rms (H, F, M): root mean square logit there;
        logit (H, W): mean logit over all pairs at every distance. Logits in nats.
    """
    n = call.key.shape[2]
    w = stationary_width(n)
    turns = _turns(call, rotary, torch.arange(n))
    grid = torch.as_tensor(log_distances(n), device=turns.device)
    forward = turns[:w].T  # (F, W): e^(i theta d)
    tokens = (n - SINKS - torch.arange(w, device=turns.device)).to(forward.real.dtype)
    out: dict[str, list[Tensor]] = {"moment": [], "rms": [], "logit": []}
    for g in range(call.key.shape[1]):
        k = (rotary.pairs(call.key[0, g]) * turns.conj()).T.contiguous()  # (F, N), un-rotated
        k[:, :SINKS] = 0  # a sink's keys would drown every distance
        key = _Spectra.of(k, n)
        for h in range(g * call.group, (g + 1) * call.group):
            query = _Spectra.of((rotary.pairs(call.query[0, h]) * turns.conj()).T.contiguous(), n)
            moment = call.scale * query.moment(key, w) / tokens  # (F, W)
            out["logit"].append((moment * forward).real.sum(0))
            out["moment"].append(torch.view_as_real(moment[:, grid]))
            # E[Re(A)^2] = (E|A|^2 + Re E[A^2]) / 2, A the rotated product
            square = query.square(key, w)[:, grid] * forward[:, grid] ** 2
            mean_square = call.scale**2 * (query.power(key, w)[:, grid] + square.real) / 2 / tokens[grid]
            out["rms"].append(mean_square.clamp_min(0).sqrt())
    return {name: torch.stack(values) for name, values in out.items()}


def _turns(call: Call, rotary: Rotary, positions: Tensor) -> Tensor:
    """(N, F) e^(i theta position) in the precision of the vectors."""
    exact = call.key.dtype == torch.float64
    return rotary.turns(positions.to(call.key.device)).to(torch.complex128 if exact else torch.complex64)


@dataclass(frozen=True)
class _Spectra:
    """FFTs over the tokens of one head's pairs (F, ...).

    Zero-padded so far that correlations do not wrap around onto the distances below W.
    """

    plain: Tensor
    squared: Tensor
    size: Tensor
    points: int

    @classmethod
    def of(cls, z: Tensor, n: int) -> _Spectra:
        points = next_fast_len(n + stationary_width(n))
        return cls(
            torch.fft.fft(z, n=points),
            torch.fft.fft(z * z, n=points),
            torch.fft.rfft(z.real**2 + z.imag**2, n=points),
            points,
        )

    def moment(self, key: _Spectra, w: int) -> Tensor:
        """(F, W) sum over queries i of q_i conj(k_(i-d))."""
        out: Tensor = torch.fft.ifft(self.plain * key.plain.conj())[:, :w]
        return out

    def square(self, key: _Spectra, w: int) -> Tensor:
        """(F, W) sum over queries of (q_i conj(k_(i-d)))^2."""
        out: Tensor = torch.fft.ifft(self.squared * key.squared.conj())[:, :w]
        return out

    def power(self, key: _Spectra, w: int) -> Tensor:
        """(F, W) sum over queries of |q_i|^2 |k_(i-d)|^2."""
        out: Tensor = torch.fft.irfft(self.size * key.size.conj(), n=self.points)[:, :w]
        return out


def _ahead(p: Tensor, rows: Tensor) -> Tensor:
    """(H, R) mass of rows (H, R, N) on keys after their own."""
    later = torch.arange(p.shape[-1], device=p.device) > rows[:, None]
    return (p * later).sum(-1)


def _running_sum(key: Tensor) -> Tensor:
    exact = torch.float32 if key.device.type == "mps" else torch.float64  # which has no float64
    return torch.cumsum(key.to(exact), dim=1).to(key.dtype)


def _by_group(p: Tensor, key: Tensor) -> Tensor:
    """(H, R, N) weights times (G, N, D) vectors: (H, R, D)."""
    h, r, n = p.shape
    g = len(key)
    return torch.matmul(p.reshape(g, -1, n), key).reshape(h, r, -1)


def _even_mean(call: Call, key: Tensor, running: Tensor | None, rows: Tensor) -> Tensor:
    """(H, R, D) mean of the keys each row sees, sinks left out."""
    if running is not None:
        mean = running[:, rows - SINKS] / (rows - SINKS + 1)[:, None]
        return mean.repeat_interleave(call.group, dim=0)
    seen = call.mask.rows(rows)[0, 0, :, SINKS:].to(key.dtype)
    mean = torch.matmul(seen, key[:, SINKS:]) / seen.sum(-1, keepdim=True).clamp_min(1)
    return mean.repeat_interleave(call.group, dim=0)


def _dot(query: Tensor, key: Tensor) -> Tensor:
    """(H, R, N) real part of (H, R, F) queries times conjugate (G, N, F) keys, summed over pairs."""
    h, r, _ = query.shape
    g = len(key)
    q = torch.view_as_real(query).flatten(-2).reshape(g, (h // g) * r, -1)
    k = torch.view_as_real(key).flatten(-2)
    return torch.matmul(q, k.transpose(1, 2)).reshape(h, r, -1)
