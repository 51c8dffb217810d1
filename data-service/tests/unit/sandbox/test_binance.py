"""Binance's protocol as it goes over the wire, and what faults do to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.flat_candles import FlatCandles
from sandbox.prices import Instrument
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    Http,
    Listener,
    clock_at,
    connected,
    eventually,
    http_to,
    recorded_with_holes,
    row_values,
    values_of,
    write_csv,
)

API = "/api/v3"
KLINES = f"{API}/klines"
M1, M5 = Interval.parse("1m"), Interval.parse("5m")
Row = list[Any]


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market half a minute past noon, at its real speed."""
    async with running_sandbox(SandboxConfig(market_clock=clock_at(NOON_MS + 30_000))) as running:
        yield running


@pytest.fixture
async def http(sandbox: RunningSandbox) -> AsyncIterator[Http]:
    async with http_to(sandbox) as asking:
        yield asking


@contextlib.asynccontextmanager
async def fast(speed: float = 100) -> AsyncIterator[tuple[RunningSandbox, Http]]:
    """A market ``speed`` times as fast as the real one, ten seconds before a minute ends."""
    config = SandboxConfig(market_clock=clock_at(NOON_MS + 50_000, speed=speed))
    async with running_sandbox(config) as running, http_to(running) as asking:
        yield running, asking


async def klines(http: Http, interval: str = "1m", **query: Any) -> list[Row]:
    status, rows = await http.get(KLINES, **{"symbol": "BTCUSDT", "interval": interval, **query})
    assert status == 200, rows
    return list(rows)


def numbers(row: Row) -> tuple[float, ...]:
    return tuple(float(value) for value in row[1:6])


def instrument(sandbox: RunningSandbox, symbol: str = "BTC/USDT") -> Instrument:
    return next(item for item in sandbox.venue.instruments() if item.symbol == symbol)


async def subscribed(listener: Listener, *names: str, number: object = 1) -> None:
    """Ask for streams and wait until the answer has come."""
    await listener.ws.send_json({"method": "SUBSCRIBE", "params": list(names), "id": number})
    while "result" not in (message := await listener.message()):
        pass
    assert message == {"result": None, "id": number}


