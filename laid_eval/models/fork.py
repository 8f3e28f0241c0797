"""KV fan-out: one prefill, many questions.

A text is read once, in chunks, into a key-value cache. At any point questions are put to a *fork* of the cache:
all questions and all their choices go through the model in a single pass, as branches that see the text and
themselves but not each other, at the positions each would have if it alone followed the text. The cache is then
cropped back and reading goes on.

The branches are kept apart by the model's own mask function, wrapped for that one pass, so that sliding windows,
chunked attention and whatever else a family composes hold for every branch. The cache keeps all positions of
every layer: a sliding-window cache drops tokens and can't be cropped back, while the window itself lies in the
mask. Memory is linear in the length.

Models that can't be forked (recurrent states, rotary embeddings that change with the length, attention outside
the mask interface) are asked with whole prompts, and the reason is kept.

A slot is a token's place in the cache, its position what the rotary embedding sees. Masks go by slots. Positions are
slots unless questions are asked, or the tokens read are moved, so that they meet at other distances than their own.

Shape letters: L tokens read, T tokens of all branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from laid_eval.models.frame import Branch
from laid_eval.models.rotary import Rotary

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOOSE = 0.25  # nats; half precision rounds differently in differently shaped products
FAILURES = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)

Span = tuple[int, int]
"""Slots from the first to before the second."""


class Text(Protocol):
    """A text read so far, and how it is asked about."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Start with nothing read."""

    def read(self, tokens: Sequence[int]) -> None:
        """Read on."""

    def ask(self, branches: Sequence[Branch]) -> list[list[float]]:
        """Summed log-probability of every choice of every branch; the text read stays as it was."""
        ...

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """Tokens that go through the model to ask a branch when `read` tokens were read."""
        ...


class ForkedText:
    """A text read so far, as a key-value cache that questions fork from."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Start with nothing read."""
        self.model = model
        self.length = 0  # tokens read
        self.position = 0  # of what comes next
        self._cache = DynamicCache()

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> None:
        """Read on; one forward pass."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.length += len(tokens)
        self.position = self.length

    @torch.inference_mode()
    def move(self, shifts: Sequence[float], rotaries: Sequence[Rotary | None]) -> None:
        """Move every token read along the position axis, for what is asked from now on.

        Keys are turned, so a question meets each token at another distance; what the tokens took in when they were
        read stays.

        Args:
            shifts: By how many positions, for each token read; fractions allowed.
            rotaries: The rotary pairs of every layer.
        """
        by = torch.tensor(list(shifts), dtype=torch.float64, device=self.model.device)
        layers: list[Any] = self._cache.layers
        for layer, rotary in zip(layers, rotaries, strict=True):
            if rotary is not None:
                keys: Tensor = layer.keys
                turned = rotary.pairs(keys) * rotary.turns(by)
                keys[..., torch.as_tensor(rotary.first)] = turned.real.to(keys.dtype)
                keys[..., torch.as_tensor(rotary.second)] = turned.imag.to(keys.dtype)

    @torch.inference_mode()
    def ask(
        self,
        branches: Sequence[Branch],
        at: Sequence[float] | None = None,
        hidden: Sequence[Sequence[Span]] | None = None,
    ) -> list[list[float]]:
        """Summed log-probability of every choice of every branch; the text read stays as it was.

        Args:
            branches: The questions.
            at: Position of each branch's first token; by default the one after the text.
            hidden: Slots of the text, [start, end), that each branch does not see. What was read after them has seen
                them.
        """
        pack = _Pack(branches, self.model.device)
        start = torch.tensor(at or [self.position] * len(branches), device=self.model.device)
        with _branches_apart(self.model, self.length, pack, hidden):
            logits = self.model(
                pack.ids[None],
                position_ids=(pack.offset + start[pack.owner])[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=pack.kept,
            ).logits[0]
        self._cache.crop(-len(pack.ids))
        return pack.collect(logits)

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """The stem once, and every choice but its last token."""
        return len(branch.stem) + sum(len(ending) - 1 for ending in branch.endings)


class WholePrompts:
    """The same, asked with a whole prompt per question: the slow way that every model can go."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Start with nothing read."""
        self.model = model
        self._tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        """Remember the tokens; nothing is computed."""
        self._tokens.extend(tokens)

    @torch.inference_mode()
    def ask(self, branches: Sequence[Branch]) -> list[list[float]]:
        """Summed log-probability of every choice of every branch."""
        return [self._ask(branch) for branch in branches]

    def pass_tokens(self, branch: Branch, read: int) -> int:
        """The whole prompt, again for every choice that starts otherwise (its last token is only predicted)."""
        return sum(read + len(branch.stem) + len(given) for given in {ending[:-1] for ending in branch.endings})

    def _ask(self, branch: Branch) -> list[float]:
        logs: dict[tuple[int, ...], Tensor] = {}
        out = []
        for ending in branch.endings:
            given = ending[:-1]
            if given not in logs:
                ids = torch.tensor([[*self._tokens, *branch.stem, *given]], device=self.model.device)
                kept = torch.arange(ids.shape[1] - len(ending), ids.shape[1], device=ids.device)
                logits = self.model(ids, use_cache=False, logits_to_keep=kept).logits[0]
                logs[given] = torch.log_softmax(logits.float(), dim=-1)
            rows = torch.arange(len(ending), device=self.model.device)
            wanted = torch.tensor(ending, device=self.model.device)
            out.append(float(logs[given][rows, wanted].sum()))
        return out


