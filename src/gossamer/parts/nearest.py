"""Nearest rows by cosine, exactly or by an inverted file (faiss, extra "index")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gossamer.core.errors import InputError, MissingExtra

EPSILON = 1e-8
_PER_LIST = 39  # rows a list at least, as faiss wants for training
_SHARE = 32  # one list in so many is read


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1 in float32; a zero row stays zero."""
    return normalize(vectors.detach().float().cpu(), dim=-1, eps=EPSILON)


def checked_unit(queries: Tensor, width: int) -> Tensor:
    """Queries [q, width] of length 1; InputError for another shape, a NaN or an infinity."""
    if queries.dim() != 2 or queries.shape[1] != width:
        raise InputError(
            "search: queries",
            must=f"be of shape [n, {width}], the vocabulary's width",
            got=tuple(queries.shape),
            do="use the model and vocabulary that belong together",
        )
    if not torch.isfinite(queries).all():
        raise InputError("search: queries", must="be finite", got="NaN or infinity", do="look at the features")
    return unit(queries)


def best(queries: Tensor, entries: Tensor, k: int) -> list[list[tuple[float, int]]]:
    """(score, row) of the ``k`` entries [n, d] nearest to each query [q, d], all of length 1.

    Best first; of equal scores the lower row comes first, and is the one that is found.
    """
    scores = queries @ entries.T
    if k == 1:
        top = scores.max(dim=1)
        return [[pair] for pair in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    values, rows = scores.topk(min(k, entries.shape[0]), dim=1)
    return [
        sorted(zip(v, r, strict=True), key=lambda pair: (-pair[0], pair[1]))
        for v, r in zip(values.tolist(), rows.tolist(), strict=True)
    ]


class InvertedFile:
    """Approximate search: about 4 sqrt(n) lists by k-means, of which one in 32 is read."""

    def __init__(self, entries: Tensor) -> None:
        """``entries`` [n, d] of length 1. Raises MissingExtra without faiss."""
        try:
            import faiss
        except ImportError:
            raise MissingExtra("approximate search", "index") from None
        count, width = entries.shape
        lists = max(1, min(count // _PER_LIST, round(4 * count**0.5)))
        self._index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.max_points_per_centroid = _PER_LIST
        self._index.cp.niter = 8
        self._index.train(entries.numpy())
        self._index.add(entries.numpy())
        self._index.nprobe = max(8, lists // _SHARE)

    def best(self, queries: Tensor, k: int) -> list[list[tuple[float, int]]]:
        """As :func:`best`; fewer than ``k`` where the lists that are read hold fewer."""
        scores, rows = self._index.search(queries.numpy(), k)
        return [
            [(float(score), int(row)) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores, rows, strict=True)
        ]
