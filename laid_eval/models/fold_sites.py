"""Where a gain on rotated queries can become part of a checkpoint: found by behaviour, for any decoder.

A query channel is made by one number of the last module with weights on its way: a row of a projection, or an entry of
the norm behind it. Which number differs by family (fused projections, gates between heads, channels in another order,
norms that heads share), so it is not looked up but seen: at position 0 nothing turns, and every query channel that
attention is given *is* some output of that module. What was seen is then tried: gains of random size are written
there, the attention module runs again on the same inputs, and the rotated queries must be the gains times the former
ones, with keys and values as before and the output that of a gain at run time. The same with pairs of the other layout
must miss: else the trial could not have told.

Meanwhile random float32 numbers stand in for the layer's weights and its input: no bias is zero, no norm neutral, no
two heads are alike, so what passes holds whatever the weights become. The model's own tensors are never written.

Shape letters: B texts, H query heads, N tokens, D channels of a head, E numbers a module puts out per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_eval.core import FoldSite, GainNotFoldable, RopeGain, fold_gain
from laid_eval.core.heads import wide
from laid_eval.errors import UserError
from laid_eval.models.gained import attention_modules
from laid_eval.models.rotary import Rotary
from laid_eval.models.trial import (
    Inputs,
    Shown,
    at_rest,
    in_other_layout,
    layout_of,
    miss,
    of_head,
    random_gain,
    recorded,
    replay,
)

EXACT = 1e-5
"""Largest relative difference of a pair's queries from the gain times the former ones, in float32."""
POWER = 1e-2
"""What pairs of the other layout must miss by."""
_OUTPUT = 1e-3  # of the layer's output: the softmax enlarges what rounding leaves in the queries
_LONE, _TEXT = 16, 48  # texts of one token, that lie at position 0; tokens of the text on which gains are tried
_SAME = 1 - 1e-5  # cosine between two channels over the lone tokens


@dataclass(frozen=True, eq=False)
class LayerSite:
    """Where one layer's gain can be written, and how well that was seen to work."""

    layer: int
    name: str
    """Of the tensors, inside the attention module: `q_proj.weight+bias`, `q_norm.weight (1 + w)`."""
    parts: tuple[FoldSite, ...]
    """One; or one per head, where every head has a norm of its own (StableLM)."""
    per_head: bool
    """Gains of every head's own fold here; else only gains that all heads share."""
    layout: str
    """`half-split` or `interleaved`."""
    error: float
    """Worst relative error of a pair of random gains."""
    control: float
    """The same where pairs are those of the other layout."""


def fold_sites(
    model: PreTrainedModel, rotaries: Sequence[Rotary | None], layers: Sequence[int] | None = None
) -> dict[int, LayerSite]:
    """Where the gain of every layer folds. The tensors are the model's own, valid until it is cast or moved.

    Args:
        model: With plain weights: adapters merged, nothing quantised.
        rotaries: Of every layer, from `rotary.rotaries`. Layers that do not rotate have no pairs and no site.
        layers: To look at; all that rotate by default.

    Raises:
        GainNotFoldable: A layer where nothing folds; says what stands in the way.
    """
    wanted = {n: rotary for n, rotary in enumerate(rotaries) if rotary is not None and (layers is None or n in layers)}
    modules = attention_modules(model)
    for layer in wanted:
        with _of_layer(layer, model):
            _refuse_adapters_and_packed(modules.get(layer))
    found = {}
    with torch.no_grad(), at_rest(model):
        try:
            lone = recorded(model, _tokens(model, _LONE, 1))
            text = recorded(model, _tokens(model, 1, _TEXT))
        except UserError as error:
            raise GainNotFoldable(str(error)) from None
        for layer, rotary in wanted.items():
            with _of_layer(layer, model):
                if layer not in lone:
                    raise GainNotFoldable(
                        "its attention can't be seen, none went through transformers' attention interface"
                    )
                found[layer] = _site(model, layer, modules[layer], rotary, lone[layer], text[layer])
    return found


def fold_layer(gain: RopeGain, parts: Sequence[FoldSite]) -> None:
    """Writes a layer's gain into its site.

    Raises:
        GainNotFoldable: Gains per head into numbers that heads share.
    """
    for head, part in enumerate(parts):
        fold_gain(gain if len(parts) == 1 or gain.shared else of_head(gain, head), part)


@contextmanager
def written(gain: RopeGain, parts: Sequence[FoldSite]) -> Iterator[None]:
    """Within, a gain is written into its site; then the tensors are as before, bit for bit."""
    tensors = [tensor for part in parts for tensor in part.tensors]
    own = [tensor.clone() for tensor in tensors]
    try:
        fold_layer(gain, parts)
        yield
    finally:
        for tensor, before in zip(tensors, own, strict=True):
            tensor.copy_(before)


