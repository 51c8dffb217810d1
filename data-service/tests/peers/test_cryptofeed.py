"""cryptofeed reads the sandbox's Binance feed beside the service: both see the same trades."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers.running import run_peer
from tests.support.processes import Feed, market_clock, stack

SCRIPT = Path(__file__).parents[2] / "benchmarks/stream_cryptofeed.py"
MARKETS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
COUNT = 400
NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
PATIENCE_S = 120.0

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def by_number(trades: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Trades by their number, without what only one of the two tells."""
    found = {}
    for trade in trades:
        values = {name: trade[name] for name in ("timestamp", "price", "amount", "side")}
        assert int(trade["id"]) not in found
        found[int(trade["id"])] = values
    return found


async def test_it_sees_the_same_trades_as_a_subscriber_of_the_service(tmp_path: Path) -> None:
    out = tmp_path / "cryptofeed.jsonl"
    settings = {"EXCHANGES": "binance", "EXCHANGE_QUOTES": "USDT", "BACKFILL_DAYS": "0.1"}
    ours: dict[str, list[dict[str, Any]]] = {market: [] for market in MARKETS}
    async with (
        stack(tmp_path, market_clock(NOON, 60.0), **settings) as running,
        running.websocket(running.token()) as socket,
    ):
        feed = Feed(socket)
        for market in MARKETS:
            await feed.send(type="subscribe_realtime", coin=market, channel="trades")
        for _ in MARKETS:
            await feed.next("subscribed")

        async def listen() -> None:
            while True:
                message = await feed.next("realtime_data")
                ours[message["market"]] += message["data"]

        async with asyncio.TaskGroup() as group:
            listening = group.create_task(listen())
            await run_peer(
                "python", str(SCRIPT), "--url", running.sandbox_url,
                "--symbols", ",".join(MARKETS), "--count", str(COUNT), "--out", str(out),
                folder=tmp_path, within_s=PATIENCE_S,
            )  # fmt: skip
            listening.cancel()
    theirs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(theirs) >= COUNT
    compared = 0
    for market in MARKETS:
        name = market.replace("/", "-")
        one = by_number([trade for trade in theirs if trade["symbol"] == name])
        other = by_number(ours[market])
        first, last = max(min(one), min(other)), min(max(one), max(other))
        both = [{at: seen[at] for at in seen if first <= at <= last} for seen in (one, other)]
        assert both[0] == both[1]
        compared += len(both[0])
    assert compared > COUNT / 2