class TestRest:
    async def test_it_answers_pings_and_tells_its_own_time(
        self, sandbox: RunningSandbox, http: Http
    ) -> None:
        assert await http.get(f"{API}/ping") == (200, {})
        await http.send("POST", "/_control/clock", {"skew_ms": 3_600_000})
        _, answer = await http.get(f"{API}/time")
        assert abs(answer["serverTime"] - sandbox.venue.clock.now_ms()) < 10_000
        assert answer["serverTime"] > NOON_MS + 3_600_000

    async def test_markets_have_what_clients_need_to_trade_them(self, http: Http) -> None:
        _, info = await http.get(f"{API}/exchangeInfo", symbol="BTCUSDT")
        (market,) = info["symbols"]
        assert (market["baseAsset"], market["quoteAsset"]) == ("BTC", "USDT")
        assert (market["status"], market["isSpotTradingAllowed"]) == ("TRADING", True)
        assert market["permissionSets"] == [["SPOT"]]
        assert {"LIMIT", "MARKET"} <= set(market["orderTypes"])
        filters = {item["filterType"]: item for item in market["filters"]}
        assert filters["PRICE_FILTER"]["tickSize"] == "0.01000000"
        assert filters["LOT_SIZE"]["stepSize"] == "0.00001000"
        assert float(filters["NOTIONAL"]["minNotional"]) > 0
        assert {item["rateLimitType"] for item in info["rateLimits"]} == {
            "REQUEST_WEIGHT",
            "ORDERS",
            "RAW_REQUESTS",
        }

    async def test_some_or_all_markets_may_be_asked_for_and_only_spot_is_there(
        self, sandbox: RunningSandbox, http: Http
    ) -> None:
        _, some = await http.get(f"{API}/exchangeInfo", symbols='["ETHBTC","BTCUSDT"]')
        assert [item["symbol"] for item in some["symbols"]] == ["ETHBTC", "BTCUSDT"]
        _, everything = await http.get(f"{API}/exchangeInfo")
        spot = [item for item in sandbox.venue.instruments() if item.spot]
        assert [item["symbol"] for item in everything["symbols"]] == [
            f"{item.base}{item.quote}" for item in spot
        ]
        status = {item["symbol"]: item["status"] for item in everything["symbols"]}
        assert status["LUNAUSD"] == "BREAK"

    async def test_klines_are_the_newest_ones_with_the_forming_one_last(
        self, sandbox: RunningSandbox, http: Http
    ) -> None:
        rows = await klines(http, "5m")
        assert len(rows) == 500
        assert [row[0] for row in rows[-2:]] == [NOON_MS - 5 * MINUTE, NOON_MS]
        assert len(await klines(http, "5m", limit=5_000)) == 1_000
        final = sandbox.venue.prices.candle(instrument(sandbox), M5, rows[-2][0])
        assert final is not None
        assert numbers(rows[-2]) == values_of(final)

    async def test_a_kline_has_twelve_columns(self, http: Http) -> None:
        (row,) = await klines(http, startTime=NOON_MS - 5 * MINUTE, limit=1)
        assert [type(value) for value in row] == [
            int, str, str, str, str, str, int, str, int, str, str, str,
        ]  # fmt: skip
        assert row[6] == row[0] + MINUTE - 1
        low, high, volume, quote = (float(row[at]) for at in (3, 2, 5, 7))
        assert low * volume <= quote <= high * volume
        assert row[8] >= 1
        assert float(row[9]) <= volume

    async def test_klines_from_a_time_on_are_the_first_ones_from_there(self, http: Http) -> None:
        start = NOON_MS - 60 * MINUTE
        rows = await klines(http, startTime=start - 1, limit=3)
        assert [row[0] for row in rows] == [start + at * MINUTE for at in range(3)]
        rows = await klines(http, startTime=start, endTime=start + 2 * MINUTE)
        assert [row[0] for row in rows] == [start, start + MINUTE, start + 2 * MINUTE]
        rows = await klines(http, endTime=start - 1, limit=2)
        assert [row[0] for row in rows] == [start - 2 * MINUTE, start - MINUTE]
        assert await klines(http, startTime=start, endTime=start - 1) == []

    async def test_nothing_lies_before_the_first_trade_or_in_the_future(self) -> None:
        config = SandboxConfig(
            history_start_ms=NOON_MS - 60 * MINUTE, market_clock=clock_at(NOON_MS)
        )
        async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
            rows = await klines(http, startTime=0, limit=1_000)
            assert [row[0] for row in rows[:2]] == [NOON_MS - 60 * MINUTE, NOON_MS - 59 * MINUTE]
            assert rows[-1][0] == NOON_MS
            assert await klines(http, startTime=NOON_MS + MINUTE) == []

    async def test_a_period_without_trades_is_flat(
        self, sandbox: RunningSandbox, http: Http
    ) -> None:
        rows = await klines(http, symbol="LRCUSDT", endTime=NOON_MS - 1, limit=500)
        assert [row[0] for row in rows] == [NOON_MS - at * MINUTE for at in range(500, 0, -1)]
        market = instrument(sandbox, "LRC/USDT")
        prices = FlatCandles(sandbox.venue.prices)
        told = prices.candles(market, M1, TimeRange(NOON_MS - 500 * MINUTE, NOON_MS))
        assert [numbers(row) for row in rows] == [values_of(item) for item in told]
        flat = [row for row in rows if float(row[5]) == 0]
        assert flat
        assert {row[8] for row in flat} == {0}

    async def test_a_hole_of_a_recording_stays_a_hole(self, tmp_path: Path) -> None:
        recorded = recorded_with_holes(NOON_MS, MINUTE, 40, (range(10, 20),))
        file = tmp_path / "ETH_BTC-1m.csv"
        write_csv(file, recorded)
        clock = clock_at(NOON_MS + 60 * MINUTE)
        async with (
            running_sandbox(SandboxConfig(replay=file, market_clock=clock)) as sandbox,
            http_to(sandbox) as http,
        ):
            rows = await klines(http, symbol="ETHBTC", startTime=NOON_MS)
            assert [(row[0], numbers(row)) for row in rows] == [
                (item.timestamp, values_of(item)) for item in recorded
            ]

    @pytest.mark.parametrize("interval", ["1m", "3m", "8h", "12h", "1d", "3d", "1w"])
    async def test_every_interval_that_prices_have_is_offered(
        self, http: Http, interval: str
    ) -> None:
        length = Interval.parse(interval)
        opens = [row[0] for row in await klines(http, interval, limit=3)]
        newest = length.floor(NOON_MS)
        assert opens == [newest - at * length.milliseconds for at in (2, 1, 0)]

    async def test_a_book_has_as_many_levels_as_asked_for_and_a_number(self, http: Http) -> None:
        _, short = await http.get(f"{API}/depth", symbol="BTCUSDT", limit=5)
        _, usual = await http.get(f"{API}/depth", symbol="BTCUSDT")
        _, whole = await http.get(f"{API}/depth", symbol="BTCUSDT", limit=5_000)
        assert [len(book["bids"]) for book in (short, usual, whole)] == [5, 100, 1_000]
        assert short["lastUpdateId"] <= usual["lastUpdateId"] <= whole["lastUpdateId"]
        assert float(short["bids"][0][0]) < float(short["asks"][0][0])

    async def test_trades_ascend_and_aggregates_are_the_same_trades(self, http: Http) -> None:
        _, trades = await http.get(f"{API}/trades", symbol="BTCUSDT", limit=10)
        _, aggregates = await http.get(
            f"{API}/aggTrades", symbol="BTCUSDT", startTime=trades[0]["time"], limit=10
        )
        assert [item["id"] for item in trades] == sorted(item["id"] for item in trades)
        assert [(item["a"], item["p"], item["q"], item["T"], item["m"]) for item in aggregates] == [
            (item["id"], item["price"], item["qty"], item["time"], item["isBuyerMaker"])
            for item in trades
        ]

    async def test_aggregates_go_on_from_an_id(self, http: Http) -> None:
        path, start = f"{API}/aggTrades", NOON_MS - 24 * 60 * MINUTE
        _, first = await http.get(path, symbol="LRCUSDT", startTime=start, limit=20)
        _, further = await http.get(path, symbol="LRCUSDT", fromId=first[10]["a"], limit=10)
        assert further == first[10:]
        assert await http.get(path, symbol="LRCUSDT", fromId=10**17) == (200, [])
        _, oldest = await http.get(path, symbol="LRCUSDT", fromId=0, limit=1)
        assert oldest[0]["T"] < start

    async def test_tickers_come_for_one_for_some_and_for_all(self, http: Http) -> None:
        _, one = await http.get(f"{API}/ticker/24hr", symbol="BTCUSDT")
        assert float(one["lowPrice"]) <= float(one["lastPrice"]) <= float(one["highPrice"])
        assert one["closeTime"] - one["openTime"] == 86_400_000
        assert 0 < one["firstId"] < one["lastId"]
        change = float(one["lastPrice"]) - float(one["openPrice"])
        assert float(one["priceChange"]) == pytest.approx(change)
        _, some = await http.get(f"{API}/ticker/24hr", symbols='["BTCUSDT"]', type="MINI")
        assert set(some[0]) < set(one)
        assert "bidPrice" not in some[0]
        for path in ("24hr", "price", "bookTicker"):
            _, everything = await http.get(f"{API}/ticker/{path}")
            symbols = [item["symbol"] for item in everything]
            assert "BTCUSDT" in symbols
            assert "LUNAUSD" not in symbols

    async def test_prices_and_best_levels_have_tickers_of_their_own(self, http: Http) -> None:
        _, price = await http.get(f"{API}/ticker/price", symbol="BTCUSDT")
        assert set(price) == {"symbol", "price"}
        _, best = await http.get(f"{API}/ticker/bookTicker", symbol="BTCUSDT")
        assert float(best["bidPrice"]) < float(best["askPrice"])
        assert float(best["bidQty"]) > 0

    @pytest.mark.parametrize(
        ("path", "query", "code"),
        [
            ("klines", {}, -1102),
            ("klines", {"symbol": "BTCUSDT"}, -1102),
            ("klines", {"symbol": "NOSUCH", "interval": "1m"}, -1121),
            ("klines", {"symbol": "btc/usdt", "interval": "1m"}, -1100),
            ("klines", {"symbol": "BTCUSDT", "interval": "7m"}, -1120),
            ("klines", {"symbol": "BTCUSDT", "interval": "1s"}, -1120),
            ("klines", {"symbol": "BTCUSDT", "interval": "1m", "limit": "-5"}, -1100),
            ("klines", {"symbol": "BTCUSDT", "interval": "1m", "limit": "0"}, -1130),
            ("klines", {"symbol": "BTCUSDT", "interval": "1m", "startTime": "x"}, -1100),
            ("depth", {"symbol": "BTCUSDUSD"}, -1121),
            ("exchangeInfo", {"symbols": "BTCUSDT"}, -1100),
            ("exchangeInfo", {"symbols": "[]"}, -1100),
            ("exchangeInfo", {"symbols": '["NOSUCH"]'}, -1121),
            ("ticker/price", {"symbols": '["BTCUSDT"]', "symbol": "BTCUSDT"}, -1128),
            ("ticker/24hr", {"symbol": "BTCUSDT", "type": "SMALL"}, -1130),
            ("aggTrades", {"symbol": "BTCUSDT", "fromId": "1", "startTime": "1"}, -1128),
        ],
    )
    async def test_what_cannot_be_answered_has_a_code_and_a_message(
        self, http: Http, path: str, query: dict[str, object], code: int
    ) -> None:
        status, error = await http.get(f"{API}/{path}", **query)
        assert (status, set(error), error["code"]) == (400, {"code", "msg"}, code)

    async def test_a_path_that_does_not_exist_is_refused_in_binances_way(self, http: Http) -> None:
        status, error = await http.get(f"{API}/nothing")
        assert (status, error["code"]) == (404, -5000)
        assert f"{API}/nothing" in error["msg"]

    async def test_another_exchanges_paths_below_the_same_prefix_are_left_to_it(
        self, http: Http
    ) -> None:
        _, error = await http.get(f"{API}/brokerage/nothing")
        assert "-5000" not in str(error)

    async def test_every_answer_tells_the_weight_used_in_this_minute(
        self, sandbox: RunningSandbox
    ) -> None:
        # Two requests may lie on both sides of a minute; of three, two that follow do not.
        used = []
        async with aiohttp.ClientSession() as session:
            for _ in range(3):
                url = f"{sandbox.url}{API}/depth?symbol=BTCUSDT&limit=1000"
                async with session.get(url) as response:
                    used.append(int(response.headers["X-MBX-USED-WEIGHT-1M"]))
        assert 50 in (used[1] - used[0], used[2] - used[1])

    async def test_above_the_limit_it_says_when_to_come_again(self) -> None:
        config = SandboxConfig(rate_limit=1)
        async with running_sandbox(config) as sandbox, aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{sandbox.url}{API}/ping") as response:
                    error = await response.json()
                    if response.status != 200:
                        break
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert error["code"] == -1003

    async def test_sockets_of_all_names_are_counted_as_one_path(
        self, sandbox: RunningSandbox
    ) -> None:
        for path in ("/ws/0", "/ws/1"):
            async with connected(sandbox, path):
                pass
        assert sandbox.log.by_path == {"/ws/{names}": 2}


