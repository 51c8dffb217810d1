"""The sandbox and the service as processes of their own, as a user runs them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import websockets

from auth.module import issue_token
from config import BUILT_IN_EXCHANGES, Settings
from domain.clock import MarketClock

SECRET: Final = "a-secret-of-the-tests-with-32-bytes-or-more"
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0
RUN_TIMEOUT_S: Final = 30.0
TOKEN_S: Final = 86_400


def market_clock(market_ms: int, speed: float) -> MarketClock:
    """A market clock that stands at ``market_ms`` now and runs ``speed`` times as fast."""
    return MarketClock(origin=time.time_ns() // 1_000_000, market=market_ms, speed=speed)


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment without any setting of the service but ``settings``."""
    kept = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
    return {name: os.environ[name] for name in kept if name in os.environ} | settings


def events(log: str, *names: str) -> list[dict[str, Any]]:
    """The events of a log in JSON, those of these names alone where any are given; a line that is
    no event fails, but for the one that is being written."""
    whole, _, _ = log.rpartition("\n")
    found = [json.loads(line) for line in whole.splitlines()]
    return [event for event in found if not names or event["event"] in names]


async def until(what: Callable[[], Awaitable[bool]], *, within_s: float = 60.0) -> None:
    """Ask again until it is so; for what another process says only when it is asked."""
    async with asyncio.timeout(within_s):
        while not await what():  # noqa: ASYNC110  the event is in another process
            await asyncio.sleep(0.1)


@asynccontextmanager
async def program(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    folder: Path,
    ready: str = " on http",
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A module run as a process in ``folder``; yields it and the line that said it is ready."""
    errors = (folder / f"{module}-{time.monotonic_ns()}.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        env=dict(environment),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
    )
    try:
        line = await line_with(process, ready)
        yield process, line
    finally:
        await stop(process)
        errors.close()


async def line_with(process: asyncio.subprocess.Process, text: str) -> str:
    """The next line of standard output that holds ``text``."""
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        while raw := await process.stdout.readline():
            if text in (line := raw.decode()):
                return line.strip()
    raise AssertionError(f"the program ended with {process.returncode} before it said {text!r}")


async def stop(process: asyncio.subprocess.Process, number: int = signal.SIGTERM) -> int:
    """Stop a process and wait for its end; its exit code."""
    if process.returncode is None:
        process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"the program did not end after signal {number}") from None
    assert process.returncode is not None
    return process.returncode


async def completed(
    *command: str, environment: Mapping[str, str], folder: Path, within_s: float
) -> tuple[int | None, str, str]:
    """Run a program in ``folder`` to its end: exit code, output, errors. It never outlives this.

    Raises:
        TimeoutError: it had not ended after ``within_s``.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(environment),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(), errors.decode()


async def run(
    *arguments: str, folder: Path, **settings: str
) -> tuple[int | None, list[str], list[str]]:
    """Run a command of ours to its end: exit code, lines of output, lines of errors."""
    code, output, errors = await completed(
        sys.executable, "-m", "cli", *arguments,
        environment=clean_environment(**settings), folder=folder, within_s=RUN_TIMEOUT_S,
    )  # fmt: skip
    return code, output.splitlines(), errors.splitlines()


@dataclass
class Stack:
    """A sandbox, and a service on it that can be killed and started again."""

    folder: Path
    clock: MarketClock
    sandbox: asyncio.subprocess.Process
    sandbox_url: str
    settings: dict[str, str]
    service: asyncio.subprocess.Process | None = None
    url: str = ""
    _log: int = field(default=0)

    async def start_service(self) -> None:
        self._log += 1
        with (self.folder / f"service-{self._log}.log").open("wb") as errors:
            self.service = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cli",
                "serve",
                env=clean_environment(**self.settings),
                cwd=self.folder,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        if self.settings.get("LOG_FORMAT") == "json":
            self.url = json.loads(await line_with(self.service, '"serving"'))["url"]
        else:
            self.url = (await line_with(self.service, " on http")).rsplit(" ", 1)[-1]

    async def kill_service(self) -> None:
        assert self.service is not None
        self.service.kill()
        await self.service.wait()

    async def stop_service(self) -> int:
        assert self.service is not None
        return await stop(self.service)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("service-*.log")))

    @property
    def storage_root(self) -> Path:
        return self.folder / "data"

    def documents(self, coin_folder: str, exchange: str = "crypto.com") -> list[dict[str, Any]]:
        """Every document of a coin, by name, read from disk and not through the service."""
        folder = self.storage_root / "raw_data" / exchange / coin_folder
        return [json.loads(path.read_bytes()) for path in sorted(folder.rglob("*.json"))]

    def token(self, scope: str = "data:read data:write") -> str:
        """A token as the command line makes it."""
        settings = Settings(_env_file=None, auth_secret=SECRET)
        return issue_token(settings, subject="tester", scope=scope, ttl_s=TOKEN_S)

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        """What ``/health/ready`` answers: the status, and what it says."""
        async with self.http(None) as client:
            answer = await client.get("/health/ready")
            return answer.status_code, answer.json()

    def http(self, token: str | None) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30)

    def websocket(self, token: str) -> websockets.connect:
        return websockets.connect(
            self.url.replace("http", "ws", 1) + "/ws/data",
            additional_headers={"Authorization": f"Bearer {token}"},
            # One that is full would hold up the closing handshake until it is given up.
            max_queue=None,
        )

    async def fault(self, *faults: dict[str, Any]) -> list[int]:
        """Ask the sandbox for faults; their ids."""
        async with httpx.AsyncClient(base_url=self.sandbox_url) as client:
            answer = await client.post("/_control/faults", json=list(faults))
            answer.raise_for_status()
            return [fault["id"] for fault in answer.json()["faults"]]

    async def hits(self) -> dict[int, int]:
        """How much each fault has hit, by its id."""
        async with httpx.AsyncClient(base_url=self.sandbox_url) as client:
            answer = await client.get("/_control/faults")
            return {fault["id"]: fault["hits"] for fault in answer.json()["faults"]}

    async def clear_faults(self) -> None:
        async with httpx.AsyncClient(base_url=self.sandbox_url) as client:
            (await client.delete("/_control/faults")).raise_for_status()


