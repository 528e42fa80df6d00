"""The column update is that of the formula, keeps its counts, and beats dropping weights alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.calibration import squared_error
from gossamer.parts.sparse_obs import lowest, prune_columns


def problem(columns: int = 32) -> tuple[Tensor, Tensor]:
    """(W [6, in], H) with inputs that go together."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(150, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(6, columns, generator=generator), (2 / 150 * x.T @ x).double()


def naive(weight: Tensor, hessian: Tensor, span: int, counts: tuple[int, bool], damp: float) -> tuple[Tensor, Tensor]:
    """Each ``span`` columns: the scores by inverting what is left of H; then column by column the closed-form update
    of all columns to come. ``counts``: how many go, and whether of each row."""
    count, by_row = counts
    width = weight.shape[1]
    full = hessian + damp * hessian.diagonal().mean() * torch.eye(width)
    work, gone = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, width, span):
        here = range(start, min(start + span, width))
        left = torch.stack([torch.linalg.inv(full[j:, j:])[0, 0] for j in here])
        scores = work[:, here.start : here.stop].square() / left
        rows = range(len(work)) if by_row else [slice(None)]
        for row in rows:
            flat = scores[row].reshape(-1)
            chosen = torch.zeros_like(flat, dtype=torch.bool)
            chosen[flat.argsort()[:count]] = True
            gone[row, here.start : here.stop] = chosen.reshape(gone[row, here.start : here.stop].shape)
        for j in here:
            inverse = torch.linalg.inv(full[j:, j:])
            error = torch.where(gone[:, j], work[:, j], 0.0) / inverse[0, 0]
            work[:, j:] -= error[:, None] * inverse[0]
    return work, gone


@pytest.mark.parametrize("pattern", [None, (4, 8), (2, 4)])
def test_agrees_with_the_formula(pattern: tuple[int, int] | None) -> None:
    weight, hessian = problem()
    found, gone = prune_columns(weight, hessian, ratio=0.5, pattern=pattern, block=16)
    span, counts = (16, (6 * 16 // 2, False)) if pattern is None else (pattern[1], (pattern[0], True))
    expected, there = naive(weight, hessian, span, counts, 0.01)
    assert torch.equal(gone, there)
    torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=1e-3)
    assert torch.equal(found == 0, gone)


def test_counts_are_exact_and_ratio_0_is_the_identity() -> None:
    weight, hessian = problem(40)
    found, gone = prune_columns(weight, hessian, pattern=(4, 8))
    assert bool((gone.reshape(6, 5, 8).sum(2) == 4).all())
    assert int((found == 0).sum()) == 120
    same, nothing = prune_columns(weight, hessian, ratio=0.0)
    assert torch.equal(same, weight)
    assert not nothing.any()
    _, most = prune_columns(weight, hessian, ratio=0.9, block=20)
    assert int(most.sum()) == 2 * 108


def test_its_error_is_below_dropping_the_smallest() -> None:
    weight, hessian = problem()
    found, _ = prune_columns(weight, hessian)
    plain = weight.masked_fill(lowest(weight.abs(), 0.5), 0.0)
    assert squared_error(weight - found, hessian) < 0.7 * squared_error(weight - plain, hessian)


def test_dead_inputs_go_first_and_singular_hessians_work() -> None:
    weight, hessian = problem()
    hessian[:, 3] = hessian[3] = 0
    _, gone = prune_columns(weight, hessian, ratio=0.25)
    assert bool(gone[:, 3].all())
    column = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)).double()
    found, _ = prune_columns(weight, column @ column.T)
    assert torch.isfinite(found).all()


def test_bad_input_is_refused() -> None:
    weight, hessian = problem(20)
    with pytest.raises(InputError, match="inputs that 8 divides, got 20"):
        prune_columns(weight, hessian, pattern=(4, 8))
    with pytest.raises(InputError, match="NaN"):
        prune_columns(weight, hessian * float("nan"))
