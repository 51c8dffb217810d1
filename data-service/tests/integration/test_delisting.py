"""A market is taken off the exchange and comes back, while another one goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import Feed, Stack, market_clock, stack, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

MINUTE = 60_000
# A minute of the market takes a real second.
SPEED = 60
START = 1_763_985_600_000


async def targets(running: Stack, token: str) -> dict[str, dict[str, Any]]:
    async with running.http(token) as client:
        answer = (await client.get("/api/v1/coins")).raise_for_status().json()
    return {target["coin"]: target for target in answer["targets"]}


async def candles_asked_for(running: Stack) -> int:
    async with httpx.AsyncClient(base_url=running.sandbox_url) as client:
        stats = (await client.get("/_control/stats")).json()
    asked: int = stats["requests"].get("/exchange/v1/public/get-candlestick", 0)
    return asked


async def test_a_delisted_market_is_a_state_disturbs_no_other_and_comes_back_complete(
    tmp_path: Path,
) -> None:
    async with stack(tmp_path, market_clock(START, SPEED), BACKFILL_DAYS="0.02") as running:
        token = running.token()

        async def in_state(coin: str, state: str) -> bool:
            return bool((await targets(running, token))[coin]["state"] == state)

        async with running.websocket(token) as socket:
            feed = Feed(socket)
            for coin in ("BTC", "ETH"):
                async with running.http(token) as client:
                    added = await client.post(
                        "/api/v1/coins", json={"coin": coin, "interval": "1m"}
                    )
                    assert added.status_code == 201
            for coin in ("BTC", "ETH"):
                await until(partial(in_state, coin, "live"))

            await running.fault({"kind": "delisted", "instrument": "BTC_USD"})
            await until(partial(in_state, "BTC", "delisted"))
            before = await candles_asked_for(running)
            await feed.send(type="subscribe_realtime", coin="ETH", interval="1m")
            at = (await feed.next("subscribed"))["last_closed"]
            for _ in range(10):
                at += MINUTE
                assert (await feed.next_closed())["timestamp"] == at
            # Ten minutes of ETH, a look at each again or two, and hardly a question about BTC.
            assert await candles_asked_for(running) - before <= 40
            found = await targets(running, token)
            assert (found["BTC"]["state"], found["ETH"]["state"]) == ("delisted", "live")

            await running.clear_faults()
            await until(partial(in_state, "BTC", "live"))
            async with running.http(token) as client:
                coverage = await client.get(
                    "/api/v1/coverage", params={"coin": "BTC", "interval": "1m"}
                )
        told = coverage.raise_for_status().json()
        assert [gap for gap in told["gaps"] if gap["start"] < at] == []
        assert "market_served_again" in running.logs()
        assert running.logs().count("market_delisted") == 1
