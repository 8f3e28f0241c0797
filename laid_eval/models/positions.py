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


def counted_positions(model: PreTrainedModel, piece: Piece) -> Tensor:
    """(axes, n) positions of a piece that stands at the start: the model's own count, or its slots on one axis."""
    own = own_positions(model, piece)
    return torch.arange(piece.ids.shape[1])[None] if own is None else own[:, 0].cpu()


def span(model: PreTrainedModel, piece: Piece) -> int:
    """Positions that a piece takes: what follows stands so many further."""
    return int(counted_positions(model, piece).max()) + 1


@contextmanager
def positions_held_to(model: PreTrainedModel, expected: Tensor) -> Iterator[None]:
    """Within, every rotary module of the decoder must be given the positions (axes, n) expected.

    Raises:
        UserError: One is given others: nothing that is said by position would hold.
    """

    def check(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        positions: Tensor = given["position_ids"] if "position_ids" in given else args[1]
        seen = positions.reshape(-1, *positions.shape[-2:])[:, 0].cpu()  # axes or none, batch, tokens
        if seen.shape[-1] != expected.shape[-1] or not bool((seen == expected).all()):
            raise UserError(
                f"{type(model).__name__} rotates by other positions than it counts (get_rope_index, or its slots); a "
                "spectrum by position would be wrong. Please report the model and the version of transformers."
            )

    hooks = [
        module.register_forward_pre_hook(check, with_kwargs=True)
        for module in model.get_decoder().modules()
        if is_rotary(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
