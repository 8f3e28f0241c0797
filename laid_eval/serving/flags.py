"""The command line of a vLLM server that holds one of our models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laid_eval.models.cost import Shape, free_memory, shape_of
from laid_eval.models.load import Described

_GIB = 1024**3
_LONGEST_AT_ONCE = 4  # contexts of full length that the cache holds on a CPU


@dataclass(frozen=True)
class Pictures:
    """What the server is to be ready for."""

    count: int
    width: int
    height: int


def vllm_flags(
    described: Described, length: int, name: str, host: str, port: int, pictures: Pictures | None, more: Sequence[str]
) -> list[str]:
    """Flags for `vllm serve`; `more` are the user's own and win, standing last.

    Lengths, type and rope scaling are those of a measurement in process. Without sizes vLLM reserves room for
    pictures of 16,384 tokens each (vllm-project/vllm#18550).
    """
    flags = [
        *("--model", str(described.source.folder), "--served-model-name", name),
        *("--host", host, "--port", str(port)),
        "--enable-scale-out",  # token ids in, wanted log-probabilities out
        *("--max-model-len", str(length), "--dtype", str(described.dtype).removeprefix("torch.")),
    ]
    if described.trust_remote_code:
        flags.append("--trust-remote-code")
    if described.rope_scaling:
        flags += ["--hf-overrides", json.dumps(_rope_overrides(described))]
    if pictures:
        image = {"count": pictures.count, "width": pictures.width, "height": pictures.height}
        flags += ["--limit-mm-per-prompt", json.dumps({"image": image, "video": 0})]
    if described.device.type == "cpu":
        flags += ["--gpu-memory-utilization", "0.3"]  # of memory that other programs use too
    return [*flags, *more]


def _rope_overrides(described: Described) -> dict[str, Any]:
    """The whole of the rope parameters: at the top level vLLM replaces them, inside a text configuration it merges."""
    text = described.text_config
    own = {"rope_parameters": dict(text.rope_parameters), "max_position_embeddings": text.max_position_embeddings}
    return own if text is described.config else {"text_config": own}


def vllm_variables(described: Described, length: int) -> dict[str, str]:
    """Environment variables: on a CPU, gigabytes for the cache of keys and values."""
    if described.device.type != "cpu":
        return {}
    shape: Shape = shape_of(described)
    wanted = _LONGEST_AT_ONCE * length * shape.cache_bytes_per_token
    room = free_memory(described.device) // 4
    return {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(min(wanted, room) / _GIB)))}
