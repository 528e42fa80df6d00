"""NanoVLMs: its forward against a naive one, one sample learned by heart, sizes, processor, prompts and grades."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.architectures.nanovlms import PRESETS, NanoVLMs
from gossamer.architectures.nanovlms.grading import Grade, faults, grade, rewrite, summary
from gossamer.architectures.nanovlms.processing import train_tokenizer
from gossamer.core.errors import InputError, OptionError

TEXTS = ["a red ball in the garden", "the sun is big and warm", "two small cats sleep in a box"]
SMALL = {"image_size": 32, "patch_size": 8, "vocabulary": 300, "max_length": 32}


def small(**options: Any) -> NanoVLMs:
    return NanoVLMs(**{**SMALL, **options})


def batch(system: NanoVLMs) -> dict[str, Tensor]:
    colours = ("red", "yellow", "grey")
    rows = [
        {"image": Image.new("RGB", (40, 30), colour), "text": text} for colour, text in zip(colours, TEXTS, strict=True)
    ]
    processor = system.processor(train_tokenizer(TEXTS * 3, 300))
    return processor.collate(processor.examples(rows))


def naive_logits(model: Any, ids: Tensor, image: Tensor) -> Tensor:
    """One row without padding: the equations of the docstring, block by block."""
    states = model.encoder(pixel_values=image[None]).last_hidden_state[0]
    chosen = {"cls": states[:1], "all": states[1:]}[model.config.visual_tokens]
    first, _, second, _ = model.connector
    visual = second(nn.functional.gelu(first(chosen)))
    words = model.decoder.transformer.wte(ids[len(chosen) :])
    hidden = torch.cat([visual, words]) + model.decoder.transformer.wpe.weight[: len(ids)]
    heads, count = model.config.text_config.n_head, len(ids)
    for block in model.decoder.transformer.h:
        q, k, v = block.attn.c_attn(block.ln_1(hidden)).split(hidden.shape[1], dim=-1)
        q, k, v = (part.view(count, heads, -1).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        hidden = hidden + block.attn.c_proj(mixed)
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return model.decoder.lm_head(model.decoder.transformer.ln_f(hidden))


@pytest.mark.parametrize("visual_tokens", ["cls", "all"])
def test_values_and_gradients_are_those_of_the_equations(visual_tokens: str) -> None:
    system = small(visual_tokens=visual_tokens, dropout=0.0)
    model, given = system.build(), batch(system)
    model(**given).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for row in range(3):
        real = given["attention_mask"][row].bool()
        ids, labels = given["input_ids"][row][real], given["labels"][row][real]
        logits = naive_logits(model, ids, given["pixel_values"][row])
        seen = labels[1:] != -100
        total = total - logits[:-1].log_softmax(-1)[seen, labels[1:][seen]].sum()
        count += int(seen.sum())
    (total / count).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


def test_the_first_word_is_predicted_at_the_last_visual_token_and_a_sample_is_learned_by_heart() -> None:
    system = small(dropout=0.0)
    model, given = system.build(), batch(system)
    one = {name: value[:1] for name, value in given.items()}
    assert int((one["labels"] == -100).sum()) == int((~one["attention_mask"].bool()).sum()) + 1
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**one).loss.backward()
        optimizer.step()
    processor = system.processor(train_tokenizer(TEXTS * 3, 300))
    model.eval()
    prompt = {"input_ids": one["input_ids"][:, :2], "attention_mask": one["attention_mask"][:, :2]}
    found = model.generate(**prompt, pixel_values=one["pixel_values"], max_new_tokens=30, do_sample=False)
    assert processor.tokenizer.decode(found[0], skip_special_tokens=True) == TEXTS[0]


def test_attention_is_scaled_by_the_width_of_a_head() -> None:
    config = NanoVLMs(preset="base").build().config
    assert config.text_config.n_embd // config.text_config.n_head == 64
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == 64


@pytest.mark.parametrize(("preset", "millions"), [("mini", 5), ("base", 16), ("large", 25)])
def test_presets_have_the_papers_totals(preset: str, millions: int) -> None:
    assert NanoVLMs(preset=preset).build().num_parameters() / 1e6 == pytest.approx(millions, rel=0.1)
    assert preset in PRESETS


def test_prompts_are_padded_on_the_left_and_rows_do_not_change_each_other() -> None:
    system = small(visual_tokens="pooled", pooled=4)
    model, processor = system.build(), system.processor(train_tokenizer(TEXTS * 3, 300))
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    together = model.generate(**processor(images, ["a red", ""]), max_new_tokens=6, do_sample=False)
    alone = model.generate(**processor(images[1], ""), max_new_tokens=6, do_sample=False)
    assert together[1, -6:].tolist() == alone[0, -6:].tolist()


def test_an_unreadable_image_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    processor = small().processor(train_tokenizer(TEXTS * 3, 300))
    rows = [{"image": str(tmp_path / name), "text": "a ball"} for name in ("bad.png", "good.png")]
    assert len(processor.examples(rows)) == 1
    assert processor.unreadable == 1
    with pytest.raises(InputError, match="readable image"):
        processor.examples(rows[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "multiple of patch_size"),
        ({"visual_tokens": "pooled", "pooled": 5}, "be a square"),
        ({"visual_tokens": "pooled", "pooled": 64}, "of at most 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(**options).build()


def test_a_vocabulary_that_the_decoder_cannot_pay_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="of the parameters are embeddings"):
        NanoVLMs(**{**SMALL, "vocabulary": 40_000}).build()


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="at most 300 tokens"):
        small().processor(train_tokenizer(TEXTS * 50, 320))
    with pytest.raises(InputError, match="train_tokenizer"):
        small().processor(None)


def test_image_tokens_must_fit_the_images() -> None:
    system = small()
    given = batch(system)
    with pytest.raises(InputError, match="1 for each of 2 images"):
        system.build()(**{**given, "pixel_values": given["pixel_values"][:2]})


def test_a_description_is_asked_for_until_it_is_valid() -> None:
    good = " ".join(["The red ball is on the grass."] * 3)
    answers = iter(["Too short.", f"Here is a caption. {good}", good])
    prompts: list[str] = []

    def writer(prompt: str) -> str:
        prompts.append(prompt)
        return next(answers)

    assert rewrite("a ball on a lawn", writer) == good
    assert "20 to 25 words" in prompts[0]
    assert "Not again: 2 words" in prompts[1]
    assert faults("dog " * 20, "short", words=["cat"]) == ["the word 'dog' is not allowed"]
    with pytest.raises(InputError, match="stronger writer"):
        rewrite("a ball", lambda prompt: "no")


def test_grades_are_strict_json_within_the_marks() -> None:
    marks = {"creativity": 5, "meaningfulness": 9, "consistency": 11, "reason": "x"}
    answers = iter(["hm", json.dumps(marks), json.dumps(marks | {"consistency": 7})])
    assert grade("a ball", "The", " ball", lambda prompt: next(answers)) == Grade(5, 9, 7, "x")
    with pytest.raises(InputError, match="three marks as JSON"):
        grade("a ball", "The", " ball", lambda prompt: "{}")


def test_the_summary_has_the_mean_within_its_interval() -> None:
    found = summary([Grade(2, 4, 6), Grade(4, 8, 6)])
    assert found["consistency"] == (6, 6, 6)
    mean, low, high = found["creativity"]
    assert low <= mean == 3 <= high
