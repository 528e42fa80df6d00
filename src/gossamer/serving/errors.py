"""Errors as the OpenAI API shows them: ``{"error": {"message", "type", "param", "code"}}`` with a status."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gossamer.core.errors import UsageError
from gossamer.serving.engine import Full, Stopped
from gossamer.serving.schema import not_offered

log = logging.getLogger("gossamer.serving")
_NOT_OFFERED = not_offered()
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with ``status`` in place of the wanted one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        shown = {"message": self.message, "type": _TYPES.get(self.status, kind), "param": self.param, "code": self.code}
        # what a request brought may hold halves of surrogate pairs, which no UTF-8 has
        return {"error": {key: value and value.encode(errors="replace").decode() for key, value in shown.items()}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """What an error of the engine is to a client: those that nobody foresaw say nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        return ApiError(429, f"{error}; try again later", code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, Stopped):
        return ApiError(503, "the server is being stopped", code="stopped", headers={"Retry-After": "10"})
    if isinstance(error, UsageError):
        return bad(str(error), None)
    return ApiError(500, f"this answer failed ({type(error).__name__}); others are not touched", code="answer_failed")


def add_handlers(app: FastAPI) -> None:
    """Every error of ``app`` in the one shape."""

    @app.exception_handler(ApiError)
    async def _own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code
        code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
        message = {404: f"there is no {request.url.path}"}.get(status, str(error.detail))
        return ApiError(status, message, code=code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return api_error(error).response()


def _validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body."""
    # of a union every member complains: the deepest complaint of the one with fewest is about what was meant
    tags = [tuple(part for part in error["loc"] if part not in _path(error["loc"])) for error in errors]
    ranked = zip(errors, tags, strict=True)
    first, _ = max(ranked, key=lambda pair: (len(_path(pair[0]["loc"])), -tags.count(pair[1])))
    param = _param(_path(first["loc"]))
    kind, message = str(first["type"]), str(first["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    if kind == "extra_forbidden":
        return bad(f"unknown parameter {param!r}", param, "unknown_parameter")
    if kind == "missing":
        return bad(f"{param!r} is missing" if param else "the body is missing", param, "missing_parameter")
    if any(part in _NOT_OFFERED for part in _path(first["loc"])):
        return bad(f"{param!r} is not offered by this server: leave it out", param, "unsupported_parameter")
    return bad(f"{param}: {message}" if param else message, param)


def _path(loc: Sequence[Any]) -> list[Any]:
    """Names and places, without "body" and the tags by which pydantic tells members of a union apart."""
    return [part for part in loc[1:] if isinstance(part, int) or _is_name(str(part))]


def _is_name(part: str) -> bool:
    tags = ("str", "int", "float", "bool", "dict", "none", "TextPart")
    return part not in tags and not any(letter in part for letter in "[]()-")


def _param(path: Sequence[Any]) -> str | None:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or None
