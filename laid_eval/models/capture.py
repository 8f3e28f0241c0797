"""Sees attention where it happens: exact, in row blocks, in memory linear in the length.

A model of transformers asks its configuration which attention function and which mask function to use. Within
`capture` both are ours. The mask function builds no tensor: it hands the predicate (causal, sliding, chunked,
bidirectional blocks, padding) to the attention function, which evaluates it for the rows at hand. Registering an
attention function alone would silently drop every mask but the causal one.

Observers get a `Call` per layer: queries and keys after the rotation, and the probabilities of any rows on demand.
The layer's output is computed by PyTorch's own kernel where the mask is plainly causal, else (or with `exact`) from
the same rows the observers see: softcap and learned sinks, which the stock kernels drop or refuse, included.

Shape letters: B texts, H query heads, G key heads, Q queries, K keys, R rows, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
)

from laid_eval.core.heads import wide
from laid_eval.errors import UserError
from laid_eval.models.source import quiet

NAME = "laid_eval_capture"
ROWS = 64
"""Query rows per block: 64 rows of 32k keys and 32 heads take 256 MiB."""
TOLERANCE = 1e-4
"""Largest difference of logits between a model's own attention and ours, float32, of logits up to `LARGE`; in
proportion above, as rounding is."""
LARGE = 8.0


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as a predicate instead of a tensor."""

    predicate: Callable[..., Tensor]
    """(batch, head, query, key) indices, broadcast against each other, to booleans."""
    batch: int
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    plain: bool
    """Every query sees itself and all before it, and nothing else."""
    mapped: bool
    """The predicate takes single indices and must be mapped over them."""
    device: torch.device

    def rows(self, rows: Tensor) -> Tensor:
        """(B or 1, 1, R, K) booleans of the queries with indices `rows` (R,)."""
        b = torch.arange(self.batch, device=self.device)
        q = rows.to(self.device) + self.query_offset
        k = torch.arange(self.keys, device=self.device) + self.key_offset
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        if not self.mapped:
            seen = self.predicate(b[:, None, None, None], zero[None, :, None, None], q[None, None, :, None], k)
            return seen.expand(-1, -1, len(q), len(k))
        over = self.predicate
        for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            over = torch.vmap(over, in_dims=axes, out_dims=0)
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():
            mapped: Tensor = over(b, zero, q, k)
        return mapped


