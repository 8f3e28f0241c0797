"""Several processes (gloo) learn what one learns from the same texts."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import laid_eval

CHANGES = {
    "training.steps": "3",
    "training.save_every": "3",
    "training.learning_rate": "1e-3",
    "data.lengths": "[100,160]",
    "data.questions": "2",
    "matching.layers": "last",
    "matching.heads": "all",
    "matching.rows": "sampled",
    "matching.sample": "32",
}


def launch(models, out, changes):
    # What `accelerate launch` runs where there are accelerators; without them it starts one process, or asks for MPI.
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "laid_eval"]
    words += ["distill", "--student", models["student"], "--teacher", models["teacher"], "--device", "cpu"]
    words += ["--out", out]
    words += [w for name, value in changes.items() for w in ("--set", f"{name}={value}")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
def test_two_processes_equal_one_with_both_texts(models, tmp_path):
    """Note's test 16: gradients are synchronised, whatever terms there are."""
    few = {**CHANGES, "training.batch": "1", "training.accumulation": "2"}
    done = launch(models, tmp_path / "two", few)
    assert done.returncode == 0, done.stderr[-3000:]
    two = laid_eval.load_distillation(tmp_path / "two")
    assert (two.header.status, two.header.processes) == ("complete", 2)
    one = laid_eval.distill(
        str(models["student"]), str(models["teacher"]), "laid", out=tmp_path / "one", device="cpu",
        changes={**CHANGES, "training.batch": "2", "training.accumulation": "2"},
    )  # fmt: skip
    a, b = (load_file(run.path / "checkpoints" / "checkpoint-3" / "model.safetensors") for run in (two, one))
    start = load_file(models["student"] / "model.safetensors")
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name
    moved = [n for n in start if not torch.allclose(b[f"model.{n}"], start[n], atol=1e-5)]
    assert moved
    assert list(two.steps["step"]) == [1, 2, 3]
    assert two.steps["loss"].to_numpy() == pytest.approx(one.steps["loss"].to_numpy(), rel=1e-4)
    assert two.header.cost.tokens > 0
