"""Coinbase's REST protocol over the wire: what is told, what is refused, and what faults do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from sandbox.prices import Instrument
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    Http,
    clock_at,
    eventually,
    http_to,
    recorded_with_holes,
    values_of,
    write_csv,
)

V3 = "/api/v3/brokerage"
PRODUCTS = f"{V3}/market/products"
BTC_CANDLES = f"{PRODUCTS}/BTC-USD/candles"
BOOK = f"{V3}/market/product_book"
NOON_S = NOON_MS // 1000
M1, M5 = Interval.parse("1m"), Interval.parse("5m")


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market half a minute past noon, at its real speed."""
    async with running_sandbox(SandboxConfig(market_clock=clock_at(NOON_MS + 30_000))) as running:
        yield running


@pytest.fixture
async def http(sandbox: RunningSandbox) -> AsyncIterator[Http]:
    async with http_to(sandbox) as asking:
        yield asking


def btc_of(sandbox: RunningSandbox) -> Instrument:
    return sandbox.venue.instruments()[0]


async def candles(
    http: Http, start: int, end: int, granularity: str = "ONE_MINUTE", product: str = "BTC-USD"
) -> list[dict[str, str]]:
    """Rows of ``[start, end)`` in seconds."""
    status, answer = await http.get(
        f"{PRODUCTS}/{product}/candles", start=start, end=end, granularity=granularity
    )
    assert status == 200, answer
    rows: list[dict[str, str]] = answer["candles"]
    return rows


def row_values(row: dict[str, str]) -> tuple[float, ...]:
    return tuple(float(row[name]) for name in ("open", "high", "low", "close", "volume"))


async def test_products_are_spot_and_say_whether_they_trade(http: Http) -> None:
    status, answer = await http.get(PRODUCTS)
    assert status == 200
    products = {item["product_id"]: item for item in answer["products"]}
    assert answer["num_products"] == len(products)
    assert {item["product_type"] for item in products.values()} == {"SPOT"}
    btc, luna = products["BTC-USD"], products["LUNA-USD"]
    assert (btc["base_currency_id"], btc["quote_currency_id"]) == ("BTC", "USD")
    assert (btc["base_increment"], btc["quote_increment"]) == ("0.00001", "0.01")
    assert (btc["status"], btc["trading_disabled"], btc["is_disabled"]) == ("online", False, False)
    assert (luna["status"], luna["trading_disabled"], luna["view_only"]) == ("delisted", True, True)
    assert await http.get(PRODUCTS, product_type="FUTURE") == (
        200,
        {"products": [], "num_products": 0},
    )


async def test_a_product_has_every_field_that_is_documented(http: Http) -> None:
    status, product = await http.get(f"{PRODUCTS}/BTC-USD")
    assert status == 200
    assert set(product) == {
        *("product_id", "price", "price_percentage_change_24h", "volume_24h"),
        *("volume_percentage_change_24h", "base_increment", "quote_increment", "quote_min_size"),
        *("quote_max_size", "base_min_size", "base_max_size", "base_name", "quote_name"),
        *("watched", "is_disabled", "new", "status", "cancel_only", "limit_only", "post_only"),
        *("trading_disabled", "auction_mode", "product_type", "quote_currency_id"),
        *("base_currency_id", "fcm_trading_session_details", "mid_market_price", "alias"),
        *("alias_to", "base_display_symbol", "quote_display_symbol", "view_only"),
        *("price_increment", "display_name", "product_venue", "approximate_quote_24h_volume"),
        "new_at",
    }
    assert float(product["price"]) > 0


async def test_products_come_in_parts_and_by_name(http: Http, sandbox: RunningSandbox) -> None:
    _, everything = await http.get(PRODUCTS)
    _, part = await http.get(PRODUCTS, limit=2, offset=3)
    assert part["products"] == everything["products"][3:5]
    assert part["num_products"] == everything["num_products"]
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{sandbox.url}{PRODUCTS}?product_ids=ETH-USD&product_ids=BTC-EUR") as response,
    ):
        named = await response.json()
    assert {item["product_id"] for item in named["products"]} == {"ETH-USD", "BTC-EUR"}


