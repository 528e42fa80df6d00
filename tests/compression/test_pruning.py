"""Pruning against scores written out, blocks in order, N:M, what is left alone, the saved file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gossamer.compression.pruning import Pruning, lowest, sparsity
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.sparse_obs import prune_columns
from gossamer.pipeline import engine
from gossamer.testing.bench import Bench


def batches(bench: Bench) -> list[dict[str, Any]]:
    return [bench.inputs(rows=4)]


def naive_mask(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Row by row the places of the lowest scores."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores):
        for place in sorted(range(len(values)), key=lambda place: float(values[place]))[: int(len(values) * ratio)]:
            mask[row, place] = True
    return mask


def test_magnitude_compares_the_whole_matrix_and_wanda_each_row() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert lowest(scores, 0.5, None, by_row=False).tolist() == [[True] * 4, [False] * 4]
    assert lowest(scores, 0.5, None, by_row=True).tolist() == [[True, True, False, False]] * 2
    drawn = torch.rand(5, 12)
    assert torch.equal(lowest(drawn, 0.3, None, by_row=True), naive_mask(drawn, 0.3))
    assert torch.equal(lowest(drawn, 0.5, (2, 4), by_row=False).view(-1, 4), naive_mask(drawn.view(-1, 4), 0.5))


def test_equal_scores_give_the_exact_count() -> None:
    assert int(lowest(torch.ones(4, 10), 0.7, None, by_row=False).sum()) == 28


def test_wanda_is_the_formula_on_the_inputs_of_the_pruned_blocks() -> None:
    bench = Bench("llama")
    model, data = bench.model(), batches(bench)
    naive = bench.model()
    for block in naive.model.layers:
        named = [(name, module) for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda m, inputs, name=name, seen=seen: seen.update({name: inputs[0]}))
            for name, module in named
        ]
        with torch.no_grad():
            naive(**data[0])
        for hook in hooks:
            hook.remove()
        for name, module in named:
            x = seen[name].reshape(-1, seen[name].shape[-1])
            scores = module.weight.detach().abs() * (x**2).mean(0).sqrt()
            module.weight.data[naive_mask(scores, 0.5)] = 0
    done = Pruning(method="wanda", ratio=0.5).compress(model, data).model
    for name, weight in naive.state_dict().items():
        assert torch.equal(done.state_dict()[name], weight), name


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_is_the_column_update_on_the_inputs_of_the_pruned_blocks(pattern: str | None) -> None:
    bench = Bench("llama")
    data, naive = batches(bench), bench.model()
    for block in naive.model.layers:
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        seen: dict[torch.nn.Module, torch.Tensor] = {}
        hooks = [m.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.update({m: inputs[0]})) for m in linears]
        with torch.no_grad():
            naive(**data[0])
        for hook in hooks:
            hook.remove()
        for linear in linears:
            x = seen[linear].reshape(-1, seen[linear].shape[-1]).double()
            weight, _ = prune_columns(linear.weight, 2 / len(x) * x.T @ x, pattern=(2, 4) if pattern else None)
            linear.weight.data.copy_(weight)
    done = Pruning(method="sparsegpt", pattern=pattern).compress(bench.model(), data).model
    for name, weight in naive.state_dict().items():
        torch.testing.assert_close(done.state_dict()[name], weight, atol=1e-4, rtol=1e-3, msg=name)
        assert torch.equal(done.state_dict()[name] == 0, weight == 0), name


def test_sparsegpt_makes_up_for_what_goes() -> None:
    """Of the outputs on the calibration inputs, less is lost than by Wanda, which leaves the rest as it was."""
    bench = Bench("llama")
    data = [bench.inputs(rows=24)]
    with torch.no_grad():
        whole = bench.model()(**data[0]).logits
        lost = {
            method: float((Pruning(method=method).compress(bench.model(), data).model(**data[0]).logits - whole).norm())
            for method in ("sparsegpt", "wanda", "random")
        }
    assert lost["sparsegpt"] < lost["wanda"] < lost["random"]


def test_padding_does_not_count() -> None:
    bench = Bench("llama")
    plain = batches(bench)[0]
    padded = {
        "input_ids": torch.cat([torch.full((4, 3), 7), plain["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(4, 3, dtype=torch.long), plain["attention_mask"]], 1),
    }
    found = [Pruning(ratio=0.4).compress(bench.model(), [data]).model.state_dict() for data in (plain, padded)]
    same = torch.cat([(found[0][name] == found[1][name]).flatten() for name in found[0]]).float().mean()
    assert same > 0.999  # positions shift, and rounding with them


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
def test_every_matrix_has_its_sparsity_and_nothing_else_is_touched(family: str, method: str) -> None:
    bench = Bench(family)
    model = bench.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = Pruning(method=method, ratio=0.3).compress(model, batches(bench)).report
    shares = sparsity(model)
    assert len(shares) == len(report.rows)
    assert all(abs(share - 0.3) < 0.02 for share in shares.values()), shares
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not [name for name in changed if "norm" in name or "embed" in name or "lm_head" in name or "wte" in name]
    for name in changed:
        kept = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][kept], before[name][kept]) == (method != "sparsegpt")
    assert report.values["sparsity"] == pytest.approx(sum(shares.values()) / len(shares), abs=0.02)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_a_pattern_leaves_half_of_each_group_in_the_saved_file(pattern: str, tmp_path: Path) -> None:
    bench = Bench("llama")
    n, m = map(int, pattern.split(":"))
    Pruning(pattern=pattern).compress(bench.model(), batches(bench)).model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    matrices = [tensor for name, tensor in saved.items() if "_proj" in name]
    assert matrices
    assert all((tensor.reshape(-1, m) == 0).sum(1).eq(n).all() for tensor in matrices)


def test_a_recipe_calibrates_on_its_rows(rows_path: str, tmp_path: Path) -> None:
    data = {"path": rows_path, "test": 2, "validation": 2}
    steps = [{"pruning": {"method": "wanda", "ratio": 0.3}}]
    report = engine.run({"model": "llama-7m", "data": data, "steps": steps}, out=tmp_path / "run")
    assert report.steps[0].changed["sparsity"] == pytest.approx(0.3, abs=0.01)


def test_ratio_zero_is_the_model_itself() -> None:
    bench = Bench("gemma3")
    done = Pruning(method="magnitude", ratio=0.0).compress(bench.model()).model
    assert all(torch.equal(done.state_dict()[name], tensor) for name, tensor in bench.model().state_dict().items())


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    bench = Bench("llama")
    with pytest.raises(OptionError, match=r"ratio: must be 0.5 with the pattern 2:4, got 0.4"):
        Pruning(pattern="2:4", ratio=0.4).compress(bench.model(), batches(bench))
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(InputError, match=f"calibration data for {method}"):
            Pruning(method=method).compress(bench.model())
    with pytest.raises(InputError, match="that 4 divides"):
        lowest(torch.ones(2, 6), 0.5, (2, 4), by_row=True)
    Pruning(method="magnitude").compress(bench.model()).model.save_pretrained(tmp_path)
    again = type(bench.model()).from_pretrained(tmp_path)
    with pytest.raises(InputError, match="unpruned model, got one pruned by magnitude"):
        Pruning(method="magnitude").compress(again)


def test_the_mode_and_the_hooks_are_as_before() -> None:
    bench = Bench("llama")
    model = bench.model().train()
    twin = copy.deepcopy(model)
    Pruning().compress(model, batches(bench))
    assert model.training
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
