"""How a layer's stored tensors become queries and keys, for every family, without loading the model.

A query is an affine map of the layer's normalised input: the projection's rows times the input norm's weight. Families
differ in names, in what is fused into one tensor, in norms (RMS or layer norm, weight or 1 + weight) and in a second
norm on queries and keys. The tensors' names settle the first two; the norms are settled by trying each form on a small
random model of the family until one gives the queries and keys that the model itself computes. No form: refused.

Shape letters: H query heads, G key heads, D channels of a head, N units of the hidden state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from laid_eval.errors import UserError
from laid_eval.models.capture import Call, capture
from laid_eval.models.rotary import Rotary, shrunk
from laid_eval.models.source import quiet

_LAYER = re.compile(r"(?P<blocks>(?:.+\.)?(?:layers|h|blocks)\.)(?P<layer>\d+)\.(?P<rest>.+)")
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_NORMS = ("input_layernorm", "attention_layernorm")
_ELSEWHERE = re.compile(r"vis|audio|image|encoder|tower|talker|mtp|draft")  # stacks that are not the language model
_RESIDUAL = 1e-3
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tensors:
    """Named tensors, read one at a time."""

    names: frozenset[str]
    read: Callable[[str, int | None, int | None], Tensor]
    """(name, first row, last row + 1) to float32; `None`: from the start, to the end."""


@dataclass(frozen=True)
class Form:
    """How a family's norms work."""

    norm: str
    """`rms`, or `layer` (takes the mean off, too); norms on queries and keys are of the same kind."""
    offset: bool
    """Weights are stored less one."""


FORMS = (Form("rms", False), Form("rms", True), Form("layer", False), Form("layer", True))


@dataclass(frozen=True)
class Projection:
    """From the normalised input of a layer to its queries, or keys, before the rotation."""

    rows: Tensor
    """(H, D, N), the input norm's weight multiplied in."""
    bias: Tensor | None
    """(H, D), what the input norm's own bias contributes included."""
    gain: Tensor | None
    """(H, D) weight of the norm on queries or keys."""
    joint: bool
    """That norm runs over all heads together, not over each."""


@dataclass(frozen=True)
class _Rows:
    """Where queries or keys stand in a tensor."""

    start: int | None = None
    stop: int | None = None
    heads: int | None = None
    """Set where every head's rows are followed by other rows of that head."""
    part: int = 0
    """Which of a head's parts."""


def tensors_of(folder: Path) -> Tensors:
    """The tensors of a checkpoint's safetensors shards; nothing is read yet.

    Raises:
        UserError: No shards, or one that is broken or missing.
    """
    files = _files(folder)
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                where |= dict.fromkeys(shard.keys(), file)
        except Exception as error:  # the library's own error type is not part of its interface
            raise UserError(f"Weights {file.name!r} can't be read: {' '.join(str(error).split())[:200]}") from None

    def read(name: str, start: int | None, stop: int | None) -> Tensor:
        with safe_open(where[name], "pt") as shard:
            tensor: Tensor = shard.get_slice(name)[start:stop]
        if tensor.dtype not in _PLAIN:
            raise UserError(
                f"Tensor {name!r} is stored as {tensor.dtype}: quantized weights can't be read off the stored numbers. "
                "Take the unquantized checkpoint, or measure without --weights-only."
            )
        return tensor.to(torch.float32)

    return Tensors(frozenset(where), read)


