"""Probes: the kinds of question put to a model, declared in TOML.

A bundled probe is named (`needle`); one of your own is a path to a TOML file. The text of a probe is data; the
five shapes of task below are all the code knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from laid_eval.errors import UserError, nearest
from laid_eval.records import Unit
from laid_eval.resources import bundled, declared_names, read_declaration


class Declared(BaseModel):
    """Fields common to all probes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    summary: str
    """One line for `laid-eval probes`."""
    instruction: str
    """Said before the haystack."""
    choices: Annotated[int, Field(ge=2, le=26)] = 8
    """Choices per question; chance is one over this."""

    @property
    def unit(self) -> Unit:
        """What lengths are counted in."""
        return "tokens"


class TextProbe(Declared):
    """Fields common to probes whose haystack is text."""

    min_length: Annotated[int, Field(ge=64)] = 256
    """Shortest context length asked, tokens. The base score is read off there."""
    first: Annotated[int, Field(ge=1)] = 3
    """Facts (keys, chains) planted before the first cut point; the rest follow over the whole length."""


class Kind(BaseModel):
    """One kind of fact: how it is stated, asked, and what the answer may be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fact: str
    """Statement with `{answer}` (and, where answers are shared, nothing else)."""
    question: str
    lead: str
    """Start of the answer; the choices continue it."""
    answers: tuple[str, ...] = ()


class FactsProbe(TextProbe):
    """Facts of different kinds; one question each."""

    task: Literal["facts"]
    kinds: tuple[Kind, ...]
    answers: tuple[str, ...] = ()
    """Answers shared by all kinds (each used once a haystack); then choices are answers stated so far."""

    @model_validator(mode="after")
    def _check(self) -> FactsProbe:
        if self.answers:
            _answers(self.answers, "answers", len(self.kinds))
            if self.first < self.choices:
                raise ValueError("with shared answers `first` must be at least `choices`")
        else:
            for kind in self.kinds:
                _answers(kind.answers, "kinds.answers", self.choices)
        if len(self.kinds) < self.first + self.choices // 2:
            raise ValueError(
                f"`kinds`: {len(self.kinds)} are too few; beside the `first` {self.first}, which lie at the start, at "
                f"least {self.choices // 2} more are needed to reach all depths"
            )
        _placeholders((kind.fact for kind in self.kinds), "fact", {"answer"})
        return self


class KeysProbe(TextProbe):
    """Facts that share one relation: key -> value."""

    task: Literal["keys"]
    fact: str
    question: str
    lead: str
    keys: tuple[str, ...]
    values: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> KeysProbe:
        _answers(self.values, "values", len(self.keys))
        if len(set(self.keys)) < len(self.keys):
            raise ValueError("`keys` must all be different")
        if not self.choices <= self.first <= len(self.keys):
            raise ValueError("`first` must lie between `choices` and the number of keys")
        _placeholders([self.fact], "fact", {"key", "value"})
        _placeholders([self.question], "question", {"key"})
        return self


class ChainsProbe(TextProbe):
    """Chains of variables: the first holds a value, each next one equals the one before."""

    task: Literal["chains"]
    hops: Annotated[int, Field(ge=1, le=8)] = 2
    """Links between the value and the variable asked for."""
    chains: Annotated[int, Field(ge=2)] = 12
    """Chains in one haystack."""
    start: str
    """Statement with `{name}` and `{value}`."""
    link: str
    """Statement with `{name}` and `{previous}`."""
    question: str
    lead: str
    values: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> ChainsProbe:
        _answers(self.values, "values", self.chains)
        if not self.choices <= self.first <= self.chains:
            raise ValueError("`first` must lie between `choices` and `chains`")
        _placeholders([self.start], "start", {"name", "value"})
        _placeholders([self.link], "link", {"name", "previous"})
        _placeholders([self.question], "question", {"name"})
        return self


class Theme(BaseModel):
    """One thing that is mentioned several times with different words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fact: str
    question: str
    lead: str
    words: tuple[str, ...]


class CountsProbe(TextProbe):
    """Which word occurs most: the answer is spread over the whole context."""

    task: Literal["counts"]
    themes: tuple[Theme, ...]
    mentions: Annotated[int, Field(ge=8)] = 20
    """Mentions per theme in one haystack; about half are of the commonest word."""

    @model_validator(mode="after")
    def _check(self) -> CountsProbe:
        if not self.themes:
            raise ValueError("`themes` must hold at least one")
        for theme in self.themes:
            _answers(theme.words, "themes.words", max(self.choices, 4))
        _placeholders((theme.fact for theme in self.themes), "fact", {"answer"})
        return self


