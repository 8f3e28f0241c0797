"""A model whose attention can be changed and read while it trains: gains on its queries, and taps.

The model keeps the attention function it has (sdpa, flash attention, its own eager one); ours stands around it. A
layer's `RopeGain` hangs on its attention module, so optimiser, checkpoints and data parallelism find it as they find
any other weight. A tap hands over the rotated queries and keys themselves, with their gradients: no scores.

Reading is switched on for the forward pass only: gradient checkpointing runs a layer again in the backward pass, in
threads of its own, and what it would show then is not wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from laid_eval.core import Heads, RopeGain
from laid_eval.errors import UserError
from laid_eval.models.capture import hidden_attention
from laid_eval.models.rotary import Rotary
from laid_eval.models.source import quiet

PREFIX = "laid_eval_"
GAIN = "rope_gain"  # name of the gain on its attention module, hence in checkpoints
_TAP = "_laid_eval_tap"


@dataclass(frozen=True, eq=False)
class Tapped:
    """What one layer's attention was given in one forward pass."""

    query: Tensor
    """(B, H, N, D) rotated, the gain included."""
    key: Tensor
    """(B, G, N, D) rotated."""
    scale: float
    softcap: float | None

    def heads(self, text: int, rows: Tensor) -> Heads:
        """Of one text of the batch, the queries at `rows` (R,) and all keys."""
        return Heads(self.query[text][:, rows], self.key[text], self.scale, self.softcap)


def gainable(model: PreTrainedModel) -> None:
    """Puts our attention function around the model's own, everywhere in it; done once, harmless again.

    Raises:
        UserError: The family does not dispatch through transformers' attention interface.
    """
    own: str = model.config.get_text_config(decoder=True)._attn_implementation
    if own.startswith(PREFIX):
        return
    if not model._can_set_attn_implementation():
        raise UserError(hidden_attention(type(model).__name__))
    name = f"{PREFIX}{own}"
    AttentionInterface.register(name, _around(own))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    with quiet():
        model.set_attn_implementation(name)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of every layer of the model's decoder.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    >>> sorted(attention_modules(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **small))))
    [0, 1]
    """
    found = {}
    for name, module in model.get_decoder().named_modules():
        if name.endswith(("attn", "attention", "self_attention")) and getattr(module, "layer_idx", None) is not None:
            found[int(module.layer_idx)] = module
    return found


def add_gains(model: PreTrainedModel, rotaries: dict[int, Rotary], shared: bool) -> dict[int, RopeGain]:
    """Gives layers a gain per rotary pair, 1 everywhere; the model computes what it computed before.

    Args:
        model: Made `gainable`.
        rotaries: The rotary pairs of the layers that get one.
        shared: One set of gains for all heads of a layer.
    """
    config = model.config.get_text_config(decoder=True)
    gains = {}
    for layer, module in attention_modules(model).items():
        if layer not in rotaries:
            continue
        rotary = rotaries[layer]
        heads = None if shared else int(config.num_attention_heads)
        gain = RopeGain(torch.as_tensor(rotary.first), torch.as_tensor(rotary.second), channels(module, config), heads)
        module.add_module(GAIN, gain.to(model.device))
        gains[layer] = gain
    return gains


def gains_of(model: nn.Module) -> dict[int, RopeGain]:
    """The gains in a model, by layer."""
    return {int(m.layer_idx): getattr(m, GAIN) for m in model.modules() if isinstance(getattr(m, GAIN, None), RopeGain)}  # type: ignore[arg-type]


def drop_gains(model: nn.Module) -> None:
    """Removes all gains."""
    for module in list(model.modules()):
        if isinstance(getattr(module, GAIN, None), RopeGain):
            delattr(module, GAIN)


@contextmanager
def tapped(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tapped]]:
    """Within, every forward pass leaves the queries and keys of some layers in the dictionary given.

    The model must have been made `gainable`. Only the last pass is kept.
    """
    seen: dict[int, Tapped] = {}
    modules = [module for layer, module in attention_modules(model).items() if layer in set(layers)]
    try:
        for module in modules:
            setattr(module, _TAP, seen)
        yield seen
    finally:
        for module in modules:
            delattr(module, _TAP)


def channels(module: nn.Module, config: Any) -> int:
    """Channels of a query head of an attention module."""
    config = config.get_text_config(decoder=True)
    # DeepSeek's head_dim is that of the part that turns alone.
    size = next((s for s in (getattr(module, n, None) for n in ("qk_head_dim", "head_dim")) if s), None)
    size = size or getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _around(own: str) -> Any:
    """The attention function to register: gain, tap, then the model's own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        gain = getattr(module, GAIN, None)
        if gain is not None:
            query = gain(query)
        tap = getattr(module, _TAP, None)
        if tap is not None:
            # The tensors themselves: work on them in here would be done again, or missed, when the layer is run anew.
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            tap[int(module.layer_idx)] = Tapped(query, key, scale, kwargs.get("softcap"))  # type: ignore[arg-type]
        inner = ALL_ATTENTION_FUNCTIONS.get(own) or sys.modules[type(module).__module__].eager_attention_forward
        out: tuple[Tensor, Tensor | None] = inner(module, query, key, value, attention_mask, **kwargs)
        return out

    return attention
