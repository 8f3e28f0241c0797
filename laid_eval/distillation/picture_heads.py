"""Which heads of a model that sees retrieve: how much they look at the picture that has the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from laid_eval.distillation.batches import batch_of
from laid_eval.distillation.recipe import Matching
from laid_eval.distillation.samples import Sample
from laid_eval.distillation.student import read, view_of
from laid_eval.models.gained import gainable


@torch.no_grad()
def picture_retrieval(model: PreTrainedModel, haystacks: Sequence[Sample]) -> NDArray[np.float64]:
    """(L, H) attention on the picture that tells an answer, from the rows that say it: mean over rows and haystacks.

    The answer is given, not generated, so the score does not depend on the model being right. NaN where a layer has
    no attention.
    """
    gainable(model)
    config = model.config.get_text_config(decoder=True)
    layers, count = int(config.num_hidden_layers), int(config.num_attention_heads)
    total = torch.zeros(layers, count, dtype=torch.float64)
    for sample in haystacks:
        assert sample.shown is not None, "haystacks of pictures"
        batch = batch_of(sample, model.device)
        rows = torch.tensor(sample.labels, device=model.device) - 1
        view = view_of(Matching(), batch, 0, rows, len(sample.tokens))
        needle = torch.tensor(sample.shown.needles, device=model.device)
        there = torch.as_tensor(sample.shown.places, device=model.device) == needle[:, None]  # (rows, N)
        _, seen = read(model, batch, range(layers))
        for layer in range(layers):
            if layer not in seen:
                total[layer] = torch.nan
                continue
            logits = seen[layer].heads(0, rows).widened().logits(slice(None))
            attention = logits.masked_fill(~view.seen[:, None], -torch.inf).softmax(dim=-1)
            total[layer] += (attention * there[:, None]).sum(dim=-1).mean(dim=0).double().cpu() / len(haystacks)
    return total.numpy()
