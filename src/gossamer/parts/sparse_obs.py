"""SparseGPT's column update: weights set to zero one column at a time, made up for by the columns still to come.

Frantar and Alistarh 2023 (arXiv 2301.00774). For ``W [out, in]`` with the Hessian ``H`` of its inputs
(:mod:`gossamer.parts.calibration`) and ``U`` the upper Cholesky factor of ``(H + damp mean(diag H) I)^-1``, so that
``U_jj^2`` is the first diagonal entry of the inverse of what is left of ``H`` from column ``j`` on:

    score        S_ij = W_ij^2 / U_jj^2      what the output error grows by when weight (i, j) goes alone
    unstructured before each block of columns, the ``ratio`` of lowest scores of that block goes, all rows together
    N:M          before each M columns, the N lowest scores of each row go
    update       columns j in order: e = W_ij / U_jj where weight (i, j) goes, else 0;   W_ik <- W_ik - e U_jk, k >= j
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.calibration import invert

Pattern = tuple[int, int]  # N of each M neighbouring inputs go


def prune_columns(
    weight: Tensor,
    hessian: Tensor,
    *,
    ratio: float = 0.5,
    pattern: Pattern | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """``(W', gone)``: the pruned weight ``[out, in]`` in float32, and where it went, bool. ``pattern`` overrules
    ``ratio``; ``block`` columns choose together.

    InputError for a Hessian that is not finite or stays singular, or inputs that M does not divide.
    """
    assert hessian.shape == (weight.shape[1],) * 2, (weight.shape, hessian.shape)
    width = weight.shape[1]
    _check_pattern(width, pattern)
    if pattern is not None:
        block = -(-block // pattern[1]) * pattern[1]
    inverse = invert(hessian, damp=damp, always=True)
    upper = torch.linalg.cholesky(inverse.matrix, upper=True).float()
    work = weight.detach().to(torch.float32).clone()
    work[:, inverse.dead] = 0
    gone = torch.zeros_like(work, dtype=torch.bool)
    for start in range(0, width, block):
        end = min(start + block, width)
        diagonal = upper.diagonal()[start:end]
        part, chosen = work[:, start:end], gone[:, start:end]  # views
        if pattern is None:
            chosen.copy_(lowest((part / diagonal).square(), ratio))
        errors = torch.zeros_like(part)
        for j in range(end - start):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                chosen[:, group] = lowest((part[:, group] / diagonal[group]).square(), ratio, pattern)
            errors[:, j] = torch.where(chosen[:, j], part[:, j], 0.0) / diagonal[j]
            part[:, j + 1 :] -= errors[:, j, None] * upper[start + j, start + j + 1 : end]
        work[:, end:] -= errors @ upper[start:end, end:]
    return work.masked_fill_(gone, 0.0), gone


def lowest(scores: Tensor, ratio: float, pattern: Pattern | None = None) -> Tensor:
    """True at the ``ratio`` of lowest ``scores [out, in]`` of all, or at the N lowest of each M in a row."""
    _check_pattern(scores.shape[1], pattern)
    table = scores.reshape(1, -1) if pattern is None else scores.reshape(-1, pattern[1])
    count = int(table.shape[1] * ratio + 1e-9) if pattern is None else pattern[0]
    # a stable order: of equal scores the first go, and the count is exact
    places = table.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, places, True).reshape(scores.shape)


def _check_pattern(width: int, pattern: Pattern | None) -> None:
    if pattern is not None and width % pattern[1]:
        raise InputError(
            "pruning by pattern", must=f"have inputs that {pattern[1]} divides", got=width, do="prune without a pattern"
        )