@dataclass(frozen=True, eq=False)
class _Part:
    """Tensors that a module makes some query channels with."""

    module: nn.Module
    path: str
    names: tuple[str, ...]
    """Of the module's own parameters."""
    rows: Tensor
    """(H or 1, D) index into each of them."""

    def site(self, offset: float) -> FoldSite:
        """Of the numbers that are in the module now."""
        last = int(self.rows.max())
        data = [getattr(self.module, name).data for name in self.names]
        return FoldSite([x if len(x) > last else x.view(-1) for x in data], self.rows, offset)


@dataclass(frozen=True, eq=False)
class _Candidate:
    parts: tuple[_Part, ...]
    heads: int
    offset: float

    @property
    def per_head(self) -> bool:
        return len(self.parts) > 1 or len(self.parts[0].rows) == self.heads

    @property
    def name(self) -> str:
        first = self.parts[0]
        path = first.path if len(self.parts) == 1 else f"{first.path.rpartition('.')[0]}.*"
        return f"{path}.{'+'.join(first.names)}" + (" (1 + w)" if self.offset else "")

    def sites(self) -> tuple[FoldSite, ...]:
        return tuple(part.site(self.offset) for part in self.parts)


def _site(
    model: PreTrainedModel, layer: int, module: nn.Module, rotary: Rotary, lone: Inputs, text: Inputs
) -> LayerSite:
    """The first candidate that stands the trial."""
    with _stand_ins(module):
        outputs, shown = _outputs(model, module, lone.noise())
        made = [(path, x.reshape(_LONE, -1)) for path, x in outputs if x.numel() % _LONE == 0]
        found = _candidates(module, made, shown.query)
        if not found:
            raise GainNotFoldable(_unmade(module, made, shown.query))
        text, misses = text.noise(), []
        for candidate in found:
            gain = _gain(rotary, shown.query, candidate.per_head)
            error, control, obstacle = _trial(model, module, text, candidate, gain)
            if obstacle is None:
                break
            misses.append(f"{candidate.name}: {obstacle}")
        else:
            raise GainNotFoldable("what seems to make its queries does not carry a gain (" + "; ".join(misses) + ")")
    _refuse_ties(model, module, candidate)
    return LayerSite(layer, candidate.name, candidate.sites(), candidate.per_head, layout_of(gain), error, control)


def _trial(
    model: PreTrainedModel, module: nn.Module, inputs: Inputs, candidate: _Candidate, gain: RopeGain
) -> tuple[float, float, str | None]:
    """Gains of the right layout, and of the other one, written into a candidate: error, control, obstacle."""
    wrong = in_other_layout(gain)
    plain, at_run_time = replay(model, module, inputs), replay(model, module, inputs, gain)
    with written(gain, candidate.sites()):
        folded = replay(model, module, inputs)
    with written(wrong, candidate.sites()):
        mislaid = replay(model, module, inputs)
    error = miss(folded.query, at_run_time.query, gain.pair_of)
    control = miss(mislaid.query, wrong(plain.query), wrong.pair_of)
    obstacle = None
    if not error <= EXACT:
        obstacle = f"queries miss the gain by {error:.2g}, allowed {EXACT:.0e}"
    elif not (_near(folded.key, plain.key, EXACT) and _near(folded.value, plain.value, EXACT)):
        obstacle = "it makes keys or values too"
    elif not _near(folded.output, at_run_time.output, _OUTPUT):
        obstacle = "it also acts on the layer's output otherwise than through the queries"
    elif not control >= POWER:
        obstacle = f"pairs of the other layout miss by {control:.2g} only: it acts behind the rotation"
    return error, control, obstacle


def _candidates(module: nn.Module, made: Sequence[tuple[str, Tensor]], query: Tensor) -> list[_Candidate]:
    """Modules whose outputs (B, E) for lone tokens are the queries, with weights as they are and as 1 + w."""
    heads = query.shape[1]
    groups: list[tuple[_Part, ...]] = []
    by_head: dict[int, _Part] = {}
    for path, x in made:
        rows = _rows(x, query)
        known = (rows >= 0).all(1)
        part = _part(module, path, x.shape[1], rows[known]) if bool(known.any()) else None
        if part is not None and bool(known.all()):
            groups.append((part,))
        elif part is not None and int(known.sum()) == 1:
            by_head[int(known.nonzero())] = part
    if len(by_head) == heads:
        groups.append(tuple(by_head[head] for head in range(heads)))
    return [_Candidate(parts, heads, offset) for parts in groups for offset in (0.0, 1.0)]


def _rows(made: Tensor, query: Tensor) -> Tensor:
    """(H, D) which of the numbers (B, E) that a module makes is each channel of lone tokens' queries (B, H, 1, D).

    Up to a factor of the channel: YaRN scales what rotates. -1 where none is.
    """
    unit = nn.functional.normalize(made.T, dim=1)
    rows = []
    for channels in query[:, :, 0].permute(1, 2, 0):  # head by head, to keep the product small
        near, row = (nn.functional.normalize(channels, dim=1) @ unit.T).max(1)
        rows.append(torch.where(near >= _SAME, row, -1))
    return torch.stack(rows).cpu()


