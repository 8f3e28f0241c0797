"""What a measurement will take, told before the weights are loaded: memory, tokens, minutes."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from laid_eval.errors import UserError
from laid_eval.models.load import Described, load_failure, takes_pictures
from laid_eval.models.source import quiet

_GIB = 1024**3
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide its cost."""

    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    itemsize: int

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of all layers (every layer is kept whole, sliding ones too)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    def seconds(self, length: int, chunk: int, rate: Rate) -> float:
        """Time to read a text of `length` tokens."""
        linear = 2.0 * (self.parameters - self.hidden * self.vocabulary) * length
        attention = 2.0 * self.layers * self.heads * self.head_dim * length * (length + chunk)
        return linear / rate.linear + attention / rate.attention


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second of this device."""

    linear: float
    attention: float


def empty_model(described: Described) -> PreTrainedModel:
    """The model without memory for its weights.

    Raises:
        UserError: The configuration describes no causal language model of the library.
    """
    try:
        with torch.device("meta"), quiet():
            maker: Any = AutoModelForImageTextToText if takes_pictures(described) else AutoModelForCausalLM
            model: PreTrainedModel = maker.from_config(described.config, trust_remote_code=described.trust_remote_code)
    except Exception as error:  # a configuration that describes no causal language model of the library
        raise UserError(load_failure(described.source, error)) from None
    return model


def shape_of(described: Described) -> Shape:
    """Sizes from the configuration; parameters counted on a model without memory. Raises as `empty_model`."""
    text = described.text_config
    model = empty_model(described)
    heads = getattr(text, "num_attention_heads", 1)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=described.dtype.itemsize,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU within the container's limit too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # File pages that nobody uses are counted as used, but go when memory is needed.
    return free if limit == "max" else min(free, int(limit) - used + int(stat.get("inactive_file", 0)))


def peak_memory(device: torch.device) -> int:
    """Bytes: most resident memory of this process so far, or most taken from an accelerator's allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():  # on Linux ru_maxrss starts at what the process that started this one had taken
        return int(_STATUS.read_text().partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def needed_memory(shape: Shape, length: int, chunk: int) -> int:
    """Bytes for weights, cache, one layer's copies of it and the work of one chunk."""
    weights = shape.parameters * shape.itemsize
    cache = shape.cache_bytes_per_token * length
    copies = 2 * shape.heads * shape.head_dim * shape.itemsize * length * 2
    mask = chunk * length * (1 + shape.itemsize)
    work = chunk * (shape.hidden * 16 + shape.vocabulary // 4) * 4
    return int(weights + cache + copies + mask + work)


def check_memory(described: Described, shape: Shape, length: int, chunk: int, each: int = 1) -> None:
    """Refuse a length of so many tokens before anything is allocated; a unit of `--max-length` takes `each`.

    Raises:
        UserError: More is needed than is free; names the longest length that fits.
    """
    free = free_memory(described.device)
    needed = needed_memory(shape, length, chunk)
    if needed <= free:
        return
    least = needed_memory(shape, 0, chunk)
    per_token = (needed - least) / length
    fits = int((free - least) / per_token)
    room = (
        f"The most that fits is about {fits:,} tokens: --max-length {fits // each if each > 1 else fits // 256 * 256}."
        if fits >= 512
        else "The weights alone are too large: take a smaller model or --dtype bfloat16."
    )
    raise UserError(
        f"A context of {length:,} tokens of {described.source.name!r} needs about {needed / _GIB:.1f} GiB; "
        f"{free / _GIB:.1f} GiB are free on {described.device}. {room}"
    )


def speed_test(described: Described, shape: Shape, seconds: float = 2.0) -> Rate:
    """Time the two kinds of work a prefill consists of, half of `seconds` each."""
    device, dtype = described.device, described.dtype
    x = torch.randn(512, shape.hidden, device=device, dtype=dtype)
    w = torch.randn(shape.hidden * 3, shape.hidden, device=device, dtype=dtype)
    q = torch.randn(1, shape.heads, 512, shape.head_dim, device=device, dtype=dtype)
    k = torch.randn(1, shape.heads, 2048, shape.head_dim, device=device, dtype=dtype)
    mask = torch.ones(1, 1, 512, 2048, device=device, dtype=torch.bool)

    def rate(flops: float, work: object) -> float:
        assert callable(work)
        work()
        count, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds / 2:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += 1
        return flops * count / spent

    with torch.inference_mode():
        linear = rate(2.0 * 512 * shape.hidden * shape.hidden * 3, lambda: F.linear(x, w))
        attention = rate(
            4.0 * shape.heads * 512 * 2048 * shape.head_dim,
            lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask),
        )
    return Rate(linear, attention)
