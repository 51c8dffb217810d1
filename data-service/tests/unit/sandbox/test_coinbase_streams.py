"""Coinbase's WebSocket: what is told, in which shape, and what keeps a channel open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.coinbase_streams import CoinbaseTimes
from tests.support.clock import ManualClock, settle_loop
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    CoinbaseListener,
    clock_at,
    coinbase_listening,
    eventually,
    http_to,
    recorded_with_holes,
    values_of,
    write_csv,
)

M5 = Interval.parse("5m")
CHANNELS = ("candles", "market_trades", "ticker", "ticker_batch", "level2", "status")
DELIVERED_AS = {"level2": "l2_data"}

# Each message's fields as Coinbase documents them: the list that an event holds, and its rows.
DOCUMENTED: dict[str, tuple[str, dict[str, type]]] = {
    "candles": (
        "candles",
        dict.fromkeys(("start", "high", "low", "open", "close", "volume", "product_id"), str),
    ),
    "market_trades": (
        "trades",
        dict.fromkeys(("trade_id", "product_id", "price", "size", "side", "time"), str),
    ),
    "ticker": (
        "tickers",
        dict.fromkeys(
            (
                *("type", "product_id", "price", "volume_24_h", "low_24_h", "high_24_h"),
                *("low_52_w", "high_52_w", "price_percent_chg_24_h"),
                *("best_bid", "best_bid_quantity", "best_ask", "best_ask_quantity"),
            ),
            str,
        ),
    ),
    "ticker_batch": (
        "tickers",
        dict.fromkeys(
            (
                *("type", "product_id", "price", "volume_24_h", "low_24_h", "high_24_h"),
                *("low_52_w", "high_52_w", "price_percent_chg_24_h"),
            ),
            str,
        ),
    ),
    "level2": (
        "updates",
        dict.fromkeys(("side", "event_time", "price_level", "new_quantity"), str),
    ),
    "status": (
        "products",
        dict.fromkeys(
            (
                *("product_type", "id", "base_currency", "quote_currency", "base_increment"),
                *("quote_increment", "display_name", "status", "status_message"),
                "min_market_funds",
            ),
            str,
        ),
    ),
}


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market a hundred times as fast as the real one, a little past noon."""
    config = SandboxConfig(
        market_clock=clock_at(NOON_MS + 130_000, speed=100),
        coinbase_times=CoinbaseTimes(heartbeat_s=0.05),
    )
    async with running_sandbox(config) as running:
        yield running


async def numbers_of(listener: CoinbaseListener, count: int) -> list[int]:
    """The sequence numbers of the next ``count`` frames."""
    return [(await listener.message())["sequence_num"] for _ in range(count)]


@pytest.mark.parametrize("channel", CHANNELS)
async def test_each_channel_begins_with_a_snapshot_and_goes_on_with_updates_as_documented(
    sandbox: RunningSandbox, channel: str
) -> None:
    rows_name, documented = DOCUMENTED[channel]
    named = DELIVERED_AS.get(channel, channel)
    async with coinbase_listening(sandbox, channel, "BTC-USD") as listener:
        for kind in ("snapshot", "update", "update"):
            frame = await listener.frame(named)
            assert list(frame) == ["channel", "client_id", "timestamp", "sequence_num", "events"]
            assert frame["timestamp"].startswith("2026-11-22T12:")
            (event,) = frame["events"]
            assert event["type"] == kind
            assert set(event) - {"product_id"} == {"type", rows_name}
            assert event[rows_name]
            for row in event[rows_name]:
                assert {name: type(value) for name, value in row.items()} == documented


async def test_heartbeats_count_and_tell_the_exchange_s_time(sandbox: RunningSandbox) -> None:
    async with coinbase_listening(sandbox, "heartbeats") as listener:
        for expected in range(4):
            event = await listener.event("heartbeats")
            assert event["heartbeat_counter"] == expected
            assert event["current_time"].startswith("2026-11-22 12:")
            assert set(event) == {"heartbeat_counter", "current_time"}


async def test_the_frames_of_a_connection_are_numbered_from_0_whatever_they_hold(
    sandbox: RunningSandbox,
) -> None:
    async with (
        coinbase_listening(sandbox, "ticker", "BTC-USD") as first,
        coinbase_listening(sandbox, "ticker", "BTC-USD") as second,
    ):
        for listener in (first, second):
            await listener.send("subscribe", "heartbeats")
            await listener.send("subscribe", "level2", "ETH-USD")
        assert await numbers_of(first, 20) == list(range(20))
        assert await numbers_of(second, 20) == list(range(20))
        assert sandbox.hub.running_feeds == {"level2 ETH-USD": 2, "ticker BTC-USD": 2}


