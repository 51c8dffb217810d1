"""200 targets of 5m on one process, against the sandbox exchange: how they resume, and what an
outage costs the exchange. Real processes, a recorded market of 200 coins.

1. Resume: all documents are there, the service was killed, and is started again some market
   minutes later: seconds from the start of the process until ``list_coins`` says ``live`` of every
   target and every closed period is stored. The sandbox takes 10 ms an answer. Yardstick: ccxt
   asking for the same markets one by one, and ``json.dump`` of the documents, in the same run.
2. Rate limit: the same against a sandbox that answers 429 above 100 requests a second, and then
   the outage: how often it did, and the most requests of any second.
3. Outage: nothing can be connected to for 10 market minutes; what reaches the exchange in a real
   second of it, what a target costs in the market minute after it, and until all is settled.

At real speed, which is the honest figure, it takes a quarter of an hour. ``--speed 5`` takes four
minutes, but back-off goes by real time: the market minute after the outage is over then before the
exchange is probed for the first time. The outage ends ``--ends`` seconds into a period; with 270
there is a close in the minute after it. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ccxt.async_support
import httpx

from domain.clock import MarketClock
from reconciliation.worker import RUNNERS
from storage.path_utility import StoragePathUtility
from target_management.manager import TargetManager

# The processes are started as tests start them.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.processes import Stack, market_clock, run, stack_to_start
from tests.support.targets import make_target

COUNT = 200
COINS = [f"T{number:03d}" for number in range(COUNT)]
MINUTE = 60_000
FIVE = 5 * MINUTE
HOUR = 60 * MINUTE
NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
SINCE = NOON - 3 * HOUR
RECORDED_FROM, RECORDED_TO = NOON - 24 * HOUR, NOON + 24 * HOUR
AWAY_MS = 12 * MINUTE
OUTAGE_MS = 10 * MINUTE
# Where in its period the first process begins to collect (market ms).
INTO_PERIOD_MS = 30_000
DELAY_MS = 10
RATE = 100
RESUME_BAR_S = 60.0
MOST_A_TARGET = 3
SOCKET_PATH = "/exchange/v1/market"
LOOK_EVERY_S = 0.5
PATIENCE_S = 600.0


def record(folder: Path) -> None:
    """Two days of 5m of every market, as the sandbox replays them."""
    for coin in COINS:
        rng = random.Random(coin)
        close = rng.uniform(1, 1000)
        with (folder / f"{coin}_USD-5m.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("date", "open", "high", "low", "close", "volume"))
            for at in range(RECORDED_FROM, RECORDED_TO, FIVE):
                opened, close = close, round(close * rng.uniform(0.995, 1.005), 4)
                high, low = max(opened, close) * 1.001, min(opened, close) * 0.999
                rows.writerow((at, opened, high, low, close, round(rng.uniform(1, 9), 4)))


async def add_targets(folder: Path, clock: MarketClock) -> None:
    """Every market is a target, from three hours ago on."""
    table = TargetManager("local", str(folder / "data/targets_delta"), None, clock)
    try:
        await table.open()
        for coin in COINS:
            await table.add_target(make_target(coin, since=SINCE, now=NOON))
    finally:
        await table.close()


@dataclass
class Traffic:
    """What reached the sandbox between two moments."""

    rest: int
    sockets: int
    by_market: dict[str, int]
    too_many: int
    paths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def between(cls, before: dict[str, Any], after: dict[str, Any]) -> Traffic:
        paths = difference(before["requests"], after["requests"])
        sockets = paths.pop(SOCKET_PATH, 0)
        statuses = difference(before["statuses"], after["statuses"])
        return cls(
            rest=sum(paths.values()),
            sockets=sockets,
            by_market=difference(before["markets"], after["markets"]),
            too_many=statuses.get("429", 0),
            paths={path.rpartition("/")[2]: count for path, count in paths.items()},
        )

    @property
    def most_a_market(self) -> int:
        return max(self.by_market.values(), default=0)


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in grown.items() if count}


class World:
    """The processes of one phase, and where everything lies."""

    def __init__(self, folder: Path, running: Stack) -> None:
        self.running = running
        self._folder = folder
        self._found: set[str] = set()

    @property
    def clock(self) -> MarketClock:
        return self.running.clock

    async def stats(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self.running.sandbox_url, timeout=30) as client:
            answer: dict[str, Any] = (await client.get("/_control/stats")).json()
            return answer

    async def start(self) -> tuple[float, float]:
        """Start the service: seconds until all of it is live and stored, and how much of them the
        service computed."""
        began = time.perf_counter()
        await self.running.start_service()
        await self.until_settled()
        assert self.running.service is not None
        return time.perf_counter() - began, processor_s(self.running.service.pid)

    async def until_settled(self) -> None:
        """Until every target is live and every period that has closed by then is stored."""
        token = self.running.token()
        async with asyncio.timeout(PATIENCE_S), self.running.http(token) as client:
            while True:
                targets = (await client.get("/api/v1/coins")).json()["targets"]
                live = sum(target["state"] == "live" for target in targets)
                if live == COUNT and self.is_stored(self.clock.now_ms()):
                    return
                await asyncio.sleep(LOOK_EVERY_S)

    def is_stored(self, now_ms: int) -> bool:
        """Whether there is a document of every wanted period that is over."""
        for period in range(SINCE, now_ms // FIVE * FIVE, FIVE):
            for coin in COINS:
                path = StoragePathUtility.get_raw_data_path("crypto.com", coin, period)
                if path not in self._found:
                    if not (self._folder / "data" / path).exists():
                        return False
                    self._found.add(path)
        return True

    def computed_s(self) -> tuple[float, float]:
        """Processor seconds of the service and of the sandbox."""
        assert self.running.service is not None
        return processor_s(self.running.service.pid), processor_s(self.running.sandbox.pid)


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def world(folder: Path, clock: MarketClock, *options: str) -> AsyncIterator[World]:
    """A sandbox that stands at this time, and a service that is not started yet."""
    arguments = ("--replay", str(folder / "recording"), "--answer-delay-ms", str(DELAY_MS))
    async with stack_to_start(
        folder,
        clock,
        sandbox_arguments=(*arguments, *options),
        LOG_LEVEL="WARNING",
    ) as running:
        yield World(folder, running)


async def by_hand(world: World, folder: Path) -> tuple[float, int]:
    """The yardstick: the same markets, one request after the other, each row a file."""
    exchange = ccxt.async_support.cryptocom({"enableRateLimit": False})
    exchange.has["fetchCurrencies"] = False
    exchange.urls["api"] = {
        key: address.replace("https://api.crypto.com", world.running.sandbox_url)
        for key, address in exchange.urls["api"].items()
    }
    before = await world.stats()
    began = time.perf_counter()
    try:
        for coin in COINS:
            now = world.clock.now_ms()
            rows = await exchange.fetch_ohlcv(
                f"{coin}/USD", "5m", None, 300, {"start_ts": now - AWAY_MS - FIVE, "end_ts": now}
            )
            for row in rows:
                with (folder / f"{coin}-{row[0]}.json").open("w") as file:
                    json.dump(row, file)
    finally:
        await exchange.close()
    took = time.perf_counter() - began
    return took, Traffic.between(before, await world.stats()).rest


class Bars:
    """Prints figures, and remembers whether a bar was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def show(self, text: str, *, met: bool | None = None) -> None:
        self.missed += met is False
        print(text + ("" if met is None else "  [met]" if met else "  [MISSED]"), flush=True)


