"""Ranges of stored candles as columns: sealed days from the table, the rest from documents."""

from __future__ import annotations

from typing import Final

from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from historical.columns import Candles
from historical.sealed_days import is_sealable
from historical.sealed_store import SealedCandleStore
from storage.interfaces import IStorageManager

# So many documents, with their books, are held in memory at once.
_DOCUMENTS_AT_ONCE: Final = 2_000


class CandleReader:
    """Reads what is stored, the same to the last bit whether a day is sealed or not."""

    def __init__(self, storage: IStorageManager, sealed: SealedCandleStore | None = None) -> None:
        self._storage = storage
        self._sealed = sealed

    async def read(self, series: Series, wanted: TimeRange) -> Candles:
        """The stored candles that open in ``wanted``.

        Raises:
            StorageError: storage cannot be read.
        """
        known, parts = RangeSet(), []
        if self._sealed is not None and is_sealable(series.interval):
            # What waits first: what becomes a document meanwhile unseals its day, or is sealed.
            waiting = await self._storage.get_waiting(
                series.exchange,
                series.coin,
                wanted.start,
                wanted.end,
                interval=series.interval.name,
            )
            sealed = await self._sealed.read(series, wanted)
            known = RangeSet(sealed.ranges)
            newer = [entry for entry in waiting if entry.timestamp in known]
            parts += [
                sealed.candles.without(TimeRange(entry.timestamp, entry.end) for entry in newer),
                Candles.of(entry.candle for entry in newer),
            ]
        for part in known.missing(wanted):
            parts += await self._documents(series, part)
        return Candles.joined(parts)

    async def _documents(self, series: Series, part: TimeRange) -> list[Candles]:
        reach = _DOCUMENTS_AT_ONCE * series.interval.milliseconds
        found = []
        for start in range(part.start, part.end, reach):
            entries = await self._storage.get_raw_data_range(
                series.exchange,
                series.coin,
                start,
                min(start + reach, part.end),
                interval=series.interval.name,
            )
            found.append(Candles.of(entry.candle for entry in entries))
        return found
