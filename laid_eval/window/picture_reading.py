"""Showing one haystack of pictures: draw it, show it picture by picture, ask at every cut point, keep the trials."""

from __future__ import annotations

import time
import zlib

import numpy as np

from laid_eval.records import ImageExtent
from laid_eval.runs import append_trials, trial_table
from laid_eval.window.pictures import PictureStory, draw_pictures
from laid_eval.window.plan import STRATA, at_chance
from laid_eval.window.probes import ScenesProbe
from laid_eval.window.readers import Asked, PictureReader
from laid_eval.window.reading import State, trial_of
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
    seed = state.settings.seed
    reader: PictureReader = state.reader  # type: ignore[assignment]
    story = draw_haystack(probe, seed, haystack, cuts)
    each, opening = reader.extent(probe.size, probe.size), reader.opening_extent()
    state.image = ImageExtent(width=probe.size, height=probe.size, tokens=each.tokens, positions=each.positions)
    shown = 0  # pictures the reader has seen; stays behind while trials come from disk
    begun = False
    gone = before = 0
    for cut in cuts:
        asked = asked_at(probe, story, seed, haystack, cut)
        prefix = opening.tokens + cut * each.tokens
        if any(a.id not in state.known for a in asked):
            started = time.perf_counter()
            if not begun:
                reader.begin()
                begun = True
            for scene in story.scenes[shown:cut]:
                reader.show(draw(scene, probe.size))
                shown += 1
                state.report(probe.name, haystack, shown, cuts[-1], shown * each.tokens - gone)
            answers = reader.ask(asked)
            state.seconds += time.perf_counter() - started
            trials = [
                trial_of(probe, a, logs, prefix + reader.question_tokens(a.question))
                for a, logs in zip(asked, answers, strict=True)
            ]
            new = [trial for trial in trials if trial.id not in state.known]
            append_trials(state.folder, new)
            state.known |= {trial.id: trial for trial in new}
        state.trials[probe.name] += [state.known[a.id] for a in asked]
        state.prefill += prefix - gone if state.forks else 0
        gone = prefix
        state.asked += sum(reader.pass_tokens(a.question, prefix) for a in asked)
        state.whole += sum(prefix + reader.question_tokens(a.question) for a in asked)
        state.report(probe.name, haystack, cut, cuts[-1])
        lately = [t for t in state.trials[probe.name] if t.length in (before, cut)]
        if before and at_chance(trial_table(lately)):
            return
        before = cut


def _stream(probe: ScenesProbe, seed: int, haystack: int) -> list[int]:
    return [seed, zlib.crc32(probe.name.encode()), haystack]
