"""The start line: what is wrong with it is an exit code 2, and a signal lets requests finish."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.core.bundle import Bundle
from gossamer.core.errors import OptionError
from gossamer.serving.engine import Capacity
from gossamer.serving.start import Served, open_engines
from gossamer.testing.bench import Bench

RUN = [sys.executable, "-c", "from gossamer.cli import main; main()", "serve", "llama-7m", "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "have a token"),
        (["--host", "0.0.0.0", "--token", "short"], "at least 8"),
        (["--stage", "clovr", "--port", "0"], "did you mean 'clover'"),
        (["--pooling", "max", "--port", "0"], "mean or last"),
        (["--beside", "llama-7m", "--port", "0"], "tell the served models apart"),
    ],
)
def test_a_wrong_start_line_is_an_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GOSSAMER_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["gossamer", "serve", "llama-7m", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_an_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["gossamer", "serve", "llama-7m", "--port", port])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    assert f"--port {port}: must be free, got a port in use" in capsys.readouterr().err


def test_a_second_model_and_an_encoder_are_served_by_name() -> None:
    models = {"runs/light": Bench("llama").bundle(), "other": Bench("qwen3").bundle()}
    served = Served("runs/light", ("prompt_lookup",), beside="other", runner={"native": "never"})
    engines, vectors = open_engines(served, Capacity(), models.__getitem__)
    try:
        assert [engine.name for engine in engines] == ["light", "other"]
        assert [engine.stages.names for engine in engines] == [["prompt_lookup"], []]
        assert vectors.name == "light"
    finally:
        for engine in engines:
            engine.stop()
    with pytest.raises(OptionError):
        open_engines(Served("a", name="b", beside="b"), Capacity(), dict[str, Bundle]().__getitem__)


def test_a_signal_lets_requests_finish_and_the_server_end() -> None:
    with subprocess.Popen(RUN, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stderr is not None
        lines: list[str] = []
        address = None
        for line in server.stderr:
            lines.append(line)
            address = re.search(r"serving llama-7m on (http://127\.0\.0\.1:\d+)", line)
            if address:
                break
        assert address, lines
        # what it logs has to be read on
        threading.Thread(target=lambda: lines.extend(server.stderr or ()), daemon=True).start()
        body: dict[str, Any] = {"model": "llama-7m", "prompt": "The sea", "max_tokens": 60, "stream": True}
        sent = urllib.request.Request(
            f"{address[1]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent, timeout=60) as answer:
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert first.startswith(b"data: ")
        assert rest.endswith("data: [DONE]\n\n")
        assert server.wait(30) == 0