def busiest(stats: dict[str, Any], seconds: Iterable[int]) -> int:
    """The most REST requests of one of these real seconds."""
    wanted = set(seconds)
    return max(
        (
            second["requests"] - second["by_path"].get(SOCKET_PATH, 0)
            for second in stats["per_second"]
            if second["second"] in wanted
        ),
        default=0,
    )


def real_second() -> int:
    return int(time.time())


async def resume(folder: Path, speed: float, bars: Bars) -> int:
    """Collect, be killed, and resume without a rate limit; the market time at its end."""
    clock = market_clock(NOON + INTO_PERIOD_MS, speed)
    async with world(folder, clock) as first:
        await add_targets(folder, clock)
        took, computed = await first.start()
        traffic = Traffic.between(NO_STATS, await first.stats())
        bars.show(
            f"from nothing, three hours each: {took:.1f} s, of which the service computed "
            f"{computed:.1f} s; {traffic.rest} requests"
        )
        await first.running.kill_service()
        now = clock.now_ms()
    clock = market_clock(now + AWAY_MS, speed)
    async with world(folder, clock) as second:
        took, computed = await second.start()
        traffic = Traffic.between(NO_STATS, await second.stats())
        await second.running.kill_service()
        theirs, requests = await by_hand(second, folder / "by-hand")
        bars.show(
            f"resume to fully live after {AWAY_MS // MINUTE} minutes: {took:.1f} s, of which the "
            f"service computed {computed:.1f} s; bar {RESUME_BAR_S:.0f} s",
            met=took < RESUME_BAR_S,
        )
        bars.show(
            f"  {traffic.rest} requests {traffic.paths}, {traffic.sockets} socket; ccxt, one by "
            f"one, not synced: {theirs:.1f} s for {requests}; ratio {took / theirs:.2f}; bare "
            f"answer times of ours one by one: {traffic.rest * DELAY_MS / 1000:.1f} s"
        )
        return clock.now_ms()


