"""Visual Haystacks as published (Wu et al., 2024, arXiv 2407.13766): its JSON, its prompt, its orders of images.

A case is a question about the pictures that have one object (the needles, `pos_image`) among others (`neg_image`),
answered yes or no. The protocol is that of github.com/visual-haystacks/vhs_benchmark (`solvers/base_solver.py`,
`utils.py`), but for its dice: there orders are drawn without a seed and answers sampled as the checkpoint says; here
orders follow from a seed and answers are greedy.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from laid_eval.errors import UserError
from laid_eval.records import Unit
from laid_eval.window.picture_files import PictureFolder
from laid_eval.window.pictures import YES_NO
from laid_eval.window.probes import Declared
from laid_eval.window.questions import Question

PROMPT = "You are given a set of images. Please answer the following question in Yes or No: "
ANSWER_TOKENS = 128
"""Most tokens of a free answer."""
Protocol = Literal["seeded", "published"]
_NAMED = 5  # missing pictures


class _Turn(BaseModel):
    value: str


class _Entry(BaseModel):
    """A case in the file; it may hold more."""

    id: int | str
    conversations: Annotated[tuple[_Turn, ...], Field(min_length=2)]
    pos_image: Annotated[tuple[str, ...], Field(min_length=1)]
    neg_image: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A question of the data set with its pictures, named as in the file."""

    number: int
    """Among all that were loaded."""
    id: str
    """The data set's own; each file has its own numbering."""
    haystack: int
    """Cases that ask the same about the same needles, among other pictures, are one cluster."""
    question: str
    answer: str
    """`yes` or `no`."""
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    @property
    def length(self) -> int:
        """Images."""
        return len(self.positive) + len(self.negative)


@dataclass(frozen=True)
class View:
    """A case with its pictures in one order."""

    case: Case
    pictures: tuple[str, ...]
    needle: int
    """Index of the earliest needle."""
    name: str

    @property
    def question(self) -> Question:
        """As it is put to a model."""
        answer = ("yes", "no").index(self.case.answer)
        return Question(self.name, PROMPT + self.case.question, "", YES_NO, answer, self.needle)

    @property
    def depth(self) -> float:
        """Of the earliest needle, 0 = start, 1 = end."""
        return (self.needle + 0.5) / len(self.pictures)