async def test_what_is_quoted_in_usdc_is_an_alias_with_the_same_data(http: Http) -> None:
    _, usd = await http.get(f"{PRODUCTS}/BTC-USD")
    _, usdc = await http.get(f"{PRODUCTS}/BTC-USDC")
    assert (usd["alias"], usd["alias_to"]) == ("", ["BTC-USDC"])
    assert (usdc["alias"], usdc["alias_to"], usdc["quote_currency_id"]) == ("BTC-USD", [], "USDC")
    hour = (NOON_S - 3600, NOON_S)
    assert await candles(http, *hour, product="BTC-USDC") == await candles(http, *hour)
    _, euro = await http.get(f"{PRODUCTS}/BTC-EUR")
    assert (euro["alias"], euro["alias_to"]) == ("", [])


@pytest.mark.parametrize(
    ("granularity", "timeframe"),
    [
        ("ONE_MINUTE", "1m"),
        ("FIVE_MINUTE", "5m"),
        ("FIFTEEN_MINUTE", "15m"),
        ("THIRTY_MINUTE", "30m"),
        ("ONE_HOUR", "1h"),
        ("TWO_HOUR", "2h"),
        ("SIX_HOUR", "6h"),
        ("ONE_DAY", "1d"),
    ],
)
async def test_candles_are_those_of_the_market_with_the_newest_first(
    http: Http, sandbox: RunningSandbox, granularity: str, timeframe: str
) -> None:
    interval = Interval.parse(timeframe)
    end = interval.floor(NOON_MS)
    part = TimeRange(end - 20 * interval.milliseconds, end)
    rows = await candles(http, part.start // 1000, part.end // 1000, granularity)
    told = sandbox.venue.prices.candles(btc_of(sandbox), interval, part)
    assert [(int(row["start"]) * 1000, row_values(row)) for row in reversed(rows)] == [
        (item.timestamp, values_of(item)) for item in told
    ]
    assert len(rows) == 20


async def test_the_forming_candle_is_among_the_candles(http: Http) -> None:
    rows = await candles(http, NOON_S - 600, NOON_S + 60)
    assert [int(row["start"]) for row in rows[:2]] == [NOON_S, NOON_S - 60]


async def test_a_range_of_three_hundred_candles_is_told_and_one_of_more_is_refused(
    http: Http,
) -> None:
    assert len(await candles(http, NOON_S - 300 * 60, NOON_S)) == 300
    status, answer = await http.get(
        BTC_CANDLES, start=NOON_S - 300 * 60 - 1, end=NOON_S, granularity="ONE_MINUTE"
    )
    assert (status, answer["error"]) == (400, "INVALID_ARGUMENT")
    assert "number of candles requested" in answer["message"]
    assert answer["error_details"] == answer["message"]


async def test_a_limit_keeps_the_newest_candles(http: Http) -> None:
    whole = await candles(http, NOON_S - 600, NOON_S)
    _, answer = await http.get(
        BTC_CANDLES, start=NOON_S - 600, end=NOON_S, granularity="ONE_MINUTE", limit=3
    )
    assert answer["candles"] == whole[:3]


async def test_a_period_without_trades_has_no_candle(tmp_path: Path) -> None:
    recorded = recorded_with_holes(NOON_MS, MINUTE, 40, (range(10, 20),))
    file = tmp_path / "ETH_BTC-1m.csv"
    write_csv(file, recorded)
    config = SandboxConfig(replay=file, market_clock=clock_at(NOON_MS + 50 * MINUTE))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        rows = await candles(http, NOON_S, NOON_S + 40 * 60, product="ETH-BTC")
    assert [int(row["start"]) * 1000 for row in reversed(rows)] == [
        item.timestamp for item in recorded
    ]


async def test_candles_finer_than_what_was_recorded_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ETH_BTC-5m.csv"
    write_csv(file, recorded_with_holes(NOON_MS, 5 * MINUTE, 40, ()))
    async with running_sandbox(SandboxConfig(replay=file)) as sandbox, http_to(sandbox) as http:
        asked = {"start": NOON_S, "end": NOON_S + 600}
        path = f"{PRODUCTS}/ETH-BTC/candles"
        status, answer = await http.get(path, **asked, granularity="ONE_MINUTE")
        assert (status, answer["message"]) == (400, "granularity argument is invalid")
        assert (await http.get(path, **asked, granularity="FIVE_MINUTE"))[0] == 200


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ({"start": NOON_S, "end": NOON_S + 60}, "granularity"),
        ({"start": NOON_S, "end": NOON_S + 60, "granularity": "FOUR_HOUR"}, "granularity"),
        ({"start": NOON_S, "granularity": "ONE_MINUTE"}, "start and end"),
        ({"end": NOON_S, "granularity": "ONE_MINUTE"}, "start and end"),
        ({"start": NOON_S, "end": NOON_S - 1, "granularity": "ONE_MINUTE"}, "start and end"),
        ({"start": "yesterday", "end": NOON_S, "granularity": "ONE_MINUTE"}, "start"),
        ({"start": -1, "end": NOON_S, "granularity": "ONE_MINUTE"}, "start"),
        ({"start": NOON_S, "end": NOON_S, "granularity": "ONE_MINUTE", "limit": 301}, "limit"),
        ({"start": NOON_S, "end": NOON_S, "granularity": "ONE_MINUTE", "limit": 0}, "limit"),
    ],
)
async def test_a_wrong_request_is_answered_as_the_exchange_would(
    http: Http, query: dict[str, object], complaint: str
) -> None:
    status, answer = await http.get(BTC_CANDLES, **query)
    assert (status, answer["error"]) == (400, "INVALID_ARGUMENT")
    assert set(answer) == {"error", "error_details", "message"}
    assert answer["message"].startswith(complaint)


