"""Served models behind the protocols that measure windows: the same questions as in process, as HTTP requests.

What is read is kept here and sent with every question; requests that follow each other share ever longer beginnings,
so the server's prefix cache does the work of the fan-out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from PIL.Image import Image, new

from laid_eval.errors import UserError
from laid_eval.models.fork_pictures import WholePictures
from laid_eval.models.frame import Branch, Frame
from laid_eval.models.picture_frame import PictureFrame
from laid_eval.records import ModelInfo
from laid_eval.serving.choices import (
    Place,
    ask_chat,
    ask_chat_reply,
    ask_echo,
    ask_reply,
    ask_tokens,
    named_choice,
    places,
    reply_limit,
    summed,
)
from laid_eval.serving.client import Client, Request
from laid_eval.serving.endpoint import Endpoint
from laid_eval.window.model_reader import branches_of
from laid_eval.window.questions import Question
from laid_eval.window.readers import Answer, Asked, Extent, Failure, Said

Way = Literal["tokens", "echo", "chat", "reply", "chat-reply"]
"""How choices are asked; see `choices`. The last two are generated replies, without and with messages."""
GENERATED: tuple[Way, ...] = ("reply", "chat-reply")


class ServedReader:
    """Reads text for a server."""

    def __init__(self, client: Client, info: ModelInfo, frame: Frame, way: Way) -> None:
        """Nothing is sent yet.

        Args:
            client: To the server.
            info: What is measured.
            frame: The model's own.
            way: How choices are asked.
        """
        self.info = info
        self._client, self._frame, self._way = client, frame, way
        self._branch = branches_of(frame)
        self._read: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` as a continuation of other text."""
        return self._frame.continuation(text)

    def opening(self, instruction: str) -> list[int]:
        """Chat frame and instruction."""
        return self._frame.opening(instruction)

    def question_tokens(self, question: Question) -> int:
        """Tokens of the question, the frame after it, the lead and the longest choice."""
        return self._branch(_posed(question, self._way)).longest

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens that the server does not find in its prefix cache, as far as can be known from here."""
        return _pass_tokens(self._branch(_posed(question, self._way)), read, self._way)

    def begin(self) -> None:
        """Forget everything read."""
        self._read = []

    def read(self, tokens: Sequence[int]) -> None:
        """Kept until something is asked."""
        self._read += tokens

    def ask(self, questions: Sequence[Asked]) -> list[Answer]:
        """All questions at once, as many requests under way as the client allows."""
        posed = [_posed(asked.question, self._way) for asked in questions]
        return _answers(self._client, self._way, posed, [self._requests(question) for question in posed], self._branch)

    def peak_memory_bytes(self) -> int | None:
        """The server's own business."""
        return None

    def _requests(self, question: Question) -> list[Request[Any]]:
        branch, endpoint = self._branch(question), self._client.endpoint
        prompt = [*self._read, *branch.stem]
        if self._way == "tokens":
            return [ask_tokens(endpoint, prompt, place) for place in places(branch)]
        if self._way == "echo":
            return [ask_echo(endpoint, prompt, ending) for ending in branch.endings]
        if self._way == "reply":
            return [ask_reply(endpoint, prompt, branch)]
        frame = self._frame
        told = self._decode(self._read).removeprefix(str(frame.before))
        asking = f"\n\nQuestion: {question.prompt}"
        content = f"{told}{asking}"
        if self._way == "chat-reply":
            return [ask_chat_reply(endpoint, content, len(prompt), reply_limit(branch))]
        before = f"{asking}{frame.after}"
        return _asked_in_chat(endpoint, content, frame, branch, before, len(prompt))

    def _decode(self, tokens: Sequence[int]) -> str:
        return _decoded(self._frame, tokens)