class DatasetProbe(Declared):
    """The question of a data set, with its cases; made by `visual_haystacks`."""

    protocol: Protocol
    """`seeded`: forced choice by log-probability. `published`: free answers, scored as published."""
    positions: bool
    """Each case several times, its needle at places over the whole length."""
    prompt: str = PROMPT
    source: Annotated[str, Field(exclude=True)]
    """Names of the files."""
    cases: Annotated[tuple[Case, ...], Field(exclude=True)]
    folder: Annotated[PictureFolder, Field(exclude=True)]
    notes: Annotated[tuple[str, ...], Field(exclude=True)] = ()

    @property
    def unit(self) -> Unit:
        """Pictures."""
        return "images"

    @property
    def longest(self) -> int:
        """Most images of a case."""
        return max(case.length for case in self.cases)

    @property
    def hash(self) -> str:
        """Of all cases, so of what was left out too, and of their pictures' sizes: another folder shows."""
        sizes = [self.folder.size(name) for case in self.cases for name in (*case.positive, *case.negative)]
        return hashlib.sha256(repr((self.cases, sizes)).encode()).hexdigest()[:16]

    def up_to(self, images: int) -> DatasetProbe:
        """Without the cases of more images.

        Raises:
            UserError: None is left.
        """
        kept = tuple(case for case in self.cases if case.length <= images)
        if not kept:
            shortest = min(case.length for case in self.cases)
            raise UserError(
                f"--max-length {images} leaves no case of {self.source}: the shortest has {shortest} images."
            )
        return self.model_copy(update={"cases": kept})

    def views(self, seed: int) -> Iterator[View]:
        """Every case in every order it is shown in; cases of all files take turns."""
        for case in self.cases:
            if self.positions:
                for at in needle_places(case.length):
                    shown = (*case.negative[:at], *case.positive, *case.negative[at:])
                    yield View(case, shown, at, f"{case.id}#{case.number}@{at}")
            else:
                both = (*case.positive, *case.negative)
                order = np.random.default_rng([seed, zlib.crc32(case.id.encode())]).permutation(len(both))
                first = int(np.flatnonzero(order < len(case.positive))[0])
                yield View(case, tuple(both[i] for i in order), first, f"{case.id}#{case.number}")

    def cost(self, tokens: Callable[[int, int], int]) -> tuple[int, int]:
        """Tokens of an image in the longest haystack, on average and rounded up, and of all that is shown.

        Args:
            tokens: What a picture of so many pixels takes.
        """
        most = total = 0
        for case in self.cases:
            taken = sum(tokens(*self.folder.size(name)) for name in (*case.positive, *case.negative))
            total += taken * (len(needle_places(case.length)) if self.positions else 1)
            if case.length == self.longest:
                most = max(most, taken)
        each = -(-most // self.longest)
        return each, max(total, each * self.longest)


def needle_places(images: int) -> list[int]:
    """Where the published position experiment puts the needle: about ten places from the start on.

    >>> needle_places(3), needle_places(50)
    ([0, 1, 2], [0, 5, 10, 15, 20, 25, 30, 35, 40, 45])
    """
    return list(range(0, images, max(images // 10, 1)))


def visual_haystacks(
    files: Sequence[str | Path],
    images: str | Path,
    protocol: str = "seeded",
    positions: bool = False,
    allow_missing: bool = False,
    questions: int | None = None,
) -> DatasetProbe:
    """Load the data set, to be given to `measure_window` as its probe.

    Args:
        files: `visual_haystack_*.json`, any of them.
        images: The folder that holds `train2017` and `val2017` of COCO.
        protocol: `seeded` or `published`; see `DatasetProbe`. Orders follow from the seed of the measurement in both.
        positions: The position experiment, for cases with one needle.
        allow_missing: Leave cases out whose pictures are not there.
        questions: So many cases of each file, from its start; all by default.

    Raises:
        UserError: Anything the user can mend; names file, case and field, or the picture.
    """
    if protocol not in get_args(Protocol):
        raise UserError(f"Unknown --protocol {protocol!r}. Allowed: {', '.join(get_args(Protocol))}.")
    if questions is not None and questions < 1:
        raise UserError(f"--questions must be at least 1, got {questions}.")
    if not files:
        raise UserError("No file of the data set is given; give visual_haystack_*.json, any of them.")
    folder = PictureFolder(Path(images))
    read = [_entries(Path(file))[:questions] for file in files]
    if positions:
        for file, entries in zip(files, read, strict=True):
            _check_single(Path(file), entries)
    # In turns, so that a run that was stopped has something of every length.
    turns = [entries[k] for k in range(max(map(len, read))) for entries in read if k < len(entries)]
    kept, notes = _with_pictures(turns, folder, allow_missing)
    yes = sum(entry.conversations[1].value == "yes" for entry in kept)
    notes.append(f"the right answer is yes in {yes} of {len(kept)} cases")
    return DatasetProbe(
        name=f"visual-haystacks-{protocol}{'-positions' if positions else ''}",
        summary="the published Visual Haystacks: yes or no (chance 1/2)",
        instruction="",
        choices=2,
        protocol=cast(Protocol, protocol),
        positions=positions,
        source=", ".join(Path(file).name for file in files),
        cases=_cases(kept),
        folder=folder,
        notes=tuple(notes),
    )


def _entries(path: Path) -> list[_Entry]:
    what = f"Data set '{path}'"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} can't be read: {error.strerror}. Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}.") from None
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half a character (a lone surrogate), which no text can.") from None
    if not isinstance(content, list) or not content:
        raise UserError(f"{what} holds no list of cases. Expected is a visual_haystack_*.json of Visual Haystacks.")
    return [_entry(f"{what}, case {k}", one) for k, one in enumerate(content, start=1)]


def _entry(what: str, content: Any) -> _Entry:
    try:
        entry = _Entry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}"
        raise UserError(f"{what}: {f'field {field!r}' if field else 'it'} {problem}.") from None
    answer = entry.conversations[1].value
    if answer not in ("yes", "no"):
        raise UserError(f"{what}: field 'conversations.1.value' must be 'yes' or 'no', got {answer[:40]!r}.")
    return entry


def _check_single(path: Path, entries: Sequence[_Entry]) -> None:
    for k, entry in enumerate(entries, start=1):
        if len(entry.pos_image) != 1:
            raise UserError(
                f"--positions moves one needle; case {k} of '{path}' has {len(entry.pos_image)}. "
                "Give files of single_needle."
            )


def _with_pictures(
    entries: Sequence[_Entry], folder: PictureFolder, allow_missing: bool
) -> tuple[list[_Entry], list[str]]:
    """The cases whose pictures are there and can be opened, and what to tell of the others."""
    names = dict.fromkeys(name for entry in entries for name in (*entry.pos_image, *entry.neg_image))
    missing = {name for name in names if folder.find(name) is None}
    kept = [entry for entry in entries if missing.isdisjoint((*entry.pos_image, *entry.neg_image))]
    if missing:
        few = sorted(missing)[:_NAMED]
        more = f" and {len(missing) - len(few)} more" if len(missing) > len(few) else ""
        lost = f"{len(missing)} of {len(names)} pictures ({', '.join(few)}{more})"
        cases = f"{len(entries) - len(kept)} of {len(entries)} cases"
        if not allow_missing or not kept:
            mend = " Or leave these cases out: --allow-missing." if kept else ""
            raise UserError(
                f"{lost} are not under --images '{folder.root}'; {cases} need them. Get them from COCO's train2017 and "
                f"val2017.{mend}"
            )
        notes = [f"{cases} were left out: {lost} are missing"]
    else:
        notes = []
    for name in names:
        if name not in missing:
            folder.size(name)  # refuses what can't be read, before anything is loaded
    return kept, notes


def _cases(entries: Sequence[_Entry]) -> tuple[Case, ...]:
    clusters: dict[tuple[str, tuple[str, ...]], int] = {}
    out = []
    for number, entry in enumerate(entries):
        question, answer = (turn.value for turn in entry.conversations[:2])
        haystack = clusters.setdefault((question, entry.pos_image), len(clusters))
        out.append(Case(number, str(entry.id), haystack, question, answer, entry.pos_image, entry.neg_image))
    return tuple(out)
