"""From the engine's thread to a connection: pieces as they come, until the end, a time limit, or nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.serving.engine import Engine
from gossamer.serving.errors import ApiError, api_error
from gossamer.serving.replies import Collected, Shape, usage_of
from gossamer.serving.sequences import Ask, Failure, Piece, Tally

T = TypeVar("T")
GONE = 499  # nobody is there to see it
_FAREWELL = 2.0  # seconds for the last words to a client that does not read
log = logging.getLogger("gossamer.serving")


class Listener:
    """One request in the engine. ``deadline`` is on the clock of :func:`time.monotonic`."""

    def __init__(self, engine: Engine, asks: Sequence[Ask], deadline: float) -> None:
        self.engine, self.asks, self.deadline = engine, asks, deadline
        self.tallies: dict[int, Tally] = {}
        self._began, self._heard = time.monotonic(), False
        self._queue: asyncio.Queue[Piece | Failure] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Piece | Failure) -> None:
            # the loop is closed when the server was stopped at once
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        self.ticket = engine.submit(asks, sink)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all answers are finished; raises the error of one that failed, and the others are cancelled."""
        try:
            while len(self.tallies) < len(self.asks):
                event = await self._queue.get()
                if isinstance(event, Failure):
                    raise api_error(event.error)
                if not self._heard:
                    self._heard = True
                    self.engine.metrics.time("first_piece_seconds", time.monotonic() - self._began)
                if event.tally is not None:
                    self.tallies[event.index] = event.tally
                yield event
        finally:
            self.ticket.cancel()

    def usage(self, prompts: int) -> dict[str, Any]:
        return usage_of([self.tallies[n] for n in range(len(self.asks))], prompts)

    async def collect(self) -> list[Collected]:
        answers = [Collected() for _ in self.asks]
        async for piece in self.pieces():
            answers[piece.index].add(piece)
        return answers


async def in_time(work: Awaitable[T], deadline: float) -> T:
    """:class:`ApiError` 504 when the time of a request is over."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError as error:
        raise too_late() from error


def too_late() -> ApiError:
    return ApiError(504, "the time limit of a request is over", code="timeout")


async def while_heard(work: Awaitable[T], receive: Receive) -> T | None:
    """``work``, or None when the client hangs up before it is done."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hangup(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of a request; an error after the beginning is an event and the end.

    It ends when the client hangs up or the request's time is over, and frees its slots then.
    """

    media_type = "text/event-stream"

    def __init__(self, listener: Listener, shape: Shape, prompts: int, with_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.listener, self.shape, self.prompts, self.with_usage = listener, shape, prompts, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        late = self.listener.deadline - time.monotonic() + _FAREWELL
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(late):
                    await while_heard(self._write(send), receive)
        finally:
            self.listener.ticket.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def say(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            await in_time(self._events(lambda value: say(json.dumps(value))), self.listener.deadline)
            await say("[DONE]")
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            await say(json.dumps(api_error(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, say: Callable[[Any], Awaitable[None]]) -> None:
        shape, told = self.shape, self.with_usage
        for number in range(len(self.listener.asks)):
            await say(shape.part([shape.opening(number)], None, told))
        async for piece in self.listener.pieces():
            await say(shape.part([shape.news(piece)], None, told))
        if told:
            await say(shape.part([], self.listener.usage(self.prompts), told))


async def _hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
