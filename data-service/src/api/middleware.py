"""Pure ASGI middleware: a request's id in every log line, what is told of each request, bodies of a
bounded size, and an answer also to what nobody foresaw."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import ApiMetrics
from api.problems import (
    PayloadTooLarge,
    not_serving,
    problem_of,
    problem_response,
    report_unexpected,
)
from observability.tracing import ISpan, span

MAX_BODY_BYTES: Final = 64 * 1024
REQUEST_ID_HEADER: Final = "X-Request-ID"
# What a caller may choose; anything else could forge log lines.
_CHOSEN_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds by machines, and of no interest while they answer.
_ASKED_ALWAYS: Final = frozenset({"/health/live", "/health/ready", "/metrics"})
# What answers a request, or a handshake.
_ANSWERS: Final = frozenset(
    {"http.response.start", "websocket.accept", "websocket.http.response.start"}
)
# Others can be made up without end.
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)


def is_loggable_id(chosen: str) -> bool:
    """Whether an id that a caller chose may stand in log lines."""
    return _CHOSEN_ID.fullmatch(chosen) is not None


class RequestIdMiddleware:
    """Binds ``request_id`` to everything that is logged meanwhile, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        chosen = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = chosen if is_loggable_id(chosen) else uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] in _ANSWERS:
                MutableHeaders(scope=message).append(REQUEST_ID_HEADER, request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)


class AccessMiddleware:
    """What is told of each request: its time to the metrics, a line to the log, a span to the
    traces. By the template of its route, never by its path: paths that do not exist would grow the
    metrics without end, and queries are nobody's business.

    A connection has two lines, one of its handshake and one of its end, and no span: what is asked
    over it has.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._connection(scope, receive, send)
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in _ASKED_ALWAYS:
            await self._request(scope, receive, send, tell=log.debug)
        else:
            with span(_method(scope), kind="server", headers=Headers(scope=scope)) as traced:
                await self._request(scope, receive, send, tell=log.info, traced=traced)

    async def _request(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        tell: Callable[..., Any],
        traced: ISpan | None = None,
    ) -> None:
        status = 0
        began = time.perf_counter()

        async def send_and_watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_watch)
        finally:
            seconds = time.perf_counter() - began
            method, route = _method(scope), _route(scope)
            # An answer that nobody waited for has none.
            told = str(status) if status else "none"
            self._metrics.http_seconds.labels(route, method, told).observe(seconds)
            _tell_request(tell, method, route, status or None, seconds)
            if traced is not None:
                _describe(traced, method, route, status)

    async def _connection(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        accepted = False
        closed_with: int | None = None

        async def receive_and_watch() -> Message:
            nonlocal closed_with
            message = await receive()
            if message["type"] == "websocket.disconnect":
                closed_with = message.get("code")
            return message

        async def send_and_watch(message: Message) -> None:
            nonlocal accepted, closed_with
            await send(message)
            status: int | None = None
            match message["type"]:
                case "websocket.accept":
                    accepted, status = True, 101
                case "websocket.http.response.start":
                    status = message["status"]
                case "websocket.close":
                    closed_with = message.get("code")
            if status is not None:
                _tell_request(log.info, "GET", _route(scope), status, time.perf_counter() - began)

        try:
            await self._app(scope, receive_and_watch, send_and_watch)
        finally:
            if accepted:
                log.info(
                    "websocket_closed",
                    route=_route(scope),
                    code=closed_with,
                    seconds=round(time.perf_counter() - began, 1),
                )


def _tell_request(
    tell: Callable[..., Any], method: str, route: str, status: int | None, seconds: float
) -> None:
    tell("request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 1))


def _describe(traced: ISpan, method: str, route: str, status: int) -> None:
    traced.rename(f"{method} {route}")
    traced.set(**{"http.request.method": method, "http.route": route})
    if status:
        traced.set(**{"http.response.status_code": status})
    if status >= 500:
        traced.fail(str(status))


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", None) or "other"


class CrashMiddleware:
    """The outermost handler: what no other handles is logged once and told as ``internal``.

    The server cancels what takes too long when it stops. That is no failure: who has no answer yet
    is told to ask again, and it ends there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            with suppress(asyncio.CancelledError):
                await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_watch)
        except asyncio.CancelledError:
            if not getattr(scope["app"].state, "stopping", False):
                raise
            if not started:
                await problem_response(not_serving("stopping"))(scope, receive, send)
        except Exception as exc:  # noqa: BLE001  this is the outermost handler
            problem = report_unexpected(exc)
            # An answer that has begun cannot be taken back; the server cuts it off.
            if not started:
                await problem_response(problem)(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies over ``MAX_BODY_BYTES`` before anything reads them.

    A body of an allowed size is held in memory whole, so that one sent in chunks is measured too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
            await _refuse(scope, receive, send)
            return
        held: list[Message] = []
        size = 0
        more = True
        while more:
            message = await receive()
            held.append(message)
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                await _refuse(scope, receive, send)
                return
            more = message["type"] == "http.request" and message.get("more_body", False)
        waiting = iter(held)

        async def replay() -> Message:
            message = next(waiting, None)
            return await receive() if message is None else message

        await self._app(scope, replay, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    refusal = PayloadTooLarge(f"a body takes at most {MAX_BODY_BYTES} bytes")
    await problem_response(problem_of(refusal))(scope, receive, send)
