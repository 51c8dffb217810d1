"""What the log of the table of sealed candles says: its schema, and what is in each data file.

The days that a file is of stand in its name (``{days}-{id}.parquet``, days as the hexadecimal bits
of ``sealed_days``), so that they come and go with its rows in one commit. A file of another name is
of no day.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from domain.interval import KNOWN_INTERVALS, Interval
from domain.series import Series
from historical.sealed_days import MOST_DAYS
from target_management.delta_engine import schema_of

PARTITIONS: Final = ("exchange", "coin", "interval", "year")
COLUMNS: Final = {
    "exchange": "string",
    "coin": "string",
    "interval": "string",
    "year": "integer",
    "timestamp": "long",
    "open": "double",
    "high": "double",
    "low": "double",
    "close": "double",
    "volume": "double",
    "market": "string",
    "revision": "integer",
    "source": "string",
}
SCHEMA: Final = schema_of(COLUMNS)
# The log is cleared when upkeep asks for it, and never by other writers.
CONFIGURATION: Final = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 1 days",
    "delta.deletedFileRetentionDuration": "interval 1 days",
}
_NAME: Final = re.compile(rf"([0-9a-f]{{1,{-(-MOST_DAYS // 4)}}})-[0-9a-f]{{32}}\.parquet")


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A data file of one series and year.

    Attributes:
        path: where it is, below the table.
        days: the bits of the days that it has all the candles of; each row is of one of them.
        rows: how many candles it has.
        size: its bytes.
        times: the opens (ms) of its first and last candle, or None where it has none.
    """

    path: str
    days: int
    rows: int
    size: int
    times: tuple[int, int] | None


Files = Mapping[int, tuple[SealedFile, ...]]
"""The files of a series, by year ascending."""


@dataclass(frozen=True, slots=True)
class Change:
    """The files of one series and year that leave, and the one that takes their place."""

    year: int
    removed: tuple[SealedFile, ...]
    added: SealedFile | None


def new_path(series: Series, year: int, days: int) -> str:
    """Where a file of these days is to lie, below the table; no other has the path."""
    # As Delta's own writer names folders: some engines read the values from there.
    folder = "/".join(
        f"{name}={quote(value, safe='')}" for name, value in _partition(series, year).items()
    )
    return f"{folder}/{days:x}-{uuid4().hex}.parquet"


def index_of(table: DeltaTable) -> dict[Series, dict[int, tuple[SealedFile, ...]]]:
    """The files of a handle's version."""
    # Not by ``pa.table``, which loads pandas.
    actions = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    # A statistic that no file has is no column.
    there = set(actions.column_names)
    names = (
        *(f"partition.{name}" for name in PARTITIONS),
        *("path", "num_records", "size_bytes", "min.timestamp", "max.timestamp"),
    )
    columns = (
        actions[name].to_pylist() if name in there else repeat(None, actions.num_rows)
        for name in names
    )
    index: dict[Series, dict[int, list[SealedFile]]] = {}
    for exchange, coin, interval, year, path, rows, size, first, last in zip(*columns, strict=True):
        if interval not in KNOWN_INTERVALS:
            continue
        name = _NAME.fullmatch(path.rpartition("/")[2])
        # The log has paths as addresses.
        file = SealedFile(
            path=unquote(path),
            days=int(name[1], 16) if name is not None else 0,
            rows=rows or 0,
            size=size,
            times=None if first is None else (first, last),
        )
        years = index.setdefault(Series(exchange, coin, Interval.parse(interval)), {})
        years.setdefault(year, []).append(file)
    return {
        series: {year: tuple(years[year]) for year in sorted(years)}
        for series, years in index.items()
    }


def _partition(series: Series, year: int) -> dict[str, str]:
    values = (series.exchange, series.coin, series.interval.name, str(year))
    return dict(zip(PARTITIONS, values, strict=True))


def actions_of(series: Series, change: Change) -> Iterator[AddAction | RemoveAction]:
    now = time.time_ns() // 1_000_000
    values = _partition(series, change.year)
    for file in change.removed:
        yield RemoveAction(
            file.path,
            data_change=True,
            deletion_timestamp=now,
            size=file.size,
            partition_values={**values},
        )
    if change.added is None:
        return
    statistics: dict[str, Any] = {
        "numRecords": change.added.rows,
        "nullCount": {name: 0 for name in COLUMNS if name not in PARTITIONS},
    }
    if change.added.times is not None:
        first, last = change.added.times
        statistics |= {"minValues": {"timestamp": first}, "maxValues": {"timestamp": last}}
    yield AddAction(
        change.added.path,
        change.added.size,
        values,
        modification_time=now,
        data_change=True,
        stats=json.dumps(statistics),
    )
