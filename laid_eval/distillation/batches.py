"""From samples to what one forward pass is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from laid_eval.distillation.samples import Sample, Samples


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts of one forward pass, padded on the right; or one haystack of pictures."""

    input_ids: Tensor
    """(B, N)"""
    attention_mask: Tensor
    """(B, N); 0 is padding."""
    position_ids: Tensor
    """(B, N), or (A, B, N) by axis."""
    labels: Tensor
    """(B, N); -100 where a token is none."""
    numbers: Tensor
    """(B,) of the samples."""
    places: Tensor | None = None
    """(B, N) pictures that tokens belong to, as in `Shown`; with it come the two below."""
    branches: Tensor | None = None
    """(B, N) questions that tokens belong to."""
    vision: dict[str, Tensor] | None = None
    """What the model's vision side is given."""

    def as_inputs(self) -> dict[str, Any]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Numbered(Dataset[dict[str, Any]]):
    """Samples 0, 1, ... up to what the run needs."""

    def __init__(self, samples: Samples, size: int) -> None:
        """`size` samples."""
        self._samples, self._size = samples, size

    def __len__(self) -> int:
        """All steps' samples."""
        return self._size

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One text, unpadded."""
        return _tensors(self._samples(number), number)


def padded(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: texts padded on the right. With padding the mask is (B, 1, N, N); single texts need none."""
    if "vision" in texts[0]:
        (only,) = texts
        return _alone(only).as_inputs()
    longest = max(len(text["ids"]) for text in texts)

    def line(text: dict[str, Any], name: str, fill: int) -> Tensor:
        return nn.functional.pad(text[name], (0, longest - len(text[name])), value=fill)

    batch = Batch(
        input_ids=torch.stack([line(t, "ids", 0) for t in texts]),
        attention_mask=torch.stack([line({"x": torch.ones_like(t["ids"])}, "x", 0) for t in texts]),
        position_ids=torch.stack([line(t, "positions", 0) for t in texts]),
        labels=torch.stack([line(t, "labels", -100) for t in texts]),
        numbers=torch.tensor([t["number"] for t in texts]),
    )
    return batch.as_inputs()


def batch_of(sample: Sample, device: torch.device) -> Batch:
    """One sample as a batch."""
    batch = _alone(_tensors(sample, 0))
    vision = batch.vision and {name: value.to(device) for name, value in batch.vision.items()}
    rest = {name: value.to(device) for name, value in batch.as_inputs().items() if name != "vision"}
    return Batch(**rest, vision=vision)


def prompt_of(sample: Sample, longest: int) -> dict[str, Any]:
    """A text's first tokens; or a haystack of pictures with its first question, to predict its last tokens.

    As keyword arguments of any model, at most `longest` tokens to predict.
    """
    if sample.shown is None:
        return {"input_ids": torch.tensor([sample.tokens[:longest]])}
    size = int((sample.shown.branches <= 1).sum())
    positions = torch.as_tensor(sample.positions[..., :size])
    return {
        "input_ids": torch.tensor([sample.tokens[:size]]),
        "position_ids": positions[..., None, :],
        "logits_to_keep": longest,
        **sample.shown.inputs,
    }


def like(inputs: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """Tensors where a model's weights are, and in their type."""
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _tensors(sample: Sample, number: int) -> dict[str, Any]:
    labels = torch.full((len(sample.tokens),), -100)
    at = torch.tensor(sample.labels, dtype=torch.long)
    ids = torch.tensor(sample.tokens)
    labels[at] = ids[at]
    out = {"ids": ids, "labels": labels, "positions": torch.as_tensor(sample.positions), "number": number}
    if sample.shown is not None:
        out |= {name: torch.as_tensor(getattr(sample.shown, name)) for name in ("places", "branches")}
        out["vision"] = sample.shown.inputs
    return out


def _alone(text: dict[str, Any]) -> Batch:
    """A batch of one."""
    return Batch(
        input_ids=text["ids"][None],
        attention_mask=torch.ones_like(text["ids"])[None],
        position_ids=text["positions"][..., None, :],
        labels=text["labels"][None],
        numbers=torch.tensor([text["number"]]),
        places=text["places"][None] if "places" in text else None,
        branches=text["branches"][None] if "branches" in text else None,
        vision=text.get("vision"),
    )
