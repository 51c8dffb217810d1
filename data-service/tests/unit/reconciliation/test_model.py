"""The promise, as a model: whatever happens, what is stored ends as the exchange's series.

Any order of faults of the exchange and of storage, of time passing, corrections, late candles, lost
documents and ledgers, and restarts. What exchanges are assumed to keep to: they publish and correct
a candle within an hour of its end by their own clock, and leave a row out of one answer, not out of
every one.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from domain.candle import Candle
from domain.gap import GapReason
from domain.time_range import TimeRange
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeUnavailable,
    HistoricalData,
    Priority,
)
from reconciliation.interfaces import SettleReport
from reconciliation.series_state import SeriesState
from reconciliation.settler import asking, settle
from storage.interfaces import StorageError, StorageUnavailable, Timestamp
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.market import BTC_5M, DAY, FIVE, HOUR, MINUTE, T0, candles
from tests.support.storage import InMemoryStorage

LEDGER = StoragePathUtility.get_ledger_path("crypto.com", "BTC", interval="5m")
PAGE = 16
MARKET = candles(T0 - FIVE, 1_500)
ERRORS: tuple[ExchangeError, ...] = (
    ExchangeUnavailable("503"),
    ExchangeRateLimited("429", retry_after=1.0),
    BadExchangeAnswer("half a document"),
)
Listed = dict[int, Candle]


@dataclass
class FaultyExchange(FakeExchange):
    """A fake exchange with faults that are told in numbers of answers.

    ``fails_after`` answers it gives ``error``; ``leaves_out`` of the rows of the next answer are
    missing in it, and in that one alone.
    """

    error: ExchangeError | None = None
    fails_after: int = 0
    leaves_out: int = 0
    seed: int = 0
    left_out_before: set[int] = field(default_factory=set)

    async def fetch_historical_data(
        self,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        if self.error is not None:
            if self.fails_after <= 0:
                raise self.error
            self.fails_after -= 1
        rows = self.candles[market, interval]
        seen = [
            at
            for at in range(start, end, FIVE)
            if at in rows
            and at not in self.left_out_before
            and (market, interval, at) not in self.publish_at
        ]
        left_out = random.Random(self.seed).sample(seen, min(self.leaves_out, len(seen)))
        self.leaves_out = 0
        self.left_out_before.update(left_out)
        self.candles[market, interval] = {at: row for at, row in rows.items() if at not in left_out}
        try:
            return await super().fetch_historical_data(
                market, interval, start, end, priority=priority
            )
        finally:
            self.candles[market, interval] = rows


class Killed(Exception):
    """The process has ended at this point."""


class FaultyStorage(InMemoryStorage):
    """A storage that may write part of a batch before it fails, or may only refuse to write."""

    writes_before_failing: int | None = None
    write_error: Exception = StorageUnavailable("full")

    async def save_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        entries: Sequence[tuple[Timestamp, Mapping[str, Any]]],
        *,
        interval: str = "5m",
        expected: Mapping[int, str] | None = None,
    ) -> int:
        written = entries
        if self.writes_before_failing is not None:
            written = entries[: self.writes_before_failing]
            self.writes_before_failing -= len(written)
        size = await super().save_entries(
            exchange_name, coin_symbol, written, interval=interval, expected=expected
        )
        if len(written) < len(entries):
            raise self.write_error
        return size

    async def write_blob(self, path: str, content: bytes) -> None:
        if self.writes_before_failing is not None:
            raise self.write_error
        await super().write_blob(path, content)


class World:
    """An exchange, a storage, a clock, and a process that is killed and started again."""

    def __init__(self, holes: set[int], offset_ms: int) -> None:
        self.clock = ManualClock(T0 + 2 * HOUR)
        self.exchange = FaultyExchange(self.clock, history_page=PAGE, time_offset_ms=offset_ms)
        # A candle before what is wanted, and always newer ones: what is quiet can be proven.
        self.exchange.put(
            "BTC/USD", "5m", (item for at, item in enumerate(MARKET) if at not in holes)
        )
        self.raw = FaultyStorage()
        self.old_ledgers: list[bytes | None] = [None]
        self.revisions: dict[int, int] = {}
        self.end = T0
        self.start()

    @property
    def listed(self) -> Listed:
        return self.exchange.candles["BTC/USD", "5m"]

    def start(self) -> None:
        self.storage = StorageManagerImpl(self.raw)
        self.state = SeriesState(BTC_5M, "BTC/USD", self.storage, self.clock)

    # -- what may happen --------------------------------------------------------------------

    async def pass_a_little(self, amount: int) -> None:
        await self.clock.advance(amount % 8 * MINUTE)

    async def pass_minutes(self, amount: int) -> None:
        await self.clock.advance(amount * MINUTE)

    async def pass_hours(self, amount: int) -> None:
        await self.clock.advance(amount % 4 * HOUR)

    async def correct(self, amount: int) -> None:
        """Correct the candle of a period that ended less than an hour ago, by the exchange."""
        period = BTC_5M.interval.floor(self.exchange_now) - (1 + amount % 12) * FIVE
        if period in self.listed and self.exchange_now - (period + FIVE) < HOUR:
            self.listed[period] = replace(self.listed[period], volume=float(amount + 2))

    async def publish_late(self, amount: int) -> None:
        """Hold the candle of the next period back, for less than an hour after its end."""
        period = BTC_5M.interval.ceil(self.exchange_now) + amount % 3 * FIVE
        if period not in self.exchange.left_out_before:
            # Late enough for two looks to miss it.
            published = period + FIVE + (59 - amount % 30) * MINUTE
            self.exchange.publish_at["BTC/USD", "5m", period] = published

    async def fail_exchange(self, amount: int) -> None:
        self.exchange.error = ERRORS[amount % len(ERRORS)]
        self.exchange.fails_after = amount % 4

    async def mend_exchange(self, amount: int) -> None:
        self.exchange.error = None

    async def leave_rows_out(self, amount: int) -> None:
        self.exchange.leaves_out, self.exchange.seed = 1 + amount % 6, amount

    async def skew(self, amount: int) -> None:
        """Put the exchange's clock forward; back over what it has said, it never goes."""
        self.exchange.time_offset_ms += amount * 10_000

    async def fail_storage(self, amount: int) -> None:
        self.raw.fail_with = StorageUnavailable("away")

    async def fail_writes(self, amount: int) -> None:
        self.raw.writes_before_failing = amount % 10
        self.raw.write_error = StorageUnavailable("full")

    async def kill_while_writing(self, amount: int) -> None:
        """End the process after so many documents, or between the last one and the ledger."""
        self.raw.writes_before_failing = amount % 10
        self.raw.write_error = Killed()

    async def mend_storage(self, amount: int) -> None:
        self.raw.fail_with = self.raw.writes_before_failing = None

    async def lose_documents(self, amount: int) -> None:
        for path in self._documents(amount):
            del self.raw.blobs[path]

    async def break_documents(self, amount: int) -> None:
        for path in self._documents(amount):
            self.raw.blobs[path] = self.raw.blobs[path][:20]

    async def restart(self, amount: int) -> None:
        self.start()

    async def restart_without_ledger(self, amount: int) -> None:
        self.raw.blobs.pop(LEDGER, None)
        self.start()

    async def restart_with_old_ledger(self, amount: int) -> None:
        old = self.old_ledgers[amount % len(self.old_ledgers)]
        if old is None:
            self.raw.blobs.pop(LEDGER, None)
        else:
            self.raw.blobs[LEDGER] = old
        self.start()

    async def restart_with_broken_ledger(self, amount: int) -> None:
        if LEDGER in self.raw.blobs:
            self.raw.blobs[LEDGER] = self.raw.blobs[LEDGER][:-amount]
        self.start()

    async def refresh(self, amount: int) -> None:
        """The hourly check, after a client has read what is stored."""
        await self.storage.get_raw_data_range("crypto.com", "BTC", 0, T0 + 30 * DAY)
        await self.state.refresh(TimeRange(T0, self.clock.now_ms()))

    async def settle_looks(self, amount: int) -> None:
        """Take the looks that are due, and nothing else."""
        due = self.state.looks_due()
        if due is not None:
            await self.settle(due)

    # -- what the service does, and what is checked -----------------------------------------

    @property
    def exchange_now(self) -> int:
        return self.clock.now_ms() + self.exchange.time_offset_ms

    async def settle(self, wanted: TimeRange | None = None) -> SettleReport:
        return await settle(
            self.state,
            wanted or TimeRange(T0, self.clock.now_ms()),
            asking(self.exchange, Priority.LIVE),
            page_periods=PAGE,
        )

    def check_documents(self) -> None:
        """Nothing that is forming is stored, and no revision is lowered."""
        ledger = self.raw.blobs.get(LEDGER)
        if ledger != self.old_ledgers[-1]:
            self.old_ledgers.append(ledger)
        closed = BTC_5M.interval.floor(min(self.clock.now_ms(), self.exchange_now))
        for path, content in self.raw.blobs.items():
            parsed = StoragePathUtility.parse_raw_data_path(path)
            if parsed is not None:
                assert parsed.timestamp < closed
                self._check_revision(parsed.timestamp, content)

    def check(self, report: SettleReport) -> None:
        """Every gap's reason is true."""
        self.check_documents()
        for gap in report.gaps:
            periods = range(gap.range.start, gap.range.end, FIVE)
            assert BTC_5M.interval.is_aligned(gap.range.start)
            assert gap.reason is not GapReason.NOT_OFFERED
            if gap.reason is GapReason.UNREACHABLE:
                assert self.exchange.error is not None
            elif gap.reason is GapReason.PENDING and report.error is None:
                assert not any(self._can_be_had(period) for period in periods)
            elif gap.reason is GapReason.NO_TRADES:
                # Told once the period is over and there is a newer row: it has none, or comes
                # late, or was left out of an answer.
                assert all(
                    period not in self.listed
                    or period in self.exchange.left_out_before
                    or ("BTC/USD", "5m", period) in self.exchange.publish_at
                    for period in periods
                )

    def _can_be_had(self, period: int) -> bool:
        published = self.exchange.publish_at.get(("BTC/USD", "5m", period), period)
        over = max(published, period + FIVE + self.exchange.grace_ms)
        return (
            period in self.listed
            and period not in self.exchange.left_out_before
            and over <= self.exchange_now
        )

    def _check_revision(self, timestamp: int, content: bytes) -> None:
        with suppress(ValueError):
            document = json.loads(content)
            assert document["revision"] >= self.revisions.get(timestamp, 1)
            self.revisions[timestamp] = document["revision"]

    def _documents(self, amount: int) -> list[str]:
        stored = [path for path in self.raw.blobs if path.startswith("raw_data/")]
        lost = random.Random(amount).sample(stored, min(amount % 5, len(stored)))
        for path in lost:
            parsed = StoragePathUtility.parse_raw_data_path(path)
            assert parsed is not None
            # Its revision is lost with it.
            self.revisions.pop(parsed.timestamp, None)
        return lost


