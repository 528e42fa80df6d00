"""What guessing is worth: how long steps take by their tokens, and how likely guessed tokens are to be right.

With t(n) the seconds of a step of n tokens and c_1 >= c_2 >= ... the chances of the guessed tokens, the first m are
verified that maximise

    (1 + c_1 + ... + c_m) / t(1 + m)

A chance is the product along the path to a token of how often tokens like it were right where their place was reached.
Alike are tokens of one rank among their siblings whose probabilities, as the drafter gives them, are within an eighth;
copied ones where as many tokens matched; and those that both have. The drafter's own probability counts as two
observations. A greedy text and a sampled one have chances of their own.
"""

from __future__ import annotations

import bisect
import collections
import math
import statistics
from collections.abc import Sequence

from gossamer.parts.requests import Draft

TIMES = 16  # that a median is taken of
_BINS, _RANKS, _PRIOR = 8, 3, 2.0


class Times:
    """Seconds, or whatever else is seen again and again, as a median of the last ones; ``None`` before the first."""

    def __init__(self) -> None:
        self._seen: collections.deque[float] = collections.deque(maxlen=TIMES)
        self.median: float | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, value: float) -> None:
        self._seen.append(value)
        self.median = statistics.median(self._seen)


class Rate:
    """Seconds a token, over the last steps."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, float]] = collections.deque(maxlen=TIMES)

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, seconds: float, tokens: float) -> None:
        self._seen.append((seconds, tokens))

    @property
    def seconds(self) -> float:
        spent, made = map(sum, zip(*self._seen, strict=True))
        return spent / made


class Pace:
    """Seconds of a step by its number of tokens: medians of what was seen, straight lines between them."""

    def __init__(self) -> None:
        self._seen: dict[int, Times] = collections.defaultdict(Times)

    def note(self, tokens: int, seconds: float) -> None:
        self._seen[tokens].note(seconds)

    def of(self, tokens: int) -> float | None:
        """``None`` until two numbers of tokens were seen; beyond them their last line goes on."""
        known = sorted(self._seen)
        if tokens in self._seen:
            return self._seen[tokens].median
        if len(known) < 2:
            return None
        place = min(max(bisect.bisect(known, tokens), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        first, last = self._seen[low].median, self._seen[high].median
        assert first is not None
        assert last is not None
        return max(first + (last - first) * (tokens - low) / (high - low), min(first, last))

    def worth(self, chances: Sequence[float], company: int = 0) -> float:
        """The least chance that it pays to verify a token for, ``company`` tokens being run beside; 0 while the pace is
        not known."""
        gain, best, least = 1.0, 0.0, math.inf
        for count, chance in enumerate((math.inf, *sorted(chances, reverse=True)), 1):
            seconds = self.of(company + count)
            if seconds is None:
                return 0.0
            gain += chance if count > 1 else 0.0
            if gain / seconds >= best:
                best, least = gain / seconds, chance
        return least


class Chances:
    """How often guessed tokens were right, of drafts that give ``joint``."""

    def __init__(self) -> None:
        self._reached: dict[tuple[int, int], int] = collections.defaultdict(int)
        self._right: dict[tuple[int, int], int] = collections.defaultdict(int)

    def of(self, draft: Draft) -> list[float]:
        """The chance of each token to be accepted, never above its parent's."""
        found = list[float]()
        for parent, (alike, own) in zip(draft.tree, _likeness(draft), strict=True):
            right, reached = self._right[alike] + _PRIOR * own, self._reached[alike] + _PRIOR
            found.append(right / reached * (found[parent] if parent >= 0 else 1.0))
        return found

    def note(self, draft: Draft, path: Sequence[int]) -> None:
        """The tokens at the places ``path`` were right, and of what follows them no other."""
        reached, right = {-1, *path}, set(path)
        for place, (parent, (alike, _)) in enumerate(zip(draft.tree, _likeness(draft), strict=True)):
            if parent in reached:
                self._reached[alike] += 1
                self._right[alike] += place in right


def _likeness(draft: Draft) -> list[tuple[tuple[int, int], float]]:
    """Sort and size of each token, by which they are alike, and its probability after its parent."""
    assert draft.joint is not None
    ranks: dict[int, int] = collections.defaultdict(int)
    found = []
    for parent, score, match in zip(draft.tree, draft.joint, draft.copied or [0] * len(draft.tokens), strict=True):
        own = math.exp(min(0.0, score - (draft.joint[parent] if parent >= 0 else 0.0)))
        likely = min(int(own * _BINS), _BINS - 1)
        sort = _RANKS if match > 0 else _RANKS + 1 if match < 0 else min(ranks[parent], _RANKS - 1)
        found.append(((sort, match if match > 0 else likely), own))
        ranks[parent] += 1
    return found
