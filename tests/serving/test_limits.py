"""What the server refuses, how long it waits, and what a client that hangs up leaves."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from gossamer.core.errors import InputError
from gossamer.serving.app import build_app
from gossamer.serving.engine import Capacity, Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import background, check_address, listen, make_server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LONG = 200  # tokens that fit the tiny model


def post(address: str, body: Any, headers: dict[str, str] = JSON, path: str = PATH) -> tuple[int, Any, Any]:
    """Status, body as JSON and headers of a request; ``body`` an iterator is sent without a length."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=20)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request("POST", path, data, headers, encode_chunked=not isinstance(data, bytes))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), answer.headers


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": "tiny\xff"}', "invalid_request"),
        (b"{", "invalid_json"),
        (b"", "missing_parameter"),
        (b"null", "invalid_value"),
        (b"[]", "invalid_value"),
        (b"[" * 100_000, "invalid_request"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "invalid_value"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
            "invalid",
        ),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1}', "invalid_value"),
    ],
)
def test_broken_bodies_are_a_400(address: str, body: bytes, code: str) -> None:
    status, answer, _ = post(address, body)
    assert status == 400
    assert answer["error"]["code"].startswith(code)
    assert post(address, {**CHAT, "max_tokens": 1})[0] == 200


def test_other_paths_methods_and_types(address: str) -> None:
    status, answer, _ = post(address, CHAT, path="/v1/nothing")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    status, answer, headers = post(address, CHAT, path="/v1/models")
    assert (status, answer["error"]["code"], headers["Allow"]) == (405, "method_not_allowed", "GET")
    # a page of another site can send plain text without asking
    assert post(address, json.dumps(CHAT).encode(), {"Content-Type": "text/plain"})[0] == 400


def test_a_large_body_is_refused_whole_and_in_parts(engine: Engine, client_of: Callable[..., openai.OpenAI]) -> None:
    with background(build_app(engine, Settings(body_bytes=100_000))) as address:
        text = "word " * 2_000_000
        with pytest.raises(openai.APIStatusError) as caught:
            client_of(address).chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])
        assert caught.value.status_code == 413
        parts = (b"x" * 10_000 for _ in range(30))
        status, answer, _ = post(address, parts)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert post(address, {**CHAT, "max_tokens": 1})[0] == 200


def test_a_long_prompt_is_a_400(engine: Engine) -> None:
    with background(build_app(engine, Settings(prompt_tokens=10))) as address:
        status, answer, _ = post(address, {"model": "tiny", "prompt": [5] * 11}, path="/v1/completions")
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert post(address, {"model": "tiny", "prompt": [5] * 10}, path="/v1/completions")[0] == 200


def test_a_token_is_asked_for(engine: Engine, client_of: Callable[..., openai.OpenAI]) -> None:
    with background(build_app(engine, Settings(token="a long secret"))) as address:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic a long secret"}):
            status, answer, sent = post(address, CHAT, {**JSON, **headers})
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert sent["WWW-Authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "wrong").models.list()
        assert client_of(address, "a long secret").models.list().data[0].id == "tiny"
        assert post(address, CHAT, {**JSON, "Authorization": "bearer a long secret"})[0] == 200


def test_a_foreign_host_is_refused_without_a_token(engine: Engine, address: str) -> None:
    assert post(address, CHAT, {**JSON, "Host": "evil.example:80"})[0] == 403
    assert post(address, CHAT, {**JSON, "Host": "[::1]:80"})[0] == 200
    with background(build_app(engine, Settings(token="a long secret"))) as other:
        assert post(other, CHAT, {**JSON, "Host": "my.example", "Authorization": "Bearer a long secret"})[0] == 200


def test_addresses_that_others_reach_need_a_token() -> None:
    assert check_address("127.0.0.1", None)
    assert check_address("localhost", None)
    assert not check_address("0.0.0.0", "a-long-secret")
    for host, token in (("0.0.0.0", None), ("::", None), ("127.0.0.1", "short"), ("no.such.host.invalid", None)):
        with pytest.raises(InputError):
            check_address(host, token)


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as bound, pytest.raises(InputError, match="--port"):
        listen("127.0.0.1", bound.getsockname()[1])


@pytest.fixture
def crowded(slow: Any) -> Iterator[tuple[Engine, str]]:
    """A server with one slot and one place in its queue, each step 20 ms."""
    engine = slow(0.02, capacity=Capacity(slots=1, queue=1))
    with background(build_app(engine, Settings(requests=3))) as address:
        yield engine, address


def ask(address: str, found: list[Any], **options: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(post(address, {**CHAT, **options})))
    thread.start()
    return thread


def test_a_full_server_says_when_to_come_again(crowded: tuple[Engine, str], until: Any) -> None:
    engine, address = crowded
    found: list[Any] = []
    threads = [ask(address, found, max_tokens=40) for _ in range(2)]
    assert until(lambda: sum(engine.load()[key] for key in ("running", "waiting")) == 2)
    status, answer, headers = post(address, {**CHAT, "max_tokens": 1})
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert int(headers["Retry-After"]) >= 1
    assert post(address, {**CHAT, "n": 3})[0] == 400  # would never fit
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in found] == [200, 200]
    assert post(address, {**CHAT, "max_tokens": 1})[0] == 200


