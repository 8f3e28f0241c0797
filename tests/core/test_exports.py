"""The core is torch and nothing else, and its public names are there."""

import ast
import sys
from pathlib import Path

import laid_eval.core

CORE = Path(laid_eval.core.__file__).parent


def test_the_promised_names_are_exported():
    promised = {"RopeGain", "fold_gain", "octave_matching", "HeadMixer", "qk_alignment", "shared_vocab_kl"}
    assert promised <= set(laid_eval.core.__all__)
    assert sorted(laid_eval.core.__all__) == laid_eval.core.__all__
    for name in laid_eval.core.__all__:
        assert getattr(laid_eval.core, name).__doc__


def test_it_can_be_lifted_into_another_trainer():
    for path in CORE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                own = name.startswith("laid_eval.core")
                assert own or name.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path.name} imports {name}"
