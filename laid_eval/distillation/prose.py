"""Text to train on that is never read in evaluation, and the check that it is so.

Evaluation reads the language reference that ships with Python; training reads the docstrings of the standard library,
less the few sentences that stand in both. Facts to train on come from probes of their own.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.window.haystack import Corpus, load_corpus, sentences
from laid_eval.window.probes import Probe, load_probe, probe_names

_SHORTEST = 200  # characters of a docstring; shorter ones are no prose


@cache
def training_corpus() -> Corpus:
    """Docstrings of the standard library as sections of sentences, none of which is in the evaluation's text."""
    read = {s for section in load_corpus().sections for s in section}
    sections = []
    for text in _docstrings():
        kept = tuple(s for s in sentences(text) if s not in read and len(s.split()) > 2)
        if kept:
            sections.append(kept)
    digest = hashlib.sha256("\0".join(" ".join(section) for section in sections).encode()).hexdigest()[:16]
    return Corpus("python-docstrings", digest, tuple(sections), shuffled=True)


def check_disjoint(probe: Probe) -> None:
    """A probe to train on must share no fact, question or answer with what is asked in evaluation.

    Raises:
        UserError: Names the probe of the evaluation and the text.
    """
    own = _texts(probe)
    for name in probe_names():
        shared = own & _texts(load_probe(name))
        if shared:
            raise UserError(
                f"Training probe {probe.name!r} shares {min(shared)!r} with probe {name!r} of the evaluation: a window "
                "measured afterwards would be of things learned by heart. Use other facts and answers."
            )


@cache
def evaluation_facts() -> tuple[tuple[str, str], ...]:
    """(probe, beginning of a fact) of every fact that evaluation plants, long enough to be told apart."""
    found = []
    for name in probe_names():
        for fact in _facts(load_probe(name)):
            start = fact.split("{")[0].strip()
            if len(start) >= 16:
                found.append((name, start))
    return tuple(found)


def _docstrings() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                prose = re.sub(r"(?m)^\s*(>>>|\.\.\.).*$", "", text)  # examples are no prose
                if len(prose) >= _SHORTEST:
                    yield prose


def _facts(probe: Probe) -> set[str]:
    """Statements of a probe, placeholders and all."""
    content = probe.model_dump()
    kinds = [*content.get("kinds", ()), *content.get("themes", ()), content]
    return {kind[field] for kind in kinds for field in ("fact", "start", "link") if kind.get(field)}


def _texts(probe: Probe) -> set[str]:
    """All that could be learned by heart: facts, questions, answers."""
    content = probe.model_dump()
    found = _facts(probe)
    for kind in (*content.get("kinds", ()), *content.get("themes", ()), content):
        found |= {kind["question"]} if kind.get("question") else set()
        for field in ("answers", "values", "keys", "words"):
            found |= set(kind.get(field) or ())
    return found
