"""Calibration: Hessians are those of the plain formula, padding is out, and blocks see what passed the changed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.calibration import (
    InputStatistics,
    block_by_block,
    check_batches,
    collect,
    invert,
    squared_error,
)
from gossamer.parts.surgery import find_blocks
from gossamer.testing.bench import Bench


def batches(bench: Bench) -> list[dict[str, Tensor]]:
    found = [bench.inputs(3), bench.inputs(2)]
    found[1]["input_ids"] = found[1]["input_ids"].flip(1)
    found[0]["attention_mask"] = found[0]["attention_mask"].clone()
    found[0]["attention_mask"][1, 7:] = 0
    return found


def naive(model: Any, data: list[dict[str, Tensor]], name: str) -> Tensor:
    """All inputs of the layer, without padding, in one matrix [n, in]; float64."""
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    kept = [x[batch["attention_mask"].bool()] for x, batch in zip(rows, data, strict=True)]
    return torch.cat(kept).double()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
def test_hessians_equal_the_formula(family: str) -> None:
    bench = Bench(family)
    model, data = bench.model(), batches(bench)
    names = [name for block in find_blocks(model) for name in (block.out_path, block.down_path)]
    found = dict(collect(model, data, names))
    assert list(found) == names
    for name in names:
        x = naive(model, data, name)
        assert found[name].count == len(x) == 55
        torch.testing.assert_close(found[name].hessian, 2 / len(x) * x.T @ x)
        torch.testing.assert_close(found[name].mean_square, x.square().mean(0))


def test_memory_bounds_how_many_are_held_at_once() -> None:
    bench = Bench("llama")
    model, data = bench.model(), batches(bench)
    names = [block.down_path for block in find_blocks(model)]
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    once = dict(collect(model, data, names))
    assert len(passes) == 2
    twice = dict(collect(model, data, names, memory=1))
    assert len(passes) == 6
    assert all(torch.equal(once[name].hessian, twice[name].hessian) for name in names)
    diagonal = dict(collect(model, data, names, full=False))
    for name in names:
        torch.testing.assert_close(diagonal[name].mean_square, once[name].mean_square)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
def test_later_blocks_see_the_changed_ones(family: str) -> None:
    bench = Bench(family)
    model, data = bench.model(), batches(bench)
    blocks = find_blocks(model)
    inside = [[block.layout.down] for block in blocks]
    for step in block_by_block(model, data, [block.module for block in blocks], inside):
        block = blocks[step.index]
        x = naive(model, data, block.down_path)
        torch.testing.assert_close(step.statistics[block.layout.down].hessian, 2 / len(x) * x.T @ x)
        with torch.no_grad():
            model.get_submodule(block.down_path).weight.mul_(-3.0)


def test_modes_and_hooks_are_as_before() -> None:
    bench = Bench("llama")
    model = bench.model()
    model.train()
    model.lm_head.eval()
    next(collect(model, batches(bench), [find_blocks(model)[0].down_path]))
    assert model.training
    assert not model.lm_head.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_running_mean_does_not_depend_on_the_batches() -> None:
    x = torch.randn(40, 6)
    whole, parts = InputStatistics(6), InputStatistics(6)
    whole.add(x)
    for chunk in x.split(7):
        parts.add(chunk)
    parts.add(torch.zeros(3, 6), torch.zeros(3))
    torch.testing.assert_close(whole.hessian, parts.hessian)


def test_error_is_the_mean_squared_output_error() -> None:
    x, difference = torch.randn(50, 6).double(), torch.randn(3, 6).double()
    statistics = InputStatistics(6)
    statistics.add(x)
    expected = float((x @ difference.T).square().sum(1).mean())
    assert squared_error(difference, statistics.hessian) == pytest.approx(expected)


def test_singular_and_dead() -> None:
    x = torch.randn(3, 8).double()
    x[:, 5] = 0
    hessian = 2 / 3 * x.T @ x
    found = invert(hessian, damp=0.01)
    assert found.dead.tolist() == [False] * 5 + [True] + [False] * 2
    assert found.added == pytest.approx(0.01 * float(hessian.diagonal()[~found.dead].mean()))
    assert torch.isfinite(found.matrix).all()
    whole = torch.randn(60, 8).double()
    regular = 2 / 60 * whole.T @ whole
    assert invert(regular).added == 0
    torch.testing.assert_close(invert(regular).matrix @ regular, torch.eye(8).double())
    assert invert(regular, always=True).added > 0


def test_bad_calibration_is_refused() -> None:
    bench = Bench("llama")
    model = bench.model()
    name = find_blocks(model)[0].down_path
    short = [{"input_ids": torch.arange(4, 14)[None]}]
    for data, words in (([], "none"), ([torch.zeros(2)], "Tensor"), (None, "none"), (short, "at least 16 tokens")):
        with pytest.raises(InputError, match="calibration data: must hold") as refusal:
            list(collect(model, data, [name]))  # type: ignore[arg-type]
        assert words in str(refusal.value)
    empty = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()}
    with pytest.raises(InputError, match="at least 1 tokens"):
        check_batches([empty], "test")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        list(collect(model, batches(bench), [name]))
    for hessian in (torch.full((2, 2), float("nan")), torch.zeros(2, 2)):
        with pytest.raises(InputError, match="Hessian: must"):
            invert(hessian)
    with pytest.raises(InputError, match="must be a linear layer"):
        list(collect(model, batches(bench), ["model.norm"]))
