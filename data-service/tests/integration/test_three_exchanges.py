"""All three exchanges at once, in real processes: every channel, a lost connection, a crash, and
what is stored in the end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from config import BUILT_IN_EXCHANGES
from tests.support.processes import Feed, Stack, market_clock, run, stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
CHANNELS = ("candles", "trades", "ticker", "order_book")
FIVE = 300_000
PATIENCE_S = 90.0
Key = tuple[str, str]


class Listener:
    """One client that has subscribed to everything of BTC, and what it was told."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.told: dict[Key, list[Any]] = defaultdict(list)
        self.last_sequence: dict[str, int] = {}

    async def subscribe(self, **resume: int) -> None:
        for exchange in BUILT_IN_EXCHANGES:
            for channel in CHANNELS:
                wanted = {"coin": "BTC", "exchange": exchange, "channel": channel}
                start = {"from": resume[exchange]} if channel == "candles" and resume else {}
                await self._feed.send(type="subscribe_realtime", **wanted, **start)
        for _ in range(len(BUILT_IN_EXCHANGES) * len(CHANNELS)):
            await self._feed.next("subscribed")

    async def hear(self) -> None:
        message = await self._feed.next("realtime_data", "gap")
        number = message["subscription_id"]
        assert message["sequence"] == self.last_sequence.get(number, 0) + 1
        self.last_sequence[number] = message["sequence"]
        if message["type"] == "realtime_data":
            self.told[message["exchange"], message["channel"]].append(message["data"])

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await self.hear()

    def closed(self, exchange: str) -> list[int]:
        return [data["timestamp"] for data in self.told[exchange, "candles"] if data["closed"]]

    def has(self, count: int) -> bool:
        """Whether every channel told so much, and every exchange closed a candle."""
        return all(
            len(self.told[exchange, channel]) >= count
            for exchange in BUILT_IN_EXCHANGES
            for channel in CHANNELS
        ) and all(self.closed(exchange) for exchange in BUILT_IN_EXCHANGES)

    def check(self) -> None:
        """Trades come once, books never cross, tickers are of their market."""
        for exchange in BUILT_IN_EXCHANGES:
            trades = [trade for told in self.told[exchange, "trades"] for trade in told]
            assert len({trade["id"] for trade in trades}) == len(trades)
            for book in self.told[exchange, "order_book"]:
                assert len(book["bids"]) == len(book["asks"]) == 50
                assert book["bids"][0][0] < book["asks"][0][0]
            for ticker in self.told[exchange, "ticker"]:
                assert ticker["low"] <= ticker["last"] <= ticker["high"]


async def test_every_channel_of_every_exchange_through_a_lost_connection_and_a_crash(
    tmp_path: Path,
) -> None:
    settings = {"EXCHANGES": ",".join(BUILT_IN_EXCHANGES), "BACKFILL_DAYS": "0.5"}
    async with stack(tmp_path, market_clock(NOON, 60.0), **settings) as running:
        token = running.token()
        async with running.websocket(token) as socket:
            listener = Listener(Feed(socket))
            await listener.subscribe()
            await listener.until(lambda: listener.has(2))
            await running.fault({"kind": "drop_sockets"})
            before = {key: len(told) for key, told in listener.told.items()}
            await listener.until(
                lambda: all(len(listener.told[key]) > count + 2 for key, count in before.items())
            )
            listener.check()
        newest = {exchange: max(listener.closed(exchange)) for exchange in BUILT_IN_EXCHANGES}
        await running.kill_service()
        await running.start_service()
        async with running.websocket(running.token()) as socket:
            again = Listener(Feed(socket))
            await again.subscribe(**newest)
            await again.until(lambda: again.has(1))
            for exchange, last in newest.items():
                closed = again.closed(exchange)
                assert closed[0] == last
                assert closed == list(range(last, closed[-1] + 1, FIVE))
        await until_verified(running)


async def until_verified(running: Stack) -> None:
    """What is stored of all three equals what they say."""
    code, lines, _ = await run("verify", folder=running.folder, **running.settings)
    assert code == 0, lines
    assert lines[-1].startswith("3 targets: ")
    assert " 0 missing, 0 different, 0 extra," in lines[-1]
