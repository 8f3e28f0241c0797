"""A real model behind the protocol of `why_texts`: questions anywhere, tokens moved after they were read."""

from __future__ import annotations

from collections.abc import Sequence

from laid_eval.errors import UserError
from laid_eval.models.fork import ForkedText, why_not_moved
from laid_eval.models.frame import Branch
from laid_eval.models.rotary import rotaries
from laid_eval.window.model_reader import ModelReader
from laid_eval.window.questions import Question
from laid_eval.window.why_texts import Posed


class MovingReader:
    """Reads with KV fan-out, and moves what was read."""

    def __init__(self, reader: ModelReader, longest: int) -> None:
        """Take over a reader's model and frame; `longest` is the farthest position.

        Raises:
            UserError: The model can't be forked, or its positions can't be moved.
        """
        reason = None if reader.info.fan_out == "forked" else reader.info.fan_out
        if not reason:
            self._rotaries = rotaries(reader.model, longest)
            reason = why_not_moved(reader.model, self._rotaries)
        if reason:
            raise UserError(
                f"--why needs a model whose cache can be forked and whose positions can be moved; "
                f"{reader.info.name!r} can't: {reason}. Leave --why out."
            )
        reader.begin()  # its last text takes as much memory as one of ours
        self._reader = reader
        self._text = ForkedText(reader.model)

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` as a continuation of other text."""
        return self._reader.encode(text)

    def opening(self, instruction: str) -> list[int]:
        """Chat frame and instruction."""
        return self._reader.opening(instruction)

    def question_tokens(self, question: Question) -> int:
        """Tokens of the question, the frame after it, the lead and the longest choice."""
        return self._reader.question_tokens(question)

    def begin(self) -> None:
        """Drop the cache."""
        self._text = ForkedText(self._reader.model)

    def read(self, tokens: Sequence[int]) -> None:
        """One chunk."""
        self._text.read(tokens)

    def move(self, shifts: Sequence[float]) -> None:
        """Turn the keys of the cache."""
        self._text.move(shifts, self._rotaries)

    def pose(self, posed: Sequence[Posed]) -> list[list[float]]:
        """All in one pass."""
        after = self._text.length
        return self._text.ask(
            [self._branch(p) for p in posed],
            at=[after if p.at is None else p.at for p in posed],
            hidden=[p.hidden for p in posed] if any(p.hidden for p in posed) else None,
        )

    def _branch(self, posed: Posed) -> Branch:
        question = posed.asked.question
        return self._reader.frame.branch(question.prompt, question.lead, question.choices, posed.told)
