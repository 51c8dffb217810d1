"""Validated entries over a storage backend: decides what may replace what, and what waits."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

import structlog

from domain.clock import IClock, MarketClock
from domain.entry import Entry
from domain.interval import DEFAULT_INTERVAL, Interval
from domain.order_book import BOOK_DEPTH
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from errors import InvalidEntry, InvalidRequest
from observability.tracing import ISpan, span
from storage.documents import check_page
from storage.entry_decoder import entry_decoder
from storage.interfaces import (
    Change,
    Held,
    ICollectorLock,
    IRawDataStorage,
    ISealedDays,
    IStorageListener,
    IStorageManager,
    NotTheCollector,
    SealedPeriods,
    StaleVersion,
    StorageConflict,
    StorageError,
    StorageStatus,
    StorageTotals,
    StorageUnavailable,
    Stored,
    Timestamp,
)
from storage.path_utility import RAW_DATA, to_range
from storage.spool import Spool

# How often a batch is decided anew because somebody else wrote meanwhile.
WRITE_TRIES: Final = 5
# How many entries are taken from the spool at once, and how often a backend that is away is asked
# (real seconds), doubling.
DRAIN_BATCH: Final = 200
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
# What is remembered of the entries written last: enough for the second looks of an hour.
MOST_REMEMBERED: Final = 10_000

log = structlog.get_logger(__name__)


class _Known(NamedTuple):
    """An entry that the backend is known to hold; books are too large to remember."""

    bare: Entry
    has_book: bool


class StorageManagerImpl(IStorageManager):
    """Reads, compares, then writes, one write of a series after the other.

    A document that breaks the rules of an entry counts as absent, so that it is fetched and stored
    anew; one of a schema that this version does not know is refused, since writing over it would
    destroy what a newer version stored.

    Writes expect just what was read before them; where another process wrote meanwhile, the batch
    is decided anew. With a ``lock``, entries go to the backend only while it is held: before it is
    taken again they wait in the spool. With ``sealed``, the days of what is written are unsealed
    first.

    ``run`` is owned by the lifespan; it empties the spool. Without a spool, entries are refused
    while the backend is away.
    """

    def __init__(
        self,
        storage: IRawDataStorage,
        *,
        spool: Spool | None = None,
        lock: ICollectorLock | None = None,
        sealed: ISealedDays | None = None,
        clock: IClock | None = None,
        most_markets_remembered: int = 10_000,
    ) -> None:
        self._storage = storage
        self._spool = spool
        self._lock = lock
        self._sealed = sealed
        self._clock = clock if clock is not None else MarketClock()
        self._most_markets_remembered = most_markets_remembered
        self._series_locks: WeakValueDictionary[Series, asyncio.Lock] = WeakValueDictionary()
        self._markets: OrderedDict[Series, str] = OrderedDict()
        self._known: OrderedDict[tuple[Series, int], _Known] = OrderedDict()
        # Taken while nobody could say what the backend holds there.
        self._undecided: set[tuple[Series, int]] = set()
        self._listener: IStorageListener | None = None
        self._collecting = True
        self._waiting = asyncio.Event()
        self._doubted = False
        self._away: str | None = None
        self._stuck: dict[Series, str] = {}
        self._totals = StorageTotals()

    # -- the lifespan -----------------------------------------------------------------------

    def listen(self, listener: IStorageListener) -> None:
        """Tell ``listener`` what happens behind the callers' backs."""
        self._listener = listener

    def collect(self) -> None:
        """Take entries: this process holds the root now. What was known of it is forgotten, since
        another process may have written."""
        self._markets.clear()
        self._known.clear()
        self._stuck.clear()
        self._collecting = True
        self._look_at_spool()

    def stand_by(self) -> None:
        """Take no more entries: another process has the root."""
        self._collecting = False

    async def run(self) -> None:
        """Write what waits in the spool as soon as the backend takes it; until cancelled."""
        pause = FIRST_PAUSE_S
        self._look_at_spool()
        while True:
            await self._waiting.wait()
            # What is doubted or put there meanwhile says so again.
            self._waiting.clear()
            if self._collecting and self._may_write() and await self._empty_spool():
                self._look_at_spool()
                pause = FIRST_PAUSE_S
                continue
            self._waiting.set()
            await self._clock.sleep_real(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    # -- storing ----------------------------------------------------------------------------

    async def store_raw_data(self, entry: Entry) -> Stored:
        return (await self.store_batch([entry]))[0]

    async def store_batch(self, entries: Sequence[Entry]) -> list[Stored]:
        if not entries:
            return []
        if not self._collecting:
            raise NotTheCollector(
                f"another service collects into {self._storage.address}; this one stores nothing"
            )
        series = entries[0].series
        self._check_batch(series, entries)
        began = self._clock.monotonic()
        try:
            with _traced("save", series) as traced:
                traced.set(entries=len(entries))
                answers = await self._store(series, entries)
        except StorageError:
            self._totals.refused[series.exchange] += len(entries)
            raise
        self._totals.store_s.add(self._clock.monotonic() - began)
        changes = Counter(answer.change for answer in answers)
        for change, count in changes.items():
            self._totals.entries[series.exchange, series.interval.name, change] += count
        return answers

    async def _store(self, series: Series, entries: Sequence[Entry]) -> list[Stored]:
        spool = self._spool
        async with self._lock_of(series):
            if spool is None:
                return await self._write_batch(series, entries)
            if self._has_to_wait(spool, series):
                return await self._spool_batch(spool, series, entries)
            try:
                return await self._write_batch(series, entries)
            except StorageUnavailable as exc:
                self._doubt()
                return await self._spool_batch(spool, series, entries, exc)

    # -- reading ----------------------------------------------------------------------------

    async def get_raw_data_range(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        limit: int | None = None,
        offset: int = 0,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[Entry]:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        check_page(limit, offset)
        with _traced("read", series) as traced:
            # The spool first: what moves to the backend meanwhile is then found there too.
            spooled = await self._spooled(series, to_range(start_time, end_time))
            found: list[Entry] = await self._storage.get_range(
                exchange_name,
                coin_symbol,
                start_time,
                end_time,
                None if spooled else limit,
                0 if spooled else offset,
                interval=interval,
                decode=entry_decoder(series),
            )
            traced.set(entries=len(found))
        if not spooled:
            return found
        merged = {entry.timestamp: entry for entry in found}
        for timestamp, entry in spooled.items():
            merged[timestamp] = _decide(merged.get(timestamp), entry).entry
        ascending = [merged[timestamp] for timestamp in sorted(merged)]
        return ascending[offset : None if limit is None else offset + limit]

    async def get_waiting(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[Entry]:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        spooled = await self._spooled(series, to_range(start_time, end_time))
        return [spooled[timestamp] for timestamp in sorted(spooled)]

    async def get_latest_entry(
        self, exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> Entry | None:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        waiting = self._spool.timestamps(series)[-1:] if self._spool is not None else []
        with _traced("read latest", series):
            spooled = await self._read_spool(series, waiting)
            stored: Entry | None = await self._storage.get_latest_entry(
                exchange_name, coin_symbol, interval=interval, decode=entry_decoder(series)
            )
        for timestamp, entry in spooled.items():
            if stored is None or timestamp > stored.timestamp:
                stored = entry
            elif timestamp == stored.timestamp:
                stored = _decide(stored, entry).entry
        return stored

    async def list_coins(self, exchange_name: str) -> list[str]:
        waiting = self._spool.coins(exchange_name) if self._spool is not None else set()
        return sorted(waiting.union(await self._storage.list_coins(exchange_name)))

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        if self._spool is not None and coin_symbol in self._spool.coins(exchange_name):
            return True
        return await self._storage.check_coin_exists(exchange_name, coin_symbol)

    async def stored_ranges(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
        from_documents: bool = False,
    ) -> list[TimeRange]:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        wanted = to_range(start_time, end_time)
        length = series.interval.milliseconds
        spooled = self._spool.timestamps(series, wanted) if self._spool is not None else []
        sealed = SealedPeriods()
        if self._sealed is not None and not from_documents:
            sealed = await self._sealed.periods(series, wanted)
        found = RangeSet(
            (*sealed.stored, *(TimeRange(timestamp, timestamp + length) for timestamp in spooled))
        )
        with _traced("list", series):
            for part in RangeSet(sealed.known).missing(wanted):
                for timestamp in await self._storage.list_timestamps(
                    exchange_name, coin_symbol, part.start, part.end, interval=interval
                ):
                    if series.interval.is_aligned(timestamp):
                        found.add(TimeRange(timestamp, timestamp + length))
        return list(found)

    # -- records and health -----------------------------------------------------------------

    async def read_record(self, path: str) -> bytes | None:
        _check_record(path)
        return await self._storage.read_blob(path)

    async def write_record(self, path: str, content: bytes) -> None:
        _check_record(path)
        if not self._may_write():
            raise StorageUnavailable(
                f"{self._storage.address}: {path} is not written while another service may collect"
            )
        await self._storage.write_blob(path, content)

    async def check_health(self) -> None:
        if self._away is not None:
            raise StorageUnavailable(self._away)
        if self._collecting and self._may_write():
            try:
                await self._storage.check_writable()
            except StorageUnavailable:
                self._doubt()
                raise

    async def warnings(self) -> list[str]:
        return await self._storage.warnings()

    @property
    def status(self) -> StorageStatus:
        spool = self._spool
        return StorageStatus(
            away=self._away,
            stuck=tuple(self._stuck.values()),
            spooled=spool.entries if spool is not None else 0,
            spooled_bytes=spool.bytes if spool is not None else 0,
            spool_full=spool.is_full if spool is not None else False,
        )

    @property
    def totals(self) -> StorageTotals:
        return self._totals

    # -- writing to the backend -------------------------------------------------------------

    async def _write_batch(self, series: Series, entries: Sequence[Entry]) -> list[Stored]:
        """Decide and write; the series is locked."""
        await self._check_market(series, entries)
        tried: dict[int, Stored] = {}
        for _ in range(WRITE_TRIES):
            held = await self._held(series, entries)
            answers = []
            for entry in entries:
                there = held[entry.timestamp].content if entry.timestamp in held else None
                mine = tried.get(entry.timestamp)
                # What a write that was answered too late, or refused half way, did write is ours.
                answers.append(mine if mine and mine.entry == there else _decide(there, entry))
            tried = {answer.entry.timestamp: answer for answer in answers}
            changed = [
                answer.entry
                for answer in answers
                if answer.change is not Change.UNCHANGED
                and (
                    answer.entry.timestamp not in held
                    or held[answer.entry.timestamp].content != answer.entry
                )
            ]
            try:
                if changed:
                    async with self._unsealed(series, changed):
                        written = await self._storage.save_entries(
                            series.exchange,
                            series.coin,
                            [(entry.timestamp, entry.to_document()) for entry in changed],
                            interval=series.interval.name,
                            expected={
                                entry.timestamp: held[entry.timestamp].version
                                for entry in changed
                                if entry.timestamp in held
                            },
                        )
                    self._totals.written_bytes[series.exchange] += written
            except StaleVersion:
                continue
            self._remember(series, entries[0].market, answers)
            return answers
        raise StorageUnavailable(
            f"{self._storage.address}: others wrote {series} first {WRITE_TRIES} times in a row; "
            f"let one service collect into a root"
        )

    def _unsealed(
        self, series: Series, entries: Sequence[Entry]
    ) -> AbstractAsyncContextManager[None]:
        if self._sealed is None:
            return nullcontext()
        return self._sealed.changing(series, [entry.timestamp for entry in entries])

    async def _held(self, series: Series, entries: Sequence[Entry]) -> dict[int, Held]:
        return await self._storage.get_entries(
            series.exchange,
            series.coin,
            [entry.timestamp for entry in entries],
            interval=series.interval.name,
            decode=entry_decoder(series),
        )

    @staticmethod
    def _check_batch(series: Series, entries: Sequence[Entry]) -> None:
        if any(entry.series != series or entry.market != entries[0].market for entry in entries):
            raise InvalidRequest("a batch takes entries of one series and one market")
        times = [entry.timestamp for entry in entries]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise InvalidRequest("a batch takes entries ascending by time, each period once")
        for entry in entries:
            book = entry.order_book
            if book is not None and book.depth > BOOK_DEPTH:
                raise InvalidEntry(
                    f"order book of {series} {entry.timestamp} is deeper than {BOOK_DEPTH} levels "
                    f"a side; store its top"
                )

    async def _check_market(self, series: Series, entries: Sequence[Entry]) -> None:
        market = self._markets.get(series)
        if market is None:
            # The backend's own: what waits in the spool is what may have to be refused.
            latest: Entry | None = await self._storage.get_latest_entry(
                series.exchange,
                series.coin,
                interval=series.interval.name,
                decode=entry_decoder(series),
            )
            market = latest.market if latest else entries[0].market
        _check_same_market(series, market, entries[0].market)

    def _remember(self, series: Series, market: str, answers: Sequence[Stored]) -> None:
        self._markets[series] = market
        self._markets.move_to_end(series)
        if len(self._markets) > self._most_markets_remembered:
            self._markets.popitem(last=False)
        for answer in answers:
            entry = answer.entry
            key = (series, entry.timestamp)
            has_book = entry.order_book is not None
            bare = entry.with_order_book(None) if has_book else entry
            self._known[key] = _Known(bare, has_book)
            self._known.move_to_end(key)
        while len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)

    def _lock_of(self, series: Series) -> asyncio.Lock:
        return self._series_locks.setdefault(series, asyncio.Lock())

    # -- while the backend is away ----------------------------------------------------------

    def _may_write(self) -> bool:
        return self._lock is None or self._lock.is_held

    def _has_to_wait(self, spool: Spool, series: Series) -> bool:
        """Whether entries of the series go to the spool: behind what waits there already, and
        while the backend is not known to be there, or to be this process's."""
        return self._doubted or spool.holds(series) or not self._may_write()

    async def _spool_batch(
        self,
        spool: Spool,
        series: Series,
        entries: Sequence[Entry],
        why: StorageError | None = None,
    ) -> list[Stored]:
        """Keep entries locally; the series is locked.

        What they replace is answered from what this process knows of the backend; where it knows
        nothing, the answer is that they are new, and a correction is told when the spool is
        emptied.
        """
        timestamps = [entry.timestamp for entry in entries]
        waiting = await self._read_spool(series, [*spool.timestamps(series)[:1], *timestamps])
        market = self._markets.get(series) or next(
            (entry.market for entry in waiting.values()), entries[0].market
        )
        _check_same_market(series, market, entries[0].market)
        answers = []
        undecided = set()
        for entry in entries:
            key = (series, entry.timestamp)
            spooled, known = waiting.get(entry.timestamp), self._known.get(key)
            if spooled is not None:
                answers.append(_decide(spooled, entry))
            elif known is not None:
                answers.append(_decide_by_memory(known, entry))
            else:
                answers.append(_decide(None, entry))
                undecided.add(key)
        try:
            kept = [answer.entry for answer in answers if answer.change is not Change.UNCHANGED]
            if kept:
                await spool.put(series, kept)
        except StorageUnavailable as exc:
            if why is None:
                raise
            raise type(exc)(f"{why.message}; {exc.message}") from why
        self._undecided |= undecided
        self._waiting.set()
        return answers

    async def _spooled(self, series: Series, wanted: TimeRange) -> dict[int, Entry]:
        if self._spool is None:
            return {}
        return await self._read_spool(series, self._spool.timestamps(series, wanted))

    async def _read_spool(self, series: Series, timestamps: Iterable[int]) -> dict[int, Entry]:
        if self._spool is None:
            return {}
        waiting = set(self._spool.timestamps(series))
        wanted = [timestamp for timestamp in timestamps if timestamp in waiting]
        return await self._spool.read(series, wanted) if wanted else {}

    def _look_at_spool(self) -> None:
        if self._spool is not None and self._spool.entries:
            self._waiting.set()

    def _doubt(self) -> None:
        """The backend refused something: entries wait until it was asked whether it is there."""
        self._doubted = True
        self._waiting.set()

    async def _empty_spool(self) -> bool:
        """Write everything that waits; whether nothing is left to be done."""
        try:
            await self._storage.check_writable()
        except StorageError as exc:
            self._note_away(exc.message)
            return False
        self._note_back()
        if self._spool is not None:
            await self._empty_serieses(self._spool)
        return not self._stuck

    async def _empty_serieses(self, spool: Spool) -> None:
        for series in spool.serieses():
            try:
                await self._empty_series(spool, series)
            except StorageUnavailable as exc:
                # Of one series perhaps: it disturbs no other.
                if series not in self._stuck:
                    log.warning("series_is_stuck", series=str(series), error=exc.message)
                self._stuck[series] = exc.message
            else:
                if not spool.holds(series) and self._stuck.pop(series, None) is not None:
                    log.info("series_is_stored_again", series=str(series))

    async def _empty_series(self, spool: Spool, series: Series) -> None:
        while spool.holds(series) and self._collecting and self._may_write():
            async with self._lock_of(series):
                await self._empty_batch(spool, series, spool.timestamps(series)[:DRAIN_BATCH])

    async def _empty_batch(self, spool: Spool, series: Series, timestamps: Sequence[int]) -> None:
        """Move entries that wait to the backend; the series is locked."""
        refused = None
        try:
            stored = await self._move(spool, series, timestamps)
        except StorageUnavailable:
            raise
        except StorageError as exc:
            refused = exc
        else:
            for outcome in stored:
                key = (series, outcome.entry.timestamp)
                if key in self._undecided and outcome.change is Change.REVISED and self._listener:
                    self._listener.entry_settled(outcome)
        if refused is not None and len(timestamps) > 1:
            for timestamp in timestamps:
                await self._empty_batch(spool, series, [timestamp])
        elif refused is not None:
            # Of another market, or a schema from the future: it would be refused for ever.
            log.error("spooled_entry_refused", series=str(series), error=refused.message)
            await spool.set_aside(series, timestamps)
        self._undecided.difference_update((series, timestamp) for timestamp in timestamps)

    async def _move(self, spool: Spool, series: Series, timestamps: Sequence[int]) -> list[Stored]:
        entries = await spool.read(series, timestamps)
        unreadable = [timestamp for timestamp in timestamps if timestamp not in entries]
        if unreadable:
            log.error("spooled_entries_unreadable", series=str(series), count=len(unreadable))
            await spool.set_aside(series, unreadable)
        ascending = [entries[timestamp] for timestamp in sorted(entries)]
        stored = await self._write_batch(series, ascending) if ascending else []
        await spool.discard(series, entries)
        return stored

    def _note_away(self, why: str) -> None:
        self._doubted = True
        if self._away is None:
            log.error("storage_is_away", storage=self._storage.address, error=why)
            if self._listener is not None:
                self._listener.storage_changed(available=False)
        self._away = why

    def _note_back(self) -> None:
        self._doubted = False
        if self._away is not None:
            self._away = None
            log.info("storage_is_back", storage=self._storage.address)
            if self._listener is not None:
                self._listener.storage_changed(available=True)


def _traced(operation: str, series: Series) -> ISpan:
    return span(
        f"storage {operation}",
        exchange=series.exchange,
        coin=series.coin,
        interval=series.interval.name,
    )


def _decide(held: Entry | None, new: Entry) -> Stored:
    """What storage holds after ``new`` came where ``held`` is."""
    if held is None:
        return Stored(new, Change.ADDED)
    differs = held.candle != new.candle
    # What waited in a spool may have been corrected more often, and back to what is held even.
    if differs or new.revision > held.revision:
        book = new.order_book or held.order_book
        revision = max(held.revision + differs, new.revision)
        return Stored(new.with_order_book(book).with_revision(revision), Change.REVISED)
    if held.order_book is None and new.order_book is not None:
        return Stored(held.with_order_book(new.order_book), Change.BOOK_ADDED)
    return Stored(held, Change.UNCHANGED)


def _decide_by_memory(known: _Known, new: Entry) -> Stored:
    """What the backend will hold once it is back; its book is there and not in memory."""
    decided = _decide(known.bare, new)
    if decided.change is Change.BOOK_ADDED and known.has_book:
        return replace(decided, change=Change.UNCHANGED)
    return decided


def _check_same_market(series: Series, market: str, other: str) -> None:
    if market != other:
        raise StorageConflict(
            f"{series} holds entries of {market} and takes none of {other}; collect {other} as a "
            f"coin of its own"
        )


def _check_record(path: str) -> None:
    if path.split("/", 1)[0] == RAW_DATA:
        raise InvalidRequest(f"record {path!r} lies among the documents of entries; use another")