async def outage(folder: Path, now: int, speed: float, ends_ms: int, bars: Bars) -> None:
    """Resume under a rate limit, lose the exchange, and find it again ``ends_ms`` into a period."""
    now = now // FIVE * FIVE + 2 * FIVE + INTO_PERIOD_MS
    clock = market_clock(now, speed)
    async with world(folder, clock, "--rate-limit", str(RATE)) as limited:
        began = real_second()
        took, _ = await limited.start()
        stats = await limited.stats()
        resumed = real_second()
        most, refused = busiest(stats, range(began, resumed + 1)), stats["statuses"].get("429", 0)
        bars.show(
            f"resume under {RATE} requests/s: {took:.1f} s, at most {most} in a second, "
            f"{refused} x 429",
            met=most <= RATE and not refused,
        )
        # It begins where it ends: it is two periods long.
        now = clock.now_ms()
        await clock.sleep_until(now + (ends_ms - now) % FIVE)
        await during(limited, clock, bars)
        await after(limited, clock, bars, resumed)
        code, lines, _ = await run(
            "verify", "--days", "0.1", folder=folder, **limited.running.settings
        )
        bars.show(f"verify: {lines[-1] if lines else code}", met=code == 0)


async def during(limited: World, clock: MarketClock, bars: Bars) -> None:
    """The outage itself."""
    before, computed = await limited.stats(), limited.computed_s()
    began, until = real_second(), clock.now_ms() + OUTAGE_MS
    await limited.running.fault(
        {"kind": "refuse_connections"}, {"kind": "ws_refuse"}, {"kind": "drop_sockets"}
    )
    await clock.sleep_until(until)
    after, seconds = await limited.stats(), real_second() - began
    lost = Traffic.between(before, after)
    mine, _ = (late - early for late, early in zip(limited.computed_s(), computed, strict=True))
    # What was sent before the exchange was known to be away is no probe: at most as many jobs, and
    # as many books, as are under way at once.
    noticed = next(
        (
            item["second"]
            for item in after["per_second"]
            if item["second"] > began and item["requests"] > item["by_path"].get(SOCKET_PATH, 0)
        ),
        began,
    )
    early = [item for item in after["per_second"] if began <= item["second"] <= noticed + 1]
    later = [item for item in after["per_second"] if item["second"] > max(began + 5, noticed + 1)]
    under_way = max((count for item in early for count in item["by_path"].values()), default=0)
    most = max((count for item in later for count in item["by_path"].values()), default=0)
    probes = sum(item["requests"] for item in later)
    bars.show(
        f"outage of {OUTAGE_MS // MINUTE} market minutes: {lost.rest} requests {lost.paths} and "
        f"{lost.sockets} connection attempts; until it is noticed at most {under_way} of a kind in "
        f"a second, bar {RUNNERS} under way",
        met=under_way <= RUNNERS + 2,
    )
    bars.show(
        f"  then {probes / seconds:.2f} probes a second, at most {most} of a kind in one; bar 1 at "
        f"a time, so 2 where one fails at once",
        met=most <= 2,
    )
    bars.show(f"  the service computed {mine:.1f} s of {seconds} s")


async def after(limited: World, clock: MarketClock, bars: Bars, resumed: int) -> None:
    """The minute after the outage, and until everything is settled again."""
    before, ended, computed = await limited.stats(), clock.now_ms(), limited.computed_s()
    began = time.perf_counter()
    await limited.running.clear_faults()
    settled = asyncio.create_task(limited.until_settled())
    try:
        await clock.sleep_until(ended + MINUTE)
        minute = Traffic.between(before, await limited.stats())
        await settled
    finally:
        settled.cancel()
    took, stats = time.perf_counter() - began, await limited.stats()
    whole = Traffic.between(before, stats)
    bars.show(
        f"in the market minute after it: {minute.rest} requests {minute.paths} and "
        f"{minute.sockets} connection attempts, {minute.rest / COUNT:.2f} a target, at most "
        f"{minute.most_a_market} of one; bar {MOST_A_TARGET}",
        met=minute.rest <= MOST_A_TARGET * COUNT and minute.most_a_market <= MOST_A_TARGET,
    )
    mine, theirs = (
        late - early for late, early in zip(limited.computed_s(), computed, strict=True)
    )
    bars.show(
        f"  settled again within {took:.1f} s (the minute at least), {whole.rest} requests "
        f"{whole.paths} by then, at most {whole.most_a_market} of a target; the service computed "
        f"{mine:.1f} s, the sandbox {theirs:.1f} s"
    )
    most, refused = (
        busiest(stats, range(resumed, real_second() + 1)),
        stats["statuses"].get("429", 0),
    )
    bars.show(
        f"outage and recovery under {RATE} requests/s: at most {most} in a second, {refused} x 429",
        met=most <= RATE and not refused,
    )


NO_STATS: dict[str, Any] = {"requests": {}, "markets": {}, "statuses": {}}


async def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", type=float, default=1.0, help="of the market's clock")
    parser.add_argument(
        "--ends", type=int, default=90, metavar="S", help="where in its period the outage ends"
    )
    parser.add_argument("--only", choices=("resume",), help="without the outage")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    bars = Bars()
    try:
        for name in ("recording", "by-hand", "data"):
            (folder / name).mkdir()
        record(folder / "recording")
        now = await resume(folder, options.speed, bars)
        if options.only is None:
            await outage(folder, now, options.speed, options.ends * 1000, bars)
    finally:
        shutil.rmtree(folder)
    return 1 if bars.missed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
