"""Sophia: the update against a loop, both estimators against the true diagonal, and the traps of the curvature pass."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError, OptionError
from gossamer.objectives.dpo import DPO
from gossamer.objectives.sft import SFT
from gossamer.optimizers.sophia import Sophia, SophiaOptimizer, sampled_nll
from gossamer.parts.training import TrainSettings, train


def test_steps_are_those_of_the_naive_loop() -> None:
    lr, b1, b2, rho, wd, eps = 0.1, 0.9, 0.8, 0.05, 0.2, 1e-12
    start = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    p = nn.Parameter(start.float())
    optimizer = SophiaOptimizer([p], lr, (b1, b2), rho, wd, eps=eps)
    theta, m, h = start.tolist(), [0.0] * 4, [0.0] * 4
    torch.manual_seed(0)
    for step in range(12):
        if step % 3 == 0:
            ghat, bs = torch.randn(4), 64.0 + step
            p.grad = ghat.clone()
            optimizer.update_hessian(bs)
            h = [b2 * old + (1 - b2) * bs * float(g) ** 2 for old, g in zip(h, ghat, strict=True)]
        g = torch.randn(4)
        p.grad = g.clone()
        optimizer.step()
        for i in range(4):
            m[i] = b1 * m[i] + (1 - b1) * float(g[i])
            ratio = m[i] / max(rho * h[i], eps)
            theta[i] = theta[i] * (1 - lr * wd) - lr * max(-1.0, min(1.0, ratio))
    assert p.tolist() == pytest.approx(theta, abs=1e-5)


class Softmax(nn.Module):
    """Softmax regression on fixed inputs, as a model whose batch is a slice of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inputs = torch.randn(6, 3)
        self.weight = nn.Parameter(0.5 * torch.randn(4, 3))

    def logits(self) -> torch.Tensor:
        return self.inputs @ self.weight.T

    def diagonal(self, weights: torch.Tensor) -> torch.Tensor:
        """Of the Hessian of the weighted mean cross entropy, which for softmax regression is the Gauss-Newton one."""
        p = self.logits().softmax(-1).detach()
        return torch.einsum("n,nc,nd->cd", weights / weights.sum(), p * (1 - p), self.inputs**2)


def test_gauss_newton_bartlett_has_the_true_diagonal_as_its_mean() -> None:
    model, draws = Softmax(), 2000
    weights = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    optimizer = SophiaOptimizer([model.weight], betas=(0.9, 0.0))
    total = torch.zeros(4, 3)
    for _ in range(draws):
        model.weight.grad = None
        (sampled_nll(model.logits(), weights, generator) / weights.sum()).backward()
        optimizer.update_hessian(float(weights.sum()))
        total += optimizer.state[model.weight]["h"]
    true = model.diagonal(weights)
    assert float((total / draws - true).norm() / true.norm()) < 0.05
    assert float(((total / draws) / true - 1).abs().max()) < 0.15


def test_hutchinson_has_the_true_diagonal_as_its_mean() -> None:
    model, draws = Softmax(), 2000
    generator = torch.Generator().manual_seed(0)
    optimizer = SophiaOptimizer([model.weight], betas=(0.9, 0.0), estimator="H")
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    # two micro-batches whose losses add up to the mean
    losses = [
        lambda rows=rows: nn.functional.cross_entropy(model.logits()[rows], labels[rows], reduction="sum") / 6
        for rows in (slice(0, 4), slice(4, 6))
    ]
    total = torch.zeros(4, 3)
    for _ in range(draws):
        optimizer.update_hutchinson(losses, generator)
        total += optimizer.state[model.weight]["h"]
    true = model.diagonal(torch.ones(6))
    assert float((total / draws - true).norm() / true.norm()) < 0.05
    assert model.weight.grad is None


def test_an_ill_conditioned_quadratic_and_a_saddle() -> None:
    scales = torch.logspace(-2, 2, 100)
    p = nn.Parameter(torch.ones(100))
    optimizer = SophiaOptimizer([p], 0.05, (0.9, 0.99), rho=1.0, weight_decay=0.0, estimator="H")
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        if step % 10 == 0:
            optimizer.update_hutchinson([lambda: (scales * p**2).sum() / 2], generator)
        p.grad = scales * p.detach()
        optimizer.step()
    # directions of curvature 1e-2 and 1e2 alike
    assert float(p.detach().abs().max()) < 1e-2
    saddle = nn.Parameter(torch.tensor([0.5, 1e-4]))
    optimizer = SophiaOptimizer([saddle], 0.05, (0.0, 0.99), rho=1.0, weight_decay=0.0, estimator="H")
    signs = torch.tensor([1.0, -1.0])
    for _ in range(40):
        optimizer.update_hutchinson([lambda: (signs * saddle**2).sum() / 2], generator)
        saddle.grad = signs * saddle.detach()
        optimizer.step()
    assert abs(float(saddle[0])) < 0.2, "the stable direction settles"
    assert float(saddle[1]) > 1.5, "negative curvature takes sign steps away"


