"""What reading stored entries costs, against the bare minimum, in the same run.

A year of 5m entries of one coin (105,120 documents) on the local disk, once without order books,
as history is filled, and once with books of 50 levels a side, as a live year is; and one month
(8,640 documents) on Azure Blob Storage: on a stub that takes 20 ms a request, like a real region,
and on Azurite. Each figure is a median of interleaved repeats on a warm page cache.

Ours is ``StorageManagerImpl.get_raw_data_range``, which is what history is read with: validated
entries are returned, all of them at once. The yardsticks return all their documents at once too:

- local: ``[json.loads(path.read_bytes()) for path in sorted(root.rglob("*.json"))]``
- Azure: ``json.loads(await (await container.download_blob(name)).readall())`` of one name after the
  other, as ``list_blob_names`` gives them, through the same client library.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from azure.storage.blob.aio import ContainerClient

from domain.candle import Candle
from domain.entry import Entry
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.series import Series
from storage.documents import encode_document
from storage.implementations.azure_blob_storage import AzureBlobStorage
from storage.implementations.local_file_storage import LocalFileStorage
from storage.manager import StorageManagerImpl
from storage.path_utility import StoragePathUtility

# The emulator and the stub are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.azurite import running_azurite
from tests.support.blob_stub import blob_stub_process

SERIES = Series("crypto.com", "BTC", Interval.parse("5m"))
STEP = SERIES.interval.milliseconds
YEAR_START = 1_735_689_600_000  # 2025-01-01
YEAR = 105_120
DAY = 288
MONTH = 30 * DAY
REGION_DELAY_S = 0.020
CONTAINER = "bench"
REPEATS = 3
# How many entries are handed over at once, and how many the API gives at once.
BATCH = 288
PAGE = 5_000


def entries(count: int, *, books: bool) -> Iterator[Entry]:
    """Sound entries from the start of the year on, each price another."""
    rng = random.Random(11)
    price = 90_000.0
    for at in range(count):
        timestamp = YEAR_START + at * STEP
        last, price = price, max(1_000.0, price * (1 + rng.gauss(0, 0.001)))
        candle = Candle(
            timestamp,
            round(last, 2),
            round(max(last, price) * 1.0005, 2),
            round(min(last, price) * 0.9995, 2),
            round(price, 2),
            round(rng.expovariate(0.2), 5),
        )
        book = None
        if books:
            book = OrderBook(
                timestamp + STEP - 50,
                [(round(price - 0.5 - at * 0.5, 2), round(rng.random() + 0.001, 4))
                 for at in range(50)],
                [(round(price + 0.5 + at * 0.5, 2), round(rng.random() + 0.001, 4))
                 for at in range(50)],
            )  # fmt: skip
        yield Entry(SERIES, "BTC/USD", candle, book, "stream" if books else "rest")


async def fill(manager: StorageManagerImpl, count: int, *, books: bool) -> float:
    """Store entries day by day; how long (s) storing took."""
    batch: list[Entry] = []
    took = 0.0
    for entry in entries(count, books=books):
        batch.append(entry)
        if len(batch) == BATCH:
            took += await timed(lambda: manager.store_batch(batch))
            batch.clear()
    return took


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    """How long (s) it takes; what it returns is freed afterwards."""
    gc.collect()
    started = time.perf_counter()
    answer = await work()
    took = time.perf_counter() - started
    del answer
    return took


def show(what: str, ours: list[float], yardstick: str, theirs: list[float]) -> None:
    """One line: ours, the yardstick, and how many times as fast ours is."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(
        f"{what}: {mine:.3f} s; {yardstick}: {other:.3f} s; {other / mine:.1f} times as fast",
        flush=True,
    )


async def read(manager: StorageManagerImpl, start: int = 0, end: int = 2**60) -> list[Entry]:
    """Ours."""
    return await manager.get_raw_data_range("crypto.com", "BTC", start, end)


async def read_in_pages(manager: StorageManagerImpl, count: int) -> int:
    """Ours as a client streams history: a page after the other."""
    found = 0
    for start in range(YEAR_START, YEAR_START + count * STEP, PAGE * STEP):
        found += len(await read(manager, start, start + PAGE * STEP))
    return found


