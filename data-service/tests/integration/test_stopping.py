"""How a service ends: asked once, asked twice, while it starts, and when something hangs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import websockets

from api.doorman import PATIENCE_S
from serving import NOT_STARTED, THREADS_S
from tests.drills.checker import Series, document_of
from tests.support.market import DAY, MINUTE
from tests.support.processes import (
    SECRET,
    Feed,
    Stack,
    clean_environment,
    line_with,
    market_clock,
    stack_to_start,
    until,
)

pytestmark = pytest.mark.e2e

SERVE = "\nsys.exit(cli.main(['serve']))\n"
# What hangs is made to hang by the program that each test starts; the rest is the service's own.
IMPORTS = "import asyncio, os, socket, sys, cli, main, serving\n"
START_HANGS = """
async def hang(*_, **__):
    await asyncio.Event().wait()
main._start = hang
"""
STOP_HANGS = """
async def hang(*_, **__):
    print("finishing", flush=True)
    await asyncio.Event().wait()
main._finish = hang
"""
# Nobody writes into a pipe that nobody knows of: whoever opens it to read never returns.
THREADS_HANG = """
finish = main._finish
async def leave_threads_behind(*parts):
    os.mkfifo("pipe")
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, open, "pipe")
    await finish(*parts)
main._finish = leave_threads_behind
"""
# A disk that stops to answer while a file of that name is there.
DISK_HANGS = """
import time
from storage.implementations.disk import Disk
write = Disk.write
def hang(*arguments, **options):
    while os.path.exists("hangs"):
        time.sleep(0.05)
    return write(*arguments, **options)
Disk.write = hang
"""
# The system takes little for a client that reads nothing.
BUFFERS_ARE_SMALL = """
listen = serving.listen
def listen_with_small_buffers(settings):
    listener = listen(settings)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listener
serving.listen = listen_with_small_buffers
"""
WITHIN_S = 10.0
START = 1_763_985_600_000


@dataclass
class Program:
    """A program that serves, and where."""

    process: asyncio.subprocess.Process
    url: str
    log: Path

    async def says(self, path: str) -> tuple[int, dict[str, object]]:
        async with httpx.AsyncClient(base_url=self.url, timeout=WITHIN_S) as client:
            answer = await client.get(path)
            return answer.status_code, answer.json()

    async def ended(self, *signals: int) -> int:
        """The exit code, in time, after signals."""
        for number in signals:
            self.process.send_signal(number)
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()

    def lines(self) -> list[str]:
        """What it wrote to standard error; never a traceback."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return text.splitlines()

    def is_listening(self) -> bool:
        host, _, port = self.url.removeprefix("http://").partition(":")
        with socket.socket() as client:
            return client.connect_ex((host, int(port))) == 0