class _Pack:
    """Branches laid out in one row. A slot is a place in the row, its offset the position after the text."""

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        ids: list[int] = []
        offset: list[int] = []
        parent: list[int] = []  # the slot a token follows; -1: the text itself
        owner: list[int] = []
        kept: list[int] = []
        self._sums: list[list[list[tuple[int, int]]]] = []  # branch, choice, (row of logits, token)

        def lay(tokens: Sequence[int], after: int, first: int) -> None:
            for k, token in enumerate(tokens):
                parent.append(after if k == 0 else len(ids) - 1)
                offset.append(first + k)
                owner.append(len(self._sums))
                ids.append(token)

        for branch in branches:
            lay(branch.stem, -1, 0)
            stem = len(ids) - 1
            kept.append(stem)
            row = len(kept) - 1
            choices = []
            for ending in branch.endings:
                terms = [(row, ending[0])]
                start = len(ids)
                lay(ending[:-1], stem, len(branch.stem))
                for k, token in enumerate(ending[1:]):
                    kept.append(start + k)
                    terms.append((len(kept) - 1, token))
                choices.append(terms)
            self._sums.append(choices)
        self.ids = torch.tensor(ids, device=device)
        self.offset = torch.tensor(offset, device=device)
        self.owner = torch.tensor(owner, device=device)  # (T,): the branch of each slot
        self.kept = torch.tensor(kept, device=device)
        self.visible = torch.eye(len(ids), dtype=torch.bool)
        for slot, before in enumerate(parent):
            if before >= 0:
                self.visible[slot] |= self.visible[before]
        self.visible = self.visible.to(device)  # (T, T): a slot sees itself and what it follows

    def collect(self, logits: Tensor) -> list[list[float]]:
        """Sums over the tokens of each choice; `logits` has one row per kept slot."""
        logs = torch.log_softmax(logits.float(), dim=-1)
        return [[sum(float(logs[row, token]) for row, token in terms) for terms in choices] for choices in self._sums]


