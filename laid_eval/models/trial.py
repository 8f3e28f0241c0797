"""What a fold is tried with: one attention module run again on the same inputs, gains to try, and how far they miss.

A change of one layer's weights is seen in that layer alone, at the cost of that layer alone. Queries, keys and values
are those that `capture` sees: rotated, before any `RopeGain` of the model.

Shape letters: B texts, H query heads, G key heads, N tokens, D channels of a head, P rotary pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_eval.core import RopeGain
from laid_eval.core.heads import wide
from laid_eval.models.capture import Call, capture
from laid_eval.models.gained import attention_modules


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an attention module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def noise(self) -> Inputs:
        """The same in float32 at least, with normal noise in place of the hidden states.

        Hidden states of a trained model can be all alike where a text begins.
        """
        args, kwargs = _wide(list(self.args)), _wide(self.kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = drawn
        else:
            args[0] = drawn
        return Inputs(tuple(args), kwargs)


@dataclass(frozen=True, eq=False)
class Shown:
    """What an attention module did with its inputs."""

    query: Tensor
    """(B, H, N, D), rotated."""
    key: Tensor
    """(B, G, N, D), rotated."""
    value: Tensor
    output: Tensor
    """Of the module, behind its output projection."""


def recorded(model: PreTrainedModel, ids: Tensor) -> dict[int, Inputs]:
    """What the attention of every layer is given when the decoder reads token ids (B, N).

    Layers that do not go through transformers' attention interface are missing.

    Raises:
        UserError: The family does not dispatch through the interface at all.
    """
    found: dict[int, Inputs] = {}
    modules = attention_modules(model)
    seen: set[int] = set()

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[layer] = Inputs(args, dict(kwargs))

        return hook

    hooks = [m.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, m in modules.items()]
    try:
        with torch.no_grad(), capture(model, lambda call: seen.add(id(call.module))):
            model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: inputs for layer, inputs in found.items() if id(modules[layer]) in seen}


def replay(model: PreTrainedModel, module: nn.Module, inputs: Inputs, gain: RopeGain | None = None) -> Shown:
    """Runs an attention module of the model, with a gain on its rotated queries where one is given."""
    calls: list[Call] = []

    def observe(call: Call) -> None:
        if gain is not None:
            call.query.copy_(gain(call.query))
        calls.append(call)

    with torch.no_grad(), capture(model, observe):
        output = module(*inputs.args, **inputs.kwargs)
    call = calls[-1]
    return Shown(call.query, call.key, call.value, output if isinstance(output, Tensor) else output[0])


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; then every module is back in its own."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def miss(seen: Tensor, wanted: Tensor, pair_of: Tensor) -> float:
    """Largest relative difference of a pair's queries over all tokens; channels in no pair count as one more.

    Pair by pair, for in trained models a few channels are so loud that the others would not be heard. Pairs that are
    a thousand times weaker than their like are measured against those.

    Args:
        seen: (B, H, N, D).
        wanted: The same.
        pair_of: (D,) the pair of every channel, as in `RopeGain`.
    """
    seen, wanted = (x.detach().cpu().double() for x in (seen, wanted))
    size = _by_pair(wanted, pair_of)
    floor = 1e-3 * size.square().mean().sqrt()
    return float((_by_pair(seen - wanted, pair_of) / torch.maximum(size, floor)).max())


def random_gain(first: Tensor, second: Tensor, channels: int, heads: int | None) -> RopeGain:
    """Gains with logarithms 0.7 N(0, 1), on the CPU; the same at every call."""
    gain = RopeGain(first.cpu(), second.cpu(), channels, heads)
    drawn = torch.randn(gain.parameter.shape, generator=torch.Generator().manual_seed(0))
    gain.set_log_gain((0.7 * drawn).clamp(-1.2, 1.2))
    return gain


def of_head(gain: RopeGain, head: int) -> RopeGain:
    """The gains of one head."""
    first, second = pairs_of(gain)
    one = RopeGain(first, second, len(gain.pair_of), 1)
    one.load_state_dict({"parameter": gain.parameter[head : head + 1]})
    return one.to(gain.parameter.device)


def in_other_layout(gain: RopeGain) -> RopeGain:
    """The same gains on pairs in the same place, interleaved where its own are half-split, and the reverse."""
    start, line = int(pairs_of(gain)[0].min()), torch.arange(gain.parameter.shape[1])
    if layout_of(gain) == "interleaved":
        pairs = start + line, start + len(line) + line
    else:
        pairs = start + 2 * line, start + 2 * line + 1
    other = RopeGain(*pairs, len(gain.pair_of), None if gain.shared else len(gain.parameter))
    other.load_state_dict(gain.state_dict())
    return other.to(gain.parameter.device)


def layout_of(gain: RopeGain) -> str:
    """`interleaved` where the channels of a pair are neighbours, else `half-split`."""
    first, second = pairs_of(gain)
    return "interleaved" if bool((second - first == 1).all()) else "half-split"


def pairs_of(gain: RopeGain) -> tuple[Tensor, Tensor]:
    """(P,) lower and upper channel of each pair, on the CPU.

    >>> pairs_of(RopeGain(torch.tensor([1, 2]), torch.tensor([3, 4]), channels=5, heads=1))
    (tensor([1, 2]), tensor([3, 4]))
    """
    pair_of = gain.pair_of.cpu()
    channels = torch.stack([(pair_of == f).nonzero().flatten() for f in range(gain.parameter.shape[1])])
    return channels[:, 0], channels[:, 1]


def _by_pair(x: Tensor, pair_of: Tensor) -> Tensor:
    """(H, P + 1) size of every pair over all texts and tokens."""
    energy = x.square().sum(dim=(0, 2))
    index = pair_of.cpu()
    return energy.new_zeros(len(energy), int(index.max()) + 1).index_add_(1, index, energy).sqrt()


def _wide(x: Any) -> Any:
    """Half-precision tensors in float32, in nested arguments of a module."""
    if isinstance(x, Tensor):
        return wide(x) if x.is_floating_point() else x
    if type(x) in (list, tuple):
        return type(x)(_wide(each) for each in x)
    if isinstance(x, MutableMapping):  # keys and values that layers share are no plain dictionary
        same_kind: Any = type(x)
        return same_kind({name: _wide(each) for name, each in x.items()})
    return x
