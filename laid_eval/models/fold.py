"""Turns a model with gains into an ordinary checkpoint, and certifies that nothing else changed.

A *fold certificate* says of every layer how far its rotated queries are from the gain times the former ones, and by
how much they would have missed had pairs been those of the other layout (the control: a check that can't fail proves
nothing); and of the whole model how far its predictions are from those under the gain at run time. A fold that does
not pass leaves the model as it was.

Where the model will be saved in fewer bits than it has now, what that costs is certified too, beside what it costs
the same model without gains: fold first, cast once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_eval.core import GainNotFoldable, RopeGain
from laid_eval.models.fold_sites import EXACT, POWER, LayerSite, fold_layer, fold_sites, written
from laid_eval.models.gained import GAIN, attention_modules, drop_gains, gainable, gains_of
from laid_eval.models.rotary import Rotary
from laid_eval.models.trial import (
    Inputs,
    at_rest,
    in_other_layout,
    layout_of,
    miss,
    pairs_of,
    random_gain,
    recorded,
    replay,
)
from laid_eval.runs import write_atomically

FILE = "laid_fold.json"
SCHEMA_VERSION = 1
_PROBE = 64  # tokens of the text that is read where none is given
_KL = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest mean KL, nats per token, between gain at run time and fold. What a wrong fold gives is of order 0.1."""


@dataclass(frozen=True)
class FoldedLayer:
    """One layer of a certificate."""

    layer: int
    site: str
    """Tensors that took the gain up."""
    layout: str
    """Of its rotary pairs: `half-split` or `interleaved`."""
    error: float
    """Rotated queries against the gain times the former ones: worst relative error of a head's pair over all tokens."""
    control: float
    """The same for gains written to pairs of the other layout."""
    control_gains: str
    """`own`, or `random` where the layer's own are too small for a wrong layout to show."""


@dataclass(frozen=True)
class Drift:
    """How far predictions on the probe text moved."""

    kl: float
    """Mean KL(before || after), nats per token."""
    top1: float
    """Share of tokens whose likeliest successor stayed the same."""
    log_probability: float
    """Largest change of any log-probability, nats."""


@dataclass(frozen=True)
class Certificate:
    """That a fold changed nothing but where the gain is."""

    gains: str
    """sha256 of the gains and the channels they act on."""
    sharing: str
    """`head`: gains of every head's own; `layer`: shared by the heads of a layer."""
    dtype: str
    layers: tuple[FoldedLayer, ...]
    bound: float
    """Largest `error` allowed in this dtype."""
    power: float
    """Least `control` demanded."""
    tokens: int
    """Of the probe text."""
    drift: Drift
    """Gain at run time against fold."""
    drift_bound: float
    """Largest `kl` allowed in this dtype."""
    export_dtype: str | None
    export: Drift | None
    """Gain at run time in `dtype` against the fold cast to `export_dtype`."""
    export_plain: Drift | None
    """The same cast of the model without gains: the yardstick."""
    torch: str
    transformers: str

    @property
    def passed(self) -> bool:
        """All bounds are kept."""
        exact = all(layer.error <= self.bound and layer.control >= self.power for layer in self.layers)
        return exact and self.drift.kl <= self.drift_bound

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, "passed": self.passed} | asdict(self)