@dataclass(frozen=True)
class Call:
    """One layer's attention over one batch."""

    layer: int
    module: nn.Module
    query: Tensor
    """(B, H, Q, D), rotated."""
    key: Tensor
    """(B, G, K, D), rotated."""
    value: Tensor
    scale: float
    mask: Mask
    softcap: float | None
    sinks: Tensor | None
    """(H,) learned logits that take part in the softmax and attend to nothing."""

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def logits(self, rows: Tensor) -> Tensor:
        """(B, H, R, K) scaled logits before softcap and mask, in float32 at least."""
        b, g, k, d = self.key.shape
        q = self.query[:, :, rows].reshape(b, g, -1, d)  # heads of one group share a product
        s = torch.matmul(q, self.key.transpose(2, 3))
        return wide(s.reshape(b, g * self.group, len(rows), k)) * self.scale

    def softmax(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Probabilities of logits (B, H, R, K) under softcap, mask and learned sinks.

        Rows sum to one, or to what the learned sinks leave.
        """
        logits, sinks = self._masked(logits, rows)
        if sinks is None:
            return torch.softmax(logits, dim=-1)
        return torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]

    def log_softmax(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logarithms of the same, the learned sink of a head (if any) as a last column: (B, H, R, K [+ 1])."""
        logits, sinks = self._masked(logits, rows)
        return torch.log_softmax(logits if sinks is None else torch.cat([logits, sinks], dim=-1), dim=-1)

    def _masked(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        # Not minus infinity: a row that sees nothing (padding) must come out as it does in the eager backend.
        logits = logits.masked_fill(~self.mask.rows(rows), torch.finfo(logits.dtype).min)
        if self.sinks is None:
            return logits, None
        return logits, self.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)

    def probabilities(self, rows: Tensor) -> Tensor:
        """(B, H, R, K) attention of the queries with indices `rows` (R,)."""
        return self.softmax(self.logits(rows), rows)


Observer = Callable[[Call], None]


@dataclass(frozen=True)
class _Capture:
    observer: Observer
    exact: bool
    modules: frozenset[int]
    """Attention outside these (a vision tower's) runs unobserved."""


_active: ContextVar[_Capture | None] = ContextVar("laid_eval_capture", default=None)


@contextmanager
def capture(model: PreTrainedModel, observer: Observer, exact: bool = False) -> Iterator[None]:
    """Within, every attention layer of the model's decoder shows itself to `observer`.

    Args:
        model: Of any family that dispatches through transformers' attention interface.
        observer: Called once per layer and forward pass, before the layer's output is computed.
        exact: Compute outputs from the observed rows too, not by the stock kernel.

    Raises:
        UserError: The family does not dispatch through the interface.
    """
    if not model._can_set_attn_implementation():
        raise UserError(hidden_attention(type(model).__name__))
    decoder = model.get_decoder()
    token = _active.set(_Capture(observer, exact, frozenset(id(m) for m in decoder.modules())))
    own = _implementations(model)
    try:
        with quiet():
            model.set_attn_implementation(NAME)
        yield
    finally:
        for config, name in own:
            config._attn_implementation_internal = name
        _active.reset(token)


def check_capture(model: PreTrainedModel, prompt: dict[str, Tensor] | None = None) -> float:
    """Largest logit difference between the model's own attention and ours on a short text, or on a prompt.

    The text is longer than a short sliding window, so that a lost mask would show; that every layer's mask came
    through ours is checked besides, for windows too long to be tried.

    Raises:
        UserError: The difference is above 1e-4 (float32; more where logits are above 8, in proportion; in half
            precision 5% of the largest logit), or a layer's attention never came through the interface.
    """
    given = {"input_ids": _short_text(model)} if prompt is None else prompt
    seen: set[int] = set()
    with torch.inference_mode():
        own = model(**given, use_cache=False, logits_to_keep=64).logits.double()
        with capture(model, lambda call: seen.add(call.layer), exact=True):
            ours = model(**given, use_cache=False, logits_to_keep=64).logits.double()
    if not seen:
        raise UserError(
            f"The attention of {type(model).__name__} can't be seen: no layer went through transformers' interface."
        )
    gap = float((own - ours).abs().max())
    largest = float(own.abs().max())
    bound = TOLERANCE * max(largest / LARGE, 1.0) if model.dtype in (torch.float32, torch.float64) else 0.05 * largest
    if not gap <= bound:
        raise UserError(
            f"Attention of {type(model).__name__} as captured is not the model's own: logits differ by {gap:.2g} "
            f"(allowed {bound:.2g}). Nothing was measured; please report the model."
        )
    return gap


def _short_text(model: PreTrainedModel) -> Tensor:
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or 0
    size = 64 + (window if window <= 1024 else 0)
    ids = torch.randint(0, config.vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def hidden_attention(name: str) -> str:
    """One line on a model whose attention can't be captured."""
    return (
        f"The attention of {name} can't be seen: it does not go through transformers' attention interface. Models "
        "written for transformers 5 do (Llama, Qwen, Gemma, Mistral, Phi, ...)."
    )


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """Every configuration inside the model with the attention it uses now."""
    found: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found[id(module.config)] = module.config, module.config._attn_implementation
            inner = module.config.get_text_config(decoder=True)
            found[id(inner)] = inner, inner._attn_implementation
    return list(found.values())


def _lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """The mask function registered with transformers: describes, builds nothing."""
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    plain = mask_function is causal_mask_function and q_offset == kv_offset == 0 and q_length == kv_length
    if padding is not None and not bool(padding.all()):
        mask_function, plain = and_masks(mask_function, padding_mask_function(padding)), False
    return Mask(
        mask_function, batch_size, q_length, kv_length, int(q_offset), int(kv_offset), plain, use_vmap,
        torch.device(device),
    )  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
    active = _active.get()
    assert active is not None, "the model was left with this attention outside `capture`"
    mask = attention_mask
    if not isinstance(mask, Mask):
        mask = _ready_mask(module, query, key, mask, kwargs)
    layer = getattr(module, "layer_idx", None)
    call = Call(
        layer=-1 if layer is None else layer,
        module=module,
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        softcap=softcap,
        sinks=s_aux,
    )
    if id(module) in active.modules and layer is not None:
        if mask is not attention_mask:
            raise UserError(
                f"Layer {layer} of {type(module).__name__} brings a mask of its own making; its attention can't be "
                "captured reliably."
            )
        active.observer(call)
    native = mask.plain and softcap is None and s_aux is None and not active.exact
    if native:
        out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return out, None
    return _rows_output(call), None


def _rows_output(call: Call) -> Tensor:
    """(B, Q, H, D) output, a block of rows at a time."""
    b, g, _, d = call.value.shape
    h, n = call.query.shape[1], call.query.shape[2]
    out = call.value.new_empty(b, h, n, d)
    for start in range(0, n, ROWS):
        rows = torch.arange(start, min(start + ROWS, n), device=call.query.device)
        p = call.probabilities(rows).to(call.value.dtype)
        grouped = p.reshape(b, g, -1, p.shape[-1])
        out[:, :, rows] = torch.matmul(grouped, call.value).reshape(b, h, len(rows), d)
    return out.transpose(1, 2).contiguous()


def _ready_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Mask:
    """A ready mask (or none), as modules outside the decoder may pass it."""
    n, k = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal

    def predicate(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if mask is None:
            return kv <= q + (k - n) if causal else (kv == kv) & (q == q)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen[:, :1, q.flatten()][..., kv.flatten()]

    return Mask(predicate, query.shape[0], n, k, 0, 0, mask is None and causal and n == k, False, query.device)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _lazy_mask)
