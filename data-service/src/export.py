"""The command ``export``: a stored series as one file, for whatever reads Parquet, CSV or Arrow.

A composition root of its own, as ``verify``: no lock is taken, nothing of the root is made or
written, and it may run beside the service.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from config import Settings
from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest, NoData
from historical.candle_columns import table_of
from observability.progress import show_progress
from storage.factory import create_storage, spool_folder
from storage.path_utility import StoragePathUtility
from storage.reader import StoredDocuments

WHOLE: Final = 0
INCOMPLETE: Final = 1
# Documents that are read, and written, at once.
BATCH: Final = 5_000
SCHEMA: Final = pa.schema(
    [
        ("exchange", pa.string()),
        ("coin", pa.string()),
        ("market", pa.string()),
        ("interval", pa.string()),
        ("time", pa.timestamp("ms", tz="UTC")),
        ("open", pa.float64()),
        ("high", pa.float64()),
        ("low", pa.float64()),
        ("close", pa.float64()),
        ("volume", pa.float64()),
        ("revision", pa.int32()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to export: a coin, of the exchange that has it stored where none is named, and of
    ``range`` (ms), as a ``parquet``, ``csv`` or ``arrow`` file."""

    coin: str
    exchange: str | None
    interval: str
    range: TimeRange
    format: str
    out: Path | None


def run(settings: Settings, wanted: Wanted, *, progress: TextIO = sys.stderr) -> int:
    """Write the file, say where it is, and by the exit code whether all could be read.

    Raises:
        InvalidRequest: several exchanges have the coin, or the file is there already.
        NoData: nothing of it is stored.
        StorageError: the storage cannot be read.
    """
    return asyncio.run(_export(settings, wanted, progress))


async def _export(settings: Settings, wanted: Wanted, progress: TextIO) -> int:
    async with AsyncExitStack() as stack:
        raw_storage = create_storage(settings)
        documents = StoredDocuments(raw_storage, spool_folder(settings, raw_storage))
        stack.push_async_callback(documents.close)
        # Whatever exchanges it was collected from: nobody is asked.
        await documents.open(redirected=None)
        series = await _series(documents, settings, wanted)
        times = await documents.times(series, wanted.range)
        if not times:
            raise NoData(f"nothing of {series} is stored in that range")
        out = wanted.out or Path(_name(series, wanted.format))
        written, broken = 0, 0
        with _file(out) as part, _writer(part, wanted.format) as writer:
            for at in range(0, len(times), BATCH):
                asked = times[at : at + BATCH]
                found = await documents.read(series, asked)
                entries = [item for time in asked if isinstance(item := found.get(time), Entry)]
                broken += sum(time in found for time in asked) - len(entries)
                writer.write_table(_table(entries, series))
                written += len(entries)
                show_progress(progress, at + len(asked), len(times))
    print(f"{out}: {written} candles of {series}")
    if broken:
        print(f"{broken} documents could not be read; the log says which", file=sys.stderr)
    return INCOMPLETE if broken else WHOLE


async def _series(documents: StoredDocuments, settings: Settings, wanted: Wanted) -> Series:
    interval = Interval.parse(wanted.interval)
    names = settings.exchanges if wanted.exchange is None else (wanted.exchange,)
    having = [name for name in names if await documents.has(name, wanted.coin)]
    if not having:
        raise NoData(f"nothing of {wanted.coin} is stored of {', '.join(names)}")
    if len(having) > 1:
        raise InvalidRequest(
            f"{wanted.coin} is stored of {', '.join(having)}; name one with --exchange"
        )
    return Series(having[0], wanted.coin, interval)


def _name(series: Series, kind: str) -> str:
    coin = StoragePathUtility.encode_name(series.coin)
    return f"{series.exchange}_{coin}_{series.interval}.{kind}"


@contextmanager
def _file(out: Path) -> Iterator[Path]:
    """A place to write to that becomes ``out`` when it was written whole."""
    if out.exists():
        raise InvalidRequest(f"{out} is there already; name another file with --out")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield part
        part.rename(out)
    except OSError as exc:
        raise InvalidRequest(f"{out} cannot be written: {exc.strerror or exc}") from exc
    finally:
        part.unlink(missing_ok=True)


def _writer(part: Path, kind: str) -> Any:
    if kind == "parquet":
        return pa.parquet.ParquetWriter(part, SCHEMA, compression="zstd")
    if kind == "csv":
        return pa.csv.CSVWriter(part, SCHEMA)
    return pa.ipc.new_file(part, SCHEMA)


def _table(entries: Sequence[Entry], series: Series) -> pa.Table:
    rows, count = table_of(entries), len(entries)
    same = {"exchange": series.exchange, "coin": series.coin, "interval": series.interval.name}
    columns = {name: rows[name].combine_chunks() for name in rows.column_names}
    columns |= {name: pa.repeat(pa.scalar(value), count) for name, value in same.items()}
    columns["time"] = columns["timestamp"].cast(SCHEMA.field("time").type)
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)
