import os

# isort: off
import laid_eval  # noqa: F401  # before transformers: it mends torchvision where that is needed

# isort: on

import pytest

# No test asks a hub for anything: what is not on this machine is not there.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, in float32."""
    from laid_eval.models.load import describe, load
    from laid_eval.models.source import resolve

    return load(describe(resolve("smollm2"), device="cpu"))


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs a command within this process (a new one spends most of its time importing torch): exit code, stdout, stderr."""
    import subprocess
    import sys

    from laid_eval.cli import main

    def run(*words, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["laid-eval", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, printed.out, printed.err)

    return run
