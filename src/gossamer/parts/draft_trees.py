"""Trees of guessed tokens, grown from a drafter's distributions.

A :class:`Source` gives log-probabilities of what follows places of the tree; the policies here decide which places are
looked at and which tokens are guessed:

- :func:`static_tree`: a fixed shape; a level's first places in order get so many of their best tokens. The default is
  the tree of 25 tokens, 5 deep, of EAGLE (Li et al. 2024, arXiv 2401.15077).
- :func:`beam_tree`: each level keeps the ``top_k`` best places by joint log-probability; of all tokens seen the best
  ``total`` are guessed (EAGLE-2, arXiv 2406.16858).
- :func:`budget_tree`: at each place the tokens up to a cumulative probability, none far below the best; of a level's
  candidates the best by joint log-probability while the budget lasts (Clover, arXiv 2405.00263).

A beam and a budget look no further than ``floor``: a level is not asked for where its best place has a lower joint
log-probability. Joint scores take the drafter at temperature 1 whatever the sampling is. A child never ranks above its
parent, so what is kept is a tree. All tokens are chosen, not drawn: ``Draft.probs`` is ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gossamer.parts.requests import Draft

SHAPE = ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,))


class Source(Protocol):
    """A drafter at one place of one request. ``vocabulary`` maps columns to token ids; ``None``: they are the ids."""

    vocabulary: Tensor | None

    def root(self) -> Tensor:
        """Log-probabilities [v] of the first guessed token."""

    def expand(self, parents: Sequence[int], tokens: Sequence[int], depth: int) -> Tensor:
        """Log-probabilities [n, v] of what follows ``tokens``, all ``depth`` deep (1: the first guessed).

        ``parents`` are the expanded places that they follow, in the order of their expansion from 0; -1 is the root.
        """


def static_tree(source: Source, depth: int, shape: Sequence[Sequence[int]] = SHAPE) -> Draft:
    """``shape[l][i]`` children of the i-th place of level l (0: the root); deeper than ``depth`` none."""
    tokens, parents, joint = list[int](), list[int](), list[float]()
    places, numbers, table, expanded = [-1], [-1], source.root()[None], 0
    for level, counts in enumerate(shape[:depth]):
        if level:
            numbers_next = list(range(expanded, expanded + len(places)))
            table = source.expand(numbers, [tokens[place] for place in places], level)
            numbers, expanded = numbers_next, expanded + len(places)
        best = table.topk(min(max(counts), table.shape[-1]))
        found = list[tuple[int, int]]()  # place, and number of its parent
        for row, (place, count) in enumerate(zip(places, counts, strict=False)):
            above = 0.0 if place < 0 else joint[place]
            for token, score in zip(
                _ids(source, best.indices[row][:count]), best.values[row][:count].tolist(), strict=True
            ):
                found.append((len(tokens), numbers[row]))
                tokens.append(token)
                parents.append(place)
                joint.append(above + score)
        wanted = len(shape[level + 1]) if level + 1 < len(shape) else 0
        places, numbers = [place for place, _ in found[:wanted]], [number for _, number in found[:wanted]]
    return Draft(tokens, parents, joint=joint)


def beam_tree(source: Source, depth: int, top_k: int, total: int, floor: float = -math.inf) -> Draft:
    """At most ``total`` tokens, ``depth`` deep. Asks the source once a level, for at most ``top_k`` places."""
    seen = list[tuple[float, int, int]]()  # joint score, parent in seen, token
    beams, numbers = [-1], [-1]
    table, expanded = source.root()[None], 0
    for level in range(depth):
        if level:
            table = source.expand(numbers, [seen[beam][2] for beam in beams], level)
            numbers, expanded = list(range(expanded, expanded + len(beams))), expanded + len(beams)
        best = table.topk(min(top_k, table.shape[-1]))
        first = len(seen)
        number_of = list[int]()
        for row, beam in enumerate(beams):
            joint = best.values[row] + (0.0 if beam < 0 else seen[beam][0])
            for score, token in zip(joint.tolist(), _ids(source, best.indices[row]), strict=True):
                seen.append((score, beam, token))
                number_of.append(numbers[row])
        ranked = sorted(range(first, len(seen)), key=lambda place: -seen[place][0])[:top_k]
        if seen[ranked[0]][0] < floor:
            break
        beams, numbers = ranked, [number_of[place - first] for place in ranked]
    return _best(seen, total)


def budget_tree(source: Source, depth: int, budget: int, top_p: float, ratio: float, floor: float = -math.inf) -> Draft:
    """At most ``budget`` tokens. A place's candidates are its best tokens until their probabilities exceed ``top_p``,
    without those below ``ratio`` times the best; a level takes the best of its candidates and leaves the rest of the
    budget to the next."""
    seen = list[tuple[float, int, int]]()
    beams, numbers = [-1], [-1]
    table, expanded = source.root()[None], 0
    for level in range(depth):
        if level:
            table = source.expand(numbers, [seen[beam][2] for beam in beams], level)
            numbers, expanded = list(range(expanded, expanded + len(beams))), expanded + len(beams)
        left = budget - len(seen)
        best = table.topk(min(left, table.shape[-1]))
        chances = best.values.exp()
        # the token that carries the sum over top_p is still in
        kept = ((chances.cumsum(-1) - chances) <= top_p) & (chances >= ratio * chances[:, :1])
        candidates = list[tuple[float, int, int, int]]()
        for row, beam in enumerate(beams):
            joint = (best.values[row] + (0.0 if beam < 0 else seen[beam][0]))[kept[row]].tolist()
            tokens = _ids(source, best.indices[row][kept[row]])
            candidates += [(*pair, beam, numbers[row]) for pair in zip(joint, tokens, strict=True)]
        candidates = sorted(candidates, key=lambda one: -one[0])[:left]
        beams = list(range(len(seen), len(seen) + len(candidates)))
        numbers = [number for *_, number in candidates]
        seen += [(score, beam, token) for score, token, beam, _ in candidates]
        if len(seen) == budget or not beams or seen[beams[0]][0] < floor:
            break
    return _best(seen, budget)


def _best(seen: Sequence[tuple[float, int, int]], total: int) -> Draft:
    """The ``total`` best of the places seen; of equals the earlier ones, so parents come along."""
    kept = sorted(sorted(range(len(seen)), key=lambda place: -seen[place][0])[:total])
    new = {-1: -1} | {place: i for i, place in enumerate(kept)}
    tokens, parents = [seen[place][2] for place in kept], [new[seen[place][1]] for place in kept]
    return Draft(tokens, parents, joint=[seen[place][0] for place in kept])


def _ids(source: Source, columns: Tensor) -> list[int]:
    found: list[int] = (columns if source.vocabulary is None else source.vocabulary[columns]).tolist()
    return found
