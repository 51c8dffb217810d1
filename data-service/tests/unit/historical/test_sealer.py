"""CandleSealer: which days are sealed and when, and that no document is replaced below a seal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_table import CandleTable
from historical.reader import CandleReader
from historical.sealed_store import SealedCandleStore
from historical.sealer import CLOSED_FOR_MS, EVERY_MS, QUIET_FOR_MS, CandleSealer
from storage.interfaces import StorageUnavailable, Timestamp
from storage.manager import StorageManagerImpl
from storage.path_utility import day_start
from storage.spool import Spool
from target_management.delta_engine import DeltaEngine
from tests.support.clock import ManualClock, settle_loop
from tests.support.entries import BTC
from tests.support.sealing import ALL, DAY_MS, HOURLY, day, entries_of, range_of
from tests.support.storage import InMemoryStorage

CANDLE = entries_of(day(0))[0].candle
MIDNIGHT = day_start(day(10))
"""The day ten has just begun."""


class Gated(InMemoryStorage):
    """A root whose reads and writes of documents can be held up."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes_may = asyncio.Event(), asyncio.Event()
        self.reading, self.writing = asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.writes_may.set()
        self.before_writing: Any = None

    async def get_range(self, *args: Any, **options: Any) -> list[Any]:
        found = await super().get_range(*args, **options)
        self.reading.set()
        await self.reads.wait()
        return found

    async def save_entries(
        self,
        exchange_name: str,
        coin_symbol: str,
        entries: Sequence[tuple[Timestamp, Mapping[str, Any]]],
        **options: Any,
    ) -> int:
        self.writing.set()
        await self.writes_may.wait()
        if self.before_writing is not None:
            self.before_writing()
        return await super().save_entries(exchange_name, coin_symbol, entries, **options)


class World:
    """A root, the table beside it, and who seals, over a clock moved by hand."""

    def __init__(
        self, folder: Path, *, raw: Gated | None = None, spool: Spool | None = None
    ) -> None:
        self.path = folder / "candles_delta"
        self.clock = ManualClock(MIDNIGHT)
        self.raw = raw or Gated()
        self.table = CandleTable(DeltaEngine(), str(self.path), None)
        self.store = SealedCandleStore(self.table, self.clock)
        self.may_write = True
        self.sealer = CandleSealer(
            self.store,
            self.raw,
            ["crypto.com"],
            self.clock,
            may_write=lambda: self.may_write,
        )
        self.storage = StorageManagerImpl(self.raw, spool=spool, sealed=self.sealer)

    async def seal(self, *, after_ms: int = QUIET_FOR_MS) -> None:
        """Let time pass, and seal what is to be sealed then."""
        await self.clock.advance(after_ms)
        await self.sealer.seal_due()

    def sealed(self, series: Series = BTC) -> list[TimeRange]:
        return self.table.sealed(series, ALL)

    def sealed_entries(self, series: Series = BTC) -> list[Entry]:
        return self.table.read_entries(series, ALL)[1]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.sealer.take_over()
    yield world
    await world.store.close()


def corrected(entry: Entry) -> Entry:
    """The same period with another close."""
    candle = entry.candle
    close = (candle.low + candle.close) / 2
    return replace(entry, candle=replace(candle, close=close))


async def filled(world: World, *days: date, series: Series = BTC) -> list[Entry]:
    """Days with all their documents, and their entries."""
    entries = [entry for one in days for entry in entries_of(one, series=series)]
    await world.storage.store_batch(entries)
    return entries


async def test_a_closed_day_is_sealed_with_just_what_its_documents_have(world: World) -> None:
    entries = await filled(world, day(8), day(9), day(10))
    await world.seal()
    assert world.sealed() == [range_of(day(8))]
    # The last look at the last period of yesterday is still to come.
    await world.seal(after_ms=CLOSED_FOR_MS - QUIET_FOR_MS - 1)
    assert world.sealed() == [range_of(day(8))]
    await world.seal(after_ms=1)
    assert world.sealed() == [range_of(day(8), 2)]
    assert world.sealed_entries() == entries[: 2 * 288]


