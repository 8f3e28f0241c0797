"""What of a student trains: all weights, an adapter, or gains alone; and its vision side, or not."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from laid_eval.distillation.recipe import Recipe
from laid_eval.models.gained import gains_of


def set_trainable(model: PreTrainedModel, recipe: Recipe) -> None:
    """Say which weights get gradients; gains, which come later, have theirs."""
    model.requires_grad_(recipe.training.weights == "all")
    if _vision_frozen(recipe):
        parts = (model.get_decoder(), model.get_output_embeddings())
        language = {id(p) for part in parts for p in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in language:
                parameter.requires_grad_(False)


def add_adapter(model: PreTrainedModel, recipe: Recipe, seed: int) -> Any:
    """LoRA on every linear layer but the unembedding, a frozen vision side's aside; changed in place."""
    from peft import LoraConfig, get_peft_model

    rank = recipe.training.lora_rank
    gains = [p for gain in gains_of(model).values() for p in gain.parameters()]
    where: str | list[str] = "all-linear"
    if _vision_frozen(recipe):
        decoder = {id(module) for module in model.get_decoder().modules()}
        where = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in decoder]
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)  # of its random start
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of names that transformers is giving up
        adapter = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=where))
    for parameter in gains:  # peft freezes all that is not its own
        parameter.requires_grad_(True)
    return adapter


def _vision_frozen(recipe: Recipe) -> bool:
    return recipe.data.images is not None and recipe.training.vision == "frozen"