@asynccontextmanager
async def running(folder: Path, changes: str = "", **settings: str) -> AsyncIterator[Program]:
    """The service with ``changes`` made to it, from the moment that its process is there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "service.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", IMPORTS + changes + SERVE,
            env=clean_environment(
                **{
                    "AUTH_SECRET": SECRET,
                    "EXCHANGES": "crypto.com",
                    "EXCHANGE_ENDPOINTS": '{"crypto.com": "http://127.0.0.1:9"}',
                    "PYTHONPATH": ":".join(sys.path),
                    **settings,
                    "PORT": str(port),
                }
            ),
            cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    try:
        yield Program(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_listening(program: Program) -> None:
    async def listens() -> bool:
        assert program.process.returncode is None, program.lines()
        return program.is_listening()

    await until(listens, within_s=WITHIN_S)


async def test_a_service_that_starts_says_so_and_ends_as_soon_as_it_is_asked(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, START_HANGS, REVISION="abc123") as program:
        await until_listening(program)
        assert await program.says("/health/live") == (
            200,
            {"status": "alive", "revision": "abc123"},
        )
        status, ready = await program.says("/health/ready")
        assert (status, ready["reasons"]) == (503, ["the service is starting"])
        status, problem = await program.says("/api/v1/coins")
        assert (status, problem["code"]) == (503, "storage_unavailable")
        assert await program.ended(signal.SIGTERM) == 0
        assert [line for line in program.lines() if "[error" in line] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_program_that_still_loads_ends_as_soon_as_it_is_asked(
    tmp_path: Path, number: signal.Signals
) -> None:
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "main.py").write_text(slow)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli", "serve",
        env=clean_environment(AUTH_SECRET=SECRET, PYTHONPATH=":".join([str(tmp_path), *sys.path])),
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await line_with(process, "loading")
    process.send_signal(number)
    async with asyncio.timeout(WITHIN_S):
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


async def test_a_start_that_takes_too_long_says_what_it_waited_for_and_ends(
    tmp_path: Path,
) -> None:
    # A table whose log cannot be read to its end: a thread stands there for ever.
    folder = tmp_path / "data" / "candles_delta" / "_delta_log"
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{0:020}.json")
    async with running(tmp_path, "serving.START_S = 3.0") as program:
        assert await program.ended() == NOT_STARTED
        told = [line for line in program.lines() if "not_started" in line]
        assert len(told) == 1
        assert "longer than 3 s: it was waiting for the table of candles" in told[0]
        assert "a thread stands in a call" in program.lines()[-1]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_that_stops_says_so_and_a_second_signal_ends_it_at_once(
    tmp_path: Path, second: signal.Signals
) -> None:
    async with running(tmp_path, STOP_HANGS) as program:
        await line_with(program.process, "serving on")
        program.process.send_signal(signal.SIGTERM)
        await line_with(program.process, "finishing")
        status, ready = await program.says("/health/ready")
        assert (status, ready["reasons"]) == (503, ["the service is stopping"])
        assert (await program.says("/health/live"))[0] == 200
        assert await program.ended(second) == 128 + second
        program.lines()


async def test_a_stop_that_hangs_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, "serving.STOP_S = 0.5" + STOP_HANGS) as program:
        await line_with(program.process, "serving on")
        assert await program.ended(signal.SIGTERM) == 1
        assert "stopping took longer than 0.5 s" in program.lines()[-1]


async def test_a_thread_that_never_returns_does_not_keep_the_process(tmp_path: Path) -> None:
    async with running(tmp_path, THREADS_HANG) as program:
        await line_with(program.process, "serving on")
        assert await program.ended(signal.SIGTERM) == 0
        assert "a thread stands in a call" in program.lines()[-1]


@asynccontextmanager
async def on_a_market(
    folder: Path, changes: str = "", *, speed: float = 60
) -> AsyncIterator[tuple[Program, Stack]]:
    """A service with ``changes``, on a fast sandbox of its own; BTC is live."""
    async with stack_to_start(folder, market_clock(START, speed), BACKFILL_DAYS="0.02") as world:
        settings = {name: value for name, value in world.settings.items() if name != "PORT"}
        async with running(folder, changes, **settings) as program:
            await line_with(program.process, "serving on")
            world.url = program.url
            async with world.http(world.token()) as client:
                added = await client.post("/api/v1/coins", json={"coin": "BTC", "interval": "1m"})
                assert added.status_code == 201
            yield program, world


def deaf(world: Stack) -> websockets.connect:
    """A client that reads nothing, and whose system takes little for it."""
    host, _, port = world.url.removeprefix("http://").partition(":")
    socket_ = socket.socket()
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    socket_.connect((host, int(port)))
    return websockets.connect(
        f"ws://{host}:{port}/ws/data",
        additional_headers={"Authorization": f"Bearer {world.token()}"},
        sock=socket_,
        max_queue=1,
        compression=None,
        close_timeout=0.1,
    )


async def flood(socket_: websockets.ClientConnection) -> None:
    """Ask for more answers than there is room for on their way."""
    for _ in range(3_000):
        await socket_.send(json.dumps({"type": "ping", "request_id": "x" * 64}))


async def test_the_worst_stop_is_as_long_as_its_bounds(tmp_path: Path) -> None:
    bounds = {"main.FINISH_S": 0.6, "main.TELL_S": 0.2, "serving.DRAIN_S": 0.4, "main.END_S": 0.4}
    shorter = "\n".join(f"{name} = {seconds}" for name, seconds in bounds.items())
    hanging = DISK_HANGS + BUFFERS_ARE_SMALL
    async with on_a_market(tmp_path, shorter + hanging) as (program, world):
        feed_of = world.websocket(world.token())
        async with feed_of as listening, deaf(world) as silent, world.http(world.token()) as client:
            feed = Feed(listening)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
            await feed.next_closed()
            await flood(silent)
            # What closes now stands in a disk that does not answer, and then the exchange is mute.
            (tmp_path / "hangs").touch()
            closed = world.clock.now_ms() // MINUTE * MINUTE + MINUTE
            await world.clock.sleep_until(closed + MINUTE // 4)
            await world.fault({"kind": "rest_hang", "seconds": 60})
            asked: dict[str, str | int] = {"coin": "ETH", "start": START - DAY, "end": START}
            request = asyncio.create_task(client.get("/api/v1/history", params=asked))
            await world.clock.sleep_until(closed + MINUTE + MINUTE // 6)
            began = time.monotonic()
            assert await program.ended(signal.SIGTERM) == 0
            took = time.monotonic() - began
            assert took < sum(bounds.values()) + PATIENCE_S + THREADS_S + 1
            await listening.wait_closed()
            assert listening.close_code == 1012
            assert (await request).status_code == 503
    lines = program.lines()
    (cut,) = [line for line in lines if "[error" in line]
    assert "Cancel 2 running task(s)" in cut
    # What has closed was waited for, as long as there was time.
    assert any("stopped_before_all_was_settled" in line for line in lines)
    # The write may still land: until this process is gone nobody else collects.
    assert any("part_left_behind" in line and "the collector's lock" in line for line in lines)


async def test_subscribers_are_told_what_is_stored_before_they_are_closed(tmp_path: Path) -> None:
    # Slow enough for a candle that is late to be later than what closing clients takes.
    async with on_a_market(tmp_path, speed=20) as (program, world):
        async with world.websocket(world.token()) as listening:
            feed = Feed(listening)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
            before = (await feed.next_closed())["timestamp"]
            # The exchange publishes late: what has closed is open when the service is stopped.
            await world.fault({"kind": "candle_late", "after_close": 8, "seconds": 60})
            closed = world.clock.now_ms() // MINUTE * MINUTE + MINUTE
            await world.clock.sleep_until(closed)
            assert await program.ended(signal.SIGTERM) == 0
            told = []
            with suppress(websockets.ConnectionClosed):
                while True:
                    told.append((await feed.next_closed())["timestamp"])
            assert listening.close_code == 1012
        last = closed - MINUTE
        assert told == list(range(before + MINUTE, closed, MINUTE))
        path = document_of(tmp_path / "data", Series("BTC", "BTC/USD", "1m", MINUTE), last)
        assert json.loads(path.read_bytes())["order_book"] is not None
    assert program.lines()


async def test_a_cloud_that_gives_no_answer_does_not_stop_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        key = base64.b64encode(b"a key of the tests").decode()
        account = f"AccountName=account;AccountKey={key};DefaultEndpointsProtocol=http"
        endpoint = f"BlobEndpoint=http://127.0.0.1:{mute.getsockname()[1]}/account"
        async with running(
            tmp_path,
            "main.CLOUD_S = 0.3",
            STORAGE_TYPE="azure",
            STORAGE_ROOT="candles",
            AZURE_STORAGE_CONNECTION_STRING=f"{account};{endpoint}",
        ) as program:
            await line_with(program.process, "serving on")
            status, ready = await program.says("/health/ready")
            assert status == 503
            assert "took longer than 0.3 s" in str(ready["reasons"])
            assert await program.ended(signal.SIGTERM) == 0
            assert [line for line in program.lines() if "started_without_storage" in line]
