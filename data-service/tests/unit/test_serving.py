"""What the server does that uvicorn does not."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState
from websockets.uri import parse_uri

import signals
from api.app import build_app
from errors import DataServiceError
from serving import CRASHED, NOT_STARTED, STOP_S, Server, WebSocketProtocol
from signals import Alarm
from tests.support.api import make_settings
from tests.support.clock import settle_loop


class Transport(asyncio.Transport):
    """The way to a client that reads nothing: what is closed stays until that was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        """It does not matter here."""

    def resume_reading(self) -> None:
        """Likewise."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def connected(
    protocol: type[WebSocketsSansIOProtocol],
) -> tuple[WebSocketsSansIOProtocol, ClientProtocol, Transport]:
    """A connection and its client, after the handshake."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    connection = protocol(config, ServerState(), {}, asyncio.get_running_loop())
    client = ClientProtocol(parse_uri("ws://localhost/ws/data"))
    transport = Transport()
    connection.connection_made(transport)
    client.send_request(client.connect())
    connection.data_received(b"".join(client.data_to_send()))
    await settle_loop()
    client.receive_data(transport.sent)
    transport.sent = b""
    return connection, client, transport


def close_code(client: ClientProtocol, transport: Transport) -> int | None:
    client.receive_data(transport.sent)
    return client.close_rcvd.code if client.close_rcvd is not None else None


async def test_a_shutdown_closes_with_1012() -> None:
    connection, client, transport = await connected(WebSocketProtocol)
    connection.shutdown()
    assert close_code(client, transport) == 1012
    await settle_loop()


@pytest.mark.parametrize("protocol", [WebSocketProtocol, WebSocketsSansIOProtocol])
async def test_a_client_that_has_just_said_goodbye_does_not_end_the_shutdown(
    protocol: type[WebSocketsSansIOProtocol],
) -> None:
    connection, client, transport = await connected(protocol)
    client.send_close(1000)
    connection.data_received(b"".join(client.data_to_send()))
    await settle_loop()
    if protocol is WebSocketProtocol:
        connection.shutdown()
    else:
        # The day on which uvicorn does not need this any more.
        with pytest.raises(InvalidState):
            connection.shutdown()
    assert close_code(client, transport) == 1000


class SilentAlarm(Alarm):
    """Remembers what it was set to, and ends nothing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.codes: list[int] = []

    def set(self, seconds: float, *, code: int, why: str) -> None:
        self.seconds.append(seconds)
        self.codes.append(code)

    def stop(self) -> None:
        """It does not run."""


@asynccontextmanager
async def failing(app: FastAPI) -> AsyncIterator[None]:
    raise DataServiceError("the disk is gone")
    yield


def test_a_signal_that_comes_when_all_is_over_does_no_harm() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        alarm = SilentAlarm()
        settings = make_settings()
        server = Server(build_app(settings, failing), settings, listener, alarm=alarm)
        assert server.serve_and_end() == NOT_STARTED
        server.ask_to_stop()
        assert alarm.seconds[-1] == pytest.approx(STOP_S, abs=1)


@asynccontextmanager
async def crashing(app: FastAPI) -> AsyncIterator[None]:
    raise ZeroDivisionError
    yield


def test_a_crash_is_told_and_no_success_before_threads_may_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = make_settings()
        alarm = SilentAlarm()
        server = Server(build_app(settings, crashing), settings, listener, alarm=alarm)
        with capture_logs() as logs, pytest.raises(ZeroDivisionError):
            server.serve_and_end()
    assert [log["event"] for log in logs] == ["process_crashed"]
    assert (server.exit_code, alarm.codes[-1]) == (CRASHED, CRASHED)


RING = """
import os, signal, sys, time
from signals import Alarm
if sys.argv[1] == "gone":
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
else:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    os.dup2(write, 2)
Alarm().set(0.01, code=7, why="it hangs")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("reader", ["gone", "standing still"])
def test_the_alarm_ends_the_process_whoever_reads_its_errors(reader: str) -> None:
    source = str(Path(signals.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", RING, reader], timeout=20, env={"PYTHONPATH": source}, check=False
    )
    assert done.returncode == 7
