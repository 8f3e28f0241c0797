"""How forced choices are put to a server: which requests they take, and what the answers say of each choice.

A choice of several tokens is asked for token by token, the earlier ones given; choices that begin alike share those
requests. Four ways:

- `tokens`: token ids in, the log-probabilities of wanted tokens out (vLLM with --enable-scale-out). Reads the server's
  prefix cache.
- `echo`: the prompt with a choice, its log-probabilities echoed (`/completions`). vLLM does not read its prefix cache
  for it: every request is a whole prompt.
- `chat`: the same as `tokens` over messages (vLLM's `logprob_token_ids`); pictures can stand in them.
- generated: the choices are named in the question, and the reply is searched for one. For servers that give no
  log-probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laid_eval.models.frame import Branch
from laid_eval.serving.client import Request
from laid_eval.serving.endpoint import Endpoint

Given = tuple[int, ...]
"""Tokens of a choice that stand already."""
Logs = Mapping[int, float]
"""Log-probability of a next token, nats."""

_ROOM = 64  # tokens that a reply may take beyond the longest choice: models like to begin with a phrase
_SYSTEM = 64  # tokens of instructions that a server may put before a message of ours


@dataclass(frozen=True)
class Place:
    """Where in a question a next token is asked for."""

    given: Given
    wanted: tuple[int, ...]


def places(branch: Branch) -> list[Place]:
    """Every place that the choices of a question pass through, shortest first.

    >>> places(Branch((1,), ((5,), (6, 7), (6, 8))))
    [Place(given=(), wanted=(5, 6)), Place(given=(6,), wanted=(7, 8))]
    """
    found: dict[Given, dict[int, None]] = {}
    for ending in branch.endings:
        for k, token in enumerate(ending):
            found.setdefault(ending[:k], {})[token] = None
    return [Place(given, tuple(found[given])) for given in sorted(found, key=len)]


def summed(branch: Branch, logs: Mapping[Given, Logs]) -> list[float]:
    """Log-probability of every choice."""
    return [sum(logs[ending[:k]][token] for k, token in enumerate(ending)) for ending in branch.endings]


def ask_tokens(endpoint: Endpoint, prompt: Sequence[int], place: Place) -> Request[Logs]:
    """By token ids."""
    sampling: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    listed = [*place.wanted, place.wanted[0]]  # the sampled token stands first in the answer and pushes out the last
    sampling |= {"logprobs": len(listed), "logprob_token_ids": listed}
    body = {"model": endpoint.model, "token_ids": [*prompt, *place.given], "sampling_params": sampling}

    def parse(answer: dict[str, Any]) -> Logs:
        return _wanted(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"], place)

    return Request(f"{endpoint.root}/inference/v1/generate", body, len(prompt) + len(place.given), parse)


def ask_echo(endpoint: Endpoint, prompt: Sequence[int], ending: Sequence[int]) -> Request[float]:
    """The whole prompt with one choice; its log-probability."""
    body = {
        "model": endpoint.model, "prompt": [*prompt, *ending], "max_tokens": 1, "temperature": 0, "echo": True,
        "logprobs": 1,
    }  # fmt: skip

    def parse(answer: dict[str, Any]) -> float:
        logs = answer["choices"][0]["logprobs"]["token_logprobs"]
        own = logs[len(prompt) : len(prompt) + len(ending)]
        if len(own) < len(ending):
            raise ValueError("log-probabilities of the prompt are missing")
        return float(sum(own))

    return Request(f"{endpoint.base_url}/completions", body, len(prompt) + len(ending), parse)


def ask_chat(endpoint: Endpoint, content: Any, begun: str, tokens: int | None, place: Place) -> Request[Logs]:
    """By messages; `begun` is what the assistant has said already, `tokens` what the whole prompt takes."""
    body = {
        **_messages(endpoint, content, begun), "max_tokens": 1, "temperature": 0, "logprobs": True,
        "logprob_token_ids": list(place.wanted), "return_tokens_as_token_ids": True,
    }  # fmt: skip

    def parse(answer: dict[str, Any]) -> Logs:
        return _wanted(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"], place)

    return Request(f"{endpoint.base_url}/chat/completions", body, tokens, parse)


def ask_reply(endpoint: Endpoint, prompt: Sequence[int], branch: Branch) -> Request[str]:
    """What the model says after a prompt of token ids."""
    body = {"model": endpoint.model, "prompt": list(prompt), "max_tokens": reply_limit(branch), "temperature": 0}

    def parse(answer: dict[str, Any]) -> str:
        return _reply(answer, answer["choices"][0]["text"])

    return Request(f"{endpoint.base_url}/completions", body, len(prompt), parse)


def ask_chat_reply(endpoint: Endpoint, content: Any, tokens: int, limit: int) -> Request[str]:
    """What the model says to a message, at most `limit` tokens; nothing is put into its mouth."""
    body = {**_messages(endpoint, content, ""), "max_tokens": limit, "temperature": 0}

    def parse(answer: dict[str, Any]) -> str:
        return _reply(answer, answer["choices"][0]["message"]["content"])

    return Request(f"{endpoint.base_url}/chat/completions", body, tokens, parse, slack=_SYSTEM)


def _reply(answer: dict[str, Any], text: Any) -> str:
    """A reply's text; one that is missing (a thought took all tokens, a filter) is no answer, so no wrong one."""
    reason = answer["choices"][0].get("finish_reason")
    if not isinstance(text, str) or not text.strip() or reason == "content_filter":
        raise ValueError(f"no text in the reply, which ended by {reason!r}")
    return text


def named_choice(reply: str, choices: Sequence[str]) -> int | None:
    """The one choice that a reply names, as whole words in any case; `None` for none or several.

    A choice that is part of another named one does not count.

    >>> named_choice(" Lisbon, I think.", ["Oslo", "Lisbon"])
    1
    >>> named_choice("a polar bear", ["bear", "polar bear"])
    1
    >>> named_choice("Oslo or Lisbon", ["Oslo", "Lisbon"]) is None
    True
    """
    left, found = reply, []
    for k in sorted(range(len(choices)), key=lambda k: -len(choices[k])):
        shorter = re.sub(rf"(?<!\w){re.escape(choices[k])}(?!\w)", " ", left, flags=re.IGNORECASE)
        if shorter != left:
            found.append(k)
            left = shorter
    return found[0] if len(found) == 1 else None


def _messages(endpoint: Endpoint, content: Any, begun: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    if not begun:
        return {"model": endpoint.model, "messages": messages}
    messages.append({"role": "assistant", "content": begun})
    return {
        "model": endpoint.model, "messages": messages, "continue_final_message": True, "add_generation_prompt": False
    }  # fmt: skip


def _wanted(top: Sequence[Mapping[str, Any]], place: Place) -> Logs:
    logs = {_token(entry): float(entry["logprob"]) for entry in top}
    return {token: logs[token] for token in place.wanted}


def _token(entry: Mapping[str, Any]) -> int:
    """In messages vLLM writes `token_id:123` where it is asked for ids."""
    return int(entry["token_id"] if "token_id" in entry else entry["token"].removeprefix("token_id:"))


def reply_limit(branch: Branch) -> int:
    """Tokens that a reply may take."""
    return max(len(ending) for ending in branch.endings) + _ROOM