async def test_times_in_ms_ask_for_a_range_far_in_the_future_and_are_refused(http: Http) -> None:
    status, answer = await http.get(
        BTC_CANDLES, start=NOON_MS - MINUTE, end=NOON_MS, granularity="ONE_MINUTE"
    )
    assert (status, answer["error"]) == (400, "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    "path",
    [
        f"{PRODUCTS}/NO-SUCH",
        f"{PRODUCTS}/NO-SUCH/candles",
        f"{PRODUCTS}/NO-SUCH/ticker",
        f"{BOOK}?product_id=NO-SUCH",
        BOOK,
        f"{V3}/nothing",
    ],
)
async def test_what_there_is_not_is_not_found(http: Http, path: str) -> None:
    status, answer = await http.get(path)
    assert (status, answer["error"]) == (404, "NOT_FOUND")
    assert set(answer) == {"error", "error_details", "message"}


async def test_an_old_path_has_errors_in_its_own_shape(http: Http) -> None:
    assert await http.get("/v2/nothing") == (
        404,
        {"errors": [{"id": "not_found", "message": "Not found"}]},
    )
    status, answer = await http.get("/v2/exchange-rates", currency="EUR")
    assert (status, answer["errors"][0]["id"]) == (400, "invalid_request")


async def test_trades_are_told_with_the_newest_first_beside_the_best_prices(
    http: Http, sandbox: RunningSandbox
) -> None:
    path = f"{PRODUCTS}/BTC-USD/ticker"
    status, answer = await http.get(path, limit=5, end=NOON_S)
    assert status == 200
    everything = TimeRange(NOON_MS - 10 * MINUTE, NOON_MS)
    told = sandbox.venue.prices.trades(btc_of(sandbox), everything)[-5:]
    rows = list(reversed(answer["trades"]))
    makers = {"buy": "SELL", "sell": "BUY"}
    assert [(int(row["trade_id"]), float(row["price"]), row["side"]) for row in rows] == [
        (trade.id, trade.price, makers[trade.side]) for trade in told
    ]
    assert rows[0]["time"].startswith("2026-11-22T11:")
    assert set(rows[0]) == {
        *("trade_id", "product_id", "price", "size", "time", "side", "bid", "ask", "exchange")
    }
    assert float(answer["best_bid"]) < float(answer["best_ask"])
    _, part = await http.get(path, limit=1000, start=NOON_S - 60, end=NOON_S)
    minute = TimeRange(NOON_MS - MINUTE, NOON_MS)
    assert len(part["trades"]) == len(sandbox.venue.prices.trades(btc_of(sandbox), minute))


