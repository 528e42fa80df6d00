"""The catalogue: one row a system, from its card and its evidence, for the command line, the README and the docs."""

from __future__ import annotations

from typing import Any

from gossamer.core import registry
from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.evidence import status
from gossamer.core.kinds import KINDS


def rows(*, kind: str | None = None, builtin: bool = False) -> list[dict[str, Any]]:
    """Name, kind, title, paper, claim and evidence of every system, by kind and name."""
    if kind is not None and kind not in KINDS:
        raise OptionError(f"kind {kind!r}", must="be one of the kinds", do=did_you_mean(kind, KINDS))
    order = list(KINDS)
    found = [
        entry
        for entry in registry.systems().values()
        if (kind is None or entry.kind == kind) and (builtin or not entry.card.builtin)
    ]
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "title": entry.card.title,
            "paper": entry.card.paper,
            "claim": entry.card.claim,
            "builtin": entry.card.builtin,
            "origin": entry.origin,
            "evidence": status(entry),
        }
        for entry in sorted(found, key=lambda entry: (order.index(entry.kind), entry.name))
    ]
