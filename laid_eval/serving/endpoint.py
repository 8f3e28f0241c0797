"""A server that answers like OpenAI's, and what one must know to measure it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Endpoint:
    """Where a served model is reached."""

    base_url: str
    """With the version: `http://127.0.0.1:8000/v1`."""
    model: str
    """Name under which it is served."""
    tokenizer: Path | str
    """Folder or Hub id of its tokenizer (of its processor, where it takes pictures)."""
    max_length: int | None
    """Longest context it takes, tokens; `None`: it does not say."""

    @property
    def root(self) -> str:
        """The URL without the version: health, metrics, what is beside OpenAI's interface."""
        return self.base_url.rstrip("/").removesuffix("/v1")
