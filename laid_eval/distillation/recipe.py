"""Recipes: what a distillation minimises, on which rows, heads and layers, with what data and for how long.

A bundled recipe is named (`laid`); one of your own is a path to a TOML file. Each bundled one is a row of the
ablation in the paper (LAid, AAAI 2026) or of ours; they differ in what the row is about and in nothing else.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laid_eval.errors import UserError, nearest
from laid_eval.resources import bundled, declared_names, read_declaration

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, lt=10)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=16)]
MOST_IMAGES = 1000


class Part(BaseModel):
    """A table of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Losses(Part):
    """Weights of the terms; 0 leaves a term out, and its cost with it."""

    sft: Share = 0.0
    """Cross-entropy of the labels (answers), nats a token."""
    kl: Share = 0.0
    """KL from the teacher's next-token distribution at labelled tokens, times temperature squared."""
    attention: Share = 0.0
    """Octave matching of attention; plain row KL with `kappa = 0` and `gamma = 0`."""
    qk: Share = 0.0
    """The paper's alignment of rotated queries and keys with a mixture of the teacher's."""
    coverage: Share = 0.0
    """KL(uniform || share of each teacher head): against mixtures that collapse on few teacher heads."""
    entropy: Share = 0.0
    """Entropy of each mixture: for matching one to few."""
    temperature: Annotated[float, Field(gt=0, lt=100)] = 1.0
    """Of `kl`."""


class Matching(Part):
    """Which attention is matched, and how."""

    layers: Literal["last", "all", "retrieval"] | tuple[tuple[int, int], ...] = "last"
    """Pairs of student and teacher layer; `all` by relative depth; `retrieval` the layer of each model whose heads
    copy best from needles."""
    heads: Literal["all", "retrieval"] = "all"
    """Of both models; `retrieval`: those that copy at least half as well as their layer's best."""
    rows: Literal["answers", "sampled"] = "sampled"
    """Rows that predict labels, or these and others, spread over octaves of position."""
    sample: Annotated[int, Field(ge=32)] = 64
    """Most rows of answers, and of others."""
    mixture: Literal["similarity", "uniform", "same"] = "similarity"
    """Start of the learned mixture of teacher heads, or head to head (`same`, nothing learned)."""
    distance: Literal["auto", "index", "rope", "image"] = "auto"
    """Tokens between (dilution), rotary positions (what RoPE sees), or pictures: how many back; the question's own
    words are at 0. `auto`: pictures where there are some, else tokens."""
    kappa: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much of the teacher's mass is dropped from an octave's weight."""
    gamma: Annotated[float, Field(ge=0, le=4)] = 1.0
    """Weight of distance at the end of its ramp."""
    rho: Annotated[float, Field(ge=1, le=1e6)] = 64.0
    ramp: tuple[float, float] = (0.05, 0.8)
    """Shares of the training at which the weight of distance begins and ends to grow."""
    sinks: Annotated[int, Field(ge=0)] = 4
    """First tokens kept apart from the octaves; where pictures are counted, all before the first one."""

    @model_validator(mode="after")
    def _check(self) -> Matching:
        if not 0 <= self.ramp[0] < self.ramp[1] <= 1:
            raise ValueError("`ramp` must be [start, end] with 0 <= start < end <= 1")
        if not self.layers:
            raise ValueError("`layers` names no pair of layers")
        return self


class Gain(Part):
    """RoPE gain: one factor per rotary pair, folded into the checkpoint at the end."""

    sharing: Literal["auto", "head", "layer"] = "auto"
    """Per head, or shared by a layer's heads; `auto`: per head where that folds."""
    layers: Literal["all", "matched"] = "all"
    start: Literal["one", "queries"] = "one"
    """1 everywhere, or the least-squares factor between student's and teacher's queries on one batch (students whose
    layers correspond to the teacher's head by head)."""


