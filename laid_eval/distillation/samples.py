"""What is read in training: texts in tokens with the tokens that are labels, each a pure function of its number.

So a resumed run, or one on other numbers of processes, reads what it would have read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from laid_eval.distillation.prose import check_disjoint, evaluation_facts, training_corpus
from laid_eval.distillation.recipe import Data
from laid_eval.distillation.stretch import stretched
from laid_eval.errors import UserError
from laid_eval.models.frame import Branch, Frame
from laid_eval.resources import bundled, content_hash, declared_names
from laid_eval.window.haystack import Corpus, build
from laid_eval.window.probes import Probe, load_probe, probe_names
from laid_eval.window.questions import Question, draw_story

_LEAST_TEXT = 64  # tokens of haystack, however long the questions are
_ATTEMPTS, _APART = 10, 10**9  # texts tried in place of one without a question, and their numbers' distance
_TOKENS_A_FACT = 48  # at most one fact in so many tokens, or there is no haystack
_MARK, _NEXT = "@@FIRST@@", "@@NEXT@@"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a sample shows, and where it stands among the tokens."""

    inputs: dict[str, Tensor]
    """`pixel_values` and whatever else the model's vision side is given."""
    places: NDArray[np.int64]
    """(N,) picture that a token belongs to, counted from 1; 0 before the first, one more than there are: questions."""
    branches: NDArray[np.int64]
    """(N,) number of the question that a token belongs to, counted from 1; 0: of what all of them see."""
    needles: tuple[int, ...]
    """Picture that tells each label, as in `places`."""


@dataclass(frozen=True)
class Sample:
    """One text, or one haystack of pictures with questions that don't see each other."""

    id: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    """Indices of the tokens that are to be predicted, ascending, none the first."""
    positions: NDArray[np.int64]
    """(N,) position ids, or (A, N) by axis (M-RoPE)."""
    shown: Shown | None = None


Samples = Callable[[int], Sample]
"""Sample number 0, 1, ..., without end."""


@dataclass(frozen=True)
class Source:
    """Where samples come from."""

    samples: Samples
    name: str
    """For the record, with a hash of the content."""
    notes: tuple[str, ...] = ()
    examples: tuple[Sample, ...] = ()
    """Haystacks of the most pictures, at the model's own positions; none of them is trained on."""


def open_source(data: Data, frame: Frame, seed: int) -> Source:
    """The samples that a recipe asks for.

    Raises:
        UserError: Unknown source, a damaged file, or content that is asked in evaluation too.
    """
    notes: tuple[str, ...] = ()
    if data.source == "prose":
        corpus = training_corpus()
        draw, name = _prose(corpus, frame, data, seed), f"prose:{corpus.hash}"
    elif data.source.endswith(".jsonl"):
        texts, notes = read_texts(Path(data.source), frame, data.lengths[1])
        digest = hashlib.sha256(Path(data.source).read_bytes()).hexdigest()[:16]
        draw, name = _shuffled(texts, seed), f"{Path(data.source).name}:{digest}"
    else:
        probe = training_probe(data.source)
        corpus = training_corpus()
        draw, name = _asked(probe, corpus, frame, data, seed), f"{probe.name}:{content_hash(probe)}:{corpus.hash}"
    if data.stretch is None:
        return Source(draw, name, notes)
    reach = data.stretch

    def far(number: int) -> Sample:
        sample = draw(number)
        rng = np.random.default_rng([seed, 37, number])
        return Sample(sample.id, sample.tokens, sample.labels, stretched(sample.positions, reach, rng))

    return Source(far, name, notes)


def training_probe(name: str) -> Probe:
    """A bundled training probe by name, or a probe file that shares nothing with the evaluation's.

    Raises:
        UserError: There is none, or it is one of the evaluation's.
    """
    known = declared_names("training")
    if name in known:
        probe = load_probe(str(bundled("training") / f"{name}.toml"))
    elif name in probe_names():
        raise UserError(
            f"Probe {name!r} is asked in evaluation; training on it would make its window worthless. Allowed: "
            f"{', '.join(known)}, prose, a probe file (.toml) or texts (.jsonl)."
        )
    elif name.endswith(".toml"):
        probe = load_probe(name)
    else:
        raise UserError(
            f"Unknown training data {name!r}. Allowed: {', '.join(known)}, prose, a probe file (.toml) or texts "
            "(.jsonl)."
        )
    check_disjoint(probe)
    return probe