def _part(module: nn.Module, path: str, made: int, rows: Tensor) -> _Part | None:
    """The module's own parameters that have a number for each it makes, or one for each channel of any head."""
    owner = module.get_submodule(path)
    own = dict(owner.named_parameters(recurse=False))
    channels = rows.shape[1]
    by_row = tuple(name for name, p in own.items() if p.ndim and made in (len(p), p.numel()))
    if by_row:
        return _Part(owner, path, by_row, rows) if len(set(rows.flatten().tolist())) == rows.numel() else None
    shared = tuple(name for name, p in own.items() if p.numel() == channels)
    rows = rows % channels
    return _Part(owner, path, shared, rows[:1]) if shared and bool((rows == rows[:1]).all()) else None


def _unmade(module: nn.Module, made: Sequence[tuple[str, Tensor]], query: Tensor) -> str:
    """Why no weights make the queries."""
    for path, x in made:
        if not module.get_submodule(path)._parameters and bool((_rows(x, query) >= 0).all()):
            return (
                f"its queries come out of {path}, a norm without weights: it takes any gain written before it out "
                "again and has no number of its own to carry one"
            )
    tried = ", ".join(dict.fromkeys(path for path, _ in made))
    return f"its queries are the output of none of its modules ({tried}); no weights are known that make them"


def _outputs(model: PreTrainedModel, module: nn.Module, inputs: Inputs) -> tuple[list[tuple[str, Tensor]], Shown]:
    """What every innermost module puts out, by path and in order, and what attention shows."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((path, output))

        return hook

    watched = [(path, m) for path, m in module.named_modules() if path and (m._parameters or not m._modules)]
    hooks = [m.register_forward_hook(keep(path)) for path, m in watched]
    try:
        return outputs, replay(model, module, inputs)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[None]:
    """Within, random float32 numbers near a module's weights stand in for them; they themselves are not written."""
    own = [(x, x.data) for x in [*module.parameters(), *module.buffers()] if x.is_floating_point()]
    generator = torch.Generator().manual_seed(3)
    try:
        for x, data in own:
            x.data = wide(data).clone()
            if isinstance(x, nn.Parameter):
                size = 0.3 if x.ndim < 2 else 0.3 * float(x.data.square().mean().sqrt()) or 0.02
                x.data += size * torch.randn(x.shape, generator=generator).to(x.data)
        yield
    finally:
        for x, data in own:
            x.data = data


@contextmanager
def _of_layer(layer: int, model: nn.Module) -> Iterator[None]:
    """Names the layer in what is raised within."""
    try:
        yield
    except GainNotFoldable as error:
        raise GainNotFoldable(f"layer {layer} of {type(model).__name__}: {error}") from None


def _refuse_adapters_and_packed(module: nn.Module | None) -> None:
    for path, inner in module.named_modules() if module else ():
        if hasattr(inner, "lora_A") or hasattr(inner, "base_layer"):
            raise GainNotFoldable(
                f"an adapter (LoRA) sits on {path}: merge it into the weights first (merge_and_unload)"
            )
        for name, x in [*inner._parameters.items(), *inner._buffers.items()]:
            if x is None or x.dtype in (torch.bool, torch.int64):  # masks and indices
                continue
            if type(x.data) is not Tensor or not (x.is_floating_point() or x.is_complex()) or x.element_size() < 2:
                kind = str(x.dtype) if type(x.data) is Tensor else type(x.data).__name__
                raise GainNotFoldable(f"{path}.{name} is packed or quantised ({kind}): fold first, then quantise")


def _refuse_ties(model: PreTrainedModel, module: nn.Module, candidate: _Candidate) -> None:
    """Other weights in the same memory would change with these."""
    everywhere = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{path}." for path, m in everywhere if m is module)
    for part, name in [(own, name) for own in candidate.parts for name in own.names]:
        start, end = _memory(getattr(part.module, name))
        for path, m in everywhere:
            for other, x in m._parameters.items():
                own = m is part.module and other == name and path.startswith(inside)
                if x is None or own or _memory(x)[1] <= start or end <= _memory(x)[0]:
                    continue
                raise GainNotFoldable(
                    f"{part.path}.{name} is shared with {path}.{other}: folding one would change the other"
                )


def _memory(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


def _gain(rotary: Rotary, query: Tensor, per_head: bool) -> RopeGain:
    first, second = torch.as_tensor(rotary.first), torch.as_tensor(rotary.second)
    return random_gain(first, second, query.shape[-1], query.shape[1] if per_head else None).to(query.device)


def _tokens(model: PreTrainedModel, texts: int, size: int) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (texts, size), generator=torch.Generator().manual_seed(1))


def _near(seen: Tensor, wanted: Tensor, bound: float) -> bool:
    return bool((seen - wanted).abs().max() <= bound * wanted.abs().max())
