"""Finds the Python that has vLLM: its wheels pin a torch of their own, so it lives in an environment of its own."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from laid_eval.errors import UserError

VARIABLE = "LAID_EVAL_SERVER_ENV"
FOLDER = ".serve-env"
"""Where `make serve-env` puts it."""


def server_python(env: Path | None) -> Path:
    """The interpreter that can run vLLM.

    Args:
        env: Folder of a virtual environment. Default: the variable LAID_EVAL_SERVER_ENV, then `.serve-env` in the
            present folder or beside the package, then this environment, where vLLM is installed in it.

    Raises:
        UserError: None there.
    """
    named = env or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named:
        python = _python(named)
        if not _has_vllm(named) or not python.exists():
            raise UserError(
                f"'{named}' is no environment with vLLM in it. `make serve-env` builds one on a machine without GPU; "
                "elsewhere: python -m venv ENV && ENV/bin/pip install vllm."
            )
        return python
    for folder in (Path.cwd() / FOLDER, Path(__file__).resolve().parents[2] / FOLDER):
        if _has_vllm(folder):
            return _python(folder)
    if find_spec("vllm"):
        return Path(sys.executable)
    raise UserError(
        "No vLLM found: neither --server-env nor a .serve-env folder, nor in this environment. Build one with `make "
        "serve-env` (or pip install vllm), or give the URL of a running server: --base-url."
    )


def _python(env: Path) -> Path:
    return env.absolute() / "bin" / "python"  # not resolved: the link is what makes it the environment's


def _has_vllm(env: Path) -> bool:
    return any(env.glob("lib/python*/site-packages/vllm/__init__.py"))
