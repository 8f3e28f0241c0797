"""Pictures of the user's own: found under one folder, and checked before they are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from laid_eval.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 50_000_000
"""A larger picture is refused: decoding it takes three bytes a pixel, whatever its file takes."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # others can run programs or hold many pictures
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class PictureFolder:
    """A folder with pictures; nothing outside it is read."""

    root: Path

    @cached_property
    def _real(self) -> Path:
        if not self.root.is_dir():
            raise UserError(f"--images '{self.root}' is not a folder. Name the one that holds train2017 and val2017.")
        return self.root.resolve()

    def find(self, name: str) -> Path | None:
        """The file of a picture; `None` where there is none.

        Raises:
            UserError: The name, or a link on the way, leads out of the folder; the folder is none.
        """
        try:
            path = (self._real / name).resolve()
            inside, there = path.is_relative_to(self._real), path.is_file()
        except (OSError, ValueError, RuntimeError):  # no name of a file: too long, a null, links in a circle
            return None
        if not inside:
            raise UserError(f"Picture {name!r} lies outside --images '{self.root}'; nothing is read from there.")
        return path if there else None

    @cache  # noqa: B019 - a folder lives as long as the measurement
    def size(self, name: str) -> tuple[int, int]:
        """Width and height in pixels, from the file's header alone.

        Raises:
            UserError: There is no such picture, or none that can be read; it has no pixels, or too many.
        """
        return self._opened(name, lambda picture: picture.size)

    def read(self, name: str) -> Image:
        """The picture, RGB; it is not turned as its metadata may say. Raises as `size`."""
        return self._opened(name, lambda picture: picture.convert("RGB"))

    def _opened(self, name: str, use: Callable[[Image], _Read]) -> _Read:
        from PIL import Image

        path = self.find(name)
        if path is None:
            raise UserError(f"Picture {name!r} is not under --images '{self.root}'.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the size is checked here, and transparency has no meaning
                with Image.open(path, formats=_FORMATS) as picture:
                    _check_size(name, *picture.size)
                    return use(picture)
        except Image.DecompressionBombError:
            raise UserError(_too_large(name)) from None
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:
            # whatever a damaged file makes a decoder raise
            raise UserError(
                f"Picture {name!r} under --images '{self.root}' can't be read ({type(error).__name__}). "
                f"It must be a whole file of one of the kinds {', '.join(_FORMATS)}."
            ) from None


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"Picture {name!r} has no pixels: {width} x {height}.")
    if width * height > MOST_PIXELS:
        raise UserError(f"{_too_large(name)[:-1]}; it has {width} x {height}.")


def _too_large(name: str) -> str:
    return f"Picture {name!r} is too large to be decoded: {MOST_PIXELS:,} pixels are allowed."
