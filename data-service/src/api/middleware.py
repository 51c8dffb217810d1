"""Pure ASGI middleware: a request's id in every log line, bodies of a bounded size, and an answer
also to what nobody foresaw."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from http import HTTPStatus
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import (
    DEFAULT_RETRY_AFTER_S,
    PayloadTooLarge,
    Problem,
    problem_of,
    problem_response,
    report_unexpected,
)

MAX_BODY_BYTES: Final = 64 * 1024
REQUEST_ID_HEADER: Final = "X-Request-ID"
# What a caller may choose; anything else could forge log lines.
_CHOSEN_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STOPPING: Final = Problem(
    "unavailable",
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the service is stopping",
    DEFAULT_RETRY_AFTER_S,
)


class RequestIdMiddleware:
    """Binds ``request_id`` to everything that is logged meanwhile, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        chosen = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = chosen if _CHOSEN_ID.fullmatch(chosen) else uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                MutableHeaders(scope=message).append(REQUEST_ID_HEADER, request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)


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
            if not started:
                await problem_response(_STOPPING)(scope, receive, send)
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
