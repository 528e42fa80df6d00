"""The serve benchmark's parts, small, against a server of this process over a tiny model."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import jsonschema_rs
import pytest
import torch

from gossamer.benchmarks import _serve_load, _serve_mix, serve
from gossamer.benchmarks._serve_client import Reply, Request, Server, post, send
from gossamer.benchmarks._serve_mix import CHAT, KINDS, TEXT, mix
from gossamer.benchmarks._serve_schemas import PROMPTS, SCHEMAS
from gossamer.core.bundle import Bundle
from gossamer.hub.nursery import load_nursery
from gossamer.parts.requests import Choice
from gossamer.parts.token_constraints import GrammarProcessor, Grammars
from gossamer.serving.app import build_app
from gossamer.serving.engine import Capacity, Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import background
from gossamer.testing.bench import Bench


def reached(address: str, model: str = "tiny") -> Server:
    return Server(int(address.rsplit(":", 1)[1]), os.getpid(), model)


@pytest.fixture(scope="module")
def server(address: str) -> Server:
    return reached(address)


@pytest.fixture
def loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_loaded", lambda model: (bundle.model, bundle.processor))


def story(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "The rain", "max_tokens": 9, "temperature": 0, **more}


def test_the_client_reads_whole_and_streamed_answers_alike(server: Server) -> None:
    whole, streamed = send(server, post(TEXT, story())), send(server, post(TEXT, story(stream=True)))
    assert whole.status == streamed.status == 200
    assert whole.text == streamed.text != ""
    assert whole.finish == streamed.finish in ("stop", "length")
    assert whole.usage["completion_tokens"] == 9
    assert 0 < (streamed.first or 0) < streamed.seconds


def test_the_client_tells_refusals_from_answers_that_break_off(server: Server) -> None:
    refused = send(server, post(CHAT, {"model": "tiny", "messages": []}))
    assert (refused.status, refused.code, refused.text) == (400, "invalid_value", "")
    nobody = send(Server(1, 0, "none"), post(TEXT, story()))
    assert nobody.status == 0
    assert nobody.error


@pytest.mark.parametrize("request_", [
    post(TEXT, story(max_tokens=60, stream=True), hang_up=2), post(TEXT, story(max_tokens=60), hang_up=0),
    post(TEXT, story(), cut=True),
], ids=["in the stream", "at once", "in the body"])  # fmt: skip
def test_a_client_can_hang_up(server: Server, request_: Request) -> None:
    assert send(server, request_).status == 0
    assert server.idle_after(5) is not None


def test_the_mix_holds_every_kind_and_is_repeated_by_its_seed() -> None:
    jobs = mix(300, "tiny", seed=3)
    assert {name for name, _ in jobs} == set(KINDS)
    assert [name for name, _ in jobs] == [name for name, _ in mix(300, "tiny", seed=3)]
    assert jobs != mix(300, "tiny", seed=4)


def test_load_is_answered_rightly_and_leaves_nothing_behind(server: Server) -> None:
    found = _serve_load.load(server, len(KINDS) + 20, examples=0, clients=4)
    assert found["examples_of_wrong"] == []
    assert found["stuck"] == 0
    assert found["count"] == len(KINDS) + 20
    assert sum(sum(row.values()) for row in found["statuses"].values()) == found["count"]


def test_a_wrong_answer_of_the_load_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serve_load, "KINDS", {"health": _serve_mix.Kind(1, KINDS["health"].make, frozenset({404}))})
    monkeypatch.setattr(
        _serve_load, "mix", lambda count, model: [("health", KINDS["health"].make(random.Random(), model))]
    )
    found = _serve_load.load(server, 1, examples=0)
    assert found["examples_of_wrong"] == ["health: 200 "]


def test_eight_at_once_and_one_are_timed_in_turn(server: Server) -> None:
    found = serve.batch(server, rounds=1, tokens=6)
    assert {size: len(speeds) for size, speeds in found["tokens_per_s"].items()} == {1: 1, 8: 1}
    assert found["ratio"] > 0


def test_the_first_token_is_timed_with_and_without_http(server: Server, loaded: None) -> None:
    found = serve.first_token(server, "tiny", bursts=2)
    assert {arm: [len(burst) for burst in bursts] for arm, bursts in found["seconds"].items()} == {
        "server": [8, 8],
        "engine": [8, 8],
    }
    assert found["added_ms"]["median"] <= found["added_ms"]["p99"]


def test_answers_under_schemas_are_checked_by_another_validator(server: Server, loaded: None) -> None:
    found = serve.schemas(server, "tiny", count=3, answers=1)
    assert found["invalid"] == []
    assert found["valid_share"] == 1
    assert found["added_ms"]["median"] > 0
    bad = Reply(200, '{"name": "a"}', finish="stop")
    assert not serve._valid(SCHEMAS[0], bad)
    assert not serve._valid(SCHEMAS[0], Reply(200, '{"name": "a", "size": 3', finish="length"))
    assert serve._valid(SCHEMAS[0], Reply(200, '{"name": "a", "size": 3}', finish="stop"))


def test_a_crowd_is_answered_or_refused_in_time(bundle: Bundle) -> None:
    engine = Engine(bundle, "tiny", capacity=Capacity(slots=2, queue=1), native="never")
    try:
        with background(build_app(engine, Settings(seconds=5))) as address:
            found = _serve_load.crowd(reached(address), clients=6, seconds=1.5, limit=5)
    finally:
        engine.stop(at_once=True)
    assert found["examples_of_lost"] == []
    assert found["answered"] > 0
    assert found["refused"] > 0
    assert found["stuck"] == 0
    assert found["freed_s"] < 10


@pytest.mark.parametrize(("reply", "outcome"), [
    (Reply(200, "a", 1.0, finish="length"), "answered"), (Reply(429, seconds=1.0), "refused"),
    (Reply(504, seconds=5.5), "timed out"), (Reply(0, error="late", code="timeout", seconds=5.5), "timed out"),
    (Reply(200, "a", 9.0, finish="length"), "lost"), (Reply(0, error="reset", seconds=1.0), "lost"),
    (Reply(500, error="failed", seconds=1.0), "lost"), (Reply(200, "a", 1.0), "lost"),
])  # fmt: skip
def test_what_counts_as_answered_refused_and_lost(reply: Reply, outcome: str) -> None:
    assert _serve_load._outcome(reply, limit=5) == outcome


def test_the_schemas_are_fifty_and_every_answer_ends() -> None:
    assert len({json.dumps(schema, sort_keys=True) for schema in SCHEMAS}) == len(SCHEMAS) == 50
    assert len(set(PROMPTS)) == 20
    tokenizer = load_nursery("llama-7m")[1]
    grammars, draws = Grammars(tokenizer, len(tokenizer), [0]), torch.Generator().manual_seed(0)
    for schema in SCHEMAS:
        choice, ids = Choice([GrammarProcessor(grammars.json_schema(schema), 0)], True, draws), list[int]()
        while not ids or (ids[-1] and len(ids) < 600):
            ids.append(choice.pick(ids, 3 * torch.randn(len(tokenizer), generator=draws)))
        value = json.loads(tokenizer.decode(ids, skip_special_tokens=True))
        assert jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value), (schema, value)


def test_targets_follow_the_figures() -> None:
    found: dict[str, dict[str, Any]] = {
        "batch": {"ratio": 3.2},
        "first token": {"added_ms": {"median": 4.0, "p99": 20.0}},
        "load": {"count": 12_000, "wrong": 0, "failed_checks": 0, "stuck": 0, "growth": 0.01},
        "schemas": {"valid_share": 1.0, "added_ms": {"mean": 0.4}},
        "crowd": {"lost": 0, "stuck": 0, "freed_s": 0.2},
    }
    assert all(line["met"] for line in serve.targets(found))
    found["schemas"]["valid_share"], found["load"]["wrong"], found["crowd"]["freed_s"] = 0.998, 1, 1.0
    assert [line["met"] for line in serve.targets(found)].count(False) == 3


def test_a_server_is_started_as_a_process_and_ends_well(tmp_path: Any) -> None:
    bench = Bench("llama")
    bench.model().save_pretrained(tmp_path / "tiny")
    bench.tokenizer().save_pretrained(tmp_path / "tiny")
    with serve.served(str(tmp_path / "tiny"), ["--slots", "2"], threads=1) as server:
        assert server.model == "tiny"
        assert server.resident() > 50e6
        assert send(server, post(TEXT, story())).status == 200
        assert server.metrics()["gossamer_requests_total"] >= 2
