"""Small copies: what goes and why, the record of what stayed, zeros that training keeps, folders, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.compression.small_copy import SmallCopyMaker, taylor_scores
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.small_copies import KEY, Kept, SmallCopy, places, read_record, zeros_kept
from gossamer.parts.surgery import find_blocks
from gossamer.testing.bench import Bench, output

FAMILIES = ("llama", "gemma3", "gpt2")


def data(bench: Bench) -> list[dict[str, Tensor]]:
    return [bench.inputs(), bench.inputs(rows=2)]


def small(model: Any, batches: Any = None, **options: Any) -> Any:
    return SmallCopyMaker(**options).compress(model, batches).model


def naive_scores(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """|w * gradient of the mean loss| of every weight, by backward."""
    model = copy.deepcopy(model).requires_grad_(True)
    ids = [batch["input_ids"] for batch in batches]
    count = sum(rows[:, 1:].numel() for rows in ids)
    for rows in ids:
        logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
        (F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum") / count).backward()
    return {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if p.grad is not None}


def test_taylor_scores_are_sums_over_the_unit() -> None:
    bench = Bench("llama")
    model, batches = bench.model(), data(bench)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    worth = naive_scores(model, batches)
    count = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    for index, (heads, neurons) in enumerate(taylor_scores(model, find_blocks(model), batches)):
        part = lambda name: worth[f"model.layers.{index}.{name}.weight"]  # noqa: E731, B023
        for j in (0, 5, 127):
            expected = part("mlp.gate_proj")[j].sum() + part("mlp.up_proj")[j].sum() + part("mlp.down_proj")[:, j].sum()
            torch.testing.assert_close(neurons[j] / count, expected)
        for group in (0, 1):  # a key-value head of 16 with its two query heads
            queries, pair = slice(group * 32, group * 32 + 32), slice(group * 16, group * 16 + 16)
            expected = part("self_attn.q_proj")[queries].sum() + part("self_attn.o_proj")[:, queries].sum()
            expected += part("self_attn.k_proj")[pair].sum() + part("self_attn.v_proj")[pair].sum()
            torch.testing.assert_close(heads[group] / count, expected)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_keeps_the_best_units_and_their_record(family: str) -> None:
    bench = Bench(family)
    model, batches = bench.model(), data(bench)
    scores, origin = taylor_scores(model, find_blocks(model), batches), fingerprint(model)
    whole = bench.model()
    copied = small(model, batches)
    record = read_record(copied)
    assert record is not None
    assert (record.origin, record.method, record.zeros) == (origin, "stru", 0.0)
    for block, (heads, neurons), kept, kept_heads in zip(
        find_blocks(copied), scores, record.neurons, record.heads, strict=True
    ):
        assert kept is not None
        assert kept_heads is not None
        assert kept.indices == tuple(sorted(neurons.topk(len(neurons) // 2).indices.tolist()))
        assert kept_heads.indices == tuple(sorted(heads.topk(len(heads) // 2).indices.tolist()))
        assert block.neurons == len(neurons) // 2
    # the record says where every remaining weight came from
    for path, place in places(whole, record).items():
        old, new = whole.get_submodule(path).weight, copied.get_submodule(path).weight
        old, new = (old.T, new.T) if family == "gpt2" else (old, new)
        old = old if place.rows is None else old[place.rows]
        assert torch.equal(new, old if place.columns is None else old[:, place.columns])
    assert output(copied, bench.inputs()).isfinite().all()


def test_a_single_key_value_head_stays() -> None:
    model = AutoModelForCausalLM.from_config(_one_pair())
    copied = small(model, method="rand")
    attention = copied.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (8, 32)
    assert attention.q_proj.weight.shape == (16, 32)
    found = places(AutoModelForCausalLM.from_config(_one_pair()), read_record(copied))  # type: ignore[arg-type]
    assert "model.layers.0.self_attn.k_proj" not in found


def _one_pair() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1,
    )  # fmt: skip


def test_first_and_last_blocks_stay_whole() -> None:
    bench = Bench("llama")
    record = read_record(small(bench.model(layers=12), method="rand"))
    assert record is not None
    assert [kept is None for kept in record.neurons] == [True, True, *[False] * 9, True]
    record = read_record(small(bench.model(layers=8), method="rand", protect_first=3, protect_last=0, attention=False))
    assert record is not None
    assert [kept is None for kept in record.neurons] == [True] * 3 + [False] * 5
    assert set(record.heads) == {None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["semi", "unst"])
@pytest.mark.parametrize("compensate", [True, False])
def test_sparse_copies_have_the_zeros_they_should(family: str, method: str, compensate: bool) -> None:
    bench = Bench(family)
    model = bench.model()
    dense = copy.deepcopy(model)
    copied = small(model, data(bench), method=method, compensate=compensate)
    record = read_record(copied)
    assert record is not None
    assert record.zeros == pytest.approx(0.5, abs=0.001)
    assert len(record.sparse) == {"gpt2": 8, "llama": 14, "gemma3": 14}[family]
    for path in record.sparse:
        new, old = copied.get_submodule(path).weight, dense.get_submodule(path).weight
        new, old = (new.T, old.T) if family == "gpt2" else (new, old)
        if method == "semi":
            assert bool(((new.reshape(len(new), -1, 8) == 0).sum(2) == 4).all())
        if not compensate:
            assert torch.equal(new[new != 0], old[new != 0])
    untouched = [name for name, p in copied.named_parameters() if name.removesuffix(".weight") not in record.sparse]
    assert all(torch.equal(copied.get_parameter(name), dense.get_parameter(name)) for name in untouched)


def test_compensation_stays_nearer_to_the_whole_model() -> None:
    bench = Bench("llama")
    batches = [bench.inputs(rows=24)]
    whole = output(bench.model(), batches[0])
    distances = {}
    for compensate in (True, False):
        copied = small(bench.model(), batches, method="unst", compensate=compensate)
        distances[compensate] = (output(copied, batches[0]) - whole).square().mean().item()
    assert distances[True] < distances[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_under_zeros_kept_leaves_zeros(dtype: torch.dtype) -> None:
    bench = Bench("llama")
    copied = small(bench.model(), method="unst", compensate=False).to(dtype)
    record = read_record(copied)
    assert record is not None
    masks = {path: copied.get_submodule(path).weight == 0 for path in record.sparse}
    copied.requires_grad_(False)
    with zeros_kept(copied):
        copied.requires_grad_(True)
        for parameter in copied.parameters():
            parameter.data = parameter.data.float()  # as the trainer does with half precision
        optimizer = torch.optim.AdamW(copied.parameters(), lr=0.01)
        for _ in range(3):
            output(copied, bench.inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for path, mask in masks.items():
        weight = copied.get_submodule(path).weight
        assert torch.equal(weight == 0, mask)
        assert weight._backward_hooks is None or not weight._backward_hooks
    output(copied, bench.inputs()).square().mean().backward()
    path = record.sparse[0]
    assert copied.get_submodule(path).weight.grad[masks[path]].any()  # nothing is held afterwards


def test_saved_folders_load_with_their_record(tmp_path: Path) -> None:
    bench = Bench("gemma3")
    copied = small(bench.model(), method="rand", ratio=0.25)
    copied.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_record(again) == read_record(copied)
    assert torch.equal(output(again, bench.inputs()), output(copied, bench.inputs()))
    written = json.loads((tmp_path / "config.json").read_text())[KEY]
    assert SmallCopy.from_dict(written) == read_record(copied)


def test_ratio_0_is_the_whole_model() -> None:
    bench = Bench("llama")
    whole = output(bench.model(), bench.inputs())
    for method in ("rand", "stru", "unst"):
        assert torch.equal(output(small(bench.model(), data(bench), method=method, ratio=0.0), bench.inputs()), whole)


def test_records_are_read_back_and_broken_ones_refused() -> None:
    kept = Kept(11, (0, 3, 10))
    assert Kept.parse(str(kept)) == kept
    record = SmallCopy("ab", "rand", (None, kept), (kept, None), 0.5, ("model.layers.0.mlp.up_proj",))
    assert SmallCopy.from_dict(json.loads(json.dumps(record.as_dict()))) == record
    for change in ({"neurons": ["3:ff", ""]}, {"heads": []}, {"zeros": "many"}, {"neurons": [3, 4]}):
        with pytest.raises(InputError, match="must be the record of a small copy"):
            SmallCopy.from_dict(record.as_dict() | change)
    with pytest.raises(InputError, match="record of a small copy"):
        SmallCopy.from_dict("small")


def test_bad_input_is_refused() -> None:
    bench = Bench("llama")
    copied = small(bench.model(), method="rand")
    with pytest.raises(InputError, match="must get a whole model, got a small copy"):
        small(copied, method="rand")
    with pytest.raises(InputError, match="calibration data: must hold batches"):
        small(bench.model())
    with pytest.raises(InputError, match="calibration data: must hold batches"):
        small(bench.model(), [], method="unst")
    with pytest.raises(InputError, match=r"keep one of 2, got none at ratio 0\.8"):
        small(bench.model(), method="rand", ratio=0.8)
    with pytest.raises(InputError, match=r"1 \+ 1 protected blocks: must leave some of the 2"):
        small(bench.model(), method="rand", protect_first=1, protect_last=1)
    with pytest.raises(OptionError, match=r"ratio: must be 0\.5 with semi"):
        small(bench.model(), data(bench), method="semi", ratio=0.6)
    with pytest.raises(InputError, match="logits for the next token"):
        small(bench.model().model, data(bench))
    with pytest.raises(InputError, match="find one stack of blocks of a known layout"):
        small(Bench("mixtral").model(), method="rand")
    with pytest.raises(InputError, match="neurons: must be 128 in the whole model, got 64"):
        places(copied, read_record(copied))  # type: ignore[arg-type]