async def test_a_book_is_told_with_its_middle(http: Http) -> None:
    status, answer = await http.get(BOOK, product_id="BTC-USD", limit=7)
    assert status == 200
    assert set(answer) == {"pricebook", "last", "mid_market", "spread_bps", "spread_absolute"}
    book = answer["pricebook"]
    assert set(book) == {"product_id", "bids", "asks", "time"}
    assert (book["product_id"], len(book["bids"]), len(book["asks"])) == ("BTC-USD", 7, 7)
    bid, ask = float(book["bids"][0]["price"]), float(book["asks"][0]["price"])
    assert bid < float(answer["mid_market"]) < ask
    assert float(answer["spread_absolute"]) == pytest.approx(ask - bid)
    assert (await http.get(BOOK, product_id="BTC-USD", limit=0))[0] == 400


async def test_the_time_is_the_exchange_s_own(http: Http) -> None:
    await http.send("POST", "/_control/clock", {"skew_ms": 3_600_000})
    _, now = await http.get(f"{V3}/time")
    assert now["iso"].startswith("2026-11-22T13:00:3")
    assert int(now["epochMillis"]) // 1000 == int(now["epochSeconds"])
    _, old = await http.get("/v2/time")
    assert NOON_S + 3630 <= old["data"]["epoch"] < NOON_S + 3660


async def test_currencies_and_rates_are_told_on_the_old_paths(http: Http) -> None:
    _, fiat = await http.get("/v2/currencies")
    _, crypto = await http.get("/v2/currencies/crypto")
    _, rates = await http.get("/v2/exchange-rates")
    assert {item["id"] for item in fiat["data"]} == {"USD", "EUR"}
    codes = [item["code"] for item in crypto["data"]]
    assert {"BTC", "ETH", "USDC"} <= set(codes)
    assert len({item["asset_id"] for item in crypto["data"]}) == len(codes)
    assert rates["data"]["currency"] == "USD"
    _, btc = await http.get(f"{PRODUCTS}/BTC-USD")
    assert 1 / float(rates["data"]["rates"]["BTC"]) == pytest.approx(float(btc["price"]), rel=1e-4)


async def test_requests_of_all_products_are_counted_under_one_path_and_by_market(
    http: Http,
) -> None:
    for name in ("BTC-USD", "ETH-USD", "NO-SUCH"):
        await http.get(f"{PRODUCTS}/{name}")
    _, stats = await http.get("/_control/stats")
    assert stats["requests"] == {f"{PRODUCTS}/{{product_id}}": 3}
    assert stats["markets"] == {"BTC/USD": 1, "ETH/USD": 1}


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, "rate_limit_exceeded"), (500, "INTERNAL"), (503, "UNAVAILABLE")],
)
async def test_a_status_is_answered_in_the_shape_of_the_path(
    http: Http, status: int, error: str
) -> None:
    number = await http.fault(kind="rest_status", status=status, count=2)
    answered, content = await http.get(f"{V3}/time")
    assert (answered, content["error"]) == (status, error)
    answered, content = await http.get("/v2/time")
    assert (answered, list(content)) == (status, ["errors"])
    assert (await http.get(f"{V3}/time"))[0] == 200
    assert await http.hits(number) == 2


async def test_above_the_rate_limit_requests_are_refused() -> None:
    config = SandboxConfig(rate_limit=2)
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        answers = [await http.get(f"{V3}/time") for _ in range(3)]
    assert [status for status, _ in answers] == [200, 200, 429]
    assert answers[-1][1]["error"] == "rate_limit_exceeded"