async def test_rounds_come_by_themselves_while_this_process_has_the_root(world: World) -> None:
    await filled(world, day(5))
    running = asyncio.create_task(world.sealer.run())
    try:
        await settle_loop()
        await world.clock.advance(EVERY_MS + 1_000)
        async with asyncio.timeout(20):
            while not world.sealed():
                await asyncio.to_thread(world.table.sealed, BTC, ALL)
        assert world.sealed() == [range_of(day(5))]
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_day_that_is_written_to_is_left_until_it_is_quiet(world: World) -> None:
    entries = entries_of(day(3))
    await world.storage.store_batch(entries[:100])
    await world.clock.advance(QUIET_FOR_MS - 1)
    await world.storage.store_batch(entries[100:])
    await world.seal(after_ms=1)
    assert world.sealed() == []
    await world.seal(after_ms=QUIET_FOR_MS - 1)
    assert world.sealed_entries() == entries


async def test_days_that_other_processes_wrote_are_found(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.raw.save_entries(
        "crypto.com",
        "BTC/EUR",
        [(entry.timestamp, entry.to_document()) for entry in entries_of(day(0), series=HOURLY)],
        interval="1h",
    )
    await world.sealer.take_over()
    await world.seal(after_ms=0)
    assert world.sealed(HOURLY) == [range_of(day(0))]
    await world.store.close()


async def test_longer_periods_than_a_day_stay_in_their_documents(world: World) -> None:
    weekly = Series("crypto.com", "BTC", Interval.parse("1w"))
    monday = weekly.interval.ceil(day_start(day(0)))
    await world.storage.store_raw_data(
        replace(entries_of(day(0))[0], series=weekly, candle=replace(CANDLE, timestamp=monday))
    )
    await world.seal(after_ms=30 * DAY_MS)
    assert world.sealed(weekly) == []


async def test_a_corrected_document_finds_its_day_unsealed_and_is_sealed_again(
    world: World,
) -> None:
    entries = await filled(world, day(3), day(4))
    await world.seal()
    assert world.sealed() == [range_of(day(3), 2)]
    seen: list[list[TimeRange]] = []
    world.raw.before_writing = lambda: seen.append(other_process(world).sealed(BTC, ALL))
    await world.storage.store_raw_data(corrected(entries[7]))
    # Durably, and before the document was replaced: who is killed here leaves nothing stale.
    assert seen == [[range_of(day(4))]]
    stored = (await world.storage.get_raw_data_range("crypto.com", "BTC", 0, 2**60))[7]
    await world.seal()
    assert world.sealed() == [range_of(day(3), 2)]
    assert world.sealed_entries() == [*entries[:7], stored, *entries[8:]]
    assert stored.revision == entries[7].revision + 1


async def test_what_changes_nothing_unseals_nothing(world: World) -> None:
    entries = await filled(world, day(3))
    await world.seal()
    await world.storage.store_batch(entries)
    assert world.sealed() == [range_of(day(3))]


async def test_a_day_that_is_written_to_while_it_is_read_is_not_sealed(world: World) -> None:
    entries = await filled(world, day(3), day(4))
    world.raw.reading.clear()
    world.raw.reads.clear()
    sealing = asyncio.create_task(world.seal())
    await world.raw.reading.wait()
    writing = asyncio.create_task(world.storage.store_raw_data(corrected(entries[0])))
    await writing
    world.raw.reads.set()
    await sealing
    assert world.sealed() == [range_of(day(4))]
    await world.seal()
    assert world.sealed() == [range_of(day(3), 2)]
    assert world.sealed_entries()[0].candle == corrected(entries[0]).candle


async def test_a_day_whose_document_is_being_written_is_not_sealed(world: World) -> None:
    entries = await filled(world, day(3), day(4))
    world.raw.writing.clear()
    world.raw.writes_may.clear()
    await world.clock.advance(QUIET_FOR_MS)
    writing = asyncio.create_task(world.storage.store_raw_data(corrected(entries[0])))
    await world.raw.writing.wait()
    await world.sealer.seal_due()
    assert world.sealed() == [range_of(day(4))]
    world.raw.writes_may.set()
    await writing
    await world.seal()
    assert world.sealed_entries()[0].candle == corrected(entries[0]).candle


async def test_who_writes_a_document_waits_for_a_commit_of_its_series(world: World) -> None:
    entries = await filled(world, day(3))
    store, committing, may_commit = world.store, asyncio.Event(), asyncio.Event()
    seal = store.seal

    async def slow(*args: Any, **options: Any) -> None:
        committing.set()
        await may_commit.wait()
        await seal(*args, **options)

    store.seal = slow  # type: ignore[method-assign]
    sealing = asyncio.create_task(world.seal())
    await committing.wait()
    world.raw.writing.clear()
    writing = asyncio.create_task(world.storage.store_raw_data(corrected(entries[0])))
    await settle_loop()
    assert not world.raw.writing.is_set()
    may_commit.set()
    await asyncio.gather(sealing, writing)
    assert world.sealed() == []
    assert world.raw.writing.is_set()


async def test_a_day_that_cannot_be_unsealed_keeps_its_document_and_the_entry_waits(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path / "spool")
    await spool.open()
    world = World(tmp_path, spool=spool)
    await world.sealer.take_over()
    entries = await filled(world, day(3))
    await world.seal()
    log_folder = world.path / "_delta_log"
    entry_of_log = max(log_folder.glob("*.json"))
    whole = entry_of_log.read_bytes()
    entry_of_log.write_bytes(b"no log entry")
    stored = await world.storage.store_raw_data(corrected(entries[0]))
    assert spool.timestamps(BTC) == [entries[0].timestamp]
    document = await world.raw.get_entry("crypto.com", "BTC", entries[0].timestamp)
    assert document == entries[0].to_document()
    # Readers see what waits, in the place of what is sealed too.
    entry_of_log.write_bytes(whole)
    found = await CandleReader(world.storage, world.store).read(BTC, range_of(day(3)))
    assert found[0] == stored.entry.candle
    assert list(found)[1:] == [entry.candle for entry in entries[1:]]
    await world.store.close()
    await spool.close()


async def test_what_another_process_may_have_written_meanwhile_is_not_sealed(
    world: World,
) -> None:
    await filled(world, day(3))
    await world.clock.advance(QUIET_FOR_MS)
    world.raw.reading.clear()
    world.raw.reads.clear()
    sealing = asyncio.create_task(world.sealer.seal_due())
    await world.raw.reading.wait()
    other = other_process(world)
    other.prepare()
    other.take_over()
    world.raw.reads.set()
    await sealing
    assert other.sealed(BTC, ALL) == []


async def test_who_lost_the_root_seals_nothing(world: World) -> None:
    await filled(world, day(3))
    world.may_write = False
    await world.seal()
    assert world.sealed() == []


async def test_a_failure_is_told_once_and_does_not_end_it(world: World) -> None:
    await filled(world, day(3))
    world.raw.fail_with = StorageUnavailable("the root is away")
    with capture_logs() as logs:
        await world.seal()
        await world.seal()
        assert world.sealer.trouble == "the root is away"
        world.raw.fail_with = None
        await world.seal()
    assert [entry["event"] for entry in logs] == ["sealing_fails", "sealing_works_again"]
    assert world.sealer.trouble is None
    assert world.sealed() == [range_of(day(3))]


async def test_documents_of_a_newer_version_keep_their_day_from_being_sealed(
    world: World,
) -> None:
    await filled(world, day(3))
    eth = replace_coin("ETH")
    await filled(world, day(3), series=eth)
    first = entries_of(day(3))[0]
    await world.raw.save_entry(
        "crypto.com", "BTC", first.timestamp, first.to_document() | {"schema": 2}
    )
    await world.seal()
    assert (world.sealed(), world.sealed(eth)) == ([], [range_of(day(3))])


async def test_a_table_that_was_moved_away_is_made_anew(world: World, tmp_path: Path) -> None:
    entries = await filled(world, day(3))
    await world.seal()
    reader = CandleReader(world.storage, world.store)
    world.path.rename(tmp_path / "away")
    assert len(await reader.read(BTC, range_of(day(0), 10))) == 288
    assert "no table of candles" in (world.sealer.trouble or "")
    await world.storage.store_raw_data(corrected(entries[0]))
    world.path.rename(tmp_path / "away again")
    await world.seal()
    assert world.sealed() == [range_of(day(3))]
    assert len(await reader.read(BTC, range_of(day(0), 10))) == 288
    assert world.sealer.trouble is None


async def test_a_root_that_is_away_gets_no_table_in_its_place(world: World, tmp_path: Path) -> None:
    entries = await filled(world, day(3))
    await world.seal()
    world.path.rename(tmp_path / "away")
    world.raw.fail_writes_with = StorageUnavailable("not mounted")
    with pytest.raises(StorageUnavailable, match="not mounted"):
        await world.storage.store_raw_data(corrected(entries[0]))
    await world.seal()
    assert not world.path.exists()


async def test_what_is_sealed_is_known_without_listing_documents(world: World) -> None:
    entries = entries_of(day(3), count=250)[20:]
    await world.storage.store_batch([*entries, *entries_of(day(4))])
    await world.seal()
    wanted = TimeRange(day_start(day(2)), day_start(day(6)))
    runs = [
        TimeRange(entries[0].timestamp, entries[-1].end),
        range_of(day(4)),
    ]
    assert await world.storage.stored_ranges("crypto.com", "BTC", wanted.start, wanted.end) == runs
    # A document that is lost behind the service's back shows once the documents are asked.
    path = "raw_data/crypto.com/BTC/2026/01/04/20260104014000.json"
    del world.raw.blobs[path]
    asked = world.storage.stored_ranges("crypto.com", "BTC", wanted.start, wanted.end)
    assert await asked == runs
    found = await world.storage.stored_ranges(
        "crypto.com", "BTC", wanted.start, wanted.end, from_documents=True
    )
    assert found == [TimeRange(entries[1].timestamp, entries[-1].end), range_of(day(4))]


async def test_documents_that_came_or_went_behind_the_services_back_are_noticed(
    world: World,
) -> None:
    some = entries_of(day(3), count=250)
    await world.storage.store_batch([*some, *entries_of(day(4)), *entries_of(day(5))])
    await world.seal()
    assert world.sealed() == [range_of(day(3), 3)]
    brought = entries_of(day(3))[250]
    await world.raw.save_entry("crypto.com", "BTC", brought.timestamp, brought.to_document())
    lost = "raw_data/crypto.com/BTC/2026/01/05/20260105014000.json"
    del world.raw.blobs[lost]
    with capture_logs() as logs:
        await world.seal(after_ms=DAY_MS)
    assert [(entry["event"], entry["days"]) for entry in logs] == [("sealed_days_differ", 2)]
    assert world.sealed() == [range_of(day(3), 3)]
    entries = world.sealed_entries()
    assert entries[250] == brought
    assert len(entries) == 251 + 287 + 288


async def test_all_of_a_root_is_sealed_at_once_for_who_asks_for_it(world: World) -> None:
    await filled(world, *(day(at) for at in range(-3, 8)))
    await filled(world, day(0), series=replace_coin("ETH"))
    told: list[tuple[int, int]] = []
    done = await world.sealer.seal_now(
        lambda series: series == BTC, progress=lambda *counts: told.append(counts)
    )
    assert done == 11
    assert told[-1] == (11, 11)
    assert world.sealed() == [range_of(day(-3), 11)]
    assert world.sealed(replace_coin("ETH")) == []


def replace_coin(coin: str) -> Series:
    return Series("crypto.com", coin, BTC.interval)


def other_process(world: World) -> CandleTable:
    return CandleTable(DeltaEngine(), str(world.path), None)
