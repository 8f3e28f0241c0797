"""The rotary pairs of every layer, found by behaviour instead of from the configuration.

Frequencies are read off the model's own rotary module (the angle it gives to position 1), at the length that will
be measured. Which channels form a pair, how many channels rotate and whether a layer rotates at all is found by
moving a short text along the position axis: a pair turns by its frequency times the shift, and nothing else does.

Sources: Su et al. 2021 (RoPE); for the layouts see each family's `apply_rotary_pos_emb` in transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from laid_eval.core.heads import wide
from laid_eval.errors import UserError
from laid_eval.models.capture import Call, capture
from laid_eval.models.source import quiet

_TEXT = 48  # tokens of the text that is moved
_RESIDUAL = {torch.float64: 1e-4, torch.float32: 1e-3}
_LOOSE = 0.05  # half precision
AXES = ("t", "h", "w")


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the heads of one layer are rotated. F pairs."""

    theta: NDArray[np.float64]
    """(F,) rad/token; 0 where a pair does not turn."""
    factor: float
    """What the module multiplies cosine and sine by; logits grow by its square."""
    first: NDArray[np.int64]
    """(F,) channel of each pair's real part within the head."""
    second: NDArray[np.int64]
    """(F,) channel of each pair's imaginary part."""
    axis: tuple[str, ...] | None = None
    """(F,) position axis that turns each pair (t, h, w), for M-RoPE; `None` where there is but one."""

    @property
    def wavelength(self) -> NDArray[np.float64]:
        """(F,) tokens per full turn; infinite where a pair does not turn."""
        with np.errstate(divide="ignore"):
            return 2 * np.pi / self.theta

    def same(self, other: Rotary) -> bool:
        """Same pairs at the same frequencies (relative 1e-5): vectors of both can be compared pair by pair."""
        return (
            len(self.theta) == len(other.theta)
            and bool(np.allclose(self.theta, other.theta, rtol=1e-5, atol=0))
            and bool((self.first == other.first).all() and (self.second == other.second).all())
        )

    def pairs(self, x: Tensor) -> Tensor:
        """(..., F) complex numbers of channels (..., D)."""
        real = x[..., torch.as_tensor(self.first, device=x.device)]
        imaginary = x[..., torch.as_tensor(self.second, device=x.device)]
        return torch.complex(wide(real), wide(imaginary))

    def turns(self, positions: Tensor) -> Tensor:
        """(N, F) unit numbers e^(i theta position) for positions (N,), or (3, N) by axis; angles in float64."""
        where = positions.device
        if where.type == "mps":  # which has no float64
            return self.turns(positions.cpu()).to(torch.complex64).to(where)
        theta = torch.as_tensor(self.theta, device=positions.device, dtype=torch.float64)
        if positions.ndim == 1 or self.axis is None:
            line = positions if positions.ndim == 1 else positions[0]
            angle = line.to(torch.float64)[:, None] * theta
        else:
            own = torch.tensor([AXES.index(a) for a in self.axis], device=positions.device)
            angle = positions.to(torch.float64)[own].T * theta
        return torch.polar(torch.ones_like(angle), angle)


def rotaries(model: PreTrainedModel, length: int) -> list[Rotary | None]:
    """The rotary pairs of every layer of a model's decoder; `None` for a layer that does not rotate.

    Args:
        model: A causal language model, or one with such a decoder inside.
        length: Longest position that will be measured; dynamic scalings depend on it.

    Raises:
        UserError: The layers turn in a way that no known layout explains.
    """
    candidates = _candidates(model.get_decoder(), length)
    if not candidates:
        return [None] * _layers(model)
    start, shifts = _moves(model, length)
    still = _captured(model, start)
    moved = [(shift, _captured(model, tuple(a + b for a, b in zip(start, shift, strict=True)))) for shift in shifts]
    # float32 angles at far positions are only so exact
    bound = _RESIDUAL.get(model.dtype, _LOOSE) + length * 2.0**-23
    out: list[Rotary | None] = [None] * _layers(model)
    for layer, vectors in still.items():
        name = f"Layer {layer} of {type(model).__name__}"
        out[layer] = _explain(name, vectors, [(shift, seen[layer]) for shift, seen in moved], candidates, bound)
    return out


