"""Errors that say where, what must hold, what was found, and what to do.

Exit codes of the command line: 0 done, 1 failed, 2 wrong use, 3 measured but a claim or budget is not met.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GossamerError(Exception):
    """Base of all errors raised on purpose: work that failed (exit code 1)."""

    exit_code = 1

    def __init__(self, where: str, *, must: str = "", got: object = None, do: str = "") -> None:
        self.where, self.must, self.got, self.do = where, must, got, do
        text = where
        if must:
            text += f": must {must}"
        if got is not None:
            text += f", got {got}"
        if do:
            text += f"; {do}"
        super().__init__(text)


class UsageError(GossamerError):
    """The caller can mend it (exit code 2)."""

    exit_code = 2


class OptionError(UsageError):
    """An option, recipe key or name that is unknown, of the wrong type or out of bounds."""


class InputError(UsageError):
    """Data, a file or a model that cannot be used as it is."""


class MissingExtra(UsageError):
    """A package that this system needs is not installed."""

    def __init__(self, where: str, extra: str) -> None:
        super().__init__(where, must=f"have the extra {extra!r} installed", do=f"pip install 'gossamer[{extra}]'")


class NotMet(GossamerError):
    """Everything ran and was measured, but a claim or a budget is not met (exit code 3)."""

    exit_code = 3


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``did you mean 'seed'?`` for a near miss, else the list of choices."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "choose one of " + ", ".join(names) if names else "there are none to choose from"
