"""Azure Blob Storage goes away while coins are collected: nothing is lost, and the order is kept.

Azurite, the sandbox exchange and the service run as processes of their own; what is stored at the
end is read from Azurite by this file alone and compared with what the exchange says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient

from tests.support.azurite import Azurite, running_azurite
from tests.support.clients import row_of
from tests.support.listing_proxy import as_azure_lists
from tests.support.processes import Feed, Stack, market_clock, stack, until
from tests.support.sandbox_rest import candles

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MINUTE = 60_000
CONTAINER = "candles"
# A minute of the market takes four real seconds: as long as an order is held for what is not stored
# yet, and longer than two calls to a storage that has just gone away.
SPEED = 15
OUTAGE_S = 20.0


@asynccontextmanager
async def collecting(folder: Path, azurite: Azurite) -> AsyncIterator[Stack]:
    """A service that keeps its documents on Azurite, and its targets and spool on the disk."""
    async with AsyncExitStack() as held:
        connection_string = held.enter_context(as_azure_lists(azurite))
        yield await held.enter_async_context(
            stack(
                folder,
                market_clock(1_763_985_600_000, SPEED),
                BACKFILL_DAYS="0.02",
                STORAGE_TYPE="azure",
                STORAGE_ROOT=CONTAINER,
                AZURE_STORAGE_CONNECTION_STRING=connection_string,
                TARGET_STORAGE_TYPE="local",
                STATE_DIR=str(folder / "state"),
            )
        )


@pytest.fixture
async def azurite(tmp_path: Path) -> AsyncIterator[Azurite]:
    (tmp_path / "azurite").mkdir()
    with running_azurite(tmp_path / "azurite") as running:
        yield running


async def not_ready(running: Stack) -> bool:
    status, said = await running.readiness()
    return status == 503 and said["reasons"] != []


async def all_written(running: Stack) -> bool:
    """Whether the storage takes everything again and nothing waits any more."""
    status, said = await running.readiness()
    return status == 200 and said["warnings"] == []


async def metric(running: Stack, name: str) -> float:
    async with running.http(None) as client:
        text = (await client.get("/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def stored(azurite: Azurite) -> dict[int, dict[str, Any]]:
    """Every document of the coin, by time, read from Azurite and not through the service."""
    container = ContainerClient.from_connection_string(azurite.connection_string, CONTAINER)
    with container:
        found = {}
        for name in container.list_blob_names(name_starts_with="raw_data/crypto.com/BTC/"):
            document = json.loads(container.download_blob(name).readall())
            assert name.endswith("_1m.json")
            assert document["timestamp"] not in found
            found[document["timestamp"]] = document
        return found


async def check_all_stored(running: Stack, azurite: Azurite, start: int, end: int) -> None:
    documents = await asyncio.to_thread(stored, azurite)
    truth = await candles(running.sandbox_url, "crypto.com", "BTC/USD", start, end)
    assert len(truth) == (end - start) // MINUTE
    assert {at: row_of(documents[at]) for at in documents if start <= at < end} == truth


async def state_of_storage(feed: Feed) -> str:
    """What subscribers are told next of the storage."""
    while (message := await feed.next("status"))["component"] != "storage":
        pass
    return str(message["state"])


async def subscribe(feed: Feed) -> int:
    """Subscribe to the coin; the first closed candle to be told."""
    await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
    last_closed: int = (await feed.next("subscribed"))["last_closed"]
    return last_closed + MINUTE


async def follow(feed: Feed, next_open: int, count: int) -> int:
    """Read closed candles, each of which must be the next one; the one that comes after them."""
    for _ in range(count):
        message = await feed.next_told()
        assert message["type"] == "realtime_data", message
        assert message["data"]["timestamp"] == next_open
        next_open += MINUTE
    return next_open


async def test_an_outage_of_the_storage_loses_nothing_and_keeps_the_order(
    tmp_path: Path, azurite: Azurite
) -> None:
    async with collecting(tmp_path, azurite) as running:
        token = running.token()
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            first = await subscribe(feed)
            next_open = await follow(feed, first, 2)
            assert (await running.readiness())[0] == 200

            began = asyncio.get_running_loop().time()
            azurite.stop()
            await until(lambda: not_ready(running), within_s=5)
            # It goes on meanwhile: what closes is told, in order, and waits on the local disk.
            lost_from = next_open
            next_open = await follow(feed, next_open, 5)
            assert await state_of_storage(feed) == "degraded"
            assert await metric(running, "cb_trade_spool_entries") >= 4
            assert await metric(running, "cb_trade_storage_available") == 0
            async with running.http(token) as client:
                history = await client.get(
                    "/api/v1/history",
                    params={"coin": "BTC", "interval": "1m", "start": first, "end": next_open},
                )
                assert history.status_code == 503
                assert history.json()["code"] == "storage_unavailable"
            while asyncio.get_running_loop().time() < began + OUTAGE_S:
                next_open = await follow(feed, next_open, 1)
            lost_until = next_open
            await asyncio.to_thread(azurite.start)
            await until(lambda: all_written(running))
            assert await state_of_storage(feed) == "connected"
            back_at = running.clock.now_ms() // MINUTE * MINUTE
            next_open = await follow(feed, next_open, (back_at - next_open) // MINUTE + 2)

        await check_all_stored(running, azurite, first, next_open)
        documents = await asyncio.to_thread(stored, azurite)
        lived_through = [documents[at] for at in range(lost_from, lost_until, MINUTE)]
        assert {document["source"] for document in lived_through} == {"stream"}
        # A book cannot be fetched again: that it is there shows that nothing was.
        assert all(document["order_book"] is not None for document in lived_through)
        assert "Traceback" not in running.logs()
        assert running.logs().count("storage_is_away") == 1


async def test_what_waits_survives_a_kill_in_the_middle_of_an_outage(
    tmp_path: Path, azurite: Azurite
) -> None:
    async with collecting(tmp_path, azurite) as running:
        token = running.token()
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            first = await subscribe(feed)
            next_open = await follow(feed, first, 1)
            azurite.stop()
            await until(lambda: not_ready(running), within_s=5)
            lost_from = next_open
            next_open = await follow(feed, next_open, 3)
            await running.kill_service()

        # It starts without its storage, says so, and collects as soon as it can.
        await running.start_service()
        status, said = await running.readiness()
        assert status == 503
        assert any("not collecting yet" in reason for reason in said["reasons"])
        assert any("wait in the spool" in warning for warning in said["warnings"])
        await asyncio.to_thread(azurite.start)
        await until(lambda: all_written(running))

        async with running.websocket(token) as socket:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m", **{"from": first})
            await feed.next("subscribed")
            behind = (running.clock.now_ms() - first) // MINUTE
            next_open = await follow(feed, first, behind + 1)
        await check_all_stored(running, azurite, first, next_open)
        documents = await asyncio.to_thread(stored, azurite)
        assert {
            documents[at]["source"] for at in range(lost_from, lost_from + 3 * MINUTE, MINUTE)
        } == {"stream"}


async def test_a_wrong_key_stops_the_start_with_one_line(tmp_path: Path, azurite: Azurite) -> None:
    async with collecting(tmp_path, azurite) as running:
        await running.stop_service()
        right = running.settings["AZURE_STORAGE_CONNECTION_STRING"]
        wrong = right.replace("AccountKey=Eby8", "AccountKey=AAAA")
        running.settings["AZURE_STORAGE_CONNECTION_STRING"] = wrong
        with pytest.raises(AssertionError, match="ended with"):
            await running.start_service()
        log = (tmp_path / "service-2.log").read_text()
        assert f"{CONTAINER}" in log
        assert "check the account's key" in log
        assert "Traceback" not in log
        assert "AAAA" not in log
        running.settings["AZURE_STORAGE_CONNECTION_STRING"] = right
        await running.start_service()
