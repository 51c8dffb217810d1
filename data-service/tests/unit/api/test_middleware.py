"""What a client gets of a request that the server cancels because it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from api.middleware import CrashMiddleware


def http(*, stopping: bool) -> Scope:
    app = SimpleNamespace(state=SimpleNamespace(stopping=stopping))
    return {"type": "http", "method": "GET", "path": "/", "headers": [], "app": app}


def never_ending(*first: Message) -> tuple[Callable[..., Any], asyncio.Event]:
    """An application that sends ``first`` and nothing more, and when it has."""
    sent = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in first:
            await send(message)
        sent.set()
        await asyncio.Event().wait()

    return app, sent


async def cancelled(scope: Scope, *first: Message) -> list[Message]:
    """Everything that is sent when the server cancels the application, which then ends in order."""
    app, begun = never_ending(*first)
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    task = asyncio.create_task(CrashMiddleware(app)(scope, receive, send))
    await begun.wait()
    task.cancel()
    with capture_logs() as logs:
        await task
    assert logs == []
    return told


async def test_who_has_no_answer_yet_is_told_when_to_ask_again() -> None:
    start, body = await cancelled(http(stopping=True))
    assert start["status"] == 503
    assert (b"retry-after", b"5") in start["headers"]
    assert b'"code":"storage_unavailable"' in body["body"]


async def test_an_answer_that_has_begun_is_left_as_it_is() -> None:
    begun = {"type": "http.response.start", "status": 200, "headers": []}
    assert await cancelled(http(stopping=True), begun) == [begun]


async def test_a_request_that_another_cancels_while_all_goes_on_is_cancelled() -> None:
    with pytest.raises(asyncio.CancelledError):
        await cancelled(http(stopping=False))


async def test_a_websocket_ends_without_a_word() -> None:
    assert await cancelled({"type": "websocket", "path": "/ws/data"}) == []


async def test_a_lifespan_is_cancelled_as_ever() -> None:
    with pytest.raises(asyncio.CancelledError):
        await cancelled({"type": "lifespan"})
