"""The training loop: transformers' Trainer around the student module, checkpoints that resume bit for bit.

A checkpoint holds what trains (weights or adapter, gains, mixtures), the optimiser, the schedule and all random
states; samples and sampled rows are functions of step and number. Frozen weights come from the student's own files.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from laid_eval.distillation.batches import Numbered, padded
from laid_eval.distillation.processes import processes
from laid_eval.distillation.recipe import Recipe
from laid_eval.distillation.samples import Samples
from laid_eval.distillation.shards import fill, optimizer_state, restore_optimizer, sharding_asked, whole_weights
from laid_eval.distillation.student import Student
from laid_eval.errors import UserError
from laid_eval.models.gained import GAIN
from laid_eval.models.source import quiet

# The names Trainer looks for
WEIGHTS, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"
_LOWER = 'Lower the rates in [training], or try precision = "float32".'
_GAIN_EPSILON = 1e-5  # gradients of a log gain that matters are a hundred times this
EachStep = Callable[[int, dict[str, Tensor] | None], None]
"""Given a step, and what trains as `whole_weights` has it where the module's own lies in shards."""
DONE = "complete"  # marks a checkpoint that was written to its end


@dataclass(frozen=True)
class StepReport:
    """One step of the optimiser."""

    step: int
    steps: int
    values: dict[str, float]
    """`loss`, terms, `learning_rate`, `effective_heads` of the first pair, `tokens`."""


