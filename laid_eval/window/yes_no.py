"""Scoring of free answers to yes/no questions as Visual Haystacks publishes it.

There (`run_eval` in `utils.py` of github.com/visual-haystacks/vhs_benchmark) the lower-cased answer is cut by
`nltk.word_tokenize`; it is right where the gold word is among the tokens, and complies where yes or no is. So "yes and
no" is always right, and "yes/no" and "Nope" never are.
"""

from __future__ import annotations

import re

# What NLTK's tokenizer parts from a word next to it. A slash, a hyphen, an underscore are not; a comma or a colon is
# unless a digit follows, a full stop where a sentence ends, and clitics are ("yes's").
_APART = r"""[\s"`«»“”\u2018\u2019„;@#$%&?!*()\[\]{}<>\u2012-\u2015]"""
_BEFORE = rf"(?:(?<![\s\S])|(?<={_APART})|(?<=[:,])|(?<=--)|(?<=\.\.)|(?<=(?<!\w)'))"
_STOP = r"""\.[\])}>"'»”\u2019]*(?:\s|$)"""
_CLITIC = rf"'(?:s|m|d|ll|re|ve)?(?:{_APART}|[.,:]|$)"
_AFTER = rf"(?=$|{_APART}|[:,](?:\D|$)|--|\.\.|{_STOP}|{_CLITIC})"
_WORD = re.compile(f"{_BEFORE}(yes|no){_AFTER}")


def yes_no_words(said: str) -> set[str]:
    """Which of `yes` and `no` are words of an answer.

    >>> sorted(yes_no_words("Yes and no.")), yes_no_words("yes/no"), yes_no_words("NO!")
    (['no', 'yes'], set(), {'no'})
    """
    return set(_WORD.findall(said.lower()))
