"""Rules of the gate: what they look like, and where they are read from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from laid_eval.errors import UserError, nearest
from laid_eval.resources import read_declaration

Subject = Literal["window", "score", "spectrum", "cost"]
Relation = Literal[">=", "<=", "drop"]

UNITS: dict[tuple[str, str], tuple[str, ...]] = {
    ("window", ">="): ("tokens", "images"),
    ("window", "drop"): ("octave",),
    ("score", ">="): ("points",),
    ("score", "drop"): ("points",),
    ("spectrum", ">="): (),
    ("spectrum", "<="): (),
    ("cost", "<="): (),
}
"""What may be asked of what, and the unit a number may carry (points: hundredths of a score)."""
EXAMPLES = {
    "window": "window.needle >= 8000, window.* drop <= 0.25 octave",
    "score": "score.laid_needle >= 60 points, score.laid_needle drop <= 2 points",
    "spectrum": "spectrum.low_frequency_preservation >= 0.9",
    "cost": "cost.prefill_tokens <= 100000",
}
_FORM = re.compile(
    r"(?P<subject>\w+)\.(?P<name>[^\s@<>=]+)(?:@(?P<criterion>[^\s<>=]+))?"
    r"\s*(?P<relation>[a-z]*\s*[<>=]+)\s*(?P<number>[^\s<>=]+)(?:\s+(?P<unit>\S+))?"
)
_RELATIONS: dict[str, Relation] = {">=": ">=", "<=": "<=", "drop<=": "drop"}
_ANY = "; ".join(EXAMPLES.values())


@dataclass(frozen=True)
class Rule:
    """`SUBJECT.NAME[@CRITERION] RELATION LIMIT [UNIT]`."""

    text: str
    """As written; of a `*` with the name it was filled with."""
    subject: Subject
    name: str
    """Of a probe, a task, a measure or a field of the cost; `*` stands for all."""
    relation: Relation
    limit: float
    """Of a window in tokens or images, of its drop in octaves; of scores 0..1."""
    criterion: str | None = None
    """Of a window; `None`: the one the run was measured for."""
    unit: str | None = None

    @property
    def needs_baseline(self) -> bool:
        """Whether it compares with another run."""
        return self.relation == "drop"


def parse_rule(text: str) -> Rule:
    """Read a rule.

    >>> parse_rule("score.laid_needle drop <= 2 points").limit
    0.02
    >>> parse_rule("window.needle@half >= 8,000").criterion
    'half'

    Raises:
        UserError: It is no rule; says which part is wrong and what is allowed.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UserError(f"Rule {text!r} is not understood. A rule reads like: {_ANY}.")
    subject, name, criterion = found["subject"], found["name"], found["criterion"]
    if subject not in EXAMPLES:
        allowed = ", ".join(EXAMPLES)
        raise UserError(f"Rule {text!r}: {subject!r} is unknown{nearest(subject, EXAMPLES)}. Allowed: {allowed}.")
    relation = _RELATIONS.get("".join(found["relation"].split()))
    if relation is None or (subject, relation) not in UNITS:
        raise UserError(
            f"Rule {text!r}: {found['relation']!r} can't be asked of a {subject}. Try: {EXAMPLES[subject]}."
        )
    units = UNITS[subject, relation]
    unit = _unit(text, found["unit"], units)
    if criterion is not None and subject != "window":
        raise UserError(f"Rule {text!r}: only a window has a criterion ('@{criterion}').")
    limit = _number(text, found["number"])
    if subject == "score" and (unit == "points" or relation == "drop"):
        limit /= 100
    if relation == "drop" and limit == 0:
        raise UserError(f"Rule {text!r}: no number of questions can show a drop of exactly 0; allow some, e.g. 0.5.")
    if subject == "score" and not 0 < limit < 1:
        raise UserError(f"Rule {text!r}: a score lies between 0 and 1 (0 and 100 points), and so must the limit.")
    if (subject, relation) == ("window", ">=") and limit < 1:
        raise UserError(f"Rule {text!r}: a window is at least 1 long, and so must the limit be.")
    return Rule(" ".join(text.split()), subject, name, relation, limit, criterion, unit)  # type: ignore[arg-type]


def _unit(text: str, given: str | None, units: tuple[str, ...]) -> str | None:
    if given is None:
        return None
    for unit in units:
        if given.rstrip("s") == unit.rstrip("s"):
            return unit
    allowed = f"write {' or '.join(units)}, or nothing" if units else "this rule takes none"
    raise UserError(f"Rule {text!r}: unit {given!r} is unknown{nearest(given, units)}; {allowed}.")


def _number(text: str, given: str) -> float:
    try:
        number = float(given.replace(",", "").replace("_", ""))
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise UserError(f"Rule {text!r}: the limit must be a number of 0 or more, got {given!r}.")
    return number


class Declared(BaseModel):
    """The table `[gate]` of a suite, or `[tool.laid-eval.gate]` of a `pyproject.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[str, ...] = Field(min_length=1)
    baseline: str | None = None
    """Run folder, relative to the file."""
    alpha: float = Field(default=0.05, gt=0, le=0.5)


def read_rules(path: Path) -> Declared:
    """Rules of a TOML file.

    Raises:
        UserError: It can't be read, has no such table, or an unknown key.
    """
    where, table = _table(path)
    if not isinstance(table, dict):
        raise UserError(f"Rules file '{path}' has no table {where}; it reads like: {where} rules = [\"{_first()}\"]")
    try:
        return Declared.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = nearest(key, Declared.model_fields) if first["type"] == "extra_forbidden" else ""
        allowed = ", ".join(Declared.model_fields)
        raise UserError(f"Rules file '{path}', {where}: {key!r}: {first['msg']}{hint}. Keys: {allowed}.") from None


def has_rules(path: Path) -> bool:
    """Whether a project declares rules of its own."""
    return path.is_file() and _table(path)[1] is not None


def _table(path: Path) -> tuple[str, Any]:
    """What the table is called in such a file, and the table."""
    document = read_declaration(path, f"Rules file '{path}'")
    if path.name != "pyproject.toml":
        return "[gate]", document.get("gate")
    return "[tool.laid-eval.gate]", document.get("tool", {}).get("laid-eval", {}).get("gate")


def _first() -> str:
    return EXAMPLES["window"].split(", ")[1]


def expand(rules: Sequence[Rule], names: dict[str, list[str]]) -> list[Rule]:
    """Fill in `*` by all names of that subject, in order; each rule once.

    Raises:
        UserError: Nothing to fill in.
    """
    out: list[Rule] = []
    for rule in rules:
        if rule.name != "*":
            out.append(rule)
            continue
        if not names.get(rule.subject):
            raise UserError(f"Rule {rule.text!r}: the run holds no {rule.subject} that '*' could stand for.")
        filled: list[dict[str, Any]] = [
            {"name": name, "text": rule.text.replace(".*", f".{name}", 1)} for name in names[rule.subject]
        ]
        out += [Rule(**{**vars(rule), **one}) for one in filled]
    return list(dict.fromkeys(out))