class TestStreams:
    async def test_a_numbered_connection_subscribes_lists_and_unsubscribes(
        self, sandbox: RunningSandbox
    ) -> None:
        async with connected(sandbox, "/ws/0") as listener:
            await subscribed(listener, "btcusdt@ticker", "ethusdt@ticker", number="some1")
            assert sandbox.hub.running_feeds == {
                "/ws btcusdt@ticker": 1,
                "/ws ethusdt@ticker": 1,
            }
            await listener.ws.send_json(
                {"method": "UNSUBSCRIBE", "params": ["btcusdt@ticker", "never@had"], "id": None}
            )
            await listener.ws.send_json({"method": "LIST_SUBSCRIPTIONS", "id": 3})
            answers: list[dict[str, Any]] = []
            while len(answers) < 2:
                message = await listener.message()
                answers += [message] if "result" in message else []
            assert answers == [
                {"result": None, "id": None},
                {"result": ["ethusdt@ticker"], "id": 3},
            ]
            assert sandbox.hub.running_feeds == {"/ws ethusdt@ticker": 1}
        await eventually(lambda: sandbox.hub.running_feeds == {})

    async def test_streams_in_the_address_are_told_bare_or_in_an_envelope(
        self, sandbox: RunningSandbox
    ) -> None:
        async with connected(sandbox, "/ws/btcusdt@ticker") as listener:
            assert (await listener.message())["e"] == "24hrTicker"
        path = "/stream?streams=btcusdt@miniTicker/ethusdt@bookTicker"
        async with connected(sandbox, path) as listener:
            seen: dict[str, str] = {}
            while len(seen) < 2:
                message = await listener.message()
                assert set(message) == {"stream", "data"}
                seen[message["stream"]] = message["data"]["s"]
        assert seen == {"btcusdt@miniTicker": "BTCUSDT", "ethusdt@bookTicker": "ETHUSDT"}

    @pytest.mark.parametrize(
        "name",
        [
            "nosuch@trade",
            "BTCUSDT@trade",
            "btcusdt@nothing",
            "btcusdt@kline_1s",
            "btcusdt@kline_7m",
            "btcusdt@depth7",
            "btcusdt@depth@5ms",
            "btcusdusd@trade",
        ],
    )
    async def test_a_stream_that_does_not_exist_is_subscribed_to_and_silent(
        self, sandbox: RunningSandbox, name: str
    ) -> None:
        async with connected(sandbox, "/ws") as listener:
            await subscribed(listener, name)
            await listener.ws.send_json({"method": "LIST_SUBSCRIPTIONS", "id": 2})
            assert await listener.message() == {"result": [name], "id": 2}
            assert sandbox.hub.running_feeds == {}

    @pytest.mark.parametrize(
        ("text", "code", "number"),
        [
            ("no json", 3, None),
            ("[]", 2, None),
            ('{"id": 1}', 2, 1),
            ('{"method": "JUMP", "id": 1}', 2, 1),
            ('{"method": "SUBSCRIBE", "id": 1}', 2, 1),
            ('{"method": "SUBSCRIBE", "params": [5], "id": 1}', 2, 1),
            ('{"method": "SUBSCRIBE", "params": [], "id": 1.5}', 2, None),
            ('{"method": "SUBSCRIBE", "params": [], "id": "a b"}', 2, None),
        ],
    )
    async def test_a_message_that_is_no_request_is_refused_and_the_socket_stays(
        self, sandbox: RunningSandbox, text: str, code: int, number: int | None
    ) -> None:
        async with connected(sandbox, "/ws/0") as listener:
            await listener.ws.send_str(text)
            answer = await listener.message()
            assert (answer["id"], answer["error"]["code"]) == (number, code)
            assert answer["error"]["msg"].startswith("Invalid")
            await subscribed(listener, "btcusdt@ticker")

    async def test_more_than_five_messages_a_second_end_the_connection(
        self, sandbox: RunningSandbox
    ) -> None:
        async with connected(sandbox, "/ws/0") as listener:
            for number in range(5):
                await listener.ws.send_json({"method": "LIST_SUBSCRIPTIONS", "id": number})
            for number in range(5):
                assert (await listener.message())["id"] == number
            with contextlib.suppress(ConnectionError):
                for _ in range(50):
                    await listener.ws.ping()
            await listener.ended()

    async def test_a_ping_is_answered_with_what_it_holds(self, sandbox: RunningSandbox) -> None:
        async with connected(sandbox, "/ws/0", autoping=False) as listener:
            await listener.ws.ping(b"here")
            async with asyncio.timeout(15):
                message = await listener.ws.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.PONG, b"here")

    async def test_more_than_1024_streams_end_the_connection(self, sandbox: RunningSandbox) -> None:
        names = [f"coin{number}@trade" for number in range(1_025)]
        async with connected(sandbox, "/ws/0") as listener:
            await subscribed(listener, *names[:1_024])
            assert sandbox.hub.open_sockets == 1
            await listener.ws.send_json({"method": "SUBSCRIBE", "params": names[-1:], "id": 2})
            await listener.ended()
            assert listener.ws.closed
        await eventually(lambda: sandbox.hub.open_sockets == 0)

    async def test_a_peer_that_answers_pings_stays_and_one_that_does_not_is_dropped(self) -> None:
        async with running_sandbox(SandboxConfig(heartbeat_s=0.1)) as sandbox:
            async with connected(sandbox, "/ws/0", autoping=False) as listener:
                for _ in range(8):
                    async with asyncio.timeout(15):
                        message = await listener.ws.receive()
                    assert message.type == aiohttp.WSMsgType.PING
                    await listener.ws.pong(message.data)
                await listener.ended()
            await eventually(lambda: sandbox.hub.open_sockets == 0)

    async def test_a_closing_kline_has_its_final_values_and_then_the_next_one_opens(self) -> None:
        events: list[dict[str, Any]] = []
        async with (
            fast() as (sandbox, _),
            connected(sandbox, "/ws/lrcusdt@kline_1m") as listener,
        ):
            while sum(event["k"]["x"] for event in events) < 3:
                events.append(await listener.message())
            market = instrument(sandbox, "LRC/USDT")
            prices = FlatCandles(sandbox.venue.prices)
            closed = [event["k"] for event in events if event["k"]["x"]]
            # Whichever was running when the listener came.
            first = closed[0]["t"]
            part = TimeRange(first, first + 3 * MINUTE)
            finals = {item.timestamp: item for item in prices.candles(market, M1, part)}
        assert {kline["t"]: row_values(kline) for kline in closed} == {
            opened: values_of(item) for opened, item in finals.items()
        }
        for kline in closed:
            assert kline["T"] == kline["t"] + MINUTE - 1
            assert (kline["f"] == kline["L"] == -1) is (float(kline["v"]) == 0) or kline["n"] > 0
        order = [(event["k"]["t"], event["k"]["x"]) for event in events]
        assert order == sorted(order)

    async def test_klines_of_a_busy_market_come_every_two_seconds(self) -> None:
        async with (
            fast(20) as (sandbox, _),
            connected(sandbox, "/ws/btcusdt@kline_1d") as listener,
        ):
            moments = [(await listener.message())["E"] for _ in range(4)]
        assert all(later - earlier >= 1_900 for earlier, later in itertools.pairwise(moments[1:]))

    async def test_each_trade_is_told_once_in_a_frame_of_its_own(self) -> None:
        async with (
            fast() as (sandbox, http),
            connected(sandbox, "/ws/btcusdt@trade/btcusdt@aggTrade") as listener,
        ):
            seen: dict[str, list[dict[str, Any]]] = {"trade": [], "aggTrade": []}
            while min(map(len, seen.values())) < 10:
                event = await listener.message()
                seen[event["e"]].append(event)
            _, told = await http.get(f"{API}/trades", symbol="BTCUSDT", limit=1_000)
        rows = {row["id"]: row for row in told}
        for kind, number in (("trade", "t"), ("aggTrade", "a")):
            ids = [event[number] for event in seen[kind]]
            assert ids == [at for at in sorted(rows) if ids[0] <= at <= ids[-1]]
            for event in seen[kind]:
                row = rows[event[number]]
                assert (event["p"], event["q"], event["T"], event["m"]) == (
                    row["price"],
                    row["qty"],
                    row["time"],
                    row["isBuyerMaker"],
                )

    @pytest.mark.parametrize("name", ["btcusdt@depth", "btcusdt@depth@100ms"])
    async def test_a_snapshot_and_the_changes_after_it_are_the_exchanges_book(
        self, name: str
    ) -> None:
        # At three times the speed a second of the stream sums up several states of the book.
        async with (
            fast(3) as (sandbox, http),
            connected(sandbox, f"/stream?streams={name}") as listener,
        ):
            first = (await listener.message())["data"]
            _, whole = await http.get(f"{API}/depth", symbol="BTCUSDT", limit=1_000)
            sides = {side: as_levels(whole[side]) for side in ("bids", "asks")}
            number, before, followed = whole["lastUpdateId"], first["u"], 0
            while followed < 6:
                event = (await listener.message())["data"]
                assert event["U"] == before + 1
                before = event["u"]
                if event["u"] <= number:
                    continue
                assert followed or event["U"] <= number + 1 <= event["u"]
                for side, changes in (("bids", event["b"]), ("asks", event["a"])):
                    sides[side].update(as_levels(changes))
                    sides[side] = {at: size for at, size in sides[side].items() if size}
                book = sandbox.venue.prices.book(instrument(sandbox), event["u"], 1_000)
                assert sides == {"bids": dict(book.bids), "asks": dict(book.asks)}
                followed += 1

    async def test_best_levels_and_short_books_are_named_by_the_numbers_of_the_books(self) -> None:
        async with (
            fast(3) as (sandbox, _),
            connected(sandbox, "/stream?streams=btcusdt@depth5/btcusdt@bookTicker") as listener,
        ):
            seen: dict[str, list[dict[str, Any]]] = {}
            while min(map(len, seen.values()), default=0) < 3 or len(seen) < 2:
                message = await listener.message()
                seen.setdefault(message["stream"], []).append(message["data"])
            book_of = sandbox.venue.prices.book
            for short in seen["btcusdt@depth5"]:
                book = book_of(instrument(sandbox), short["lastUpdateId"], 5)
                assert as_levels(short["bids"]) == dict(book.bids)
                assert as_levels(short["asks"]) == dict(book.asks)
            for best in seen["btcusdt@bookTicker"]:
                book = book_of(instrument(sandbox), best["u"], 1)
                assert (float(best["b"]), float(best["B"])) == book.bids[0]
                assert (float(best["a"]), float(best["A"])) == book.asks[0]