Event = Callable[[World, int], Awaitable[None]]
EVENTS: tuple[Event, ...] = (
    World.pass_a_little, World.pass_a_little, World.pass_minutes, World.pass_hours,
    World.correct, World.correct, World.publish_late, World.fail_exchange, World.mend_exchange,
    World.leave_rows_out, World.skew, World.fail_storage, World.fail_writes,
    World.kill_while_writing, World.mend_storage, World.lose_documents, World.break_documents,
    World.restart, World.restart_without_ledger, World.restart_with_old_ledger,
    World.restart_with_broken_ledger, World.settle_looks, World.refresh, World.refresh,
    World.refresh,
)  # fmt: skip
STORY = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 59)), min_size=5, max_size=30)


async def tell(story: Sequence[tuple[Event, int]], holes: set[int], offset_ms: int) -> World:
    """Let everything of the story happen, then all faults stop and all looks be taken."""
    world = World(holes, offset_ms)
    for event, amount in story:
        try:
            with suppress(StorageError):
                await event(world, amount)
                world.check(await world.settle())
        except Killed:
            world.raw.writes_before_failing = None
            world.start()
        world.check_documents()
    world.exchange.error = None
    world.exchange.leaves_out = 0
    await world.mend_storage(0)
    world.end = BTC_5M.interval.floor(world.clock.now_ms())
    while True:
        await world.refresh(0)
        report = await world.settle(TimeRange(T0, world.end))
        world.check(report)
        due = world.state.next_look_at()
        if due is None and not report.open:
            return world
        assert world.clock.now_ms() - world.end < 6 * HOUR, "the looks never end"
        await world.clock.advance(max(MINUTE, (due or 0) - world.clock.now_ms()))


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    story=STORY,
    holes=st.sets(st.integers(1, 60), max_size=20),
    minutes_off=st.integers(-20, 20),
)
def test_whatever_happens_in_between_ends_in_the_exchanges_series(
    story: list[tuple[Event, int]], holes: set[int], minutes_off: int
) -> None:
    async def run() -> tuple[Listed, Listed]:
        world = await tell(story, holes, minutes_off * MINUTE)
        entries = await world.storage.get_raw_data_range("crypto.com", "BTC", 0, T0 + 30 * DAY)
        stored = {entry.timestamp: entry.candle for entry in entries}
        return stored, {at: row for at, row in world.listed.items() if T0 <= at < world.end}

    stored, listed = asyncio.run(run())
    assert stored == listed
