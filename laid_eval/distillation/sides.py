"""Student and teacher before their weights are loaded: what can be refused without them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from laid_eval.distillation.samples import Sample, Samples
from laid_eval.errors import UserError
from laid_eval.models.frame import Frame, frame_of
from laid_eval.models.load import Described, describe, load_tokenizer
from laid_eval.models.source import resolve


@dataclass(frozen=True)
class Side:
    """One of the two models before its weights are loaded."""

    described: Described
    tokenizer: PreTrainedTokenizerBase
    frame: Frame

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """That of the model's own files."""
        own = getattr(self.described.config, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32


def find_side(
    name: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool, allow_pickle: bool
) -> Side:
    """Find a model and read its configuration and tokenizer. Arguments as for `distill`."""
    source = resolve(name, revision, allow_pickle, trust_remote_code)
    described = describe(source, dtype, device, None, trust_remote_code, allow_pickle)
    tokenizer = load_tokenizer(described)
    return Side(described, tokenizer, frame_of(tokenizer))


def shared_vocabulary(own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> int:
    """Tokens that mean the same in both, from the first.

    Raises:
        UserError: One means something else; names the first.
    """
    words = [{i: w for w, i in t.get_vocab().items()} for t in (own, theirs)]
    size = min(max(side) + 1 for side in words)
    for i in range(size):
        if words[0].get(i) != words[1].get(i):
            raise UserError(
                f"The tokenizers differ: token {i} is {words[0].get(i)!r} to the student and {words[1].get(i)!r} to "
                "the teacher. They must share a tokenizer, as models of one family do; with another teacher only the "
                "recipe `sft` can be used."
            )
    return size


def shared_tokens(own: Side, theirs: Side) -> int:
    """Tokens that both models can read and predict, from the first."""
    rows = [int(side.described.text_config.vocab_size) for side in (own, theirs)]
    return min(shared_vocabulary(own.tokenizer, theirs.tokenizer), *rows)


def readable(samples: Samples, vocabulary: int) -> Samples:
    """The same samples, refused where the teacher lacks a token."""

    def draw(number: int) -> Sample:
        sample = samples(number)
        if max(sample.tokens) >= vocabulary:
            raise UserError(
                f"Training text {sample.id!r} holds token {max(sample.tokens)}, which the teacher lacks (it has "
                f"{vocabulary:,}). Take that text out, or use a teacher with the student's tokens."
            )
        return sample

    return draw


def own_device(asked: str) -> str:
    """This process's accelerator where several share a machine.

    Raises:
        UserError: One was named that Trainer would not take.
    """
    if asked.startswith("cuda:") and asked != "cuda:0":
        index = asked.removeprefix("cuda:")
        raise UserError(f"Training runs on the first accelerator it sees: CUDA_VISIBLE_DEVICES={index} instead.")
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and asked in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(rank))
        return f"cuda:{rank}"
    return asked