class ScenesProbe(Declared):
    """Objects in pictures: what else is where a certain object is (after Visual Haystacks, arXiv 2407.13766).

    In every haystack some objects are anchors: each is in one picture only (in `needles` pictures).
    """

    task: Literal["scenes"]
    form: Literal["which", "is-there", "all", "any"]
    """`which`: which of several objects is there. `is-there`: yes or no. `all`, `any`: the same of several pictures."""
    question: str
    """With `{anchor}`; where yes or no is asked, with `{target}` too."""
    lead: str = ""
    """Start of the answer; a choice continues it. May name the `{anchor}`."""
    objects: tuple[str, ...]
    """Unicode names, lower case; one word each is read best."""
    needles: Annotated[int, Field(ge=1, le=3)] = 1
    """Pictures that an anchor is in."""
    anchors: Annotated[int, Field(ge=1)] = 12
    """Anchors of a haystack, each asked about."""
    per_image: Annotated[int, Field(ge=2, le=6)] = 3
    """Objects in a picture."""
    size: Annotated[int, Field(ge=32, le=2048)] = 224
    """Side of a picture, pixels."""
    min_length: Annotated[int, Field(ge=1)] = 1
    """Fewest pictures asked about. The base score is read off there."""

    @property
    def unit(self) -> Unit:
        """Pictures."""
        return "images"

    @model_validator(mode="after")
    def _check(self) -> ScenesProbe:
        which = self.form == "which"
        _answers(self.objects, "objects", self.anchors + self.choices + self.per_image)
        if not which and self.choices != 2:
            raise ValueError(f'`choices` must be 2 where `form` is "{self.form}": yes and no')
        if (self.form in ("all", "any")) != (self.needles > 1):
            raise ValueError('`needles` is 2 or 3 where `form` is "all" or "any", and 1 elsewhere')
        if self.min_length < self.needles:
            raise ValueError(
                "`min_length` must be at least `needles`: one anchor's pictures come before the first question"
            )
        _placeholders([self.question], "question", {"anchor"} if which else {"anchor", "target"})
        if "{" in self.lead:
            _placeholders([self.lead], "lead", {"anchor"} if which else set())
        return self


Probe = FactsProbe | KeysProbe | ChainsProbe | CountsProbe | ScenesProbe
_ADAPTER: TypeAdapter[Probe] = TypeAdapter(Annotated[Probe, Field(discriminator="task")])
_VARIANTS: dict[str, type[Declared]] = {
    "facts": FactsProbe,
    "keys": KeysProbe,
    "chains": ChainsProbe,
    "counts": CountsProbe,
    "scenes": ScenesProbe,
}


def _placeholders(texts: Iterable[str], field: str, names: set[str]) -> None:
    """Every text holds exactly these placeholders."""
    for text in texts:
        found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        if found != names:
            wanted = " and ".join("{" + name + "}" for name in sorted(names))
            raise ValueError(f"`{field}` must contain {wanted} and no other placeholder, got {text!r}")


def _answers(answers: Sequence[str], field: str, least: int) -> None:
    """Answers that can be told apart: enough, all different, none the start of another.

    A choice that starts another is never less probable than it, whatever the model knows.
    """
    for a in answers:
        if answers.count(a) > 1:
            raise ValueError(f"`{field}` holds {a!r} twice")
        for b in answers:
            if a != b and b.startswith(a):
                raise ValueError(f"`{field}` holds {a!r} and {b!r}; no answer may be the start of another")
    if len(answers) < least:
        raise ValueError(f"`{field}` needs at least {least} different answers, got {len(answers)}")


def probe_names() -> list[str]:
    """Names of the bundled probes."""
    return declared_names("probes")


def text_probe_names() -> list[str]:
    """Those whose haystack is text."""
    return [name for name in probe_names() if load_probe(name).unit == "tokens"]


def load_probe(name: str) -> Probe:
    """A probe by its name, or by the path of a TOML file.

    Raises:
        UserError: Unknown name, unreadable file, or a field that is wrong (named, with the nearest valid one).
    """
    path = Path(name)
    if path.is_file() and not name.endswith(".toml"):
        raise UserError(f"Probe file {name!r} must end in .toml.")
    if not name.endswith(".toml"):
        path = bundled("probes") / f"{name}.toml"
        if not path.is_file():
            names = probe_names()
            raise UserError(
                f"Unknown probe {name!r}{nearest(name, names)}. "
                f"Allowed: {', '.join(names)}, all, or the path of a .toml file."
            )
    content = read_declaration(path, f"Probe file {name!r}")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise UserError(f"Probe file {name!r}: {_explain(content, error)}") from None


def load_probes(names: Sequence[str]) -> list[Probe]:
    """Several probes of one unit; `all` stands for every bundled one about text."""
    wanted = [n for name in names for n in (text_probe_names() if name == "all" else [name])]
    probes = [load_probe(name) for name in dict.fromkeys(wanted)]
    if len({probe.unit for probe in probes}) > 1:
        text, visual = ([p.name for p in probes if p.unit == unit] for unit in ("tokens", "images"))
        raise UserError(
            f"Windows of {', '.join(text)} are counted in tokens, those of {', '.join(visual)} in images. Measure them "
            "in two runs."
        )
    seen = [probe.name for probe in probes]
    for name in seen:
        if seen.count(name) > 1:
            raise UserError(f"Two probes are called {name!r}; give each file's `name` once.")
    return probes


def _explain(content: dict[str, Any], error: ValidationError) -> str:
    """One line for the first problem pydantic found."""
    # A misspelt field shows twice, as one too many and as one missing; the first can be named.
    first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    where = [str(part) for part in first["loc"][1:]]  # the first part is the task
    field = ".".join(where)
    if first["type"] == "union_tag_not_found":
        return f"field 'task' is missing. Allowed: {', '.join(_VARIANTS)}."
    if first["type"] == "union_tag_invalid":
        given = str(content.get("task"))
        return f"unknown task {given!r}{nearest(given, _VARIANTS)}. Allowed: {', '.join(_VARIANTS)}."
    if first["type"] == "extra_forbidden":
        variant: type[BaseModel] = _VARIANTS[str(content["task"])]
        owner = variant if len(where) == 1 else Kind if where[0] == "kinds" else Theme
        allowed = list(owner.model_fields)
        return f"unknown field {field!r}{nearest(where[-1], allowed)}. Allowed: {', '.join(allowed)}."
    if first["type"] == "missing":
        return f"field {field!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    return f"field {field!r}: {message}." if field else f"{message}."
