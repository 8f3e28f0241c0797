"""How many processes train together, as `accelerate launch` and `torchrun` tell them."""

from __future__ import annotations

import os


def processes() -> int:
    """All of them; 1 where nothing was launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """This is the one that writes and tells."""
    return os.environ.get("RANK", "0") == "0"