class Data(Part):
    """What is read in training."""

    source: str = "facts"
    """A bundled training probe, a probe file (.toml), `prose`, or a file of conversations or texts (.jsonl). For
    models that see: a visual probe; its haystacks are drawn from numbers that no evaluation uses."""
    lengths: tuple[Length, Length] = (256, 1024)
    """Shortest and longest text, tokens, drawn uniformly in octaves (generated data); longer ones of a file are left
    out, and counted."""
    images: tuple[Count, Count] | None = None
    """Fewest and most pictures of a haystack, drawn uniformly in octaves (visual probes, and only they)."""
    questions: Count = 4
    """Most questions asked after each text, one after the other (probes); after pictures each by itself, as in
    evaluation."""
    stretch: Count | None = None
    """Positions are stretched by random gaps, up to this one; pictures move whole. `None`: as the model has them."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.lengths[0] > self.lengths[1]:
            raise ValueError("`lengths` must be [shortest, longest]")
        if self.images is not None:
            if not self.images[0] <= self.images[1] <= MOST_IMAGES:
                raise ValueError(f"`images` must be [fewest, most], at most {MOST_IMAGES:,}")
        elif self.stretch is not None and self.stretch < self.lengths[1]:
            raise ValueError(f"`stretch` {self.stretch} is below the longest text, {self.lengths[1]} tokens")
        return self


class Training(Part):
    """The optimiser's side."""

    weights: Literal["all", "lora", "none"] = "all"
    """What trains beside gains and mixtures."""
    vision: Literal["frozen", "trained"] = "frozen"
    """All of a model that sees but its language model: the paper trains the language side alone."""
    lora_rank: Count = 8
    steps: Count = 200
    """Of the optimiser."""
    batch: Count = 1
    """Texts a process and forward pass."""
    accumulation: Count = 8
    """Forward passes a step."""
    learning_rate: Rate = 1e-5
    mixture_rate: Rate = 1e-2
    """Adam moves a parameter by about this much a step."""
    gain_rate: Rate = 1e-2
    """Of log gains: 0.01 is 0.09 dB a step."""
    weight_decay: Share = 0.0
    """Of weights; gains and mixtures have none."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass; weights, gains, mixtures and losses stay float32."""
    checkpointing: bool = False
    """Layers are computed again in the backward pass: less memory, about a third more time."""
    save_every: Count = 50
    window_every: Count | None = None
    """Steps between quick estimates of the effective window; `None`: none."""
    window_length: Annotated[int, Field(ge=512)] = 2048
    """Longest context of these, tokens."""
    window_images: Annotated[int, Field(ge=8)] = 40
    """The same of models that see, pictures."""


class Recipe(Part):
    """A whole distillation but the models."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    summary: str
    losses: Losses
    matching: Matching = Matching()
    gain: Gain | None = None
    data: Data = Data()
    training: Training = Training()

    @property
    def matches(self) -> bool:
        """Attention is compared, so mixtures of teacher heads are needed."""
        return self.losses.attention > 0 or self.losses.qk > 0

    @property
    def needs_teacher(self) -> bool:
        """A term looks at the teacher."""
        return self.matches or self.losses.kl > 0

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.losses.sft == 0 and not self.needs_teacher:
            raise ValueError("`losses`: all terms are 0, nothing would be learned")
        if self.gain and self.gain.start == "queries" and not self.matches:
            raise ValueError('`gain.start` is "queries", but no attention is matched: there are no pairs of layers')
        if self.gain and self.gain.layers == "matched" and not self.matches:
            raise ValueError('`gain.layers` is "matched", but no attention is matched')
        if self.matching.distance == "image" and self.data.images is None:
            raise ValueError('`matching.distance` is "image", but `data.images` is not given: nothing shows pictures')
        if self.training.batch > 1 and self.data.images is not None:
            raise ValueError("`training.batch` must be 1 with pictures; set `training.accumulation` instead")
        if self.training.weights == "none" and self.gain is None:
            raise ValueError('`training.weights` is "none" and there is no [gain]: nothing would be trained')
        return self


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    return declared_names("recipes")


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a TOML file.

    Raises:
        UserError: Unknown name, unreadable file, or a field that is wrong (named, with the nearest valid one).
    """
    path = Path(name)
    if not name.endswith(".toml"):
        path = bundled("recipes") / f"{name}.toml"
        if not path.is_file():
            names = recipe_names()
            raise UserError(
                f"Unknown recipe {name!r}{nearest(name, names)}. Allowed: {', '.join(names)}, or the path of a "
                ".toml file."
            )
    return parse_recipe(read_declaration(path, f"Recipe file {name!r}"), f"Recipe {name!r}")


def parse_recipe(content: dict[str, Any], what: str) -> Recipe:
    """A recipe from its tables; `what` begins the message where a field is wrong.

    Raises:
        UserError: Names the first wrong field, and the nearest valid one.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{what}: {_explain(error)}") from None


def changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    """The recipe with fields set anew, as `training.steps=50` says on the command line.

    Raises:
        UserError: No such field, or a value it can't have.
    """
    content = recipe.model_dump(mode="json", exclude_none=True)
    for where, text in changes.items():
        *tables, field = where.split(".")
        table = content
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {where}: {part!r} is no table of a recipe.")
        try:
            table[field] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            table[field] = text  # a bare word
    return parse_recipe(content, "--set")


def _explain(error: ValidationError) -> str:
    """One line for the first problem pydantic found."""
    first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    where = [str(part) for part in first["loc"]]
    field = ".".join(where)
    if first["type"] == "extra_forbidden":
        owner: Any = Recipe
        for part in where[:-1]:
            kind = owner.model_fields[part].annotation
            owner = next((k for k in (kind, *getattr(kind, "__args__", ())) if hasattr(k, "model_fields")), owner)
        allowed = list(owner.model_fields)
        return f"unknown field {field!r}{nearest(where[-1], allowed)}. Allowed: {', '.join(allowed)}."
    if first["type"] == "missing":
        return f"field {field!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    given = f", got {first['input']!r}" if where and not isinstance(first["input"], dict) else ""
    return f"field {field!r}: {message}{given}." if field else f"{message}."