def test_too_many_requests_under_way(engine: Engine) -> None:
    with background(build_app(engine, Settings(requests=1))) as address:
        sent, going = threading.Event(), threading.Event()

        def slowly() -> Iterator[bytes]:
            yield b"{"
            sent.set()
            going.wait(5)

        held: list[Any] = []
        thread = threading.Thread(target=lambda: held.append(post(address, slowly())))
        thread.start()
        sent.wait(5)
        time.sleep(0.05)
        assert post(address, CHAT)[0] == 429
        going.set()
        thread.join()
        assert held[0][0] == 400


def test_time_is_limited(slow: Any, until: Any) -> None:
    engine = slow(0.05)
    with background(build_app(engine, Settings(seconds=0.5))) as address:
        began = time.monotonic()
        status, answer, _ = post(address, {**CHAT, "max_tokens": LONG})
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        chunks = []
        with pytest.raises(openai.APIError, match="time limit"):
            chunks.extend(client.chat.completions.create(**CHAT, max_tokens=LONG, stream=True))
        assert time.monotonic() - began < 4
        assert until(lambda: engine.load()["running"] == 0)

        def never() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)

        assert post(address, never())[0] == 408


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_slot_within_a_second(slow: Any, until: Any, stream: bool) -> None:
    engine = slow(0.02)
    with background(build_app(engine, Settings())) as address:
        where = urllib.parse.urlsplit(address)
        body = json.dumps({**CHAT, "max_tokens": LONG, "stream": stream}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert until(lambda: engine.load()["running"] == 1)
            if stream:
                assert b"200" in connection.recv(1000)
        assert until(lambda: engine.load()["running"] == 0, 1.0)
        assert engine.load()["waiting"] == 0


def test_a_crash_is_a_500_of_one_request(engine: Engine, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.serving.sequences import Writing

    take = Writing.take

    def breaking(self: Writing, *arguments: Any) -> None:
        if self.ask.stops == ["break"]:
            raise RuntimeError("secret of the inside")
        take(self, *arguments)

    monkeypatch.setattr(Writing, "take", breaking)
    calm: list[Any] = []
    threads = [ask(address, calm, max_tokens=60) for _ in range(3)]
    status, answer, _ = post(address, {**CHAT, "stop": ["break"]})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "secret" not in json.dumps(answer)
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in calm] == [200] * 3
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.APIError, match="this answer failed"):
        list(client.chat.completions.create(**CHAT, stop=["break"], stream=True))


@pytest.mark.parametrize("wanted", [False, True])
def test_bodies_are_in_the_log_only_where_asked_for(
    engine: Engine, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    with background(build_app(engine, Settings(log_bodies=wanted))) as address:
        secret = [{"role": "user", "content": "my secret garden"}]
        assert post(address, {**CHAT, "messages": secret, "max_tokens": 1, "user": "ann\n"})[0] == 200
        assert post(address, {**CHAT, "messages": secret, "temperature": 7})[0] == 400
    assert ("secret garden" in caplog.text) == wanted
    assert "user='ann\\n'" in caplog.text


def test_a_stop_finishes_what_runs(slow: Any) -> None:
    engine = slow(0.02)
    bound = listen("127.0.0.1", 0)
    server = make_server(build_app(engine, Settings()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    found: list[Any] = []
    request = ask(address, found, max_tokens=30)
    while engine.load()["running"] == 0:
        time.sleep(0.01)
    server.handle_exit(15, None)
    request.join(10)
    thread.join(10)
    bound.close()
    assert not thread.is_alive()
    assert found[0][0] == 200
    assert found[0][1]["usage"]["completion_tokens"] == 30
    with pytest.raises(OSError, match="refused"):
        post(address, CHAT)


def test_a_second_signal_ends_at_once(slow: Any) -> None:
    engine = slow(0.05)
    bound = listen("127.0.0.1", 0)
    server = make_server(build_app(engine, Settings()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    found: list[Any] = []

    def request() -> None:
        try:
            found.append(post(f"http://127.0.0.1:{bound.getsockname()[1]}", {**CHAT, "max_tokens": LONG}))
        except (OSError, ValueError, http.client.HTTPException):
            found.append(None)

    asking = threading.Thread(target=request)
    asking.start()
    while engine.load()["running"] == 0:
        time.sleep(0.01)
    server.handle_exit(2, None)
    server.handle_exit(15, None)
    began = time.monotonic()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began < 3
    bound.close()
    engine.stop(at_once=True)
    asking.join(5)
