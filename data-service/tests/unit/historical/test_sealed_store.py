"""SealedCandleStore: what a table that does not answer costs those who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import date
from pathlib import Path
from threading import Event

import pytest

from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_columns import SealedCandles
from historical.candle_table import CandleTable
from historical.interfaces import CandleTableUnavailable
from historical.sealed_store import SealedCandleStore
from storage.path_utility import day_start
from target_management.delta_engine import DeltaEngine
from tests.support.clock import ManualClock
from tests.support.entries import BTC
from tests.support.sealing import day, entries_of, range_of


class Hanging(CandleTable):
    """A table on a disk that stops answering when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(DeltaEngine(), str(path), None)
        self.answers = Event()
        self.answers.set()

    def read(self, series: Series, wanted: TimeRange) -> SealedCandles:
        self.answers.wait()
        return super().read(series, wanted)

    def unseal(self, series: Series, days: Iterable[date]) -> None:
        self.answers.wait()
        super().unseal(series, days)


async def test_nobody_waits_for_a_disk_that_hangs(tmp_path: Path) -> None:
    table = Hanging(tmp_path / "candles_delta")
    store = SealedCandleStore(table, ManualClock(day_start(day(9))), timeout_s=0.5)
    await store.take_over()
    await store.seal(BTC, {day(0): entries_of(day(0))}, read_since=store.others)
    table.answers.clear()
    try:
        with pytest.raises(CandleTableUnavailable, match="no answer in"):
            await store.unseal(BTC, [day(0)])
        # What cannot be read is taken from documents.
        assert (await store.read(BTC, range_of(day(0)))).ranges == ()
        assert store.trouble == "the table of candles gave no answer in 0.5 s"
    finally:
        table.answers.set()
    # What was given up was done once the disk answered, and is in nobody's way.
    assert (await eventually(lambda: store.read(BTC, range_of(day(0))))).ranges == ()
    assert store.trouble is None
    await store.close()


async def eventually(read: Callable[[], Awaitable[SealedCandles]]) -> SealedCandles:
    async with asyncio.timeout(20):
        while (found := await read()).ranges:
            pass
    return found
