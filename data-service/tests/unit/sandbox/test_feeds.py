"""What sockets are told, and when."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import SandboxConfig, running_sandbox
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    clock_at,
    eventually,
    http_to,
    listening,
    recorded_with_holes,
    row_values,
    values_of,
    write_csv,
)

M1 = Interval.parse("1m")
CANDLES = "candlestick.1m.BTC_USD"


async def test_every_closed_period_is_told_with_its_final_values_even_in_a_fast_market() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=20_000))
    told: dict[int, tuple[float, ...]] = {}
    async with running_sandbox(config) as sandbox, listening(sandbox, CANDLES) as listener:
        while len(told) < 120:
            for row in (await listener.data())["data"]:
                told[row["t"]] = row_values(row)
        market = sandbox.venue.instruments()[0]
        first, *_, newest = sorted(told)
        candles = sandbox.venue.prices.candles(market, M1, TimeRange(first, newest))
    del told[newest]
    assert told == {item.timestamp: values_of(item) for item in candles}


async def test_a_closing_candle_is_told_once_more_before_the_next_one_begins() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS + 50_000, speed=100))
    rows: list[dict[str, Any]] = []
    async with running_sandbox(config) as sandbox, listening(sandbox, CANDLES) as listener:
        while not rows or rows[-1]["t"] < NOON_MS + 2 * MINUTE:
            frame = await listener.data()
            assert (frame["channel"], frame["subscription"]) == ("candlestick", CANDLES)
            assert frame["interval"] == "1m"
            rows += frame["data"]
        market = sandbox.venue.instruments()[0]
        finals = {
            opened: sandbox.venue.prices.candle(market, M1, opened)
            for opened in (NOON_MS, NOON_MS + MINUTE)
        }
    assert [row["t"] for row in rows] == sorted(row["t"] for row in rows)
    for before, after in itertools.pairwise(rows):
        if before["t"] < after["t"]:
            final = finals[before["t"]]
            assert final is not None
            assert row_values(before) == values_of(final)


async def test_a_hole_has_no_frames(tmp_path: Path) -> None:
    recorded = recorded_with_holes(NOON_MS, MINUTE, 40, (range(10, 20),))
    file = tmp_path / "ETH_BTC-1m.csv"
    write_csv(file, recorded)
    config = SandboxConfig(
        replay=file, market_clock=clock_at(NOON_MS + 8 * MINUTE + 30_000, speed=600)
    )
    told: set[int] = set()
    async with (
        running_sandbox(config) as sandbox,
        listening(sandbox, "candlestick.1m.ETH_BTC") as listener,
    ):
        while max(told, default=0) < NOON_MS + 25 * MINUTE:
            told |= {row["t"] for row in (await listener.data())["data"]}
    wanted = {item.timestamp for item in recorded if item.timestamp >= NOON_MS + 8 * MINUTE}
    assert told == {timestamp for timestamp in wanted if timestamp <= max(told)}


async def test_book_updates_are_chained_and_rebuild_the_whole_book() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=20))
    async with (
        running_sandbox(config) as sandbox,
        listening(
            sandbox, "book.BTC_USD.10", book_subscription_type="SNAPSHOT_AND_UPDATE"
        ) as listener,
    ):
        whole = await listener.data()
        assert (whole["channel"], whole["depth"]) == ("book", 10)
        state = whole["data"][0]
        sides = {
            side: {float(price): float(amount) for price, amount, _ in state[side]}
            for side in ("bids", "asks")
        }
        number = state["u"]
        for _ in range(10):
            frame = await listener.data()
            assert frame["channel"] == "book.update"
            change = frame["data"][0]
            assert change["pu"] == number
            number = change["u"]
            for side, levels in sides.items():
                for price, amount, _count in change["update"][side]:
                    levels[float(price)] = float(amount)
                    if float(amount) == 0:
                        del levels[float(price)]
            assert {side: len(levels) for side, levels in sides.items()} == {"bids": 10, "asks": 10}
            assert max(sides["bids"]) < min(sides["asks"])
        market = sandbox.venue.instruments()[0]
        book = sandbox.venue.prices.book(market, change["t"], 10)
    assert sides == {"bids": dict(book.bids), "asks": dict(book.asks)}


async def test_without_updates_asked_for_the_whole_book_is_told_each_time() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=20))
    async with (
        running_sandbox(config) as sandbox,
        listening(sandbox, "book.BTC_USD.10") as listener,
    ):
        for _ in range(3):
            frame = await listener.data()
            assert frame["channel"] == "book"
            assert len(frame["data"][0]["asks"]) == 10


async def test_frames_of_a_channel_keep_a_distance_in_real_time() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=600))
    loop = asyncio.get_running_loop()
    async with (
        running_sandbox(config) as sandbox,
        listening(sandbox, "ticker.BTC_USD") as listener,
    ):
        await listener.data()
        began = loop.time()
        for _ in range(8):
            await listener.data()
        assert loop.time() - began > 0.65


@pytest.mark.parametrize(
    "channel",
    [
        "candlestick.1m.NO_SUCH",
        "candlestick.9m.BTC_USD",
        "book.BTC_USD.7",
        "trade.NO_SUCH",
        "ticker",
        "nothing.BTC_USD",
    ],
)
async def test_a_channel_that_does_not_exist_is_answered_with_what_was_asked(channel: str) -> None:
    async with running_sandbox() as sandbox, listening(sandbox, channel) as listener:
        assert await listener.message() == {"id": 7, "method": "subscribe", "code": 0}
        error = await listener.message()
        assert (error["id"], error["method"]) == (-1, "subscribe")
        assert error["code"] in (30003, 40004)
        assert channel in error["original"]
        assert sandbox.hub.running_feeds == {}


@pytest.mark.parametrize("text", ["no json", "[]", '{"method": "subscribe"}', '{"method": 5}'])
async def test_a_message_that_makes_no_sense_is_refused_and_the_socket_stays(text: str) -> None:
    async with running_sandbox() as sandbox, listening(sandbox) as listener:
        await listener.ws.send_str(text)
        assert (await listener.message())["code"] == 40003
        await listener.ask("subscribe", "ticker.BTC_USD")
        assert (await listener.data())["channel"] == "ticker"


async def test_a_message_above_64_kib_ends_the_connection() -> None:
    async with running_sandbox() as sandbox, listening(sandbox) as listener:
        await listener.ws.send_str("x" * (64 * 1024 + 1))
        await listener.ended()
        await eventually(lambda: sandbox.hub.open_sockets == 0)
        assert listener.ws.closed


async def test_a_heartbeat_that_is_answered_keeps_the_socket_and_one_that_is_not_ends_it() -> None:
    async with (
        running_sandbox(SandboxConfig(heartbeat_s=0.1)) as sandbox,
        listening(sandbox) as listener,
    ):
        for _ in range(3):
            beat = await listener.message()
            assert beat["method"] == "public/heartbeat"
            await listener.ws.send_json({"id": beat["id"], "method": "public/respond-heartbeat"})
        await listener.ended()


async def test_a_client_that_does_not_read_is_dropped() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS))
    async with (
        running_sandbox(config) as sandbox,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{sandbox.ws_url}/exchange/v1/market") as ws,
    ):
        assert ws._response.connection is not None
        transport = ws._response.connection.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        book = {"method": "subscribe", "params": {"channels": ["book.BTC_USD.150"]}}
        leave = {"method": "unsubscribe", "params": {"channels": ["book.BTC_USD.150"]}}
        with pytest.raises(ConnectionError):  # noqa: PT012 - any of the sends may notice
            async with asyncio.timeout(15):
                while True:
                    await ws.send_json(book)
                    await ws.send_json(leave)
        await eventually(lambda: sandbox.hub.open_sockets == 0)
        assert sandbox.hub.sockets_dropped_slow >= 1


async def test_the_exchange_shows_its_own_clock_everywhere() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS + 4 * MINUTE))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        status, clock = await http.send("POST", "/_control/clock", {"skew_ms": 3_600_000})
        assert (status, clock["skew_ms"]) == (200, 3_600_000)
        rows = await http.candles("BTC_USD", "5m", count=1)
        assert rows[0]["t"] == NOON_MS + 3_600_000
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{sandbox.url}/exchange/v1/public/get-instruments") as response,
        ):
            assert response.headers["Date"].startswith("Sun, 22 Nov 2026 13:04:")
