"""Guesses that a repeated beginning goes on as it did before.

The last n tokens are looked for in what came before, n from ``longest`` down to 1; what followed the latest occurrence
is the guess (Saxena, "Prompt Lookup Decoding", 2023). It costs next to nothing, so it also goes beside a drafter's
tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.parts.requests import Draft

LENGTH = 10  # tokens that are copied at most
_MOST = 7  # matched tokens that count
_PRIOR = math.log(0.5)  # of a copied token, before anything was seen


def continuation(ids: Sequence[int], longest: int, count: int) -> tuple[list[int], int]:
    """At most ``count`` tokens after the latest earlier occurrence of the longest suffix, and how long that is."""
    for size in range(min(longest, len(ids) - 1), 0, -1):
        suffix = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == suffix:
                return list(ids[start + size : start + size + count]), size
    return [], 0


def with_copy(draft: Draft, ids: Sequence[int], longest: int, count: int = LENGTH) -> Draft:
    """``draft`` and a branch of what followed the end of ``ids`` before; tokens that both have are marked. Drafts that
    were drawn, or do not say how likely they are, stay as they are."""
    copied, size = continuation(ids, longest, count)
    if not copied or (draft.tokens and (draft.joint is None or draft.probs is not None)):
        return draft
    tokens, parents, joint = list(draft.tokens), draft.tree, list(draft.joint or ())
    marks = [0] * len(tokens) if draft.copied is None else list(draft.copied)
    children, at = draft.children(), -1
    for depth, token in enumerate(copied):
        length = min(size + depth, _MOST)
        below = next((place for place in children.get(at, ()) if tokens[place] == token), None)
        if below is None:
            tokens.append(token)
            parents.append(at)
            joint.append((joint[at] if at >= 0 else 0.0) + _PRIOR)
            marks.append(length)
            at = len(tokens) - 1
        else:
            marks[below], at = -length, below
    return Draft(tokens, parents, None, joint, marks)
