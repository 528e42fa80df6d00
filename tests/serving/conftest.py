"""Engines over a tiny model, a server on a loopback port, and the official client of the API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import openai
import pytest

from gossamer.core.bundle import Bundle
from gossamer.serving.app import build_app
from gossamer.serving.engine import Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import background
from gossamer.testing.bench import Bench

Opened = Callable[..., AbstractContextManager[Engine]]


@contextlib.contextmanager
def _engine(bundle: Bundle, **options: Any) -> Iterator[Engine]:
    engine = Engine(bundle, "tiny", native="never", **options)
    try:
        yield engine
    finally:
        engine.stop(at_once=True)


def _client(address: str, token: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0, timeout=30)


def _until(holds: Callable[[], bool], seconds: float = 1.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return holds()


@pytest.fixture(scope="session")
def opened() -> Opened:
    """``opened(bundle, **options)``: an engine named tiny, stopped at the end."""
    return _engine


@pytest.fixture(scope="session")
def client_of() -> Callable[..., openai.OpenAI]:
    """``client_of(address, token)``: a client that tries once."""
    return _client


@pytest.fixture(scope="session")
def until() -> Callable[..., bool]:
    """``until(holds, seconds=1)``: whether something comes true in time."""
    return _until


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bench("llama").bundle()


@pytest.fixture(scope="session")
def engine(bundle: Bundle) -> Iterator[Engine]:
    with _engine(bundle) as engine:
        yield engine


@pytest.fixture(scope="session")
def address(engine: Engine) -> Iterator[str]:
    with background(build_app(engine, Settings())) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return _client(address)


@pytest.fixture
def slow(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """``slow(seconds, **options)``: an engine each of whose steps takes so long."""
    with contextlib.ExitStack() as stack:

        def make(seconds: float, **options: Any) -> Engine:
            engine = stack.enter_context(_engine(bundle, **options))
            step = engine.stepper.step

            def slowly(answers: Any) -> Any:
                time.sleep(seconds)
                return step(answers)

            monkeypatch.setattr(engine.stepper, "step", slowly)
            return engine

        yield make