def rotaries_of_config(config: PreTrainedConfig, length: int) -> list[Rotary | None]:
    """The same without weights: from a random model of the family, shrunk to one head and a small vocabulary.

    Raises:
        UserError: The family can't be shrunk that way.
    """
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModel.from_config(shrunk(config)).float().eval()
    except Exception as error:
        raise UserError(
            f"The rotary pairs of a {config.model_type} model can't be found without its weights "
            f"({type(error).__name__}): no small model of the family can be made."
        ) from None
    return rotaries(model, length)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a decoder's configuration with one head of the same size, few units and a small vocabulary."""
    small = copy.deepcopy(config.get_text_config(decoder=True))
    head = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
    sizes = {
        "hidden_size": head,
        "head_dim": head,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "pad_token_id": None,
        "num_local_experts": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    for name, value in sizes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    return small


@contextmanager
def unrotated(model: PreTrainedModel, low: float, high: float) -> Iterator[int]:
    """Within, pairs with wavelengths in [low, high) tokens do not turn; gives how many pairs that are.

    Works on the buffers of the rotary modules in place; every forward pass inside sees it.

    Raises:
        UserError: A rotary module computes its frequencies anew at every length, so they can't be held.
    """
    changed: list[tuple[Tensor, Tensor]] = []
    stopped = 0
    try:
        for module in _modules(model.get_decoder()):
            kinds = getattr(module, "rope_type", "default")
            if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
                raise UserError(
                    "--knockout needs rotary frequencies that stay as they are; this model's change with the length."
                )
            for name, buffer in module.named_buffers(recurse=False):
                if name.endswith("inv_freq") and "original" not in name:
                    wavelength = 2 * torch.pi / buffer.double()
                    band = (wavelength >= low) & (wavelength < high)
                    changed.append((buffer, buffer.clone()))
                    buffer[band] = 0.0
                    stopped = max(stopped, int(band.sum()))
        yield stopped
    finally:
        for buffer, own in changed:
            buffer.copy_(own)


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _ropes(config: PreTrainedConfig) -> list[dict[str, object]]:
    """Rotary parameters, one set per kind of layer."""
    ropes = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [p for p in [ropes, *ropes.values()] if isinstance(p, dict) and "rope_type" in p]


def is_rotary(module: nn.Module) -> bool:
    """Whether a module gives the cosines and sines of rotary embeddings."""
    return "RotaryEmbedding" in type(module).__name__


def _modules(decoder: nn.Module) -> list[nn.Module]:
    return [m for m in decoder.modules() if is_rotary(m)]


@dataclass(frozen=True)
class _Candidate:
    """What one rotary module gives to one kind of layer: angles by channel of its output."""

    theta: NDArray[np.float64]
    factor: float
    axis: tuple[str, ...] | None


def _candidates(decoder: nn.Module, length: int) -> list[_Candidate]:
    """Frequencies of every rotary module and kind of layer, read off the angle it gives to position 1."""
    out = []
    for module in _modules(decoder):
        kinds = getattr(module, "rope_type", None)
        for kind in list(kinds) if isinstance(kinds, dict) else [None]:
            multi = hasattr(module, "mrope_section")
            angles, factor = [], 1.0
            for axis in range(3 if multi else 1):
                # the last position sets the regime of a scaling that depends on the length
                line = torch.tensor([[0, 1, max(length - 1, 1)]])
                positions = torch.zeros(3, 1, 3, dtype=torch.long) if multi else line
                if multi:
                    positions[axis] = line
                angle, factor = _angles(module, positions, kind)
                angles.append(angle)
            theta = np.max(angles, axis=0)
            owner = tuple(AXES[i] for i in np.argmax(angles, axis=0)) if multi else None
            out += _shapes(theta, factor, owner)
    return out


def _angles(module: nn.Module, positions: Tensor, kind: str | None) -> tuple[NDArray[np.float64], float]:
    """(W,) angle that position 1 adds to position 0, and the factor on cosine and sine."""
    device = next((b.device for b in module.buffers()), torch.device("cpu"))
    given = {} if kind is None else {"layer_type": kind}
    with torch.no_grad():
        found = module(torch.zeros(1, 1, 1, device=device), positions.to(device), **given)
    if isinstance(found, Tensor):  # unit complex numbers (Llama 4)
        turn = found[0, 1].to(torch.complex128)
    else:
        cos, sin = (x.double().reshape(-1, *x.shape[-2:])[0, 1] for x in found)
        turn = torch.complex(cos, sin)
    return turn.angle().cpu().numpy(), round(float(turn.abs().mean()), 6)


def _shapes(angle: NDArray[np.float64], factor: float, axis: tuple[str, ...] | None) -> list[_Candidate]:
    """A module gives one angle a pair, or one a channel: both halves alike, or neighbours alike."""
    half = len(angle) // 2
    out = [_Candidate(angle, factor, axis)]
    for part in (slice(0, half), slice(0, None, 2)):
        out.append(_Candidate(angle[part], factor, axis and axis[part]))
    return out


def _moves(model: PreTrainedModel, length: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Where a text lies first, and how far it is moved, without leaving the regime of the frequencies at `length`."""
    ropes = _ropes(model.config)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or length
    originals = [p.get("original_max_position_embeddings") for p in ropes]
    switch = min([int(o) for o in originals if isinstance(o, int)] or [longest])
    start = max(length - _TEXT, 0)
    room = start - switch if length > switch else start
    steps = sorted({-1, -max(room // 2, 1)})
    if any("mrope_section" in p for p in ropes):
        return (start,) * 3, [tuple(s if a == b else 0 for b in range(3)) for a in range(3) for s in steps]
    return (start,), [(s,) for s in steps]


def _captured(model: PreTrainedModel, start: tuple[int, ...]) -> dict[int, Tensor]:
    """(H + G, T, D) queries and keys of each layer for a fixed text whose positions begin at `start`, by axis."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(0, config.vocab_size, (1, _TEXT), generator=torch.Generator().manual_seed(1))
    line = torch.arange(_TEXT)[None]
    positions = torch.stack([line + s for s in start]) if len(start) > 1 else line + start[0]
    seen: dict[int, Tensor] = {}

    def keep(call: Call) -> None:
        seen[call.layer] = torch.cat([call.query[0], call.key[0]]).double()

    with torch.inference_mode(), capture(model, keep):
        model.get_decoder()(input_ids=ids.to(model.device), position_ids=positions.to(model.device), use_cache=False)
    return seen


def _explain(
    name: str,
    still: Tensor,
    moved: Sequence[tuple[tuple[int, ...], Tensor]],
    candidates: Sequence[_Candidate],
    bound: float,
) -> Rotary | None:
    """The candidate and layout that turn `still` into every `moved`; `None` where nothing turned."""
    size = float(still.abs().max())
    # what rounding in the layers below moves, a layer that rotates moves many times more
    best, least = None, max(float((seen - still).abs().max()) for _, seen in moved) / size
    for rotary in _layouts(still.shape[-1], candidates):
        z = rotary.pairs(still)
        worst = 0.0
        for shift, seen in moved:
            expected = still.clone()
            at = torch.tensor(shift, device=still.device)
            turn = z * rotary.turns(at if len(shift) == 1 else at[:, None])[0]
            expected[..., torch.as_tensor(rotary.first)] = turn.real
            expected[..., torch.as_tensor(rotary.second)] = turn.imag
            worst = max(worst, float((expected - seen).abs().max()) / size)
        if worst < least:
            best, least = rotary, worst
    if least > bound:
        raise UserError(
            f"{name} turns its queries and keys in a way that no known rotary layout explains (best residual "
            f"{least:.2g}, allowed {bound:.2g}); its rotary pairs can't be analysed."
        )
    return best


def _layouts(channels: int, candidates: Sequence[_Candidate]) -> Iterator[Rotary]:
    """Half-split or interleaved, from the first channel or up to the last."""
    for c in candidates:
        f = len(c.theta)
        for offset in sorted({0, channels - 2 * f}) if 2 * f <= channels else ():
            i = np.arange(f)
            yield Rotary(c.theta, c.factor, offset + i, offset + i + f, c.axis)
            yield Rotary(c.theta, c.factor, offset + 2 * i, offset + 2 * i + 1, c.axis)
