"""From the bytes of a document to the entry of a series."""

from __future__ import annotations

from domain.entry import Entry, entry_reader
from domain.series import Series
from errors import InvalidEntry, UnknownSchema
from storage.interfaces import Decode, StorageError
from storage.path_utility import StoragePathUtility


def entry_decoder(series: Series) -> Decode:
    """What backends read documents of ``series`` with.

    It makes the ``Entry`` that the document's name promises, or None where the document breaks
    the rules of an entry, so that it is fetched and stored anew. One of a schema that this version
    does not know raises ``StorageError``: writing over it would destroy what a newer one stored.
    """

    read = entry_reader(series)

    def decode(timestamp: int, content: bytes) -> Entry | None:
        try:
            entry = read(content)
        except UnknownSchema as exc:
            path = StoragePathUtility.get_raw_data_path(
                series.exchange, series.coin, timestamp, interval=series.interval.name
            )
            raise StorageError(f"{path}: {exc.message}") from exc
        except InvalidEntry:
            return None
        return entry if entry.candle.timestamp == timestamp else None

    return decode
