"""What is stored, for who reads it beside its writer and must change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domain.entry import Entry, entry_reader
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidEntry
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import Decode, IRawDataStorage
from storage.root_stamp import demand_stamp


@dataclass(frozen=True, slots=True)
class Broken:
    """A document that is no entry of its series and period; ``why`` says what is wrong with it."""

    why: str


class StoredDocuments:
    """The documents of a root, and those that wait for it in the local spool.

    Nothing is made, written, locked or cleaned up, so it may be used beside the service that
    collects into the root. ``open`` before use, ``close`` afterwards.
    """

    def __init__(self, storage: IRawDataStorage, spool_folder: Path) -> None:
        self._storage = storage
        self._spool = LocalFileStorage(spool_folder)

    async def open(self, *, redirected: bool | None) -> None:
        """Connect, and make sure that the root is one of this kind of exchanges; None for any.

        Raises:
            StorageConflict: it holds candles of the other kind.
            StorageError: it is not there, or no service has collected into it.
        """
        await self._storage.open(read_only=True)
        await demand_stamp(self._storage, redirected=redirected)

    async def has(self, exchange: str, coin: str) -> bool:
        """Whether anything of a coin is stored.

        Raises:
            StorageError: the backend, or the spool, cannot be read.
        """
        return await self._storage.check_coin_exists(
            exchange, coin
        ) or await self._spool.check_coin_exists(exchange, coin)

    async def times(self, series: Series, part: TimeRange) -> list[int]:
        """The opens (ms) of what is stored of a range, ascending.

        Raises:
            StorageError: the backend, or the spool, cannot be listed.
        """
        found: set[int] = set()
        for storage in (self._spool, self._storage):
            found.update(
                await storage.list_timestamps(
                    series.exchange,
                    series.coin,
                    part.start,
                    part.end,
                    interval=series.interval.name,
                )
            )
        return sorted(found)

    async def read(self, series: Series, timestamps: Sequence[int]) -> dict[int, Entry | Broken]:
        """What is stored of these periods, by their opens (ms).

        What waits in the spool stands for what it will replace in the backend.

        Raises:
            StorageError: the backend, or the spool, cannot be read.
        """
        # The spool first: what moves to the backend meanwhile is then found there too.
        waiting = await _read(self._spool, series, timestamps)
        stored = await _read(self._storage, series, timestamps)
        # What cannot be read is taken out of the spool and never reaches the backend.
        readable = {at: found for at, found in waiting.items() if isinstance(found, Entry)}
        return waiting | stored | readable

    async def close(self) -> None:
        """Release what is held. Idempotent."""
        await self._spool.close()
        await self._storage.close()


async def _read(
    storage: IRawDataStorage, series: Series, timestamps: Sequence[int]
) -> dict[int, Entry | Broken]:
    held = await storage.get_entries(
        series.exchange,
        series.coin,
        timestamps,
        interval=series.interval.name,
        decode=_decoder(series),
    )
    return {at: item.content for at, item in held.items() if item.content is not None}


def _decoder(series: Series) -> Decode:
    read = entry_reader(series)

    def decode(timestamp: int, content: bytes) -> Entry | Broken:
        try:
            entry = read(content)
        except InvalidEntry as exc:
            return Broken(exc.message)
        if entry.timestamp != timestamp:
            return Broken(f"it is of the period {entry.timestamp}")
        return entry

    return decode
