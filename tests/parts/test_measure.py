"""Generation and measurement on tiny models: batch = single, every file counted, memory of a fresh process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.core.errors import GossamerError, InputError
from gossamer.parts.generation import few_shot_prompt, generate_texts
from gossamer.parts.measure import (
    _peak_rss,
    decode_speed,
    environment,
    parameters,
    peak_memory,
    size_on_disk,
    speed_ratio,
)
from gossamer.parts.metrics import cut_first_line

PROMPTS = ["def add(a, b):", "x", "return the sum\nof a list of numbers", "def", "for item in items: total += item"]


def tiny_tokenizer(pad: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token=pad)


def tiny_model(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("pad", ["<pad>", None])
@pytest.mark.parametrize("stop_at_newline", [True, False])
def test_batched_texts_are_those_of_one_by_one(pad, stop_at_newline) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(pad)
    options = {"max_new_tokens": 16, "stop_at_newline": stop_at_newline}
    batched = generate_texts(model, tokenizer, PROMPTS, batch_size=3, **options)
    single = [generate_texts(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    assert batched == single
    assert len(set(batched)) > 1


class Scripted(LlamaForCausalLM):
    """Says a fixed text after any prompt: token t is followed by the next one of ``script``."""

    def forward(self, input_ids=None, **kwargs):
        result = super().forward(input_ids=input_ids, **kwargs)
        last = input_ids[:, -1].tolist()
        result.logits[:, -1] = 0
        for row, token in enumerate(last):
            result.logits[row, -1, self.follow.get(token, self.follow[None])] = 10
        return result


def scripted(tokenizer, text: str, after: str) -> Scripted:
    model = Scripted(tiny_model().config).eval()
    ids = tokenizer(text)["input_ids"]
    assert len(set(ids)) == len(ids), "each token of the script must tell its place"
    model.follow = {None: ids[0], **dict(pairwise(ids)), ids[-1]: tokenizer(after)["input_ids"][0]}
    return model


def test_stop_skips_leading_blank_lines_and_ends_with_the_line() -> None:
    tokenizer = tiny_tokenizer("<pad>")
    model = scripted(tokenizer, "\n qzj", "\n")  # after the line comes the newline, then the line again, for ever
    text = generate_texts(model, tokenizer, ["x"], max_new_tokens=30)[0]
    assert text == "\n qzj\n"
    assert cut_first_line(text) == "qzj"
    assert generate_texts(model, tokenizer, ["x"], max_new_tokens=12, stop_at_newline=False)[0].count("\n") > 1


def test_end_of_text_ends_a_row_even_if_it_is_the_pad_token() -> None:
    tokenizer = tiny_tokenizer(None)
    model = scripted(tokenizer, "qzj", "</s>")
    assert generate_texts(model, tokenizer, ["x", "def add"], max_new_tokens=10) == ["qzj", "qzj"]


def test_generation_leaves_the_world_as_it_was() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer("<pad>")
    tokenizer.padding_side = "right"
    model.train()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    state, seen = torch.get_rng_state(), []
    first = generate_texts(
        model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2, progress=lambda *at: seen.append(at)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (tokenizer.padding_side, model.training, model.generation_config.do_sample) == ("right", True, True)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert first == generate_texts(tiny_model(), tokenizer, PROMPTS, max_new_tokens=4)


def test_prompts_that_cannot_be_answered_are_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer("<pad>")
    with pytest.raises(InputError, match="prompt 1: must fit, with 16 new tokens, the model's 128 positions"):
        generate_texts(model, tokenizer, ["x", "x y " * 100], max_new_tokens=16)
    assert generate_texts(model, tokenizer, [], max_new_tokens=4) == []
    assert len(generate_texts(model, tokenizer, [""], max_new_tokens=4)) == 1
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="prompt 0: must give at least one token"):
        generate_texts(model, tokenizer, [""], max_new_tokens=4)


def test_few_shot_prompt() -> None:
    assert few_shot_prompt([("Q1 ", "A1"), ("Q2 ", "A2")], "Q3 ", separator="\n") == "Q1 A1\nQ2 A2\nQ3 "


def test_size_counts_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    sizes = {
        "model-1.safetensors": 4000,
        "deep/model-2.safetensors": 1000,
        "model.safetensors.index.json": 7,
        "tokenizer.json": 300,
        "chat_template.jinja": 20,
        "config.json": 50,
        ".hidden": 3,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "linked.txt").symlink_to(tmp_path / "config.json")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    report = size_on_disk(tmp_path, weight_count=10_000)
    assert report.files == {**sizes, "linked.txt": 50}
    assert (report.weights_bytes, report.tokenizer_bytes, report.other_bytes) == (5000, 320, 110)
    assert report.total_bytes == 5430
    assert report.bits_per_weight == 4.0
    one = size_on_disk(tmp_path / "model-1.safetensors")
    assert (one.total_bytes, one.bits_per_weight, one.files) == (4000, None, {"model-1.safetensors": 4000})
    with pytest.raises(InputError, match="a file or a folder with files"):
        size_on_disk(tmp_path / "nothing")


def test_parameters_count_tied_once_and_packed_by_weight() -> None:
    free, tied = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=True)
    free_counts, tied_counts = parameters(free), parameters(tied)
    assert free_counts["total"] == sum(p.numel() for p in free.parameters()) == free_counts["by_dtype"]["float32"]
    assert (free_counts["embeddings"], tied_counts["embeddings"]) == (2 * 300 * 32, 300 * 32)
    assert free_counts["total"] - tied_counts["total"] == 300 * 32
    tied.model.embed_tokens.requires_grad_(False)
    assert parameters(tied)["trainable"] == tied_counts["total"] - 300 * 32

    class Packed(torch.nn.Module):
        logical_weight_count = 32 * 32

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.zeros(32 * 16, dtype=torch.uint8))
            self.scale = torch.nn.Parameter(torch.ones(32), requires_grad=False)
            self.bias = torch.nn.Parameter(torch.zeros(32))

    free.model.layers[0].self_attn.q_proj = Packed()
    counts = parameters(free)
    assert counts["by_dtype"]["packed"] == 32 * 32
    assert counts["total"] == free_counts["total"] + 32
    assert counts["bytes"] == free_counts["bytes"] - 32 * 32 * 4 + 32 * 16 + 2 * 32 * 4


def test_peak_memory_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer("<pad>").save_pretrained(tmp_path)
    ballast = bytearray(1_000_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    report = peak_memory(tmp_path, prompt="def add(a, b):", new_tokens=5)
    assert report.tokens == 5
    assert 0 < report.baseline_rss <= report.load_rss <= report.peak_rss_bytes < len(ballast)
    assert report.net_rss_bytes == report.peak_rss_bytes - report.baseline_rss
    held = len(ballast)
    del ballast
    assert _peak_rss() > held, "memory that was given back still counts towards the peak"
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(GossamerError, match="must load and generate"):
        peak_memory(tmp_path, prompt="x")


def test_decode_speed_takes_turns_and_counts_every_token() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str, step: float):
        def run(new_tokens: int) -> list[float]:
            calls.append((name, new_tokens))
            return [1.0 + step * number for number in range(new_tokens)]

        return run

    reports = decode_speed({"a": arm("a", 0.1), "b": arm("b", 0.2)}, "x", new_tokens=11, rounds=3)
    assert [name for name, count in calls if count == 11] == ["a", "b", "b", "a", "a", "b"]
    assert reports["a"].tokens_per_s == pytest.approx(10)
    assert reports["b"].ms_per_token == pytest.approx(200)
    assert reports["b"].first_token_ms == pytest.approx(1000)
    ratio = speed_ratio(reports["a"], reports["b"])
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_decode_speed_of_a_model_ignores_its_end_of_text() -> None:
    tokenizer = tiny_tokenizer(None)
    model = scripted(tokenizer, "qzj", "</s>")
    report = decode_speed({"m": (model, tokenizer)}, "def add(a, b):", new_tokens=6, rounds=3)["m"]
    assert len(report.runs) == 3
    assert 0 < report.low <= report.tokens_per_s <= report.high
    with pytest.raises(InputError, match="at least 2 new tokens"):
        decode_speed({"m": (model, tokenizer)}, "x", new_tokens=1)


def test_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["device"]
    assert found["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["gossamer"]
