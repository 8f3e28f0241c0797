"""From a server's URL to a reader of the model behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from laid_eval.errors import UserError
from laid_eval.models.cost import empty_model
from laid_eval.models.frame import Frame, frame_of
from laid_eval.models.load import Described, describe, load_processor, load_tokenizer, takes_pictures
from laid_eval.models.picture_frame import picture_frame
from laid_eval.models.source import Source, quiet, resolve
from laid_eval.records import ModelInfo
from laid_eval.serving.choices import ask_chat, ask_echo, ask_tokens, places
from laid_eval.serving.client import Client, Request, find_served
from laid_eval.serving.endpoint import Endpoint
from laid_eval.serving.readers import ServedPictureReader, ServedReader, Way
from laid_eval.window.readers import Failure

Api = Literal["auto", "tokens", "completions", "chat"]
Answers = Literal["logprobs", "generate"]
SHARED = "shared prefixes"
_WHOLE = "whole prompts: vLLM does not read its prefix cache for echoed log-probabilities"
_WAYS: dict[str, Way] = {"tokens": "tokens", "completions": "echo", "chat": "chat"}


def find_endpoint(base_url: str, model: str, tokenizer: str | None) -> Endpoint:
    """What a running server says of a model.

    Args:
        base_url: With the version: `http://127.0.0.1:8000/v1`.
        model: Name under which it is served.
        tokenizer: Folder or Hub id. Default: the checkpoint that the server names, else `model`.

    Raises:
        UserError: No such server or model.
    """
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url {base_url!r} is no URL; for example: http://127.0.0.1:8000/v1")
    base_url = base_url.rstrip("/")
    client = Client(Endpoint(base_url, model, "", None), retries=1)
    try:
        record = find_served(client, model)
    finally:
        client.close()
    root = record.get("root")
    return Endpoint(base_url, model, tokenizer or root or model, record.get("max_model_len"))


def connect(
    client: Client, pictures: bool, api: Api = "auto", answers: Answers = "logprobs", known: ModelInfo | None = None
) -> ServedReader | ServedPictureReader:
    """A reader of the served model.

    Args:
        client: To the server.
        pictures: Whether it is to be shown pictures.
        api: `tokens`, `completions` or `chat`; `auto`: the fastest that the server has.
        answers: `logprobs` of the choices, or `generate`d replies.
        known: What is served, where the server is ours.

    Raises:
        UserError: The server can't do what is asked; its tokenizer can't be had.
    """
    described = _described(str(client.endpoint.tokenizer))
    if pictures:
        return _picture_reader(client, described, api, answers, known)
    frame = _text_frame(client.endpoint, described)
    way, fan_out = _way(client, frame, api, answers)
    return ServedReader(client, _info(client, way, fan_out, known), frame, way)


def _picture_reader(
    client: Client, described: Described | None, api: Api, answers: Answers, known: ModelInfo | None
) -> ServedPictureReader:
    name = client.endpoint.model
    if described is None or not takes_pictures(described):
        raise UserError(
            f"Model {name!r} takes no pictures, as far as its tokenizer's folder '{client.endpoint.tokenizer}' tells. "
            "Use a text probe, or give the checkpoint of the vision-language model: --tokenizer."
        )
    if api not in ("auto", "chat"):
        raise UserError(f"--api {api} sends no pictures; they go into messages: --api chat.")
    way: Way = "chat-reply" if answers == "generate" else "chat"
    frame = picture_frame(name, load_processor(described))
    return ServedPictureReader(client, _info(client, way, SHARED, known), frame, empty_model(described), way)


def _described(where: str) -> Described | None:
    """The checkpoint beside the tokenizer; `None` where the place holds a tokenizer alone."""
    folder = Path(where)
    if folder.is_dir() and not (folder / "config.json").exists():
        return None
    if not folder.is_dir() and "/" in where:  # a Hub id: its configuration, not its weights
        try:
            return describe(Source(where, Path(where), f"Hub {where}", ""))
        except UserError:
            return None
    return describe(resolve(where))


def _text_frame(endpoint: Endpoint, described: Described | None) -> Frame:
    if described is not None:
        return frame_of(load_tokenizer(described))
    try:
        with quiet():
            return frame_of(AutoTokenizer.from_pretrained(str(endpoint.tokenizer), trust_remote_code=False))
    except Exception as error:  # whatever a broken or missing tokenizer makes the library raise
        raise UserError(
            f"No tokenizer for {endpoint.model!r} at '{endpoint.tokenizer}' ({type(error).__name__}). Lengths are "
            "counted in its tokens: give its folder or Hub id, --tokenizer."
        ) from None


def _way(client: Client, frame: Frame, api: Api, answers: Answers) -> tuple[Way, str]:
    """How this server can be asked, found out by asking, and what it reads for it (`ModelInfo.fan_out`)."""
    if answers == "generate":
        return ("chat-reply" if api == "chat" else "reply"), SHARED
    endpoint = client.endpoint
    branch = frame.branch("Which?", "It is", ["one", "two"])
    place = places(branch)[0]
    if api == "chat" and frame.before is None:
        raise UserError(f"Model {endpoint.model!r} has no chat template; ask it with --api completions.")
    ways: list[tuple[Way, Request[Any]]] = [("tokens", ask_tokens(endpoint, branch.stem, place))]
    if frame.before is not None:
        ways.append(("chat", ask_chat(endpoint, "Which?", "It is", None, place)))
    ways.append(("echo", ask_echo(endpoint, branch.stem, branch.endings[0])))
    reasons = []
    for way, request in ways:
        if api == "auto" or way == _WAYS[api]:
            reason = _refusal(client, request)
            if reason is None:
                return way, _WHOLE if way == "echo" else SHARED
            reasons.append(f"{way}: {reason}")
    raise UserError(
        f"The server at {endpoint.base_url} gives no log-probabilities of choices ({'; '.join(reasons)}). Start vLLM "
        "with --enable-scale-out, or score what it says: --answers generate (with --api chat where it only takes "
        "messages)."
    )


def _refusal(client: Client, request: Request[Any]) -> str | None:
    """Why a trial request gave no answer; `None`: it did."""
    try:
        answer = client.run(request)
    except UserError as error:
        return str(error)
    return answer.reason if isinstance(answer, Failure) else None


def _info(client: Client, way: Way, fan_out: str, known: ModelInfo | None) -> ModelInfo:
    """Of a server that is not ours little is known: it need not hold the checkpoint beside its tokenizer."""
    endpoint = client.endpoint
    info = known or ModelInfo(name=endpoint.model, source="server", claimed_length=endpoint.max_length)
    return info.model_copy(update={"fan_out": fan_out, "server": f"{_version(client)}, {way}"})


def _version(client: Client) -> str:
    """VLLM tells its own; others are told by their interface."""
    response = client.get(f"{client.endpoint.root}/version")
    try:
        return f"vllm {response.json()['version']}"
    except (KeyError, TypeError, ValueError):
        return "OpenAI-compatible server"
