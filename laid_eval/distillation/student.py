"""Student, gains and mixtures as one module whose forward pass is the loss.

One module owns all that trains, so optimiser, checkpoints and DDP see all of it, and gradients are synchronised
because the wrapper's own forward is called. The teacher is held outside the module tree: it is in no checkpoint, no
optimiser, and never in training mode.

Every term is a mean within each text, then over the texts of the batch: a step's gradient does not depend on how its
texts are spread over processes and forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_eval.core import (
    HeadMixer,
    Heads,
    View,
    distance_weight,
    image_distance,
    index_distance,
    label_loss,
    octave_matching,
    qk_alignment,
    rope_distance,
    sample_rows,
    seen_keys,
    shared_vocab_kl,
    sink_keys,
)
from laid_eval.distillation.batches import Batch, like
from laid_eval.distillation.recipe import Matching, Recipe
from laid_eval.models.gained import PREFIX, Tapped, tapped
from laid_eval.models.unembedding import check_unembedding, unembedding_of

_OCTAVES = {False: 17, True: 8}
"""Of distance in tokens or positions, which reach 131k, and in images, which reach 255."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from."""

    model: PreTrainedModel
    vocabulary: int
    """Tokens it shares with the student, from the first."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Layers that are matched, and which of their heads."""

    student: int
    teacher: int
    student_heads: Tensor
    """(Hs,) indices."""
    teacher_heads: Tensor
    """(Ht,)"""
    student_frequencies: Tensor
    """(P,) rad/token."""
    teacher_frequencies: Tensor

    @property
    def name(self) -> str:
        """For logs and checkpoints."""
        return f"{self.student}-{self.teacher}"


