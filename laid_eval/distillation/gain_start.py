"""Where gains start: the least-squares factor between a student's queries and its teacher's, in one forward pass.

For a student whose layers correspond to the teacher's head by head (a damaged, quantised or briefly fine-tuned copy)
the best gain of a rotary pair has a closed form: g = sum(q . q') / sum(q . q), over tokens and the pair's two
channels. Layers are solved in the order in which they run, each on what the layers below give once theirs are in
place, so the pass ends with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.core import RopeGain
from laid_eval.core.gain import LIMIT
from laid_eval.distillation.batches import Batch
from laid_eval.distillation.student import Pair, read
from laid_eval.errors import UserError
from laid_eval.models.gained import gains_of


@torch.no_grad()
def start_gains(student: PreTrainedModel, teacher: PreTrainedModel, pairs: Sequence[Pair], batch: Batch) -> None:
    """Sets the student's gains from one batch of texts.

    Args:
        student: Made `gainable`, with gains.
        teacher: Made `gainable`.
        pairs: Which layer of the teacher a student's layer corresponds to; gains of other layers stay as they are.
        batch: The texts; without padding.

    Raises:
        UserError: Layers of a pair differ in heads.
    """
    gains = gains_of(student)
    _, theirs = read(teacher, batch, [p.teacher for p in pairs])
    hooks = []
    for pair in pairs:
        if pair.student in gains:
            target = theirs[pair.teacher].query

            def solve(gain: Any, given: tuple[Tensor], target: Tensor = target) -> None:
                _check_shapes(given[0], target)
                gain.set_log_gain(best_log_gain(gain, given[0], target))

            hooks.append(gains[pair.student].register_forward_pre_hook(solve))
    try:
        read(student, batch, [])
    finally:
        for hook in hooks:
            hook.remove()


def best_log_gain(gain: RopeGain, query: Tensor, target: Tensor) -> Tensor:
    """(H or 1, P) logarithms of the factors that bring queries (B, H, N, D) nearest to a target of the same shape.

    Factors are kept between 1/4 and 4; a pair without any energy keeps 1.

    >>> gain = RopeGain(torch.tensor([0]), torch.tensor([1]), channels=2, heads=1)
    >>> round(float(best_log_gain(gain, torch.ones(1, 1, 3, 2), 2 * torch.ones(1, 1, 3, 2)).exp()), 4)
    2.0
    """
    heads, pairs = gain.parameter.shape
    product = (query.double() * target.double()).sum(dim=(0, 2))  # (H, D)
    square = query.double().square().sum(dim=(0, 2))
    if heads == 1:
        product, square = product.sum(dim=0, keepdim=True), square.sum(dim=0, keepdim=True)
    # pair number of each channel; one past the pairs: channels that do not turn
    index = gain.pair_of.expand_as(product)
    sums = [x.new_zeros(heads, pairs + 1).scatter_add(1, index, x)[:, :pairs] for x in (product, square)]
    limit = math.exp(LIMIT) * (1 - 1e-6)
    factor = torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-300), 1.0)
    return factor.clamp(1 / limit, limit).log().to(gain.parameter.dtype)


def _check_shapes(query: Tensor, target: Tensor) -> None:
    if query.shape != target.shape:
        raise UserError(
            f'gain.start = "queries" needs students whose heads correspond to the teacher\'s; queries are '
            f'{tuple(query.shape)} and {tuple(target.shape)}. Use "one".'
        )
