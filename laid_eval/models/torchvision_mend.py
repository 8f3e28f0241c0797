"""Makes torchvision importable beside a torch built for CPUs only.

PyPI has torchvision for CUDA builds of torch alone. Beside another build its compiled operators do not load, and its
import fails on registering the shapes of two of them, `nms` and `qnms`; with it fail the image processors of
transformers, which need neither. Declared before the import, the rest works. Where torchvision is whole, or absent,
nothing is changed; and nothing is done until someone imports it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a library's declarations live as long as it


def mend_torchvision() -> None:
    """Look at torchvision when it is first imported, and declare what it lacks. Harmless when called again."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Mend) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Mend())


class _Mend(MetaPathFinder):
    def __init__(self) -> None:
        self._done = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "torchvision" and not self._done:
            self._done = True
            spec = PathFinder.find_spec("torchvision")
            if spec and spec.origin and not _loads(Path(spec.origin).parent):
                _declare()


def _loads(folder: Path) -> bool:
    """Its compiled operators fit this torch."""
    import torch

    libraries = [path for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib")]
    try:
        for path in libraries:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return bool(libraries)


def _declare() -> None:
    import torch

    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}{_BOXES}")
    _kept.append(library)
