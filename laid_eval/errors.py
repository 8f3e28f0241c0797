"""Errors that a user can mend. Only the command line turns them into exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one line with what was asked, given, allowed, and what to do.

    The command line prints it without a traceback and exits with 2.
    """


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `allowed`, or an empty string.

    >>> nearest("nedle", ["needle", "multikey"])
    " (did you mean 'needle'?)"
    >>> nearest("zzz", ["needle"])
    ''
    """
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