def blocks_of(names: Iterable[str]) -> str:
    """What stands before the layer's number in the language model's tensors, e.g. `model.language_model.layers.`."""
    count: dict[str, set[str]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        if found and not _ELSEWHERE.search(found["blocks"]) and found["rest"].split(".")[0] in _ATTENTION:
            count.setdefault(found["blocks"], set()).add(found["layer"])
    return max(count, key=lambda blocks: len(count[blocks]), default="")


def projections(
    tensors: Tensors, blocks: str, layer: int, form: Form, config: PreTrainedConfig, head_dim: int
) -> tuple[Projection, Projection]:
    """Queries' and keys' projections of one layer, in float32.

    Raises:
        UserError: The layer has no query and key projections under any known name.
    """
    text = config.get_text_config(decoder=True)
    at = f"{blocks}{layer}."
    weight, shift = (_optional(tensors, *(f"{at}{n}.{kind}" for n in _NORMS)) for kind in ("weight", "bias"))
    if weight is not None:
        weight = weight + form.offset
    out = []
    for side, (name, where) in zip("qk", _sources(tensors, at, text, head_dim), strict=True):
        # The bias first: it needs the rows as they are stored.
        rows = _picked(tensors, f"{name}.weight", where, head_dim)
        bias = _picked(tensors, f"{name}.bias", where, head_dim) if f"{name}.bias" in tensors.names else None
        if shift is not None:
            bias = rows @ shift if bias is None else bias + rows @ shift
        if weight is not None:
            rows *= weight
        if form.norm == "layer":  # the normalised input has no mean: neither do the rows that matter
            rows -= rows.mean(dim=-1, keepdim=True)
        own = f"{name.rsplit('.', 1)[0]}.{side}"
        gain = _optional(tensors, f"{own}_norm.weight", f"{own}_layernorm.weight")
        joint = gain is not None and gain.ndim == 1 and len(gain) != head_dim
        if gain is not None:
            gain = (gain + form.offset).reshape(-1, head_dim).expand(len(rows), head_dim)
        out.append(Projection(rows, bias, gain, joint))
    return out[0], out[1]


def form_of(config: PreTrainedConfig, rotary: Sequence[Rotary | None]) -> tuple[Form, dict[int, Call]]:
    """How the family's norms work, and one attention call of each layer (head size, scale) of a small random model.

    Raises:
        UserError: No known form gives the queries and keys of the family's own code.
    """
    family = config.get_text_config(decoder=True).model_type
    try:
        with quiet(), torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(0)
            model = _small(config)
            inputs, calls = _seen(model)
    except Exception as error:  # whatever a family makes of sizes it was not meant for
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"A small model of the {family} family can't be built to check its weights ({reason})."
        ) from None
    state = model.state_dict()
    tensors = Tensors(frozenset(state), lambda name, start, stop: state[name][start:stop].float().clone())
    turning = [i for i, r in enumerate(rotary) if r is not None and i in calls and i in inputs]
    worst = {
        f: max((_gap(f, tensors, model.config, inputs[i], calls[i], rotary[i]) for i in turning), default=0.0)
        for f in FORMS
    }
    best = min(FORMS, key=lambda f: worst[f])
    if not worst[best] < _RESIDUAL:
        raise UserError(
            f"Queries and keys of the {family} family are not what its q/k projections and norms give "
            f"(residual {worst[best]:.2g}, allowed {_RESIDUAL:g}); measure it without --weights-only."
        )
    return best, calls


