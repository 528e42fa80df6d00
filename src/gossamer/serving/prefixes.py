"""What finished requests leave behind for those that begin alike: a slotted cache of whole pasts.

The past of a request is a value: it can be forked, and cut back exactly. A new prompt goes on from the past with which
it has most tokens in common, of a finished request or of one that is still writing. A kept past that is a beginning of
the new prompt is handed over as it is; of any other a copy is cut. The least recently used are dropped when all of them
hold more than ``limit`` tokens together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

_LEAST = 8  # tokens in common below which a copy is not worth its time


@dataclasses.dataclass
class Kept:
    """A request state whose past holds ``ids``; ``drafting``: it also holds the memory of the decoding stage."""

    ids: list[int]
    state: Any
    drafting: bool


class Prefixes:
    """At most ``limit`` tokens of finished requests; 0 keeps none."""

    def __init__(self, limit: int) -> None:
        self.limit, self.tokens = limit, 0
        self._kept: list[Kept] = []  # the most recent last

    def keep(self, entry: Kept) -> None:
        if not entry.ids or len(entry.ids) > self.limit:
            entry.state.close()
            return
        self._kept.append(entry)
        self.tokens += len(entry.ids)
        while self.tokens > self.limit:
            self._drop(0).state.close()

    def take(self, prompt: Sequence[int], drafting: bool, running: Iterable[Kept] = ()) -> tuple[Any, int] | None:
        """A state of the caller's own and how many tokens of ``prompt`` its past has, at most all but the last; the
        past may be longer, and is then to be cut. ``drafting``: only states with the stage's memory serve."""
        wanted = list(prompt[:-1])
        best, most = None, _LEAST - 1
        for entry in (*self._kept, *running):
            if drafting and not entry.drafting:
                continue
            same = common(entry.ids, wanted)
            if same > most or (same == most and best is not None and same == len(entry.ids)):
                best, most = entry, same
        if best is None:
            return None
        place = next((n for n, entry in enumerate(self._kept) if entry is best), None)
        if place is None:
            return best.state.fork(), most
        entry = self._drop(place)
        if most == len(entry.ids):
            return entry.state, most
        self._kept.append(entry)  # used just now
        self.tokens += len(entry.ids)
        return entry.state.fork(), most

    def clear(self) -> None:
        while self._kept:
            self._drop(0).state.close()

    def _drop(self, place: int) -> Kept:
        entry = self._kept.pop(place)
        self.tokens -= len(entry.ids)
        return entry


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning, by halving: lists are compared much faster whole than item by item."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
