"""Candles as columns: from entries, to and from the bytes of a Parquet file, and back.

By numpy and the buffers of Arrow alone: its conversions from and to values of Python and numpy load
pandas, which the service does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from domain.candle import Candle
from domain.entry import Entry
from domain.series import Series
from domain.time_range import TimeRange
from historical.columns import Candles, Numbers

_N = TypeVar("_N", np.int32, np.int64, np.float64)

CANDLE: Final = ("timestamp", "open", "high", "low", "close", "volume")
"""What a candle is made of."""
EVERYTHING: Final = (*CANDLE, "market", "revision", "source")
"""What an entry without its book is made of, beside its series."""
_ARROW: Final = {"i4": pa.int32(), "i8": pa.int64(), "f8": pa.float64()}
_TEXTS: Final = ["market", "source"]
# A day of 5m candles takes one group in 57 as well as in one: groups are for ranges within a year.
_GROUP_ROWS: Final = 16_384


@dataclass(frozen=True, slots=True)
class SealedCandles:
    """The candles of the sealed days of a range.

    ``ranges`` are the parts of the range that they speak for: a period of theirs that has no candle
    here has none.
    """

    ranges: tuple[TimeRange, ...]
    candles: Candles


def use_returning_memory() -> None:
    """Make Arrow take its memory from an allocator that gives back what a read is done with, where
    the library was built with one. It holds for the process."""
    with suppress(NotImplementedError):
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def table_of(entries: Sequence[Entry]) -> pa.Table:
    """The rows of entries, without their books, in their order."""
    candles = [entry.candle for entry in entries]
    columns = {
        "timestamp": _arrow([candle.timestamp for candle in candles], "i8"),
        "open": _arrow([candle.open for candle in candles], "f8"),
        "high": _arrow([candle.high for candle in candles], "f8"),
        "low": _arrow([candle.low for candle in candles], "f8"),
        "close": _arrow([candle.close for candle in candles], "f8"),
        "volume": _arrow([candle.volume for candle in candles], "f8"),
        "market": _texts([entry.market for entry in entries]),
        "revision": _arrow([entry.revision for entry in entries], "i4"),
        "source": _texts([entry.source for entry in entries]),
    }
    return _required(pa.Table.from_arrays(list(columns.values()), names=list(columns)))


@cache
def no_rows(columns: Sequence[str]) -> pa.Table:
    """The columns without a row."""
    return table_of([]).select(list(columns))


def entries_of(table: pa.Table, series: Series) -> list[Entry]:
    """The entries that rows of ``EVERYTHING`` were made of, without their books."""
    columns = [table[name].to_pylist() for name in EVERYTHING]
    return [
        Entry(series, market, Candle(*candle), None, source, revision)
        for *candle, market, revision, source in zip(*columns, strict=True)
    ]


def candles_of(table: pa.Table, ranges: tuple[TimeRange, ...]) -> SealedCandles:
    """The columns of rows of ``CANDLE``."""
    prices = (_numpy(table[name], np.float64) for name in CANDLE[1:])
    return SealedCandles(ranges, Candles(numbers(table, "timestamp"), *prices))


def numbers(table: pa.Table, name: str) -> Numbers:
    """A column of whole numbers."""
    return _numpy(table[name], np.int64)


def merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of one or several tables, each ascending, ascending by time; no time is in two."""
    filled = sorted(
        (table for table in tables if table.num_rows),
        key=lambda table: table["timestamp"][0].as_py(),
    )
    if not filled:
        return tables[0]
    together = pa.concat_tables(filled)
    times = numbers(together, "timestamp")
    if bool(np.all(times[1:] > times[:-1])):
        return together
    return together.take(_arrow(np.argsort(times), "i8"))


def within(table: pa.Table, wanted: TimeRange) -> pa.Table:
    """The rows of an ascending table that lie in ``wanted``."""
    first, end = np.searchsorted(numbers(table, "timestamp"), (wanted.start, wanted.end))
    return table.slice(int(first), max(0, int(end - first)))


def outside(table: pa.Table, unwanted: Sequence[TimeRange]) -> pa.Table:
    """The rows of an ascending table that lie in none of the ascending, disjoint ranges."""
    kept, at = [], -(2**63)
    for part in unwanted:
        kept.append(within(table, TimeRange(at, part.start)))
        at = part.end
    kept.append(within(table, TimeRange(at, 2**63 - 1)))
    return pa.concat_tables(kept)


def to_parquet(table: pa.Table) -> bytes:
    """The bytes of a file of rows of ``EVERYTHING``."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        # Prices hardly repeat: a dictionary of them makes files larger and reading slower.
        use_dictionary=_TEXTS,
        row_group_size=_GROUP_ROWS,
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_parquet(source: Any, columns: Sequence[str], wanted: TimeRange | None = None) -> pa.Table:
    """Rows of a file, all of them or those in ``wanted``.

    Raises:
        pa.ArrowInvalid: it is no such file.
        OSError: it cannot be read, or is cut off.
    """
    chosen = list(columns)
    if wanted is None:
        with pq.ParquetFile(source) as file:
            return file.read(columns=chosen)
    # Of a part little is read at a time, again and again: that neither gains by threads nor by
    # buffers, which keep memory.
    with pq.ParquetFile(source, pre_buffer=False) as file:
        groups = file.read_row_groups(_groups(file, wanted), columns=chosen, use_threads=False)
        return within(groups, wanted)


def _groups(file: pq.ParquetFile, wanted: TimeRange) -> list[int]:
    """The groups of rows that may have some of ``wanted``."""
    metadata = file.metadata
    at = metadata.schema.names.index("timestamp")
    groups = []
    for number in range(metadata.num_row_groups):
        statistics = metadata.row_group(number).column(at).statistics
        if statistics.min < wanted.end and statistics.max >= wanted.start:
            groups.append(number)
    return groups


def _required(table: pa.Table) -> pa.Table:
    """The same table, whose schema says that no value is missing."""
    fields = [pa.field(field.name, field.type, nullable=False) for field in table.schema]
    return table.cast(pa.schema(fields))


def _arrow(values: Sequence[float] | npt.NDArray[Any], kind: str) -> pa.Array:
    array = np.asarray(values, dtype=kind)
    return pa.Array.from_buffers(_ARROW[kind], len(array), [None, pa.py_buffer(array)])


def _texts(values: Sequence[str]) -> pa.Array:
    """A column of a few texts that repeat."""
    numbered: dict[str, int] = {}
    indices = [numbered.setdefault(value, len(numbered)) for value in values]
    encoded = [text.encode() for text in numbered]
    offsets = np.cumsum([0, *map(len, encoded)], dtype="i4")
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    texts = pa.Array.from_buffers(pa.utf8(), len(encoded), buffers)
    return pa.DictionaryArray.from_arrays(_arrow(indices, "i4"), texts).cast(pa.utf8())


def _numpy(column: pa.ChunkedArray, kind: type[_N]) -> npt.NDArray[_N]:
    """A column without missing values; not copied where it is in one piece."""
    parts: list[npt.NDArray[_N]] = [
        np.frombuffer(chunk.buffers()[1], dtype=kind)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=kind), *parts])
    joined.flags.writeable = False
    return joined