def _files(folder: Path) -> list[Path]:
    """The shards transformers would load: one file, those of the index, else all that look like it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{index.name}' of model '{folder.name}' is not an index of weights.") from None
        missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if missing:
            raise UserError(
                f"Model '{folder.name}' lacks {len(missing)} of {len(names)} weight files, e.g. {missing[0]!r}."
            )
        return [folder / n for n in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"Model '{folder.name}' has no safetensors weights (model*.safetensors) to read.")
    return files


def _sources(tensors: Tensors, at: str, text: PreTrainedConfig, head_dim: int) -> list[tuple[str, _Rows]]:
    """For queries and for keys: the tensor, and where in it they stand."""
    heads = text.num_attention_heads
    for block in _ATTENTION:
        q, k, fused, by_head = (f"{at}{block}.{n}" for n in ("q_proj", "k_proj", "qkv_proj", "query_key_value"))
        if {f"{q}.weight", f"{k}.weight"} <= tensors.names:
            return [(q, _Rows(heads=heads)), (k, _Rows())]  # each head's gate may follow its queries (Qwen3-Next)
        if f"{fused}.weight" in tensors.names:
            queries, keys = heads * head_dim, text.num_key_value_heads * head_dim
            return [(fused, _Rows(None, queries)), (fused, _Rows(queries, queries + keys))]
        if f"{by_head}.weight" in tensors.names:
            return [(by_head, _Rows(heads=heads, part=0)), (by_head, _Rows(heads=heads, part=1))]
    raise UserError(
        f"'{at}' of this {text.model_type} checkpoint has no query and key projections that can be read; looked for "
        f"q_proj and k_proj, qkv_proj or query_key_value (.weight) under {', '.join(_ATTENTION)}. "
        "Measure it without --weights-only."
    )


def _picked(tensors: Tensors, name: str, where: _Rows, head_dim: int) -> Tensor:
    """(H, D, N) rows of a weight, (H, D) of a bias."""
    rows = tensors.read(name, where.start, where.stop)
    heads = where.heads or max(len(rows) // head_dim, 1)
    if not len(rows) or len(rows) % (heads * head_dim):
        raise UserError(f"Tensor {name!r} of shape {tuple(rows.shape)} does not hold heads of {head_dim} channels.")
    return rows.reshape(heads, -1, head_dim, *rows.shape[1:])[:, where.part].contiguous()


def _optional(tensors: Tensors, *names: str) -> Tensor | None:
    """The first of the names that is there."""
    return next((tensors.read(name, None, None) for name in names if name in tensors.names), None)


def _small(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of the family with two heads, so that their order shows, and no parameter at its usual value."""
    text, small = config.get_text_config(decoder=True), shrunk(config)
    small.num_attention_heads, small.hidden_size = 2, 2 * small.hidden_size
    keys = getattr(text, "num_key_value_heads", None)
    if keys is not None:
        small.num_key_value_heads = 2 if keys == text.num_attention_heads else 1
    model: PreTrainedModel = AutoModel.from_config(small).float().eval()
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)
    return model


def _seen(model: PreTrainedModel) -> tuple[dict[int, Tensor], dict[int, Call]]:
    """(N,) input of each layer, and its attention call, for one token at position 0, where nothing is rotated."""
    inputs: dict[int, Tensor] = {}
    calls: dict[int, Call] = {}
    blocks = blocks_of(model.state_dict())

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs[layer] = (args[0] if args else kwargs["hidden_states"])[0, 0].clone()

        return hook

    for name, module in model.named_modules():
        if name.startswith(blocks) and name.removeprefix(blocks).isdigit():
            module.register_forward_pre_hook(keep(int(name.removeprefix(blocks))), with_kwargs=True)
    with capture(model, lambda call: calls.__setitem__(call.layer, call)):
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    return inputs, calls


def _gap(
    form: Form, tensors: Tensors, config: PreTrainedConfig, entering: Tensor, call: Call, rotary: Rotary | None
) -> float:
    """How far a form's queries and keys are from the model's, relative to their size."""
    assert rotary is not None
    blocks = blocks_of(tensors.names)
    pair = projections(tensors, blocks, call.layer, form, config, call.query.shape[-1])
    x = entering - entering.mean() if form.norm == "layer" else entering
    x = x / x.square().mean().sqrt()
    turned = torch.ones(call.query.shape[-1])
    turned[torch.as_tensor(np.concatenate([rotary.first, rotary.second]))] = rotary.factor
    gaps = []
    for projection, actual in zip(pair, (call.query, call.key), strict=True):
        z = projection.rows @ x
        if projection.bias is not None:
            z = z + projection.bias
        if projection.gain is not None:
            over = (0, 1) if projection.joint else (1,)
            z = z - z.mean(dim=over, keepdim=True) if form.norm == "layer" else z
            z = z / z.square().mean(dim=over, keepdim=True).sqrt() * projection.gain
        if z.shape != actual[0, :, 0].shape:
            return float("inf")
        gaps.append(float((z * turned - actual[0, :, 0]).abs().max() / actual.abs().max()))
    return max(gaps)
