"""From the options of a start line to a running server: models, stages, engines, application."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError, OptionError, did_you_mean
from gossamer.serving.app import build_app
from gossamer.serving.engine import Capacity, Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import check_address, listen, run
from gossamer.serving.stages import load_stages
from gossamer.serving.vectors import EncoderVectors, ModelVectors

log = logging.getLogger("gossamer.serving")
POOLINGS = ("mean", "last")
Load = Callable[[str], Bundle]


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served. ``runner``: options of the decoding runner."""

    model: str
    stages: tuple[str, ...] = ()
    name: str = ""
    beside: str = ""
    embeddings: str = ""
    pooling: str = "mean"
    runner: dict[str, Any] = dataclasses.field(default_factory=dict)


def serve(served: Served, settings: Settings, capacity: Capacity, host: str, port: int, load: Load) -> None:
    """Serve until a signal. ``load`` opens a model by name or folder.

    What is wrong with the address, a stage or a model is an error before the first request.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = dataclasses.replace(settings, local=check_address(host, settings.token))
    bound = listen(host, port)
    engines: list[Engine] = []
    try:
        engines, vectors = open_engines(served, capacity, load)
        app = build_app(engines, settings, vectors=vectors)
        for translator in app.state.server.translators.values():
            threading.Thread(target=_warm, args=(translator,), daemon=True).start()
        shown = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", ", ".join(e.name for e in engines), shown, bound.getsockname()[1])
        run(app, bound)
    finally:
        for engine in engines:
            engine.stop(at_once=True)
        bound.close()


def open_engines(served: Served, capacity: Capacity, load: Load) -> tuple[list[Engine], ModelVectors | EncoderVectors]:
    """The engines of the served models, and what embeds."""
    if served.pooling not in POOLINGS:
        raise OptionError(
            "--pooling", must="be mean or last", got=served.pooling, do=did_you_mean(served.pooling, POOLINGS)
        )
    names = [served.name or Path(served.model).resolve().name]
    if served.beside:
        names.append(Path(served.beside).resolve().name)
    if served.embeddings:
        names.append(Path(served.embeddings).resolve().name)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError("--name", must="tell the served models apart", got=f"{twice!r} twice", do="give another")
    bundle = load(served.model)
    stages = load_stages(served.stages, bundle, load)
    engines = [Engine(bundle, names[0], stages=stages, capacity=capacity, **served.runner)]
    if served.beside:
        engines.append(Engine(load(served.beside), names[1], capacity=capacity, **served.runner))
    if not served.embeddings:
        return engines, ModelVectors(engines[0], "last" if served.pooling == "last" else "mean")
    from gossamer.hub.models import load_model

    encoder, tokenizer = load_model(served.embeddings, dtype="float32", task="encoder")
    return engines, EncoderVectors(encoder, tokenizer, names[-1], int(time.time()))


def _warm(translator: Any) -> None:
    """Make ready for grammars, which takes seconds, where they can be had."""
    try:
        translator.warm()
    except (GossamerError, ImportError) as error:
        log.info("no grammars here: %s", error)