async def local(folder: Path, *, books: bool) -> None:
    """A year on the local disk."""
    kind = "with books" if books else "without books"
    root = folder / ("books" if books else "bare")
    storage = LocalFileStorage(root)
    manager = StorageManagerImpl(storage)
    await storage.open()
    try:
        took = await fill(manager, YEAR, books=books)
        print(f"a year {kind} stored durably, a day at a time: {took:.1f} s "
              f"({took / YEAR * 1e6:.0f} us an entry)", flush=True)  # fmt: skip

        async def by_hand() -> list[Any]:
            return [json.loads(path.read_bytes()) for path in sorted(root.rglob("*.json"))]

        day_root = root / "raw_data/crypto.com/BTC/2025/06/01"

        async def day_by_hand() -> list[Any]:
            return [json.loads(path.read_bytes()) for path in sorted(day_root.rglob("*.json"))]

        day = YEAR_START + 151 * DAY * STEP
        assert len(await read(manager)) == YEAR == len(await by_hand())
        assert len(await read(manager, day, day + DAY * STEP)) == DAY == len(await day_by_hand())
        figures: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for name, work in (
                ("whole", lambda: read(manager)),
                ("by hand", by_hand),
                ("pages", lambda: read_in_pages(manager, YEAR)),
                ("day", lambda: read(manager, day, day + DAY * STEP)),
                ("day by hand", day_by_hand),
                ("latest", lambda: manager.get_latest_entry("crypto.com", "BTC")),
            ):
                figures.setdefault(name, []).append(await timed(work))
        yardstick = "json.loads of sorted(rglob)"
        show(f"a year {kind} in one call", figures["whole"], yardstick, figures["by hand"])
        show(f"a year {kind} in pages of {PAGE}", figures["pages"], yardstick, figures["by hand"])
        show(f"one day out of a year {kind}", figures["day"],
             "json.loads of sorted(rglob) of its folder alone", figures["day by hand"])  # fmt: skip
        print(f"the latest entry of a year {kind}: {statistics.median(figures['latest']):.4f} s")
    finally:
        await storage.close()
        shutil.rmtree(root)


async def one_after_the_other(connection: str) -> list[Any]:
    """The yardstick on Azure."""
    client = ContainerClient.from_connection_string(connection, CONTAINER)
    async with client:
        return [
            json.loads(await (await client.download_blob(name)).readall())
            async for name in client.list_blob_names(name_starts_with="raw_data/")
        ]


async def azure(
    connection: str,
    where: str,
    *,
    filled: bool,
    computed_s: Callable[[], float] | None = None,
) -> None:
    """A month in a container; measured once, since the yardstick takes minutes."""
    storage = AzureBlobStorage(CONTAINER, connection_string=connection)
    manager = StorageManagerImpl(storage)
    try:
        await storage.open()
        if not filled:
            took = await fill(manager, MONTH, books=True)
            print(f"a month stored on {where}, a day at a time: {took:.1f} s", flush=True)
        assert len(await read(manager, YEAR_START, YEAR_START + STEP)) == 1
        began = computed_s() if computed_s is not None else 0.0
        ours = await timed(lambda: read(manager, YEAR_START, YEAR_START + MONTH * STEP))
        busy = computed_s() - began if computed_s is not None else 0.0
        theirs = await timed(lambda: one_after_the_other(connection))
        show(f"a month on {where}", [ours], "one blob after the other", [theirs])
        if computed_s is not None:
            print(f"{where} itself computed {busy:.1f} s of ours, on its one core: no client reads "
                  f"it more than {theirs / busy:.1f} times as fast", flush=True)  # fmt: skip
        latest = await timed(lambda: manager.get_latest_entry("crypto.com", "BTC"))
        print(f"the latest entry of a month on {where}: {latest:.3f} s", flush=True)
    finally:
        await storage.close()


def month_of_blobs() -> dict[str, bytes]:
    """What a container holds of a month."""
    blobs = {}
    for entry in entries(MONTH, books=True):
        path = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", entry.timestamp)
        blobs[path] = encode_document(path, entry.to_document())
    return blobs


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("local", "azure"), help="half of it")
    only = parser.parse_args().only
    folder = Path(tempfile.mkdtemp(prefix="bench-storage-"))
    try:
        if only != "azure":
            await local(folder, books=False)
            await local(folder, books=True)
        if only != "local":
            with blob_stub_process(month_of_blobs(), delay_s=REGION_DELAY_S) as connection:
                await azure(connection, "a stub with 20 ms a request", filled=True)
            with running_azurite() as emulator:
                await azure(
                    emulator.connection_string,
                    "Azurite",
                    filled=False,
                    computed_s=emulator.processor_s,
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