def as_levels(rows: list[list[str]]) -> dict[float, float]:
    return {float(price): float(amount) for price, amount in rows}


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "code"), [(400, -1130), (418, -1003), (429, -1003), (500, -1000), (503, -1008)]
    )
    async def test_a_status_comes_with_binances_code(
        self, http: Http, status: int, code: int
    ) -> None:
        number = await http.fault(
            kind="rest_status", status=status, instrument="BTC/USDT", timeframe="1m", count=1
        )
        assert (await http.get(KLINES, symbol="BTCUSDT", interval="5m"))[0] == 200
        told, error = await http.get(KLINES, symbol="BTCUSDT", interval="1m")
        assert (told, set(error), error["code"]) == (status, {"code", "msg"}, code)
        assert await http.hits(number) == 1

    @pytest.mark.parametrize("status", [418, 429])
    async def test_a_limit_says_when_to_come_again_as_the_fault_says_or_by_itself(
        self, sandbox: RunningSandbox, http: Http, status: int
    ) -> None:
        await http.fault(kind="rest_status", status=status, retry_after=7, count=1)
        await http.fault(kind="rest_status", status=status, count=1)
        told = []
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.get(f"{sandbox.url}{API}/ping") as response:
                    told.append((response.status, response.headers["Retry-After"]))
        assert told == [(status, "7"), (status, "1")]

    async def test_answers_may_be_broken_or_empty(self, http: Http) -> None:
        query = {"symbol": "BTCUSDT", "interval": "1m"}
        await http.fault(kind="rest_garbage", count=1)
        status, text = await http.get(KLINES, **query)
        assert (status, type(text), text[:2]) == (200, str, "[[")
        await http.fault(kind="rest_empty", count=1)
        assert await http.get(KLINES, **query) == (200, "")

    async def test_answers_may_be_late_or_never_come(self, http: Http) -> None:
        await http.fault(kind="rest_delay", delay=0.2, count=1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await http.get(f"{API}/ping")
        assert loop.time() - began >= 0.19
        number = await http.fault(kind="rest_hang", path="klines")
        asking = asyncio.create_task(klines(http))
        while await http.hits(number) == 0:
            assert not asking.done()
        await http.send("DELETE", "/_control/faults")
        assert len(await asking) == 500

    async def test_rows_may_be_missing(self, http: Http) -> None:
        query: dict[str, Any] = {"startTime": NOON_MS - 10 * MINUTE, "limit": 10}
        whole = await klines(http, **query)
        await http.fault(kind="rest_missing_rows", rows=3, instrument="BTCUSDT", count=1)
        assert await klines(http, **query) == whole[:3] + whole[6:]
        assert await klines(http, **query) == whole

    async def test_candles_may_be_late_provisional_or_revised(self, http: Http) -> None:
        query: dict[str, Any] = {"startTime": NOON_MS - MINUTE, "endTime": NOON_MS - 1}
        (final,) = await klines(http, **query)
        await http.fault(kind="candle_late", after_close=3_600, timeframe="1m", count=1)
        assert await klines(http, **query) == []
        await http.fault(kind="candle_provisional", after_close=3_600, count=1)
        (provisional,) = await klines(http, **query)
        assert float(provisional[5]) < float(final[5])
        values = {"volume": 12.5}
        await http.fault(kind="candle_revised", timestamp=NOON_MS - MINUTE, values=values, count=1)
        (revised,) = await klines(http, **query)
        assert revised[5] == "12.50000000"
        assert await klines(http, **query) == [final]

    async def test_a_delisted_market_is_unknown_and_its_streams_are_silent(self) -> None:
        async with fast() as (sandbox, http), connected(sandbox, "/ws/0") as listener:
            number = await http.fault(kind="delisted", instrument="BTC/USDT")
            status, error = await http.get(KLINES, symbol="BTCUSDT", interval="1m")
            assert (status, error["code"]) == (400, -1121)
            _, info = await http.get(f"{API}/exchangeInfo")
            assert "BTCUSDT" not in {item["symbol"] for item in info["symbols"]}
            asked = await http.hits(number)
            await subscribed(listener, "btcusdt@bookTicker")
            while await http.hits(number) < asked + 3:
                pass
            assert sandbox.hub.frames_sent == 0

    async def test_sockets_are_refused_dropped_and_connections_broken(
        self, sandbox: RunningSandbox, http: Http
    ) -> None:
        await http.fault(kind="ws_refuse", status=403, count=1)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connected(sandbox, "/ws/0"):
                pass
        assert refused.value.status == 403
        async with connected(sandbox, "/ws/btcusdt@ticker") as listener:
            await listener.message()
            await http.fault(kind="drop_sockets")
            await listener.ended()
        await http.fault(kind="refuse_connections")
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"{API}/ping")
        await http.send("DELETE", "/_control/faults")
        assert await http.get(f"{API}/ping") == (200, {})

    async def test_one_channel_may_be_mute_while_the_socket_lives(self) -> None:
        async with (
            fast() as (sandbox, http),
            connected(sandbox, "/stream") as listener,
        ):
            number = await http.fault(kind="mute_sockets", channel="book", instrument="BTCUSDT")
            await subscribed(listener, "btcusdt@depth", "ethusdt@depth", "btcusdt@ticker")
            seen = {(await listener.message())["stream"] for _ in range(12)}
            assert seen == {"ethusdt@depth", "btcusdt@ticker"}
            assert await http.hits(number) > 0

    async def test_a_frame_may_be_broken_and_the_next_one_is_whole(self) -> None:
        async with fast() as (sandbox, http), connected(sandbox, "/ws/0") as listener:
            await http.fault(kind="ws_broken_frame", channel="ticker")
            await subscribed(listener, "btcusdt@ticker")
            async with asyncio.timeout(15):
                assert not (await listener.ws.receive_str()).endswith("}")
            assert (await listener.message())["e"] == "24hrTicker"

    async def test_a_closing_kline_may_be_withheld(self) -> None:
        async with fast() as (sandbox, http):
            number = await http.fault(
                kind="final_update_withheld", instrument="BTCUSDT", timeframe="1m"
            )
            events: list[dict[str, Any]] = []
            async with connected(sandbox, "/ws/btcusdt@kline_1m") as listener:
                while not events or events[-1]["k"]["t"] < NOON_MS + 2 * MINUTE:
                    events.append(await listener.message())
            assert not any(event["k"]["x"] for event in events)
            assert await http.hits(number) >= 2


async def test_both_exchanges_tell_of_the_same_trades_with_and_without_flat_candles(
    http: Http,
) -> None:
    start = NOON_MS - 300 * MINUTE
    flat = await klines(http, symbol="LRCUSDT", startTime=start, endTime=NOON_MS - 1)
    traded = await http.candles("LRC_USDT", "1m", start_ts=start, end_ts=NOON_MS, count=300)
    told = {row[0]: numbers(row) for row in flat if float(row[5])}
    assert told == {row["t"]: row_values(row) for row in traded}
    assert len(traded) < len(flat) == 300
