"""Who answers while the application does not serve: what is said, and that nobody is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

import api.doorman
from api.doorman import MOST_AT_ONCE, MOST_HEADER_BYTES, Doorman
from models import LiveResponse, ReadyResponse

WAIT_S = 5.0
REVISION = "abc123"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def ask(
    listener: socket.socket, path: str, method: str = "GET", *, content: bytes | None = None
) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url_of(listener), timeout=WAIT_S) as client:
        return await client.request(method, path, content=content)


async def say(listener: socket.socket, text: bytes) -> bytes:
    """Everything that is answered to ``text``."""
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        writer.write(text)
        return await asyncio.wait_for(reader.read(), WAIT_S)
    finally:
        writer.close()


async def test_a_service_that_starts_is_alive_and_says_so_as_the_application_does(
    listener: socket.socket,
) -> None:
    async with Doorman(listener, "starting", revision=REVISION):
        answer = await ask(listener, "/health/live?verbose=1")
    assert answer.status_code == 200
    expected = LiveResponse(status="alive", revision=REVISION)
    assert answer.json() == expected.model_dump(exclude_none=True)


@pytest.mark.parametrize("revision", [REVISION, None])
@pytest.mark.parametrize("doing", ["starting", "stopping"])
async def test_it_is_not_ready_and_says_why_as_the_application_does(
    listener: socket.socket, doing: str, revision: str | None
) -> None:
    async with Doorman(listener, doing, revision=revision):
        answer = await ask(listener, "/health/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    expected = ReadyResponse(
        status="not_ready", reasons=[f"the service is {doing}"], warnings=[], revision=revision
    )
    assert answer.json() == expected.model_dump(exclude_none=True)


async def test_anything_else_is_a_problem_that_says_when_to_come_again(
    listener: socket.socket,
) -> None:
    async with Doorman(listener, "starting", revision=None):
        answer = await ask(listener, "/api/v1/coins", "POST", content=b"x" * 200_000)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    assert answer.json() == {
        "type": "urn:cb-trade:problem:storage_unavailable",
        "title": "Storage unavailable",
        "status": 503,
        "detail": "the service is starting",
        "code": "storage_unavailable",
    }


async def test_a_head_has_no_body(listener: socket.socket) -> None:
    async with Doorman(listener, "starting", revision=None):
        answer = await say(listener, b"HEAD /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "text", [b"", b"GET /health/live HTT", b"GET /" + b"x" * 2 * MOST_HEADER_BYTES + b"\r\n\r\n"]
)
async def test_who_sends_no_request_in_time_or_too_long_a_one_gets_no_answer(
    listener: socket.socket, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.doorman, "PATIENCE_S", 0.05)
    async with Doorman(listener, "starting", revision=None):
        try:
            answer = await say(listener, text)
        except ConnectionResetError:  # something was left unread
            answer = b""
        assert answer == b""
        assert (await ask(listener, "/health/live")).status_code == 200


async def test_who_comes_while_too_many_are_there_is_answered_in_turn(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.doorman, "PATIENCE_S", 0.2)
    async with Doorman(listener, "starting", revision=None):
        silent = [
            await asyncio.open_connection(*listener.getsockname()) for _ in range(MOST_AT_ONCE)
        ]
        assert (await ask(listener, "/health/live")).status_code == 200
        for _, writer in silent:
            writer.close()


async def test_nobody_is_lost_when_the_server_takes_over_or_leaves(
    listener: socket.socket,
) -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"{}"})  # type: ignore[operator]

    answers: list[int] = []
    enough = asyncio.Event()
    done = asyncio.Event()

    async def knock() -> None:
        while not done.is_set():
            answer = await say(listener, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answers.append(int(answer.split()[1]))
            enough.set()

    async def hear_more() -> None:
        enough.clear()
        await asyncio.wait_for(enough.wait(), WAIT_S)

    config = uvicorn.Config(app, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(knock())
        for _ in range(10):
            async with Doorman(listener, "starting", revision=None):
                await hear_more()
                await server.startup([listener.dup()])
            await hear_more()
            async with Doorman(listener, "stopping", revision=None):
                for running in server.servers:
                    running.close()
                await hear_more()
        done.set()
        async with Doorman(listener, "stopping", revision=None):
            await hear_more()
    assert set(answers) == {200, 503}


async def test_nobody_answers_where_no_descriptor_is_left_and_nothing_else_is_left_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        pass
    done = False
    async with Doorman(closed, "stopping", revision=None):
        done = True
    assert done
