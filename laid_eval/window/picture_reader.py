"""A real vision-language model behind the protocol of readers that are shown pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL.Image import Image, new

from laid_eval.models.cost import peak_memory
from laid_eval.models.fork_pictures import ForkedPictures, Pictures, WholePictures, why_not_forked
from laid_eval.models.load import LoadedVision
from laid_eval.models.picture_frame import picture_frame
from laid_eval.window.model_reader import branches_of
from laid_eval.window.questions import Question
from laid_eval.window.readers import Asked, Extent


class ModelPictureReader:
    """Sees with KV fan-out where the model allows it, with whole prompts where it does not."""

    def __init__(
        self, loaded: LoadedVision, sample: Sequence[Image], longest: int, protocol: type[Pictures] | None = None
    ) -> None:
        """Check how the model can be asked.

        Args:
            loaded: The model.
            sample: A few pictures to try it on.
            longest: Longest context that will be read, tokens.
            protocol: How pictures are held and asked about, to compare; decided by trying by default.
        """
        self.model = loaded.model
        self.frame = picture_frame(loaded.info.name, loaded.processor)
        reason = "asked for" if protocol else why_not_forked(self.model, self.frame, sample, longest)
        self.info = loaded.info.model_copy(update={"fan_out": f"whole prompts: {reason}" if reason else "forked"})
        self._protocol = protocol or (WholePictures if reason else ForkedPictures)
        self._seen: Pictures = self._protocol(self.model, self.frame)
        self._branch = branches_of(self.frame)
        self._extents: dict[tuple[int, int], Extent] = {}

    def begin(self) -> None:
        """Forget everything seen."""
        self._seen = self._protocol(self.model, self.frame)

    def show(self, picture: Image) -> None:
        """One forward pass."""
        self._seen.show(picture)

    def ask(self, questions: Sequence[Asked]) -> list[list[float]]:
        """Log-probabilities of the choices, in one pass where forks are possible."""
        return self._seen.ask([self._branch(asked.question) for asked in questions])

    def say(self, asked: Asked, limit: int) -> str:
        """The model's own words, greedily."""
        stem = self.frame.stem(asked.question.prompt)
        said = self._seen.say(stem, limit, self._stops)
        return str(self.frame.words.tokenizer.decode(said, skip_special_tokens=True))

    @cached_property
    def _stops(self) -> set[int]:
        """Tokens that end an answer."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        words = self.frame.words.tokenizer.eos_token_id
        return {token for token in (*(own if isinstance(own, list) else [own]), words) if isinstance(token, int)}

    def opening_extent(self) -> Extent:
        """What comes before the first picture."""
        tokens = len(self.frame.opening())
        return Extent(tokens, tokens)

    def extent(self, width: int, height: int) -> Extent:
        """What a picture of so many pixels takes."""
        if (width, height) not in self._extents:
            trial, opening = WholePictures(self.model, self.frame), self.opening_extent()
            trial.show(new("RGB", (width, height)))
            self._extents[width, height] = Extent(trial.length - opening.tokens, trial.position - opening.positions)
        return self._extents[width, height]

    def question_tokens(self, question: Question) -> int:
        """Tokens of the question, the frame around it, the lead and the longest choice."""
        return self._branch(question).longest

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens of the pass over a fork, or of the whole prompts."""
        return self._seen.pass_tokens(self._branch(question), read)

    def peak_memory_bytes(self) -> int | None:
        """Peak resident memory of the process, or of the accelerator's allocator."""
        return peak_memory(self.model.device)
