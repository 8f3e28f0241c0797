"""Student and teacher before their weights are loaded: what can be refused without them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from laid_eval.distillation.recipe import Data
from laid_eval.errors import UserError
from laid_eval.models.frame import Frame, frame_of
from laid_eval.models.load import (
    Described,
    LoadedModel,
    LoadedVision,
    describe,
    load,
    load_processor,
    load_tokenizer,
    load_vision,
    takes_pictures,
)
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.source import resolve


@dataclass(frozen=True)
class Side:
    """One of the two models before its weights are loaded."""

    described: Described
    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    processor: ProcessorMixin | None = None
    """Of a model that is shown pictures."""

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """That of the model's own files."""
        own = getattr(self.described.config, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32


def find_side(
    role: str,
    name: str,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    allow_pickle: bool,
    data: Data,
) -> Side:
    """Find a model and read its configuration and tokenizer, or processor where `data` shows pictures.

    Raises:
        UserError: There is none, or it sees and the data are text, or the reverse. `role` says whose it is.
    """
    source = resolve(name, revision, allow_pickle, trust_remote_code)
    described = describe(source, dtype, device, None, trust_remote_code, allow_pickle)
    sees, kind = takes_pictures(described), described.config.model_type
    if data.images is None:
        if sees:
            raise UserError(
                f"The {role} {name!r} ({kind}) takes pictures, training data {data.source!r} shows none. Set "
                "data.source to a visual probe and data.images to numbers of pictures: --set data.source=visual-which "
                "--set 'data.images=[2, 20]'."
            )
        tokenizer = load_tokenizer(described)
        return Side(described, tokenizer, frame_of(tokenizer))
    if not sees:
        raise UserError(
            f"The {role} {name!r} ({kind}) takes no pictures, training data {data.source!r} shows some. Use a "
            "vision-language model, or text (data.source, without data.images)."
        )
    processor = load_processor(described)
    return Side(described, processor.tokenizer, picture_frame(name, processor).words, processor)


def load_side(side: Side) -> LoadedModel | LoadedVision:
    """Load a side's weights. Raises as `load` and `load_vision`."""
    if side.processor is not None:
        return load_vision(side.described, side.processor)
    return load(side.described, side.tokenizer)


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