class Student(nn.Module):
    """The student with all that trains beside it; calling it gives the loss and its terms."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher | None,
        recipe: Recipe,
        pairs: Sequence[Pair],
        mixers: Sequence[HeadMixer | None],
        seed: int,
    ) -> None:
        """Put together.

        Args:
            model: Causal language model, or one that sees, made `gainable`, with its gains and adapters.
            teacher: `None` where no term looks at one.
            recipe: What is minimised.
            pairs: Layers to match.
            mixers: One a pair; `None` matches head to head.
            seed: Of the rows that are looked at.
        """
        super().__init__()
        self.model = model
        there = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = sorted(there & set(getattr(model, "_no_split_modules", None) or ()))  # FSDP's units
        self.mixers = nn.ModuleDict({p.name: m for p, m in zip(pairs, mixers, strict=True) if m is not None})
        self.recipe = recipe
        self.pairs = tuple(pairs)
        self.seed = seed
        self._outside = (teacher,)  # in a tuple: no submodule
        for each in (model, *([teacher.model] if teacher else [])):
            check_unembedding(each)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        numbers: Tensor,
        step: int = 0,
        places: Tensor | None = None,
        branches: Tensor | None = None,
        vision: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """`loss` (scalar, to be minimised) and `terms` (name to float: unweighted, nats; heads that serve).

        Takes what a `Batch` holds. No `**kwargs`: Trainer would take them for a sign that the loss is a sum over all
        forward passes of a step, and not divide by their number.
        """
        batch = Batch(input_ids, attention_mask, position_ids, labels, numbers, places, branches, vision)
        recipe, losses = self.recipe, self.recipe.losses
        (teacher,) = self._outside
        hidden, own = read(self.model, batch, [p.student for p in self.pairs])
        if teacher is not None:
            with torch.no_grad():
                teacher.model.eval()
                their_hidden, theirs = read(teacher.model, batch, [p.teacher for p in self.pairs])
        unembedding = unembedding_of(self.model)
        gamma = distance_weight(
            step, recipe.training.steps, maximum=recipe.matching.gamma,
            start=recipe.matching.ramp[0], end=recipe.matching.ramp[1],
        )  # fmt: skip
        terms: dict[str, list[Tensor]] = {}
        for text in range(len(input_ids)):
            rows = torch.nonzero(labels[text, 1:] != -100).flatten()
            if losses.sft:
                loss = label_loss(hidden[text], unembedding, rows, labels[text, 1:][rows])
                terms.setdefault("sft", []).append(loss)
            if losses.kl and teacher:
                terms.setdefault("kl", []).append(
                    shared_vocab_kl(
                        hidden[text], unembedding, their_hidden[text], unembedding_of(teacher.model), rows,
                        vocabulary=teacher.vocabulary, temperature=losses.temperature,
                    )
                )  # fmt: skip
            for pair in self.pairs:
                for name, term in self._matched(pair, own, theirs, batch, text, rows, gamma, step).items():
                    terms.setdefault(name, []).append(term)
        for mixer in self.mixers.values():
            assert isinstance(mixer, HeadMixer)
            terms.setdefault("coverage", []).append(mixer.coverage())
            terms.setdefault("entropy", []).append(mixer.entropy())  # cheap, and worth seeing where they weigh nothing
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        # every layer's output has a gradient, whatever the terms look at: sharded weights are gathered at its coming
        total = sum((getattr(losses, name) * mean for name, mean in means.items()), hidden.sum() * 0.0)
        told = {name: float(mean.detach()) for name, mean in means.items()} | {"gamma": gamma}
        for name, mixer in self.mixers.items():  # in here, where mixtures that are sharded are whole
            assert isinstance(mixer, HeadMixer)
            told[f"effective_heads_{name}"] = mixer.effective_heads()
        return {"loss": total, "terms": told}

    def _matched(
        self,
        pair: Pair,
        own: dict[int, Tapped],
        theirs: dict[int, Tapped],
        batch: Batch,
        text: int,
        answers: Tensor,
        gamma: float,
        step: int,
    ) -> dict[str, Tensor]:
        """Terms that compare one pair of layers on one text."""
        losses, how = self.recipe.losses, self.recipe.matching
        mixture = self._mixture(pair)
        size = int(batch.attention_mask[text].sum())
        out = {}
        if losses.attention:
            index, weight = rows_to_match(how, size, answers, self.seed, step, int(batch.numbers[text]))
            view = view_of(how, batch, text, index, size)
            student = some_heads(own[pair.student].heads(text, index), pair.student_heads, size)
            teacher = some_heads(theirs[pair.teacher].heads(text, index), pair.teacher_heads, size)
            matched = octave_matching(
                student, teacher, mixture, view, gamma=gamma, kappa=how.kappa, rho=how.rho, weights=weight,
                octaves=_OCTAVES[_in_images(how, batch)],
            )  # fmt: skip
            out["attention"] = matched.loss
        if losses.qk:
            every = torch.arange(size, device=batch.labels.device)
            out["qk"] = qk_alignment(
                some_heads(own[pair.student].heads(text, every), pair.student_heads, size),
                some_heads(theirs[pair.teacher].heads(text, every), pair.teacher_heads, size),
                mixture,
                student_frequencies=pair.student_frequencies,
                teacher_frequencies=pair.teacher_frequencies,
            ).loss
        return out

    def _mixture(self, pair: Pair) -> Tensor:
        if pair.name in self.mixers:
            mixture: Tensor = self.mixers[pair.name]()
            return mixture
        return torch.eye(len(pair.student_heads), device=pair.student_heads.device)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Computes layers again in the backward pass, in the way that hands gradients to what is tapped.

    The reentrant way, without saying so, does not.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def rows_to_match(
    how: Matching, size: int, answers: Tensor, seed: int, step: int, number: int
) -> tuple[Tensor, Tensor | None]:
    """Rows (R,) whose attention is compared in a text of `size` tokens, and the rows that each stands for.

    At most `sample` rows of answers, and as many others: where every token is a label, the answers are sampled too.
    """
    answers = answers[answers > 0]  # the first row sees itself alone
    few = len(answers) <= how.sample
    if how.rows == "answers" and few:
        return answers, None
    candidates = answers if how.rows == "answers" else torch.arange(1, size, device=answers.device)
    rows = sample_rows(
        candidates, min(how.sample, len(candidates)), seed=seed, step=step, example=number,
        always=answers if few else None,
    )  # fmt: skip
    return rows.index, rows.weight


def view_of(how: Matching, batch: Batch, text: int, rows: Tensor, size: int) -> View:
    """What the rows see: all real tokens up to themselves, at the distance that the recipe counts.

    Questions about pictures don't see each other; tokens between are those that the row sees.
    """
    documents = torch.zeros(size, dtype=torch.long, device=rows.device)
    seen, sink = seen_keys(rows, documents), sink_keys(documents, how.sinks)
    if batch.branches is not None:
        seen &= _one_branch(rows, batch.branches[text, :size])
    if how.distance == "rope":
        distance = rope_distance(rows, batch.position_ids[..., text, :size])
    elif _in_images(how, batch):
        assert batch.places is not None, "the recipe counts images where there are some"
        places = batch.places[text, :size]
        distance, sink = image_distance(rows, places), sink | (places == 0)
    elif batch.branches is not None:
        distance = seen.flip(1).cumsum(1).flip(1) - 1
    else:
        distance = index_distance(rows, size)
    return View(seen, distance, sink)


def _in_images(how: Matching, batch: Batch) -> bool:
    """Distance is a number of pictures."""
    return batch.places is not None and how.distance in ("auto", "image")


def some_heads(heads: Heads, chosen: Tensor, size: int) -> Heads:
    """Some query heads with the keys they look at, without the padding."""
    key = heads.key[:, :size]
    if len(chosen) == len(heads.query):
        return Heads(heads.query, key, heads.scale, heads.softcap)
    group = len(heads.query) // len(heads.key)
    return Heads(heads.query[chosen], key[chosen // group], heads.scale, heads.softcap)


def read(model: PreTrainedModel, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tapped]]:
    """(B, N, E) last hidden states, and the queries and keys of some layers.

    The mask is given whether or not there is padding: without one, transformers takes gaps in the positions for the
    borders of packed texts, and cuts attention there.
    """
    seeing = batch.vision is not None
    reader = model.base_model if seeing else model.get_decoder()
    given = like(batch.vision or {}, next(model.parameters()))
    with tapped(model, layers) as seen:
        out = reader(
            input_ids=batch.input_ids,
            attention_mask=_branches_apart(model, batch) if seeing else batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **given,
        )
    return out.last_hidden_state, dict(seen)


def _branches_apart(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mask of one haystack: (B, N), or (B, 1, N, N) where several questions must not see each other."""
    assert batch.branches is not None, "haystacks of pictures say which token is whose"
    if int(batch.branches.max()) <= 1:
        return batch.attention_mask
    size = batch.branches.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=batch.branches.device).tril()
    every = torch.arange(size, device=causal.device)
    mask = torch.stack([_one_branch(every, line) & causal for line in batch.branches])[:, None]
    if model.config.get_text_config(decoder=True)._attn_implementation.removeprefix(PREFIX) == "sdpa":
        return mask
    floor = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, floor)


def _one_branch(rows: Tensor, branches: Tensor) -> Tensor:
    """(R, N) booleans: whether a key is no question's, or the same one's as the row."""
    return (branches == 0) | (branches[rows][:, None] == branches)
