"""The frame around a haystack: chat template or plain text, in tokens.

    opening:   <template before the user's words> instruction
    haystack:  sentences, each tokenized as a continuation
    question:  "Question: ..." <template up to the assistant's words> lead
    choice:    " " + a choice, as the answer's continuation

The answer's start (the lead) is given, so that a choice is the very next thing the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_MARK = "@@HAYSTACK@@"
_ANCHOR = "."  # something to continue: it takes the leading-space rules of every tokenizer out of the way


@dataclass(frozen=True)
class Branch:
    """A question in tokens: a stem that all choices share, and the choices' own tokens."""

    stem: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the stem with its longest choice."""
        return len(self.stem) + max(len(ending) for ending in self.endings)


def branch_of(texts: Sequence[Sequence[int]]) -> Branch:
    """Whole questions in tokens, one a choice, as what they share and what they don't; every choice keeps a token.

    >>> branch_of([[1, 2, 3], [1, 2, 4, 5]])
    Branch(stem=(1, 2), endings=((3,), (4, 5)))
    """
    shared = 0
    shortest = min(len(text) for text in texts)
    while shared < shortest - 1 and len({text[shared] for text in texts}) == 1:
        shared += 1
    return Branch(tuple(texts[0][:shared]), tuple(tuple(text[shared:]) for text in texts))


@dataclass(frozen=True)
class Frame:
    """Tokenizes around the haystack; `before` and `after` are the chat template's own text."""

    tokenizer: PreTrainedTokenizerBase
    before: str | None
    """`None`: a base model without a chat template."""
    after: str

    def opening(self, instruction: str) -> list[int]:
        """Tokens up to the haystack."""
        if self.before is None:
            return [*self.start(), *self._plain(f"{instruction}\n\n")]
        return self._plain(f"{self.before}{instruction}\n\n")

    def continuation(self, text: str) -> list[int]:
        """Tokens of `text` where it continues other text."""
        anchor = self._plain(_ANCHOR)
        whole = self._plain(_ANCHOR + text)
        if whole[: len(anchor)] == anchor:
            return whole[len(anchor) :]
        return self._plain(text)

    def branch(self, prompt: str, lead: str, choices: Sequence[str], told: str = "") -> Branch:
        """A question with its choices, tokenized as whole texts so that no boundary is forced.

        `told` is a last piece of the text that belongs to this question alone.
        """
        stem = f"{told}\n\nQuestion: {prompt}{self.after}{lead}"
        return branch_of([self.continuation(f"{stem} {choice}") for choice in choices])

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def start(self) -> list[int]:
        """What the tokenizer itself puts before a text (a beginning-of-sequence token, or nothing)."""
        bare, full = self._plain("a"), list(self.tokenizer("a").input_ids)
        return full[: full.index(bare[0])] if bare and bare[0] in full else []


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame that the model was trained with: its chat template, or plain text."""
    if not tokenizer.chat_template:
        return Frame(tokenizer, None, "\nAnswer: ")
    # enable_thinking: templates of reasoning models otherwise open a thought, others ignore it.
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    )
    before, _, after = text.partition(_MARK)
    return Frame(tokenizer, before, after)
