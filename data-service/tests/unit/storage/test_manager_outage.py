"""What the manager does while its backend is away: nothing is lost, nothing is lowered."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from domain.clock import MarketClock
from domain.entry import Entry
from domain.interval import DEFAULT_INTERVAL
from domain.time_range import TimeRange
from storage.documents import read_json
from storage.interfaces import (
    Change,
    Decode,
    IStorageListener,
    NotTheCollector,
    SpoolFull,
    StorageConflict,
    StorageDenied,
    StorageError,
    StorageStatus,
    StorageUnavailable,
    Stored,
)
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility
from storage.spool import Spool
from tests.support.entries import BTC, FIVE_MINUTES, NOON, make_entry
from tests.support.storage import InMemoryCollectorLock, InMemoryStorage

LATER = NOON + FIVE_MINUTES
ETH = dataclasses.replace(BTC, coin="ETH")
EVER = (0, 2**60)
PATIENCE_S = 10.0


class ImpatientClock(MarketClock):
    """Real pauses are no longer than it takes the others to run."""

    async def sleep_real(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Listener(IStorageListener):
    def __init__(self) -> None:
        self.states: list[bool] = []
        self.corrections: list[Stored] = []
        self.changed = asyncio.Event()

    def storage_changed(self, *, available: bool) -> None:
        self.states.append(available)
        self.changed.set()

    def entry_settled(self, stored: Stored) -> None:
        self.corrections.append(stored)

    async def until(self, *states: bool) -> None:
        """Wait until just these changes were told."""
        async with asyncio.timeout(PATIENCE_S):
            while self.states != list(states):
                self.changed.clear()
                await self.changed.wait()


class World:
    """A manager over a backend that a test takes away; ``restart`` is a kill and a new process."""

    def __init__(self, folder: Path, *, most_entries: int = 1_000, with_lock: bool = False) -> None:
        self.backend = InMemoryStorage()
        self.folder = folder
        self.most_entries = most_entries
        self.lock: InMemoryCollectorLock | None = (
            self.backend.collector_lock() if with_lock else None
        )
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.spool = Spool(self.folder, most_entries=self.most_entries)
        await self.spool.open()
        self.listener = Listener()
        self.manager = StorageManagerImpl(
            self.backend, spool=self.spool, lock=self.lock, clock=ImpatientClock()
        )
        self.manager.listen(self.listener)
        self._draining = asyncio.create_task(self.manager.run())

    async def stop(self) -> None:
        assert self._draining is not None
        self._draining.cancel()
        await asyncio.wait([self._draining])
        await self.spool.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def lose(self, error: StorageError | None = None) -> None:
        """Take the backend away, and wait until the manager has noticed."""
        self.backend.fail_with = error or StorageUnavailable("the line is cut")
        with pytest.raises(StorageUnavailable):
            await self.manager.check_health()
        async with asyncio.timeout(PATIENCE_S):
            while self.manager.status.away is None:  # noqa: ASYNC110  the drain tells nobody here
                await asyncio.sleep(0)

    async def bring_back(self) -> None:
        """Give the backend back, and wait until nothing waits any more."""
        self.backend.fail_with = None
        await self.drained()

    async def drained(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.manager.status != StorageStatus():  # noqa: ASYNC110  likewise
                await asyncio.sleep(0)

    async def stored(self, coin: str = "BTC") -> list[Entry]:
        return await self.manager.get_raw_data_range("crypto.com", coin, *EVER)


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    await world.start()
    try:
        yield world
    finally:
        await world.stop()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(World(tmp_path / "spool")) as world:
        yield world


async def test_an_entry_that_the_backend_refuses_waits_and_counts_as_stored(world: World) -> None:
    await world.lose()
    entry = make_entry(book=True, source="stream")
    assert await world.manager.store_raw_data(entry) == Stored(entry, Change.ADDED)
    assert world.manager.status.spooled == 1
    assert world.backend.blobs == {}
    await world.bring_back()
    assert await world.stored() == [entry]
    assert len(world.backend.blobs) == 1


async def test_the_first_entry_of_an_outage_waits_too(world: World) -> None:
    world.backend.fail_with = StorageUnavailable("the line is cut")
    assert (await world.manager.store_raw_data(make_entry())).change is Change.ADDED
    await world.listener.until(False)
    await world.bring_back()
    assert await world.stored() == [make_entry()]


async def test_an_outage_is_told_and_logged_once_and_so_is_its_end(world: World) -> None:
    with capture_logs() as logs:
        await world.lose()
        for step in range(5):
            await world.manager.store_raw_data(make_entry(NOON + step * FIVE_MINUTES))
        await world.bring_back()
        await world.listener.until(False, True)
    told = [log["event"] for log in logs if log["event"].startswith("storage_is")]
    assert told == ["storage_is_away", "storage_is_back"]


async def test_readers_see_what_waits_beside_what_is_in_the_backend(world: World) -> None:
    times = [NOON + step * FIVE_MINUTES for step in range(4)]
    await world.manager.store_batch([make_entry(times[0], book=True), make_entry(times[2])])
    await world.lose()
    await world.manager.store_batch(
        [make_entry(times[0], close=101.0), make_entry(times[1]), make_entry(times[3])]
    )
    await world.manager.store_raw_data(make_entry(NOON, series=ETH, market="ETH/USD"))
    world.backend.fail_with = None
    found = await world.stored()
    assert [entry.timestamp for entry in found] == times
    assert (found[0].candle.close, found[0].revision) == (101.0, 2)
    assert found[0].order_book == make_entry(times[0], book=True).order_book
    page = await world.manager.get_raw_data_range("crypto.com", "BTC", *EVER, limit=2, offset=1)
    assert page == found[1:3]
    assert await world.manager.get_latest_entry("crypto.com", "BTC") == found[3]
    assert await world.manager.stored_ranges("crypto.com", "BTC", *EVER) == [
        TimeRange(NOON, NOON + 4 * FIVE_MINUTES)
    ]
    assert await world.manager.list_coins("crypto.com") == ["BTC", "ETH"]
    assert await world.manager.check_coin_exists("crypto.com", "ETH")


async def test_a_backend_that_cannot_be_listed_is_unknown_also_where_entries_wait(
    world: World,
) -> None:
    await world.lose()
    await world.manager.store_raw_data(make_entry())
    for read in (
        world.stored(),
        world.manager.get_latest_entry("crypto.com", "BTC"),
        world.manager.stored_ranges("crypto.com", "BTC", *EVER),
        world.manager.list_coins("crypto.com"),
        world.manager.read_record("ledger/x"),
    ):
        with pytest.raises(StorageUnavailable):
            await read


async def test_what_waits_survives_a_kill_and_is_written_by_the_next_process(world: World) -> None:
    await world.lose()
    entries = [make_entry(NOON, source="stream", book=True), make_entry(LATER, source="stream")]
    for entry in entries:
        await world.manager.store_raw_data(entry)
    await world.restart()
    assert world.manager.status.spooled == 2
    await world.bring_back()
    assert await world.stored() == entries


async def test_a_second_look_that_finds_nothing_new_takes_no_room(world: World) -> None:
    await world.manager.store_raw_data(make_entry(book=True))
    await world.lose()
    answer = await world.manager.store_raw_data(make_entry(book=True))
    assert answer.change is Change.UNCHANGED
    assert world.manager.status.spooled == 0


async def test_corrections_during_an_outage_take_one_revision_after_the_other(
    world: World,
) -> None:
    await world.manager.store_raw_data(make_entry(book=True))
    await world.lose()
    answers = [
        await world.manager.store_raw_data(make_entry(close=close))
        for close in (101.0, 102.0, 102.0, 100.5)
    ]
    assert [(answer.change, answer.entry.revision) for answer in answers] == [
        (Change.REVISED, 2),
        (Change.REVISED, 3),
        (Change.UNCHANGED, 3),
        (Change.REVISED, 4),
    ]
    await world.bring_back()
    # Corrected back to what the backend has, and still told as the newest of four.
    (stored,) = await world.stored()
    assert stored == make_entry(book=True).with_revision(4)
    assert world.listener.corrections == []


async def test_a_correction_that_could_not_be_compared_is_told_when_it_can_be(
    world: World,
) -> None:
    await world.manager.store_batch([make_entry(NOON), make_entry(LATER)])
    await world.restart()
    await world.lose()
    unknown = await world.manager.store_raw_data(make_entry(NOON, close=101.0))
    same = await world.manager.store_raw_data(make_entry(LATER))
    assert (unknown.change, same.change) == (Change.ADDED, Change.ADDED)
    await world.bring_back()
    corrected = make_entry(NOON, close=101.0).with_revision(2)
    assert world.listener.corrections == [Stored(corrected, Change.REVISED)]
    assert await world.stored() == [corrected, make_entry(LATER)]


async def test_a_full_spool_refuses_loudly_and_what_waits_is_still_written(tmp_path: Path) -> None:
    async with running(World(tmp_path, most_entries=1)) as world:
        await world.lose()
        await world.manager.store_raw_data(make_entry(NOON, source="stream"))
        with pytest.raises(SpoolFull, match="no room"):
            await world.manager.store_raw_data(make_entry(LATER, source="stream"))
        assert world.manager.status.spool_full
        await world.bring_back()
        assert await world.stored() == [make_entry(NOON, source="stream")]


async def test_an_entry_that_both_refused_casts_no_lasting_doubt_on_the_backend(
    tmp_path: Path,
) -> None:
    async with running(World(tmp_path, most_entries=0)) as world:
        world.backend.fail_with = StorageUnavailable("the line is cut")
        with pytest.raises(SpoolFull):
            await world.manager.store_raw_data(make_entry())
        await world.listener.until(False)
        world.backend.fail_with = None
        await world.listener.until(False, True)
        await world.manager.store_raw_data(make_entry())
        assert await world.stored() == [make_entry()]


async def test_when_both_refuse_both_are_named(tmp_path: Path) -> None:
    async with running(World(tmp_path, most_entries=0)) as world:
        world.backend.fail_with = StorageDenied("the key is wrong")
        with pytest.raises(SpoolFull, match=r"the key is wrong; .*no room"):
            await world.manager.store_raw_data(make_entry())


async def test_an_entry_of_another_market_is_refused_while_the_backend_is_away(
    world: World,
) -> None:
    await world.manager.store_raw_data(make_entry())
    await world.lose()
    with pytest.raises(StorageConflict):
        await world.manager.store_raw_data(make_entry(LATER, market="BTC/EUR"))
    await world.manager.store_raw_data(make_entry(NOON, series=ETH, market="ETH/USD"))
    with pytest.raises(StorageConflict):
        await world.manager.store_raw_data(make_entry(LATER, series=ETH, market="ETH/EUR"))


async def test_what_the_backend_refuses_for_good_is_set_aside_and_holds_up_nothing(
    world: World, tmp_path: Path
) -> None:
    await world.manager.store_raw_data(make_entry(NOON))
    await world.restart()
    await world.lose()
    # A new process does not know the market of the series while nobody can tell.
    await world.manager.store_raw_data(make_entry(LATER, market="BTC/EUR"))
    await world.manager.store_raw_data(make_entry(NOON, series=ETH, market="ETH/USD"))
    with capture_logs() as logs:
        await world.bring_back()
    assert "spooled_entry_refused" in [log["event"] for log in logs]
    assert await world.stored() == [make_entry(NOON)]
    assert len(await world.stored("ETH")) == 1
    assert len(list((tmp_path / "spool/refused").rglob("*.json"))) == 1


async def test_of_a_batch_only_what_is_refused_is_set_aside(world: World) -> None:
    await world.manager.store_raw_data(make_entry(NOON))
    newer = make_entry(LATER).to_document() | {"schema": 2}
    await world.backend.save_entry("crypto.com", "BTC", LATER, newer)
    await world.lose()
    times = [NOON + step * FIVE_MINUTES for step in range(4)]
    await world.manager.store_batch([make_entry(at, close=101.0) for at in times])
    with capture_logs():
        await world.bring_back()
    paths = [StoragePathUtility.get_raw_data_path("crypto.com", "BTC", at) for at in times]
    assert sorted(world.backend.blobs) == paths
    assert b'"schema":2' in world.backend.blobs[paths[1]]
    assert b'"revision":2' in world.backend.blobs[paths[0]]


async def test_a_torn_document_in_the_spool_holds_up_nothing(world: World, tmp_path: Path) -> None:
    await world.lose()
    await world.manager.store_batch([make_entry(NOON), make_entry(LATER)])
    path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", NOON)
    (tmp_path / "spool" / path).write_bytes(b"{")
    with capture_logs() as logs:
        await world.bring_back()
    assert "spooled_entries_unreadable" in [log["event"] for log in logs]
    assert await world.stored() == [make_entry(LATER)]


class OneCoinDenied(InMemoryStorage):
    """A backend that refuses the documents of one coin."""

    denied: str | None = "BTC"

    async def get_latest_entry(
        self,
        exchange_name: str,
        coin_symbol: str,
        *,
        interval: str = DEFAULT_INTERVAL,
        decode: Decode = read_json,
    ) -> Any | None:
        if coin_symbol == self.denied:
            raise StorageDenied("raw_data/crypto.com/BTC: permission denied")
        return await super().get_latest_entry(
            exchange_name, coin_symbol, interval=interval, decode=decode
        )


async def check_that_one_is_stuck(world: World, backend: OneCoinDenied) -> None:
    await world.manager.store_raw_data(make_entry(NOON))
    await world.manager.store_raw_data(make_entry(NOON, series=ETH, market="ETH/USD"))
    async with asyncio.timeout(PATIENCE_S):
        while world.manager.status.stuck == () or world.spool.entries > 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert len(await world.stored("ETH")) == 1
    assert world.manager.status.stuck == ("raw_data/crypto.com/BTC: permission denied",)
    assert world.manager.status.away is None
    # What comes next goes behind what waits, or that would replace it.
    backend.denied = None
    await world.manager.store_raw_data(make_entry(NOON, close=101.0))
    await world.drained()
    assert await world.stored() == [make_entry(NOON, close=101.0).with_revision(2)]


async def test_one_series_that_is_refused_disturbs_no_other(tmp_path: Path) -> None:
    world = World(tmp_path)
    backend = world.backend = OneCoinDenied()
    async with running(world):
        with capture_logs() as logs:
            await check_that_one_is_stuck(world, backend)
    assert [log["event"] for log in logs if log["event"].startswith("series")] == [
        "series_is_stuck",
        "series_is_stored_again",
    ]


# One collector a root.


async def test_entries_wait_while_the_lock_is_not_surely_held(tmp_path: Path) -> None:
    async with running(World(tmp_path, with_lock=True)) as world:
        assert world.lock is not None
        await world.manager.store_raw_data(make_entry(NOON))
        assert world.manager.status.spooled == 1
        with pytest.raises(StorageUnavailable, match="ledger/x is not written"):
            await world.manager.write_record("ledger/x", b"")
        assert world.backend.blobs == {}
        assert await world.lock.acquire()
        await world.drained()
        assert await world.stored() == [make_entry(NOON)]
        await world.manager.write_record("ledger/x", b"")


async def test_a_process_that_stands_by_takes_nothing_and_drains_nothing(tmp_path: Path) -> None:
    async with running(World(tmp_path, with_lock=True)) as world:
        assert world.lock is not None
        await world.manager.store_raw_data(make_entry(NOON))
        world.manager.stand_by()
        with pytest.raises(NotTheCollector, match="memory:root"):
            await world.manager.store_raw_data(make_entry(LATER))
        assert await world.stored() == [make_entry(NOON)]
        await world.lock.acquire()
        world.manager.collect()
        await world.drained()
        assert await world.stored() == [make_entry(NOON)]


async def test_two_writers_of_one_entry_each_take_a_revision_of_their_own(tmp_path: Path) -> None:
    backend = InMemoryStorage()
    managers = [StorageManagerImpl(backend) for _ in range(3)]
    await managers[0].store_raw_data(make_entry(book=True))
    answers = await asyncio.gather(
        *(
            manager.store_raw_data(make_entry(close=100.0 + step))
            for step, manager in enumerate(managers)
        )
    )
    assert sorted(answer.entry.revision for answer in answers) == [2, 3, 4]
    latest = await managers[0].get_latest_entry("crypto.com", "BTC")
    assert latest is not None
    assert latest.revision == 4
    assert latest.order_book is not None


# Any order of outages, kills and corrections.

PERIODS = [NOON + step * FIVE_MINUTES for step in range(3)]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("store"),
            st.lists(
                st.tuples(
                    st.sampled_from(PERIODS), st.sampled_from([99.0, 100.0, 101.0]), st.booleans()
                ),
                min_size=1,
                max_size=3,
                unique_by=lambda item: item[0],
            ),
        ),
        st.tuples(st.sampled_from(["lose", "bring back", "kill"]), st.just([])),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_happens_the_last_answer_is_what_is_stored(
    steps: Sequence[tuple[str, list[tuple[int, float, bool]]]],
) -> None:
    async def play(folder: Path) -> None:
        world = World(folder)
        last: dict[int, float] = {}
        books: set[int] = set()
        revisions: dict[int, int] = {}
        async with running(world):
            for step, items in steps:
                if step == "lose":
                    world.backend.fail_with = StorageUnavailable("the line is cut")
                elif step == "bring back":
                    world.backend.fail_with = None
                elif step == "kill":
                    await world.restart()
                else:
                    batch = [
                        make_entry(at, close=close, book=book) for at, close, book in sorted(items)
                    ]
                    for answer in await world.manager.store_batch(batch):
                        at = answer.entry.timestamp
                        last[at] = answer.entry.candle.close
                        revisions[at] = max(revisions.get(at, 1), answer.entry.revision)
                    books.update(at for at, _, book in items if book)
            await world.bring_back()
            found = {entry.timestamp: entry for entry in await world.stored()}
            assert {at: entry.candle.close for at, entry in found.items()} == last
            assert {at for at, entry in found.items() if entry.order_book} == books
            for at, entry in found.items():
                assert entry.revision >= revisions[at]
            assert world.spool.entries == 0

    with tempfile.TemporaryDirectory() as folder, capture_logs():
        asyncio.run(play(Path(folder)))
