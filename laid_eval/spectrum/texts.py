"""Texts that spectra are taken from: filler prose, the same tokens shuffled, and prose with needles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from laid_eval.models.frame import Branch, Frame
from laid_eval.window.haystack import Corpus, build, check_long_enough
from laid_eval.window.probes import Probe
from laid_eval.window.questions import draw_story


def prose(corpus: Corpus, frame: Frame, length: int, count: int, seed: int) -> tuple[list[list[int]], tuple[str, ...]]:
    """`count` texts of exactly `length` tokens, whole sections in random order, after the tokenizer's own start.

    With them a note where the texts share passages, so that they are no independent sample.

    Raises:
        UserError: The text is shorter than `length`.
    """
    encode = lru_cache(maxsize=100_000)(frame.continuation)
    note = check_long_enough(corpus, encode, length, option="--length")
    total = sum(len(encode(" " + s)) for section in corpus.sections for s in section)
    notes = [note] if note else []
    if count * length > total:
        notes.append(
            f"{count} texts of {length:,} tokens from {total:,} tokens of prose share passages: intervals over texts "
            "are too narrow"
        )
    out = []
    for text in range(count):
        tokens = frame.start()
        for sentence in corpus.stream(np.random.default_rng([seed, 17, text])):
            if len(tokens) >= length:
                break
            tokens += encode(" " + sentence)
        out.append(tokens[:length])
    return out, tuple(notes)


def shuffled(ids: Sequence[int], keep: int, seed: int) -> list[int]:
    """The same tokens in random order, the first `keep` in place: position without content."""
    rng = np.random.default_rng([seed, 18])
    return [*ids[:keep], *rng.permutation(np.array(ids[keep:])).tolist()]


@dataclass(frozen=True)
class NeedleText:
    """A prompt with facts planted, and for each the question with its right answer."""

    tokens: list[int]
    branches: tuple[Branch, ...]
    """One ending each: the right answer."""
    spans: tuple[tuple[int, int], ...]
    """Where each fact stands among the tokens."""


def needles(probe: Probe, corpus: Corpus, frame: Frame, length: int, seed: int) -> NeedleText:
    """A haystack of about `length` tokens with the facts of one story of the probe."""
    rng = np.random.default_rng([seed, 19])
    story = draw_story(probe, rng)
    opening = frame.opening(probe.instruction)
    cuts = [length // 2 - len(opening), length - len(opening)]
    text = build(corpus, story.statements, cuts, lru_cache(maxsize=100_000)(frame.continuation), rng)
    branches, spans = [], []
    for question in story.questions(text.read(cuts[-1]), rng):
        span = None if question.needle is None else text.spans[question.needle]
        if span is None:
            continue
        # with all choices: the stem ends where they part
        whole = frame.branch(question.prompt, question.lead, question.choices)
        branches.append(Branch(whole.stem, (whole.endings[question.answer],)))
        spans.append((span[0] + len(opening), span[1] + len(opening)))
    return NeedleText([*opening, *text.tokens], tuple(branches), tuple(spans))