async def test_the_client_is_told_what_it_is_subscribed_to(sandbox: RunningSandbox) -> None:
    async with coinbase_listening(sandbox) as listener:

        async def told(kind: str, channel: str, *products: str) -> object:
            await listener.send(kind, channel, *products)
            return (await listener.event("subscriptions"))["subscriptions"]

        assert await told("subscribe", "ticker", "BTC-USD") == {"ticker": ["BTC-USD"]}
        assert await told("subscribe", "ticker", "BTC-USD", "ETH-USD") == {
            "ticker": ["BTC-USD", "ETH-USD"]
        }
        assert await told("subscribe", "heartbeats") == {
            "ticker": ["BTC-USD", "ETH-USD"],
            "heartbeats": ["heartbeats"],
        }
        assert await told("unsubscribe", "ticker", "BTC-USD", "SOL-USD") == {
            "ticker": ["ETH-USD"],
            "heartbeats": ["heartbeats"],
        }
        # Without products it is the whole channel.
        assert await told("unsubscribe", "ticker") == {"heartbeats": ["heartbeats"]}
        assert await told("unsubscribe", "candles", "BTC-USD") == {"heartbeats": ["heartbeats"]}
        assert await told("unsubscribe", "heartbeats") == {}
        assert sandbox.hub.running_feeds == {}


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("no json", "message is no valid JSON"),
        ("[]", "message must be an object"),
        ('{"channel": "ticker"}', "type must be subscribe or unsubscribe"),
        ('{"type": "listen", "channel": "ticker"}', "type must be subscribe or unsubscribe"),
        ('{"type": "subscribe", "product_ids": ["BTC-USD"]}', "channel is required"),
        ('{"type": "subscribe", "channel": "ticker"}', "channel ticker requires product_ids"),
        (
            '{"type": "subscribe", "channel": "ticker", "product_ids": "BTC-USD"}',
            "product_ids must be a list of product ids",
        ),
        (
            '{"type": "subscribe", "channel": "ticker", "product_ids": ["BTC-USD", "NO-SUCH"]}',
            "NO-SUCH is not a valid product",
        ),
        (
            '{"type": "subscribe", "channel": "matches", "product_ids": ["BTC-USD"]}',
            "channel matches is not supported",
        ),
        ('{"type": "subscribe", "channel": "user"}', "authentication failure"),
    ],
)
async def test_a_message_that_cannot_be_followed_is_refused_and_the_socket_stays(
    sandbox: RunningSandbox, message: str, complaint: str
) -> None:
    async with coinbase_listening(sandbox) as listener:
        await listener.ws.send_str(message)
        assert await listener.message() == {"type": "error", "message": complaint}
        assert sandbox.hub.running_feeds == {}
        await listener.send("subscribe", "ticker", "BTC-USD")
        assert (await listener.message())["sequence_num"] == 0


async def test_candles_are_of_five_minutes_and_end_in_what_rest_tells(
    sandbox: RunningSandbox,
) -> None:
    told: dict[int, tuple[float, ...]] = {}
    async with coinbase_listening(sandbox, "candles", "BTC-USD") as listener:
        while len(told) < 3:
            for row in (await listener.event("candles"))["candles"]:
                told[int(row["start"]) * 1000] = tuple(
                    float(row[name]) for name in ("open", "high", "low", "close", "volume")
                )
    *closed, _ = sorted(told)
    market = sandbox.venue.instruments()[0]
    part = TimeRange(closed[0], closed[-1] + 1)
    assert [
        (item.timestamp, values_of(item)) for item in sandbox.venue.prices.candles(market, M5, part)
    ] == [(opened, told[opened]) for opened in closed]


