"""LaVIN: the modality token in the sequence under its mask gives the same, merging is exact, rows of both kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.adapters.lavin import SEEN, TEXT, LaVIN, LaVINConfig
from gossamer.adapters.lavin.modules import Adapter, text_blocks, vision_blocks
from gossamer.core.errors import InputError
from gossamer.testing.bench import Bench

LAYERS = 4
RED = Image.new("RGB", (20, 12), "red")
ROWS: list[dict[str, Any]] = [
    {"image": RED, "instruction": "what", "answer": "red one"},
    {"image": None, "instruction": "say it now", "answer": "hi"},
]


def lavin(**options: Any) -> LaVIN:
    tower = Bench("vit").model(layers=LAYERS)
    return LaVIN(companions={"eyes": tower}, **{"vision": "eyes", "visual_every": 2, "dropout": 0.0, **options})


def moved(model: Any) -> Any:
    """Adapter parameters off their start, as training would leave them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.gossamer_adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def attached(family: str = "llama", **options: Any) -> tuple[LaVIN, Any, dict[str, Tensor]]:
    system, bench = lavin(**options), Bench(family)
    model = moved(system.attach(bench.model(layers=LAYERS)))
    processor = system.processor(bench.tokenizer(), image_size=16)
    return system, model, processor.collate(processor.examples(ROWS))


def naive_adapter(adapter: Adapter, x: Tensor, first: Tensor) -> Tensor:
    """The equations for one row x [t, H], with dense projections."""
    z = x @ adapter.down.weight.T + adapter.down.bias
    assert adapter.router is not None
    w = ((adapter.router.weight @ first + adapter.router.bias) / adapter.tau).softmax(0)
    y = x.clone()
    experts: Any = adapter.up
    for place in (0, 1):
        y = y + adapter.scale * w[place] * (z @ experts[place].dense().T + experts[place].bias)
    return y


