"""KV fan-out over pictures: each is read once, and questions fork from what was seen so far.

As in `fork`, with two additions. A picture's tokens come with what the vision side needs, in one forward pass a
picture. And positions are the model's own: where it counts a picture by its longer side (M-RoPE), they are computed
for the picture alone, as the model does, and moved to where it stands; what follows goes on from the largest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.models.fork import FAILURES, ForkedText, why_different, why_rope_changes
from laid_eval.models.frame import Branch
from laid_eval.models.picture_frame import PictureFrame, Piece


class Pictures(Protocol):
    """Pictures seen so far, and how they are asked about."""

    @property
    def length(self) -> int:
        """Tokens read."""
        ...

    @property
    def position(self) -> int:
        """RoPE position of what comes next."""
        ...

    def __init__(self, model: PreTrainedModel, frame: PictureFrame) -> None:
        """Start with the frame's opening."""

    def show(self, picture: Image) -> None:
        """See one more."""

    def ask(self, branches: Sequence[Branch]) -> list[list[float]]:
        """Summed log-probability of every choice of every branch; what was seen stays as it was."""
        ...

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """Tokens that go through the model to ask a branch when `read` tokens were read."""
        ...


class ForkedPictures(ForkedText):
    """Pictures seen so far, as a key-value cache that questions fork from."""

    def __init__(self, model: PreTrainedModel, frame: PictureFrame) -> None:
        """Start with the frame's opening."""
        super().__init__(model)
        self.frame = frame
        opening = frame.opening()
        if opening:
            self._read(Piece(torch.tensor([opening]), {}))

    def show(self, picture: Image) -> None:
        """See one more; one forward pass."""
        self._read(self.frame.piece([picture]))

    @torch.inference_mode()
    def _read(self, piece: Piece) -> None:
        positions = picture_positions(self.model, piece)
        inputs = _on(self.model, piece)
        if positions is not None:
            positions = positions + self.position
            inputs["position_ids"] = positions.to(self.model.device)
        self.model(past_key_values=self._cache, use_cache=True, logits_to_keep=1, **inputs)
        self.length += piece.ids.shape[1]
        self.position = self.length if positions is None else int(positions.max()) + 1


class WholePictures:
    """The same, asked with a whole prompt per question: the slow way that every model can go."""

    def __init__(self, model: PreTrainedModel, frame: PictureFrame) -> None:
        """Nothing is computed before a question comes."""
        self.model, self.frame = model, frame
        self._pictures: list[Image] = []
        # Of all pictures; `None` where it is to be made.
        self._piece: Piece | None = Piece(torch.zeros(1, 0, dtype=torch.long), {})
        self._opening = frame.opening()

    @property
    def length(self) -> int:
        """Tokens of the opening and of all pictures."""
        return len(self._opening) + self._shown().ids.shape[1]

    @property
    def position(self) -> int:
        """RoPE position of what comes next."""
        positions = picture_positions(self.model, self._shown()) if self._pictures else None
        return self.length if positions is None else len(self._opening) + int(positions.max()) + 1

    def show(self, picture: Image) -> None:
        """Remember it."""
        self._pictures.append(picture)
        self._piece = None

    @torch.inference_mode()
    def ask(self, branches: Sequence[Branch]) -> list[list[float]]:
        """Summed log-probability of every choice of every branch."""
        return [self._ask(branch) for branch in branches]

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """The whole prompt, again for every choice that starts otherwise (its last token is only predicted)."""
        return sum(read + len(branch.stem) + len(given) for given in {ending[:-1] for ending in branch.endings})

    def _ask(self, branch: Branch) -> list[float]:
        logs = {given: self._logs([*branch.stem, *given], len(given) + 1) for given in {e[:-1] for e in branch.endings}}
        return [
            float(sum(logs[ending[:-1]][row, token] for row, token in enumerate(ending))) for ending in branch.endings
        ]

    def _logs(self, asked: list[int], kept: int) -> Tensor:
        """(kept, V) log-probabilities after the last tokens of the whole prompt."""
        shown = self._shown()
        ids = torch.cat([torch.tensor([self._opening], dtype=torch.long), shown.ids, torch.tensor([asked])], dim=1)
        inputs = dict(shown.inputs)
        for name, value in inputs.items():
            if name.endswith("token_type_ids"):
                inputs[name] = torch.nn.functional.pad(value, (len(self._opening), len(asked)))
        out = self.model(use_cache=False, logits_to_keep=kept, **_on(self.model, Piece(ids, inputs)))
        return torch.log_softmax(out.logits[0, -kept:].float(), dim=-1)

    def _shown(self) -> Piece:
        """All pictures as the processor makes them together, made once."""
        if self._piece is None:
            self._piece = self.frame.piece(self._pictures)
        return self._piece


def _on(model: PreTrainedModel, piece: Piece) -> dict[str, Tensor]:
    """A piece as the model takes it, on its device, pictures in its type."""
    inputs = {"input_ids": piece.ids, **piece.inputs}
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def picture_positions(model: PreTrainedModel, piece: Piece) -> Tensor | None:
    """(axes, 1, n) positions of a piece that stands at the start; `None` where they are its slots.

    Needs the model's configuration alone, no weights.
    """
    find = getattr(model.base_model, "get_rope_index", None)
    if find is None:
        return None
    if "mm_token_type_ids" not in piece.inputs:
        return torch.arange(piece.ids.shape[1]).expand(3, 1, -1)
    names = set(inspect.signature(find).parameters)
    inputs = {"input_ids": piece.ids, **{n: v for n, v in piece.inputs.items() if n in names}}
    positions: Tensor = find(**inputs)[0]
    return positions


def why_not_forked(model: PreTrainedModel, frame: PictureFrame, pictures: Sequence[Image], longest: int) -> str | None:
    """The reason why a model must be asked with whole prompts; `None` where forks equal them.

    Decided by trying: three pictures, read one by one and asked about, against their whole prompt (and by what they
    can't show: rotary embeddings that change with the length, `longest` tokens; pictures that see later tokens of
    themselves, where half precision would hide it).
    """
    reason = why_rope_changes(model, longest)
    if reason:
        return reason
    apart = [frame.piece([picture]) for picture in pictures]
    together = frame.piece(pictures)
    ids = torch.cat([piece.ids for piece in apart], dim=1)
    if ids.shape != together.ids.shape or not torch.equal(ids, together.ids):
        return "its processor writes several pictures otherwise than one by one"
    if "token_type_ids" in together.inputs and model.dtype not in (torch.float32, torch.float64):
        return "its pictures see later tokens of themselves"
    some = together.ids[0, :2].tolist()
    words = [*frame.words.continuation(" a b c d e"), *some][:6]
    branches = [
        Branch(tuple(words[:2]), ((words[2],), (words[3], words[1], words[0]))),
        Branch(tuple(words[:3]), ((words[0], words[2]), (words[1],))),
    ]
    whole = WholePictures(model, frame)
    try:
        forked = ForkedPictures(model, frame)
        for picture in pictures:
            forked.show(picture)
            whole.show(picture)
        forked.ask(branches)
        found = forked.ask(branches)
    except FAILURES as error:
        return f"its cache can't be forked ({type(error).__name__})"
    return why_different(model, found, whole.ask(branches))