async def test_a_period_nobody_has_traded_in_yet_begins_with_an_empty_snapshot(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ETH_BTC-5m.csv"
    write_csv(file, recorded_with_holes(NOON_MS, 5 * MINUTE, 4, (range(2, 3),)))
    config = SandboxConfig(
        replay=file, market_clock=clock_at(NOON_MS + 14 * MINUTE + 50_000, speed=10)
    )
    async with (
        running_sandbox(config) as sandbox,
        coinbase_listening(sandbox, "candles", "ETH-BTC") as listener,
    ):
        assert await listener.event("candles") == {"type": "snapshot", "candles": []}
        update = await listener.event("candles")
        assert update["type"] == "update"
        assert int(update["candles"][0]["start"]) * 1000 == NOON_MS + 15 * MINUTE


async def test_candles_that_were_not_recorded_so_finely_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ETH_BTC-1h.csv"
    write_csv(file, recorded_with_holes(NOON_MS, 60 * MINUTE, 4, ()))
    async with (
        running_sandbox(SandboxConfig(replay=file)) as sandbox,
        coinbase_listening(sandbox, "candles", "ETH-BTC") as listener,
    ):
        assert (await listener.message())["message"] == "ETH-BTC has no candles of 5m"


async def test_every_trade_is_told_once_and_the_newest_of_a_frame_first(
    sandbox: RunningSandbox,
) -> None:
    told: list[dict[str, Any]] = []
    async with coinbase_listening(sandbox, "market_trades", "BTC-USD") as listener:
        while len(told) < 60:
            told += reversed((await listener.event("market_trades"))["trades"])
    numbers = [int(trade["trade_id"]) for trade in told]
    assert numbers == sorted(set(numbers))
    market = sandbox.venue.instruments()[0]
    everything = sandbox.venue.prices.trades(market, TimeRange(NOON_MS, NOON_MS + 60 * MINUTE))
    first, last = numbers[0], numbers[-1]
    happened = [trade for trade in everything if first <= trade.id <= last]
    assert numbers == [trade.id for trade in happened]
    makers = {"buy": "SELL", "sell": "BUY"}
    assert [trade["side"] for trade in told] == [makers[trade.side] for trade in happened]


async def test_a_ticker_is_told_only_after_somebody_has_traded(tmp_path: Path) -> None:
    file = tmp_path / "ETH_BTC-1m.csv"
    # One minute in four has trades, the first of them at its very beginning.
    holes = tuple(range(at + 1, at + 4) for at in range(0, 40, 4))
    write_csv(file, recorded_with_holes(NOON_MS, MINUTE, 40, holes))
    config = SandboxConfig(
        replay=file, market_clock=clock_at(NOON_MS + 5 * MINUTE + 10_000, speed=60)
    )
    async with (
        running_sandbox(config) as sandbox,
        coinbase_listening(sandbox, "ticker", "ETH-BTC") as listener,
    ):
        assert (await listener.event("ticker"))["type"] == "snapshot"
        update = await listener.frame("ticker")
        assert update["events"][0]["type"] == "update"
        assert "T12:08:" <= update["timestamp"][10:17] <= "T12:09:"


async def test_book_updates_rebuild_the_whole_book(sandbox: RunningSandbox) -> None:
    sides: dict[str, dict[float, float]] = {"bid": {}, "offer": {}}
    async with coinbase_listening(sandbox, "level2", "BTC-USD") as listener:
        for _ in range(10):
            event = await listener.event("l2_data")
            assert event["product_id"] == "BTC-USD"
            for update in event["updates"]:
                price, amount = float(update["price_level"]), float(update["new_quantity"])
                sides[update["side"]][price] = amount
                if amount == 0:
                    del sides[update["side"]][price]
                at = update["event_time"]
    now = NOON_MS + int(at[14:16]) * MINUTE + round(float(at[17:-1]) * 1000)
    book = sandbox.venue.prices.book(sandbox.venue.instruments()[0], now, 200)
    assert sides == {"bid": dict(book.bids), "offer": dict(book.asks)}


async def test_what_is_quoted_in_usdc_is_told_as_what_is_quoted_in_usd(
    sandbox: RunningSandbox,
) -> None:
    async with coinbase_listening(sandbox, "ticker", "BTC-USDC", "BTC-USD") as listener:
        assert (await listener.event("ticker"))["tickers"][0]["product_id"] == "BTC-USD"
        assert await listener.event("subscriptions") == {
            "subscriptions": {"ticker": ["BTC-USDC", "BTC-USD"]}
        }
        assert sandbox.hub.running_feeds == {"ticker BTC-USD": 1}
        await listener.send("unsubscribe", "ticker", "BTC-USD")
        await listener.frame("subscriptions")
        assert sandbox.hub.running_feeds == {"ticker BTC-USD": 1}
        await listener.send("unsubscribe", "ticker", "BTC-USDC")
        await listener.frame("subscriptions")
        assert sandbox.hub.running_feeds == {}


async def test_who_subscribes_to_nothing_is_dropped_after_five_seconds() -> None:
    clock = ManualClock(NOON_MS)
    async with (
        running_sandbox(SandboxConfig(market_clock=clock)) as sandbox,
        coinbase_listening(sandbox, "heartbeats") as subscribed,
        coinbase_listening(sandbox, "ticker", "NO-SUCH") as refused,
        coinbase_listening(sandbox) as silent,
    ):
        await subscribed.frame("subscriptions")
        assert (await refused.message())["type"] == "error"
        await eventually(lambda: sandbox.hub.open_sockets == 3)
        await settle_loop()
        await clock.advance(4_000)
        assert sandbox.hub.open_sockets == 3
        await clock.advance(2_000)
        await silent.ended()
        await refused.ended()
        await eventually(lambda: sandbox.hub.open_sockets == 1)
        await subscribed.frame("heartbeats")


def quiet_recording(folder: Path) -> Path:
    """Trades in the first of many minutes alone."""
    file = folder / "ETH_BTC-1m.csv"
    write_csv(file, recorded_with_holes(NOON_MS, MINUTE, 32, (range(1, 31),)))
    return file


async def test_a_channel_without_updates_is_closed_without_a_word(tmp_path: Path) -> None:
    clock = ManualClock(NOON_MS + 2 * MINUTE)
    config = SandboxConfig(replay=quiet_recording(tmp_path), market_clock=clock)
    async with (
        running_sandbox(config) as sandbox,
        coinbase_listening(sandbox, "ticker", "ETH-BTC") as listener,
    ):
        await listener.frame("subscriptions")
        await clock.advance(75_000)
        assert sandbox.hub.running_feeds == {"ticker ETH-BTC": 1}
        await clock.advance(2_000)
        assert sandbox.hub.running_feeds == {}
        # The connection stays, and the channel may be had again; nothing was said before.
        await listener.send("subscribe", "ticker", "ETH-BTC")
        again = await listener.message()
        assert (again["sequence_num"], again["events"][0]["type"]) == (2, "snapshot")


async def test_heartbeats_keep_a_channel_without_updates_open(tmp_path: Path) -> None:
    clock = ManualClock(NOON_MS + 2 * MINUTE)
    config = SandboxConfig(replay=quiet_recording(tmp_path), market_clock=clock)
    async with (
        running_sandbox(config) as sandbox,
        coinbase_listening(sandbox, "ticker", "ETH-BTC") as listener,
    ):
        await listener.send("subscribe", "heartbeats")
        for _ in range(2):
            await listener.frame("subscriptions")
        await clock.advance(100_000)
        assert sandbox.hub.running_feeds == {"ticker ETH-BTC": 1}
        for expected in range(100):
            assert (await listener.event("heartbeats"))["heartbeat_counter"] == expected


async def test_updates_of_one_product_keep_its_channel_open_for_all(tmp_path: Path) -> None:
    clock = ManualClock(NOON_MS + 2 * MINUTE)
    write_csv(tmp_path / "BTC_USD-1m.csv", recorded_with_holes(NOON_MS, MINUTE, 32, ()))
    quiet_recording(tmp_path)
    config = SandboxConfig(replay=tmp_path, market_clock=clock)
    async with (
        running_sandbox(config) as sandbox,
        coinbase_listening(sandbox, "ticker", "ETH-BTC", "BTC-USD") as listener,
    ):
        await listener.frame("subscriptions")
        await clock.advance(200_000)
        assert sandbox.hub.running_feeds == {"ticker BTC-USD": 1, "ticker ETH-BTC": 1}


async def test_a_sequence_gap_uses_up_the_number_of_a_frame_that_never_comes(
    sandbox: RunningSandbox,
) -> None:
    async with (
        http_to(sandbox) as http,
        coinbase_listening(sandbox, "level2", "BTC-USD") as listener,
    ):
        assert await numbers_of(listener, 4) == [0, 1, 2, 3]
        number = await http.fault(kind="ws_sequence_gap", channel="book", instrument="BTC/USD")
        numbers = [3]
        while numbers[-1] == numbers[0] + len(numbers) - 1:
            numbers += await numbers_of(listener, 1)
        assert numbers[-1] == numbers[-2] + 2
        assert await numbers_of(listener, 5) == [numbers[-1] + at for at in range(1, 6)]
        assert await http.hits(number) == 1


async def test_a_sequence_gap_of_another_channel_leaves_this_one_alone(
    sandbox: RunningSandbox,
) -> None:
    async with (
        http_to(sandbox) as http,
        coinbase_listening(sandbox, "level2", "BTC-USD") as listener,
    ):
        number = await http.fault(kind="ws_sequence_gap", channel="heartbeat")
        assert await numbers_of(listener, 8) == list(range(8))
        assert await http.hits(number) == 0
        await listener.send("subscribe", "heartbeats")
        counts = [(await listener.event("heartbeats"))["heartbeat_counter"] for _ in range(2)]
        assert counts == [1, 2]
        assert await http.hits(number) == 1


async def test_a_broken_frame_has_a_number_and_the_next_one_is_whole(
    sandbox: RunningSandbox,
) -> None:
    async with (
        http_to(sandbox) as http,
        coinbase_listening(sandbox, "heartbeats") as listener,
    ):
        await numbers_of(listener, 2)
        number = await http.fault(kind="ws_broken_frame", channel="heartbeat")
        texts: list[str] = []
        while not texts or texts[-1].endswith("}"):
            texts.append(await listener.ws.receive_str(timeout=5))
        assert texts[-1].startswith('{"channel":"heartbeats"')
        assert await numbers_of(listener, 2) == [2 + len(texts), 3 + len(texts)]
        assert await http.hits(number) == 1


async def test_muted_sockets_answer_pings_and_lose_frames_with_their_numbers(
    sandbox: RunningSandbox,
) -> None:
    async with http_to(sandbox) as http:
        number = await http.fault(kind="mute_sockets")
        async with coinbase_listening(sandbox, "level2", "BTC-USD") as listener:
            await listener.send("subscribe", "heartbeats")
            while await http.hits(number) < 8:
                await listener.ws.ping()
            for _ in range(2):
                assert (await listener.message())["channel"] == "subscriptions"
            await http.send("DELETE", "/_control/faults")
            frame = await listener.message()
            assert frame["sequence_num"] >= 10
            assert await numbers_of(listener, 3) == [
                frame["sequence_num"] + at for at in range(1, 4)
            ]


async def test_one_channel_may_be_mute_while_others_go_on(sandbox: RunningSandbox) -> None:
    async with (
        http_to(sandbox) as http,
        coinbase_listening(sandbox, "heartbeats") as listener,
    ):
        number = await http.fault(kind="mute_sockets", channel="book", instrument="BTC-USD")
        await listener.send("subscribe", "level2", "BTC-USD", "ETH-USD")
        for _ in range(6):
            assert (await listener.event("l2_data"))["product_id"] == "ETH-USD"
        await listener.frame("heartbeats")
        assert await http.hits(number) > 0


async def test_final_candles_may_be_withheld(sandbox: RunningSandbox) -> None:
    market = sandbox.venue.instruments()[0]
    rows: list[dict[str, str]] = []
    async with http_to(sandbox) as http:
        number = await http.fault(kind="final_update_withheld", instrument="BTC-USD")
        async with coinbase_listening(sandbox, "candles", "BTC-USD") as listener:
            while len({row["start"] for row in rows}) < 3:
                rows += (await listener.event("candles"))["candles"]
        assert await http.hits(number) >= 2
    *closed, _ = sorted({int(row["start"]) for row in rows})
    for opened in closed:
        final = sandbox.venue.prices.candle(market, M5, opened * 1000)
        assert final is not None
        (*_, last) = [row for row in rows if int(row["start"]) == opened]
        assert float(last["volume"]) < final.volume


async def test_dropped_sockets_end_and_new_ones_are_numbered_from_0(
    sandbox: RunningSandbox,
) -> None:
    async with http_to(sandbox) as http:
        async with coinbase_listening(sandbox, "ticker", "BTC-USD") as listener:
            await numbers_of(listener, 2)
            await http.fault(kind="drop_sockets")
            await listener.ended()
        async with coinbase_listening(sandbox, "ticker", "BTC-USD") as listener:
            assert await numbers_of(listener, 2) == [0, 1]


async def test_a_delisted_market_falls_silent_and_may_not_be_subscribed_to(
    sandbox: RunningSandbox,
) -> None:
    async with (
        http_to(sandbox) as http,
        coinbase_listening(sandbox, "level2", "ETH-USD") as listener,
    ):
        await listener.frame("l2_data")
        number = await http.fault(kind="delisted", instrument="ETH-USD")
        while await http.hits(number) < 3:
            await listener.ws.ping()
        await listener.send("subscribe", "ticker", "ETH-USDC")
        while "message" not in (message := await listener.message()):
            pass
        assert message["message"] == "ETH-USDC is not a valid product"
