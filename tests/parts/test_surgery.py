"""Surgery: a cut model computes what the whole one does with zeros in place of what went; its folder loads again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import gossamer
from gossamer.core.errors import InputError
from gossamer.parts.injection import is_transposed
from gossamer.parts.surgery import Keep, cut, find_blocks, head_columns
from gossamer.parts.surgery_format import KEY
from gossamer.testing.bench import Bench, output

FAMILIES = ("bert", "gpt2", "llama", "qwen3", "gemma3")
KEEP = {0: Keep([1], [0, 3, 7, 100]), 1: Keep(None, range(5, 60))}


def masked(model: Any, keep: dict[int, Keep]) -> Any:
    """The naive version: nothing is cut, columns of the writers are zero; a dropped module's bias too."""
    for block in find_blocks(model):
        kept = keep.get(block.index, Keep())
        for name, chosen, count, columns in (
            (block.out_path, kept.head_groups, block.head_groups, lambda gone, b=block: head_columns(b, gone)),
            (block.down_path, kept.neurons, block.neurons, lambda gone: torch.tensor(gone)),
        ):
            if chosen is None:
                continue
            gone = [index for index in range(count) if index not in set(chosen)]
            layer = model.get_submodule(name)
            weight = layer.weight.T if is_transposed(layer) else layer.weight
            with torch.no_grad():
                weight[:, columns(gone)] = 0
                if not len(chosen) and layer.bias is not None:
                    layer.bias.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [KEEP, {0: Keep([], None), 1: Keep(None, [])}, {0: Keep([], []), 1: Keep([0], [2])}])
def test_cut_equals_masked(family: str, keep: dict[int, Keep]) -> None:
    bench = Bench(family)
    small = bench.model()
    for parameter in small.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    whole = masked(copy.deepcopy(small), keep)
    before = sum(p.numel() for p in small.parameters())
    cut(small, keep)
    assert sum(p.numel() for p in small.parameters()) < before
    with torch.no_grad():
        torch.testing.assert_close(output(small, bench.inputs()), output(whole, bench.inputs()), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    bench = Bench(family)
    model = bench.model()
    cut(model, {0: Keep([1], []), 1: Keep([], [1, 2, 60])})
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if model.can_generate() else AutoModel
    again = auto.from_pretrained(tmp_path)
    assert getattr(again.config, KEY) == getattr(model.config, KEY)
    with torch.no_grad():
        assert torch.equal(output(again, bench.inputs()), output(model, bench.inputs()))
    fresh = auto.from_config(again.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_cutting_twice_still_loads(tmp_path: Path) -> None:
    """4 query heads on 2 key-value heads: one group goes, then one of the query heads that are left."""
    bench = Bench("llama")
    model = bench.model()
    cut(model, {0: Keep([1])})
    block = find_blocks(model)[0]
    assert (block.heads, block.kv_heads, block.head_groups) == (2, 1, 2)
    cut(model, {0: Keep([0])})
    assert (block.heads, block.kv_heads) == (1, 1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(output(loaded, bench.inputs()), output(model, bench.inputs()))


def test_groups_of_heads() -> None:
    counts = {}
    for heads, pairs in ((4, 4), (4, 2), (4, 1), (1, 1)):
        config = LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=heads,
                             num_key_value_heads=pairs, head_dim=8, vocab_size=16)  # fmt: skip
        block = find_blocks(LlamaForCausalLM(config))[0]
        counts[heads, pairs] = (block.head_groups, block.group_width)
    assert counts == {(4, 4): (4, 8), (4, 2): (2, 16), (4, 1): (4, 8), (1, 1): (1, 8)}


def test_one_key_value_head_stays_until_the_last() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=1, head_dim=8, vocab_size=16)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    whole = masked(copy.deepcopy(model), {0: Keep([0, 2, 3])})
    cut(model, {0: Keep([0, 2, 3])})
    assert model.model.layers[0].self_attn.k_proj.out_features == 8
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("static", [False, True])
def test_a_dropped_first_attention_still_counts_tokens(family: str, static: bool) -> None:
    """Cached steps equal the pass over all tokens, though layer 0 has no keys."""
    bench = Bench(family)
    model = bench.model()
    cut(model, {0: Keep([], None)})
    ids = bench.inputs()["input_ids"]
    if static:
        cache: Any = StaticCache(config=model.config, max_cache_len=16)
    else:
        cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :7], past_key_values=cache, use_cache=True)
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 7:], atol=2e-4, rtol=1e-4)


def test_generate_with_dropped_modules() -> None:
    bench = Bench("gemma3")
    model = bench.model()
    cut(model, {0: Keep([], []), 1: Keep([1], [4, 5])})
    ids = bench.inputs(1)["input_ids"]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_parts_of_a_composite_model_are_cut_and_load(tmp_path: Path) -> None:
    bench = Bench("llava")
    model = bench.model()
    cut(model, {1: Keep([0], [3, 4])})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again, bench.inputs()), output(model, bench.inputs()))


def test_gradients_reach_what_is_left() -> None:
    bench = Bench("bert")
    model = bench.model()
    cut(model, KEEP)
    output(model, bench.inputs()).square().sum().backward()
    block = model.encoder.layer[0]
    assert block.attention.self.query.weight.grad.shape == (16, 64)
    assert block.output.dense.weight.grad.abs().sum() > 0


def test_unknown_blocks_are_refused_with_what_was_looked_for() -> None:
    for family in ("mixtral", "vit"):
        with pytest.raises(InputError) as refusal:
            find_blocks(Bench(family).model())
        assert "must find one stack of blocks of a known layout: llama" in str(refusal.value)
        assert "self_attn" in str(refusal.value)
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, vocab_size=9,
                        is_decoder=True, add_cross_attention=True)  # fmt: skip
    with pytest.raises(InputError, match="crossattention"):
        find_blocks(BertModel(config))


def test_wrong_indices_and_tables_are_refused(tmp_path: Path) -> None:
    model = Bench("llama").model()
    for keep in ({5: Keep([0])}, {0: Keep([2])}, {0: Keep(None, [3, 2])}, {0: Keep(None, [1, 1])}):
        with pytest.raises(InputError, match="must be"):
            cut(model, keep)
    cut(model, {0: Keep(None, [1])})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for table in ({"heads": [1]}, {**values[KEY], "neurons": [1, 999]}, {**values[KEY], "heads": [4, 3]}):
        path.write_text(json.dumps({**values, KEY: table}))
        with pytest.raises(InputError, match=KEY):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["gossamer", "transformers.modeling_utils"])
def test_both_import_orders_load(first: str, tmp_path: Path) -> None:
    model = Bench("llama").model()
    cut(model, KEEP)
    model.save_pretrained(tmp_path)
    second = {"gossamer": "transformers.modeling_utils"}.get(first, "gossamer")
    code = (
        f"import {first}\nimport {second}\nfrom transformers import AutoModelForCausalLM\n"
        f"print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).model.layers[0].mlp.down_proj.in_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr
    assert gossamer.__file__