class LaidTrainer(Trainer):
    """Trainer that takes the loss from the module, three kinds of parameters, and checkpoints of what trains."""

    recipe: Recipe
    model: Any  # never `None` here, as are those below in training
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        """As Trainer, with the recipe."""
        self.recipe = recipe
        self.sums: dict[str, list[float]] = {}
        self.rates: dict[str, float] = {}  # of the step under way: when it is logged, the next one's are set
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The module's loss; its terms are kept for the log."""
        out = model(**inputs, step=self.state.global_step)
        if not math.isfinite(float(out["loss"].detach())):
            terms = ", ".join(f"{name} {value:.3g}" for name, value in out["terms"].items())
            raise UserError(f"The loss is not finite at step {self.state.global_step + 1} ({terms}). {_LOWER}")
        for name, value in out["terms"].items():
            self.sums.setdefault(name, []).append(value)
        if self.optimizer is not None:
            self.rates = {f"rate_{group['kind']}": float(group["lr"]) for group in self.optimizer.param_groups}
        self.sums.setdefault("tokens", []).append(float(inputs["attention_mask"].sum()))
        return (out["loss"], out) if return_outputs else out["loss"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a rate each for weights, mixtures and gains; the last two without decay."""
        if self.optimizer is None:
            rates = self.recipe.training
            groups: dict[str, list[nn.Parameter]] = {"weights": [], "mixtures": [], "gains": []}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    groups[kind_of(name)].append(parameter)
            settings = {
                "weights": {"lr": rates.learning_rate, "weight_decay": rates.weight_decay},
                "mixtures": {"lr": rates.mixture_rate, "weight_decay": 0.0},
                # Adam gives every factor steps of one size; this keeps those that change nothing where they are
                "gains": {"lr": rates.gain_rate, "weight_decay": 0.0, "eps": _GAIN_EPSILON},
            }
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parameters, "kind": kind, **settings[kind]}
                    for kind, parameters in groups.items()
                    if parameters
                ]
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # order is the samples' own affair

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains; all processes gather, the first one writes."""
        if not self.is_fsdp_enabled and not self.args.should_save:
            return
        tensors = whole_weights(self.model)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        put_trained(model or self.model, trained_weights(Path(resume_from_checkpoint)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (torch.load(Path(checkpoint) / n, weights_only=True) for n in (OPTIMIZER, SCHEDULER))
        restore_optimizer(self.model, self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)


class _Log(TrainerCallback):
    """Hands every step on, with the means of the terms."""

    def __init__(self, trainer: LaidTrainer, report: Callable[[StepReport], None]) -> None:
        self._trainer, self._report = trainer, report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        sums = self._trainer.sums
        if not logs or "loss" not in logs or not sums:
            return
        tokens = sum(sums.pop("tokens"))
        values = {"loss": float(logs["loss"])} | {name: sum(x) / len(x) for name, x in sums.items()}
        values |= {"tokens": tokens, "gradient": float(logs.get("grad_norm", 0.0))}
        if not math.isfinite(values["gradient"]):
            raise UserError(f"The gradient is not finite at step {state.global_step}. {_LOWER}")
        values |= self._trainer.rates
        sums.clear()
        logs.update({k: v for k, v in values.items() if k not in logs})  # TensorBoard shows them too
        self._report(StepReport(state.global_step, state.max_steps, values))


class _Mark(TrainerCallback):
    """Marks checkpoints that every process has written its part of."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / DONE).touch()


class _EachStep(TrainerCallback):
    """Calls something after every so many steps, on the first process."""

    def __init__(self, trainer: LaidTrainer, every: int, call: EachStep) -> None:
        self._trainer, self._every, self._call = trainer, every, call

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every:
            return
        weights = whole_weights(self._trainer.model) if self._trainer.is_fsdp_enabled else None
        if state.is_world_process_zero:
            self._call(state.global_step, weights)


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What trains, as a checkpoint holds it."""
    return load_file(checkpoint / WEIGHTS)


def put_trained(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set what trains to a checkpoint's values.

    Raises:
        UserError: The checkpoint is of another student or recipe.
    """
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if set(own) != set(tensors) or any(own[n].shape != t.shape for n, t in tensors.items()):
        raise UserError("The checkpoint to resume from is of another student or recipe. Give --out a new folder.")
    for name, parameter in own.items():
        fill(parameter, tensors[name])


def kind_of(name: str) -> str:
    """Which rate a parameter has: `gains`, `mixtures` or `weights`.

    >>> kind_of("model.model.layers.0.self_attn.rope_gain.parameter"), kind_of("mixers.0-0.logits")
    ('gains', 'mixtures')
    """
    if f".{GAIN}." in name:
        return "gains"
    return "mixtures" if "mixers." in name else "weights"


def trained(student: Student) -> dict[str, int]:
    """How many parameters train, by kind."""
    counts = {"weights": 0, "gains": 0, "mixtures": 0}
    for name, parameter in student.named_parameters():
        counts[kind_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return counts


def arguments(recipe: Recipe, folder: Path, seed: int, cpu: bool) -> TrainingArguments:
    """Trainer's settings for a recipe."""
    t = recipe.training
    several = processes() > 1
    schedule = "constant_with_warmup" if t.schedule == "constant" else t.schedule
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=t.steps,
        per_device_train_batch_size=t.batch,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(t.warmup * t.steps),
        max_grad_norm=t.clip,
        bf16=t.precision == "bfloat16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=t.save_every,
        save_total_limit=2,
        seed=seed,
        report_to=[],
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and several else None,
        # where no term reaches the last layers, they have no gradient
        ddp_find_unused_parameters=several and recipe.losses.sft == 0 and recipe.losses.kl == 0,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process, one accelerator: torch's DataParallel would split texts
    return args


def train(
    student: Student,
    recipe: Recipe,
    samples: Samples,
    folder: Path,
    *,
    resume: Path | None,
    seed: int,
    cpu: bool,
    report: Callable[[StepReport], None],
    each: tuple[int, EachStep] | None = None,
) -> None:
    """Train to the end.

    Args:
        student: The module; changed in place.
        recipe: Of the run.
        samples: What is read.
        folder: Gets `checkpoints` and `tensorboard`.
        resume: Checkpoint to go on from, as `newest_checkpoint` finds it.
        seed: Of all that is random in training.
        cpu: Stay on the CPU.
        report: Called after every step, on the first process.
        each: (K, call): `call` after every K steps, on the first process.

    Raises:
        UserError: A loss that is not finite, no room on the disk, shards where accelerate makes none.
    """
    args = arguments(recipe, folder, seed, cpu)
    texts = recipe.training.steps * recipe.training.batch * recipe.training.accumulation * args.world_size
    trainer = LaidTrainer(
        model=student, args=args, train_dataset=Numbered(samples, texts), data_collator=padded, recipe=recipe
    )
    if sharding_asked() and not trainer.is_fsdp_enabled:
        raise UserError("Accelerate shards on accelerators only, and not in one process. Leave FSDP out here.")
    trainer.remove_callback(PrinterCallback)  # it prints on stdout
    if args.process_index == 0:
        trainer.callback_handler.callbacks.insert(0, _Log(trainer, report))  # before TensorBoard's, which shows it
        trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard"))))
    trainer.add_callback(_Mark())
    if each:
        trainer.add_callback(_EachStep(trainer, *each))
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise UserError(
            f"Training stopped at step {trainer.state.global_step}: {reason}. Make room at '{folder}' and give the "
            "same command again: it goes on from the last whole checkpoint."
        ) from None


def write_failure(error: Exception) -> str | None:
    """Why a file couldn't be written; `None` where the error is about something else."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.split("I/O error: ")[-1]
    # torch.save on a full disk: its zip writer ends elsewhere than it thinks
    return "the disk is full" if "inline_container" in text or "PytorchStreamWriter" in text else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end.

    Raises:
        UserError: It is damaged.
    """
    whole = [p.parent for p in (folder / "checkpoints").glob(f"checkpoint-*/{DONE}")]
    newest = max(whole, key=step_of, default=None)
    if newest is not None:
        _check_readable(newest)
    return newest


def step_of(checkpoint: Path | None) -> int:
    """Steps taken up to a checkpoint; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.split("-")[1])


def _check_readable(checkpoint: Path) -> None:
    try:
        trained_weights(checkpoint)
        for name in (OPTIMIZER, SCHEDULER):
            torch.load(checkpoint / name, weights_only=True, map_location="cpu")
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        count = processes()
        for name in [f"rng_state_{k}.pth" for k in range(count)] if count > 1 else ["rng_state.pth"]:
            if not zipfile.is_zipfile(checkpoint / name):
                raise ValueError(name)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise UserError(
            f"Checkpoint '{checkpoint}' is damaged ({type(error).__name__}). Nothing was changed: remove that folder, "
            "and the same command goes on from the one before it, or from the start."
        ) from None
