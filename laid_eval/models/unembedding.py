"""The last step of a model, from hidden states to logits, as the core takes it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from laid_eval.core import Unembedding
from laid_eval.errors import UserError

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOOSE = 0.25


def unembedding_of(model: PreTrainedModel) -> Unembedding:
    """Weight, bias, scale and softcap; the model's own tensors, so gradients go where the model's own would go.

    Raises:
        UserError: The model has no unembedding matrix.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        raise UserError(f"{type(model).__name__} has no unembedding matrix; it can't be distilled.")
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
    return Unembedding(weight, getattr(head, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_unembedding(model: PreTrainedModel) -> None:
    """Compare with the model's own logits on a short text.

    Raises:
        UserError: The model makes its logits in another way.
    """
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    own = model(ids, use_cache=False).logits[0].float()
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0]
    gap = float((own - unembedding_of(model).logits(hidden, own.shape[-1])).abs().max())
    if not gap <= _TOLERANCE.get(model.dtype, _LOOSE):
        raise UserError(
            f"{type(model).__name__} makes its logits in a way that is not known here (they differ by {gap:.2g}); "
            "it can't be distilled."
        )
