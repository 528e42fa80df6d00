from __future__ import annotations

import math

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.parts.contrastive import Temperature, contrastive_loss, cosine_logits, equal_pairs, matrix_loss


def features(n: int, m: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + m)
    x = 3 * torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = 0.2 * torch.randn(m, width, generator=generator, dtype=torch.float64)
    return x.float().requires_grad_(), y.float().requires_grad_()


def naive(
    x: torch.Tensor,
    y: torch.Tensor,
    tau: torch.Tensor,
    weights: list[list[float]],
    symmetric: bool,
    left_out: set[tuple[int, int]],
) -> torch.Tensor:
    """The formula with loops: one direction, then the other."""

    def cosine(i: int, j: int) -> torch.Tensor:
        return (x[i] * y[j]).sum() / (x[i].pow(2).sum().sqrt() * y[j].pow(2).sum().sqrt())

    def direction(n: int, m: int, score: object, weight: object, out: object) -> torch.Tensor:
        losses = []
        for i in range(n):
            total = sum(weight(i, j) for j in range(m))  # type: ignore[operator]
            if total == 0:
                continue
            kept = [j for j in range(m) if not out(i, j) or weight(i, j) > 0]  # type: ignore[operator]
            bottom = sum(torch.exp(score(i, j) / tau) for j in kept)  # type: ignore[operator]
            losses.append(
                sum(
                    -weight(i, j) / total * torch.log(torch.exp(score(i, j) / tau) / bottom)  # type: ignore[operator]
                    for j in kept
                )
            )
        return sum(losses) / len(losses)  # type: ignore[return-value]

    n, m = len(x), len(y)
    rows = direction(n, m, cosine, lambda i, j: weights[i][j], lambda i, j: (i, j) in left_out)
    if not symmetric:
        return rows
    columns = direction(m, n, lambda j, i: cosine(i, j), lambda j, i: weights[i][j], lambda j, i: (i, j) in left_out)
    return (rows + columns) / 2


def eye(n: int) -> list[list[float]]:
    return torch.eye(n).tolist()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", ["paired", "index", "matrix", "equal", "matrix and equal"])
def test_values_and_gradients_are_those_of_the_loops(case: str, symmetric: bool) -> None:
    n, m = (4, 4) if case in ("paired", "equal") else (3, 5)
    x, y = features(n, m)
    tau = torch.tensor(0.3, requires_grad=True)
    targets, weights, equal, out = None, eye(n), None, set()
    if case == "index":
        targets = torch.tensor([4, 0, 4])
        weights = [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    if case.startswith("matrix"):
        weights = [[0.5, 0, 0, 2, 0], [0, 0, 0, 0, 0], [0.1, 0.3, 0, 0, 0]]
        targets = torch.tensor(weights)
    if "equal" in case:
        out = {(0, 0), (0, 1), (1, 0), (2, 2), (2, 3)}
        equal = torch.zeros(n, m, dtype=torch.bool)
        for i, j in out:
            equal[i, j] = True
    loss = contrastive_loss(x, y, tau, targets, symmetric, equal)
    expected = naive(x, y, tau, weights, symmetric, out)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (x, y, tau))
    for mine, theirs in zip(found, torch.autograd.grad(expected, (x, y, tau)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_scale_of_features_does_not_count_and_half_precision_is_scored_in_float32() -> None:
    x, y = features(6, 6, 64)
    assert torch.allclose(contrastive_loss(1e4 * x, y), contrastive_loss(x, 1e-4 * y), rtol=1e-5)
    # squares of these overflow float16
    large = (300 * torch.ones(2, 8)).half()
    assert cosine_logits(large, large).dtype == torch.float32
    assert torch.allclose(cosine_logits(large, large), torch.ones(2, 2))
    assert torch.equal(cosine_logits(torch.zeros(1, 8), large), torch.zeros(1, 2))


def test_equal_texts_are_no_negatives() -> None:
    texts = ["cut a potato", "wash it", "cut a potato"]
    equal = equal_pairs(texts)
    assert equal.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    vectors = torch.eye(3)[[0, 1, 0]]
    assert contrastive_loss(vectors, vectors, 0.01, equal=equal).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(vectors, vectors, 0.01).item() == pytest.approx(2 / 3 * math.log(2), rel=1e-4)
    assert equal_pairs(["a"], ["b", "a"]).tolist() == [[False, True]]


def test_all_alike_gives_the_logarithm_of_the_count() -> None:
    same = torch.ones(7, 3)
    assert contrastive_loss(same, same).item() == pytest.approx(math.log(7), rel=1e-6)


def test_temperature_learns_down_to_its_bound() -> None:
    temperature = Temperature(start=0.5, least=0.1)
    assert temperature().item() == pytest.approx(0.5)
    vectors = torch.eye(4)
    noisy = vectors + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(temperature.parameters(), lr=3)
    for _ in range(50):
        optimizer.zero_grad()
        contrastive_loss(10 * vectors, noisy, temperature()).backward()
        optimizer.step()
    assert temperature().item() == pytest.approx(0.1)
    contrastive_loss(10 * vectors, vectors.flip(0), temperature()).backward()
    assert temperature.scale.grad is not None
    assert temperature.scale.grad.item() != 0
    with pytest.raises(InputError, match="0 < least <= start"):
        Temperature(start=0.001)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (None, "rows and columns differ"),
        (torch.tensor([0, 3]), "column numbers below 3"),
        (torch.ones(3, 2), "an integer index"),
        (torch.tensor([0.0, 1.0]), "an integer index"),
        (-torch.ones(2, 3), "not negative"),
        (torch.zeros(2, 3), "some row a weight"),
    ],
)
def test_wrong_targets_are_told(targets: torch.Tensor | None, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        matrix_loss(torch.zeros(2, 3), targets)


def test_wrong_features_are_told() -> None:
    bad = torch.ones(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(InputError, match="row 1 of the second"):
        contrastive_loss(torch.ones(3, 4), bad)
    with pytest.raises(InputError, match=r"\[2, 3\] and \[2, 4\]"):
        cosine_logits(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match="equal"):
        matrix_loss(torch.zeros(2, 2), equal=torch.zeros(1, 2, dtype=torch.bool))
