"""Haystacks: filler text with statements planted at chosen token positions.

Text is handled as sentences, each tokenized as a continuation of what precedes it, so that positions are exact
in any tokenizer. Positions count from the haystack's own start (the opening of the prompt not included).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laid_eval.errors import UserError
from laid_eval.window.questions import Statement

Encode = Callable[[str], list[int]]
_LONGEST_SENTENCE = 40  # words; longer ones (tables, code) are cut, so that facts land near their places


@dataclass(frozen=True)
class Corpus:
    """Filler text as sections of sentences."""

    name: str
    hash: str
    sections: tuple[tuple[str, ...], ...]
    shuffled: bool
    """Sections are shuffled for every haystack, and come again in a new order when they run out. A text of the
    user's is one section: its order is kept, each haystack starts at a random sentence and never repeats."""

    def stream(self, rng: np.random.Generator) -> Iterator[str]:
        """Sentences of one haystack, in reading order."""
        if not self.shuffled:
            (section,) = self.sections
            start = int(rng.integers(len(section)))
            yield from section[start:] + section[:start]
            return
        while True:
            for i in rng.permutation(len(self.sections)):
                yield from self.sections[int(i)]


def sentences(text: str) -> list[str]:
    """Sentences of a text, white space folded, none longer than 40 words.

    >>> sentences("One.  Two lines? Three")
    ['One.', 'Two lines?', 'Three']
    """
    out = []
    for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text):
        words = sentence.split()
        for i in range(0, len(words), _LONGEST_SENTENCE):
            out.append(" ".join(words[i : i + _LONGEST_SENTENCE]))
    return out


def load_corpus(files: Sequence[Path] = ()) -> Corpus:
    """Filler text: the user's files in the order given, or Python's language reference (`pydoc_data.topics`).

    Raises:
        UserError: A file can't be read, is no UTF-8 text, or holds no sentence.
    """
    if not files:
        from pydoc_data import topics  # ships with every Python

        texts = [topics.topics[key] for key in sorted(topics.topics)]
        sections = tuple(tuple(sentences(text)) for text in texts)
        return Corpus("python-reference", _digest(texts), sections, shuffled=True)
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Haystack file '{path}' can't be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UserError(f"Haystack file '{path}' is not UTF-8 text. Convert it first.") from None
    section = tuple(s for text in texts for s in sentences(text))
    if not section:
        raise UserError(f"Haystack file '{files[0]}' holds no text.")
    return Corpus(", ".join(path.name for path in files), _digest(texts), (section,), shuffled=False)


def check_long_enough(corpus: Corpus, encode: Encode, needed: int, option: str = "--max-length") -> str | None:
    """A note where shuffled text must repeat to fill `needed` tokens.

    Raises:
        UserError: A text of the user's has fewer tokens than the longest context needs.
    """
    total = sum(len(encode(" " + s)) for section in corpus.sections for s in section)
    if total >= needed:
        return None
    if corpus.shuffled:
        return f"the filler text ({total:,} tokens) repeats, in a new order, in contexts longer than that"
    raise UserError(
        f"Haystack text {corpus.name!r} is too short: it has {total:,} tokens, contexts of {needed:,} were asked "
        f"for. Pass more text to --haystack" + (f", or {option} {total}." if total >= 1024 else ".")
    )


@dataclass(frozen=True)
class Haystack:
    """Tokens of one haystack and where its statements lie."""

    tokens: list[int]
    spans: tuple[tuple[int, int] | None, ...]
    """Start and end of each statement; `None` where it found no room."""

    def read(self, cut: int) -> list[int]:
        """Indices of the statements that lie wholly within the first `cut` tokens."""
        return [i for i, span in enumerate(self.spans) if span and span[1] <= cut]


def place(statements: Sequence[Statement], cuts: Sequence[int], rng: np.random.Generator) -> list[float]:
    """Target positions, tokens. `cuts` are the haystack's own lengths at the cut points, ascending.

    First groups lie evenly before the first cut. The others have a density that is flat up to the second cut
    and falls as 1 / position beyond it, so that every cut point finds facts at all depths before it.
    """
    groups: dict[int, list[int]] = {}
    for i, statement in enumerate(statements):
        groups.setdefault(statement.group, []).append(i)
    first = [g for g in groups if statements[groups[g][0]].first]
    later = [g for g in groups if not statements[groups[g][0]].first]
    targets = [0.0] * len(statements)

    def spread(members: list[int], start: float, end: float) -> None:
        targets[members[0]] = start
        for i, at in zip(members[1:], np.sort(rng.uniform(start, end, len(members) - 1)), strict=True):
            targets[i] = float(at)

    jitter = rng.uniform(size=len(first))
    for slot, g in enumerate(rng.permutation(first) if first else []):
        spread(groups[int(g)], (slot + jitter[slot]) / len(first) * cuts[0], cuts[0])
    if not later or len(cuts) < 2:
        return targets
    knots = np.geomspace(cuts[1], cuts[-1], 64) if cuts[-1] > cuts[1] else np.array([cuts[1]])
    mass = np.concatenate([[0.0], (cuts[1] - cuts[0]) / cuts[1] + np.log(knots / cuts[1])])
    at = np.concatenate([[cuts[0]], knots])
    shares = (np.arange(len(later) + 1) + rng.uniform(size=len(later) + 1)) / len(later)
    slots = np.interp(np.minimum(shares, 1.0) * mass[-1], mass, at)
    for k, g in enumerate(later):
        spread(groups[g], float(slots[k]), float(slots[k + 1]))
    return targets


def build(
    corpus: Corpus,
    statements: Sequence[Statement],
    cuts: Sequence[int],
    encode: Encode,
    rng: np.random.Generator,
) -> Haystack:
    """One haystack of `cuts[-1]` tokens with the statements planted, each between two sentences."""
    targets = place(statements, cuts, rng)
    texts = [encode(" " + statement.text) for statement in statements]
    waiting = sorted(range(len(statements)), key=lambda i: targets[i])
    due = sum(len(texts[i]) for i in waiting if statements[i].first)  # must fit before the first cut
    tokens: list[int] = []
    spans: list[tuple[int, int] | None] = [None] * len(statements)

    def plant(i: int) -> None:
        nonlocal due
        spans[i] = (len(tokens), len(tokens) + len(texts[i]))
        tokens.extend(texts[i])
        due -= len(texts[i]) if statements[i].first else 0

    for sentence in corpus.stream(rng):
        while waiting and targets[waiting[0]] <= len(tokens):
            plant(waiting.pop(0))
        filler = encode(" " + sentence)
        if due and len(tokens) + len(filler) + due > cuts[0]:
            for i in [i for i in waiting if statements[i].first]:
                waiting.remove(i)
                plant(i)
        if len(tokens) >= cuts[-1]:
            break
        tokens.extend(filler)
    return Haystack(tokens[: cuts[-1]], tuple(spans))


def pick_by_depth(depths: Sequence[float], strata: int, rng: np.random.Generator) -> list[int]:
    """Indices of one entry in each of as many equal slices of depth as can all be filled, at most `strata`.

    No slice is left empty, so every depth is asked equally often at every length.
    """
    for count in range(min(strata, len(depths)), 0, -1):
        members: list[list[int]] = [[] for _ in range(count)]
        for i, depth in enumerate(depths):
            members[min(int(depth * count), count - 1)].append(i)
        if all(members):
            return [int(rng.choice(slice_)) for slice_ in members]
    return []


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
