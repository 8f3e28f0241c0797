"""Showing one case of a data set: its pictures in one order, its question, the trial."""

from __future__ import annotations

from collections import Counter
from functools import partial

from laid_eval.records import ImageExtent, Trial
from laid_eval.window.readers import Asked, PictureReader
from laid_eval.window.reading import State, Stop, ask_along
from laid_eval.window.visual_haystacks import ANSWER_TOKENS, DatasetProbe, View
from laid_eval.window.yes_no import yes_no_words


def read_view(state: State, probe: DatasetProbe, view: View) -> None:
    """Show a case in one order and ask."""
    reader, case = state.picture_reader, view.case
    before = reader.opening_extent().tokens
    ends = [before]
    for name in view.pictures:
        ends.append(ends[-1] + reader.extent(*probe.folder.size(name)).tokens)

    def show(_: int) -> None:
        for k, name in enumerate(view.pictures, start=1):
            reader.show(probe.folder.read(name))
            state.report(probe.name, case.haystack, k, case.length, ends[k])

    asked = Asked(view_id(probe, view), view.question, case.haystack, case.length, view.depth)
    stop = Stop(case.length, [asked], ends[-1], case.length, show)
    free = partial(_free, reader, probe) if probe.protocol == "published" else None
    ask_along(state, probe, case.haystack, [stop], case.length, free)


def view_id(probe: DatasetProbe, view: View) -> str:
    """Of the trial."""
    return f"{probe.name}/{view.case.haystack}/{view.case.length}/{view.name}"


def image_extent(reader: PictureReader, probe: DatasetProbe) -> ImageExtent:
    """What a picture of the data set takes; the mean where they differ in size."""
    sizes = Counter(probe.folder.size(name) for case in probe.cases for name in (*case.positive, *case.negative))
    extents = {size: reader.extent(*size) for size in sizes}
    width, height = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    tokens, positions = (
        round(sum(getattr(extents[size], what) * count for size, count in sizes.items()) / sizes.total())
        for what in ("tokens", "positions")
    )
    return ImageExtent(width=width, height=height, tokens=tokens, positions=positions)


def _free(reader: PictureReader, probe: DatasetProbe, stop: Stop) -> list[Trial]:
    """The trial of a free answer, scored as published."""
    (asked,) = stop.asked
    said = reader.say(asked, ANSWER_TOKENS)
    words = yes_no_words(said)
    gold = asked.question.choices[asked.question.answer].lower()
    trial = Trial(
        id=asked.id,
        probe=probe.name,
        haystack=asked.haystack,
        length=asked.length,
        prompt_tokens=stop.tokens + reader.question_tokens(asked.question),
        depth=None if asked.depth is None else round(asked.depth, 4),
        score=float(gold in words),
        chance=asked.question.chance,
        answer=gold,
        chosen=said,
        complied=bool(words),
    )
    return [trial]
