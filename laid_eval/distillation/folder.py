"""Whether a distillation can begin: what its folder holds already, and the room that is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from laid_eval.distillation.processes import processes
from laid_eval.distillation.recipe import Recipe, parse_recipe
from laid_eval.distillation.samples import Source
from laid_eval.distillation.shards import sharding_asked
from laid_eval.distillation.sides import Side
from laid_eval.distillations import DistillRun, load_distillation
from laid_eval.errors import UserError
from laid_eval.models.cost import empty_model
from laid_eval.runs import HEADER


def resumable(
    folder: Path, own: Side, theirs: Side | None, recipe: Recipe, source: Source, seed: int
) -> DistillRun | None:
    """The header of an earlier run in `folder` that these settings continue, or `None` where there is none.

    Raises:
        UserError: The folder holds something else; the field is named.
    """
    if not (folder / HEADER).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"'{folder}' is not empty and holds no distillation. Give --out a new folder.")
        return None
    earlier = load_distillation(folder).header
    then = parse_recipe(earlier.recipe, f"The run in '{folder}'")  # fields that came later have their defaults
    pairs = [
        ("student", earlier.student.fingerprint, own.described.info.fingerprint),
        ("teacher", earlier.teacher and earlier.teacher.fingerprint, theirs and theirs.described.info.fingerprint),
        ("the teacher's dtype", earlier.teacher and earlier.teacher.dtype, theirs and theirs.described.info.dtype),
        *_fields(then.model_dump(mode="json"), recipe.model_dump(mode="json")),
        ("data", earlier.data, source.name),
        ("seed", earlier.seed, seed),
        ("processes", earlier.processes, processes()),
        ("shards (FSDP)", earlier.sharded, sharding_asked()),
    ]
    for name, old, new in pairs:
        if old != new:
            raise UserError(
                f"'{folder}' holds a distillation with {name} = {old!r}, asked was {new!r}. Give the same options to "
                "resume it, or another --out."
            )
    return earlier


def _fields(old: dict[str, Any], new: dict[str, Any], under: str = "recipe ") -> list[tuple[str, Any, Any]]:
    """Fields of two recipes side by side."""
    out = []
    for name in [n for n in {**old, **new} if n != "summary"]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _fields(a, b, f"{under}{name}.")
        else:
            out.append((f"{under}{name}", a, b))
    return out


def check_room(folder: Path, recipe: Recipe, student: Side) -> None:
    """Refuse before training where the checkpoints will not fit on the disk.

    Raises:
        UserError: Says what is needed and what is free.
    """
    parameters = sum(p.numel() for p in empty_model(student.described).parameters())
    trained = parameters if recipe.training.weights == "all" else parameters // 10
    # Two checkpoints and one being written, each with weights and both moments of AdamW in float32; the exported model.
    needed = 4 * 3 * 3 * trained + parameters * student.checkpoint_dtype.itemsize + 2**24
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"--out '{folder}' has {free / 2**30:.1f} GiB free; checkpoints and export take about "
            f"{needed / 2**30:.1f} GiB. Make room or choose another folder."
        )
