"""A real model behind the reader protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from laid_eval.models.cost import peak_memory
from laid_eval.models.fork import ForkedText, Text, WholePrompts, why_not_forked
from laid_eval.models.frame import Branch, Frame, frame_of
from laid_eval.models.load import LoadedModel
from laid_eval.models.picture_frame import PictureFrame
from laid_eval.window.questions import Question
from laid_eval.window.readers import Asked


class ModelReader:
    """Reads with KV fan-out where the model allows it, with whole prompts where it does not."""

    def __init__(self, loaded: LoadedModel, longest: int, protocol: type[Text] | None = None) -> None:
        """Check how the model can be asked.

        Args:
            loaded: The model.
            longest: Longest context that will be read, tokens.
            protocol: How the text is held and asked, to compare; decided by trying by default.
        """
        reason = "asked for" if protocol else why_not_forked(loaded.model, longest)
        mode = f"whole prompts: {reason}" if reason else "forked"
        self.info = loaded.info.model_copy(update={"fan_out": mode})
        self.model = loaded.model
        self.frame = frame_of(loaded.tokenizer)
        self._protocol = protocol or (WholePrompts if reason else ForkedText)
        self._text = self._protocol(self.model)
        self._branch = branches_of(self.frame)

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` as a continuation of other text."""
        return self.frame.continuation(text)

    def opening(self, instruction: str) -> list[int]:
        """Chat frame and instruction."""
        return self.frame.opening(instruction)

    def question_tokens(self, question: Question) -> int:
        """Tokens of the question, the frame after it, the lead and the longest choice."""
        return self._branch(question).longest

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens of the pass over a fork, or of the whole prompts."""
        return self._text.pass_tokens(self._branch(question), read)

    def begin(self) -> None:
        """Drop the cache."""
        self._text = self._protocol(self.model)

    def read(self, tokens: Sequence[int]) -> None:
        """One chunk."""
        self._text.read(tokens)

    def ask(self, questions: Sequence[Asked]) -> list[list[float]]:
        """Log-probabilities of the choices, in one pass where forks are possible."""
        return self._text.ask([self._branch(asked.question) for asked in questions])

    def peak_memory_bytes(self) -> int | None:
        """Peak resident memory of the process, or of the accelerator's allocator."""
        return peak_memory(self.model.device)


def branches_of(frame: Frame | PictureFrame) -> Callable[[Question], Branch]:
    """Questions in tokens; each is made once."""

    @lru_cache(maxsize=1024)
    def branch(question: Question) -> Branch:
        return frame.branch(question.prompt, question.lead, question.choices)

    return branch
