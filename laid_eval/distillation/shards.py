"""Weights that lie in shards on several processes (FSDP 2, as accelerate's configuration asks for it).

Gathering is done by all processes together, or it never ends: nothing here may be called by one of them alone.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from laid_eval.errors import UserError

_ROUNDED = (
    "{} would round gains, mixtures and the loss in shards to half precision. Use float32, or data parallelism without "
    "FSDP."
)


def sharding_asked() -> bool:
    """Accelerate's configuration asks for shards."""
    return _on("ACCELERATE_USE_FSDP")


def prepare_shards(precision: str) -> None:
    """See that accelerate's configuration, and a recipe's precision, ask for what training here can follow.

    Raises:
        UserError: They ask for another way.
    """
    if _on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("DeepSpeed is not supported. Use FSDP (fsdp_version: 2) in accelerate's configuration.")
    if not sharding_asked():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"FSDP version {version} is not supported. Set fsdp_version: 2 in accelerate's configuration.")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy != "TRANSFORMER_BASED_WRAP":
        raise UserError(f"FSDP's {policy} would tear tied weights apart. Use TRANSFORMER_BASED_WRAP.")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise UserError(_ROUNDED.format("mixed_precision in accelerate's configuration"))
    if _on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing would run layers anew out of our sight. Set it to false in accelerate's "
            "configuration, and training.checkpointing=true in the recipe."
        )
    if precision != "float32":
        raise UserError(_ROUNDED.format(f'training.precision = "{precision}"'))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process has the weights before they are cut up


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """What trains, by name, tied ones once; on the CPU."""
    return {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}


def fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Set a parameter, or this process's shard of it, to the values of all of it."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            there = values.to(parameter.device)
            parameter.copy_(distribute_tensor(there, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(values)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a sharded optimiser, whole, on the CPU, by names of parameters."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(module, optimizer, options=options)


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give a sharded optimiser its part of a state from `optimizer_state`."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
