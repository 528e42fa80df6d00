"""Narration pair encoding: many narrations as few prefixes and few postfixes that all prefixes share.

A narration n = w_1 ... w_k is a sequence of words; p is a word-prefix of n where n = p + " " + s. From the list N:

    roots     R = {n in N : no proper word-prefix of n is in N}
    postfixes S = {s : n = r + " " + s, n in N, r in R}, those seen at least ``min_count`` times
    prefixes  P = R  and every n in N that no p in P with an s in S makes up

so that every n in N is in P, or n = p + " " + s with p in P and s in S. With ``min_count=1`` P = R: a narration that
others extend is a prefix unless it is itself p + " " + s.

Source: VLog (arXiv 2503.09402), algorithm 1. Its box puts only narrations that nothing extends in P, against its own
text and figure ("cut a potato" is a prefix because "cut a potato with a knife" exists). ``mode="algorithm1"`` is the
box to the letter: with it a narration that others extend may be lost.

Sorting brings a narration's prefixes right before it, so one pass with a stack of string prefixes finds them all; the
work after sorting is linear in the total length, without a trie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from gossamer.core.errors import InputError, OptionError, did_you_mean

MODES = ("consistent", "algorithm1")
_TAG = re.compile(r"#\s*(?:unsure|summary|[a-z]\b(?:\s+[a-z]\b)*)", re.IGNORECASE)


@dataclass(frozen=True)
class NarrationPairs:
    """``prefixes`` in order of first use, ``postfixes``, and ``counts`` of every (prefix, postfix), "" for none."""

    prefixes: list[str]
    postfixes: list[str]
    counts: Mapping[tuple[str, str], int]
    mode: str = "consistent"
    min_count: int = 1
    _prefixes: Set[str] = field(init=False, repr=False, compare=False)
    _postfixes: Set[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefixes", frozenset(self.prefixes))
        object.__setattr__(self, "_postfixes", frozenset(self.postfixes))

    def encode(self, narration: str) -> tuple[str, str]:
        """(prefix, postfix), "" for no postfix; the shortest prefix where several would do. InputError if none does."""
        text = normalise(narration)
        pair = _split(text, self._prefixes, self._postfixes)
        if pair is None:
            raise InputError(
                f"narration {narration!r}",
                must="be made of a known prefix and postfix",
                do="build the pairs from a list that holds it, or add it to the vocabulary",
            )
        return pair

    def __contains__(self, narration: str) -> bool:
        return _split(normalise(narration), self._prefixes, self._postfixes) is not None


def narration_pairs(
    narrations: Iterable[str], *, mode: str = "consistent", min_count: int = 1, counts: bool = True
) -> NarrationPairs:
    """Encode a list of narrations; repeats count, white space is made single blanks, empty ones are left out.

    ``min_count`` is how often a remainder must be seen (repeats counted) to become a postfix. ``counts=False`` leaves
    the pair counts empty. Raises InputError when no narration is left, OptionError for an unknown mode.
    """
    if mode not in MODES:
        raise OptionError("narration_pairs.mode", must=f"be one of {MODES}", got=mode, do=did_you_mean(mode, MODES))
    if min_count < 1:
        raise OptionError("narration_pairs.min_count", must="be >= 1", got=min_count)
    seen = Counter(map(normalise, narrations))
    seen.pop("", None)
    if not seen:
        raise InputError("narrations", must="hold at least one that is not empty", got="none")
    prefixes, postfixes = _algorithm1(seen) if mode == "algorithm1" else _consistent(seen, min_count)
    if mode == "algorithm1":
        postfixes = {s: n for s, n in postfixes.items() if n >= min_count}
    pairs: Counter[tuple[str, str]] = Counter()
    for text, times in seen.items() if counts else ():
        pair = _split(text, prefixes, postfixes.keys())
        if pair is not None:
            pairs[pair] += times
    return NarrationPairs([text for text in seen if text in prefixes], list(postfixes), pairs, mode, min_count)


def join(prefix: str, postfix: str) -> str:
    """The narration of a pair; ``postfix`` may be empty."""
    return f"{prefix} {postfix}" if postfix else prefix


def normalise(narration: str) -> str:
    """Words with one blank between them."""
    return " ".join(narration.split())


def clean(narration: str) -> str:
    """Without the tags of egocentric annotations ("#C C", "#O", "#unsure"), a full stop at the end and extra blanks."""
    return normalise(_TAG.sub(" ", narration)).rstrip(".").rstrip()


def _split(text: str, prefixes: Set[str], postfixes: Set[str]) -> tuple[str, str] | None:
    if text in prefixes:
        return text, ""
    at = text.find(" ")
    while at >= 0:
        if text[:at] in prefixes and text[at + 1 :] in postfixes:
            return text[:at], text[at + 1 :]
        at = text.find(" ", at + 1)
    return None


def _chains(texts: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Every text with its proper word-prefixes among ``texts``, shortest first."""
    stack: list[str] = []
    for text in sorted(texts):
        while stack and not text.startswith(stack[-1]):
            stack.pop()
        yield text, [item for item in stack if text[len(item)] == " "]
        stack.append(text)


def _consistent(seen: Mapping[str, int], min_count: int) -> tuple[set[str], dict[str, int]]:
    prefixes: set[str] = set()
    extended: dict[str, str] = {}
    postfixes: Counter[str] = Counter()
    for text, chain in _chains(seen):
        if chain:
            extended[text] = chain[0]
            postfixes[text[len(chain[0]) + 1 :]] += seen[text]
        else:
            prefixes.add(text)
    kept = {s: n for s, n in postfixes.items() if n >= min_count}
    if len(kept) < len(postfixes):
        # sorted order: a narration comes after all its prefixes, which may have joined P by then
        for text in sorted(extended):
            if _split(text, prefixes, kept.keys()) is None:
                prefixes.add(text)
    return prefixes, kept


def _algorithm1(seen: Mapping[str, int]) -> tuple[set[str], dict[str, int]]:
    extended: set[str] = set()
    postfixes: Counter[str] = Counter()
    for text, chain in _chains(seen):
        extended.update(chain)
        for prefix in chain:
            postfixes[text[len(prefix) + 1 :]] += seen[text]
    return set(seen) - extended, dict(postfixes)
