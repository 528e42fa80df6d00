"""Guards: ``judge(item) -> Verdict(label, score, reason)`` and ``protect(model)``."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

from gossamer.core.errors import InputError
from gossamer.kinds.base import FittedSystem


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``label`` is "flagged" or "clear"; ``score`` in [0, 1], flagged when it reaches the guard's threshold."""

    label: str
    score: float
    reason: str

    @property
    def flagged(self) -> bool:
        return self.label == "flagged"


class Guard(FittedSystem):
    """A gate over prompts, fitted on rows ``{"text": str, "label": "toxic" | "benign", "scenario": str}``."""

    verb = "judge"

    def check(self, item: str) -> None:
        if not isinstance(item, str) or not item.strip():
            raise InputError(f"{self.name}.judge", must="get a prompt with text in it", got=repr(item))
        if self.state is None:
            raise InputError(
                f"{self.name}.judge", must="be fitted first", do="call fit(bundle, data), or load a saved state"
            )

    @abc.abstractmethod
    def judge(self, item: str) -> Verdict:
        """The verdict on one prompt."""

    @abc.abstractmethod
    def protect(self, model: Any) -> Any:
        """Return ``model`` so that its ``generate`` refuses flagged prompts; one prefill serves both."""
