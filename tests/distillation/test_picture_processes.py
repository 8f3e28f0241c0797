"""Several processes learn from pictures what one learns, each with all weights or with shards of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import laid_eval

# What `accelerate launch` makes of its configuration for FSDP.
SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_equal_one_with_both_haystacks(seeing, few, tmp_path, shards):
    student, teacher = str(seeing("qwen2_5_vl")), str(seeing("qwen2_5_vl", True))
    changes = {
        **few, "training.steps": "3", "training.save_every": "3", "training.learning_rate": "1e-3",
        "matching.layers": "last", "matching.heads": "all", "data.stretch": "500",
    }  # fmt: skip
    program = [str(Path(__file__).parent / "shards_on_cpu.py")] if shards else ["-m", "laid_eval"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    words += ["distill", "--student", student, "--teacher", teacher, "--device", "cpu", "--out", str(tmp_path / "two")]
    words += [w for name, value in changes.items() for w in ("--set", f"{name}={value}")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(SHARDS if shards else {})}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    two = laid_eval.load_distillation(tmp_path / "two")
    assert (two.header.status, two.header.processes, two.header.sharded) == ("complete", 2, shards)
    one = laid_eval.distill(
        student, teacher, "laid", out=tmp_path / "one", device="cpu", changes={**changes, "training.accumulation": "4"}
    )
    a, b = (load_file(run.path / "checkpoints" / "checkpoint-3" / "model.safetensors") for run in (two, one))
    assert a.keys() == b.keys()
    assert not any("visual" in name for name in b)
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name
    ours, theirs = (load_file(run.path / "model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in ours)
    assert two.steps["loss"].to_numpy() == pytest.approx(one.steps["loss"].to_numpy(), rel=1e-4)
