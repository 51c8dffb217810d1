"""``/ws/data`` on a real server, asked by a real client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from collection.interfaces import (
    BookTold,
    Channel,
    FormingCandle,
    GapTold,
    SlowConsumer,
    StatusTold,
    StreamEvent,
    TickerTold,
    TradesTold,
)
from domain.gap import Gap, GapReason
from domain.order_book import OrderBook
from domain.ticker import Ticker
from domain.time_range import TimeRange
from domain.trade import Trade
from errors import CoinNotAvailable, NoData
from exchange_source.interfaces import ExchangeUnavailable
from tests.support.api import (
    FIVE_MINUTES,
    START,
    WAIT_S,
    FakeSubscription,
    Server,
    World,
    closed,
    forming,
    hear,
    hear_close,
    make_candle,
    make_entry,
    make_series,
    make_token,
    make_world,
    row,
    say,
    serving,
)

COLUMNS = ["timestamp", "open", "high", "low", "close", "volume"]


INVALID: list[tuple[str | bytes, str, str]] = [
    ("{", "invalid_message", "no JSON"),
    ("[]", "invalid_message", "JSON object"),
    ("{}", "invalid_message", "type takes one of subscribe_realtime"),
    ('{"type": "subscribe"}', "invalid_message", "type takes one of"),
    ('{"type": ["ping"]}', "invalid_message", "type takes one of"),
    (b'{"type": "ping"}', "invalid_message", "text"),
    ('{"type": "ping", "foo": 1}', "invalid_message", "foo does not exist here; use"),
    ('{"type": "subscribe_realtime"}', "invalid_message", "coin is missing"),
    ('{"type": "request_current", "coin": 7}', "invalid_message", "coin should be"),
    ('{"type": "cancel"}', "invalid_message", "request_id is missing"),
    (
        '{"type": "ping", "request_id": "' + "x" * 65 + '"}',
        "invalid_message",
        "request_id text should have at most 64 characters",
    ),
    (
        '{"type": "subscribe_realtime", "coin": "BTC", "interval": "7m"}',
        "invalid_request",
        "interval '7m' does not exist",
    ),
    (
        '{"type": "subscribe_realtime", "coin": "BTC", "channel": "news"}',
        "invalid_request",
        "channel takes one of candles, trades, ticker, order_book; got 'news'",
    ),
    (
        '{"type": "request_historical", "coin": "BTC", "start": 5, "end": 5}',
        "invalid_request",
        "end takes a time after start",
    ),
    (
        '{"type": "request_historical", "coin": "BTC", "start": 5, "end": "soon"}',
        "invalid_request",
        "end takes integer milliseconds",
    ),
    ("[" * 5000, "invalid_message", "no JSON"),
]


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
async def server(world: World) -> AsyncIterator[Server]:
    async with serving(world) as server:
        yield server


async def opened(world: World) -> FakeSubscription:
    return await asyncio.wait_for(world.collection.opened.get(), WAIT_S)


async def subscribe(
    client: ClientConnection, world: World, **fields: Any
) -> tuple[str, FakeSubscription]:
    await say(client, "subscribe_realtime", coin="BTC", **fields)
    subscribed = await hear(client)
    assert subscribed["type"] == "subscribed"
    return subscribed["subscription_id"], await opened(world)


class TestHandshake:
    async def test_a_token_in_the_header_opens_the_connection(self, server: Server) -> None:
        async with server.websocket() as client:
            await say(client, "ping", request_id="1")
            assert await hear(client) == {"type": "pong", "request_id": "1"}
            assert client.subprotocol is None

    async def test_a_token_among_the_subprotocols_opens_the_connection(
        self, server: Server
    ) -> None:
        offered = [Subprotocol("cb-trade.v1"), Subprotocol(f"bearer.{make_token()}")]
        async with connect(
            f"ws://{server.host}/ws/data", subprotocols=offered, proxy=None
        ) as client:
            assert client.subprotocol == "cb-trade.v1"
            await say(client, "ping")
            assert await hear(client) == {"type": "pong"}

    async def test_without_a_valid_token_the_handshake_is_refused(self, server: Server) -> None:
        refusals: list[dict[str, Any]] = [
            {},
            {"additional_headers": {"Authorization": "Bearer nonsense"}},
            {"additional_headers": {"Authorization": f"Basic {make_token()}"}},
            {"subprotocols": ["cb-trade.v1"]},
            {"subprotocols": ["cb-trade.v1", "bearer.nonsense"]},
            {"subprotocols": [f"bearer.{make_token()}"]},
            {"subprotocols": ["cb-trade.v1", "bearer.a", f"bearer.{make_token()}"]},
        ]
        for options in refusals:
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://{server.host}/ws/data", proxy=None, **options)
            response = refused.value.response
            assert response.status_code == 401, options
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["content-type"] == "application/problem+json"
            assert json.loads(response.body or b"")["code"] == "unauthorized"

    async def test_a_token_in_the_address_is_not_taken(self, server: Server) -> None:
        with pytest.raises(InvalidStatus):
            await connect(f"ws://{server.host}/ws/data?token={make_token()}", proxy=None)


class TestSubscribe:
    async def test_the_coin_is_added_then_streamed(self, server: Server, world: World) -> None:
        async with server.websocket() as client:
            await say(client, "subscribe_realtime", coin="btc", request_id="r1")
            assert await hear(client) == {
                "type": "subscribed",
                "request_id": "r1",
                "subscription_id": "sub-1",
                "exchange": "crypto.com",
                "coin": "BTC",
                "market": "BTC/USD",
                "interval": "5m",
                "channel": "candles",
                "last_closed": START - FIVE_MINUTES,
            }
        assert world.collection.calls == [
            ("add_coin", {"coin": "BTC", "exchange": None, "interval": "5m", "since": None}),
            (
                "stream_realtime_data",
                {
                    "coin": "BTC",
                    "exchange": "crypto.com",
                    "interval": "5m",
                    "channel": Channel.CANDLES,
                    "from_ms": None,
                },
            ),
        ]

    async def test_a_subscriber_gets_what_is_told_numbered(
        self, server: Server, world: World
    ) -> None:
        corrected = make_entry(START, close=101.5, revision=2, book=True)
        missing = TimeRange(START + FIVE_MINUTES, START + 2 * FIVE_MINUTES)
        async with server.websocket() as client:
            subscription_id, subscription = await subscribe(client, world)
            subscription.push(
                forming(START),
                closed(START, book=True),
                GapTold(Gap(missing, GapReason.PENDING)),
                closed(START, close=101.5, revision=2, book=True),
                closed(START + FIVE_MINUTES, late=True),
            )
            heard = [await hear(client) for _ in range(5)]
        common = {
            "channel": "candles",
            "exchange": "crypto.com",
            "coin": "BTC",
            "market": "BTC/USD",
            "interval": "5m",
        }
        book_less = corrected.to_document()
        del book_less["order_book"]
        assert heard[0] == {
            "type": "realtime_data",
            "subscription_id": subscription_id,
            "sequence": 1,
            **common,
            "data": {
                "exchange": "crypto.com",
                "coin": "BTC",
                "market": "BTC/USD",
                "interval": "5m",
                "timestamp": START,
                "open": 100.0,
                "high": 102.0,
                "low": 99.0,
                "close": 100.0,
                "volume": 1.5,
                "source": "stream",
                "revision": 0,
                "schema": 1,
                "closed": False,
            },
        }
        assert heard[2] == {
            "type": "gap",
            "subscription_id": subscription_id,
            "sequence": 3,
            "start": START + FIVE_MINUTES,
            "end": START + 2 * FIVE_MINUTES,
            "reason": "pending",
        }
        assert heard[3] == {
            "type": "realtime_data",
            "subscription_id": subscription_id,
            "sequence": 4,
            **common,
            "data": {**book_less, "closed": True},
        }
        assert [message["sequence"] for message in heard] == [1, 2, 3, 4, 5]
        assert [message.get("late") for message in heard] == [None, None, None, None, True]

    async def test_a_change_behind_several_subscriptions_is_told_once(
        self, server: Server, world: World
    ) -> None:
        lost = StatusTold("feed", "reconnecting", START, "crypto.com")
        back = StatusTold("feed", "connected", START + 1, "crypto.com")
        async with server.websocket() as client:
            _, first = await subscribe(client, world)
            second_id, second = await subscribe(client, world)
            first.push(lost)
            assert await hear(client) == {
                "type": "status",
                "component": "feed",
                "exchange": "crypto.com",
                "state": "reconnecting",
                "since": START,
            }
            second.push(lost, forming())
            message = await hear(client)
            # What takes no number takes none from the subscription's own.
            assert (message["subscription_id"], message["sequence"]) == (second_id, 1)
            second.push(back)
            assert (await hear(client))["state"] == "connected"

    async def test_the_other_channels_are_told_in_their_own_shapes(
        self, server: Server, world: World
    ) -> None:
        trades = (Trade("7", START, 100.5, 0.25, "buy"), Trade("8", START + 1, 100.0, 1.0, "sell"))
        ticker = Ticker(START, last=100.0, bid=99.5, ask=100.5, change_percent=-1.25)
        book = OrderBook(START, bids=((99.5, 1.0),), asks=((100.5, 2.0), (101.0, 3.0)))
        wanted: list[tuple[Channel, StreamEvent, Any]] = [
            (
                Channel.TRADES,
                TradesTold(trades),
                [
                    {"id": "7", "timestamp": START, "price": 100.5, "amount": 0.25, "side": "buy"},
                    {
                        "id": "8",
                        "timestamp": START + 1,
                        "price": 100.0,
                        "amount": 1.0,
                        "side": "sell",
                    },
                ],
            ),
            (
                Channel.TICKER,
                TickerTold(ticker),
                {
                    "timestamp": START,
                    "last": 100.0,
                    "bid": 99.5,
                    "ask": 100.5,
                    "high": None,
                    "low": None,
                    "base_volume": None,
                    "change_percent": -1.25,
                },
            ),
            (
                Channel.ORDER_BOOK,
                BookTold(book, stale=True),
                {
                    "timestamp": START,
                    "bids": [[99.5, 1.0]],
                    "asks": [[100.5, 2.0], [101.0, 3.0]],
                    "stale": True,
                },
            ),
        ]
        async with server.websocket() as client:
            for channel, event, data in wanted:
                await say(client, "subscribe_realtime", coin="BTC", channel=channel.value)
                subscribed = await hear(client)
                assert (subscribed["channel"], subscribed["last_closed"]) == (channel, None)
                (await opened(world)).push(event)
                assert await hear(client) == {
                    "type": "realtime_data",
                    "subscription_id": subscribed["subscription_id"],
                    "sequence": 1,
                    "channel": channel,
                    "exchange": "crypto.com",
                    "coin": "BTC",
                    "market": "BTC/USD",
                    "interval": "5m",
                    "data": data,
                }

    async def test_one_event_is_told_to_each_subscription_under_its_own_number(
        self, server: Server, world: World
    ) -> None:
        event = forming()
        async with server.websocket() as client:
            first_id, first = await subscribe(client, world)
            second_id, second = await subscribe(client, world)
            first.push(event)
            one = await hear(client)
            second.push(event, event)
            two, three = await hear(client), await hear(client)
        numbers = [(item["subscription_id"], item["sequence"]) for item in (one, two, three)]
        assert numbers == [(first_id, 1), (second_id, 1), (second_id, 2)]
        assert one["data"] == two["data"] == three["data"]

    async def test_a_client_that_resumes_says_from_when(self, server: Server, world: World) -> None:
        async with server.websocket() as client:
            _, subscription = await subscribe(client, world, **{"from": "2026-11-22T09:10:00Z"})
        assert subscription.from_ms == START

    async def test_a_token_that_may_read_gets_what_is_collected(
        self, server: Server, world: World
    ) -> None:
        await world.collection.add_coin("BTC")
        async with server.websocket(make_token(scope="data:read")) as client:
            await subscribe(client, world)
        assert len(world.collection.called("add_coin")) == 1

    async def test_a_token_that_may_only_read_adds_nothing(
        self, server: Server, world: World
    ) -> None:
        async with server.websocket(make_token(scope="data:read")) as client:
            await say(client, "subscribe_realtime", coin="BTC", request_id="r1")
            error = await hear(client)
        assert (error["type"], error["request_id"], error["code"]) == ("error", "r1", "forbidden")
        assert "data:write" in error["message"]
        assert world.collection.targets == {}

    @pytest.mark.parametrize("where", ["fail_with", "stream_fails_with"])
    async def test_a_failure_is_told_and_the_connection_stays(
        self, server: Server, world: World, where: str
    ) -> None:
        failures = [
            (CoinNotAvailable("DOGE is not listed"), "coin_not_available"),
            (ExchangeUnavailable("crypto.com is away"), "exchange_unavailable"),
            (RuntimeError("the password is hunter2"), "internal"),
        ]
        async with server.websocket() as client:
            for failure, code in failures:
                setattr(world.collection, where, failure)
                with capture_logs():
                    await say(client, "subscribe_realtime", coin="BTC", request_id="r1")
                    error = await hear(client)
                assert (error["type"], error["request_id"], error["code"]) == ("error", "r1", code)
                assert "hunter2" not in error["message"]
            await say(client, "ping")
            assert (await hear(client))["type"] == "pong"

    async def test_after_unsubscribing_the_source_is_closed_and_the_place_is_free(
        self, server: Server, world: World
    ) -> None:
        async with server.websocket() as client:
            subscription_id, subscription = await subscribe(client, world)
            await say(
                client, "unsubscribe_realtime", subscription_id=subscription_id, request_id="r2"
            )
            assert await hear(client) == {
                "type": "unsubscribed",
                "request_id": "r2",
                "subscription_id": subscription_id,
            }
            assert subscription.closed.is_set()
            await say(client, "unsubscribe_realtime", subscription_id=subscription_id)
            assert (await hear(client))["code"] == "invalid_request"

    async def test_a_subscriber_that_is_too_slow_is_told_and_closed(
        self, server: Server, world: World
    ) -> None:
        async with server.websocket() as client:
            subscription_id, subscription = await subscribe(client, world, request_id="r1")
            subscription.push(SlowConsumer("1000 candles wait"))
            assert await hear(client) == {
                "type": "error",
                "request_id": "r1",
                "subscription_id": subscription_id,
                "code": "slow_consumer",
                "message": "1000 candles wait",
            }
            assert await hear_close(client) == 1013


class TestRequestHistorical:
    async def test_the_coin_is_added_and_its_history_streamed(
        self, server: Server, world: World
    ) -> None:
        entries = [make_entry(START + n * FIVE_MINUTES) for n in range(3)]
        world.history.put(entries)
        async with server.websocket() as client:
            await say(
                client,
                "request_historical",
                request_id="h1",
                coin="BTC",
                start=START,
                end=START + 3 * FIVE_MINUTES,
                chunk_size=2,
            )
            first, second, complete = [await hear(client) for _ in range(3)]
        assert first == {
            "type": "historical_data_chunk",
            "request_id": "h1",
            "index": 0,
            "exchange": "crypto.com",
            "coin": "BTC",
            "market": "BTC/USD",
            "interval": "5m",
            "columns": COLUMNS,
            "rows": [row(entry) for entry in entries[:2]],
        }
        assert (second["index"], second["rows"]) == (1, [row(entries[2])])
        assert complete == {
            "type": "historical_data_complete",
            "request_id": "h1",
            "count": 3,
            "chunks": 2,
            "gaps": [],
            "sources": {"storage": 3, "exchange": 0},
        }
        assert [arguments["coin"] for arguments in world.collection.called("add_coin")] == ["BTC"]
        assert world.history.called("stream_historical_data") == [
            {
                "coin": "BTC",
                "interval": "5m",
                "start": START,
                "end": START + 3 * FIVE_MINUTES,
                "exchange": None,
                "chunk_size": 2,
                "request_id": "h1",
            }
        ]

    async def test_a_token_that_may_only_read_is_served_without_adding(
        self, server: Server, world: World
    ) -> None:
        async with server.websocket(make_token(scope="data:read")) as client:
            await say(client, "request_historical", coin="BTC", start=START, end=START + 1)
            assert (await hear(client))["type"] == "historical_data_complete"
        assert world.collection.calls == []

    async def test_a_coin_that_cannot_be_added_is_served_from_what_there_is(
        self, server: Server, world: World
    ) -> None:
        world.collection.fail_with = ExchangeUnavailable("crypto.com is away")
        async with server.websocket() as client:
            await say(client, "request_historical", coin="BTC", start=START, end=START + 1)
            assert (await hear(client))["type"] == "historical_data_complete"

    async def test_a_failure_of_the_history_is_told(self, server: Server, world: World) -> None:
        world.history.fail_with = ExchangeUnavailable("crypto.com is away")
        async with server.websocket() as client:
            await say(
                client, "request_historical", coin="BTC", start=START, end=START + 1, request_id="h"
            )
            assert await hear(client) == {
                "type": "error",
                "request_id": "h",
                "code": "exchange_unavailable",
                "message": "crypto.com is away",
            }

    async def test_a_running_history_is_cancelled(self, server: Server, world: World) -> None:
        world.history.put([make_entry(START)])
        world.history.gate.clear()
        async with server.websocket() as client:
            await say(
                client,
                "request_historical",
                request_id="h1",
                coin="BTC",
                start=START,
                end=START + FIVE_MINUTES,
            )
            await say(client, "cancel", request_id="h1")
            complete = await hear(client)
            assert complete["type"] == "historical_data_complete"
            assert complete["request_id"] == "h1"
            assert complete["cancelled"] is True
            assert (complete["count"], complete["chunks"]) == (0, 0)
            assert world.history.streaming == 0
            await say(client, "cancel", request_id="h1")
            assert (await hear(client))["code"] == "invalid_request"

    async def test_more_than_four_at_once_are_refused(self, server: Server, world: World) -> None:
        world.history.gate.clear()
        asked = {"coin": "BTC", "start": START, "end": START + 1}
        async with server.websocket() as client:
            for number in range(5):
                await say(client, "request_historical", request_id=f"h{number}", **asked)
            refused = await hear(client)
            assert (refused["request_id"], refused["code"]) == ("h4", "too_many_requests")
            world.history.gate.set()
            completed = {(await hear(client))["request_id"] for _ in range(4)}
            assert completed == {"h0", "h1", "h2", "h3"}


class TestRequestCurrent:
    async def test_the_newest_candle_is_sent(self, server: Server, world: World) -> None:
        entry = make_entry(book=True)
        world.history.put([entry])
        async with server.websocket() as client:
            await say(client, "request_current", coin="BTC", request_id="c1")
            assert await hear(client) == {
                "type": "current_data_response",
                "request_id": "c1",
                "data": {**entry.to_document(), "closed": True},
                "age_ms": 340,
            }
        assert world.history.called("get_most_current_data") == [
            {"coin": "BTC", "interval": "5m", "exchange": None}
        ]

    async def test_a_forming_candle_is_said_not_to_be_closed(
        self, server: Server, world: World
    ) -> None:
        world.history.forming[make_series()] = make_candle()
        async with server.websocket() as client:
            await say(client, "request_current", coin="BTC")
            assert (await hear(client))["data"]["closed"] is False

    async def test_no_data_is_told(self, server: Server, world: World) -> None:
        world.history.fail_with = NoData("nothing is known of BTC")
        async with server.websocket() as client:
            await say(client, "request_current", coin="BTC", request_id="c1")
            error = await hear(client)
        assert (error["request_id"], error["code"]) == ("c1", "no_data")


class TestInvalidMessages:
    async def test_an_invalid_message_is_told_and_the_connection_stays(
        self, server: Server
    ) -> None:
        async with server.websocket() as client:
            for sent, code, told in INVALID:
                await client.send(sent)
                error = await hear(client)
                assert (error["type"], error["request_id"], error["code"]) == ("error", None, code)
                assert told in error["message"]
                await say(client, "ping")
                assert await hear(client) == {"type": "pong"}

    async def test_an_invalid_message_is_answered_by_its_request_id(self, server: Server) -> None:
        async with server.websocket() as client:
            await say(client, "nonsense", request_id="r1")
            assert (await hear(client))["request_id"] == "r1"

    async def test_a_message_that_is_too_large_is_refused(self, server: Server) -> None:
        async with server.websocket() as client:
            await client.send('{"type": "ping"}'.ljust(64 * 1024 + 1))
            assert (await hear(client))["code"] == "payload_too_large"
            await client.send('{"type": "ping"}'.ljust(64 * 1024))
            assert (await hear(client))["type"] == "pong"


class TestDisconnection:
    async def test_everything_ends_when_the_client_leaves(
        self, server: Server, world: World
    ) -> None:
        world.history.put([make_entry()])
        async with server.websocket() as client:
            _, subscription = await subscribe(client, world)
            world.history.gate.clear()
            await say(client, "request_historical", coin="BTC", start=START, end=START + 1)
            await say(client, "ping")
            assert (await hear(client))["type"] == "pong"
        await asyncio.wait_for(subscription.closed.wait(), WAIT_S)
        assert world.collection.subscriptions == []
        await server.stop()
        assert world.history.streaming == 0

    async def test_a_client_that_vanishes_is_noticed(self, server: Server, world: World) -> None:
        async with server.websocket() as client:
            _, subscription = await subscribe(client, world)
            client.transport.abort()
            await asyncio.wait_for(subscription.closed.wait(), WAIT_S)
        assert world.collection.subscriptions == []

    async def test_one_client_that_leaves_does_not_disturb_another(
        self, server: Server, world: World
    ) -> None:
        async with server.websocket() as staying:
            _, kept = await subscribe(staying, world)
            async with server.websocket() as leaving:
                _, left = await subscribe(leaving, world)
            await asyncio.wait_for(left.closed.wait(), WAIT_S)
            kept.push(FormingCandle(make_candle()))
            assert (await hear(staying))["type"] == "realtime_data"

    async def test_a_shutdown_closes_with_1012(self, server: Server, world: World) -> None:
        async with server.websocket() as client:
            _, subscription = await subscribe(client, world)
            await server.stop()
            assert await hear_close(client) == 1012
        assert subscription.closed.is_set()