def naive_logits(system: LaVIN, plain: Any, modules: Any, batch: dict[str, Tensor], row: int) -> Tensor:
    """One row with the modality token at its front, column 0 hidden from all other rows by a 4-D mask."""
    real = batch["attention_mask"][row].bool()
    ids, seen = batch["input_ids"][row][real], batch["visual"][row][real]
    words = plain.get_input_embeddings()(ids)
    if seen.any():
        states = system.companion("eyes")(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
        tokens = torch.stack([states[layer][0, 0] for layer in (2, 4)])
        inner = modules.projector.layers
        words = words.clone()
        words[seen] = inner[2](nn.functional.silu(inner[0](tokens)))
    sequence = torch.cat([modules.modality.weight[batch["modality"][row]][None], words])[None]
    count = sequence.shape[1]
    mask = torch.zeros(count, count).masked_fill(torch.ones(count, count).triu(1).bool(), -1e9)
    mask[1:, 0] = -1e9
    handles = []
    for index, block in enumerate(text_blocks(plain)):
        adapter = modules.attn[index]

        def hook(module: Any, args: Any, kwargs: Any, adapter: Adapter = adapter) -> Any:
            x = kwargs["hidden_states"][0]
            return args, {**kwargs, "hidden_states": naive_adapter(adapter, x, x[0])[None]}

        handles.append(block.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    masks: Any = mask[None, None]
    if hasattr(plain.config, "layer_types") and plain.config.model_type.startswith("gemma"):
        back = torch.arange(count)[:, None] - torch.arange(count)
        sliding = mask.masked_fill(back >= plain.config.sliding_window, -1e9)
        masks = {"full_attention": mask[None, None], "sliding_attention": sliding[None, None]}
    logits = plain(inputs_embeds=sequence, attention_mask=masks).logits[0, 1:]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_is_the_token_in_the_sequence_under_its_mask_in_values_and_gradients(family: str) -> None:
    system, model, batch = attached(family, visual_adapter="none")
    plain, modules = Bench(family).model(layers=LAYERS), model.gossamer_adapter
    model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
    fast = {name: parameter.grad.clone() for name, parameter in modules.named_parameters()}
    found = model(**batch).logits.detach()
    for parameter in modules.parameters():
        parameter.grad = None
    rows = [naive_logits(system, plain, modules, batch, row) for row in (0, 1)]
    for row, logits in enumerate(rows):
        assert torch.allclose(found[row][batch["attention_mask"][row].bool()], logits, atol=2e-4), row
    torch.cat(rows).square().mean().backward()
    for name, parameter in modules.named_parameters():
        assert torch.allclose(fast[name], parameter.grad, atol=1e-4, rtol=1e-3), name


def test_with_the_same_tokens_it_starts_as_the_frozen_model() -> None:
    system, bench = lavin(), Bench("llama")
    plain = bench.model(layers=LAYERS)
    model = system.attach(copy.deepcopy(plain))
    processor = system.processor(bench.tokenizer(), image_size=16)
    batch = processor.collate(processor.examples(ROWS))
    tokens = model.gossamer_adapter.projector(system.visual_features(batch["pixel_values"]))
    embeds = plain.get_input_embeddings()(batch["input_ids"]).masked_scatter(batch["visual"][..., None], tokens)
    expected = plain(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(**batch).logits, expected)


def test_grouped_projections_are_block_diagonal_and_count_as_such() -> None:
    adapter = Adapter(64, LaVINConfig())
    expert: Any = adapter.up[0]
    assert sum(parameter.numel() for parameter in adapter.up.parameters()) == 2 * (64 * 8 // 2 + 64)
    with torch.no_grad():
        expert.weight.normal_()
    dense = expert.dense()
    assert not dense[:32, 4:].any()
    assert not dense[32:, :4].any()
    z = torch.randn(3, 5, 8)
    assert torch.allclose(expert(z), z @ dense.T + adapter.up[0].bias, atol=1e-6)


def test_the_router_reads_its_modality_at_the_papers_temperature() -> None:
    system, model, batch = attached()
    routes = system.routes(model)
    assert routes.shape == (LAYERS, 2, 2)
    assert torch.allclose(routes.sum(-1), torch.ones(LAYERS, 2))
    assert (routes[:, TEXT] - routes[:, SEEN]).abs().max() > 1e-4
    sharp, _, _ = attached(tau=0.1)[0], None, None
    assert sharp.config.tau == 0.1
    assert LaVIN().config.tau == 10.0
    sum_of_gradients = model(**batch).loss
    sum_of_gradients.backward()
    assert model.gossamer_adapter.modality.weight.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("where", ["attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_merged_for_a_modality_it_is_the_adapter(family: str, where: str, tmp_path: Path) -> None:
    system, model, _ = attached(family, where=where)
    bench = Bench(family)
    ids = bench.inputs()["input_ids"]
    text = model(input_ids=ids).logits
    seen = model(input_ids=ids, modality=torch.ones(len(ids), dtype=torch.long)).logits
    assert not torch.allclose(text, seen, atol=1e-3)
    other = copy.deepcopy(model.gossamer_adapter.state_dict())
    merged = system.merge(model)
    assert torch.allclose(merged(input_ids=ids).logits, text, atol=1e-4)
    if where == "attn" or family == "llama":  # gemma3's config has no bias for its FFN
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path)
        assert torch.allclose(again(input_ids=ids).logits, text, atol=1e-4)
    fresh = lavin(where=where)
    second = fresh.attach(bench.model(layers=LAYERS))
    second.gossamer_adapter.load_state_dict(other)
    assert torch.allclose(fresh.merge(second, "image")(input_ids=ids).logits, seen, atol=1e-4)


def test_cached_generation_of_a_mixed_batch_is_that_of_each_row_alone_without_a_cache() -> None:
    system, model, _ = attached()
    processor = system.processor(Bench("llama").tokenizer(), image_size=16)
    together = system.generate(model, processor.prompts(ROWS), max_new_tokens=5, do_sample=False)
    for row in (0, 1):
        batch = processor.prompts([ROWS[row]])
        alone = system.generate(model, batch, max_new_tokens=5, do_sample=False, use_cache=False)
        assert alone[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", ["router", "normal"])
def test_adapters_in_the_tower_learn_and_the_tower_does_not(kind: str) -> None:
    system, model, batch = attached(visual_adapter=kind)
    tower = system.companion("eyes")
    model(**batch).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in model.gossamer_adapter.vision.parameters())
    assert all(parameter.grad is None for parameter in tower.parameters())
    features = system.visual_features(batch["pixel_values"])
    system.detach(model)
    assert all(parameter.requires_grad for parameter in tower.parameters())
    assert not torch.allclose(features, system.visual_features(batch["pixel_values"]), atol=1e-4)


def test_the_towers_router_reads_the_class_token_of_each_row() -> None:
    system, _, _ = attached()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    together = system.visual_features(pixels)
    for row in range(3):
        assert torch.allclose(system.visual_features(pixels[row : row + 1])[0], together[row], atol=1e-5)


def test_the_decoder_called_by_itself_is_text() -> None:
    _, model, _ = attached()
    ids = Bench("llama").inputs()["input_ids"]
    states = model.get_decoder()(input_ids=ids).last_hidden_state
    assert torch.allclose(model.lm_head(states), model(input_ids=ids).logits, atol=1e-5)


def test_bad_rows_models_and_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    system, _, _ = attached()
    processor = system.processor(Bench("llama").tokenizer())
    with pytest.raises(InputError, match=r"row 1: image.*be readable"):
        processor.examples([{"image": str(tmp_path / "bad.png"), "instruction": "a", "answer": "b"}])
    with pytest.raises(InputError, match="no answer"):
        processor.examples([{"image": None, "instruction": "a"}])
    with pytest.warns(UserWarning, match="all rows are of one modality"):
        processor.examples(ROWS[:1])
    with pytest.raises(InputError, match=r"pre-norm blocks.*BertModel"):
        LaVIN().attach(Bench("bert").model())
    with pytest.raises(InputError, match="divide dim"):
        LaVIN(dim=8, groups=3).attach(Bench("llama").model())
    with pytest.raises(InputError, match="at most the 4 blocks"):
        lavin(visual_every=5).attach(Bench("llama").model())
    with pytest.raises(InputError, match="vision transformer"):
        vision_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no image where no vision tower is"):
        LaVIN().processor(Bench("llama").tokenizer()).examples(ROWS)
