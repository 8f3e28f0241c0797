"""Several processes (gloo) learn what one learns from the same texts, each with all weights or with shards of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import laid_eval
from laid_eval.errors import UserError

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


# What `accelerate launch` makes of its configuration for FSDP.
SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def launch(models, out, changes, shards=False):
    # What `accelerate launch` runs where there are accelerators; without them it starts one process, or asks for MPI.
    program = [Path(__file__).parent / "shards_on_cpu.py"] if shards else ["-m", "laid_eval"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    words += ["distill", "--student", models["student"], "--teacher", models["teacher"], "--device", "cpu"]
    words += ["--out", out]
    words += [w for name, value in changes.items() for w in ("--set", f"{name}={value}")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(SHARDS if shards else {})}
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300, env=env)


def trained(path, step=3):
    return load_file(path / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def exported(path):
    return {n: t.numpy() for n, t in load_file(path).items()} if path.suffix == ".safetensors" else dict(np.load(path))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_equal_one_with_both_texts(models, tmp_path, shards):
    """Note's test 16: gradients are synchronised, whatever terms there are."""
    few = {**CHANGES, "training.batch": "1", "training.accumulation": "2"}
    done = launch(models, tmp_path / "two", few, shards)
    assert done.returncode == 0, done.stderr[-3000:]
    two = laid_eval.load_distillation(tmp_path / "two")
    assert (two.header.status, two.header.processes) == ("complete", 2)
    one = laid_eval.distill(
        str(models["student"]), str(models["teacher"]), "laid", out=tmp_path / "one", device="cpu",
        changes={**CHANGES, "training.batch": "2", "training.accumulation": "2"},
    )  # fmt: skip
    a, b = trained(two.path), trained(one.path)
    assert a.keys() == b.keys()
    start = load_file(models["student"] / "model.safetensors")
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name
    moved = [n for n in start if not torch.allclose(b[f"model.{n}"], start[n], atol=1e-5)]
    assert moved
    for name in ("model.safetensors", "gains.npz"):
        ours, theirs = (exported(run.path / name) for run in (two, one))
        assert ours.keys() == theirs.keys()
        assert all(np.allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-5) for n in ours), name
    assert two.header.sharded == shards
    assert list(two.steps["step"]) == [1, 2, 3]
    assert two.steps["loss"].to_numpy() == pytest.approx(one.steps["loss"].to_numpy(), rel=1e-4)
    assert two.header.cost.tokens > 0


@pytest.mark.slow
def test_shards_go_on_bit_for_bit(models, tmp_path):
    """Adapters, gains and mixtures in shards, layers run anew, a window on the way; the second half is done again."""
    changes = {
        **CHANGES, "training.batch": "1", "training.accumulation": "2", "training.save_every": "2",
        "training.weights": "lora", "training.checkpointing": "true", "training.window_every": "2",
        "training.window_length": "1024",
    }  # fmt: skip
    done = launch(models, tmp_path / "whole", changes, shards=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [tmp_path / "cut" / "checkpoints" / "checkpoint-3", *(tmp_path / "cut").glob("*.safetensors")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = launch(models, tmp_path / "cut", changes, shards=True)
    assert again.returncode == 0, again.stderr[-3000:]
    a, b, before = trained(tmp_path / "whole"), trained(tmp_path / "cut"), trained(tmp_path / "whole", 2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], before[name]) for name in a)
    whole, cut = (laid_eval.load_distillation(tmp_path / name) for name in ("whole", "cut"))
    assert whole.header.losses == cut.header.losses
    assert [w.step for w in cut.header.windows] == [2]
    exported = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_ways_of_sharding_that_are_not_followed_are_refused(models, quick, tmp_path, monkeypatch):
    def refused():
        with pytest.raises(UserError) as caught:
            laid_eval.distill(str(models["student"]), recipe="sft", out=tmp_path / "x", changes=quick)
        assert not list((tmp_path / "x").glob("checkpoints/*"))
        return str(caught.value)

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "fsdp_version: 2" in refused()
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    assert "TRANSFORMER_BASED_WRAP" in refused()
    monkeypatch.delenv("FSDP_AUTO_WRAP_POLICY")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "round gains" in refused()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(UserError, match='precision = "bfloat16" would round'):
        laid_eval.distill(
            str(models["student"]),
            recipe="sft",
            out=tmp_path / "x",
            changes={**quick, "training.precision": "bfloat16"},
        )
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert "training.checkpointing=true" in refused()
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "false")
    assert "accelerators only" in refused()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DeepSpeed" in refused()
