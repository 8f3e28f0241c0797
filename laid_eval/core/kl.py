"""Losses on next tokens: a student's distribution against its teacher's, on the vocabulary both have, and labels.

Vocabularies of one tokenizer are padded to different sizes (Qwen2.5: 151,936 and 152,064 rows). Padding the smaller
logits with zeros puts probability on tokens that don't exist; both are cut to the shared rows instead.

Logits of a long text don't fit in memory, and few of its tokens have labels: rows are gathered first, then projected
a few at a time, and projected again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from laid_eval.core.heads import wide


@dataclass(frozen=True, eq=False)
class Unembedding:
    """A model's last step, from hidden states to logits."""

    weight: Tensor
    """(V, E)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`; one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap), after the scale (Gemma 2)."""

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """(M, V) float32 logits of hidden states (M, E), of the first `vocabulary` tokens only."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        logits = wide(torch.nn.functional.linear(hidden, self.weight[:vocabulary], bias)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def label_loss(hidden: Tensor, unembedding: Unembedding, rows: Tensor, labels: Tensor, *, chunk: int = 32) -> Tensor:
    """Scalar mean cross-entropy of labelled tokens, nats; 0 where there are none.

    Args:
        hidden: (N, E) last hidden states, after the final norm.
        unembedding: Of the model.
        rows: (M,) indices of the tokens that predict a label: the one before it.
        labels: (M,) tokens to be predicted.
        chunk: Tokens projected at a time.

    >>> rows = torch.arange(2)
    >>> round(float(label_loss(torch.zeros(2, 3), Unembedding(torch.eye(3)), rows, rows).exp()), 4)
    3.0
    """

    def part(at: slice) -> Tensor:
        logits = unembedding.logits(hidden[rows[at]], len(unembedding.weight))
        return torch.nn.functional.cross_entropy(logits, labels[at], reduction="sum")

    return _over_chunks(part, hidden, len(rows), chunk)


def shared_vocab_kl(
    student_hidden: Tensor,
    student: Unembedding,
    teacher_hidden: Tensor,
    teacher: Unembedding,
    rows: Tensor,
    *,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    chunk: int = 32,
) -> Tensor:
    """Scalar T^2 * mean KL(teacher || student) at temperature T over some tokens, nats; 0 where there are none.

    Both distributions are softmaxes of logits / T over the shared vocabulary. The factor T^2 keeps the size of the
    gradient as T grows (Hinton et al. 2015, section 2.1). The teacher gets no gradient.

    Args:
        student_hidden: (N, E) last hidden states, after the final norm.
        student: Its unembedding.
        teacher_hidden: (N, E') of the same tokens.
        teacher: Its unembedding.
        rows: (M,) indices of the tokens whose predictions count.
        vocabulary: Tokens both models share, from the first; the smaller of the two vocabularies where `None`.
        temperature: T.
        chunk: Tokens projected at a time: 32 of 152k tokens take 20 MB a model in float32.

    Raises:
        ValueError: The texts differ in length, the temperature is not positive, or more tokens are asked for than
            both models have.

    >>> hidden, large = torch.eye(3), Unembedding(torch.eye(3).repeat(2, 1))
    >>> float(shared_vocab_kl(hidden, large, hidden, Unembedding(torch.eye(3)), torch.arange(3)))
    0.0
    """
    shared = min(len(student.weight), len(teacher.weight))
    vocabulary = shared if vocabulary is None else vocabulary
    if not 0 < vocabulary <= shared:
        raise ValueError(f"a vocabulary of {vocabulary} tokens: the models share at most {shared}")
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"{len(student_hidden)} tokens of the student, {len(teacher_hidden)} of the teacher")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")

    def divergence(at: slice) -> Tensor:
        index = rows[at]
        with torch.no_grad():
            target = teacher.logits(teacher_hidden[index], vocabulary).div(temperature).log_softmax(dim=-1)
        own = student.logits(student_hidden[index], vocabulary).div(temperature).log_softmax(dim=-1)
        return torch.nn.functional.kl_div(own, target, reduction="sum", log_target=True)

    return temperature**2 * _over_chunks(divergence, student_hidden, len(rows), chunk)


def _over_chunks(part: Callable[[slice], Tensor], hidden: Tensor, rows: int, chunk: int) -> Tensor:
    """Mean over rows of what `part` sums over a slice of them, computed again in the backward pass."""
    total = wide(hidden[:0]).sum()  # joins the graph even where no token counts: other processes wait for it
    for start in range(0, rows, chunk):
        at = slice(start, start + chunk)
        total = total + checkpoint(part, at, use_reentrant=False, preserve_rng_state=False)
    return total / max(rows, 1)
