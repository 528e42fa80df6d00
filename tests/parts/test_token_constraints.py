"""Answers held to a grammar: what may follow, in every order of calls, on vocabularies of every shape."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gossamer.core.errors import InputError
from gossamer.hub.nursery import load_nursery
from gossamer.parts.requests import Choice
from gossamer.parts.token_constraints import GrammarProcessor, Grammars
from gossamer.parts.vocabulary import trim_vocabulary
from gossamer.testing.bench import Bench

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])"
LETTERS = "ab1"
PATTERNS = ("a*b", "(ab|1)?a", "a?b?1?", "(a|b){2}1", "[^a]b*", "1(ab)*a?", "(aa|b)(1|bb)", "ab1")


@pytest.fixture(scope="module")
def nursery() -> tuple[Any, Any, Grammars]:
    model, tokenizer = load_nursery("llama-7m")
    return model, tokenizer, Grammars(tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Grammars]:
    """A tokenizer of bytes with a few merges, and an end token beside eos; the model has rows to spare."""
    names = ["<end>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "aa", "b1", "ab1"]
    core = Tokenizer(
        models.BPE({name: n for n, name in enumerate(names)}, [("a", "b"), ("a", "a"), ("b", "1"), ("ab", "1")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>", "<turn>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    return tokenizer, Grammars(tokenizer, len(names) + 9, [0, 1])


def allowed(processor: GrammarProcessor, ids: list[int]) -> set[int]:
    scores = processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, processor.grammar.vocabulary_size))[0]
    return set(scores.isfinite().nonzero()[:, 0].tolist())


def answer(processor: GrammarProcessor, prompt: list[int], seed: int, room: int = 200) -> list[int]:
    """Tokens under random scores, the last of them an end."""
    draws, ids = torch.Generator().manual_seed(seed), list(prompt)
    choice = Choice([processor], True, draws)
    for _ in range(room):
        scores = 4 * torch.randn(processor.grammar.vocabulary_size, generator=draws)
        ids.append(choice.pick(ids, scores))
        if ids[-1] in processor.grammar.ends:
            return ids[len(prompt) :]
    raise AssertionError("no end")


def naive(pattern: str, text: str) -> bool:
    """Whether some match of the pattern begins with text, by trying every short way to go on."""
    rests = itertools.chain.from_iterable(itertools.product(LETTERS, repeat=n) for n in range(5))
    return any(re.fullmatch(pattern, text + "".join(rest)) for rest in rests)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_masks_are_those_of_trying_each_token(pattern: str, seed: int, tiny: tuple[Any, Grammars]) -> None:
    tokenizer, grammars = tiny
    processor, draws = GrammarProcessor(grammars.regex(pattern), 2), torch.Generator().manual_seed(seed)
    prompt, tokens = [7, 9], list[int]()
    words = {n: tokenizer.decode([n]) for n in range(2, len(tokenizer))}
    words = {n: word for n, word in words.items() if set(word) <= set(LETTERS)}
    for _ in range(6):
        text = tokenizer.decode(tokens)
        wanted = {n for n, word in words.items() if naive(pattern, text + word)}
        whole = re.fullmatch(pattern, text) is not None
        found = allowed(processor, prompt + tokens) & {0, 1, *words}
        assert processor.finished(prompt + tokens) == whole
        assert found & {0, 1} == ({0, 1} if whole else set())
        assert found - {0, 1} <= wanted
        firsts = {words[n][0] for n in wanted}
        if (
            len(firsts) > 1 or whole or "[^" in pattern
        ):  # else the text is forced, and other spellings of it are left out
            assert found - {0, 1} == wanted
        assert found
        going_on = sorted(found - {0, 1})
        if not going_on:
            break
        tokens.append(going_on[int(torch.randint(len(going_on), (), generator=draws))])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_scores_give_whole_answers(seed: int, nursery: tuple[Any, Any, Grammars]) -> None:
    _, tokenizer, grammars = nursery
    prompt = tokenizer("A person:")["input_ids"]
    tokens = answer(GrammarProcessor(grammars.regex(DATE), len(prompt)), prompt, seed)
    assert re.fullmatch(DATE, tokenizer.decode(tokens, skip_special_tokens=True))
    processor = GrammarProcessor(grammars.json_schema(PERSON), len(prompt))
    tokens = answer(processor, prompt, seed)
    assert processor.finished([*prompt, *tokens])
    assert processor.finished(torch.tensor([[*prompt, *tokens[:-1]]]))
    assert not processor.finished([*prompt, *tokens[:-2]])
    person = json.loads(tokenizer.decode(tokens, skip_special_tokens=True))
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 150
    assert {*person["tags"]} <= {"a", "bc", None}


def test_a_model_samples_and_searches_within_the_grammar(nursery: tuple[Any, Any, Grammars]) -> None:
    model, tokenizer, grammars = nursery
    inputs = tokenizer(["The year was", "In"], return_tensors="pt", padding=True, padding_side="left")
    year = {"type": "string", "pattern": f"^{DATE}$"}
    schema = {"type": "object", "properties": {"year": year}, "required": ["year"], "additionalProperties": False}
    grammar = grammars.json_schema(schema)
    start = inputs["input_ids"].shape[1]
    for options in ({"do_sample": True, "top_p": 0.9, "top_k": 5}, {"num_beams": 3}, {"do_sample": False}):
        processor = GrammarProcessor(grammar, start)
        torch.manual_seed(3)
        out = model.generate(**inputs, max_new_tokens=40, logits_processor=[processor], pad_token_id=1, **options)
        assert len(out) == 2
        for row in out:
            value = json.loads(tokenizer.decode(row[start:], skip_special_tokens=True))
            assert re.search(DATE, value["year"])
        assert processor.problem == ""


def test_rolled_back_tokens_leave_no_trace(nursery: tuple[Any, Any, Grammars]) -> None:
    _, tokenizer, grammars = nursery
    grammar, prompt = grammars.json_schema(PERSON), tokenizer("Who?")["input_ids"]
    first, second = (answer(GrammarProcessor(grammar, len(prompt)), prompt, seed) for seed in (1, 2))
    moving = GrammarProcessor(grammar, len(prompt))
    for length in (3, len(first), 1, len(first) - 1, 0):
        for tokens in (first[:length], second[:length], [*first, 0, 0]):
            fresh = GrammarProcessor(grammar, len(prompt))
            assert allowed(moving, prompt + tokens) == allowed(fresh, prompt + tokens)


def test_rows_of_a_batch_keep_apart(tiny: tuple[Any, Grammars]) -> None:
    tokenizer, grammars = tiny
    grammar = grammars.regex("(a|b)1*")
    a, b, one = (tokenizer.convert_tokens_to_ids(word) for word in "ab1")
    processor = GrammarProcessor(grammar, 1)
    scores = torch.randn(2, grammar.vocabulary_size, dtype=torch.float64)
    both = processor(torch.tensor([[5, a, 0], [5, b, one]]), scores)
    for row, ids in enumerate(([[5, a, 0]], [[5, b, one]])):
        alone = GrammarProcessor(grammar, 1)(torch.tensor(ids), scores[row : row + 1])
        assert torch.equal(both[row], alone[0])
    assert both.dtype == torch.float64
    assert both[1, one] == scores[1, one]
    assert set(both[0].isfinite().nonzero()[:, 0].tolist()) == {0, 1}


def test_blanks_in_json_have_a_bound(tiny: tuple[Any, Grammars]) -> None:
    tokenizer, grammars = tiny
    processor = GrammarProcessor(grammars.json_object(), 0)
    for text in ('{"a": [1, 2], "b": {}}', '{\n  "a": [\n    true\n  ]\n}', '{"a":1}'):
        assert processor.finished(tokenizer(text)["input_ids"]), text
    for text in ("{  ", "{\n\n", "{\n" + 17 * " ", '{"a":  '):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] not in allowed(processor, ids[:-1]), text


@pytest.mark.parametrize("shape", ["time", "date-time"])
def test_fractions_of_a_second_have_a_bound(shape: str, tiny: tuple[Any, Grammars]) -> None:
    tokenizer, grammars = tiny
    when = {"type": "string", "format": shape}
    schema = {"type": "object", "properties": {"format": when, "at": {"anyOf": [when]}}, "required": ["at"]}
    processor, day = GrammarProcessor(grammars.json_schema(schema), 0), "2024-02-29T" if shape == "date-time" else ""
    digits = {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    for text, more in (("." + "1" * 8, True), ("." + "1" * 9, False)):
        begun = tokenizer(f'{{"at":"{day}10:20:30{text}', add_special_tokens=False)["input_ids"]
        assert bool(digits & allowed(processor, begun)) == more
        assert tokenizer.convert_tokens_to_ids("Z") in allowed(processor, begun)
    for end in ("Z", ".5Z", ".123456789+01:00"):
        whole = tokenizer(f'{{"at":"{day}10:20:30{end}"}}', add_special_tokens=False)["input_ids"]
        assert processor.finished(whole)
    # a pattern of its own stays, and so do values, which are no schemas
    named = f"{day}10:20:30.{'2' * 10}Z"
    own = {"anyOf": [{**when, "pattern": "1Z$"}, {**when, "enum": [named]}, {"const": {"format": shape}}]}
    processor = GrammarProcessor(grammars.json_schema(own), 0)
    for text in (f'"{day}10:20:30.{"1" * 12}Z"', f'"{named}"', f'{{"format":"{shape}"}}'):
        assert processor.finished(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_schema_cannot_change_the_rules(tiny: tuple[Any, Grammars]) -> None:
    _, grammars = tiny
    with pytest.raises(InputError, match="uniqueItems"):
        grammars.json_schema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True})


UNMET: list[Any] = [
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "string", "pattern": "^a$", "minLength": 3},
    {"enum": []},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": False, "minItems": 2},
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"$defs": {"n": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/m"}]}, "minItems": 1},
               "m": {"allOf": [{"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"},
]  # fmt: skip
UNREAD: list[Any] = [
    {"type": "foo"},
    {"not": {}},
    {"$ref": "#/nowhere"},
    {"type": "string", "pattern": "("},
    {"type": "string", "format": "no such"},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "object", "required": 3},
    {"const": float("nan")},
    {"const": {1, 2}},
    [1],
    "{}",
    None,
]


@pytest.mark.parametrize("schema", [*UNMET, *UNREAD], ids=str)
def test_schemas_that_cannot_be_met_or_read_are_refused(schema: Any, tiny: tuple[Any, Grammars]) -> None:
    with pytest.raises(InputError) as caught:
        tiny[1].json_schema(schema)
    assert str(caught.value).startswith("JSON schema: must")
    assert "\n" not in str(caught.value)


def test_a_schema_nested_beyond_reason_is_refused(tiny: tuple[Any, Grammars]) -> None:
    for depth in (400, 20_000):
        schema: dict[str, Any] = {"type": "null"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        with pytest.raises(InputError, match="nested"):
            tiny[1].json_schema(schema)


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"next": {"$ref": "#"}}},
    {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["next"]},
    {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}}}, "$ref": "#/$defs/a~1b"},
])  # fmt: skip
def test_recursion_that_can_end_is_taken(schema: dict[str, Any], tiny: tuple[Any, Grammars]) -> None:
    assert allowed(GrammarProcessor(tiny[1].json_schema(schema), 0), [])


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", r"[^\s\S]", "a{2,1}", None, 3])
def test_patterns_that_cannot_be_read_or_met_are_refused(pattern: Any, tiny: tuple[Any, Grammars]) -> None:
    with pytest.raises(InputError, match="regex: must"):
        tiny[1].regex(pattern)


def test_a_forced_token_that_does_not_fit_leaves_the_ends(tiny: tuple[Any, Grammars]) -> None:
    tokenizer, grammars = tiny
    processor = GrammarProcessor(grammars.regex("ab*"), 1)
    wrong = [3, tokenizer.convert_tokens_to_ids("1")]
    with pytest.warns(UserWarning, match="cannot go on"):
        assert allowed(processor, wrong) == {0, 1}
    assert processor.problem
    assert not processor.finished([*wrong, 0])
    assert allowed(processor, [3]) > {tokenizer.convert_tokens_to_ids("a")}
    assert processor.problem == ""


def test_vocabularies_of_other_sizes(nursery: tuple[Any, Any, Grammars]) -> None:
    _, tokenizer, _ = nursery
    ids = tokenizer('{"age": 7}')["input_ids"]
    size = len(tokenizer)
    wide = GrammarProcessor(Grammars(tokenizer, size + 70, [0]).json_object(), 0)
    assert max(allowed(wide, ids[:-1])) < size
    plain = GrammarProcessor(Grammars(tokenizer, size, [0]).json_object(), 0)
    assert allowed(wide, ids[:-1]) == allowed(plain, ids[:-1])
    # a model with fewer rows than the tokenizer has tokens
    narrow = GrammarProcessor(Grammars(tokenizer, size - 1001, [0]).json_object(), 0)
    assert allowed(narrow, ids[:-1]) == {n for n in allowed(plain, ids[:-1]) if n < size - 1001}


def test_a_trimmed_vocabulary_spells_what_it_lost(nursery: tuple[Any, Any, Grammars]) -> None:
    bench = Bench("llama")
    trimmed = trim_vocabulary(bench.model(), bench.tokenizer(), ["The red dog"])
    ends = [trimmed.tokenizer.eos_token_id]
    grammars = Grammars(trimmed.tokenizer, trimmed.model.config.vocab_size, ends)
    processor = GrammarProcessor(grammars.json_schema({"const": {"Zürich": "§ 7"}}), 1)
    tokens = answer(processor, [4], seed=0)
    assert json.loads(trimmed.tokenizer.decode(tokens, skip_special_tokens=True)) == {"Zürich": "§ 7"}


def test_a_vocabulary_is_read_once(nursery: tuple[Any, Any, Grammars], monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance.hf

    _, tokenizer, grammars = nursery
    monkeypatch.setattr(llguidance.hf, "from_tokenizer", None)
    again = Grammars(tokenizer, grammars.vocabulary_size, [tokenizer.eos_token_id])
    assert again.regex("a").vocabulary_size == grammars.vocabulary_size


def test_what_is_no_tokenizer_for_this_is_refused(nursery: tuple[Any, Any, Grammars]) -> None:
    _, tokenizer, _ = nursery
    with pytest.raises(InputError, match="end tokens"):
        Grammars(tokenizer, 8192, [])
    with pytest.raises(InputError, match="end tokens"):
        Grammars(tokenizer, 8192, [8192])
    core = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    with pytest.raises(InputError, match="tokenizer: must"):
        Grammars(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>"), 2, [0])