async def test_a_fault_finds_the_product_and_the_granularity_however_they_are_spelled(
    http: Http,
) -> None:
    number = await http.fault(
        kind="rest_status", status=500, path="candles", instrument="BTC/USD", timeframe="1m"
    )
    asked = {"start": NOON_S - 300, "end": NOON_S}
    for product, granularity, expected in (
        ("BTC-USD", "ONE_MINUTE", 500),
        ("BTC-USD", "FIVE_MINUTE", 200),
        ("ETH-USD", "ONE_MINUTE", 200),
    ):
        path = f"{PRODUCTS}/{product}/candles"
        assert (await http.get(path, **asked, granularity=granularity))[0] == expected
    assert await http.hits(number) == 1
    book = await http.fault(kind="rest_status", status=500, instrument="BTC/USD")
    assert (await http.get(BOOK, product_id="BTC-USD"))[0] == 500
    assert (await http.get(BOOK, product_id="ETH-USD"))[0] == 200
    assert await http.hits(book) == 1


async def test_answers_may_be_garbage_empty_delayed_or_hang(http: Http) -> None:
    await http.fault(kind="rest_garbage", path="candles", count=1)
    asked = {"start": NOON_S - 300, "end": NOON_S, "granularity": "ONE_MINUTE"}
    status, text = await http.get(BTC_CANDLES, **asked)
    assert (status, str(text)[:12]) == (200, '{"candles":[')
    assert isinstance(text, str)
    await http.fault(kind="rest_empty", path="candles", count=1)
    assert await http.get(BTC_CANDLES, **asked) == (200, "")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await http.fault(kind="rest_delay", path="candles", delay=0.2, count=1)
    assert (await http.get(BTC_CANDLES, **asked))[0] == 200
    assert loop.time() - began >= 0.19
    number = await http.fault(kind="rest_hang", path="candles")
    hanging = asyncio.create_task(http.get(BTC_CANDLES, **asked))
    while await http.hits(number) == 0:
        assert not hanging.done()
    await http.send("DELETE", "/_control/faults")
    assert (await hanging)[0] == 200


async def test_rows_may_be_missing_late_provisional_and_revised(
    http: Http, sandbox: RunningSandbox
) -> None:
    whole = await candles(http, NOON_S - 600, NOON_S)
    await http.fault(kind="rest_missing_rows", rows=3, count=1)
    assert len(await candles(http, NOON_S - 600, NOON_S)) == 7
    revised = NOON_MS - 8 * MINUTE
    await http.fault(kind="candle_revised", timestamp=revised, values={"volume": 42})
    changed = await candles(http, NOON_S - 600, NOON_S)
    (new,) = [row for row in changed if row not in whole]
    assert (int(new["start"]) * 1000, float(new["volume"])) == (revised, 42.0)
    await http.fault(kind="candle_provisional", after_close=60, timeframe="1m", count=1)
    provisional = await candles(http, NOON_S - 60, NOON_S)
    assert float(provisional[0]["volume"]) < float(whole[0]["volume"])
    await http.fault(kind="candle_late", after_close=120, timeframe="1m")
    late = await candles(http, NOON_S - 600, NOON_S + 60)
    assert int(late[0]["start"]) == NOON_S - 3 * 60


async def test_a_delisted_market_is_in_no_list_and_not_found(http: Http) -> None:
    await http.fault(kind="delisted", instrument="ETH/USD")
    _, answer = await http.get(PRODUCTS)
    names = {item["product_id"] for item in answer["products"]}
    assert not {"ETH-USD", "ETH-USDC"} & names
    for name in ("ETH-USD", "ETH-USDC"):
        assert (await http.get(f"{PRODUCTS}/{name}/ticker"))[0] == 404


async def test_connections_may_be_refused(http: Http, sandbox: RunningSandbox) -> None:
    await http.fault(kind="refuse_connections")
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.get(f"{V3}/time")
    await http.send("DELETE", "/_control/faults")
    assert (await http.get(f"{V3}/time"))[0] == 200
    await http.fault(kind="ws_refuse", status=503, count=1)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(f"{sandbox.ws_url}/")
    await eventually(lambda: sandbox.hub.open_sockets == 0)


async def test_a_plain_request_of_the_socket_s_path_is_refused(http: Http) -> None:
    status, _ = await http.get("/")
    assert status == 400


def field_types(row: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in row.items()}


async def test_a_candle_has_its_documented_fields_as_texts(http: Http) -> None:
    (row,) = await candles(http, NOON_S - 60, NOON_S)
    assert field_types(row) == dict.fromkeys(
        ("start", "low", "high", "open", "close", "volume"), str
    )