def fold(
    model: PreTrainedModel,
    rotaries: Sequence[Rotary | None],
    ids: Tensor | None = None,
    export_dtype: torch.dtype | None = None,
) -> Certificate:
    """Writes the gains of a model into its weights and removes them; the model then is an ordinary one.

    Args:
        model: A causal language model that carries gains (`gained.add_gains`), adapters merged, nothing quantised.
            It is rounded once, to the model's own dtype: better fold in float32 and cast after. On a GPU float32
            products must be whole ones (no TF32), or the check will find them wanting.
        rotaries: Of every layer, from `rotary.rotaries`.
        ids: (B, N) token ids of a probe text, up to a few hundred; fixed random ones by default.
        export_dtype: What the checkpoint will be saved in; certifies what that cast costs.

    Raises:
        GainNotFoldable: A layer's gain has nowhere to go, or the fold failed its check; the model is as it was.
        ValueError: The model carries no gains.
    """
    gains = gains_of(model)
    if not gains:
        raise ValueError(f"{type(model).__name__} carries no gains to fold; see gained.add_gains")
    gainable(model)
    with torch.no_grad(), at_rest(model):
        sites = fold_sites(model, rotaries, sorted(gains))
        _refuse_homeless(gains, sites)
        ids = _probe(model) if ids is None else ids
        asked = _predictions(model, ids)
        plain = None if export_dtype is None else _cast_of_plain(model, gains, ids, export_dtype)
        with _all_or_nothing(model, gains, sites):
            layers = _fold_layers(model, gains, sites, ids)
            drop_gains(model)
            drift, export = _drift(asked, _predictions(model, ids)), None
            if export_dtype is not None:
                with _cast(model, export_dtype):
                    export = _drift(asked, _predictions(model, ids))
            certificate = Certificate(
                gains=_fingerprint(gains),
                sharing="layer" if all(gain.shared for gain in gains.values()) else "head",
                dtype=_name(model.dtype),
                layers=layers,
                bound=_bound(model.dtype),
                power=_power(model.dtype),
                tokens=ids.numel(),
                drift=drift,
                drift_bound=_KL[model.dtype],
                export_dtype=None if export_dtype is None else _name(export_dtype),
                export=export,
                export_plain=plain,
                torch=str(torch.__version__),
                transformers=transformers.__version__,
            )
            _demand(certificate)
    return certificate


def write_certificate(folder: str | os.PathLike[str], certificate: Certificate) -> Path:
    """Writes `laid_fold.json` beside a checkpoint."""
    path = Path(folder) / FILE
    write_atomically(path, json.dumps(certificate.as_dict(), indent=1, allow_nan=False) + "\n")
    return path


def _refuse_homeless(gains: Mapping[int, RopeGain], sites: Mapping[int, LayerSite]) -> None:
    for layer, gain in gains.items():
        if layer not in sites:
            raise GainNotFoldable(f"layer {layer} does not rotate and has no pairs: it takes no gain")
        if not gain.shared and not sites[layer].per_head:
            raise GainNotFoldable(
                f"layer {layer}: gains of {len(gain.parameter)} heads can't fold into {sites[layer].name}, which all "
                "heads share: use gains shared by heads"
            )


def _fold_layers(
    model: PreTrainedModel, gains: Mapping[int, RopeGain], sites: Mapping[int, LayerSite], ids: Tensor
) -> tuple[FoldedLayer, ...]:
    """Writes the gains, layer by layer, each checked on the inputs its attention has without any gain."""
    modules, inputs = attention_modules(model), recorded(model, ids)
    return tuple(_fold_layer(model, modules[n], inputs[n], gains[n], sites[n]) for n in sorted(gains))


def _fold_layer(
    model: PreTrainedModel, module: nn.Module, inputs: Inputs, gain: RopeGain, site: LayerSite
) -> FoldedLayer:
    plain = replay(model, module, inputs).query
    control, source = _control(model, module, inputs, gain, site, plain), "own"
    if not control >= _power(model.dtype):
        heads = None if gain.shared else len(gain.parameter)
        drawn = random_gain(*pairs_of(gain), len(gain.pair_of), heads).to(plain.device)
        control, source = _control(model, module, inputs, drawn, site, plain), "random"
    if bool(gain.log_gain().any()):  # a gain of 1 is no reason to round 1 + w
        fold_layer(gain, site.parts)
    error = miss(replay(model, module, inputs).query, gain(plain), gain.pair_of)
    return FoldedLayer(site.layer, site.name, layout_of(gain), error, control, source)


