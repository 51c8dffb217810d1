"""The drill of stops: a service under load is asked to stop, again and again, at seeded moments.

Nothing that a client was told may be missing afterwards: a closed candle that a subscriber got, a
coin whose adding was answered; and what had closed is stored with its book. Each stop takes less
than ten seconds, ends with exit code 0 and without a traceback, and closes subscribers with 1012.
In some rounds the exchange says nothing meanwhile, in some it publishes late what closes at the
moment of the stop, and in some the service still starts. ``CB_TRADE_DRILL=long`` (``make drill``)
has 100 rounds in place of 4; ``CB_TRADE_DRILL_SEED`` picks other moments.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import websockets
from deltalake import DeltaTable

from tests.drills.checker import VALUES, Series, document_of, moment_of
from tests.support.market import MINUTE
from tests.support.processes import Stack, market_clock, run, stack_to_start, until

LONG: Final = os.environ.get("CB_TRADE_DRILL") == "long"
ROUNDS: Final = 100 if LONG else 4
SEED: Final = int(os.environ.get("CB_TRADE_DRILL_SEED", "1"))
# A minute of the market takes three real seconds: a candle that is published late is late by more
# than what a server takes to close its clients.
SPEED: Final = 20
SECOND: Final = SPEED * 1_000
"""A real second, in market ms."""
START: Final = 1_763_985_600_000
STOP_WITHIN_S: Final = 10.0
PATIENCE_S: Final = 40.0
# When a service is asked to stop (real seconds): after its clients are there, after it listens.
WHILE_RUNNING_S: Final = (0.2, 3.0)
WHILE_STARTING_S: Final = (0.0, 1.0)
# How long after its first answers a service has live books (market ms).
FEED_AFTER_MS: Final = SECOND
# At most so many of the candles that had just closed may be without a book: it must be of the same
# half of a second as the close, which a busy machine misses now and then.
WITHOUT_BOOK: Final = 0.05
# How long after its end a candle is published when it is late (market seconds), and within which
# part of that the service is asked to stop (real seconds).
LATE_BY: Final = 8
WHILE_LATE_S: Final = (0.0, 0.2)
RESTARTED: Final = 1012

SUBSCRIBED: Final = tuple(
    Series(coin, f"{coin}/USD", interval, step)
    for coin, interval, step in (
        ("BTC", "1m", MINUTE),
        ("ETH", "1m", MINUTE),
        ("SOL", "1m", MINUTE),
        ("XRP", "5m", 5 * MINUTE),
    )
)
# What is added, one a round as long as there is any.
ADDED: Final = tuple(
    (coin, interval) for interval in ("5m", "15m", "1h") for coin in ("ADA", "DOGE", "BTC", "ETH")
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120 + ROUNDS * 15)]


@dataclass
class Listener:
    """A subscriber of one series: what it was told as closed, and how it was closed."""

    series: Series
    told: dict[int, dict[str, Any]] = field(default_factory=dict)
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    close_code: int | None = None

    async def listen(self, running: Stack, token: str) -> None:
        async with running.websocket(token) as socket_:
            asked = {"coin": self.series.coin, "interval": self.series.interval}
            await socket_.send(json.dumps({"type": "subscribe_realtime", **asked}))
            with suppress(websockets.ConnectionClosed):
                async for text in socket_:
                    message = json.loads(text)
                    assert message["type"] != "error", message
                    if message["type"] == "subscribed":
                        self.subscribed.set()
                    elif message["type"] == "realtime_data" and message["data"]["closed"]:
                        self.told[message["data"]["timestamp"]] = message["data"]
            self.close_code = socket_.close_code


@dataclass
class Tally:
    """What was seen over all rounds."""

    exits: list[float] = field(default_factory=list)
    while_starting: int = 0
    while_mute: int = 0
    while_late: int = 0
    requests: int = 0
    cut: int = 0
    told: dict[tuple[Series, int], dict[str, Any]] = field(default_factory=dict)
    added: set[tuple[str, str]] = field(default_factory=set)
    just_closed: int = 0
    bare: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def story(self) -> str:
        lost = sum("lost" in problem for problem in self.problems)
        tracebacks = sum("traceback" in problem for problem in self.problems)
        return (
            f"stops, seed {SEED}: {len(self.exits)} rounds ({self.while_starting} while starting, "
            f"{self.while_mute} with a mute exchange, {self.while_late} with a late one), "
            f"slowest exit {max(self.exits):.2f} s; "
            f"{len(self.told)} closed candles told, {len(self.added)} coins added, {lost} lost; "
            f"{self.just_closed} periods had closed just before, all stored, {len(self.bare)} "
            f"without a book {self.bare}; "
            f"{self.requests} requests, {self.cut} cut off; {tracebacks} tracebacks"
        )


class Stops:
    """Starts and stops one service, with clients on it."""

    def __init__(self, running: Stack, rng: random.Random) -> None:
        self.running = running
        self.rng = rng
        self.token = running.token()
        self.tally = Tally()
        self.to_add = list(ADDED)
        self.read: set[Path] = set()

    async def round(self, number: int) -> None:
        """One start and its stop; the first finds nothing, and sets everything up."""
        if number % 5 == 3:
            await self._stop_while_starting()
        else:
            await self._stop_while_running(mute=number % 7 == 2, late=number % 2 == 1)
        for log in set(self.running.folder.glob("service-*.log")) - self.read:
            self.read.add(log)
            if "Traceback" in log.read_text():
                self._wrong(f"round {number}: a traceback in {log}")

    async def _stop_while_starting(self) -> None:
        starting = asyncio.create_task(self.running.start_service())
        await until(self._listens)
        await asyncio.sleep(self.rng.uniform(*WHILE_STARTING_S))
        await self._stop()
        self.tally.while_starting += 1
        with suppress(AssertionError):  # it ended before it served, or not
            await starting

    async def _stop_while_running(self, *, mute: bool, late: bool) -> None:
        await self.running.start_service()
        listeners = [Listener(series) for series in (*SUBSCRIBED, *SUBSCRIBED[:2])]
        stopping = asyncio.Event()
        served_at = asked_at = 0
        async with asyncio.TaskGroup() as group:
            for listener in listeners:
                group.create_task(listener.listen(self.running, self.token))
            async with asyncio.timeout(PATIENCE_S):
                for listener in listeners:
                    await listener.subscribed.wait()
            served_at = self.running.clock.now_ms()
            for series in SUBSCRIBED[:3]:
                group.create_task(self._ask_for_history(series, stopping))
            group.create_task(self._stream_history(SUBSCRIBED[0], stopping))
            if self.to_add:
                group.create_task(self._add(*self.to_add.pop(0)))
            await asyncio.sleep(self.rng.uniform(*WHILE_RUNNING_S))
            if mute:
                await self.running.fault({"kind": "rest_hang", "seconds": 30})
            elif late:
                await self._until_late()
                self.tally.while_late += 1
            stopping.set()
            asked_at = self.running.clock.now_ms()
            await self._stop()
        await self.running.clear_faults()
        for listener in listeners:
            if listener.close_code != RESTARTED:
                self._wrong(f"{listener.series}: closed with {listener.close_code}")
            self.tally.told |= {(listener.series, at): data for at, data in listener.told.items()}
            self._check_told(listener.series, listener.told)
        if mute:
            self.tally.while_mute += 1
        else:
            self._check_just_closed(served_at, asked_at)
        self._check_added()

    async def _until_late(self) -> None:
        """Wait until a period has closed whose candle the exchange has not published."""
        clock = self.running.clock
        late = {"kind": "candle_late", "after_close": LATE_BY, "seconds": 30}
        await self.running.fault(late)
        await clock.sleep_until(clock.now_ms() // MINUTE * MINUTE + MINUTE)
        await asyncio.sleep(self.rng.uniform(*WHILE_LATE_S))

    async def _stop(self) -> None:
        service = self.running.service
        assert service is not None
        began = time.monotonic()
        service.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * STOP_WITHIN_S):
            code = await service.wait()
        took = time.monotonic() - began
        self.tally.exits.append(took)
        if code != 0 or took > STOP_WITHIN_S:
            self._wrong(f"a stop ended with exit code {code} after {took:.1f} s")

    async def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(self.running.settings["PORT"]))) == 0

    # -- the load ---------------------------------------------------------------------------

    async def _ask_for_history(self, series: Series, stopping: asyncio.Event) -> None:
        """Ask again and again; only a service that stops may leave somebody without an answer."""
        now = self.running.clock.now_ms()
        asked: dict[str, str | int] = {"coin": series.coin, "interval": series.interval}
        asked |= {"start": now - 6 * 60 * MINUTE, "end": now, "limit": 5000}
        async with self.running.http(self.token) as client:
            while not stopping.is_set():
                try:
                    answer = await client.get("/api/v1/history", params=asked)
                    self.tally.requests += 1
                    assert answer.status_code in (200, 503), answer.text
                except httpx.TransportError:
                    assert stopping.is_set()
                    self.tally.cut += 1

    async def _stream_history(self, series: Series, stopping: asyncio.Event) -> None:
        asked = {"coin": series.coin, "interval": series.interval}
        with suppress(websockets.ConnectionClosed):
            async with self.running.websocket(self.token) as socket_:
                while not stopping.is_set():
                    now = self.running.clock.now_ms()
                    asked_for = asked | {"start": now - 6 * 60 * MINUTE, "end": now}
                    await socket_.send(json.dumps({"type": "request_historical", **asked_for}))
                    while True:
                        message = json.loads(await socket_.recv())
                        assert message["type"] != "error", message
                        if message["type"] == "historical_data_complete":
                            self.tally.requests += 1
                            break

    async def _add(self, coin: str, interval: str) -> None:
        try:
            async with self.running.http(self.token) as client:
                answer = await client.post(
                    "/api/v1/coins", json={"coin": coin, "interval": interval}
                )
        except httpx.TransportError:
            self.tally.cut += 1
            return
        if answer.is_success:
            self.tally.added.add((coin, interval))

    # -- what must be there -----------------------------------------------------------------

    def _check_told(self, series: Series, told: dict[int, dict[str, Any]]) -> None:
        for at, data in told.items():
            path = document_of(self.running.storage_root, series, at)
            if not path.exists():
                self._wrong(f"{series}: {moment_of(at)} was told and is lost")
                continue
            stored = json.loads(path.read_bytes())
            same = all(stored[name] == data[name] for name in VALUES)
            if stored["revision"] < data["revision"] or (
                stored["revision"] == data["revision"] and not same
            ):
                self._wrong(f"{series}: {moment_of(at)} was told and is lost: {data}, {stored}")

    def _check_just_closed(self, served_at: int, asked_at: int) -> None:
        """What had closed when the service was asked to stop is stored, with its book if there
        was a feed by then."""
        for series in SUBSCRIBED:
            close = asked_at // series.step * series.step
            if asked_at - close > MINUTE:
                continue  # long settled
            at = close - series.step
            path = document_of(self.running.storage_root, series, at)
            if not path.exists():
                self._wrong(f"{series}: {moment_of(at)} had closed and was not stored")
            elif close > served_at + FEED_AFTER_MS:
                self.tally.just_closed += 1
                if json.loads(path.read_bytes())["order_book"] is None:
                    self.tally.bare.append(f"{series} {moment_of(at)}")

    def _check_added(self) -> None:
        table = DeltaTable(self.running.storage_root / "targets_delta").to_pyarrow_table()
        rows = {(row["coin"], row["interval"]) for row in table.to_pylist()}
        for coin, interval in sorted(self.tally.added - rows):
            self._wrong(f"{coin} {interval} was added and is lost")

    def check_all(self) -> None:
        """Everything that was ever told is still there."""
        for (series, at), data in self.tally.told.items():
            self._check_told(series, {at: data})

    def _wrong(self, what: str) -> None:
        self.tally.problems.append(what)


async def until_settled(running: Stack) -> None:
    async def live() -> bool:
        async with running.http(running.token()) as client:
            targets = (await client.get("/api/v1/coins")).json()["targets"]
            return all(target["state"] == "live" for target in targets)

    await until(live, within_s=60 + ROUNDS)


def tell(*lines: str) -> None:
    """What ``-s`` shows."""
    sys.stdout.write("".join(f"\n{line}" for line in lines))


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


async def test_whenever_a_service_is_stopped_nothing_that_was_told_is_lost(
    tmp_path: Path,
) -> None:
    async with stack_to_start(
        tmp_path,
        market_clock(START, SPEED),
        PORT=free_port(),
        BACKFILL_DAYS="0.05",
        EXCHANGE_QUOTES="USD",
    ) as running:
        stops = Stops(running, random.Random(SEED))
        for number in range(ROUNDS):
            await stops.round(number)
        stops.check_all()
        tell(stops.tally.story())
        assert stops.tally.problems == []
        assert stops.tally.told
        assert len(stops.tally.bare) <= max(1, WITHOUT_BOOK * stops.tally.just_closed)

        await running.start_service()
        await until_settled(running)
        code, lines, errors = await run("verify", folder=tmp_path, **running.settings)
        tell(*lines)
        counted = re.search(r"(\d+) checked, 0 missing, 0 different, 0 extra", lines[-1])
        assert counted is not None, lines + errors
        assert code == 0
