"""Muon: matrices by the formula written out, everything else by AdamW, one state for both."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gossamer.parts.muon import muon
from gossamer.testing.bench import Bench


def orthogonalised(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps with torch's coefficients, in bfloat16 as it computes them."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = g.bfloat16()
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if turned else x).float()


def test_steps_of_a_matrix_are_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 6, bias=False)
    w, average = model.weight.detach().clone(), torch.zeros(6, 4)
    optimizer = muon(model, 1.0, momentum=0.9, weight_decay=0.3)
    for step in range(2):
        g = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model.weight.grad = g.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * g
        o = orthogonalised(0.1 * g + 0.9 * average)
        w = (1 - 0.3) * w - 0.2 * 6**0.5 * o
        assert torch.allclose(model.weight, w, atol=0.05)  # the steps are in bfloat16; o is of size 0.5


def test_tables_head_and_vectors_are_adamws_and_do_not_decay() -> None:
    model = Bench("llama").model()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = muon(model, 0.01, weight_decay=0.5).param_groups
    inside = {names[id(p)] for p in matrices["params"]}
    outside = {names[id(p)] for p in rest["params"]}
    frozen = "model.layers.0.mlp.up_proj.weight"
    assert inside == {name for name in names.values() if "proj" in name} - {frozen}
    assert inside | outside == set(names.values()) - {frozen}
    assert any("embed_tokens" in name for name in outside)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)


def test_a_loaded_state_goes_on_as_if_never_stopped() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    first = muon(one, 0.05)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for number in range(3):
        step(one, first, number)
    other = copy.deepcopy(one)
    again = muon(other, 0.05)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for number in range(3, 6):
        step(one, first, number)
        step(other, again, number)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
