"""A running service seals closed days beside its documents, and reads them, whatever happens.

What the table has is read by this file alone, and compared with what the exchange says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_table import CandleTable
from storage.path_utility import StoragePathUtility
from target_management.delta_engine import DeltaEngine
from tests.support.azurite import ACCOUNT, KEY, Azurite
from tests.support.backends import AzureContainer, Backend, LocalFolder
from tests.support.listing_proxy import as_azure_lists
from tests.support.market import DAY, HOUR
from tests.support.processes import Stack, market_clock, run, stack, until
from tests.support.records import Row
from tests.support.sandbox_rest import Rows, candles

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MIDNIGHT = 1_763_942_400_000  # 2025-11-24T00:00:00Z
NOW = MIDNIGHT + 6 * HOUR
# Ten minutes of the market, between two rounds of sealing, take two and a half real seconds.
SPEED = 240
SERIES = Series("crypto.com", "BTC", Interval.parse("1m"))
YESTERDAY = TimeRange(MIDNIGHT - DAY, MIDNIGHT)
HALF_A_DAY = 0.75


class Sealed:
    """The table as another program sees it."""

    def __init__(self, backend: Backend) -> None:
        settings = backend.settings
        root, options = settings["STORAGE_ROOT"], None
        if settings["STORAGE_TYPE"] == "azure":
            endpoint = settings["AZURE_STORAGE_CONNECTION_STRING"].split("BlobEndpoint=")[1]
            options = {
                "account_name": ACCOUNT,
                "account_key": KEY,
                "allow_http": "true",
                "endpoint": endpoint.rstrip(";"),
            }
            root = f"az://{root}"
        self._table = CandleTable(DeltaEngine(), f"{root}/candles_delta", options)

    def rows(self, part: TimeRange) -> Rows:
        found: dict[int, Row] = {}
        for at, *values in self._table.read(SERIES, part).candles.rows():
            opened, high, low, close, volume = values
            found[at] = (opened, high, low, close, volume)
        return found

    async def has(self, part: TimeRange, count: int) -> bool:
        """Whether a part is sealed with so many candles."""
        known, _ = self._table.stored(SERIES, part)
        return known == (part,) and len(self.rows(part)) == count


@contextmanager
def root_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Backend]:
    if kind == "local":
        yield LocalFolder(folder)
        return
    azurite: Azurite = request.getfixturevalue("azurite")
    with as_azure_lists(azurite) as connection_string:
        yield AzureContainer(azurite, request.getfixturevalue("container"), connection_string)


async def history(running: Stack, part: TimeRange) -> tuple[Rows, dict[str, Any]]:
    """What the service tells of a part, by time, and where it was found."""
    async with running.http(running.token()) as client:
        answer = await client.get(
            "/api/v1/history",
            params={"coin": "BTC", "interval": "1m", "start": part.start, "end": part.end,
                    "limit": 5000},
        )  # fmt: skip
    page = answer.raise_for_status().json()
    assert page["next_start"] is None
    return {row[0]: tuple(row[1:]) for row in page["rows"]}, page


@pytest.mark.parametrize("kind", ["local", "azure"])
async def test_closed_days_are_sealed_read_corrected_and_sealed_again(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with root_of(kind, tmp_path, request) as backend:
        settings = backend.settings | {
            "EXCHANGES": "crypto.com",
            "BACKFILL_DAYS": str(HALF_A_DAY),
            "TARGET_STORAGE_TYPE": "local",
            "STATE_DIR": str(tmp_path / "state"),
        }
        async with stack(tmp_path, market_clock(NOW, SPEED), **settings) as running:
            async with running.http(running.token()) as client:
                answer = await client.post("/api/v1/coins", json={"coin": "BTC", "interval": "1m"})
                since = answer.raise_for_status().json()["target"]["since"]
            truth = await candles(running.sandbox_url, "crypto.com", "BTC/USD", *_of(YESTERDAY))
            assert len(truth) == 1440
            collected = {at: row for at, row in truth.items() if at >= since}
            sealed = Sealed(backend)
            await until(lambda: sealed.has(YESTERDAY, len(collected)))
            assert sealed.rows(YESTERDAY) == collected

            # What was not wanted is fetched for who asks for it: the day has more candles now.
            told, page = await history(running, YESTERDAY)
            assert told == truth
            assert page["sources"] == {
                "storage": len(collected), "exchange": 1440 - len(collected),
            }  # fmt: skip
            told, page = await history(running, YESTERDAY)
            assert (told, page["sources"]) == (truth, {"storage": 1440, "exchange": 0})
            await until(lambda: sealed.has(YESTERDAY, 1440))
            assert sealed.rows(YESTERDAY) == truth

            # A root that a service collects into is sealed by that alone.
            code, _, errors = await run("seal", folder=tmp_path, **running.settings)
            assert (code, len(errors)) == (2, 1)
            assert "collects into it" in errors[0]

            await running.kill_service()
            await running.start_service()
            assert (await history(running, YESTERDAY))[0] == truth
            assert await running.stop_service() == 0
            if kind == "local":
                await seal_by_hand(running, backend, truth)
        assert "Traceback" not in running.logs()


async def seal_by_hand(running: Stack, backend: Backend, truth: Rows) -> None:
    """Without its table, a root is sealed anew from its documents; a document that is lost then is
    missing from nothing that is served."""
    root = Path(backend.settings["STORAGE_ROOT"])
    shutil.rmtree(root / "candles_delta")
    code, lines, _ = await run("seal", "--coin", "eth", folder=running.folder, **running.settings)
    assert (code, lines[-1]) == (0, f"{root / 'candles_delta'}: 0 days sealed")
    code, lines, _ = await run("seal", folder=running.folder, **running.settings)
    assert (code, lines[-1]) == (0, f"{root / 'candles_delta'}: 1 days sealed")
    assert Sealed(backend).rows(YESTERDAY) == truth
    lost = StoragePathUtility.get_raw_data_path("crypto.com", "BTC", MIDNIGHT - HOUR, interval="1m")
    (root / lost).unlink()
    await running.start_service()
    assert (await history(running, YESTERDAY))[0] == truth
    assert await running.stop_service() == 0


def _of(part: TimeRange) -> tuple[int, int]:
    return part.start, part.end
