"""Contrastive loss between two sets of vectors, with any matrix of targets, and its learnable temperature.

    s_ij = cos(x_i, y_j) / tau,    L_rows = - mean_i sum_j t_ij log softmax_j(s_i)

x [n, d] and y [m, d] are features of any length and scale; t [n, m] has rows that are normalised to sum to 1.
Symmetric: the same over the columns, s^T [m, n] with t^T normalised anew, and the mean of the two. Without targets
row i belongs to column i (InfoNCE). Pairs that are equal in fact (the same text twice in a batch) can be left out of
the negatives.
Sources: van den Oord et al. 2018 (InfoNCE), Radford et al. 2021 (CLIP: symmetric, learned temperature, at most 100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from gossamer.core.errors import InputError

EPSILON = 1e-8


def cosine_logits(x: torch.Tensor, y: torch.Tensor, tau: torch.Tensor | float = 1.0) -> torch.Tensor:
    """cos(x_i, y_j) / tau [n, m] in float32, for x [n, d] and y [m, d] of any float type; a zero row gives zeros.

    Raises InputError where the widths differ or a feature is not finite: a NaN would win or lose every search.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        got = f"{list(x.shape)} and {list(y.shape)}"
        raise InputError("features", must="be [n, d] and [m, d]", got=got, do="encode both with the same encoder")
    for name, value in (("first", x), ("second", y)):
        if not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).any(dim=1).nonzero()[0])
            must, got = "be finite numbers", f"NaN or infinity in row {row} of the {name}"
            raise InputError("features", must=must, got=got, do="encode that row again")
    normal = [nn.functional.normalize(value.float(), dim=1, eps=EPSILON) for value in (x, y)]
    return normal[0] @ normal[1].T / tau


def contrastive_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    tau: torch.Tensor | float = 0.07,
    targets: torch.Tensor | None = None,
    symmetric: bool = True,
    equal: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss in nats, a scalar, of x [n, d] against y [m, d]; see :func:`matrix_loss` for the other arguments."""
    return matrix_loss(cosine_logits(x, y, tau), targets, symmetric, equal)


def matrix_loss(
    logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    symmetric: bool = True,
    equal: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss in nats, a scalar, of logits [n, m].

    ``targets`` is None (row i belongs to column i, n = m), an index [n] of the right columns, or a matrix [n, m] of
    weights >= 0. A row without weight takes no part, in the other direction a column. ``equal`` [n, m], bool, marks
    pairs to leave out of the negatives; a pair that is itself a target always stays. ``symmetric`` False: rows only.
    """
    if not torch.isfinite(logits).all():
        must = "be finite numbers"
        raise InputError("contrastive loss: logits", must=must, got="NaN or infinity", do="look at the features")
    weights = _weights(logits, targets)
    if equal is not None:
        if equal.shape != logits.shape:
            got = f"{list(equal.shape)} for logits {list(logits.shape)}"
            raise InputError("contrastive loss: equal", must="have the logits' shape", got=got)
        logits = logits.masked_fill(equal.to(logits.device, torch.bool) & (weights == 0), -torch.inf)
    loss = _rows(logits, weights)
    return (loss + _rows(logits.T, weights.T)) / 2 if symmetric else loss


def equal_pairs(rows: Sequence[str], columns: Sequence[str] | None = None) -> torch.Tensor:
    """[n, m], bool: the two texts are equal. The diagonal of a set with itself is True as well."""
    columns = rows if columns is None else columns
    number = {text: place for place, text in enumerate(dict.fromkeys([*rows, *columns]))}
    first, second = (torch.tensor([number[text] for text in texts]) for texts in (rows, columns))
    return first[:, None] == second[None, :]


class Temperature(nn.Module):
    """tau = exp(-scale), learned through ``scale``; kept at or above ``least`` as CLIP keeps its scale below 100."""

    def __init__(self, start: float = 0.07, least: float = 0.01) -> None:
        super().__init__()
        if not 0 < least <= start:
            must = "hold 0 < least <= start"
            raise InputError("temperature", must=must, got=f"start {start}, least {least}", do="raise start")
        self.least = least
        self.scale = nn.Parameter(torch.tensor(-math.log(start)))

    def forward(self) -> torch.Tensor:
        """tau, a scalar in float32."""
        # the parameter, not the result: a clamped result has no gradient and would never leave its bound
        with torch.no_grad():
            self.scale.clamp_(max=-math.log(self.least))
        return torch.exp(-self.scale.float())


def _weights(logits: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """Target weights [n, m], float32."""
    where = "contrastive loss: targets"
    n, m = logits.shape
    if targets is None:
        if n != m:
            do = "say which columns are right by an index [n] or a matrix [n, m]"
            raise InputError(where, must="be given where rows and columns differ in number", got=f"{n} x {m}", do=do)
        return torch.eye(n, device=logits.device)
    targets = targets.to(logits.device)
    if targets.shape == (n,) and not targets.is_floating_point():
        if n and not (int(targets.min()) >= 0 and int(targets.max()) < m):
            raise InputError(where, must=f"be column numbers below {m}", got=f"{targets.min()} to {targets.max()}")
        return nn.functional.one_hot(targets.long(), m).float()
    if targets.shape != (n, m):
        must = f"be an integer index [{n}] or a matrix [{n}, {m}]"
        raise InputError(where, must=must, got=f"{list(targets.shape)} of {targets.dtype}")
    targets = targets.float()
    if not (torch.isfinite(targets).all() and bool((targets >= 0).all())):
        raise InputError(where, must="be finite and not negative", got="others")
    return targets


def _rows(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the rows that have weight of the cross-entropy with the normalised weights."""
    total = weights.sum(dim=1, keepdim=True)
    used = total.squeeze(1) > 0
    if not used.any():
        raise InputError("contrastive loss: targets", must="give some row a weight", got="none")
    shares = (weights / total.clamp(min=torch.finfo(torch.float32).tiny))[used]
    # 0 * -inf is NaN: a pair that was left out has no share
    terms = torch.where(shares > 0, shares * logits[used].log_softmax(dim=1), 0.0)
    return -terms.sum(dim=1).mean()
