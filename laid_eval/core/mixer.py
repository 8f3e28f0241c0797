"""Which teacher heads a student head is to imitate: a learned mixture, and how far it has collapsed.

Heads of teacher and student have no natural partners, and their numbers differ. Student head a imitates the mixture
sum_t pi[a, t] P_t of the teacher's attention *probabilities*. Mixing logits would give a product of experts; mixing
queries and keys apart gives products q_j . k_j' that no teacher head computes.

Minimising a loss over pi picks the teacher heads that are easiest to imitate, often those that look at the sink;
hence `coverage`, to be added to the loss, and `effective_heads`, to be logged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laid_eval.core.heads import Heads
from laid_eval.core.view import View


class HeadMixer(nn.Module):
    """Learned mixture of teacher heads for every student head; calling it gives pi (Hs, Ht), rows summing to 1.

    Args:
        student_heads: Query heads of the student's layer, Hs.
        teacher_heads: Query heads of the teacher's layer, Ht. With one, pi is 1 and nothing is learned.
        generator: Of the noise of a uniform start. Exactly uniform rows would all get the same gradient wherever the
            student's heads are alike.
        similarity: (Hs, Ht) start at softmax(similarity / temperature) instead, as from `head_similarity`.
        temperature: Of that softmax, in the units of the similarity (nats).

    Raises:
        ValueError: The similarity has another shape.

    >>> mixer = HeadMixer(2, 3, generator=torch.Generator().manual_seed(0))
    >>> mixer().sum(dim=1).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        student_heads: int,
        teacher_heads: int,
        *,
        generator: torch.Generator | None = None,
        similarity: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        shape = (student_heads, teacher_heads)
        if similarity is None:
            start = 1e-2 * torch.randn(shape, generator=generator)
        elif tuple(similarity.shape) != shape:
            raise ValueError(f"similarity is {tuple(similarity.shape)}: wanted (student, teacher) heads {shape}")
        else:
            start = similarity.detach().float() / temperature
        self.logits = nn.Parameter(start)

    def forward(self) -> Tensor:
        """(Hs, Ht) mixture pi."""
        return torch.softmax(self.logits.float(), dim=1)

    def coverage(self) -> Tensor:
        """Scalar, nats: KL(uniform || share of each teacher head in all mixtures); 0 where all serve equally."""
        students, teachers = self.logits.shape
        log_share = torch.log_softmax(self.logits.float(), dim=1).logsumexp(dim=0) - math.log(students)
        return -log_share.mean() - math.log(teachers)

    def effective_heads(self) -> float:
        """Teacher heads that serve, 1..Ht: the exponential of the entropy of their shares."""
        share = self().detach().mean(dim=0)
        return float(torch.special.entr(share).sum().exp())

    def entropy(self) -> Tensor:
        """Scalar, nats: mean entropy of a student head's mixture; penalise it to match one to few."""
        entropy: Tensor = torch.special.entr(self()).sum(dim=1).mean()
        return entropy


@torch.no_grad()
def head_similarity(student: Heads, teacher: Heads, view: View, chunk: int = 16) -> Tensor:
    """(Hs, Ht) minus the mean KL(teacher head || student head) over the rows, nats; a start for `HeadMixer`.

    Args:
        student: Its queries (Hs, R, D) and keys.
        teacher: Its queries (Ht, R, D') and keys, of the same rows and tokens.
        view: What the rows see; rows that see nothing are left out.
        chunk: Rows at a time.

    >>> heads = Heads(torch.eye(3)[:2, None], torch.eye(3)[None], scale=9.0)
    >>> seen = torch.ones(1, 3, dtype=torch.bool)
    >>> head_similarity(heads, heads, View(seen, seen.int(), ~seen[0])).argmax(dim=1).tolist()
    [0, 1]
    """
    student, teacher = student.widened(), teacher.widened()
    total = student.query.new_zeros(len(student.query), len(teacher.query))
    for start in range(0, len(view.seen), chunk):
        rows = slice(start, start + chunk)
        seen = view.seen[rows][:, None]
        own, target = (
            torch.log_softmax(x.logits(rows).masked_fill(~seen, -torch.inf), dim=-1).masked_fill(~seen, 0.0)
            for x in (student, teacher)
        )
        weight = target.exp() * seen
        total += torch.einsum("rsn,rtn->st", own, weight) - (weight * target).sum(dim=(0, 2))
    mean: Tensor = total / view.seen.any(dim=1).sum().clamp_min(1)
    return mean
