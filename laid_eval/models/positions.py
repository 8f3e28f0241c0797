"""RoPE positions of a prompt with pictures: as the model counts them, and as its rotary modules are given them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_eval.errors import UserError
from laid_eval.models.picture_frame import Piece
from laid_eval.models.rotary import is_rotary


def own_positions(model: PreTrainedModel, piece: Piece) -> Tensor | None:
    """(axes, 1, n) positions of a piece that stands at the start, by the model's own `get_rope_index`.

    `None` where positions are slots. Needs no weights: a model without memory will do.
    """
    find = getattr(model.base_model, "get_rope_index", None)
    if find is None:
        return None
    if "mm_token_type_ids" not in piece.inputs:
        return torch.arange(piece.ids.shape[1]).expand(3, 1, -1)
    names = set(inspect.signature(find).parameters)
    inputs = {"input_ids": piece.ids, **{n: v for n, v in piece.inputs.items() if n in names}}
    positions: Tensor = find(**inputs)[0]
    return positions


def span(model: PreTrainedModel, piece: Piece) -> int:
    """Positions that a piece takes: what follows stands so many further."""
    positions = own_positions(model, piece)
    return piece.ids.shape[1] if positions is None else int(positions.max()) + 1


@contextmanager
def seen_positions(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within, what every rotary module of the decoder is given: (axes, n) a call, one axis where there is but one."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        positions: Tensor = given["position_ids"] if "position_ids" in given else args[1]
        seen.append(positions.reshape(-1, *positions.shape[-2:])[:, 0].cpu())

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in model.get_decoder().modules()
        if is_rotary(module)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def checked_positions(model: PreTrainedModel, piece: Piece, seen: list[Tensor]) -> Tensor:
    """(axes, n) positions that a whole prompt was given, which must be those the model counts itself.

    Raises:
        UserError: They are not: nothing that is said by position would hold.
    """
    own = own_positions(model, piece)
    expected = torch.arange(piece.ids.shape[1])[None] if own is None else own[:, 0].cpu()
    for positions in seen:
        if positions.shape[-1] != expected.shape[-1] or not torch.equal(positions.expand_as(expected), expected):
            counted = "its slots" if own is None else "what its get_rope_index counts"
            raise UserError(
                f"{type(model).__name__} gives its rotary module other positions than {counted}; a spectrum by "
                "position would be wrong. Nothing was measured; please report the model and transformers' version."
            )
    return expected


def is_picture(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(n,) which tokens (1, n) stand for a picture's content.

    Raises:
        UserError: The model's configuration names no such token.
    """
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        raise UserError(
            f"The configuration of {type(model).__name__} does not say which tokens are pictures (image_token_id)."
        )
    return ids[0] == int(token)
