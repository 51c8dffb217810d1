"""The drill: a service is killed, starved and lied to by a seeded schedule, and judged at the end.

The sandbox and the service are processes of their own, on a fast market clock over recorded
series with real holes. The judge is ``checker.py``, which imports nothing of either.
``CB_TRADE_DRILL=long`` (``make drill``) kills 30 times in place of 5; ``CB_TRADE_DRILL_SEED`` picks
another schedule.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import websockets

from tests.drills.checker import (
    VALUES,
    Connection,
    Row,
    Series,
    Truth,
    check_subscriber,
    compare,
    document_of,
    gaps_told,
    moment_of,
    read_recording,
    read_stored,
)
from tests.drills.schedule import (
    LONG,
    MINUTE,
    SHORT,
    SPEED,
    Schedule,
    make_schedule,
)
from tests.support.processes import Stack, market_clock, stack

FORM: Final = LONG if os.environ.get("CB_TRADE_DRILL") == "long" else SHORT
SEED: Final = int(os.environ.get("CB_TRADE_DRILL_SEED", "1"))
SAMPLES: Final = os.environ.get("CB_TRADE_SAMPLE_DATA")
# Where the captured series has holes and neighbours enough.
START: Final = 1_510_056_000_000  # 2017-11-07T12:00:00Z
# At most so many of the entries that closed while all was up may be without a book.
WITHOUT_BOOK: Final = 0.05

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(60 + FORM.kills * FORM.seconds_a_kill * 2 + 120),
]

GENERATED: Final = (
    Series("TEST", "TEST/USD", "1m", MINUTE),
    Series("SLOW", "SLOW/USD", "5m", 5 * MINUTE),
)
CAPTURED: Final = Series("UNITTEST", "UNITTEST/BTC", "1m", MINUTE)
# The last lines of the service's log that a failure shows.
LOG_LINES: Final = 60
# Candles that the exchange gives at once.
PAGE: Final = 300


def generate(path: Path, series: Series, seed: int) -> None:
    """Record a market that has a hole of one to five periods every thirty or so, and seldom one of
    up to twenty-five."""
    rng = random.Random(f"{seed} {series}")
    price, quiet_until = 50.0, 0
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *VALUES])
        # A day in front, so that what is wanted is not the oldest that there is.
        for at in range(START - 1_440 * MINUTE, START + 2_880 * MINUTE, series.step):
            if at < quiet_until:
                continue
            chance = rng.random()
            if chance < 0.033:
                periods = rng.randint(10, 25) if chance < 0.003 else rng.randint(1, 5)
                quiet_until = at + periods * series.step
                continue
            opened, price = price, round(max(1.0, price + rng.uniform(-0.2, 0.2)), 4)
            high = round(max(opened, price) + rng.uniform(0.001, 0.1), 4)
            low = round(min(opened, price) - rng.uniform(0.001, 0.1), 4)
            writer.writerow([at, opened, high, low, price, round(rng.uniform(0.1, 5), 6)])


def record(folder: Path) -> dict[Series, dict[int, Row]]:
    """Lay the recordings of the drill into a folder; their rows."""
    folder.mkdir()
    paths = {}
    for series in GENERATED:
        paths[series] = folder / f"{series.market.replace('/', '_')}-{series.interval}.csv"
        generate(paths[series], series, SEED)
    if SAMPLES:
        name = "UNITTEST_BTC-1m.feather"
        shutil.copy(Path(SAMPLES) / "candles" / name, folder / name)
        paths[CAPTURED] = folder / name
    return {series: read_recording(path) for series, path in paths.items()}


@dataclass
class Subscriber:
    """A client that connects again whenever it is cut off.

    One that ``resumes`` asks from the period after the newest that it was told; another one takes
    what comes.
    """

    running: Stack
    token: str
    series: Series
    resumes: bool
    connections: list[Connection] = field(default_factory=list)
    next_open: int | None = None

    async def listen(self) -> None:
        """Listen until cancelled."""
        while True:
            # A service that is down refuses, one that is killed breaks off.
            with suppress(OSError, websockets.WebSocketException, TimeoutError):
                await self._connect()
            await asyncio.sleep(0.1)

    async def _connect(self) -> None:
        connection = Connection(self.series, self.next_open if self.resumes else None)
        async with self.running.websocket(self.token) as socket:
            asked = {"type": "subscribe_realtime", "coin": self.series.coin}
            asked |= {"interval": self.series.interval}
            if connection.resumed_from is not None:
                asked["from"] = connection.resumed_from  # type: ignore[assignment]
            await socket.send(json.dumps(asked))
            async for text in socket:
                message = json.loads(text)
                if message["type"] == "subscribed":
                    connection.subscribed = message
                    self.connections.append(connection)
                elif message["type"] == "error":
                    return  # it is still starting, perhaps
                else:
                    connection.messages.append(message)
                    self._note(message)

    def _note(self, message: Mapping[str, Any]) -> None:
        told_until = None
        if message["type"] == "gap" and not message.get("late"):
            told_until = message["end"]
        elif message["type"] == "realtime_data" and message["data"]["closed"]:
            told_until = message["data"]["timestamp"] + self.series.step
        if told_until is not None:
            self.next_open = max(self.next_open or 0, told_until)


class Drill:
    """One drill, from its first moment to its end."""

    def __init__(self, running: Stack, schedule: Schedule, subscribers: list[Subscriber]) -> None:
        self.running = running
        self.schedule = schedule
        self.subscribers = subscribers
        self.asked_for: dict[int, str] = {}

    async def play(self) -> None:
        """Do everything that the schedule says, until the looks are over."""
        async with asyncio.TaskGroup() as group:
            listening = [group.create_task(item.listen()) for item in self.subscribers]
            faults = group.create_task(self._break())
            await self._kill()
            await faults
            await self.running.clock.sleep_until(self.schedule.over)
            for task in listening:
                task.cancel()

    async def _break(self) -> None:
        for timed in self.schedule.faults:
            await self.running.clock.sleep_until(timed.at)
            (number,) = await self.running.fault(dict(timed.fault))
            self.asked_for[number] = timed.fault["kind"]

    async def _kill(self) -> None:
        kills = self.schedule.kills
        for kill, following in zip(kills, [*(kill.at for kill in kills[1:]), None], strict=True):
            await self.running.clock.sleep_until(kill.at)
            await self.running.kill_service()
            await self.running.clock.sleep_until(kill.again)
            await self._start(before=following)

    async def _start(self, *, before: int | None) -> None:
        """Start the service; one that is to be killed before it is up is not waited for."""
        wait = None if before is None else (before - self.running.clock.now_ms()) / SPEED / 1000
        try:
            async with asyncio.timeout(wait) as patience:
                await self.running.start_service()
        except TimeoutError:
            if not patience.expired():
                raise

    async def hits(self) -> Counter[str]:
        """What each kind of fault has hit."""
        found: Counter[str] = Counter(dict.fromkeys(self.asked_for.values(), 0))
        for number, hits in (await self.running.hits()).items():
            found[self.asked_for[number]] += hits
        return found


@asynccontextmanager
async def collecting(
    folder: Path, serieses: Iterable[Series], *, since: int
) -> AsyncIterator[Stack]:
    """The sandbox on the recordings, and a service that collects them."""
    async with stack(
        folder,
        market_clock(START, SPEED),
        sandbox_arguments=("--replay", str(folder / "record")),
        EXCHANGE_QUOTES="USD,BTC",
    ) as running:
        async with running.http(running.token()) as client:
            for series in serieses:
                asked = {"coin": series.coin, "interval": series.interval}
                added = await client.post("/api/v1/coins", json={**asked, "since": since})
                assert added.status_code == 201, added.text
        yield running


async def as_the_exchange_says(
    running: Stack, series: Series, start: int, end: int
) -> dict[int, Row]:
    """The closed candles of a range, asked from the sandbox page by page."""
    found: dict[int, Row] = {}
    async with httpx.AsyncClient(base_url=running.sandbox_url) as client:
        for at in range(start, end, PAGE * series.step):
            answer = await client.get(
                "/exchange/v1/public/get-candlestick",
                params={
                    "instrument_name": series.market.replace("/", "_"),
                    "timeframe": series.interval,
                    "start_ts": at,
                    "end_ts": min(end, at + PAGE * series.step),
                    "count": PAGE,
                },
            )
            for row in answer.raise_for_status().json()["result"]["data"]:
                opened, high, low, close, volume = (float(row[name]) for name in "ohlcv")
                found[row["t"]] = (opened, high, low, close, volume)
    return {at: row for at, row in found.items() if start <= at < end}


async def test_whatever_happens_what_is_stored_and_told_is_what_the_exchange_says(
    tmp_path: Path,
) -> None:
    recorded = record(tmp_path / "record")
    schedule = make_schedule(SEED, FORM, recorded, START)
    async with collecting(tmp_path, recorded, since=schedule.since) as running:
        token = running.token()
        subscribers = [
            Subscriber(running, token, series, resumes)
            for series in recorded
            for resumes in (True, False)
        ]
        drill = Drill(running, schedule, subscribers)
        try:
            await drill.play()
            hits = await drill.hits()
            said = {
                series: await as_the_exchange_says(running, series, *schedule.wanted(series))
                for series in recorded
            }
        except Exception as exc:
            exc.add_note(story(running, schedule, Counter()))
            raise
        stopped = await running.stop_service()

    wrong = [f"no {kind} hit anything" for kind, count in hits.items() if count == 0]
    if stopped != 0:
        wrong.append(f"the service ended with {stopped}")
    folders = {path.name for path in (running.storage_root / "raw_data").glob("*/*")}
    if folders != {series.coin for series in recorded}:
        wrong.append(f"there are folders of {sorted(folders)}")
    bare: list[str] = []
    closed = [0, 0]  # as long as there were faults, and in the hour after them
    for series, rows in recorded.items():
        start, end = schedule.wanted(series)
        truth = Truth.of(rows, schedule.revisions[series])
        if said[series] != truth.final(start, end):
            wrong.append(f"{series}: the sandbox does not say what the schedule made of it")
        stored = read_stored(running.storage_root, series)
        wrong += stored.problems + compare(stored, truth, start, end).told(series)
        up = [at for at in stored.rows if schedule.is_up(at + series.step)]
        for at in up:
            closed[at + series.step > schedule.end] += 1
        bare += [f"{series} {moment_of(at)}" for at in up if at not in stored.with_book]
        listeners = [item for item in subscribers if item.series == series]
        told = gaps_told(connection for item in listeners for connection in item.connections)
        for item in listeners:
            if len(item.connections) <= FORM.kills:
                wrong.append(f"{series}: a subscriber had {len(item.connections)} connections")
            wrong += check_subscriber(item.connections, truth, told, end)
            wrong += not_found_twice(item.connections, truth, told, end)
        wrong += not_found(
            running.storage_root, tmp_path / "planted", series, truth, start=start, end=end
        )
    print(  # noqa: T201  what was measured, for who asks with -s
        f"seed {SEED}, {FORM.name}: {len(schedule.kills)} kills, faults hit {dict(hits)}; "
        f"{len(bare)} of {sum(closed)} entries without a book, {closed[0]} of which closed before "
        f"the faults ended: {', '.join(bare)}"
    )
    if len(bare) > WITHOUT_BOOK * sum(closed) or not all(closed):
        wrong.append(
            f"of {closed} entries that closed while all was up these have no book: "
            f"{', '.join(bare)}"
        )
    assert not wrong, "\n".join([*wrong, "", story(running, schedule, hits)])


def story(running: Stack, schedule: Schedule, hits: Mapping[str, int]) -> str:
    """What happened, for who has to find out why."""
    log = [line for line in running.logs().splitlines() if line and "[uvicorn." not in line]
    return "\n".join(
        [
            f"seed {schedule.seed}, {FORM.name}; faults hit {dict(hits)}",
            schedule.told(),
            f"the last of {len(log)} lines that the service logged ({running.folder}):",
            *log[-LOG_LINES:],
        ]
    )


def not_found(
    root: Path, planted: Path, series: Series, truth: Truth, *, start: int, end: int
) -> list[str]:
    """What the checker does not find of what is planted into a copy: it would find nothing."""
    shutil.rmtree(planted, ignore_errors=True)
    shutil.copytree(root / "raw_data", planted / "raw_data")
    before = compare(read_stored(planted, series), truth, start, end)
    final = sorted(truth.final(start, end))
    gone, changed = final[len(final) // 3], final[len(final) // 2]
    hole = next(at for at in range(start, end, series.step) if at not in truth.versions)
    document_of(planted, series, gone).unlink()
    change(document_of(planted, series, changed), volume=123456.0)
    extra = document_of(planted, series, hole)
    extra.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(document_of(planted, series, changed), extra)
    change(extra, timestamp=hole, order_book=None)
    after = compare(read_stored(planted, series), truth, start, end)
    expected = {"missing": gone, "different": changed, "extra": hole}
    return [
        f"{series}: what was planted at {moment_of(at)} was not found to be {kind}"
        for kind, at in expected.items()
        if at not in set(getattr(after, kind)) - set(getattr(before, kind))
    ]


def not_found_twice(
    connections: list[Connection], truth: Truth, told: frozenset[int], end: int
) -> list[str]:
    """What the checker does not find of a candle that is told once more at the end."""
    last = connections[-1]
    again = next(
        message
        for message in last.messages
        if message["type"] == "realtime_data" and message["data"]["closed"]
    )
    number = sum(message["type"] != "status" for message in last.messages) + 1
    planted = replace(last, messages=[*last.messages, {**again, "sequence": number}])
    found = check_subscriber([planted], truth, told, end)
    if any("told twice" in problem or "told late after" in problem for problem in found):
        return []
    return [f"{last.series}: a candle that was told twice was not found"]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