def test_state_survives_in_float32(make_model: Any) -> None:
    p, q = (nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    one, two = SophiaOptimizer([p], lr=0.1), SophiaOptimizer([q], lr=0.1)
    torch.manual_seed(0)
    for optimizer_step in range(3):
        p.grad = torch.randn(4, 4).bfloat16()
        one.update_hessian(7.0 + optimizer_step)
        one.step()
    assert all(value.dtype == torch.float32 for value in one.state[p].values())
    with torch.no_grad():
        q.copy_(p)
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(two.state[q][name], one.state[p][name]) for name in ("m", "h"))
    for parameter, optimizer in ((p, one), (q, two)):
        parameter.grad = torch.full((4, 4), 0.01, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(p, q)
    assert two.state[q]["h"].dtype == torch.float32


def hook_and_batch(model: Any, tokenizer: Any, rows: list[Any], **options: Any) -> tuple[Any, Any, Any, Any]:
    objective, system = SFT(), Sophia(subset=1.0, **options)
    hook = system.callbacks(model, objective)[0]
    batch = objective.collate(objective.examples(rows, tokenizer, max_length=32), tokenizer)
    return hook, system.build(model.parameters()), batch, objective


def test_the_pass_masks_padding_and_clears_its_gradients(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "abcdefgh", "completion": "ijkl"}]
    hook, optimizer, batch, objective = hook_and_batch(model, tokenizer, rows)
    hook.before_step(0, optimizer, [batch], contextlib.nullcontext)
    assert all(p.grad is None for p in model.parameters())
    curvature = [optimizer.state[p]["h"].clone() for p in model.parameters()]
    longer = {
        key: torch.nn.functional.pad(item, (0, 5), value=-100 if key == "labels" else 0) for key, item in batch.items()
    }
    other = Sophia().build(model.parameters())
    hook.before_step(0, other, [longer], contextlib.nullcontext)
    for h, p in zip(curvature, model.parameters(), strict=True):
        assert torch.allclose(h, other.state[p]["h"], rtol=1e-3, atol=1e-7)
    hook.before_step(3, other, [batch], contextlib.nullcontext)
    assert hook.after_step(3, other) == {}, "only every k steps"
    objective.loss(model, batch).value.backward()
    optimizer.step()
    assert 0.0 <= hook.after_step(0, optimizer)["win_rate"] <= 1.0


def test_micro_batches_estimate_what_one_batch_does(tokenizer: Any, make_model: Any) -> None:
    """The gradient is that of the mean over all tokens, so h does not depend on how the rows are cut."""
    model = make_model()
    rows = [{"text": "abcdef"}, {"text": "ghi"}]
    hook, whole, batch, objective = hook_and_batch(model, tokenizer, rows)
    cut = Sophia().build(model.parameters())
    halves = [objective.collate(objective.examples([row], tokenizer, max_length=32), tokenizer) for row in rows]
    hook.before_step(0, whole, [batch], contextlib.nullcontext)
    hook.before_step(0, cut, halves, contextlib.nullcontext)
    for p in model.parameters():
        assert torch.allclose(whole.state[p]["h"], cut.state[p]["h"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("estimator", ["G", "H"])
def test_training_with_it_learns(tokenizer: Any, make_model: Any, tmp_path: Path, estimator: str) -> None:
    model = make_model(attn_implementation="eager") if estimator == "H" else make_model()
    rows = [{"text": "abcabcabcabc"}, {"text": "xyxyxyxyxy"}]
    result = train(
        model, tokenizer, rows, objective=SFT(), folder=tmp_path,
        optimizer=Sophia(lr=0.01, estimator=estimator, k=5, beta1=0.9),
        settings=TrainSettings(steps=25, batch_size=2, precision="fp32", save_every=0, max_length=32),
    )  # fmt: skip
    assert result.metrics["loss"] < 0.6 * result.curve[0][1]
    estimates = [entry for entry in result.history if "win_rate" in entry]
    assert [entry["step"] for entry in estimates] == [1, 6, 11, 16, 21]


def test_refusals(make_model: Any) -> None:
    model = make_model()
    with pytest.raises(InputError, match=r"objective that is a likelihood.*got dpo"):
        Sophia().callbacks(model, DPO())
    with pytest.raises(InputError, match=r"differentiated twice.*eager"):
        Sophia(estimator="H").callbacks(model, SFT())
    with pytest.raises(OptionError, match="k: must be >= 1"):
        Sophia(k=0)
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(InputError, match="dense gradients"):
        SophiaOptimizer([p]).step()