@contextmanager
def _branches_apart(
    model: PreTrainedModel, length: int, pack: _Pack, hidden: Sequence[Sequence[Span]] | None
) -> Iterator[None]:
    """Within, the model's mask function sees each branch right after the text, and no other branch."""
    name = model.config.get_text_config(decoder=True)._attn_implementation
    original = ALL_MASK_ATTENTION_FUNCTIONS[name]
    place = torch.cat([torch.arange(length, device=pack.ids.device), pack.offset + length])
    text = torch.ones(len(hidden or [()]), max(length, 1), dtype=torch.bool)
    for branch, spans in enumerate(hidden or []):
        for start, end in spans:
            text[branch, start:end] = False
    owner = pack.owner if hidden else torch.zeros_like(pack.owner)
    text = text.to(pack.ids.device)  # (branches, L): whether a branch sees a slot of the text

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        composed = kwargs.get("mask_function", causal_mask_function)

        def apart(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
            slot = (q - length).clamp(min=0)
            own = pack.visible[slot, (k - length).clamp(min=0)] & (k >= length)
            read = text[owner[slot], k.clamp(max=text.shape[1] - 1)] & (k < length)
            seen: Tensor = composed(b, h, place[q], place[k]) & (own | read)
            return seen

        kwargs |= {"mask_function": apart, "allow_is_causal_skip": False}
        return original(*args, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS[name] = wrapped
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]


def why_rope_changes(model: PreTrainedModel, longest: int) -> str | None:
    """The reason why what was read early would have to be read anew at `longest` tokens; `None` where there is none."""
    config = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {p["rope_type"]: p for p in [ropes, *ropes.values()] if isinstance(p, dict) and "rope_type" in p}
    for kind in {"dynamic", "longrope"} & set(kinds):
        original = kinds[kind].get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > original:
            return f"its rotary embedding ({kind}) changes with the length of the prompt"
    return None


def why_not_forked(model: PreTrainedModel, longest: int) -> str | None:
    """The reason why a model must be asked with whole prompts; `None` where forks equal them.

    Decided by trying: the two ways are compared on a short text (and by the one thing a short text can't show,
    rotary embeddings that change with the length).
    """
    reason = why_rope_changes(model, longest)
    if reason:
        return reason
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    window = getattr(config, "sliding_window", None) or 0
    size = 48 + (window if window <= 512 else 0)
    ids = torch.randint(0, config.vocab_size, (size,), generator=generator).tolist()
    branches = [
        Branch((ids[1], ids[5]), ((ids[2],), (ids[3], ids[4], ids[6]))),
        Branch((ids[7], ids[8], ids[9]), ((ids[1], ids[2]), (ids[4],))),
    ]
    whole = WholePrompts(model)
    whole.read(ids)
    try:
        forked = ForkedText(model)
        for at in range(0, size, 20):
            forked.read(ids[at : at + 20])
        forked.ask(branches)
        found = forked.ask(branches)
    except FAILURES as error:
        return f"its cache can't be forked ({type(error).__name__})"
    expected = whole.ask(branches)
    return why_different(model, found, expected)


def why_not_moved(model: PreTrainedModel, rotaries: Sequence[Rotary | None]) -> str | None:
    """The reason why tokens and questions can't be moved; `None` where only distances between positions count.

    Decided by trying, on a model that can be forked: text and question moved alike, by a fraction too, must change
    nothing, and a question moved away from its text must change something.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (48,), generator=generator).tolist()
    branches = [Branch((ids[1], ids[5]), ((ids[2],), (ids[3], ids[4])))]
    text = ForkedText(model)
    text.read(ids)
    expected = text.ask(branches)
    try:
        far = text.ask(branches, at=[len(ids) + 100])
        text.move([10.5] * len(ids), rotaries)
        found = text.ask(branches, at=[len(ids) + 10.5])
    except FAILURES as error:
        return f"its positions can't be chosen freely ({type(error).__name__})"
    if _gap(far, expected) == 0:
        return "its answers do not depend on position ids"
    gap = _gap(found, expected)
    if not gap <= _TOLERANCE.get(model.dtype, _LOOSE):
        return f"text and question moved alike give other answers (by {gap:.2g} nats)"
    return None


def why_different(model: PreTrainedModel, found: list[list[float]], expected: list[list[float]]) -> str | None:
    """The reason why answers on forks are not those to whole prompts; `None` where they are, up to rounding."""
    gap = _gap(found, expected)
    if gap <= _TOLERANCE.get(model.dtype, _LOOSE):
        return None
    return f"forks of its cache differ from whole prompts (by {gap:.2g} nats)"


def _gap(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