class ServedPictureReader:
    """Sees pictures for a server."""

    def __init__(self, client: Client, info: ModelInfo, frame: PictureFrame, model: Any, way: Way) -> None:
        """Nothing is sent yet.

        Args:
            client: To the server.
            info: What is measured.
            frame: The model's own.
            model: The model without memory for its weights: it knows what positions pictures take.
            way: `chat` or `chat-reply`.
        """
        self.info = info
        self._client, self._frame, self._model, self._way = client, frame, model, way
        self._branch = branches_of(frame)
        self._shown: list[dict[str, Any]] = []
        self._tokens = len(frame.opening())
        self._extents: dict[tuple[int, int], Extent] = {}

    def begin(self) -> None:
        """Forget everything seen."""
        self._shown = []
        self._tokens = len(self._frame.opening())

    def show(self, picture: Image) -> None:
        """Kept, losslessly, until something is asked."""
        file = io.BytesIO()
        picture.save(file, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        self._shown.append({"type": "image_url", "image_url": {"url": url}})
        self._tokens += self.extent(*picture.size).tokens

    def opening_extent(self) -> Extent:
        """What comes before the first picture."""
        tokens = len(self._frame.opening())
        return Extent(tokens, tokens)

    def extent(self, width: int, height: int) -> Extent:
        """What a picture of so many pixels takes."""
        if (width, height) not in self._extents:
            trial, opening = WholePictures(self._model, self._frame), self.opening_extent()
            trial.show(new("RGB", (width, height)))
            self._extents[width, height] = Extent(trial.length - opening.tokens, trial.position - opening.positions)
        return self._extents[width, height]

    def question_tokens(self, question: Question) -> int:
        """Tokens of the question, the frame around it, the lead and the longest choice."""
        return self._branch(_posed(question, self._way)).longest

    def pass_tokens(self, question: Question, read: int) -> int:
        """Tokens that the server does not find in its prefix cache, as far as can be known from here."""
        return _pass_tokens(self._branch(_posed(question, self._way)), read, self._way)

    def ask(self, questions: Sequence[Asked]) -> list[Answer]:
        """All questions at once, as many requests under way as the client allows."""
        posed = [_posed(asked.question, self._way) for asked in questions]
        return _answers(self._client, self._way, posed, [self._requests(question) for question in posed], self._branch)

    def say(self, asked: Asked, limit: int) -> str:
        """The model's own words.

        Raises:
            UserError: The server gave none.
        """
        content = [*self._shown, {"type": "text", "text": asked.question.prompt}]
        tokens = self._tokens + len(self._frame.stem(asked.question.prompt))
        reply = self._client.run(ask_chat_reply(self._client.endpoint, content, tokens, limit))
        if isinstance(reply, Failure):
            raise UserError(f"The server at {self._client.endpoint.base_url} gave no answer: {reply.reason}.")
        return reply

    def peak_memory_bytes(self) -> int | None:
        """The server's own business."""
        return None

    def _requests(self, question: Question) -> list[Request[Any]]:
        branch, endpoint, words = self._branch(question), self._client.endpoint, self._frame.words
        content = [*self._shown, {"type": "text", "text": question.prompt}]
        if self._way == "chat-reply":
            return [ask_chat_reply(endpoint, content, self._tokens + len(branch.stem), reply_limit(branch))]
        before = self._frame.asking(question.prompt)
        return _asked_in_chat(endpoint, content, words, branch, before, self._tokens + len(branch.stem))


def _asked_in_chat(
    endpoint: Endpoint, content: Any, frame: Frame, branch: Branch, before: str, tokens: int
) -> list[Request[Any]]:
    """A request a place; the assistant has said what the stem and the given tokens say after `before`."""
    return [
        ask_chat(
            endpoint,
            content,
            _decoded(frame, [*branch.stem, *place.given]).removeprefix(before),  # at once: tokens carry their spaces
            tokens + len(place.given),
            place,
        )
        for place in places(branch)
    ]


def _answers(
    client: Client, way: Way, posed: Sequence[Question], requests: Sequence[list[Request[Any]]], branch: Any
) -> list[Answer]:
    """Send everything and take it apart again, question by question."""
    results = iter(client.run_all([request for own in requests for request in own]))
    answers: list[Answer] = []
    for question, own in zip(posed, requests, strict=True):
        got = [next(results) for _ in own]
        failure = next((result for result in got if isinstance(result, Failure)), None)
        answers.append(failure or _answer(way, question, branch(question), got))
    return answers


def _answer(way: Way, question: Question, branch: Branch, got: list[Any]) -> Answer:
    if way in GENERATED:
        return Said(named_choice(cast(str, got[0]), question.choices))
    if way == "echo":
        return cast("list[float]", got)
    asked: list[Place] = places(branch)
    return summed(branch, {place.given: logs for place, logs in zip(asked, got, strict=True)})


def _posed(question: Question, way: Way) -> Question:
    """The question as it is put: where the model speaks freely, the choices are named."""
    if way not in GENERATED:
        return question
    return replace(question, prompt=f"{question.prompt} Choose one of: {', '.join(question.choices)}.")


def _pass_tokens(branch: Branch, read: int, way: Way) -> int:
    if way == "echo":
        return sum(read + len(branch.stem) + len(ending) for ending in branch.endings)
    if way in GENERATED:
        return branch.longest
    return sum(len(branch.stem) + len(place.given) for place in places(branch))


def _decoded(frame: Frame, tokens: Sequence[int]) -> str:
    text = frame.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
