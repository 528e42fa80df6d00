from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from gossamer.acceleration.pyramiddrop import PyramidDrop, PyramidDropConfig, schedule
from gossamer.core.errors import InputError, OptionError
from gossamer.testing.acceleration import processor, prompts
from gossamer.testing.bench import IMAGE_TOKEN, Bench

LAYERS = 8


def model() -> Any:
    return Bench("llava").model(layers=LAYERS)


def naive(vlm: Any, batch: dict[str, Tensor], drops: dict[int, float], *, renumber: bool = True) -> list[Tensor]:
    """Logits of each row's tokens that are left at the end: one row at a time, every matrix written out."""
    text, found = vlm.model.language_model, []
    config = text.config
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    labels, pictures = batch.get("labels"), 0
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real]
        image, x = ids == IMAGE_TOKEN, text.embed_tokens(ids)
        if image.any():
            features = vlm.model.get_image_features(batch["pixel_values"][pictures : pictures + 1]).pooler_output[0]
            x = torch.cat([x[~image & (torch.arange(len(ids)) < image.nonzero()[0])], features,
                           x[~image & (torch.arange(len(ids)) > image.nonzero()[0])]])  # fmt: skip
            pictures += 1
        asks = torch.tensor([len(ids) - 1])
        if labels is not None:
            said = labels[row][real] != -100
            asks = torch.tensor([t for t in range(len(ids) - 1) if said[t + 1] and not said[t]])
        place, total = torch.arange(len(ids)), int(image.sum())
        for number, layer in enumerate(text.layers):
            attention = layer.self_attn

            def project(x: Tensor, place: Tensor, layer: Any = layer, attention: Any = attention) -> Any:
                x = layer.input_layernorm(x)
                angle = place[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
                angle = torch.cat([angle, angle], -1)[:, None]

                def turn(v: Tensor) -> Tensor:
                    swapped = torch.cat([-v[..., size // 2 :], v[..., : size // 2]], -1)
                    return v * angle.cos() + swapped * angle.sin()

                q, k = attention.q_proj(x).view(-1, heads, size), attention.k_proj(x).view(-1, keys, size)
                v = attention.v_proj(x).view(-1, keys, size).repeat_interleave(heads // keys, 1)
                weights = torch.einsum("qhd,khd->hqk", turn(q), turn(k).repeat_interleave(heads // keys, 1)) / size**0.5
                ahead = torch.ones(len(x), len(x)).triu(1).bool()
                return weights.masked_fill(ahead, -torch.inf).softmax(-1), v

            if number in drops and total:
                with torch.no_grad():
                    score = project(x, place)[0].mean(0)[asks].mean(0)
                count = max(1, int(total * drops[number]))
                best = score.masked_fill(~image, -1).topk(count).indices
                stays = ~image
                stays[best] = True
                asks = torch.tensor([int(stays[:a].sum()) for a in asks])
                x, image = x[stays], image[stays]
                place = torch.arange(len(x)) if renumber else place[stays]
            weights, v = project(x, place)
            x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        found.append(vlm.lm_head(text.norm(x)))
    return found


@pytest.mark.parametrize("renumber", [True, False])
@pytest.mark.parametrize("labelled", [False, True])
def test_logits_are_the_papers(renumber: bool, labelled: bool) -> None:
    vlm, batch = model(), prompts(labels=labelled)
    system = PyramidDrop(reindex_positions=renumber)
    with torch.no_grad():
        expected = naive(vlm, batch, {2: 0.5, 4: 0.25, 6: 0.125}, renumber=renumber)
        system.accelerate(vlm)
        found = vlm(**batch).logits
    layouts = system._selection.last.layouts  # type: ignore[union-attr]
    last = layouts[max(layouts)]
    for row, logits in enumerate(expected):
        origin = last.origin[row][last.mask[row]]
        torch.testing.assert_close(found[row, origin], logits, atol=1e-3, rtol=1e-4)


def test_training_has_the_papers_loss_and_gradients() -> None:
    vlm, batch = model().train(), prompts(labels=True)
    losses = []
    for logits, ids, said in zip(naive(vlm, batch, {2: 0.5, 4: 0.25, 6: 0.125}), batch["input_ids"], batch["labels"],
                                 strict=True):  # fmt: skip
        count = int((said != -100).sum())
        losses.append(F.cross_entropy(logits[-count - 1 : -1], ids[-count:], reduction="sum"))
    expected = sum(losses) / (batch["labels"] != -100).sum()  # type: ignore[operator]
    assert isinstance(expected, Tensor)
    expected.backward()
    text = vlm.model.language_model
    before = [p.grad.clone() for p in text.parameters() if p.grad is not None]
    vlm.zero_grad()
    PyramidDrop(train=True).accelerate(vlm)
    loss = vlm(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(before, (p.grad for p in text.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_shares_are_of_the_original_count_and_at_least_one() -> None:
    vlm, batch = model(), prompts()
    system = PyramidDrop()
    system.accelerate(vlm)
    vlm(**batch)
    visual = system.report()["visual"]
    assert visual[0] == [4, 4, 2, 2, 1, 1, 1, 1]  # 4, 4 / 2, 4 / 4, and one where a half would be left
    assert visual[2] == [0] * LAYERS


def test_all_shares_one_is_the_plain_model_to_the_bit() -> None:
    vlm, batch = model(), prompts()
    before = vlm(**batch).logits
    system = PyramidDrop(ratios=(1.0,))
    system.accelerate(vlm)
    assert torch.equal(vlm(**batch).logits, before)
    assert system.report()["operations"] >= system.report()["operations_plain"]


def test_what_stays_keeps_its_order_and_the_best_stay() -> None:
    vlm, batch = model(), prompts()
    system = PyramidDrop(layers=(3,), ratios=(0.5,))
    system.accelerate(vlm)
    vlm(**batch)
    run = system._selection.last  # type: ignore[union-attr]
    assert run is not None
    layout = run.layouts[3]
    for origin, mask in zip(layout.origin, layout.mask, strict=True):
        assert origin[mask].tolist() == sorted(origin[mask].tolist())
    (first, whole), (third, kept) = system.kept(0)
    assert (first, third, int(whole.sum()), int(kept.sum())) == (0, 3, 4, 2)


def test_a_picture_of_what_stays() -> None:
    vlm, batch = model(), prompts()
    system = PyramidDrop(layers=(3,), ratios=(0.25,))
    system.accelerate(vlm)
    vlm(**batch)
    panels = system.overlay(Image.new("RGB", (16, 16), "white"))
    assert panels.size == (32, 16)
    bright = [panels.getpixel((16 + x, y))[0] == 255 for y in (4, 12) for x in (4, 12)]  # type: ignore[index]
    assert bright == system.kept(0)[1][1].tolist()
    with pytest.raises(InputError, match="square of patches"):
        system.overlay(Image.new("RGB", (16, 16)), row=2)


def test_random_order_is_seeded_and_nested() -> None:
    vlm, batch, found = model(), prompts(), []
    for seed in (0, 0, 1, 2, 3):
        system = PyramidDrop(score="random", seed=seed)
        system.accelerate(vlm)
        vlm(**batch)
        found.append([kept.tolist() for _, kept in system.kept(0)])
        system.release(vlm)
    assert found[0] == found[1]
    assert any(found[0] != other for other in found[2:])
    for stages in found:
        assert all(a or not b for one, two in itertools.pairwise(stages) for a, b in zip(one, two, strict=True))


def test_the_paper_drops_at_8_16_24_of_32() -> None:
    assert schedule(PyramidDropConfig(), 32) == {8: 0.5, 16: 0.25, 24: 0.125}
    assert schedule(PyramidDropConfig(layers=(2, 0.5), ratios=(0.3,)), 12) == {2: 0.3, 6: 0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.2, 0.5)}, "none above the one before"),
        ({"ratios": (0.5, 0.4, 0.3, 0.2)}, "one to 3 shares"),
        ({"layers": (0.5, 0.25)}, "rise and lie from 1 to 7"),
        ({"layers": (8,)}, "rise and lie from 1 to 7"),
        ({"layers": (1.5,)}, "rise and lie from 1 to 7"),
        ({"layers": ()}, "rise and lie from 1 to 7"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PyramidDrop(**options).accelerate(model())


def test_inputs_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="must be > 0"):
        PyramidDrop(ratios=(0.0,))
    other = processor(Bench("llava"))
    other.image_token_id = 5
    with pytest.raises(InputError, match=f"write image tokens as {IMAGE_TOKEN}"):
        PyramidDrop().accelerate(model(), other)
    with pytest.raises(InputError, match="follow a prefill"):
        PyramidDrop().report()
    config = transformers.Qwen3Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    with pytest.raises(InputError, match="image token and a text model"):
        PyramidDrop().accelerate(transformers.Qwen3ForCausalLM(config))
