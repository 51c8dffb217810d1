"""One service collects into a root; a second one serves, and takes over. Real processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import websockets

from tests.support.processes import Feed, Stack, market_clock, stack, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

MINUTE = 60_000


@asynccontextmanager
async def beside(first: Stack) -> AsyncIterator[Stack]:
    """A second service with the very same settings."""
    second = dataclasses.replace(first, service=None, url="", _log=100)
    await second.start_service()
    try:
        yield second
    finally:
        await second.stop_service()


async def test_a_second_service_serves_what_is_stored_and_takes_over_when_the_first_is_gone(
    tmp_path: Path,
) -> None:
    async with stack(tmp_path, market_clock(1_763_985_600_000, 60), BACKFILL_DAYS="0.04") as first:
        token = first.token()
        async with first.websocket(token) as socket:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
            await feed.next("subscribed")
            told = await feed.next_closed()
        assert await first.readiness() == (
            200, {"status": "ready", "reasons": [], "warnings": []}
        )  # fmt: skip

        async with beside(first) as second:
            status, said = await second.readiness()
            assert status == 200
            (warning,) = said["warnings"]
            assert f"pid {first.service.pid if first.service else 0} on " in warning
            async with second.http(token) as client:
                (target,) = (await client.get("/api/v1/coins")).json()["targets"]
                assert (target["coin"], target["state"]) == ("BTC", "degraded")
                assert target["last_entry"] >= told["timestamp"]
                history = await client.get(
                    "/api/v1/history",
                    params={"coin": "BTC", "interval": "1m", "start": told["timestamp"],
                            "end": told["timestamp"] + MINUTE},
                )  # fmt: skip
                assert history.json()["rows"][0][0] == told["timestamp"]
                refused = await client.post("/api/v1/coins", json={"coin": "ETH"})
                assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
                assert "another service collects" in refused.json()["detail"]
                assert "cb_trade_collecting 0.0" in (await client.get("/metrics")).text
            async with second.websocket(token) as socket:
                feed = Feed(socket)
                await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
                assert (await feed.next("error"))["code"] == "storage_unavailable"

            await first.kill_service()

            async def took_over() -> bool:
                status, said = await second.readiness()
                return status == 200 and said["warnings"] == []

            await until(took_over)
            async with second.websocket(token) as socket:
                feed = Feed(socket)
                await feed.send(
                    type="subscribe_realtime", coin="BTC", interval="1m",
                    **{"from": told["timestamp"]},
                )  # fmt: skip
                await feed.next("subscribed")
                seen = [await feed.next_closed() for _ in range(4)]
                assert [data["timestamp"] for data in seen] == [
                    told["timestamp"] + step * MINUTE for step in range(4)
                ]
        # What comes back finds the root free again.
        await first.start_service()
        assert (await first.readiness())[1]["warnings"] == []


async def test_a_root_of_the_other_kind_stops_the_start_with_one_line(tmp_path: Path) -> None:
    async with stack(tmp_path, market_clock(1_763_985_600_000, 1)) as running:
        stamp = json.loads((running.storage_root / ".cb-trade/root.json").read_bytes())
        assert stamp["exchanges"] == "redirected"
        await running.stop_service()
        (running.storage_root / ".cb-trade/root.json").write_bytes(
            b'{"exchanges": "real", "layout": 1}'
        )
        with pytest.raises(AssertionError, match="ended with"):
            await running.start_service()
        assert "holds candles of real exchanges and this service asks redirected" in running.logs()
        assert "Traceback" not in running.logs()


async def test_a_subscriber_of_a_service_that_stands_by_can_still_read(tmp_path: Path) -> None:
    async with stack(tmp_path, market_clock(1_763_985_600_000, 60), BACKFILL_DAYS="0.04") as first:
        token = first.token()
        async with first.http(token) as client:
            (await client.post("/api/v1/coins", json={"coin": "BTC"})).raise_for_status()
        async with beside(first) as second, second.websocket(token) as socket:
            assert isinstance(socket, websockets.ClientConnection)
            feed = Feed(socket)

            async def current() -> bool:
                await feed.send(type="request_current", coin="BTC")
                message = await feed.next("current_data_response", "error")
                return message["type"] == "current_data_response" and bool(
                    message["data"]["closed"]
                )

            await until(current)
