"""A served model as a process of its own, and a client for it on the loopback address, of the standard library alone.

The client tells when the first piece of a streamed answer came, and can hang up at any point, as people do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from gossamer.core.errors import GossamerError

_START = "from gossamer.cli import main; main()"
_READY = re.compile(r"serving .* on http://127\.0\.0\.1:(\d+)")
_METRIC = re.compile(r"^(\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Server:
    """Where it listens, its process, and the name of its model."""

    port: int
    pid: int
    model: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident(self) -> int:
        """Bytes of its process in memory."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def metrics(self) -> dict[str, float]:
        """What /metrics counts by name, summed over labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        found: dict[str, float] = {}
        for name, value in _METRIC.findall(text):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def idle_after(self, most: float) -> float | None:
        """Seconds until no answer is running or waiting; None where that is not so within ``most``."""
        began = time.monotonic()
        while time.monotonic() - began < most:
            counts = self.metrics()
            if counts["gossamer_running"] == counts["gossamer_waiting"] == 0:
                return time.monotonic() - began
            time.sleep(0.02)
        return None


@dataclasses.dataclass(frozen=True)
class Request:
    """``hang_up``: after how many lines of the answer the client goes, 0 before its head; ``cut``: with only half of
    the body sent. ``wait``: seconds for the next byte."""

    path: str
    body: bytes = b""
    method: str = "POST"
    hang_up: int | None = None
    cut: bool = False
    wait: float = 120.0


@dataclasses.dataclass
class Reply:
    """``status`` 0: the client hung up, or the answer broke off, never came, or was refused within its stream;
    ``error`` and ``code`` then say why. Times in seconds since the request was sent; ``first``: the first piece of text
    or the end, whichever came first."""

    status: int = 0
    text: str = ""
    seconds: float = 0.0
    first: float | None = None
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    finish: str | None = None
    retry_after: float = 0.0
    error: str = ""
    code: str = ""


def send(server: Server, request: Request) -> Reply:
    """Send one request on a connection of its own and read the answer."""
    began, reply = time.perf_counter(), Reply()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=request.wait)
    try:
        if request.cut:
            _half(connection, request)
            return reply
        head = {"Content-Type": "application/json"} if request.body else {}
        connection.request(request.method, request.path, request.body or None, head)
        if request.hang_up != 0:
            _read(connection.getresponse(), request, reply, began)
    except (OSError, http.client.HTTPException) as error:
        reply.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
        reply.seconds = time.perf_counter() - began
    return reply


def post(path: str, body: Any, **options: Any) -> Request:
    return Request(path, json.dumps(body).encode(), **options)


def at_once(jobs: Sequence[Callable[[], Any]], clients: int | None = None) -> list[Any]:
    """What each job gives, on threads of their own, by default all at once."""
    with concurrent.futures.ThreadPoolExecutor(clients or len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@contextlib.contextmanager
def served(model: str, options: Sequence[str] = (), *, threads: int = 2, start: float = 300.0) -> Iterator[Server]:
    """``gossamer serve MODEL`` on a free port. A server that does not end well after a signal is an error."""
    command = [sys.executable, "-c", _START, "serve", model, "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        try:
            port = _port(process, log, start)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as reply:
                name = json.load(reply)["model"]
            yield Server(port, process.pid, name)
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
            if code:
                raise GossamerError("the server", must="end well after a signal", got=_tail(log, code))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _port(process: Any, log: Path, most: float) -> int:
    end = time.monotonic() + most
    while time.monotonic() < end and process.poll() is None:
        found = _READY.search(log.read_text(errors="replace"))
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise GossamerError("the server", must=f"be ready within {most:.0f} s", got=_tail(log, process.poll()))


def _tail(log: Path, code: int | None) -> str:
    return f"exit code {code}: " + " | ".join(log.read_text(errors="replace").splitlines()[-8:])


def _half(connection: http.client.HTTPConnection, request: Request) -> None:
    connection.connect()
    assert isinstance(connection.sock, socket.socket)
    head = f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request.body)}\r\n\r\n"
    connection.sock.sendall(head.encode() + request.body[: len(request.body) // 2])


def _read(response: http.client.HTTPResponse, request: Request, reply: Reply, began: float) -> None:
    status = response.status
    reply.retry_after = float(response.headers.get("Retry-After", 0))
    if "event-stream" not in response.headers.get("Content-Type", ""):
        data = response.read() if request.hang_up is None else b""
        reply.status = status if request.hang_up is None else 0
        reply.first = time.perf_counter() - began
        if data and "json" in response.headers.get("Content-Type", ""):
            _take(json.loads(data), reply)
        return
    for number, line in enumerate(iter(response.readline, b""), 1):
        text = line.removeprefix(b"data:").strip()
        if text == b"[DONE]":
            reply.status = status
            return
        if text:
            _take(json.loads(text), reply)
            if reply.first is None and (reply.text or reply.finish):
                reply.first = time.perf_counter() - began
        if number == request.hang_up:
            return
    reply.error = reply.error or "the stream broke off"


def _take(value: Any, reply: Reply) -> None:
    """Add what an answer, or an event of one, tells."""
    if "error" in value:
        reply.error, reply.code = str(value["error"]["message"]), str(value["error"]["code"])
    for choice in value.get("choices", ()):
        told = choice.get("delta") or choice.get("message") or {}
        reply.text += choice.get("text") or told.get("content") or ""
        reply.finish = choice["finish_reason"] or reply.finish
    reply.usage = value.get("usage") or reply.usage
