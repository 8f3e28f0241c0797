"""A distillation from the models' names to an ordinary checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from laid_eval.core import GainNotFoldable
from laid_eval.distillation.batches import batch_of, prompt_of
from laid_eval.distillation.export import export, save_gains
from laid_eval.distillation.folder import check_room, resumable
from laid_eval.distillation.gain_start import start_gains
from laid_eval.distillation.pairs import choose_pairs, start_mixers
from laid_eval.distillation.picture_samples import visual_probe
from laid_eval.distillation.processes import is_first, processes
from laid_eval.distillation.quick_window import quick_window
from laid_eval.distillation.recipe import Recipe, changed, load_recipe
from laid_eval.distillation.samples import Source
from laid_eval.distillation.shards import prepare_shards, sharding_asked
from laid_eval.distillation.sides import Side, find_side, load_side, own_device, shared_tokens
from laid_eval.distillation.sources import open_data
from laid_eval.distillation.student import Pair, Student, Teacher, checkpoint_layers
from laid_eval.distillation.train import (
    StepReport,
    kind_of,
    newest_checkpoint,
    put_trained,
    step_of,
    train,
    trained,
    trained_weights,
)
from laid_eval.distillation.trainable import add_adapter, set_trainable
from laid_eval.distillations import (
    STEPS,
    WINDOWS,
    DistillCost,
    DistillRun,
    LoadedDistillation,
    StepWindow,
    keep_steps,
    load_distillation,
    read_lines,
    save_distillation,
)
from laid_eval.environment import environment
from laid_eval.errors import UserError
from laid_eval.models.cost import peak_memory
from laid_eval.models.fold import fold, write_certificate
from laid_eval.models.fold_sites import fold_sites
from laid_eval.models.gained import add_gains, drop_gains, gainable, gains_of
from laid_eval.models.load import LoadedModel, LoadedVision
from laid_eval.models.rotary import Rotary, rotaries
from laid_eval.resources import content_hash
from laid_eval.runs import append_lines, run_folder

_PROBE_TOKENS = 256  # of the text on which folded and exported models are compared


@dataclass(frozen=True)
class Report:
    """Where a distillation stands, for a live line."""

    folder: Path
    doing: str
    step: StepReport | None = None
    window: str | None = None
    """The last quick estimate."""


def distill(
    student: str,
    teacher: str | None = None,
    recipe: str | Recipe = "laid",
    *,
    out: str | Path | None = None,
    changes: Mapping[str, str] | None = None,
    seed: int = 0,
    revision: str | None = None,
    teacher_revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[Report], None] = lambda _: None,
) -> LoadedDistillation:
    """Distil a teacher's long-range attention into a student; leaves an ordinary checkpoint.

    Args:
        student: Reference model, local folder, GGUF file or Hub id.
        teacher: The same; may be left out where the recipe looks at none.
        recipe: Name of a bundled recipe, path of a TOML file, or a `Recipe`.
        out: Folder of run and checkpoint; one already there with the same settings is resumed.
        changes: Fields of the recipe set anew: `{"training.steps": "50"}`.
        seed: Of samples, sampled rows and mixtures.
        revision: Of the student, a Hub id.
        teacher_revision: Of the teacher, a Hub id.
        dtype: Of the teacher: `auto`, `float32`, `bfloat16`, `float16`. The student trains in float32.
        device: `auto`, `cpu`, `cuda`, `mps`.
        trust_remote_code: Run model code that comes with a checkpoint.
        allow_pickle: Load pickled weights too.
        progress: Called as things go on.

    Returns:
        The run, read back. Its folder is a checkpoint that transformers, vLLM and `measure_window` load.

    Raises:
        UserError: Anything the user can mend.
        KeyboardInterrupt: As it came; the last checkpoint is kept, the same call goes on from there.
    """
    plan = load_recipe(recipe) if isinstance(recipe, str) else recipe
    plan = changed(plan, dict(changes or {})) if changes else plan
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, got {seed}.")
    if plan.needs_teacher and teacher is None:
        raise UserError(f"Recipe {plan.name!r} learns from a teacher. Name one: --teacher.")
    if out is None and processes() > 1:
        raise UserError("Several processes need one folder to share: pass --out.")
    if not (find_spec("tensorboard") and find_spec("peft")):
        raise UserError('Training needs what `pip install "laid-eval[distill]"` brings: tensorboard and peft.')
    prepare_shards(plan.training.precision)
    device = own_device(device)
    probe = visual_probe(plan.data)
    options = (device, trust_remote_code, allow_pickle, plan.data)
    own = find_side("student", student, revision, "float32", *options)
    theirs = None
    if teacher and plan.needs_teacher:
        theirs = find_side("teacher", teacher, teacher_revision, dtype, *options)
    vocabulary = shared_tokens(own, theirs) if theirs else 0
    source = open_data(probe, plan.data, own, theirs, seed)
    folder = run_folder(out, own.described.info.name, "distill")
    run = resumable(folder, own, theirs, plan, source, seed)
    if run and run.status == "complete" and any(folder.glob("model*.safetensors")):
        return load_distillation(folder)
    check_room(folder, plan, own)
    progress(Report(folder, "loading models"))
    notes = [f"recipe {plan.name!r} looks at no teacher: {teacher!r} was not used"] if teacher and not theirs else []
    notes += (
        ["the vision side is frozen: the language side trains"] if probe and plan.training.vision == "frozen" else []
    )
    job = _Job(folder, plan, seed, own, theirs, vocabulary, source, progress, tuple(notes))
    return job.carry_out(run)


@dataclass
class _Job:
    """One distillation under way."""

    folder: Path
    recipe: Recipe
    seed: int
    own: Side
    theirs: Side | None
    vocabulary: int
    source: Source
    progress: Callable[[Report], None]
    notes: tuple[str, ...] = ()
    window: str | None = None

    def carry_out(self, run: DistillRun | None) -> LoadedDistillation:
        """Load, train, export; the run is saved at every stage."""
        own = load_side(self.own)
        model = own.model
        teacher = load_side(self.theirs).model if self.theirs else None
        length = self._reach()
        turning = rotaries(model, length)
        pairs = self._pairs(model, teacher, turning, length)
        sharing = self._sharing(model, turning, pairs)
        gainable(model)
        if teacher is not None:
            gainable(teacher)
            teacher.requires_grad_(False)
        sample = self.source.samples(0)
        mixers = start_mixers(self.recipe, pairs, model, teacher, sample, self.seed) if teacher and pairs else []
        adapter = self._prepare(model, turning, sharing, pairs)
        if teacher is not None and self.recipe.gain and self.recipe.gain.start == "queries":
            start_gains(model, teacher, pairs, batch_of(sample, model.device))
        frozen = Teacher(teacher, self.vocabulary) if teacher is not None else None
        student = Student(model, frozen, self.recipe, pairs, mixers, self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        first = is_first()
        run = run or self._header(own, trained(student), pairs, sharing)
        if first:
            save_distillation(self.folder, run)

        def anew(weights: dict[str, Tensor]) -> tuple[PreTrainedModel, Any]:
            """The student as trained so far, whole: where training holds it in shards."""
            model = load_side(self.own).model
            gainable(model)
            adapter = self._prepare(model, turning, sharing, pairs)
            put_trained(model, {n.removeprefix("model."): w for n, w in weights.items() if kind_of(n) != "mixtures"})
            return model, adapter

        self._train(student, own, first, anew)
        if not first:
            return load_distillation(self.folder)
        self.progress(Report(self.folder, "folding and writing the checkpoint", window=self.window))
        if sharding_asked():
            last = newest_checkpoint(self.folder)
            assert last is not None, "training ends with one"
            model, adapter = anew(trained_weights(last))
        if adapter is not None:
            model = adapter.merge_and_unload()
        run = self._export(run, model, turning, sharing, prompt_of(sample, _PROBE_TOKENS))
        save_distillation(self.folder, run)
        return load_distillation(self.folder)

    def _reach(self) -> int:
        """Positions that are read at."""
        data, examples = self.recipe.data, self.source.examples
        own = max((int(sample.positions.max()) + 1 for sample in examples), default=data.lengths[1])
        return data.stretch or own

    def _pairs(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, turning: list[Rotary | None], length: int
    ) -> list[Pair]:
        if teacher is None or self.theirs is None or not self.recipe.matches:
            return []
        frames = self.own.frame, self.theirs.frame
        theirs = rotaries(teacher, length)
        haystacks = self.source.examples
        return choose_pairs(self.recipe, model, teacher, turning, theirs, frames, self.seed, haystacks)

    def _sharing(self, model: PreTrainedModel, turning: list[Rotary | None], pairs: list[Pair]) -> str | None:
        """How the gains are shared, after finding out that they will fold."""
        if self.recipe.gain is None:
            return None
        layers = self._gain_layers(turning, pairs)
        try:
            sites = fold_sites(model, turning, layers)
        except GainNotFoldable as error:
            raise UserError(f"A gain can't become part of this student: {error}") from None
        per_head = all(site.per_head for site in sites.values())
        asked = self.recipe.gain.sharing
        if asked == "head" and not per_head:
            raise UserError(
                'gain.sharing = "head" can\'t be folded into this student: its heads share a query norm. Use "layer".'
            )
        return "layer" if asked == "layer" or not per_head else "head"

    def _gain_layers(self, turning: list[Rotary | None], pairs: list[Pair]) -> list[int]:
        assert self.recipe.gain is not None
        wanted = {p.student for p in pairs} if self.recipe.gain.layers == "matched" else set(range(len(turning)))
        layers = [i for i, rotary in enumerate(turning) if rotary is not None and i in wanted]
        if not layers:
            raise UserError("No layer of this student rotates its queries: there is nothing to put a gain on.")
        return layers

    def _prepare(
        self, model: PreTrainedModel, turning: list[Rotary | None], sharing: str | None, pairs: list[Pair]
    ) -> Any:
        """Give a model its gains and its adapter, which is returned if there is one."""
        set_trainable(model, self.recipe)
        if sharing is not None:
            layers = self._gain_layers(turning, pairs)
            add_gains(model, {i: r for i in layers if (r := turning[i]) is not None}, sharing == "layer")
        if self.recipe.training.checkpointing:
            checkpoint_layers(model)
        return add_adapter(model, self.recipe, self.seed) if self.recipe.training.weights == "lora" else None

    def _train(
        self,
        student: Student,
        own: LoadedModel | LoadedVision,
        first: bool,
        anew: Callable[[dict[str, Tensor]], tuple[PreTrainedModel, Any]],
    ) -> None:
        """Train; steps and windows are appended to the folder's files as they come."""
        steps, last = self.folder / STEPS, newest_checkpoint(self.folder)
        if first:
            keep_steps(steps, step_of(last))
            keep_steps(self.folder / WINDOWS, step_of(last))
        started = time.perf_counter()

        def report(step: StepReport) -> None:
            nonlocal started
            now = time.perf_counter()
            line = {"step": step.step, **step.values, "seconds": round(now - started, 3)}
            append_lines(steps, [json.dumps(line, allow_nan=False)])
            started = now
            self.progress(Report(self.folder, "training", step, self.window))

        every = self.recipe.training.window_every

        def measure(step: int, weights: dict[str, Tensor] | None) -> None:
            model = anew(weights)[0] if weights is not None else student.model
            found = quick_window(replace(own, model=model), self.recipe, self.folder, step, self.seed)
            if found is not None:
                append_lines(self.folder / WINDOWS, [found.model_dump_json()])
                self.window = found.text

        each = (every, measure) if every else None
        train(
            student, self.recipe, self.source.samples, self.folder, resume=last, seed=self.seed,
            cpu=own.model.device.type == "cpu", report=report, each=each,
        )  # fmt: skip

    def _export(
        self,
        run: DistillRun,
        model: PreTrainedModel,
        turning: list[Rotary | None],
        sharing: str | None,
        prompt: dict[str, Any],
    ) -> DistillRun:
        model.eval()
        gains, certificate = None, None
        dtype = self.own.checkpoint_dtype
        if sharing is not None:
            gains = save_gains(self.folder, gains_of(model), turning)
            ids = None if self.own.processor else prompt["input_ids"].to(model.device)
            try:
                found = fold(model, turning, ids, export_dtype=dtype)
            except GainNotFoldable as error:
                raise UserError(f"The gains can't be folded: {error} Training is done and kept.") from None
            write_certificate(self.folder, found)
            certificate = found.as_dict()
        drop_gains(model)
        words = self.own.processor or self.own.tokenizer
        checked = export(model, words, self.folder, dtype, prompt, self.own.described.trust_remote_code)
        lines = read_lines(self.folder / STEPS)
        cost = DistillCost(
            steps=len(lines),
            tokens=round(sum(line["tokens"] for line in lines)) * run.processes,
            seconds=round(sum(line["seconds"] for line in lines), 2),
            peak_memory_bytes=peak_memory(model.device),
        )
        return run.model_copy(
            update={
                "status": "complete",
                "losses": _last_losses(lines),
                "gains": gains,
                "certificate": certificate,
                "export": checked,
                "windows": tuple(StepWindow(**line) for line in read_lines(self.folder / WINDOWS)),
                "cost": cost,
            }
        )

    def _header(
        self, own: LoadedModel | LoadedVision, counts: dict[str, int], pairs: list[Pair], sharing: str | None
    ) -> DistillRun:
        return DistillRun(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status="partial",
            student=own.info,
            teacher=self.theirs.described.info if self.theirs else None,
            recipe=self.recipe.model_dump(mode="json"),
            recipe_hash=content_hash(self.recipe),
            data=self.source.name,
            seed=self.seed,
            processes=processes(),
            sharded=sharding_asked(),
            trained=counts,
            pairs=tuple((p.student, p.teacher) for p in pairs),
            sharing=sharing,  # type: ignore[arg-type]
            environment=environment(),
            notes=(*self.source.notes, *self.notes),
        )


def _last_losses(lines: list[dict[str, Any]]) -> dict[str, float]:
    last = lines[-max(len(lines) // 10, 1) :]
    names = [n for n in last[-1] if n not in ("step", "seconds", "tokens", "gamma", "gradient")]
    return {n: sum(line[n] for line in last) / len(last) for n in names if not n.startswith("rate_")}
