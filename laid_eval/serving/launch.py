"""Runs vLLM's server with the Python of its own environment. A script: nothing of ours is installed there.

It ends with whoever started it: its standard input is a pipe that closes when that process is gone, however it went.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

_PATIENCE = 15.0  # seconds for a clean end


def _mend_torchvision() -> None:
    path = Path(__file__).resolve().parents[1] / "models" / "torchvision_mend.py"
    spec = importlib.util.spec_from_file_location("torchvision_mend", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.mend_torchvision()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.killpg(0, signal.SIGKILL)


_mend_torchvision()  # here, since vLLM's worker processes import this script again
if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
