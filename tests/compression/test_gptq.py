"""GPTQ: codes are those of the plain loop, errors on the calibration data are at most rounding's, folders load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.compression.gptq import GPTQ, compensated
from gossamer.compression.rounding import Rounding
from gossamer.core.errors import InputError
from gossamer.parts.calibration import squared_error
from gossamer.parts.quant_format import Packing
from gossamer.parts.quantiser import dequantise, quantise
from gossamer.testing.bench import Bench, output


def problem(columns: int = 48) -> tuple[Tensor, Tensor]:
    """(W [8, in], H) with inputs that go together."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(8, columns, generator=generator), (2 / 200 * x.T @ x).double()


def naive(weight: Tensor, hessian: Tensor, bits: int, group: int, damp: float) -> Tensor:
    """One column at a time, the rest refitted by the inverse Hessian of what is left, which shrinks by elimination."""
    work, top = weight.double().clone(), 2 ** (bits - 1) - 1
    count = work.shape[1]
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(count))
    result = torch.zeros_like(work)
    for j in range(count):
        if j % group == 0:
            scale = (work[:, j : j + group].abs().amax(1).float() / top).bfloat16().double()
        result[:, j] = (work[:, j] / scale).round().clamp(-top, top) * scale
        work -= ((work[:, j] - result[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse -= inverse[:, [j]] * inverse[j] / inverse[j, j].clone()
    return result


@pytest.mark.parametrize("group", [16, 48])
def test_weights_are_those_of_the_plain_loop(group: int) -> None:
    weight, hessian = problem()
    parts, better = compensated(weight, hessian, Packing(4, group), torch.bfloat16, 0.01)
    assert better
    expected = naive(weight, hessian, 4, group, 0.01)
    found = dequantise(parts, torch.float32)
    close = (found - expected).abs() < 1e-3
    assert close.double().mean() > 0.98  # a code on the border may fall to the other side in float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 0, 16, 160])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_that_of_rounding(bits: int, group: int, symmetric: bool) -> None:
    weight, hessian = problem(320)
    parts, better = compensated(weight, hessian, Packing(bits, group, symmetric), torch.bfloat16, 0.01)
    plain = quantise(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
    assert parts.scales.shape == plain.scales.shape
    assert parts.group == plain.group
    errors = [squared_error(weight - dequantise(one, torch.float32), hessian) for one in (parts, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert bits > 4 or group < 0 or better


def test_dead_inputs_are_zero_and_singular_hessians_work() -> None:
    weight, _ = problem(32)
    x = torch.randn(5, 32)
    x[:, 7] = 0
    parts, _ = compensated(weight, (2 / 5 * x.T @ x).double(), Packing(4, 32), torch.bfloat16, 0.01)
    assert torch.isfinite(dequantise(parts)).all()
    assert (parts.codes[:, 7] == 0).all()


def data(bench: Bench) -> list[dict[str, Tensor]]:
    return [bench.inputs(8), bench.inputs(3)]


@torch.no_grad()
def distance(model: Any, reference: Any, batches: list[dict[str, Tensor]]) -> float:
    return sum(float((output(model, b) - output(reference, b)).square().sum()) for b in batches)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_outputs_are_nearer_than_rounding_leaves_them(family: str) -> None:
    bench = Bench(family)
    reference, batches = bench.model(), data(bench)
    careful = GPTQ(bits=3, group=32).compress(bench.model(), batches).model
    plain = Rounding(bits=3, group=32).compress(bench.model()).model
    assert distance(careful, reference, batches) < distance(plain, reference, batches)


def test_the_report_measures_against_the_weights_as_they_were() -> None:
    bench = Bench("llama")
    report = GPTQ(bits=4, group=32).compress(bench.model(), data(bench)).report
    plain = Rounding(bits=4, group=32).compress(bench.model()).report
    assert report.values["bits_per_weight"] == plain.values["bits_per_weight"]
    assert report.bytes_after == plain.bytes_after
    by_name = {row.name: row.error for row in plain.rows}
    assert all(0 < by_name[row.name] <= row.error < 1 for row in report.rows)


def test_a_plan_of_its_own_for_each_matrix(tmp_path: Path) -> None:
    bench = Bench("llama")
    model = bench.model()
    plan = {"model.layers.0.mlp.up_proj": Packing(8, 0), "model.layers.1.self_attn.q_proj": Packing(3, 16)}
    report = GPTQ().pack(model, data(bench), plan).report
    assert {(row.name, row.bits, row.group) for row in report.rows} == {
        ("model.layers.0.mlp.up_proj", 8, 64), ("model.layers.1.self_attn.q_proj", 3, 16),
    }  # fmt: skip
    assert report.values["left_float"]["model.layers.0.mlp.down_proj"] == "not in the plan"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again, bench.inputs()), output(model, bench.inputs()))


def test_blocks_that_stay_float_are_passed_too() -> None:
    """With block 0 left out, block 1 is rounded on what comes out of block 0, not on what goes into it."""
    bench = Bench("llama")
    found = []
    for sequential in (True, False):
        done = GPTQ(bits=3, group=32, sequential=sequential, skip=("layers.0.", "lm_head")).compress(
            bench.model(), data(bench)
        )
        found.append(done.model.model.layers[1].self_attn.q_proj.codes())
    assert torch.equal(*found)


def test_no_data_is_refused_before_anything_changes() -> None:
    bench = Bench("llama")
    model = bench.model()
    before = copy.deepcopy(model.state_dict())
    for wrong in (None, [], [{"input_ids": torch.arange(4, 9)[None]}]):
        with pytest.raises(InputError, match="calibration data: must hold"):
            GPTQ().compress(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
