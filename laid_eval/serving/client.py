"""Requests to a server: bounded in number, tried again where that can help, and checked for what was really read.

A request ends in one of three ways: an answer; a `Failure`, which fails one trial and is never a wrong answer; or an
error that ends the run, because every other request would meet it too (the server is gone, or reads something else
than what was sent).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import MaxRetryError, ReadTimeoutError, ResponseError
from urllib3.util import Retry

from laid_eval.errors import UserError, nearest
from laid_eval.serving.endpoint import Endpoint
from laid_eval.window.readers import Failure

KEY = "OPENAI_API_KEY"
"""The environment's variable; it goes into the requests' header and nowhere else."""
CONCURRENCY = 8
TIMEOUT = 600.0
"""Seconds for one answer."""
RETRIES = 4
_BUSY = (408, 429, 500, 502, 503, 504)
"""Asked again; what takes too long is not: the server may still be at it."""
_LONGEST_PAUSE = 60  # seconds that a server may ask for

T = TypeVar("T")


@dataclass(frozen=True)
class Request(Generic[T]):
    """One question to a server."""

    url: str
    body: dict[str, Any]
    tokens: int | None
    """That the server must have read; `None`: can't be said before."""
    parse: Callable[[dict[str, Any]], T]
    """Takes the answer apart; raises KeyError, IndexError, TypeError or ValueError where it is none."""
    slack: int = 0
    """So many more or fewer tokens are no mismatch: where a server may add its own words around a message."""


class Client:
    """Sends requests to one server."""

    def __init__(
        self, endpoint: Endpoint, concurrency: int = CONCURRENCY, timeout: float = TIMEOUT, retries: int = RETRIES
    ) -> None:
        """Nothing is sent yet.

        Args:
            endpoint: The server.
            concurrency: Requests under way at once.
            timeout: Seconds for one answer.
            retries: Of a request that met a busy or broken server, with growing pauses.
        """
        self.endpoint, self.timeout = endpoint, timeout
        self._pool = ThreadPoolExecutor(concurrency)
        self._session = requests.Session()
        again = Retry(
            total=retries, read=0, backoff_factor=0.5, backoff_max=30, status_forcelist=_BUSY, allowed_methods=None,
            raise_on_status=False, retry_after_max=_LONGEST_PAUSE,
        )  # fmt: skip
        self._session.mount("http://", HTTPAdapter(max_retries=again, pool_maxsize=concurrency))
        self._session.mount("https://", HTTPAdapter(max_retries=again, pool_maxsize=concurrency))
        if os.environ.get(KEY):
            self._session.headers["Authorization"] = f"Bearer {os.environ[KEY]}"

    def get(self, url: str) -> requests.Response:
        """What lies at a URL, whatever its status.

        Raises:
            UserError: The server can't be reached.
        """
        try:
            return self._session.get(url, timeout=self.timeout)
        except requests.RequestException as error:
            raise UserError(self._gone(error)) from None

    def run(self, request: Request[T]) -> T | Failure:
        """Send one request.

        Raises:
            UserError: The server is gone, refuses the request, or read other than what was sent.
        """
        try:
            response = self._session.post(request.url, json=request.body, timeout=self.timeout)
        except requests.RequestException as error:
            if _too_slow(error):
                return Failure(f"no answer within {self.timeout:g} s")
            raise UserError(self._gone(error)) from None
        if response.status_code in _BUSY or response.status_code >= 500:
            return Failure(f"the server answered {response.status_code}: {_said(response)}")
        if response.status_code != 200:
            raise UserError(self._refused(response))
        try:
            answer = response.json()
            parsed, read = request.parse(answer), _tokens_read(answer)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            return Failure(f"the server's answer can't be read ({type(error).__name__}: {str(error)[:100]})")
        if read is not None and request.tokens is not None and abs(read - request.tokens) > request.slack:
            raise UserError(
                f"The server at {self.endpoint.base_url} read {read} tokens where {request.tokens} were sent: it "
                "truncates, or uses another tokenizer, template or picture size. Give it its checkpoint's own "
                "(--tokenizer), or raise its maximum length; nothing was scored."
            )
        return parsed

    def run_all(self, batch: Sequence[Request[T]]) -> list[T | Failure]:
        """Send requests together, in this order; the first goes ahead and fills the server's prefix cache."""
        if not batch:
            return []
        first = self.run(batch[0])
        return [first, *self._pool.map(self.run, batch[1:])]

    def close(self) -> None:
        """Forget what is queued."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    def _gone(self, error: Exception) -> str:
        return (
            f"The server at {self.endpoint.base_url} can't be reached ({_kind(error)}). Start it, or check the URL; "
            "what was measured in a folder of yours (--out) is kept, and the same command goes on."
        )

    def _refused(self, response: requests.Response) -> str:
        where = self.endpoint.base_url
        if response.status_code in (401, 403):
            return f"The server at {where} wants another key than it got; set it in the environment: {KEY}."
        return f"The server at {where} refuses the question ({response.status_code}): {_said(response)}"


def served_models(client: Client) -> list[dict[str, Any]]:
    """What the server says of the models that it serves.

    Raises:
        UserError: It can't be reached, wants a key, or does not answer like OpenAI's.
    """
    response = client.get(f"{client.endpoint.base_url}/models")
    if response.status_code in (401, 403):
        raise UserError(client._refused(response))
    try:
        return [dict(model) for model in response.json()["data"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{client.endpoint.base_url}/models gives no list of models (status {response.status_code}); is it the URL "
            "of an OpenAI-compatible server, with its version? For example: http://127.0.0.1:8000/v1"
        ) from None


def find_served(client: Client, name: str) -> dict[str, Any]:
    """The server's record of a model.

    Raises:
        UserError: It serves no such model; those it serves are named.
    """
    models = served_models(client)
    for model in models:
        if model.get("id") == name:
            return model
    names = [str(model.get("id")) for model in models]
    raise UserError(
        f"The server at {client.endpoint.base_url} serves no model {name!r}{nearest(name, names)}. "
        f"It serves: {', '.join(names) or 'none'}."
    )


def _tokens_read(answer: dict[str, Any]) -> int | None:
    usage = answer.get("usage") or {}
    read = usage.get("prompt_tokens")
    return None if read is None else int(read)


def _said(response: requests.Response) -> str:
    """A server's own words, on one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:200]


def _reason(error: Exception) -> Any:
    inner = error.args[0] if error.args else error
    return inner.reason if isinstance(inner, MaxRetryError) else inner


def _too_slow(error: Exception) -> bool:
    return isinstance(error, requests.ReadTimeout) or isinstance(_reason(error), ReadTimeoutError | ResponseError)


def _kind(error: Exception) -> str:
    return type(_reason(error)).__name__
