"""What stands before every request: who may ask, from where, how much at once, how large, and how long it may take."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer.serving.errors import ApiError
from gossamer.serving.metrics import Metrics

log = logging.getLogger("gossamer.serving")
OPEN = ("/", "/app.js", "/health")  # need no token: they hold nothing of the model's
DEADLINE, USER = "gossamer.deadline", "gossamer.user"  # in the scope of a request
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_DRAINED, _DRAINING = 64 * 2**20, 5.0  # bytes and seconds that a body that is too large is listened to


@dataclasses.dataclass(frozen=True)
class Settings:
    """``token`` None: anybody on this machine may ask; ``local`` then refuses a foreign Host header, by which a web
    page could reach a loopback address. ``seconds`` a request, its wait included; ``requests`` under way at once;
    ``prompt_tokens`` None: what the model has room for; ``log_bodies`` writes prompts to the log.
    """

    token: str | None = None
    local: bool = True
    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    requests: int = 256
    seconds: float = 300.0
    log_bodies: bool = False


class Gate:
    """ASGI middleware. Bodies are read here, as far as they may go, and handed on whole."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics, self.under_way = app, settings, metrics, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        scope[DEADLINE] = began + self.settings.seconds

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.under_way += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        finally:
            self.under_way -= 1
            self._note(scope, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.settings.token is None:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if self.settings.local and name.lower() not in _LOCAL:
                message = f"this server answers to localhost, not to {host!r}: start it with --token to open it"
                raise ApiError(403, message, code="foreign_host")
        elif scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.settings.token.encode())
            if kind.lower() != b"bearer" or not right:
                message = "give the server's token: Authorization: Bearer TOKEN"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.under_way > self.settings.requests and scope["path"] not in OPEN:
            message = f"{self.settings.requests} requests are under way; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client hung up."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        size, parts, limit = 0, list[bytes](), self.settings.body_bytes
        large = length.isdigit() and int(length[:20]) > limit
        try:
            async with asyncio.timeout(self.settings.seconds):
                more = True
                while more and not large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    large = size > limit
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time", code="timeout") from error
        if large:
            await _drain(receive)
            words = f"the body is larger than the {limit} bytes that are taken"
            raise ApiError(413, words, code="body_too_large", headers={"Connection": "close"})
        body = b"".join(parts)
        if self.settings.log_bodies and body:
            log.info("body of %s: %s", ascii(scope["path"]), ascii(body.decode(errors="replace")))
        return body

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.count("requests", path=path, status=str(status or "gone"))
        self.metrics.time("request_seconds", seconds)
        user = f" user={scope[USER]!a}" if scope.get(USER) else ""
        log.info("%s %s %s %.0f ms%s", scope["method"], ascii(scope["path"]), status or "gone", 1000 * seconds, user)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _drain(receive: Receive) -> None:
    """Hear the client out for a while: many read an answer only when all of the body is sent."""
    heard = 0
    try:
        async with asyncio.timeout(_DRAINING):
            while heard < _DRAINED:
                message = await receive()
                heard += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
