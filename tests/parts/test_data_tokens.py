"""Tokens, labels and weights: the border of prompt and answer, templates, truncation, and the doctor on top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gossamer.core.errors import InputError
from gossamer.parts.data_doctor import examine, load_examples
from gossamer.parts.data_tokens import IGNORE, Example, PreferencePair, encode_border, encode_prompt, tokenise

SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
# as in Gemma, Qwen and the like: a header, the text, an end mark and a line break
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "ho"},
    {"role": "assistant", "content": "hum", "weight": 0.5},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with the merges "ab" and " x"; puts <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet, "ab", "Ġx"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("Ġ", "x")]))
    core.add_special_tokens(SPECIALS)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def _supervised(tokenizer: Any, example: Example) -> str:
    assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert [label != IGNORE for label in example.labels] == [weight > 0 for weight in example.weights]
    assert example.labels[0] == IGNORE
    return _text(tokenizer, [label for label in example.labels if label != IGNORE])


def _one(row: dict[str, Any], tokenizer: Any, max_length: int = 200, **options: Any) -> Example:
    example = tokenise(row, tokenizer, max_length=max_length, **options)
    assert isinstance(example, Example)
    return example


def test_completion_masks_the_prompt_and_ends_with_eos(tokenizer: Any) -> None:
    example = _one({"prompt": "q", "completion": " x", "weight": 0.5}, tokenizer)
    assert _text(tokenizer, example.input_ids) == "<s>q x</s>"
    assert _supervised(tokenizer, example) == " x</s>"
    assert set(example.weights) == {0.0, 0.5}
    assert not example.merged
    assert _supervised(tokenizer, _one({"prompt": "q", "completion": "x</s>"}, tokenizer)) == "x</s>"


def test_bos_stands_once(tokenizer: Any) -> None:
    for prompt in ("q", "<s>q"):
        ids = _one({"prompt": prompt, "completion": "x"}, tokenizer).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt("", tokenizer) == [tokenizer.bos_token_id]
    tokenizer.chat_template = TEMPLATE
    assert _one({"messages": CHAT}, tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_a_merge_across_the_border_is_undone(tokenizer: Any) -> None:
    # "za" + "bz": together the tokenizer reads z ab z, and the prompt's own last token "a" would be gone
    example = _one({"prompt": "za", "completion": "bz"}, tokenizer)
    assert example.merged
    assert example.input_ids[:3] == tokenizer("za")["input_ids"]
    assert _supervised(tokenizer, example) == "bz</s>"
    assert encode_border("za", "bz", tokenizer)[0] == encode_prompt("za", tokenizer)
    pair = tokenise({"prompt": "za", "chosen": "bz", "rejected": "z"}, tokenizer, max_length=20)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen.input_ids[:3] == pair.rejected.input_ids[:3] == tokenizer("za")["input_ids"]


def test_text_is_supervised_from_its_first_token_after_bos(tokenizer: Any) -> None:
    example = _one({"text": "zab", "weight": 2.0}, tokenizer)
    assert _supervised(tokenizer, example) == "zab</s>"
    assert example.weights == [0.0, 2.0, 2.0, 2.0]


def test_chat_template_gives_loss_to_answers_and_their_end_marks(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    example = _one({"messages": CHAT, "weight": 0.5}, tokenizer)
    whole = "<s><|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>\n<|user|>\nho<|end|>\n<|assistant|>\nhum<|end|>\n"
    assert _text(tokenizer, example.input_ids) == whole
    assert example.input_ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert _supervised(tokenizer, example) == "ho<|end|>hum<|end|>"
    assert [weight for weight in example.weights if weight] == [0.5] * 3 + [0.25] * 4
    prompt = encode_prompt(CHAT[:1], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == IGNORE
    assert example.labels[len(prompt)] != IGNORE


def test_generation_marks_agree_with_rendering(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    rendered = _one({"messages": CHAT}, tokenizer)
    marked = TEMPLATE.replace(
        "{{ m.content | trim }}<|end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|end|>{% endif %}{{ '' }}",
    )
    tokenizer.chat_template = marked
    assert _one({"messages": CHAT}, tokenizer) == rendered


def test_template_that_rewrites_earlier_turns(tokenizer: Any) -> None:
    # as in Qwen 3: only the last answer keeps its (empty) reasoning block
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}[think]\n{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert _supervised(tokenizer, _one({"messages": CHAT}, tokenizer)) == "ho<|end|>[think]\nhum<|end|>"


def test_trained_user_turn_and_template_without_end_mark(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    asked = [{**CHAT[0], "train": True}, {**CHAT[1], "train": False}]
    assert _supervised(tokenizer, _one({"messages": asked}, tokenizer)) == "hi<|end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert _supervised(tokenizer, _one({"messages": CHAT[:2]}, tokenizer)).endswith("ho\n</s>")


def test_plain_template_where_the_tokenizer_has_none(tokenizer: Any) -> None:
    example = _one({"messages": CHAT}, tokenizer)
    assert _text(tokenizer, example.input_ids) == (
        "<s>User: hi\n\nAssistant: ho</s>\n\nUser: ho\n\nAssistant: hum</s>\n\n"
    )
    assert _supervised(tokenizer, example) == " ho</s> hum</s>"
    prompt = encode_prompt(CHAT[:1], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt


def test_prompt_of_messages_trains_the_answer_only(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    example = _one({"prompt": CHAT[:3], "completion": "hum"}, tokenizer)
    assert _supervised(tokenizer, example) == "hum<|end|>"
    head, answer = encode_border(CHAT[:3], "hum", tokenizer)
    assert example.input_ids[: len(head) + len(answer)] == head + answer


def test_truncation_takes_the_beginning_of_the_prompt_first(tokenizer: Any) -> None:
    row = {"prompt": "0123456789", "completion": "xyz"}
    example = _one(row, tokenizer, max_length=8)
    assert _text(tokenizer, example.input_ids) == "<s>789xyz</s>"
    assert example.cut == (7, 0)
    example = _one(row, tokenizer, max_length=3)
    assert _text(tokenizer, example.input_ids) == "<s>xy"
    assert example.cut == (10, 2)
    with pytest.raises(InputError, match="must have at most 8 tokens, got 15 tokens"):
        _one(row, tokenizer, max_length=8, truncation="refuse")


def test_truncation_leaves_a_pair_the_same_prompt(tokenizer: Any) -> None:
    pair = tokenise({"prompt": "0123456789", "chosen": "x", "rejected": "xyz"}, tokenizer, max_length=8)
    assert isinstance(pair, PreferencePair)
    assert _text(tokenizer, pair.chosen.input_ids) == "<s>789x</s>"
    assert _text(tokenizer, pair.rejected.input_ids) == "<s>789xyz</s>"


def test_tokenizer_without_eos_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"tokenizer: must have an end-of-sequence token, got none; set"):
        _one({"text": "a"}, tokenizer)


def test_doctor_previews_tokens_with_their_weights(tokenizer: Any) -> None:
    diagnosis = examine([{"prompt": "q", "completion": "ab", "weight": 0.5}], tokenizer)
    assert diagnosis.ok
    assert [(token["text"], token["weight"]) for token in diagnosis.preview[0]["tokens"]] == [
        ("<s>", 0.0),
        ("q", 0.0),
        ("ab", 0.5),
        ("</s>", 0.5),
    ]
    assert diagnosis.counts["supervised tokens"] == 2
    assert diagnosis.counts["loss weight"] == 1.0
    assert json.loads(json.dumps(diagnosis.as_dict()))["ok"] is True


def test_doctor_finds_what_only_tokens_show(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}" + TEMPLATE
    )
    rows = [
        {"messages": [{"role": "system", "content": "s"}, *CHAT]},
        {"messages": [*CHAT[:1], {"role": "assistant", "content": "a<|end|>"}]},
        {"prompt": "0" * 60, "completion": "x" * 50},
        {"prompt": "0" * 60, "completion": "x" * 50},
        {"prompt": "q", "completion": "a", "weight": 0},
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    findings = examine(rows, tokenizer, max_length=40).findings
    seen = {(finding.row, finding.field, finding.severity): finding for finding in findings}
    assert "start with user" in seen[1, "messages", "error"].expected
    assert "<|end|>" in seen[2, "messages[1].content", "warning"].found
    assert "2 rows" in seen[3, "answer", "warning"].found
    assert "60 prompt" in seen[3, "prompt", "warning"].found
    assert seen[4, "", "warning"].found == "the same as row 3 of rows"
    assert seen[5, "", "warning"].found == "no token with loss"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_set_without_any_supervised_token_is_refused(tokenizer: Any, with_tokenizer: bool) -> None:
    rows = [{"messages": [CHAT[0], {**CHAT[1], "train": False}]}]
    diagnosis = examine(rows, tokenizer if with_tokenizer else None)
    assert [finding.expected for finding in diagnosis.findings] == ["have at least one token with loss"]
    assert not diagnosis.ok
    with pytest.raises(InputError, match="must have at least one token with loss"):
        load_examples(rows, tokenizer, max_length=20)


def test_loader_raises_the_first_error_and_counts_what_it_drops(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path.write_text("\n".join(json.dumps(row) for row in (pair, {**pair, "chosen": "b"})))
    examples = load_examples(path, tokenizer, max_length=20)
    assert len(examples) == 1
    assert examples.diagnosis.counts["dropped: chosen equals rejected"] == 1
    assert examples.diagnosis.counts["rows"] == 2
    path.write_text(json.dumps({"text": None}))
    with pytest.raises(InputError, match=r"a\.jsonl row 1 \(line 1\), text: must be a string, got null"):
        load_examples(path, tokenizer, max_length=20)


def test_sentencepiece_like_tokenizer_keeps_the_border() -> None:
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdefgh"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    example = _one({"prompt": "abc", "completion": " de"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["▁", "a", "b", "c", "▁", "d", "e", "</s>"]
    assert example.labels[:4] == [IGNORE] * 4
    assert not example.merged
