"""Showing one haystack of pictures: draw it, show it picture by picture, ask at every cut point, keep the trials."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from laid_eval.records import ImageExtent
from laid_eval.window.pictures import PictureStory, draw_pictures
from laid_eval.window.plan import STRATA
from laid_eval.window.probes import ScenesProbe
from laid_eval.window.readers import Asked
from laid_eval.window.reading import State, Stop, ask_along
from laid_eval.window.scenes import draw


def draw_haystack(probe: ScenesProbe, seed: int, haystack: int, cuts: tuple[int, ...]) -> PictureStory:
    """The pictures of one haystack of a measurement."""
    return draw_pictures(probe, cuts, np.random.default_rng(_stream(probe, seed, haystack)))


def asked_at(probe: ScenesProbe, story: PictureStory, seed: int, haystack: int, cut: int) -> list[Asked]:
    """The questions at one cut point: all, or as many as text has, drawn at random."""
    rng = np.random.default_rng([*_stream(probe, seed, haystack), cut])
    questions = story.questions(cut, rng)
    depths = [(question.needle or 0) / cut + 0.5 / cut for question in questions]
    return [
        Asked(f"{probe.name}/{haystack}/{cut}/{questions[i].item}", questions[i], haystack, cut, depths[i])
        for i in sorted(rng.permutation(len(questions))[:STRATA])
    ]


def read_pictures(state: State, probe: ScenesProbe, haystack: int, cuts: tuple[int, ...]) -> None:
    """Show one haystack and ask at each cut point, until two successive lengths are at chance."""
    seed, reader = state.settings.seed, state.picture_reader
    story = draw_haystack(probe, seed, haystack, cuts)
    each, opening = reader.extent(probe.size, probe.size), reader.opening_extent()
    state.image = ImageExtent(width=probe.size, height=probe.size, tokens=each.tokens, positions=each.positions)
    shown = 0  # pictures the reader has seen; stays behind while trials come from disk

    def show_to(cut: int, gone: int) -> None:
        nonlocal shown
        for scene in story.scenes[shown:cut]:
            reader.show(draw(scene, probe.size))
            shown += 1
            state.report(probe.name, haystack, shown, cuts[-1], shown * each.tokens - gone)

    def stops() -> Iterator[Stop]:
        for cut in cuts:
            asked = asked_at(probe, story, seed, haystack, cut)
            yield Stop(cut, asked, opening.tokens + cut * each.tokens, cut, partial(show_to, cut))

    ask_along(state, probe, haystack, stops(), cuts[-1])


def _stream(probe: ScenesProbe, seed: int, haystack: int) -> list[int]:
    return [seed, zlib.crc32(probe.name.encode()), haystack]
