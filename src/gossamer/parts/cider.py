"""CIDEr-D: how much a caption says what the references say, words weighted by how rare they are in the references.

For n = 1 ... 4, g_n(c) the vector of tf-idf weights of the n-grams of a text (count times ln(N / df), df the number of
items whose references hold the n-gram, at least 1, N the number of items):

    CIDEr-D(c, R) = 10 / (4 |R|) sum_n sum_r exp(-(l_c - l_r)^2 / (2 6^2)) x
                    min(g_n(c), g_n(r)) . g_n(r) / |g_n(c)| |g_n(r)|

Source: Vedantam, Zitnick and Parikh 2015, section 5 (the clipped variant with the length penalty). Words are runs of
letters and digits, in lower case; the original tokenizes as the Penn Treebank does and needs Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from gossamer.core.errors import InputError

LONGEST, SIGMA, SCALE = 4, 6.0, 10.0
Gram = tuple[str, ...]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """One score an item, 0 to 10; the score of a set is their mean. InputError where an item has no reference.

    With one item only, or where all items have the same references, every weight is 0 and so is every score.
    """
    if len(candidates) != len(references):
        raise InputError("cider_d", must=f"get references for {len(candidates)} candidates", got=len(references))
    empty = [place for place, given in enumerate(references) if not given]
    if empty:
        raise InputError(f"cider_d: item {empty[0]}", must="have at least one reference", got="none")
    counted = [[_grams(text) for text in given] for given in references]
    seen: Counter[Gram] = Counter()
    for item in counted:
        seen.update({gram for grams in item for size in grams for gram in size})
    weights = {gram: math.log(len(references) / count) for gram, count in seen.items()}
    rare = math.log(len(references)) if references else 0.0
    scores = []
    for text, given in zip(candidates, counted, strict=True):
        mine = _grams(text)
        alike = [_alike(mine, other, weights, rare) for other in given]
        scores.append(SCALE * sum(alike) / len(alike))
    return scores


def _alike(mine: list[Counter[Gram]], other: list[Counter[Gram]], weights: Mapping[Gram, float], rare: float) -> float:
    lengths = sum(mine[0].values()) - sum(other[0].values())
    total = 0.0
    for first, second in zip(mine, other, strict=True):
        a, b = ({gram: n * weights.get(gram, rare) for gram, n in grams.items()} for grams in (first, second))
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        if norms > 0:
            total += sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norms
    return math.exp(-(lengths**2) / (2 * SIGMA**2)) * total / LONGEST


def _grams(text: str) -> list[Counter[Gram]]:
    words = re.findall(r"\w+", text.lower())
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, LONGEST + 1)]
