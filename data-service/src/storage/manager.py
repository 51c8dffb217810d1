"""Validated entries over a storage backend: decides what may replace what."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final
from weakref import WeakValueDictionary

import structlog

from domain.entry import SCHEMA, Entry
from domain.interval import DEFAULT_INTERVAL, Interval
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from errors import InvalidEntry, InvalidRequest
from storage.interfaces import (
    Change,
    IRawDataStorage,
    IStorageManager,
    StorageConflict,
    StorageError,
    Stored,
    Timestamp,
)
from storage.path_utility import RAW_DATA, StoragePathUtility, to_range

_EVER: Final = TimeRange(0, 2**62)
# Documents read between two looks at what else the event loop has to do.
_READ_AT_ONCE: Final = 200


class StorageManagerImpl(IStorageManager):
    """Reads, compares, then writes, one write of a series after the other.

    A document that breaks the rules of an entry is reported once and counts as absent, so that it
    is fetched and stored anew; one of a schema that this version does not know is refused, since
    writing over it would destroy what a newer version stored.

    Another process that writes the same series at the same time is not seen: one service collects
    into a root.
    """

    def __init__(self, storage: IRawDataStorage, *, most_markets_remembered: int = 10_000) -> None:
        self._storage = storage
        self._most_markets_remembered = most_markets_remembered
        self._locks: WeakValueDictionary[Series, asyncio.Lock] = WeakValueDictionary()
        self._markets: OrderedDict[Series, str] = OrderedDict()
        self._broken: dict[Series, set[int]] = {}
        self._log = structlog.get_logger(__name__)

    async def store_raw_data(self, entry: Entry) -> Stored:
        return (await self.store_batch([entry]))[0]

    async def store_batch(self, entries: Sequence[Entry]) -> list[Stored]:
        if not entries:
            return []
        series = entries[0].series
        self._check_batch(series, entries)
        async with self._lock(series):
            await self._check_market(series, entries)
            held = await self._held(series, entries)
            answers = [_decide(held.get(entry.timestamp), entry) for entry in entries]
            changed = [
                (answer.entry.timestamp, answer.entry.to_document())
                for answer in answers
                if answer.change is not Change.UNCHANGED
            ]
            if changed:
                await self._storage.save_entries(
                    series.exchange, series.coin, changed, interval=series.interval.name
                )
                self._mend(series, [timestamp for timestamp, _ in changed])
            self._remember(series, entries[0].market)
        return answers

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
        wanted = to_range(start_time, end_time)
        found: list[Entry] = []
        while True:
            asked = None if limit is None else limit - len(found)
            documents = await self._storage.get_range(
                exchange_name, coin_symbol, start_time, end_time, asked, offset, interval=interval
            )
            entries = await _read_all(series, documents)
            if not _is_regular(entries, wanted):
                entries = await self._read_by_name(series, wanted, offset, len(documents))
            found.extend(entry for entry in entries if entry is not None)
            offset += len(documents)
            if asked is None or len(found) >= (limit or 0) or len(documents) < asked:
                return found

    async def get_latest_entry(
        self, exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> Entry | None:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        document = await self._storage.get_latest_entry(
            exchange_name, coin_symbol, interval=interval
        )
        if document is None:
            return None
        return _read(series, document) or await self._latest_by_name(series)

    async def list_coins(self, exchange_name: str) -> list[str]:
        return await self._storage.list_coins(exchange_name)

    async def check_coin_exists(self, exchange_name: str, coin_symbol: str) -> bool:
        return await self._storage.check_coin_exists(exchange_name, coin_symbol)

    async def stored_ranges(
        self,
        exchange_name: str,
        coin_symbol: str,
        start_time: Timestamp,
        end_time: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[TimeRange]:
        series = Series(exchange_name, coin_symbol, Interval.parse(interval))
        timestamps = await self._storage.list_timestamps(
            exchange_name, coin_symbol, start_time, end_time, interval=interval
        )
        broken = self._broken.get(series, set())
        length = series.interval.milliseconds
        stored = RangeSet(
            TimeRange(timestamp, timestamp + length)
            for timestamp in timestamps
            if timestamp not in broken and series.interval.is_aligned(timestamp)
        )
        return list(stored)

    async def read_record(self, path: str) -> bytes | None:
        _check_record(path)
        return await self._storage.read_blob(path)

    async def write_record(self, path: str, content: bytes) -> None:
        _check_record(path)
        await self._storage.write_blob(path, content)

    async def check_health(self) -> None:
        await self._storage.check_writable()

    def _lock(self, series: Series) -> asyncio.Lock:
        return self._locks.setdefault(series, asyncio.Lock())

    @staticmethod
    def _check_batch(series: Series, entries: Sequence[Entry]) -> None:
        if any(entry.series != series or entry.market != entries[0].market for entry in entries):
            raise InvalidRequest("a batch takes entries of one series and one market")
        times = [entry.timestamp for entry in entries]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise InvalidRequest("a batch takes entries ascending by time, each period once")

    async def _check_market(self, series: Series, entries: Sequence[Entry]) -> None:
        market = self._markets.get(series)
        if market is None:
            latest = await self.get_latest_entry(
                series.exchange, series.coin, interval=series.interval.name
            )
            market = latest.market if latest else entries[0].market
        if market != entries[0].market:
            raise StorageConflict(
                f"{series} holds entries of {market} and takes none of {entries[0].market}; "
                f"collect {entries[0].market} as a coin of its own"
            )

    def _remember(self, series: Series, market: str) -> None:
        self._markets[series] = market
        self._markets.move_to_end(series)
        if len(self._markets) > self._most_markets_remembered:
            self._markets.popitem(last=False)

    async def _held(self, series: Series, entries: Sequence[Entry]) -> dict[int, Entry]:
        documents = await self._storage.get_entries(
            series.exchange,
            series.coin,
            [entry.timestamp for entry in entries],
            interval=series.interval.name,
        )
        held = {
            timestamp: self._entry(series, document, timestamp)
            for timestamp, document in documents.items()
        }
        return {timestamp: entry for timestamp, entry in held.items() if entry is not None}

    def _entry(self, series: Series, document: Mapping[str, Any], timestamp: int) -> Entry | None:
        """The entry in the document named by ``timestamp``; None and a report when it is broken.

        Raises:
            StorageError: the document is of a schema that this version does not know.
        """
        entry = _read(series, document)
        if entry is not None and entry.timestamp == timestamp:
            return entry
        path = StoragePathUtility.get_raw_data_path(
            series.exchange, series.coin, timestamp, interval=series.interval.name
        )
        schema = document.get("schema")
        if isinstance(schema, int) and schema != SCHEMA:
            raise StorageError(
                f"{path}: schema {schema} cannot be read, this service knows schema {SCHEMA}: "
                f"upgrade the service, or move the document out of the storage root"
            )
        broken = self._broken.setdefault(series, set())
        if timestamp not in broken:
            broken.add(timestamp)
            self._log.warning("storage_document_broken", path=path)
        return None

    async def _read_by_name(
        self, series: Series, wanted: TimeRange, offset: int, count: int
    ) -> list[Entry | None]:
        """A page of a range that holds broken documents: slower, and knows which ones they are."""
        timestamps = await self._storage.list_timestamps(
            series.exchange, series.coin, wanted.start, wanted.end, interval=series.interval.name
        )
        documents = await self._storage.get_entries(
            series.exchange,
            series.coin,
            timestamps[offset : offset + count],
            interval=series.interval.name,
        )
        return [
            self._entry(series, document, timestamp) for timestamp, document in documents.items()
        ]

    async def _latest_by_name(self, series: Series) -> Entry | None:
        """The newest entry of a series whose newest document is broken: rare, so found slowly."""
        timestamps = await self._storage.list_timestamps(
            series.exchange, series.coin, _EVER.start, _EVER.end, interval=series.interval.name
        )
        for timestamp in reversed(timestamps):
            document = await self._storage.get_entry(
                series.exchange, series.coin, timestamp, interval=series.interval.name
            )
            entry = None if document is None else self._entry(series, document, timestamp)
            if entry is not None:
                return entry
        return None

    def _mend(self, series: Series, timestamps: Sequence[int]) -> None:
        broken = self._broken.get(series)
        if broken is not None:
            broken.difference_update(timestamps)
            if not broken:
                del self._broken[series]


def _decide(held: Entry | None, new: Entry) -> Stored:
    """What storage holds after ``new`` came where ``held`` is."""
    if held is None:
        return Stored(new, Change.ADDED)
    book = new.order_book or held.order_book
    if held.candle != new.candle:
        revised = new.with_order_book(book).with_revision(held.revision + 1)
        return Stored(revised, Change.REVISED)
    if held.order_book is None and new.order_book is not None:
        return Stored(held.with_order_book(new.order_book), Change.BOOK_ADDED)
    return Stored(held, Change.UNCHANGED)


def _read(series: Series, document: Mapping[str, Any]) -> Entry | None:
    """The entry in a document of a series, or None when it holds none."""
    try:
        entry = Entry.from_document(document)
    except InvalidEntry:
        return None
    return entry if entry.series == series else None


async def _read_all(series: Series, documents: Sequence[Mapping[str, Any]]) -> list[Entry | None]:
    """The entries in many documents, letting others run meanwhile."""
    entries = []
    for count, document in enumerate(documents, start=1):
        entries.append(_read(series, document))
        if count % _READ_AT_ONCE == 0:
            await asyncio.sleep(0)
    return entries


def _is_regular(entries: Sequence[Entry | None], wanted: TimeRange) -> bool:
    """Whether every document held an entry of the range, ascending as their names do."""
    times = [entry.timestamp for entry in entries if entry is not None]
    return (
        len(times) == len(entries)
        and all(earlier < later for earlier, later in pairwise(times))
        and (not times or (times[0] in wanted and times[-1] in wanted))
    )


def _check_record(path: str) -> None:
    if path.split("/", 1)[0] == RAW_DATA:
        raise InvalidRequest(f"record {path!r} lies among the documents of entries; use another")
