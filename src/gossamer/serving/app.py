"""The FastAPI application: the OpenAI API's chat completions, completions, embeddings and models, health and metrics.

    app = build_app(engine, Settings())

Its description at ``/openapi.json`` is what it does: unknown fields are refused, every error has the same shape.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gossamer.serving.asks import Translator, constrained, prompts_of
from gossamer.serving.engine import Engine
from gossamer.serving.errors import ApiError, add_handlers, bad
from gossamer.serving.events import GONE, EventStream, Listener, in_time, while_heard
from gossamer.serving.limits import DEADLINE, USER, Gate, Settings
from gossamer.serving.metrics import Metrics, render
from gossamer.serving.replies import (
    ChatReply,
    EmbeddingReply,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    Shape,
    TextReply,
)
from gossamer.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Generation
from gossamer.serving.sequences import Ask
from gossamer.serving.vectors import EncoderVectors, ModelVectors, as_base64

_EVERYWHERE = {
    401: "The token is missing or wrong",
    403: "The Host header is foreign",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too much is under way: see Retry-After",
}
_ASKING = {
    400: "What is asked for is not valid or not offered",
    404: "There is no such model",
    500: "The answer failed",
    503: "The server is being stopped",
    504: "The time limit of a request is over",
}
_PAGE_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
_PAGES = {"/": ("page.html", "text/html"), "/app.js": ("app.js", "text/javascript")}


def build_app(
    engine: Engine | Sequence[Engine],
    settings: Settings,
    *,
    vectors: ModelVectors | EncoderVectors | None = None,
) -> FastAPI:
    """The application over one engine, or over several that are told apart by their names.

    ``vectors``: what embeds, by default the first engine's model. The application does not stop its engines.
    """
    server = _Server([engine] if isinstance(engine, Engine) else list(engine), settings, vectors)
    app = FastAPI(title="Gossamer", docs_url=None, redoc_url=None)
    app.state.server = server
    add_handlers(app)
    _add_routes(app, server)
    _add_pages(app)
    app.openapi = lambda: _described(app, server)  # type: ignore[method-assign]
    app.add_middleware(Gate, settings=settings, metrics=server.metrics)
    return app


class _Server:
    """The engines by name, and what every request needs."""

    def __init__(self, engines: list[Engine], settings: Settings, vectors: Any) -> None:
        self.engines = {engine.name: engine for engine in engines}
        assert len(self.engines) == len(engines), "engines have names of their own"
        self.settings, self.metrics = settings, Metrics()
        self.translators = {engine.name: Translator(engine, settings.prompt_tokens) for engine in engines}
        self.vectors = vectors or ModelVectors(engines[0])
        self._grammar_thread = concurrent.futures.ThreadPoolExecutor(1, "grammars")

    def translator(self, model: str) -> Translator:
        if model not in self.translators:
            raise _unknown(model, list(self.engines))
        return self.translators[model]

    def cards(self) -> list[dict[str, Any]]:
        found = [
            _card(engine.name, engine.created, engine.max_length, engine.stages.names, "generation")
            for engine in self.engines.values()
        ]
        if self.vectors.name not in self.engines:
            found.append(_card(self.vectors.name, self.vectors.created, self.vectors.max_length, [], "embedding"))
        return found

    async def generate(
        self, request: Request, body: Generation, translate: Callable[[], list[Ask]], shape: Shape, prompts: int
    ) -> Response:
        request.scope[USER] = body.user
        deadline = request.scope[DEADLINE]
        # tokenising a long prompt takes a while; making grammars takes longer, and must not hold up the others
        pool = self._grammar_thread if constrained(body) else None
        engine = self.engines[body.model]
        with engine.announced():
            asks = await in_time(asyncio.get_running_loop().run_in_executor(pool, translate), deadline)
            listener = Listener(engine, asks, deadline)
        if body.stream:
            told = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(listener, shape, prompts, told)
        answers = await while_heard(in_time(listener.collect(), deadline), request.receive)
        if answers is None:
            return Response(status_code=GONE)
        return JSONResponse(shape.whole(answers, listener.usage(prompts)))

    async def embed(self, request: Request, body: EmbeddingRequest) -> Response:
        request.scope[USER] = body.user
        if body.model != self.vectors.name:
            raise _unknown(body.model, [self.vectors.name])
        rows = await asyncio.to_thread(self._rows, body)
        work = in_time(self._vectors(rows), request.scope[DEADLINE])
        found = await while_heard(work, request.receive)
        if found is None:
            return Response(status_code=GONE)
        shown = as_base64 if body.encoding_format == "base64" else list
        data = [{"object": "embedding", "index": n, "embedding": shown(vector)} for n, vector in enumerate(found)]
        tokens = sum(len(row) for row in rows)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    def _rows(self, body: EmbeddingRequest) -> list[list[int]]:
        """Token ids of each input."""
        size = self.vectors.tokenizer and len(self.vectors.tokenizer)
        rows = []
        for number, one in enumerate(prompts_of(body.input)):
            ids = self.vectors.tokenizer(one, verbose=False)["input_ids"] if isinstance(one, str) else list(one)
            if not ids or max(ids) >= size:
                raise bad(f"input[{number}] must hold tokens of the model's {size}, at least one", "input")
            if len(ids) > self.vectors.max_length:
                message = f"input[{number}] has {len(ids)} tokens, at most {self.vectors.max_length} are taken"
                raise ApiError(400, message, param="input", code="context_length_exceeded")
            rows.append(ids)
        return rows

    async def _vectors(self, rows: list[list[int]]) -> list[list[float]]:
        engine = next(iter(self.engines.values()))
        found = []
        for row in rows:
            for part in self.vectors.parts(row):
                vector = await asyncio.wrap_future(engine.call(part))
            found.append(vector)
        return found


def _add_routes(app: FastAPI, server: _Server) -> None:
    asked = _responses(_EVERYWHERE | _ASKING)

    def streamed(reply: Any) -> dict[int | str, dict[str, Any]]:
        return {**asked, 200: {"model": reply, "content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", response_model=ChatReply, responses=streamed(ChatReply))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        translator = server.translator(body.model)
        shape = Shape(body.model, chat=True, logprobs=bool(body.logprobs))
        return await server.generate(request, body, lambda: translator.chat(body), shape, 1)

    @app.post("/v1/completions", response_model=TextReply, responses=streamed(TextReply))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        translator = server.translator(body.model)
        echo = translator.echoed(body)
        shape = Shape(body.model, chat=False, logprobs=body.logprobs is not None, echo=echo)
        prompts = len(prompts_of(body.prompt))
        return await server.generate(request, body, lambda: translator.completion(body), shape, prompts)

    @app.post("/v1/embeddings", response_model=EmbeddingReply, responses=asked)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """A vector of length 1 for each text."""
        return await server.embed(request, body)

    @app.get("/v1/models", response_model=ModelList, responses=_responses(_EVERYWHERE))
    async def models() -> Response:
        """What this server serves."""
        return JSONResponse({"object": "list", "data": server.cards()})

    @app.get(
        "/v1/models/{model:path}", response_model=ModelCard, responses=_responses(_EVERYWHERE | {404: _ASKING[404]})
    )
    async def model(model: str) -> Response:
        """One of them."""
        cards = {card["id"]: card for card in server.cards()}
        if model not in cards:
            raise _unknown(model, list(cards))
        return JSONResponse(cards[model])

    @app.get("/health", response_model=Health, responses=_responses({403: _EVERYWHERE[403]}))
    async def health() -> Response:
        """Whether the server answers, and the name of its model."""
        return JSONResponse({"status": "ok", "model": next(iter(server.engines))})

    @app.get("/metrics", response_class=Response, responses={**_responses(_EVERYWHERE), 200: _PLAIN})
    async def metrics() -> Response:
        """Counts and times as Prometheus reads them."""
        rows = server.metrics.rows()
        for name, engine in server.engines.items():
            rows += engine.metrics.rows(model=name)
        gauges = {name: engine.load() for name, engine in server.engines.items()}
        return Response(render(rows, gauges), media_type="text/plain; version=0.0.4; charset=utf-8")


_PLAIN: dict[str, Any] = {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}}


def _add_pages(app: FastAPI) -> None:
    """The page and its script, where they are in the package."""
    for path, (name, media_type) in _PAGES.items():
        file = importlib.resources.files("gossamer.serving") / name
        if file.is_file():
            headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
            reply = Response(file.read_bytes(), media_type=f"{media_type}; charset=utf-8", headers=headers)
            app.add_api_route(path, lambda reply=reply: reply, include_in_schema=False, response_model=None)


def _described(app: FastAPI, server: _Server) -> dict[str, Any]:
    """The description without what FastAPI adds by itself (422), and with the names of the models."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        parts = described["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        for name in ("ChatRequest", "CompletionRequest"):
            parts[name]["properties"]["model"]["enum"] = list(server.engines)
        parts["EmbeddingRequest"]["properties"]["model"]["enum"] = [server.vectors.name]
        if server.settings.token is not None:
            described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            described["security"] = [{"token": []}]
            described["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = described
    return app.openapi_schema


def _responses(statuses: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": text} for status, text in statuses.items()}


def _card(name: str, created: int, length: int, stages: list[str], kind: str) -> dict[str, Any]:
    facts = {"max_length": length, "stages": stages, "kind": kind}
    return {"id": name, "object": "model", "created": created, "owned_by": "gossamer", "gossamer": facts}


def _unknown(model: str, names: list[str]) -> ApiError:
    shown = ", ".join(repr(name) for name in names)
    return ApiError(404, f"there is no model {model[:80]!r} here: name {shown}", param="model", code="model_not_found")
