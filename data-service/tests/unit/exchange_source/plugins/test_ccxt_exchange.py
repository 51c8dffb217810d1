"""What all ccxt exchanges share, with a hand-written ccxt instance in place of a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from ccxt.base import errors as vendor_errors

from config import Settings
from domain.candle import Candle, CandleUpdate
from domain.clock import MarketClock
from errors import InvalidRequest
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
    IExchangeAPIClient,
    Priority,
)
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.ccxt_errors import parse_http_date, parse_retry_after
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.ccxt_guards import redirect_urls
from exchange_source.plugins.cryptocom_exchange import CryptocomExchange
from tests.support.clock import ManualClock

MINUTE = 60_000
NOW = 1_700_000_040_000 + 30_000
OPEN = NOW - 30_000


class FakeVendor:
    """The part of a ccxt.pro instance that the client uses, scripted by the test."""

    timeframes: ClassVar = {"1m": "1m", "5m": "5m", "1w": "7D"}

    def __init__(self) -> None:
        self.markets = [
            {"symbol": "BTC/USD", "spot": True, "active": True},
            {"symbol": "OLD/USD", "spot": True, "active": False},
            {"symbol": "PERP/USD:USD", "spot": False, "active": True},
        ]
        self.rows: list[list[Any]] = []
        self.error: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.clients: dict[str, Any] = {}
        self.closing: set[Any] = set()
        self.ohlcvs: dict[str, dict[str, list[Any]]] = {}
        self.news: asyncio.Queue[list[list[Any]] | BaseException] = asyncio.Queue()

    async def fetch_markets(self) -> list[dict[str, Any]]:
        return self.markets

    def set_markets(self, markets: Any) -> None:
        self.calls.append(("set_markets", len(markets)))

    async def fetch_ohlcv(self, *args: Any) -> list[list[Any]]:
        self.calls.append(("fetch_ohlcv", *args))
        if self.error is not None:
            raise self.error
        return self.rows

    async def watch_ohlcv(self, *args: Any) -> list[list[Any]]:
        self.calls.append(("watch_ohlcv", *args))
        news = await self.news.get()
        if isinstance(news, BaseException):
            raise news
        return news

    async def close(self) -> None:
        self.calls.append(("close",))


class Plain(CCXTExchangeClient):
    """An exchange with nothing of its own."""

    exchange_name = "example"
    exchange_id = "cryptocom"


@pytest.fixture
def vendor() -> FakeVendor:
    return FakeVendor()


@pytest.fixture
async def client(vendor: FakeVendor) -> AsyncIterator[Plain]:
    clock = ManualClock(NOW)
    limiter = RequestLimiter(clock, name="example", rate=1e9, concurrency=4)
    client = Plain(clock=clock, quotes=("USD",), limiter=limiter, vendor=vendor)
    yield client
    await client.close()


def row(periods_ago: int, close: float = 100.0) -> list[Any]:
    return [OPEN - periods_ago * MINUTE, 100.0, 110.0, 90.0, close, 1.5]


def test_it_implements_every_method_of_its_interface(client: Plain) -> None:
    assert isinstance(client, IExchangeAPIClient)
    assert not CryptocomExchange.__abstractmethods__


def test_its_name_is_the_plugins(client: Plain) -> None:
    assert client.get_exchange_name() == "example"
    assert client.get_exchange_id() == "cryptocom"
    assert client.intervals == ("1m", "5m")


async def test_a_market_that_is_known_is_available(client: Plain) -> None:
    assert await client.check_coin_availability("BTC") == "BTC/USD"


@pytest.mark.parametrize("coin", ["NOPE", "OLD", "OLD/USD", "PERP/USD:USD", ""])
async def test_a_market_that_is_not_there_or_not_spot_or_not_active_is_not(
    client: Plain, coin: str
) -> None:
    assert await client.check_coin_availability(coin) is None


async def test_history_is_asked_through_ccxt_and_translated(
    client: Plain, vendor: FakeVendor
) -> None:
    vendor.rows = [row(4), row(3, 105), row(2), row(1)]
    data = await client.fetch_historical_data("BTC/USD", "1m", OPEN - 3 * MINUTE, OPEN - MINUTE)
    assert data.candles == (
        Candle(OPEN - 3 * MINUTE, 100.0, 110.0, 90.0, 105.0, 1.5),
        Candle(OPEN - 2 * MINUTE, 100.0, 110.0, 90.0, 100.0, 1.5),
    )
    assert vendor.calls[-1] == (
        "fetch_ohlcv", "BTC/USD", "1m", OPEN - 4 * MINUTE, 300, {"until": OPEN - 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "start", "end"), [("2m", 0, MINUTE), ("1m", 5, 5), ("1m", -1, 5)]
)
async def test_history_of_what_cannot_be_asked_is_an_invalid_request(
    client: Plain, interval: str, start: int, end: int
) -> None:
    with pytest.raises(InvalidRequest):
        await client.fetch_historical_data("BTC/USD", interval, start, end)


async def test_history_of_an_unknown_market_is_refused(client: Plain) -> None:
    with pytest.raises(ExchangeRefused):
        await client.fetch_historical_data("NOPE/USD", "1m", 0, MINUTE)


async def test_a_range_that_opens_no_period_asks_nothing(client: Plain, vendor: FakeVendor) -> None:
    data = await client.fetch_historical_data("BTC/USD", "1m", OPEN + 1, OPEN + 2)
    assert data.candles == ()
    assert not any(call[0] == "fetch_ohlcv" for call in vendor.calls)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (vendor_errors.RateLimitExceeded("x"), ExchangeRateLimited),
        (vendor_errors.DDoSProtection("x"), ExchangeRateLimited),
        (vendor_errors.NetworkError("x"), ExchangeUnavailable),
        (vendor_errors.RequestTimeout("x"), ExchangeUnavailable),
        (vendor_errors.ExchangeNotAvailable("x"), ExchangeUnavailable),
        (vendor_errors.OnMaintenance("x"), ExchangeUnavailable),
        (vendor_errors.ExchangeError("x"), ExchangeUnavailable),
        (vendor_errors.ExchangeClosedByUser("x"), ExchangeUnavailable),
        (vendor_errors.ChecksumError("x"), BadExchangeAnswer),
        (vendor_errors.NullResponse("x"), BadExchangeAnswer),
        (vendor_errors.BadSymbol("x"), ExchangeRefused),
        (vendor_errors.BadRequest("x"), ExchangeRefused),
        (vendor_errors.OrderNotFound("x"), ExchangeRefused),
        (vendor_errors.PermissionDenied("x"), ExchangeRefused),
        (vendor_errors.NotSupported("x"), ExchangeRefused),
        (KeyError("x"), BadExchangeAnswer),
        (ConnectionResetError("x"), ExchangeUnavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_a_vendors_error_becomes_ours_by_its_type(
    client: Plain, vendor: FakeVendor, error: BaseException, kind: type[ExchangeError]
) -> None:
    vendor.error = error
    with pytest.raises(ExchangeError) as caught:
        await client.fetch_historical_data("BTC/USD", "1m", 0, MINUTE * 5)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error


async def test_an_error_that_means_nothing_here_passes_as_it_is(
    client: Plain, vendor: FakeVendor
) -> None:
    vendor.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        await client.fetch_historical_data("BTC/USD", "1m", 0, MINUTE * 5)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [[None] * 6],
        [[OPEN, 1.0, 1.0, 1.0, 1.0]],
        [[OPEN - 2 * MINUTE, 1.0, float("nan"), 1.0, 1.0, 1.0]],
        [row(2), row(3)],
        [row(2), row(2)],
    ],
    ids=["no list", "nothing inside", "too short", "nan", "descending", "twice"],
)
async def test_rows_that_cannot_be_believed_spoil_the_answer(
    client: Plain, vendor: FakeVendor, rows: Any
) -> None:
    vendor.rows = rows
    with pytest.raises(BadExchangeAnswer):
        await client.fetch_historical_data("BTC/USD", "1m", OPEN - 3 * MINUTE, OPEN - MINUTE)


async def test_a_stream_calls_back_with_what_ccxt_watched(
    client: Plain, vendor: FakeVendor
) -> None:
    got: asyncio.Queue[CandleUpdate] = asyncio.Queue()
    handle = await client.start_realtime_stream("BTC/USD", "1m", got.put)
    vendor.news.put_nowait([row(0, 101.0)])
    async with asyncio.timeout(5):
        update = await got.get()
    assert update == CandleUpdate(
        "example", "BTC/USD", "1m", Candle(OPEN, 100.0, 110.0, 90.0, 101.0, 1.5)
    )
    await handle.stop()
    await handle.wait()


async def test_a_stream_ends_with_our_error(client: Plain, vendor: FakeVendor) -> None:
    handle = await client.start_realtime_stream("BTC/USD", "1m", asyncio.Queue[CandleUpdate]().put)
    vendor.news.put_nowait(vendor_errors.NetworkError("gone"))
    with pytest.raises(ExchangeUnavailable, match="gone"):
        async with asyncio.timeout(5):
            await handle.wait()


async def test_a_watch_that_ccxt_cancels_is_a_lost_connection(
    client: Plain, vendor: FakeVendor
) -> None:
    handle = await client.start_realtime_stream("BTC/USD", "1m", asyncio.Queue[CandleUpdate]().put)
    vendor.news.put_nowait(asyncio.CancelledError())
    with pytest.raises(ExchangeUnavailable, match="connection closed"):
        async with asyncio.timeout(5):
            await handle.wait()


async def test_closing_closes_ccxt_once(client: Plain, vendor: FakeVendor) -> None:
    await client.close()
    await client.close()
    assert vendor.calls.count(("close",)) == 1


def test_settings_make_a_client() -> None:
    settings = Settings.model_validate(
        {
            "exchange_quotes": "EUR",
            "exchange_endpoints": {"crypto.com": "https://example.test"},
            "exchange_credentials": {"crypto.com": {"apiKey": "key", "secret": "hush"}},
        }
    )
    client = CryptocomExchange.from_settings(settings, MarketClock())
    assert client.vendor.apiKey == "key"
    assert client.vendor.urls["api"]["ws"]["public"].startswith("wss://example.test/")


def test_redirecting_reaches_nested_addresses_and_placeholders() -> None:
    urls = {
        "logo": "https://logo.example/x.png",
        "doc": ["https://docs.example/"],
        "api": {
            "rest": "https://{hostname}/api/v3",
            "ws": {"a": ["wss://stream.example:9443/ws", "no address"]},
        },
        "hostname": None,
    }
    assert redirect_urls(urls, "http://127.0.0.1:9400/ignored") == {
        "logo": "https://logo.example/x.png",
        "doc": ["https://docs.example/"],
        "api": {
            "rest": "http://127.0.0.1:9400/api/v3",
            "ws": {"a": ["ws://127.0.0.1:9400/ws", "no address"]},
        },
        "hostname": None,
    }


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 50.0),
        (
            {
                "retry-after": "Thu, 01 Jan 1970 00:01:00 GMT",
                "date": "Thu, 01 Jan 1970 00:00:58 GMT",
            },
            2.0,
        ),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert parse_retry_after(headers, real_ms=10_000) == seconds


@pytest.mark.parametrize("text", ["", "yesterday", "12"])
def test_what_is_no_http_date_is_none(text: str) -> None:
    assert parse_http_date(text) is None


async def test_requests_are_counted_by_priority_and_those_that_failed_again(
    client: Plain, vendor: FakeVendor
) -> None:
    vendor.rows = [row(2), row(1)]
    await client.fetch_historical_data("BTC/USD", "1m", OPEN - MINUTE, OPEN)
    before = client.request_totals.sent[Priority.BACKFILL]
    vendor.error = vendor_errors.NetworkError("cut")
    with pytest.raises(ExchangeUnavailable):
        await client.fetch_historical_data(
            "BTC/USD", "1m", OPEN - MINUTE, OPEN, priority=Priority.BACKFILL
        )
    totals = client.request_totals
    assert totals.sent[Priority.BACKFILL] == before + 1
    assert totals.sent[Priority.REQUEST] > 0
    assert totals.failed == {Priority.BACKFILL: 1}
    assert sum(totals.waited_s[Priority.BACKFILL].counts) == before + 1
