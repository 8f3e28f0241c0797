"""Finds and reads the declarations that live beside the package: probes, recipes, suites, tasks, templates.

In a wheel they are mapped into `laid_eval/_bundled/`; in a checkout they are the top-level folders themselves.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laid_eval.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = Literal["probes", "training", "recipes"]
_CHECKOUT = {"probes": "probes/window", "training": "probes/training", "recipes": "recipes"}


def bundled(kind: Kind) -> Path:
    """The folder of bundled declarations of one kind."""
    package = Path(__file__).parent
    inside = package / "_bundled" / kind
    return inside if inside.is_dir() else package.parent / _CHECKOUT[kind]


def declared_names(kind: Kind) -> list[str]:
    """Names of the bundled declarations of one kind."""
    return sorted(path.stem for path in bundled(kind).glob("*.toml"))


def read_declaration(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; `what` begins the message: `Probe file 'mine.toml'`.

    Raises:
        UserError: It can't be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} can't be read: {error.strerror}. Check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} is not valid TOML: {error}.") from None


def content_hash(declared: BaseModel) -> str:
    """Hash of the parsed, default-filled content: comments and order of keys do not matter."""
    content = json.dumps(declared.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
