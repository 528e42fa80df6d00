"""Applications: ``apply(inputs) -> Result``, a task done from end to end; ``fit(data)`` learns what it needs first."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from gossamer.kinds.base import System


class Result(Protocol):
    """What an application gives: ``as_dict`` for machines, further forms as methods of their own."""

    def as_dict(self) -> dict[str, Any]: ...


class Application(System):
    """Reaches models of other systems through the Auto classes or by registered names, never by importing them."""

    verb = "apply"

    @abc.abstractmethod
    def fit(self, data: Iterable[Any]) -> Any:
        """Learn from ``data`` what is the application's own (a vocabulary, a threshold); models keep their weights."""

    @abc.abstractmethod
    def apply(self, inputs: Any) -> Any:
        """Do the task on ``inputs`` and return its :class:`Result`."""

    @abc.abstractmethod
    def example(self, folder: Path) -> tuple[Any, Any]:
        """Small real (data, inputs) of its own, files written under ``folder``: for the contract laws and the docs."""