def read_texts(file: Path, frame: Frame, longest: int) -> tuple[list[Sample], tuple[str, ...]]:
    """Conversations (`{"messages": [{"role", "content"}, ...]}`) or texts (`{"text": ...}`), one JSON document a line.

    Labels are the assistant's words, or all of a plain text but its first token. Texts above `longest` tokens are
    left out, and a note says how many.

    Raises:
        UserError: Names the line that can't be used, or that holds a fact of the evaluation; or none is short enough.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"Training data '{file}' can't be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"Training data '{file}' is not UTF-8 text. Convert it first.") from None
    out, left = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            tokens, labels = _tokenized(document, frame)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"Training data '{file}', line {number}, can't be used ({error}). Wanted is "
                '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} or {"text": "..."}.'
            ) from None
        said = " ".join(" ".join(_said(document)).split())
        for probe, fact in evaluation_facts():
            if fact in said:
                raise UserError(
                    f"Training data '{file}', line {number}, holds a fact that probe {probe!r} asks in evaluation "
                    f"({fact!r} ...). Take it out: its window would be of things learned by heart."
                )
        if len(tokens) > longest:
            left += 1
        elif labels:
            out.append(Sample(f"line {number}", tuple(tokens), tuple(labels), np.arange(len(tokens))))
    if not out and not left:
        raise UserError(f"Training data '{file}' holds no text with labels; conversations need words of the assistant.")
    if not out:
        raise UserError(
            f"Training data '{file}' holds no text with labels of at most {longest} tokens ({left} are longer). Set "
            "data.lengths higher, or shorten the texts."
        )
    note = f"{left} of {left + len(out)} texts in {file.name} have more than {longest:,} tokens and are left out"
    return out, (note,) if left else ()


def _tokenized(document: dict[str, Any], frame: Frame) -> tuple[list[int], list[int]]:
    if not all(isinstance(text, str) for text in _said(document)):
        raise TypeError("contents must be texts")
    if "text" in document:
        tokens = [*frame.start(), *frame.tokenizer(document["text"], add_special_tokens=False).input_ids]
        return tokens, list(range(1, len(tokens)))
    messages = [{"role": m["role"], "content": m["content"]} for m in document["messages"]]
    if frame.before is None:
        raise ValueError("conversations need a tokenizer with a chat template")
    whole = _rendered(frame, messages, False)
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _shared(whole, _rendered(frame, messages[:turn], True))
            end = _shared(whole, _rendered(frame, messages[: turn + 1], False))
            labels += range(max(start, 1), end)
    return whole, labels


def _said(document: dict[str, Any]) -> list[Any]:
    return [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]


def _rendered(frame: Frame, messages: Sequence[dict[str, str]], ask: bool) -> list[int]:
    text = frame.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    return list(frame.tokenizer(text, add_special_tokens=False).input_ids)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _shuffled(texts: Sequence[Sample], seed: int) -> Samples:
    """All texts in random order, then all again in another."""

    def draw(number: int) -> Sample:
        epoch, place = divmod(number, len(texts))
        order = np.random.default_rng([seed, 31, epoch]).permutation(len(texts))
        return texts[int(order[place])]

    return draw


def _length(data: Data, rng: np.random.Generator) -> int:
    """Evenly drawn in octaves, so that short texts are met as often as long ones."""
    return round(float(np.exp(rng.uniform(*np.log(data.lengths)))))


def _prose(corpus: Corpus, frame: Frame, data: Data, seed: int) -> Samples:
    """Docstrings one after the other; every token but the first is a label."""
    encode = lru_cache(maxsize=100_000)(frame.continuation)

    def draw(number: int) -> Sample:
        rng = np.random.default_rng([seed, 29, number])
        length = _length(data, rng)
        tokens = frame.start()
        for sentence in corpus.stream(rng):
            if len(tokens) >= length:
                break
            tokens += encode(" " + sentence)
        return Sample(f"prose/{number}", tuple(tokens[:length]), tuple(range(1, length)), np.arange(length))

    return draw


def _asked(probe: Probe, corpus: Corpus, frame: Frame, data: Data, seed: int) -> Samples:
    """A haystack with facts, then questions with their answers, one turn after the other."""
    encode = lru_cache(maxsize=100_000)(frame.continuation)
    between = _between(frame)

    def branch_of(question: Question, later: bool) -> Branch:
        told = between if later else ""
        return frame.branch(question.prompt, question.lead, question.choices, told=told)

    def draw(number: int) -> Sample:
        rng = np.random.default_rng([seed, 23, number])
        length = _length(data, rng)
        story = draw_story(probe, rng)
        opening = frame.opening(probe.instruction)
        groups = sorted({statement.group for statement in story.statements})
        kept = rng.permutation(groups)[: max(length // _TOKENS_A_FACT, 2)]
        places = [i for i, statement in enumerate(story.statements) if statement.group in kept]
        # All of them "first": spread evenly over the whole text.
        planted = [replace(story.statements[i], first=True) for i in places]
        room = len(opening)
        turns: list[Question] = []
        asked = story.questions(places, rng)
        for i in rng.permutation(len(asked))[: data.questions]:
            question = asked[int(i)]
            more = branch_of(question, bool(turns)).longest
            if turns and room + more > length / 2:
                break  # the questions would leave no haystack
            room += more
            turns.append(question)
        text = build(corpus, planted, [max(length - room, _LEAST_TEXT)], encode, rng)
        # what found no room in the text can't be asked
        stated = {q.item for q in story.questions([places[i] for i in text.read(len(text.tokens))], rng)}
        tokens = [*opening, *text.tokens]
        labels: list[int] = []
        for question in (q for q in turns if q.item in stated):
            branch = branch_of(question, bool(labels))
            ending = branch.endings[question.answer]
            tokens += branch.stem
            labels += range(len(tokens), len(tokens) + len(ending))
            tokens += ending
        return Sample(f"{probe.name}/{number}", tuple(tokens), tuple(labels), np.arange(len(tokens)))

    def with_labels(number: int) -> Sample:
        for attempt in range(_ATTEMPTS):
            sample = draw(number + attempt * _APART)
            if sample.labels and len(sample.tokens) <= data.lengths[1]:
                return sample
        raise UserError(
            f"Texts of {data.lengths[0]:,} tokens have no room for the facts of probe {probe.name!r}. Set data.lengths "
            "higher."
        )

    return with_labels


def _between(frame: Frame) -> str:
    """What the chat template puts between an answer and the next question."""
    if frame.before is None:
        return ""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _MARK},
        {"role": "user", "content": _NEXT},
    ]
    text = str(frame.tokenizer.apply_chat_template(messages, tokenize=False))
    return text.partition(_MARK)[2].partition(_NEXT)[0]
