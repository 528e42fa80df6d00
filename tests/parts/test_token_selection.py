from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.selection_costs import costs, layer_operations
from gossamer.parts.token_layouts import places_of, restore, select, whole
from gossamer.parts.token_selection import Decoder, TokenSelection, read_call

IMAGE, PATCHES, LAYERS = 60, 9, 4
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24,
    "patch_size": 8, "projection_dim": 16, "initializer_range": 0.3,
}  # fmt: skip
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def vlm(text: str = "llama", attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    if text == "llama":
        config: Any = transformers.LlamaConfig(**TEXT)
    elif text == "qwen3":
        config = transformers.Qwen3Config(**TEXT)
    else:
        kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        config = transformers.Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=8)
    vision = transformers.CLIPVisionConfig(**VISION)
    whole_config = transformers.LlavaConfig(
        vision_config=vision, text_config=config, image_token_index=IMAGE, vision_feature_layer=-1
    )
    model: Any = transformers.LlavaForConditionalGeneration(whole_config)
    model.set_attn_implementation(attention)
    return model.eval()


def prompts(rows: list[tuple[int, int]], side: str = "left") -> dict[str, Tensor]:
    """Rows of (text before, text after) an image; a first number below zero stands for no image."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for before, after in rows:
        count = 0 if before < 0 else PATCHES
        ids = torch.randint(2, 59, (abs(before) + count + after,), generator=generator)
        ids[max(before, 0) : max(before, 0) + count] = IMAGE
        made.append(ids)
    width = max(map(len, made))
    ids, mask = torch.zeros(len(made), width, dtype=torch.long), torch.zeros(len(made), width, dtype=torch.long)
    for row, values in enumerate(made):
        place = slice(width - len(values), width) if side == "left" else slice(0, len(values))
        ids[row, place], mask[row, place] = values, 1
    pictures = [row for row, (before, _) in enumerate(rows) if before >= 0]
    pixels = torch.randn(len(rows), 3, 24, 24, generator=generator)[pictures]
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"pixel_values": pixels} if pictures else batch


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    real = batch["attention_mask"][row].bool()
    one = {key: batch[key][row : row + 1, real] for key in batch if key != "pixel_values"}
    images = (batch["input_ids"] == IMAGE).any(1)
    if not images[row]:
        return one
    number = int(images[:row].sum())
    return one | {"pixel_values": batch["pixel_values"][number : number + 1]}


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def halves(layer: int, hidden: Tensor, layout: Any, run: Any) -> Tensor | None:
    """Before layers 1 and 3: the image tokens with a positive state go, another number in each row."""
    if layer not in (1, 3):
        return None
    return layout.mask & ~(layout.of(run.image & ~run.asks) & (hidden[..., layer] > 0))


def put(model: Any, policy: Any = halves, *, renumber: bool = True, trains: bool = False) -> TokenSelection:
    selection = TokenSelection(model, policy, renumber=renumber, trains=trains)
    selection.install()
    return selection


@torch.no_grad()
def masked(model: Any, batch: dict[str, Tensor], gone: dict[int, Tensor]) -> Tensor:
    """Last states where nothing is removed, but from each layer of ``gone`` on its tokens [t] are no keys."""
    handles, hidden_mask = [], {"now": torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)}
    types = getattr(model.config.text_config, "layer_types", None) or ["full_attention"] * LAYERS
    places = torch.arange(batch["input_ids"].shape[1])
    far = places[:, None] - places[None]

    def hook(index: int) -> Any:
        def before(layer: Any, args: Any, kwargs: Any) -> Any:
            hidden_mask["now"] = hidden_mask["now"] | gone.get(index, hidden_mask["now"])
            allowed = (far >= 0) & ~hidden_mask["now"][None]
            if types[index] == "sliding_attention":
                allowed = allowed & (far < model.config.text_config.sliding_window)
            return args, {**kwargs, "attention_mask": (allowed | (far == 0))[None, None]}

        return before

    for index, layer in enumerate(model.model.language_model.layers):
        handles.append(layer.register_forward_pre_hook(hook(index), with_kwargs=True))
    out = model(**batch).logits
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("text", ["llama", "gemma3"])
def test_removed_with_positions_kept_is_masked_as_keys(text: str) -> None:
    model, batch = vlm(text), prompts([(2, 6)])
    selection = put(model, renumber=False)
    with torch.no_grad():
        found = model(**batch).logits
    run = selection.last
    assert run is not None
    TokenSelection.take_off(model)
    gone = {}
    for first in (1, 3):
        stays = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
        stays[run.layouts[first].origin[0]] = True
        gone[first] = ~stays
    assert 0 < int(gone[1].sum()) < int(gone[3].sum())
    expected = masked(model, batch, gone)
    kept = ~gone[3]
    torch.testing.assert_close(found[0, kept], expected[0, kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("renumber", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_one_by_one(text: str, renumber: bool, side: str) -> None:
    model, batch = vlm(text), prompts([(2, 6), (0, 3), (-4, 3)], side)
    put(model, renumber=renumber)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(3):
            alone = model(**single(batch, row)).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["llama", "gemma3"])
@pytest.mark.parametrize("renumber", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_is_uncached_token_by_token(text: str, renumber: bool, attention: str) -> None:
    model, batch = vlm(text, attention), prompts([(2, 6), (0, 3), (-4, 3)])
    put(model, renumber=renumber)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        made = model.generate(**batch, max_new_tokens=8, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
        ids = made.sequences
        labels = ids.clone()
        labels[:, :width] = -100
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
        out = model(**{**batch, "input_ids": ids, "attention_mask": mask, "labels": labels})
    cached = torch.stack(made.logits, dim=1)
    torch.testing.assert_close(cached, out.logits[:, width - 1 : -1], atol=1e-4, rtol=1e-4)
    stored = [layer.keys.shape[-2] for layer in made.past_key_values.layers]
    assert len(set(stored[: 1 + (text == "llama")])) == 1 + (text == "llama")


def test_renumbered_tokens_are_a_shorter_prompt_to_the_deeper_layers() -> None:
    model, batch = vlm(), prompts([(2, 6)])
    selection = put(model)
    with torch.no_grad():
        found = model(**batch)
        run = selection.last
        assert run is not None
        TokenSelection.take_off(model)
        decoder, one, three = Decoder(model), run.layouts[1], run.layouts[3]
        assert three.positions[0].tolist() == list(range(three.mask.shape[1]))
        hidden = model(**batch, output_hidden_states=True).hidden_states[1][:, one.origin[0]]
        for index in (1, 2):
            hidden = decoder.layers[index](hidden, **decoder.arguments(index, hidden, whole(one.mask)))
        places = [one.origin[0].tolist().index(place) for place in three.origin[0].tolist()]
        states = decoder.forward_from(3, hidden[:, places], whole(three.mask))
    torch.testing.assert_close(found.logits[:, -1], model.lm_head(states[:, -1]), atol=1e-4, rtol=1e-4)


def test_hidden_states_and_cache_have_the_real_lengths() -> None:
    model, batch = vlm(), prompts([(2, 6), (0, 3)])
    selection = put(model)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, use_cache=True)
    run = selection.last
    assert run is not None
    widths = [run.layouts[run.start(layer)].mask.shape[1] for layer in range(LAYERS)]
    assert widths[0] > widths[1] == widths[2] > widths[3]
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == widths
    assert [states.shape[1] for states in out.hidden_states[1:-1]] == [widths[0], *widths[1:-1]]
    report = costs(run, selection.decoder, "test")
    stored = sum(2 * layer.keys.numel() * 4 for layer in out.past_key_values.layers)
    assert report["cache_bytes"] == stored < report["cache_bytes_plain"]
    assert report["tokens"][1][0] == PATCHES + 3
    assert report["operations"] == sum(
        layer_operations(model.config.text_config, n) for r in report["tokens"] for n in r
    )


@pytest.mark.parametrize("text", ["llama", "gemma3", "qwen3"])
def test_attention_is_the_layers_own(text: str) -> None:
    model, batch = vlm(text, "eager"), prompts([(2, 6), (0, 3)])
    decoder, run = Decoder(model), read_call(model, dict(batch))
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, output_attentions=True)
    places, real = places_of(run.asks)
    assert real.all()
    for layer in range(LAYERS):
        if decoder.kinds[layer] == "full_attention":
            found = decoder.attention(layer, out.hidden_states[layer], whole(run.real), places)
            expected = out.attentions[layer].mean(1)[:, -1:]
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)


def test_states_come_back_to_their_places() -> None:
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    keep = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    chosen, layout = select(hidden, whole(real), keep, renumber=True)
    assert chosen[..., 0][layout.mask].tolist() == [1, 4, 5, 8, 11]
    assert layout.mask.tolist() == [[True, True, True], [False, True, True]]
    assert layout.positions[0].tolist() == [0, 1, 2]
    assert layout.positions[1, 1:].tolist() == [2, 3]
    assert restore(chosen, layout, real)[..., 0].tolist() == [[0, 1, 1, 1, 4, 5], [0, 0, 8, 8, 8, 11]]


def test_the_loss_is_that_of_gathered_labels_with_its_gradients() -> None:
    model, batch = vlm(), prompts([(2, 6)])
    labels = batch["input_ids"].clone()
    labels[:, :11] = -100  # the first label follows the image at once
    selection = put(model, trains=True)
    model.train()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    run = selection.last
    assert run is not None
    found = [p.grad.clone() for p in model.model.parameters() if p.grad is not None]
    model.zero_grad()
    states = model.model(**batch).last_hidden_state
    assert states.shape[1] == 17
    origin = run.layouts[3].origin
    gathered = model(**batch, labels=labels).logits.gather(1, origin[..., None].expand(-1, -1, 64))
    again = torch.nn.functional.cross_entropy(gathered[0, :-1], labels.gather(1, origin)[0, 1:], ignore_index=-100)
    torch.testing.assert_close(again, loss)
    again.backward()
    for one, other in zip(found, (p.grad for p in model.model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients() -> None:
    model, batch = vlm(), prompts([(2, 6), (0, 3)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels[:, :-3] = -100
    put(model, trains=True)
    model.train()
    grads = []
    for step in range(2):
        if step:
            model.gradient_checkpointing_enable()
        first = model(**batch, labels=labels, use_cache=False).loss
        model(**single(batch, 1), labels=labels[1:, -12:], use_cache=False)  # another run before the backward pass
        first.backward()
        grads.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_training_is_untouched_without_trains_and_needs_labels_with_it() -> None:
    model, batch = vlm().train(), prompts([(2, 6)])
    plain = model(**batch).logits
    put(model)
    assert torch.equal(model(**batch).logits, plain)
    TokenSelection.take_off(model)
    put(model, trains=True)
    with pytest.raises(InputError, match="labels in training"):
        model(**batch)


def test_it_works_under_peft_and_ranks_with_the_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model, batch = vlm(), prompts([(2, 6), (0, 3)])
    config = LoraConfig(target_modules=r".*language_model.*(q|k)_proj", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    plain = adapted(**batch).logits
    selection = put(adapted)
    found = adapted(**batch).logits
    assert selection.last is not None
    assert max(selection.last.layouts) == 3
    assert not torch.equal(found, plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, found, atol=1e-4, rtol=1e-4)
    TokenSelection.take_off(merged)
    torch.testing.assert_close(merged(**batch).logits, plain, atol=1e-4, rtol=1e-4)


def test_a_copy_selects_by_itself() -> None:
    model, batch = vlm(), prompts([(2, 6)])
    put(model)
    found = model(**batch).logits
    twin = copy.deepcopy(model)
    TokenSelection.take_off(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(twin(**batch).logits, found)
    TokenSelection.take_off(twin)
    assert not torch.equal(twin(**batch).logits, found)


def test_taking_it_off_leaves_nothing() -> None:
    model, batch = vlm(), prompts([(2, 6)])
    before = model(**batch).logits  # transformers puts hooks of its own on at the first call
    names, hooks = set(vars(model)), count_hooks(model)
    put(model)
    assert not torch.equal(model(**batch).logits, before)
    TokenSelection.take_off(model)
    assert torch.equal(model(**batch).logits, before)
    assert set(vars(model)) == names
    assert count_hooks(model) == hooks


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_beams_and_assisted_decoding_follow(options: dict[str, Any]) -> None:
    model, batch = vlm(), prompts([(2, 6)])
    put(model)
    beams = options.get("num_beams", 1)
    made = model.generate(**batch, max_new_tokens=8, do_sample=False, output_scores=True,
                          return_dict_in_generate=True, **options)  # fmt: skip
    labels = made.sequences.clone()
    labels[:, :17] = -100
    whole_batch = {**batch, "input_ids": made.sequences, "attention_mask": torch.ones_like(labels), "labels": labels}
    with torch.no_grad():
        scores = model(**whole_batch).logits[0, 16:-1].log_softmax(-1)
    if beams == 1:
        assert scores.argmax(-1).tolist() == made.sequences[0, 17:].tolist()
    else:
        total = scores.gather(1, made.sequences[0, 17:, None]).sum() / 8
        torch.testing.assert_close(total, made.sequences_scores[0], atol=1e-4, rtol=1e-4)


def test_llava_next_runs_too() -> None:
    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layer=-1, image_grid_pinpoints=[[24, 24]],
    )  # fmt: skip
    model: Any = transformers.LlavaNextForConditionalGeneration(config).eval()
    sizes = torch.tensor([[24, 24]])
    pixels = torch.randn(1, 2, 3, 24, 24)
    features = model.model.get_image_features(pixels, sizes).pooler_output
    count = sum(len(part) for part in features)
    ids = torch.cat([torch.full((1, count), IMAGE), torch.randint(2, 59, (1, 5))], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    selection = put(model)
    made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert selection.last is not None
    assert max(selection.last.layouts) == 3
    labels = made.clone()
    labels[:, : ids.shape[1]] = -100
    batch |= {"input_ids": made, "attention_mask": torch.ones_like(made), "labels": labels}
    with torch.no_grad():
        assert model(**batch).logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == made[0, ids.shape[1] :].tolist()


def test_several_labels_give_several_asking_tokens() -> None:
    model, batch = vlm(), prompts([(2, 6), (0, 3)])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 12:13] = labels[0, 15:17] = 5
    run = read_call(model, {**batch, "labels": labels})
    assert run.asks.nonzero().tolist() == [[0, 11], [0, 14], [1, 16]]
    assert run.prompt.sum(1).tolist() == [12, 12]


def test_what_cannot_work_is_refused() -> None:
    model, batch = vlm(), prompts([(2, 6)])
    with pytest.raises(InputError, match="image token and a text model"):
        Decoder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    put(model)
    with pytest.raises(InputError, match=r"find image tokens \(id 60\)"):
        model(**{**batch, "input_ids": torch.full_like(batch["input_ids"], 5)})
    with pytest.raises(InputError, match="first call of a cache"):
        model(**batch, past_key_values=model(**batch, use_cache=True).past_key_values)
    with pytest.raises(InputError, match="attention_mask"):
        model(**{**batch, "attention_mask": torch.ones(1, 1, 17, 17)})
    with pytest.raises(InputError, match="static cache"):
        model.generate(**batch, max_new_tokens=3, cache_implementation="static")