def _control(
    model: PreTrainedModel, module: nn.Module, inputs: Inputs, gain: RopeGain, site: LayerSite, plain: Tensor
) -> float:
    """By how much the same gains miss on pairs of the other layout."""
    wrong = in_other_layout(gain)
    with written(wrong, site.parts):
        mislaid = replay(model, module, inputs).query
    return miss(mislaid, wrong(plain), wrong.pair_of)


def _demand(certificate: Certificate) -> None:
    for layer in certificate.layers:
        if not layer.error <= certificate.bound:
            raise GainNotFoldable(
                f"layer {layer.layer}: folded into {layer.site}, its queries miss the gain by {layer.error:.2g} "
                f"(allowed {certificate.bound:.2g}); nothing was folded"
            )
        if not layer.control >= certificate.power:
            raise GainNotFoldable(
                f"layer {layer.layer}: the check has no power, pairs of the other layout miss by {layer.control:.2g} "
                f"only (wanted {certificate.power:.2g}): give a longer probe text; nothing was folded"
            )
    if not certificate.drift.kl <= certificate.drift_bound:
        raise GainNotFoldable(
            f"the folded model's predictions differ from those under the gain: KL {certificate.drift.kl:.2g} nats a "
            f"token (allowed {certificate.drift_bound:.2g}); nothing was folded"
        )


@contextmanager
def _all_or_nothing(
    model: PreTrainedModel, gains: Mapping[int, RopeGain], sites: Mapping[int, LayerSite]
) -> Iterator[None]:
    """Within, weights may change and gains go; if anything is raised, both are as before, bit for bit."""
    tensors = [tensor for n in gains for part in sites[n].parts for tensor in part.tensors]
    own = [tensor.to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, before in zip(tensors, own, strict=True):
            tensor.copy_(before)
        _put_back(model, gains)
        raise


def _cast_of_plain(model: PreTrainedModel, gains: Mapping[int, RopeGain], ids: Tensor, dtype: torch.dtype) -> Drift:
    """What casting does to the model without its gains."""
    drop_gains(model)
    try:
        own = _predictions(model, ids)
        with _cast(model, dtype):
            return _drift(own, _predictions(model, ids))
    finally:
        _put_back(model, gains)


def _put_back(model: PreTrainedModel, gains: Mapping[int, RopeGain]) -> None:
    modules = attention_modules(model)
    for layer, gain in gains.items():
        modules[layer].add_module(GAIN, gain)


@contextmanager
def _cast(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within, the weights are of another dtype, as from a checkpoint saved in it; buffers are not saved and stay."""
    own = [(x, x.data) for x in model.parameters() if x.is_floating_point()]
    try:
        for x, data in own:
            x.data = data.to(dtype)
        yield
    finally:
        for x, data in own:
            x.data = data


def _predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(B * N, V) logits in float32, on the CPU."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.flatten(0, 1).float().cpu()


def _drift(before: Tensor, after: Tensor) -> Drift:
    kl, same, largest = 0.0, 0, 0.0
    for one, other in zip(before, after, strict=True):  # token by token: in float64 a large vocabulary is long
        p, q = one.double().log_softmax(0), other.double().log_softmax(0)
        kl += float((p.exp() * (p - q)).sum())
        same += int(p.argmax() == q.argmax())
        largest = max(largest, float((p - q).abs().max()))
    return Drift(kl / len(before), same / len(before), largest)


def _fingerprint(gains: Mapping[int, RopeGain]) -> str:
    digest = hashlib.sha256()
    for layer in sorted(gains):
        gain = gains[layer]
        shape = [layer, *gain.parameter.shape, *gain.pair_of.tolist()]
        digest.update(json.dumps(shape).encode())
        digest.update(gain.log_gain().detach().float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _bound(dtype: torch.dtype) -> float:
    """Largest error of a fold: float32's, or four roundings where numbers are shorter."""
    return max(EXACT, 4 * torch.finfo(dtype).eps)


def _power(dtype: torch.dtype) -> float:
    """Least control: far above the error allowed."""
    return max(POWER, 4 * _bound(dtype))


def _probe(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (1, _PROBE), generator=torch.Generator().manual_seed(4))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
