"""The frame around a haystack of pictures: a chat template with its processor, in tokens.

opening:   <template before the pictures>
pictures:  each as the template and the processor write it, one after the other
question:  <template between pictures and words> question <template up to the assistant's words> lead
choice:    the answer, after a space where there is a lead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, ProcessorMixin

from laid_eval.errors import UserError
from laid_eval.models.frame import Branch, Frame, branch_of

_MARK = "@@QUESTION@@"
_OWN = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class Piece:
    """Pictures in tokens, with what the model's vision side is given for them."""

    ids: Tensor
    """(1, n)"""
    inputs: dict[str, Tensor]
    """`pixel_values` and whatever else the processor makes."""

    def within(self, before: Sequence[int], after: Sequence[int]) -> Piece:
        """The same pictures with words before and after them."""
        ids = torch.cat([torch.tensor([list(before)], dtype=torch.long), self.ids, torch.tensor([list(after)])], dim=1)
        inputs = {
            name: pad(value, (len(before), len(after))) if name.endswith("token_type_ids") else value
            for name, value in self.inputs.items()
        }
        return Piece(ids, inputs)

    def on(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """As the model takes it, on its device, pictures in its type."""
        inputs = {"input_ids": self.ids, **self.inputs}
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }


@dataclass(frozen=True)
class PictureFrame:
    """Tokenizes around pictures; all strings are the chat template's own text."""

    processor: ProcessorMixin
    before: str
    picture: str
    after: str
    """With the question's place marked."""

    @cached_property
    def words(self) -> Frame:
        """For text without pictures."""
        tokenizer: Any = self.processor.tokenizer
        return Frame(tokenizer, None, "")

    def opening(self) -> list[int]:
        """Tokens up to the first picture."""
        bos = self.words.tokenizer.bos_token
        start = [] if bos and self.before.startswith(str(bos)) else self.words.start()
        return [*start, *self._plain(self.before)]

    def piece(self, pictures: Sequence[Image]) -> Piece:
        """Pictures that follow each other, processed together."""
        text = self.picture * len(pictures)
        out = self.processor(text=[text], images=list(pictures), add_special_tokens=False, return_tensors="pt")
        inputs = {name: value for name, value in out.items() if name not in _OWN and isinstance(value, Tensor)}
        return Piece(out["input_ids"], inputs)

    def branch(self, prompt: str, lead: str, choices: Sequence[str]) -> Branch:
        """A question with its choices, tokenized as whole texts so that no boundary is forced."""
        stem = self.asking(prompt) + lead
        return branch_of([self._plain(f"{stem}{' ' if lead else ''}{choice}") for choice in choices])

    def stem(self, prompt: str) -> list[int]:
        """Tokens of a question up to where a free answer starts."""
        return self._plain(self.asking(prompt))

    def asking(self, prompt: str) -> str:
        """What stands between the pictures and the model's words: the template's own, around a question."""
        return self.after.replace(_MARK, prompt)

    def _plain(self, text: str) -> list[int]:
        return list(self.words.tokenizer(text, add_special_tokens=False).input_ids)


def picture_frame(name: str, processor: ProcessorMixin) -> PictureFrame:
    """The frame that a model was trained with.

    Raises:
        UserError: The model's processor takes no pictures, or its template does not put them one after the other.
    """
    if getattr(processor, "image_processor", None) is None:
        raise UserError(f"Model {name!r} takes no pictures. Use a text probe, or a vision-language model.")
    if not getattr(processor, "chat_template", None):
        raise UserError(f"Model {name!r} has no chat template that says how pictures and questions are put.")
    try:
        two, three = (_rendered(processor, count) for count in (2, 3))
    except Exception as error:  # whatever a template of another kind raises
        raise UserError(f"Model {name!r}: its chat template takes no pictures ({type(error).__name__}).") from None
    (first, _, after), (second, _, _) = (text.partition(_MARK) for text in (two, three))
    size = len(second) - len(first)
    for at in sorted(range(len(first)), key=lambda at: second[at] != "<"):
        unit = second[at : at + size]
        tail = second[at + 3 * size :]
        if size > 0 and second == second[:at] + 3 * unit + tail and first == second[:at] + 2 * unit + tail:
            return PictureFrame(processor, second[:at], unit, f"{tail}{_MARK}{after}")
    raise UserError(f"Model {name!r}: its chat template does not put one picture like the next; it can't be measured.")


def _rendered(processor: Any, count: int) -> str:
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": _MARK}]
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    )