@asynccontextmanager
async def stack(
    folder: Path,
    clock: MarketClock,
    *,
    sandbox_arguments: Sequence[str] = (),
    **settings: str,
) -> AsyncIterator[Stack]:
    """A sandbox and a service on free ports, in a folder of their own; stopped at the end."""
    async with stack_to_start(
        folder, clock, sandbox_arguments=sandbox_arguments, **settings
    ) as running:
        await running.start_service()
        yield running


@asynccontextmanager
async def stack_to_start(
    folder: Path,
    clock: MarketClock,
    *,
    sandbox_arguments: Sequence[str] = (),
    **settings: str,
) -> AsyncIterator[Stack]:
    """The same with a service that is not started yet."""
    environment = clean_environment(MARKET_CLOCK=clock.to_setting())
    async with program(
        "cli",
        "sandbox",
        "--port",
        "0",
        *sandbox_arguments,
        environment=environment,
        folder=folder,
    ) as (sandbox, line):
        sandbox_url = line.rsplit(" ", 1)[-1]
        running = Stack(
            folder=folder,
            clock=clock,
            sandbox=sandbox,
            sandbox_url=sandbox_url,
            settings={
                "PORT": "0",
                "AUTH_SECRET": SECRET,
                "STORAGE_ROOT": str(folder / "data"),
                "STATE_DIR": str(folder / "data"),
                "EXCHANGES": "crypto.com",
                "EXCHANGE_ENDPOINTS": json.dumps(dict.fromkeys(BUILT_IN_EXCHANGES, sandbox_url)),
                "MARKET_CLOCK": clock.to_setting(),
                **settings,
            },
        )
        try:
            yield running
        finally:
            if running.service is not None:
                await running.stop_service()


@dataclass(frozen=True, slots=True)
class History:
    """A range as it was streamed: values by time, what is missing, and where the rows came from."""

    rows: dict[int, tuple[float, ...]]
    gaps: list[dict[str, Any]]
    sources: dict[str, int]
    chunks: int

    def missing(self, step: int) -> dict[int, str]:
        """The periods that were told as missing, and why."""
        return {
            at: gap["reason"] for gap in self.gaps for at in range(gap["start"], gap["end"], step)
        }


class Feed:
    """A WebSocket client that reads messages by what they are."""

    def __init__(self, socket: websockets.ClientConnection, *, patience_s: float = 40.0) -> None:
        self._socket = socket
        self._patience_s = patience_s
        self._passed_over: deque[dict[str, Any]] = deque()

    async def send(self, **message: Any) -> None:
        await self._socket.send(json.dumps(message))

    async def next(self, *kinds: str) -> dict[str, Any]:
        """The next message of one of these types; others wait for whoever asks for them."""
        for message in self._passed_over:
            if message["type"] in kinds:
                self._passed_over.remove(message)
                return message
        async with asyncio.timeout(self._patience_s):
            while True:
                arrived: dict[str, Any] = json.loads(await self._socket.recv())
                if arrived["type"] in kinds:
                    return arrived
                self._passed_over.append(arrived)

    async def next_told(self) -> dict[str, Any]:
        """The next message of a closed candle, or of a gap."""
        while True:
            message = await self.next("realtime_data", "gap")
            if message["type"] == "gap" or message["data"]["closed"]:
                return message

    async def next_closed(self) -> dict[str, Any]:
        """The next closed candle's data."""
        while True:
            message = await self.next_told()
            if message["type"] == "realtime_data":
                data: dict[str, Any] = message["data"]
                return data

    async def next_forming(self) -> dict[str, Any]:
        """The next forming candle's data."""
        while True:
            message = await self.next("realtime_data")
            if not message["data"]["closed"]:
                data: dict[str, Any] = message["data"]
                return data

    async def history(
        self, start: int, end: int, *, chunk_size: int = 1000, **wanted: Any
    ) -> History:
        """Ask for a range in chunks, and read it to its end."""
        asked = {"start": start, "end": end, "chunk_size": chunk_size, "request_id": "history"}
        await self.send(type="request_historical", **asked, **wanted)
        rows: dict[int, tuple[float, ...]] = {}
        chunks = 0
        while True:
            message = await self.next("historical_data_chunk", "historical_data_complete", "error")
            assert message["type"] != "error", message
            assert message["request_id"] == "history"
            if message["type"] == "historical_data_complete":
                assert (message["chunks"], message["count"]) == (chunks, len(rows))
                return History(rows, message["gaps"], message["sources"], chunks)
            assert message["index"] == chunks
            assert message["columns"][0] == "timestamp"
            assert 0 < len(message["rows"]) <= chunk_size
            for at, *values in message["rows"]:
                assert start <= at < end
                assert at > max(rows, default=-1)
                rows[at] = tuple(values)
            chunks += 1
