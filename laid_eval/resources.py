"""Finds the declarations that live beside the package: probes, recipes, suites, tasks, templates.

In a wheel they are mapped into `laid_eval/_bundled/`; in a checkout they are the top-level folders themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["probes", "training", "recipes"]
_CHECKOUT = {"probes": "probes/window", "training": "probes/training", "recipes": "recipes"}


def bundled(kind: Kind) -> Path:
    """The folder of bundled declarations of one kind."""
    package = Path(__file__).parent
    inside = package / "_bundled" / kind
    return inside if inside.is_dir() else package.parent / _CHECKOUT[kind]
