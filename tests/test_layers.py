"""The house of DESIGN section 3: imports point one way, and the reading half needs no torch."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "laid_eval"
LAYERS = [
    {"core"},
    {"models"},
    {"window"},
    {"spectrum"},
    {"report", "distillation", "serving"},
    {"cli", "__main__"},
]
LEAVES = {"distillations", "records", "runs", "errors", "resources", "environment", "scores", "spectra"}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            bare = node.module == "laid_eval"
            yield from (f"laid_eval.{alias.name}" for alias in node.names) if bare else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _layer(part):
    return next(i for i, names in enumerate(LAYERS) if part in names)  # an unknown part has no place in the house


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in _imports(path):
        assert module.split(".")[0] not in {"probes", "benchmarks", "reports", "tests"}
        if not module.startswith("laid_eval."):
            continue
        other = module.split(".")[1]
        if own == "core":
            assert other == "core", f"{own} must import nothing of ours"
        elif own in LEAVES:
            assert other in LEAVES, f"leaf {own} imports {other}"
        elif own != "__init__" and other not in LEAVES:
            assert own == other or _layer(own) > _layer(other) or own == "__main__", f"{own} imports {other}"


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "tests", ROOT / "benchmarks"])
def test_no_file_is_called_util(folder):
    vague = {"util", "utils", "helper", "helpers", "manager", "common", "misc", "base"}
    assert not [p for p in folder.rglob("*.py") if p.stem in vague]


def _loaded_by(code):
    probe = f"import sys\n{code}\nprint(sorted(m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_help_loads_neither_torch_nor_matplotlib():
    code = """
import contextlib, io
from laid_eval.cli import app
for words in (["--help"], ["window", "--help"], ["probes"], ["models"]):
    with contextlib.redirect_stdout(io.StringIO()):
        app(words, standalone_mode=False)
"""
    assert _loaded_by(code) == "[]"


def test_reading_half_works_where_torch_is_not_installed(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')")
    (tmp_path / "transformers.py").write_text("raise ImportError('transformers is not installed here')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import laid_eval, matplotlib
matplotlib.use("Agg")
run = laid_eval.measure_window(laid_eval.ScriptedReader(location=11), max_length=4096, out={str(tmp_path / "run")!r})
again = laid_eval.load_run(run.path)
w = laid_eval.estimate_window(again.trials[again.trials["probe"] == "needle"])
assert w.length == again.window().length
laid_eval.plot.window(again); laid_eval.plot.depth(again)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_are_all_there():
    import laid_eval

    assert sorted(laid_eval.__all__) == laid_eval.__all__
    assert sorted(laid_eval._HOMES) == laid_eval.__all__
    for name in laid_eval.__all__:
        assert getattr(laid_eval, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = laid_eval.nothing


@pytest.mark.slow
def test_wheel_holds_one_package_with_the_probes_inside(tmp_path):
    build = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"laid_eval"}
    assert "laid_eval/_bundled/probes/needle.toml" in names
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import laid_eval; from laid_eval.window.probes import probe_names; print(laid_eval.__file__, probe_names())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stdout
    assert "needle" in done.stdout
