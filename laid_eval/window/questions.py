"""Stories: the statements planted in one haystack, and what can be asked once some of them were read.

A story is drawn from a probe and a random stream. Right answers are drawn uniformly among the choices and the
choices are shuffled, so a model that ignores the context scores at chance whatever it prefers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from laid_eval.errors import UserError
from laid_eval.window.probes import ChainsProbe, CountsProbe, Declared, FactsProbe, KeysProbe


@dataclass(frozen=True)
class Question:
    """A forced choice. `prompt` + `lead` + ' ' + a choice is what a model sees after the haystack."""

    item: str
    """Which fact is asked for; the same at every length of a haystack."""
    prompt: str
    lead: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    needle: int | None
    """Index of the (earliest) statement the answer stands in; `None` where it is everywhere."""

    @property
    def chance(self) -> float:
        """Expected score of a model that ignores the context."""
        return 1 / len(self.choices)


@dataclass(frozen=True)
class Statement:
    """A sentence to be planted. Statements of one group belong to one fact and keep their order."""

    text: str
    group: int
    first: bool
    """Planted before the first cut point."""


class Story(Protocol):
    """What is planted in one haystack, and its questions."""

    statements: list[Statement]

    def questions(self, read: Collection[int], rng: np.random.Generator) -> list[Question]:
        """Everything that can be asked when the statements with these indices have been read."""
        ...


@dataclass(frozen=True)
class Item:
    """One fact of a story."""

    name: str
    statements: tuple[int, ...]
    prompt: str
    lead: str
    answer: str
    rivals: tuple[str, ...] | None
    """Wrong answers to choose from; `None`: the answers of other facts read so far."""


@dataclass
class ItemStory:
    """Facts that are asked one by one."""

    choices: int
    statements: list[Statement] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def questions(self, read: Collection[int], rng: np.random.Generator) -> list[Question]:
        """One question per fact whose statements have all been read."""
        seen = set(read)
        known = [item for item in self.items if seen.issuperset(item.statements)]
        out = []
        for item in known:
            rivals = item.rivals or tuple(o.answer for o in known if o.answer != item.answer)
            if len(rivals) >= self.choices - 1:
                out.append(
                    _question(
                        item.name,
                        item.prompt,
                        item.lead,
                        item.answer,
                        rivals,
                        self.choices,
                        item.statements[0],
                        rng,
                    )
                )
        return out


@dataclass
class CountStory:
    """Words mentioned several times; asked is the commonest so far, where it leads by two or more."""

    probe: CountsProbe
    statements: list[Statement] = field(default_factory=list)
    mentions: list[tuple[int, str]] = field(default_factory=list)
    """Theme and word of each statement."""

    def questions(self, read: Collection[int], rng: np.random.Generator) -> list[Question]:
        """One question per theme with a clear winner."""
        out = []
        for k, theme in enumerate(self.probe.themes):
            said = [self.mentions[i][1] for i in read if self.mentions[i][0] == k]
            counts = sorted(((said.count(word), word) for word in set(said)), reverse=True)
            if not counts or counts[0][0] - (counts[1][0] if len(counts) > 1 else 0) < 2:
                continue
            winner = counts[0][1]
            # All other words, mentioned or not: preferring some would make the winner guessable from the choices.
            rivals = tuple(word for word in theme.words if word != winner)
            out.append(
                _question(
                    f"theme{k}",
                    theme.question,
                    theme.lead,
                    winner,
                    rivals,
                    self.probe.choices,
                    None,
                    rng,
                )
            )
        return out


def _question(
    name: str,
    prompt: str,
    lead: str,
    answer: str,
    rivals: tuple[str, ...],
    choices: int,
    needle: int | None,
    rng: np.random.Generator,
) -> Question:
    wrong = [rivals[i] for i in rng.permutation(len(rivals))[: choices - 1]]
    at = int(rng.integers(choices))
    return Question(name, prompt, lead, (*wrong[:at], answer, *wrong[at:]), at, needle)


def draw_story(probe: Declared, rng: np.random.Generator) -> Story:
    """The statements and questions of one haystack.

    Raises:
        UserError: The probe is about pictures.
    """
    match probe:
        case FactsProbe():
            return _facts(probe, rng)
        case KeysProbe():
            return _keys(probe, rng)
        case ChainsProbe():
            return _chains(probe, rng)
        case CountsProbe():
            return _counts(probe, rng)
    raise UserError(f"Probe {probe.name!r} asks about pictures; here a probe about text is needed (laid-eval probes).")


def _facts(probe: FactsProbe, rng: np.random.Generator) -> ItemStory:
    story = ItemStory(probe.choices)
    shared = [str(a) for a in rng.permutation(probe.answers)] if probe.answers else []
    for group, k in enumerate(rng.permutation(len(probe.kinds))):
        kind = probe.kinds[int(k)]
        answer = shared[group] if shared else str(rng.choice(kind.answers))
        rivals = None if shared else tuple(a for a in kind.answers if a != answer)
        story.items.append(Item(f"kind{k}", (group,), kind.question, kind.lead, answer, rivals))
        story.statements.append(Statement(kind.fact.format(answer=answer), group, group < probe.first))
    return story


def _keys(probe: KeysProbe, rng: np.random.Generator) -> ItemStory:
    story = ItemStory(probe.choices)
    values = rng.permutation(probe.values)
    for group, k in enumerate(rng.permutation(len(probe.keys))):
        key, value = probe.keys[int(k)], str(values[group])
        ask = probe.question.format(key=key), probe.lead.format(key=key)
        story.items.append(Item(key, (group,), *ask, value, None))
        story.statements.append(Statement(probe.fact.format(key=key, value=value), group, group < probe.first))
    return story


def _chains(probe: ChainsProbe, rng: np.random.Generator) -> ItemStory:
    story = ItemStory(probe.choices)
    letters = list("ABCDEFGHJKLMNPQRSTUVWXYZ")
    names: set[str] = set()
    while len(names) < probe.chains * (probe.hops + 1):
        names.add("".join(rng.choice(letters, size=3)))
    pool = [str(n) for n in rng.permutation(sorted(names))]
    values = [str(v) for v in rng.permutation(probe.values)]
    for group in range(probe.chains):
        chain = [pool.pop() for _ in range(probe.hops + 1)]
        first = group < probe.first
        at = len(story.statements)
        story.statements.append(Statement(probe.start.format(name=chain[0], value=values[group]), group, first))
        for previous, name in pairwise(chain):
            story.statements.append(Statement(probe.link.format(name=name, previous=previous), group, first))
        ask = probe.question.format(name=chain[-1]), probe.lead.format(name=chain[-1])
        spots = tuple(range(at, len(story.statements)))
        story.items.append(Item(f"chain{group}", spots, *ask, values[group], None))
    return story


def _counts(probe: CountsProbe, rng: np.random.Generator) -> CountStory:
    """Half of a theme's mentions are of its winner; of every four in a row, two are."""
    story = CountStory(probe)
    sequences = []
    for theme in probe.themes:
        words = [str(w) for w in rng.permutation(theme.words)]
        winner, others = words[0], words[1:]
        sequence: list[str] = []
        while len(sequence) < probe.mentions:
            rest = [others[(len(sequence) // 2 + j) % len(others)] for j in range(2)]
            four = [winner, winner, *rest]
            sequence += [four[int(i)] for i in rng.permutation(4)]
        sequences.append(sequence[: probe.mentions])
    group = 0
    for turn in range(probe.mentions):
        for k in rng.permutation(len(probe.themes)):
            word = sequences[int(k)][turn]
            text = probe.themes[int(k)].fact.format(answer=word)
            story.statements.append(Statement(text, group, turn < probe.first))
            story.mentions.append((int(k), word))
            group += 1
    return story
