"""The official client over every endpoint and option, whole and streamed."""

from __future__ import annotations

import base64
import json
import struct
import sys
import types
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.parts.data_tokens import encode_prompt
from gossamer.parts.decode_runner import Runner
from gossamer.serving.app import build_app
from gossamer.serving.engine import Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import background
from gossamer.serving.vectors import EncoderVectors, ModelVectors
from gossamer.testing.bench import Bench

HELLO = [{"role": "user", "content": "The quick brown fox"}]
PROMPT = "The old grey dog"


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **options})


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 12, **options})


def greedy(bundle: Bundle, ids: list[int], count: int) -> list[int]:
    return Runner(bundle.model).generate(ids, max_new_tokens=count, eos=bundle.processor.eos_token_id)


def test_a_greedy_chat_is_the_runners_text(client: openai.OpenAI, bundle: Bundle) -> None:
    ids = encode_prompt(HELLO, bundle.processor)
    tokens = greedy(bundle, ids, 12)
    answer = chat(client, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == bundle.processor.decode(tokens, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == ("stop" if len(tokens) < 12 else "length")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.total_tokens == len(ids) + len(tokens)
    parts = [{"type": "text", "text": "The quick "}, {"type": "text", "text": "brown fox"}]
    again = chat(client, temperature=0, messages=[{"role": "user", "content": parts}], max_completion_tokens=12,
                 max_tokens=openai.omit)  # fmt: skip
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_a_streamed_chat_is_the_whole_one_in_parts(client: openai.OpenAI) -> None:
    options = {"temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in told if choice.finish_reason] == [whole.choices[0].finish_reason]
    tokens = [token for choice in told if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in tokens] == [token.token for token in whole.choices[0].logprobs.content]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(chat(client, stream=True, temperature=0))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    first = chat(client, n=3, seed=5, temperature=1.5)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in chat(client, n=3, seed=5, temperature=1.5).choices] == texts
    assert chat(client, seed=5, temperature=1.5).choices[0].message.content == texts[0]
    assert chat(client, seed=6, temperature=1.5).choices[0].message.content != texts[0]
    assert (
        chat(client, temperature=1.5).choices[0].message.content
        != chat(client, temperature=1.5).choices[0].message.content
    )
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=5, temperature=1.5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("options", [{"top_p": 0}, {"extra_body": {"top_k": 1}}, {"temperature": 1e-9}])
def test_the_coldest_sampling_is_greedy(client: openai.OpenAI, options: dict[str, Any]) -> None:
    assert chat(client, **options).choices[0].message.content == chat(client, temperature=0).choices[0].message.content


def test_stops_cross_tokens_and_are_not_shown(client: openai.OpenAI) -> None:
    whole = complete(client, temperature=0, max_tokens=40).choices[0].text
    letters = [
        n for n in range(4, len(whole) - 3) if "\ufffd" not in whole[n : n + 3] and whole.find(whole[n : n + 3]) == n
    ]
    stop = whole[letters[0] : letters[0] + 3]
    for given in (stop, ["never said", stop]):
        cut = complete(client, temperature=0, max_tokens=40, stop=given)
        assert cut.choices[0].text == whole[: letters[0]]
        assert cut.choices[0].finish_reason == "stop"
        streamed = list(complete(client, temperature=0, max_tokens=40, stop=given, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: letters[0]]
    assert complete(client, temperature=0, max_tokens=40, stop=[]).choices[0].text == whole


def test_logprobs_are_the_models(client: openai.OpenAI, bundle: Bundle) -> None:
    ids = encode_prompt(HELLO, bundle.processor)
    tokens = greedy(bundle, ids, 5)
    with torch.no_grad():
        table = bundle.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    found = chat(client, temperature=0, max_tokens=5, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    assert len(found) == len(tokens)
    for row, token, told in zip(table, tokens, found, strict=True):
        assert told.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [other.logprob for other in told.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
        assert told.token == bundle.processor.decode([token])
    # of a sampled and penalised answer too they are those before all that
    warm = chat(client, seed=1, max_tokens=1, logprobs=True, top_logprobs=1, logit_bias={"70": 100}).choices[0]
    assert warm.logprobs.content[0].logprob == pytest.approx(float(table[0][70]), abs=1e-3)
    classic = complete(client, temperature=0, logprobs=2).choices[0]
    assert "".join(classic.logprobs.tokens).startswith(classic.text[0])
    assert len(classic.logprobs.token_logprobs) == len(classic.logprobs.text_offset) == len(classic.logprobs.tokens)
    assert all(1 <= len(best) <= 2 for best in classic.logprobs.top_logprobs)
    assert chat(client, temperature=0).choices[0].logprobs is None


def test_bias_and_penalties(client: openai.OpenAI, bundle: Bundle) -> None:
    word = bundle.processor.decode([70])
    assert chat(client, logit_bias={"70": 100}, max_tokens=3).choices[0].message.content == 3 * word
    plain = complete(client, temperature=0, logprobs=0, prompt="One two one two one").choices[0]
    first = greedy(bundle, bundle.processor("One two one two one")["input_ids"], 1)[0]
    banned = complete(client, temperature=0, prompt="One two one two one", logit_bias={str(first): -100}).choices[0]
    assert banned.text != plain.text
    forced = {str(token): 60 for token in (70, 71)}
    always = chat(client, temperature=0, logit_bias=forced, max_tokens=8).choices[0].message.content
    varied = (
        chat(client, temperature=0, logit_bias=forced, frequency_penalty=2, max_tokens=40).choices[0].message.content
    )
    assert len({*always}) <= len({*varied})
    once = (
        chat(client, temperature=0, logit_bias={"70": 60}, presence_penalty=2, max_tokens=4).choices[0].message.content
    )
    assert once == 4 * word  # 2 against 60


def test_completions_take_texts_and_tokens(client: openai.OpenAI, bundle: Bundle) -> None:
    ids = bundle.processor(PROMPT)["input_ids"]
    text = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=0, prompt=ids).choices[0].text == text
    several = complete(client, temperature=0, prompt=[PROMPT, "Two"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [text, text]
    assert several.choices[2].text == several.choices[3].text
    assert several.usage.prompt_tokens == len(ids) + len(bundle.processor("Two")["input_ids"])
    assert complete(client, temperature=0, prompt=[ids, ids]).choices[1].text == text
    assert complete(client, temperature=0, echo=True).choices[0].text == PROMPT + text
    streamed = list(complete(client, temperature=0, echo=True, stream=True, best_of=1))
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + text
    assert len(complete(client, max_tokens=openai.omit, logit_bias={"70": 100}).choices[0].text) == 16 * len(
        bundle.processor.decode([70])
    )


def test_embeddings(client: openai.OpenAI, bundle: Bundle) -> None:
    texts = [PROMPT, "One two " * 70]
    found = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, row in zip(texts, found.data, strict=True):
        ids = torch.tensor([bundle.processor(text)["input_ids"]])
        with torch.no_grad():
            state = bundle.model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert torch.allclose(torch.tensor(row.embedding), torch.nn.functional.normalize(state, dim=0), atol=1e-4)
    raw = client.embeddings.with_raw_response.create(model="tiny", input=PROMPT, encoding_format="base64")
    data = base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(found.data[0].embedding, abs=1e-5)
    default = client.embeddings.create(model="tiny", input=bundle.processor(PROMPT)["input_ids"])
    assert default.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-5)
    assert default.usage.prompt_tokens == len(bundle.processor(PROMPT)["input_ids"])
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input=PROMPT, dimensions=8)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="at most 256"):
        client.embeddings.create(model="tiny", input=PROMPT * 200)


def test_an_encoder_embeds_beside_the_model(engine: Engine, client_of: Callable[..., openai.OpenAI]) -> None:
    bench = Bench("bert")
    encoder, tokenizer = bench.model(), bench.tokenizer()
    app = build_app(engine, Settings(), vectors=EncoderVectors(encoder, tokenizer, "minilm", 0))
    with background(app) as address:
        client = client_of(address)
        found = client.embeddings.create(model="minilm", input=["The dog", "the red roof over there"])
        assert [model.id for model in client.models.list()] == ["tiny", "minilm"]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="tiny", input="x")
    with torch.no_grad():
        state = encoder(torch.tensor([tokenizer("The dog")["input_ids"]])).last_hidden_state[0].mean(0)
    assert found.data[0].embedding == pytest.approx(torch.nn.functional.normalize(state, dim=0).tolist(), abs=1e-5)


def test_last_token_embeddings(engine: Engine, client_of: Callable[..., openai.OpenAI]) -> None:
    with background(build_app(engine, Settings(), vectors=ModelVectors(engine, "last"))) as address:
        found = client_of(address).embeddings.create(model="tiny", input=PROMPT).data[0].embedding
    ids = torch.tensor([engine.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        state = engine.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert found == pytest.approx(torch.nn.functional.normalize(state, dim=0).tolist(), abs=1e-4)


def test_models_health_and_metrics(client: openai.OpenAI, address: str, until: Any) -> None:
    (card,) = client.models.list()
    assert card.id == client.models.retrieve("tiny").id == "tiny"
    assert card.gossamer["max_length"] == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    health = json.load(urllib.request.urlopen(f"{address}/health"))
    assert health == {"status": "ok", "model": "tiny"}
    chat(client, max_tokens=2)

    def metrics() -> str:
        return str(urllib.request.urlopen(f"{address}/metrics").read().decode())

    # an answer is told before its slot is free
    assert until(lambda: 'gossamer_running{model="tiny"} 0' in metrics())
    text = metrics()
    assert 'gossamer_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert text.count("# TYPE gossamer_first_piece_seconds histogram") == 1


class Letters:
    """A grammar of this test: only these tokens."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens = tokens


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> list[Any]:
    """Stands for the token constraints; what was asked of it."""
    asked: list[Any] = []
    digits = {bundle.processor.convert_tokens_to_ids(letter) for letter in "0123456789"}

    class Grammars:
        def __init__(self, tokenizer: Any, vocabulary_size: int, ends: Any) -> None:
            assert vocabulary_size == 320

        def json_schema(self, schema: Any) -> Letters:
            if schema.get("type") == "nothing":
                raise InputError("JSON schema", must="allow a value", got="nothing")
            asked.append(schema)
            return Letters(digits)

        def json_object(self) -> Letters:
            return self.json_schema({"type": "object"})

        def regex(self, pattern: str) -> Letters:
            asked.append(pattern)
            return Letters(digits)

    class GrammarProcessor:
        problem = ""

        def __init__(self, grammar: Letters, start: int) -> None:
            self.grammar, self.start = grammar, start

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            out = torch.full_like(scores, -torch.inf)
            kept = sorted(self.grammar.tokens) if ids.shape[1] - self.start < 4 else [2]
            out[:, kept] = scores[:, kept]
            return out

        def finished(self, ids: Any) -> bool:
            return True

    module = types.ModuleType("gossamer.parts.token_constraints")
    module.__dict__.update(Grammars=Grammars, GrammarProcessor=GrammarProcessor)
    monkeypatch.setitem(sys.modules, "gossamer.parts.token_constraints", module)
    return asked


def test_formats_reach_the_token_constraints(
    opened: Any, bundle: Bundle, grammars: list[Any], client_of: Callable[..., openai.OpenAI]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with opened(bundle) as engine, background(build_app(engine, Settings())) as address:
        client = client_of(address)
        for form in (named, {"type": "json_object"}, {"type": "regex", "pattern": "[0-9]+"}):
            answer = chat(client, extra_body={"response_format": form}).choices[0]
            assert len(answer.message.content) == 4
            assert answer.message.content.isdigit()
            assert answer.finish_reason == "stop"
        assert complete(client, extra_body={"guided_regex": "[0-9]*"}).choices[0].text.isdigit()
        assert grammars == [schema, {"type": "object"}, "[0-9]+", "[0-9]*"]
        chat(client, response_format=named)
        assert len(grammars) == 4  # made once
        assert not chat(client, response_format={"type": "text"}, seed=1).choices[0].message.content.isdigit()
        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        with pytest.raises(openai.BadRequestError, match="allow a value") as caught:
            chat(client, response_format=wrong)
        assert caught.value.param == "response_format"
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, response_format=named, extra_body={"guided_regex": "a"})
        assert caught.value.param == "guided_regex"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"verbosity": "low"}, "verbosity"),
        ({"colour": "red"}, "colour"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100000}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"gossamer": {"stages": {"clover": False}}}, "gossamer.stages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(address: str, body: dict[str, Any], param: str) -> None:
    whole = {"model": "tiny", "messages": HELLO, "max_tokens": 3, **body}
    sent = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(whole).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(sent)
    error = json.load(caught.value)["error"]
    assert caught.value.code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    idle = {"tools": None, "store": False, "modalities": ["text"], "service_tier": "auto", "tool_choice": "none",
            "metadata": None, "user": "me", "parallel_tool_calls": True}  # fmt: skip
    answer = chat(client, extra_body=idle, stop=None)
    back = {key: value for key, value in answer.choices[0].message.model_dump().items() if key != "audio"}
    assert chat(client, messages=[*HELLO, back, *HELLO]).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": [[1, 2], []]}, "prompt[1]"),
        ({"prompt": [1, 999]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_completions_refuse_too(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, extra_body=body)
    assert caught.value.param == param
