"""Windows of served models: of a running server, or of one that is started for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laid_eval.errors import UserError
from laid_eval.records import ModelInfo
from laid_eval.runs import LoadedRun
from laid_eval.serving.client import CONCURRENCY, RETRIES, TIMEOUT, Client
from laid_eval.serving.connect import Answers, Api, connect
from laid_eval.serving.endpoint import Endpoint
from laid_eval.serving.flags import Pictures
from laid_eval.serving.server import Plan, plan_server
from laid_eval.window.model_session import Prepared
from laid_eval.window.probes import ScenesProbe, load_probes
from laid_eval.window.reading import Progress
from laid_eval.window.session import PICTURES, REACH, measure_window

MARGIN = 16
"""Tokens that a server's longest context keeps free beyond the longest one measured."""
_AROUND = 512  # tokens for the frame and the question around pictures
_HITS = re.compile(r"^vllm:prefix_cache_(queries|hits)_total\{[^}]*\} (\S+)$", re.MULTILINE)


def measure_served(
    endpoint: Endpoint,
    probe: str | Sequence[str] = "needle",
    *,
    api: Api = "auto",
    answers: Answers = "logprobs",
    concurrency: int = CONCURRENCY,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
    max_length: int | None = None,
    known: ModelInfo | None = None,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> LoadedRun:
    """Measure the window of a served model.

    Args:
        endpoint: The server; from `find_endpoint` or of one of our own.
        probe: As for `measure_window`.
        api: `tokens`, `completions` or `chat`; `auto`: the fastest that the server has.
        answers: `logprobs` of the choices, or `generate`d replies to questions that name the choices.
        concurrency: Requests under way at once.
        timeout: Seconds for one answer; a request that takes longer fails its trial.
        retries: Of a request that met a busy or broken server.
        max_length: Longest context. Default: what the server takes; 150 images at most.
        known: What is served, where the server is ours.
        announce: Told how the server is asked, before; what its prefix cache gave, after.
        progress: Called while measuring.
        **options: Others of `measure_window`.

    Returns:
        The run, read back from its folder.

    Raises:
        UserError: Anything the user can mend: the server is gone, truncates, can't be asked so.
        KeyboardInterrupt: As it came; the folder keeps what was measured.
    """
    probes = load_probes([probe] if isinstance(probe, str) else list(probe))
    pictures = next((p for p in probes if isinstance(p, ScenesProbe)), None)
    client = Client(endpoint, concurrency, timeout, retries)
    try:
        reader = connect(client, pictures is not None, api, answers, known)
        longest = _longest(endpoint, max_length, reader, pictures)
        announce(f"asking {endpoint.model} at {endpoint.base_url}: {reader.info.server}, {reader.info.fan_out}")
        before = _prefix_cache(client)
        run = measure_window(reader, probe, max_length=longest, progress=progress, **options)
        after = _prefix_cache(client)
        if before and after and after[0] > before[0]:
            asked, hit = (int(b - a) for a, b in zip(before, after, strict=True))
            announce(f"the server's prefix cache held {hit:,} of the {asked:,} tokens sent ({hit / asked:.0%})")
        return run
    finally:
        client.close()


def plan_for_window(
    prepared: Prepared, probe: str | Sequence[str], max_length: int | None, env: Path | None, flags: Sequence[str] = ()
) -> Plan:
    """A server of our own that takes the contexts of a measurement.

    Raises:
        UserError: As `plan_server`; probes that do not fit the model.
    """
    probes = load_probes([probe] if isinstance(probe, str) else list(probe))
    pictures = next((p for p in probes if isinstance(p, ScenesProbe)), None)
    claimed = prepared.described.claimed_length
    if not pictures:
        longest = max_length or (round(REACH * claimed) if claimed else None)
        return plan_server(prepared.described, env=env, max_length=longest and longest + MARGIN, flags=flags)
    each = prepared.picture_tokens(pictures.size, pictures.size)
    fits = round(REACH * claimed) // each if claimed else PICTURES
    images = max_length or min(PICTURES, fits)
    room = Pictures(images, pictures.size, pictures.size)
    return plan_server(prepared.described, env=env, max_length=images * each + _AROUND, pictures=room, flags=flags)


def _longest(endpoint: Endpoint, asked: int | None, reader: Any, pictures: ScenesProbe | None) -> int | None:
    """No context may be longer than the server takes."""
    if endpoint.max_length is None:
        return asked
    room = endpoint.max_length - MARGIN
    if not pictures:
        if asked and asked > room:
            raise UserError(
                f"--max-length {asked} is more than the server takes: {endpoint.max_length} tokens with {MARGIN} kept "
                f"free. Start it with a greater --max-model-len, or give --max-length {room}."
            )
        return asked or room
    each = reader.extent(pictures.size, pictures.size).tokens
    fits = (room - reader.opening_extent().tokens - _AROUND // 2) // each
    if asked and asked > fits:
        raise UserError(
            f"--max-length {asked} is more than the server takes: {endpoint.max_length} tokens hold about {fits} "
            f"images. Start it with a greater --max-model-len, or give --max-length {fits}."
        )
    return asked or min(PICTURES, fits)


def _prefix_cache(client: Client) -> tuple[float, float] | None:
    """Tokens looked up in vLLM's prefix cache and found there, so far; `None` where a server does not tell."""
    response = client.get(f"{client.endpoint.root}/metrics")
    counts = {"queries": 0.0, "hits": 0.0}  # of all engines of the server
    lines = _HITS.findall(response.text) if response.status_code == 200 else []
    for name, value in lines:
        counts[name] += float(value)
    return (counts["queries"], counts["hits"]) if lines else None
