"""Crypto.com: real ccxt against a server on loopback whose every word the test decides."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from domain.candle import Candle, CandleUpdate
from domain.clock import http_date
from domain.interval import Interval
from domain.ticker import Ticker
from domain.time_range import TimeRange
from domain.trade import Trade
from errors import InvalidRequest
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
    Priority,
)
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins import ccxt_feeds
from exchange_source.plugins.cryptocom_exchange import CryptocomExchange, CryptocomGuards
from tests.contract.ccxt_plugin_contract import CcxtPluginContract
from tests.support.clock import ManualClock
from tests.unit.exchange_source.plugins.crypto_com_server import (
    Answer,
    CryptoComServer,
    ok,
    running_server,
    until,
)

MINUTE = 60_000
# The exchange's time in these tests: half a minute into a period.
NOW = 1_700_000_040_000 + 30_000
OPEN = NOW - 30_000
BTC = "BTC/USD"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
async def server(clock: ManualClock) -> AsyncIterator[CryptoComServer]:
    async with running_server(clock) as server:
        yield server


@pytest.fixture
async def exchange(server: CryptoComServer, clock: ManualClock) -> AsyncIterator[CryptocomExchange]:
    exchange = exchange_at(server.url, clock)
    yield exchange
    await exchange.close()


def exchange_at(url: str, clock: ManualClock, timeout_s: float = 5.0) -> CryptocomExchange:
    # The clock stands still, so the pace must not need it to move.
    limiter = RequestLimiter(clock, name="crypto.com", rate=1e9, concurrency=4, patience_s=5)
    return CryptocomExchange(
        clock=clock,
        quotes=("USD", "USDT"),
        endpoint=url,
        limiter=limiter,
        timeout_s=timeout_s,
    )


def candle(periods_ago: int, price: float = 100.0) -> Candle:
    """The candle of the running minute (0) or of one before it."""
    return Candle(OPEN - periods_ago * MINUTE, price, price + 1, price - 1, price, 2.0)


def minutes(first_ago: int, last_ago: int) -> list[Candle]:
    """The candles from one minute to a later one, both included."""
    return [candle(ago) for ago in range(first_ago, last_ago - 1, -1)]


def span(first_ago: int, end_ago: int) -> TimeRange:
    """From the open of one minute to the open of a later one."""
    return TimeRange(OPEN - first_ago * MINUTE, OPEN - end_ago * MINUTE)


async def history(
    exchange: IExchangeAPIClient, first_ago: int, end_ago: int, market: str = BTC
) -> HistoricalData:
    asked = span(first_ago, end_ago)
    async with asyncio.timeout(10):
        return await exchange.fetch_historical_data(market, "1m", asked.start, asked.end)


async def swallow(_: Sequence[Trade]) -> None:
    """A callback that wants no trades."""


async def ignore(_: CandleUpdate) -> None:
    """A callback that wants nothing."""


async def ended(handle: IStreamHandle) -> None:
    async with asyncio.timeout(5):
        await handle.wait()


def answering(response: Callable[[], web.Response], method: str = "get-candlestick") -> Answer:
    """Every answer to ``method`` is ``response``."""
    return lambda request: response() if request.path.endswith(method) else None


class TestOverTheSandbox(CcxtPluginContract):
    plugin = CryptocomExchange
    name = "crypto.com"
    exchange_id = "cryptocom"


class TestIdentity:
    def test_its_names(self, clock: ManualClock) -> None:
        exchange = CryptocomExchange(clock=clock)
        assert isinstance(exchange, IExchangeAPIClient)
        assert exchange.get_exchange_name() == "crypto.com"
        assert exchange.get_exchange_id() == "cryptocom"

    def test_its_intervals_and_its_page(self, clock: ManualClock) -> None:
        exchange = CryptocomExchange(clock=clock)
        assert {"1m", "5m", "15m", "30m", "1h", "4h", "1d"} <= set(exchange.intervals)
        assert "1w" not in exchange.intervals
        assert exchange.history_page == 298

    def test_an_endpoint_replaces_every_api_address_and_nothing_else(
        self, clock: ManualClock
    ) -> None:
        plain = CryptocomExchange(clock=clock).vendor.urls
        moved = CryptocomExchange(clock=clock, endpoint="http://127.0.0.1:9400").vendor.urls
        assert moved["api"]["v1"] == "http://127.0.0.1:9400/exchange/v1"
        assert moved["api"]["ws"]["public"] == "ws://127.0.0.1:9400/exchange/v1/market"
        assert "crypto.com" not in json.dumps(moved["api"])
        assert {key: moved[key] for key in ("logo", "www", "doc", "fees")} == {
            key: plain[key] for key in ("logo", "www", "doc", "fees")
        }

    def test_credentials_reach_the_signing_and_no_text(self, clock: ManualClock) -> None:
        exchange = CryptocomExchange(clock=clock, credentials={"apiKey": "k", "secret": "hush"})
        assert exchange.vendor.secret == "hush"
        assert "hush" not in repr(exchange)


class TestAvailability:
    async def test_quotes_go_in_the_order_of_the_settings(
        self, exchange: CryptocomExchange
    ) -> None:
        assert await exchange.check_coin_availability("btc") == "BTC/USD"
        assert await exchange.check_coin_availability("ETH") == "ETH/USDT"

    async def test_an_exact_symbol_means_itself(self, exchange: CryptocomExchange) -> None:
        assert await exchange.check_coin_availability("eth/usdt") == "ETH/USDT"
        assert await exchange.check_coin_availability("ETH/USD") is None

    async def test_a_coin_that_does_not_exist_is_not_available(
        self, exchange: CryptocomExchange
    ) -> None:
        assert await exchange.check_coin_availability("NOPE") is None

    async def test_inactive_markets_and_derivatives_do_not_count(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.instruments[0] |= {"tradable": False}
        server.instruments.append(
            server.instruments[1] | {"symbol": "XUSD-PERP", "inst_type": "PERPETUAL_SWAP"}
        )
        assert await exchange.check_coin_availability("BTC") is None

    async def test_markets_are_asked_for_once(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await asyncio.gather(*(exchange.check_coin_availability("BTC") for _ in range(5)))
        assert len(server.asked("get-instruments")) == 1

    async def test_one_caller_that_is_cancelled_does_not_take_the_others_along(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        callers = [asyncio.create_task(exchange.check_coin_availability("BTC")) for _ in range(3)]
        await asyncio.sleep(0)
        callers[0].cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == ["BTC/USD", "BTC/USD"]

    async def test_an_unknown_coin_is_asked_for_again_at_most_once_a_minute(
        self, exchange: CryptocomExchange, server: CryptoComServer, clock: ManualClock
    ) -> None:
        assert await exchange.check_coin_availability("NEW") is None
        server.instruments.append(server.instruments[0] | {"symbol": "NEW_USD", "base_ccy": "NEW"})
        assert await exchange.check_coin_availability("NEW") is None
        assert len(server.asked("get-instruments")) == 1
        await clock.advance(60_000)
        assert await exchange.check_coin_availability("NEW") == "NEW/USD"
        assert len(server.asked("get-instruments")) == 2

    async def test_an_old_list_serves_while_the_exchange_is_away(
        self, exchange: CryptocomExchange, server: CryptoComServer, clock: ManualClock
    ) -> None:
        await exchange.check_coin_availability("BTC")
        await clock.advance(2 * 3_600_000)
        server.answer = lambda _: web.Response(status=503)
        assert await exchange.check_coin_availability("BTC") == "BTC/USD"
        with pytest.raises(ExchangeUnavailable):
            await exchange.check_coin_availability("NOPE")

    async def test_a_refusal_makes_the_list_doubtful_and_soon_it_is_asked_for_again(
        self, exchange: CryptocomExchange, server: CryptoComServer, clock: ManualClock
    ) -> None:
        assert await exchange.check_coin_availability(BTC) == BTC
        del server.instruments[0]
        refusal = {"id": -1, "code": 30003, "message": "Unknown symbol: BTC_USD"}
        server.answer = answering(lambda: web.json_response(refusal, status=400))
        with pytest.raises(ExchangeRefused):
            await history(exchange, 2, 0)
        # Not at once: it may be refused again and again.
        assert await exchange.check_coin_availability(BTC) == BTC
        await clock.advance(5_000)
        assert await exchange.check_coin_availability(BTC) is None
        assert len(server.asked("get-instruments")) == 2

    @pytest.mark.parametrize(
        "instruments",
        [[], [{"instrument_name": "BTC_USD", "quote_currency": "USD", "base_currency": "BTC"}]],
        ids=["empty", "an older generation of the API"],
    )
    async def test_a_list_without_a_spot_market_is_not_believed(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        instruments: list[dict[str, str]],
    ) -> None:
        server.instruments = list(instruments)
        with pytest.raises(BadExchangeAnswer, match="no spot market"):
            await exchange.check_coin_availability("BTC")


class TestHistory:
    async def test_a_page_is_asked_precisely_and_with_context(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(400, 0))
        data = await history(exchange, 300, 2)
        assert data.candles == tuple(minutes(300, 3))
        assert data.exchange_time == NOW
        (query,) = server.asked("get-candlestick")
        assert query == {
            "instrument_name": "BTC_USD",
            "timeframe": "1m",
            "count": "300",
            "start_ts": str(OPEN - 301 * MINUTE - 1),
            "end_ts": str(OPEN - MINUTE - 1),
        }

    async def test_a_longer_range_is_paged_without_gap_or_repeat(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(1000, 0))
        data = await history(exchange, 900, 0)
        assert data.candles == tuple(minutes(900, 1))
        assert data.empty == ()
        assert len(server.asked("get-candlestick")) == 4

    async def test_an_exchange_that_gives_25_rows_where_300_were_meant_costs_requests_not_truth(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(400, 0))
        server.rows = 25
        data = await history(exchange, 200, 2)
        assert data.candles == tuple(minutes(200, 3))
        assert data.empty == ()
        assert data.not_offered is None

    async def test_the_running_candle_is_not_closed(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(5, 0))
        data = await history(exchange, 2, -1)
        assert data.candles == tuple(minutes(2, 1))

    async def test_a_candle_is_closed_when_a_later_row_is_there(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.clock = ManualClock(OPEN + 1_000)  # within the grace
        server.put(BTC, "1m", minutes(3, 0))
        assert (await history(exchange, 1, 0)).candles == (candle(1),)

    async def test_a_candle_without_a_later_row_is_closed_after_the_grace_alone(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(3, 1))
        server.clock = ManualClock(OPEN + 4_999)
        assert (await history(exchange, 1, 0)).candles == ()
        server.clock = ManualClock(OPEN + 5_000)
        assert (await history(exchange, 1, 0)).candles == (candle(1),)

    async def test_the_exchanges_own_time_decides_not_ours(self, server: CryptoComServer) -> None:
        server.put(BTC, "1m", minutes(3, 1))
        ahead = exchange_at(server.url, ManualClock(NOW + 3_600_000))
        server.clock = ManualClock(OPEN + 2_000)
        assert (await history(ahead, 1, 0)).candles == ()
        await ahead.close()

    async def test_without_a_date_our_clock_is_corrected_by_the_skew_measured_before(
        self, server: CryptoComServer
    ) -> None:
        ahead = exchange_at(server.url, ManualClock(NOW + 3_600_000))
        server.put(BTC, "1m", minutes(3, 1))
        await ahead.check_coin_availability("BTC")
        server.dated = False
        data = await history(ahead, 1, 0)
        assert data.exchange_time == NOW
        await ahead.close()

    async def test_a_hole_between_rows_is_empty(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", [*minutes(20, 11), *minutes(8, 0)])
        data = await history(exchange, 15, 5)
        assert data.empty == (span(10, 8),)
        assert data.candles == (*minutes(15, 11), *minutes(8, 6))

    async def test_a_hole_at_the_edge_of_a_page_is_asked_wider(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", [*minutes(50, 21), *minutes(9, 0)])
        data = await history(exchange, 18, 12)
        assert data.candles == ()
        assert data.empty == (span(18, 12),)

    async def test_a_hole_wider_than_a_page_is_proven_too(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", [*minutes(3000, 2001), *minutes(100, 0)])
        data = await history(exchange, 1500, 1400)
        assert data.empty == (span(1500, 1400),)

    async def test_nothing_newer_is_open_not_empty(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(20, 6))
        data = await history(exchange, 8, 2)
        assert data.candles == tuple(minutes(8, 6))
        assert data.empty == ()
        assert data.not_offered is None

    async def test_a_hole_younger_than_the_grace_is_open(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", [*minutes(20, 2), candle(0)])
        server.clock = ManualClock(OPEN + 1_000)
        assert (await history(exchange, 3, 0)).empty == ()
        server.clock = ManualClock(OPEN + 6_000)
        assert (await history(exchange, 3, 0)).empty == (span(1, 0),)

    async def test_what_is_older_than_the_oldest_row_is_not_offered(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(1000, 0))
        data = await history(exchange, 2000, 990)
        assert data.not_offered == span(2000, 1000)
        assert data.candles == tuple(minutes(1000, 991))

    async def test_a_range_long_before_the_oldest_row_is_not_offered(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(1000, 0))
        data = await history(exchange, 200_000, 199_900)
        assert data.not_offered == span(200_000, 1000)

    async def test_a_market_without_any_row_is_open(self, exchange: CryptocomExchange) -> None:
        data = await history(exchange, 10, 5)
        assert data == HistoricalData(candles=(), exchange_time=NOW)

    async def test_rows_that_one_answer_leaves_out_are_a_claim_of_that_answer(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.put(BTC, "1m", minutes(20, 0))
        whole = dict(server.candles["BTC_USD", "1m"])
        del server.candles["BTC_USD", "1m"][OPEN - 7 * MINUTE]
        assert (await history(exchange, 10, 5)).empty == (span(7, 6),)
        server.candles["BTC_USD", "1m"] = whole
        assert (await history(exchange, 10, 5)).empty == ()

    async def test_a_market_of_no_spot_list_is_refused(self, exchange: CryptocomExchange) -> None:
        with pytest.raises(ExchangeRefused, match="NOPE/USD"):
            await history(exchange, 10, 5, market="NOPE/USD")

    @pytest.mark.parametrize(
        ("interval", "start", "end"),
        [("7m", 0, MINUTE), ("1w", 0, MINUTE), ("1m", 5, 5), ("1m", 10, 5), ("1m", -5, 5)],
    )
    async def test_what_cannot_be_asked_is_an_invalid_request(
        self, exchange: CryptocomExchange, interval: str, start: int, end: int
    ) -> None:
        with pytest.raises(InvalidRequest):
            await exchange.fetch_historical_data(BTC, interval, start, end)

    @pytest.mark.parametrize(
        "changes",
        [
            {"c": None},
            {"h": "1"},
            {"l": "0"},
            {"v": "-1"},
            {"t": OPEN - 4 * MINUTE + 1},
            {"t": OPEN - 5 * MINUTE},
            {"t": OPEN - 500 * MINUTE},
            {"t": None},
        ],
        ids=["none", "high", "zero", "negative", "unaligned", "twice", "not asked", "no time"],
    )
    async def test_one_row_that_is_wrong_spoils_the_answer(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        changes: dict[str, object],
    ) -> None:
        good = {"o": "100", "h": "101", "l": "99", "c": "100", "v": "1"}
        rows: list[dict[str, Any]] = [good | {"t": OPEN - ago * MINUTE} for ago in (5, 4, 3)]
        rows[1] |= changes
        server.answer = answering(lambda: ok({"data": rows}))
        with pytest.raises(BadExchangeAnswer):
            await history(exchange, 5, 3)


class TestErrors:
    @pytest.mark.parametrize(
        ("response", "kind"),
        [
            (web.Response, BadExchangeAnswer),
            (lambda: web.Response(text="<html>hello</html>", content_type="text/html"),
             BadExchangeAnswer),
            (lambda: web.Response(text='{"code": 0, "result": {"da'), BadExchangeAnswer),
            (lambda: web.json_response({"code": 0}), BadExchangeAnswer),
            (lambda: web.json_response({"code": 0, "result": {}}), BadExchangeAnswer),
            (lambda: web.json_response({"code": 0, "result": {"data": [1, 2]}}), BadExchangeAnswer),
            (lambda: web.json_response([]), BadExchangeAnswer),
            (lambda: web.Response(status=404, text="<html>"), BadExchangeAnswer),
            (lambda: web.Response(status=403, text="<html>"), ExchangeUnavailable),
            (lambda: web.Response(status=500, text="<html>"), ExchangeUnavailable),
            (lambda: web.Response(status=503), ExchangeUnavailable),
            (lambda: web.Response(status=429, text="<html>"), ExchangeRateLimited),
            (lambda: web.Response(status=418), ExchangeRateLimited),
            (lambda: web.json_response({"code": 42901}, status=200), ExchangeRateLimited),
            (lambda: web.json_response({"code": 10006}, status=200), ExchangeRateLimited),
            (lambda: web.json_response({"code": 10001}, status=200), ExchangeUnavailable),
            (lambda: web.json_response({"code": 9010001}, status=200), ExchangeUnavailable),
            (lambda: web.json_response({"code": 30003}, status=400), ExchangeRefused),
            (lambda: web.json_response({"code": 40004}, status=400), ExchangeRefused),
            (lambda: web.json_response({"code": 40101}, status=401), ExchangeRefused),
        ],
    )  # fmt: skip
    async def test_each_answer_that_is_none_becomes_the_error_that_it_means(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        response: Callable[[], web.Response],
        kind: type[ExchangeError],
    ) -> None:
        server.answer = answering(response)
        with pytest.raises(ExchangeError) as caught:
            await history(exchange, 10, 5)
        assert type(caught.value) is kind

    async def test_a_body_that_breaks_off_is_not_believed(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        def half() -> web.Response:
            response = web.Response(text='{"code": 0, "result": {"data": [')
            response.headers["Content-Length"] = "1000"
            response.force_close()
            return response

        server.answer = answering(half)
        with pytest.raises(BadExchangeAnswer):
            await history(exchange, 10, 5)

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [("3", 3.0), ("0.5", 0.5), (http_date(NOW // 1000 * 1000 + 4_000), 4.0), ("soon", None)],
    )
    async def test_the_delay_that_the_exchange_names_comes_with_the_error_and_pauses_everybody(
        self,
        server: CryptoComServer,
        clock: ManualClock,
        header: str,
        seconds: float | None,
    ) -> None:
        exchange = exchange_at(server.url, clock)
        await exchange.check_coin_availability("BTC")
        server.answer = lambda _: web.Response(status=429, headers={"Retry-After": header})
        with pytest.raises(ExchangeRateLimited) as caught:
            await history(exchange, 10, 5)
        assert caught.value.retry_after == seconds
        server.answer = None
        asked = len(server.requests)
        waiting = asyncio.create_task(history(exchange, 10, 5))
        pause = round((2.0 if seconds is None else seconds) * 1000)
        await clock.advance(pause - 1)
        assert len(server.requests) == asked
        await clock.advance(1)
        await waiting
        await exchange.close()

    async def test_a_delay_belongs_to_the_call_that_got_it(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await exchange.check_coin_availability("BTC")

        def answer(request: web.Request) -> web.Response | None:
            if request.query.get("timeframe") == "1m":
                return web.Response(status=503, headers={"Retry-After": "7"})
            if request.query.get("timeframe") == "5m":
                return web.Response(status=500)
            return None

        server.answer = answer
        asked = span(10, 5)
        results = await asyncio.gather(
            *(
                exchange.fetch_historical_data(BTC, interval, asked.start, asked.end)
                for interval in ("1m", "5m")
            ),
            return_exceptions=True,
        )
        delays = [r.retry_after for r in results if isinstance(r, ExchangeUnavailable)]
        assert delays == [7.0, None]

    async def test_each_of_two_calls_at_once_keeps_its_own_date(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await exchange.check_coin_availability("BTC")
        dates = {"1m": NOW, "5m": NOW - 60_000}
        both = asyncio.Barrier(2)

        async def dated(interval: str) -> web.StreamResponse:
            await both.wait()
            server.clock = ManualClock(dates[interval])
            return ok({"data": []})

        server.answer = lambda request: dated(request.query["timeframe"])
        asked = span(10, 0)
        async with asyncio.timeout(5):
            calls = [
                exchange._request(
                    Priority.LIVE,
                    partial(
                        exchange.vendor.fetch_ohlcv,
                        BTC,
                        interval,
                        None,
                        1,
                        {"start_ts": asked.start, "end_ts": asked.end},
                    ),
                )
                for interval in dates
            ]
            answers = await asyncio.gather(*calls)
        assert [time for _, time in answers] == list(dates.values())

    async def test_an_answer_that_does_not_come_is_given_up(
        self, server: CryptoComServer, clock: ManualClock
    ) -> None:
        exchange = exchange_at(server.url, clock, timeout_s=0.2)
        hang = asyncio.Event()
        await exchange.check_coin_availability("BTC")

        async def never() -> web.StreamResponse:
            await hang.wait()
            return web.Response()

        server.answer = lambda _: never()
        with pytest.raises(ExchangeUnavailable):
            await exchange.fetch_order_book(BTC)
        hang.set()
        await exchange.close()

    async def test_an_exchange_that_is_away_is_unavailable(self, clock: ManualClock) -> None:
        async with running_server(clock) as server:
            url = server.url
        exchange = exchange_at(url, clock)
        with pytest.raises(ExchangeUnavailable):
            await exchange.check_coin_availability("BTC")
        await exchange.close()

    async def test_a_request_whose_connection_is_cut_is_sent_once(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await exchange.check_coin_availability("BTC")

        def cut(request: web.Request) -> web.Response:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        server.answer = cut
        with pytest.raises(ExchangeUnavailable):
            await exchange.fetch_order_book(BTC)
        assert len(server.asked("get-book")) == 1


class TestOrderBookByRest:
    async def test_its_top_with_the_exchanges_time(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.book = {
            "bids": [["99", "1", "1"], ["98", "0", "0"], ["97", "3", "1"]],
            "asks": [["101", "2", "1"]],
            "t": NOW - 40,
        }
        book = await exchange.fetch_order_book(BTC, priority=Priority.LIVE)
        assert book.timestamp == NOW - 40
        assert book.bids == ((99.0, 1.0), (97.0, 3.0))
        assert book.asks == ((101.0, 2.0),)

    @pytest.mark.parametrize(
        "book",
        [
            {"bids": [["102", "1", "1"]], "asks": [["101", "2", "1"]], "t": 1},
            {"bids": [["99", "1", "1"]], "asks": [["101", "2", "1"]]},
            {"bids": [["x", "1", "1"]], "asks": [], "t": 1},
        ],
        ids=["crossed", "without a time", "no number"],
    )
    async def test_an_impossible_book_is_not_believed(
        self, exchange: CryptocomExchange, server: CryptoComServer, book: dict[str, object]
    ) -> None:
        server.book = book
        with pytest.raises(BadExchangeAnswer):
            await exchange.fetch_order_book(BTC)


class Live:
    """A running candle stream and what it told."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[CandleUpdate] = asyncio.Queue()
        self.handle: IStreamHandle

    async def start(
        self, exchange: CryptocomExchange, server: CryptoComServer, *, interval: str = "1m"
    ) -> Live:
        self.handle = await exchange.start_realtime_stream(BTC, interval, self.updates.put)
        await server.received("subscribe")
        return self

    async def next(self) -> Candle:
        async with asyncio.timeout(5):
            return (await self.updates.get()).candle

    async def hears(self, server: CryptoComServer, interval: str) -> bool:
        """Whether the next candle that it is told is the one that the server sends now."""
        sent = replace(candle(0), timestamp=Interval.parse(interval).floor(OPEN))
        await server.send_candles(BTC, interval, sent)
        return await self.next() == sent


class TestCandleStream:
    async def test_updates_arrive_in_order_as_values(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        for price in (100.0, 101.0, 102.0):
            await server.send_candles(BTC, "1m", candle(0, price))
            assert await live.next() == candle(0, price)
        await live.handle.stop()

    async def test_an_update_does_not_change_after_it_was_told(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", candle(0, 100.0))
        first = await live.next()
        await server.send_candles(BTC, "1m", candle(0, 200.0))
        await live.next()
        assert first == candle(0, 100.0)

    async def test_a_first_message_full_of_history_tells_only_its_newest(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", *minutes(50, 0))
        assert [await live.next(), await live.next()] == minutes(1, 0)
        assert live.updates.empty()

    async def test_what_came_while_the_callback_ran_is_told_without_waiting_for_more(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        told: asyncio.Queue[Candle] = asyncio.Queue()
        go_on = asyncio.Event()

        async def slow(update: CandleUpdate) -> None:
            told.put_nowait(update.candle)
            await go_on.wait()

        await exchange.start_realtime_stream(BTC, "1m", slow)
        await server.received("subscribe")
        await server.send_candles(BTC, "1m", candle(0, 100.0))
        async with asyncio.timeout(5):
            assert await told.get() == candle(0, 100.0)
            await server.send_candles(BTC, "1m", candle(0, 101.0))
            rows = exchange.vendor.ohlcvs[BTC]["1m"]
            await until(lambda: bool(rows[-1][4] == 101.0))
            go_on.set()
            assert await told.get() == candle(0, 101.0)

    async def test_two_streams_of_one_topic_both_get_everything(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        first = await Live().start(exchange, server)
        second = Live()
        second.handle = await exchange.start_realtime_stream(BTC, "1m", second.updates.put)
        await server.send_candles(BTC, "1m", candle(0))
        assert await first.next() == await second.next() == candle(0)
        await first.handle.stop()
        await server.send_candles(BTC, "1m", candle(0, 150.0))
        assert await second.next() == candle(0, 150.0)
        assert first.updates.empty()

    async def test_stopping_unsubscribes_and_a_later_start_subscribes_again(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        await live.handle.stop()
        await live.handle.stop()
        await ended(live.handle)
        message = await server.received("unsubscribe")
        assert message["params"]["channels"] == ["candlestick.1m.BTC_USD"]
        again = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", candle(0))
        assert await again.next() == candle(0)
        assert server.connections == 1

    async def test_a_socket_that_is_full_is_followed_by_another(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(CryptocomGuards, "most_subscriptions", 2)
        lives = {
            interval: await Live().start(exchange, server, interval=interval)
            for interval in ("1m", "5m", "15m")
        }
        first, second = (
            {f"candlestick.{name}.BTC_USD" for name in ("1m", "5m")},
            {"candlestick.15m.BTC_USD"},
        )
        assert server.channels == [first, second]
        for interval, live in lives.items():
            assert await live.hears(server, interval)

        # What is stopped is unsubscribed where it was subscribed, and its place is taken again.
        await lives.pop("5m").handle.stop()
        await until(lambda: server.channels[0] == {"candlestick.1m.BTC_USD"})
        await Live().start(exchange, server, interval="30m")
        assert server.channels == [
            {"candlestick.1m.BTC_USD", "candlestick.30m.BTC_USD"},
            second,
        ]

    async def test_a_socket_that_is_lost_costs_only_what_it_carried(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(CryptocomGuards, "most_subscriptions", 1)
        lost = await Live().start(exchange, server)
        kept = await Live().start(exchange, server, interval="5m")
        await server.sockets[0].close()
        with pytest.raises(ExchangeUnavailable):
            await ended(lost.handle)
        assert await kept.hears(server, "5m")

    async def test_a_socket_that_is_mute_beside_others_is_broken_when_it_confirms_nothing(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(CryptocomGuards, "most_subscriptions", 2)
        monkeypatch.setattr(ccxt_feeds, "_UNSUBSCRIBE_TIMEOUT_S", 0.05)
        kept = [await Live().start(exchange, server, interval=name) for name in ("1m", "5m")]
        stopped = await Live().start(exchange, server, interval="15m")
        mute = await Live().start(exchange, server, interval="30m")
        assert await mute.hears(server, "30m")
        server.acknowledge = False
        await stopped.handle.stop()
        with pytest.raises(ExchangeUnavailable, match="a connection is mute"):
            await ended(mute.handle)
        assert await kept[0].hears(server, "1m")

    async def test_a_stream_may_be_stopped_from_its_own_callback(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handles: list[IStreamHandle] = []

        told: list[CandleUpdate] = []

        async def stop(update: CandleUpdate) -> None:
            told.append(update)
            await handles[0].stop()

        handles.append(await exchange.start_realtime_stream(BTC, "1m", stop))
        await server.received("subscribe")
        await server.send_candles(BTC, "1m", candle(0))
        await ended(handles[0])
        assert [update.candle for update in told] == [candle(0)]

    async def test_a_callback_that_fails_ends_its_stream_with_its_error(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        async def fail(_: CandleUpdate) -> None:
            raise LookupError("mine")

        handle = await exchange.start_realtime_stream(BTC, "1m", fail)
        await server.received("subscribe")
        await server.send_candles(BTC, "1m", candle(0))
        with pytest.raises(LookupError, match="mine"):
            await ended(handle)

    async def test_a_row_that_is_no_candle_ends_the_stream(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        bad = replace(candle(0), timestamp=OPEN + 1)
        await server.send_candles(BTC, "1m", bad)
        with pytest.raises(BadExchangeAnswer):
            await ended(live.handle)

    @pytest.mark.parametrize(
        "frame",
        [
            '{"method": "subs',
            "hello",
            '{"method": "subscribe", "code": 0, "result": {"channel": "book", "data": []}}',
        ],
        ids=["half a document", "no document", "a handler stumbles"],
    )
    async def test_a_broken_frame_ends_every_stream_at_once_and_the_next_start_reconnects(
        self, exchange: CryptocomExchange, server: CryptoComServer, frame: str
    ) -> None:
        live = await Live().start(exchange, server)
        book = await exchange.start_order_book_stream(BTC)
        await server.received("subscribe")
        await server.send(frame)
        for handle in (live.handle, book):
            with pytest.raises(BadExchangeAnswer):
                await ended(handle)
        again = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", candle(0))
        assert await again.next() == candle(0)
        assert server.connections == 2

    async def test_what_a_market_sends_that_cannot_be_read_ends_its_stream_alone(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        other = await exchange.start_realtime_stream(BTC, "5m", live.updates.put)
        book = await exchange.start_order_book_stream(BTC)
        for _ in range(2):
            await server.received("subscribe")
        await server.send_result({"channel": "book", "subscription": "book.BTC_USD.50", "data": []})
        with pytest.raises(BadExchangeAnswer, match=r"broken frame of orderbook:BTC/USD"):
            await ended(book)
        await server.send_result(
            {
                "instrument_name": "BTC_USD",
                "channel": "candlestick",
                "subscription": "candlestick.5m.BTC_USD",
                "interval": "5m",
                "data": [7],
            }
        )
        with pytest.raises(BadExchangeAnswer, match="no candle"):
            await ended(other)
        await server.send_candles(BTC, "1m", candle(0))
        assert await live.next() == candle(0)
        again = await exchange.start_order_book_stream(BTC)
        assert (await server.received("subscribe"))["params"]["channels"] == ["book.BTC_USD.50"]
        await again.stop()
        assert server.connections == 1

    async def test_a_lost_connection_ends_the_stream(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        await server.sockets[0].close()
        with pytest.raises(ExchangeUnavailable):
            await ended(live.handle)
        again = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", candle(0))
        assert await again.next() == candle(0)

    async def test_a_mute_socket_is_left_by_resetting_the_connections(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        server.acknowledge = False
        live = await Live().start(exchange, server)
        book = await exchange.start_order_book_stream(BTC)
        await server.received("subscribe")
        await exchange.reset_connections()
        for handle in (live.handle, book):
            with pytest.raises(ExchangeUnavailable, match="reset"):
                await ended(handle)
        again = await Live().start(exchange, server)
        await server.send_candles(BTC, "1m", candle(0))
        assert await again.next() == candle(0)
        assert server.connections == 2

    async def test_a_subscription_that_is_refused_ends_its_stream_alone(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        server.refuse = {"candlestick.5m.BTC_USD": 40003, "book.BTC_USD.50": 30003}
        refused = await exchange.start_realtime_stream(BTC, "5m", live.updates.put)
        book = await exchange.start_order_book_stream(BTC)
        for handle in (refused, book):
            with pytest.raises(ExchangeRefused, match="Unknown symbol"):
                await ended(handle)
        await server.send_candles(BTC, "1m", candle(0))
        assert await live.next() == candle(0)
        sent = [server.messages.get_nowait()["method"] for _ in range(server.messages.qsize())]
        assert sent == ["subscribe", "subscribe"]  # nothing to unsubscribe from

    async def test_a_refusal_that_names_no_channel_ends_every_stream_of_the_socket(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        live = await Live().start(exchange, server)
        await server.send('{"id": -1, "method": "subscribe", "code": 50001, "message": "oops"}')
        with pytest.raises(ExchangeUnavailable, match="oops"):
            await ended(live.handle)

    async def test_a_heartbeat_is_answered(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await Live().start(exchange, server)
        await server.send('{"id": 77, "method": "public/heartbeat", "code": 0}')
        assert (await server.received("public/respond-heartbeat"))["id"] == 77

    async def test_an_unknown_market_ends_the_stream_as_refused(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await exchange.start_realtime_stream("NOPE/USD", "1m", ignore)
        with pytest.raises(ExchangeRefused):
            await ended(handle)

    async def test_an_interval_that_is_not_offered_is_an_invalid_request(
        self, exchange: CryptocomExchange
    ) -> None:
        with pytest.raises(InvalidRequest):
            await exchange.start_realtime_stream(BTC, "7m", ignore)

    async def test_an_exchange_that_is_away_ends_the_stream(self, clock: ManualClock) -> None:
        async with running_server(clock) as server:
            exchange = exchange_at(server.url, clock)
            await exchange.check_coin_availability("BTC")
        handle = await exchange.start_realtime_stream(BTC, "1m", ignore)
        with pytest.raises(ExchangeUnavailable):
            await ended(handle)
        await exchange.close()


def raw_trade(number: int, *, side: str = "BUY", price: str = "100.5") -> dict[str, str | int]:
    return {"d": str(number), "s": side, "p": price, "q": "0.25", "t": NOW + number, "i": "BTC_USD"}


async def send_trades(server: CryptoComServer, *trades: dict[str, str | int]) -> None:
    await server.send_result(
        {
            "instrument_name": "BTC_USD",
            "subscription": "trade.BTC_USD",
            "channel": "trade",
            "data": list(trades),
        }
    )


class TestTradeStream:
    @pytest.fixture
    async def told(self) -> asyncio.Queue[Sequence[Trade]]:
        return asyncio.Queue()

    async def test_trades_arrive_as_values_in_order(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        told: asyncio.Queue[Sequence[Trade]],
    ) -> None:
        await exchange.start_trade_stream(BTC, told.put)
        assert (await server.received("subscribe"))["params"]["channels"] == ["trade.BTC_USD"]
        await send_trades(server, raw_trade(1), raw_trade(2, side="SELL", price="99"))
        async with asyncio.timeout(5):
            trades = await told.get()
        assert sorted(trades, key=lambda trade: trade.timestamp) == [
            Trade("1", NOW + 1, 100.5, 0.25, "buy"),
            Trade("2", NOW + 2, 99.0, 0.25, "sell"),
        ]

    async def test_a_burst_beyond_what_ccxt_keeps_is_told_whole_and_once(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        told: asyncio.Queue[Sequence[Trade]],
    ) -> None:
        handle = await exchange.start_trade_stream(BTC, told.put)
        await server.received("subscribe")
        for first in range(0, 5_000, 100):
            await send_trades(server, *map(raw_trade, range(first, first + 100)))
        got: list[str] = []
        async with asyncio.timeout(10):
            while len(got) < 5_000:
                got += [trade.id for trade in await told.get()]
        assert sorted(got, key=int) == [str(number) for number in range(5_000)]
        await handle.stop()

    @pytest.mark.parametrize(
        "broken", [{"p": "0"}, {"q": None}, {"d": None}, {"s": "HOLD"}, {"t": None}]
    )
    async def test_a_trade_that_cannot_be_ends_its_stream_alone(
        self, exchange: CryptocomExchange, server: CryptoComServer, broken: dict[str, Any]
    ) -> None:
        live = await Live().start(exchange, server)
        handle = await exchange.start_trade_stream(BTC, swallow)
        await server.received("subscribe")
        await send_trades(server, raw_trade(1) | broken)
        with pytest.raises(BadExchangeAnswer):
            await ended(handle)
        await server.send_candles(BTC, "1m", candle(0))
        assert await live.next() == candle(0)

    async def test_after_stopping_a_new_stream_begins_with_its_own_trades(
        self,
        exchange: CryptocomExchange,
        server: CryptoComServer,
        told: asyncio.Queue[Sequence[Trade]],
    ) -> None:
        first = await exchange.start_trade_stream(BTC, told.put)
        await server.received("subscribe")
        await send_trades(server, raw_trade(1))
        async with asyncio.timeout(5):
            await told.get()
            await first.stop()
            await server.received("unsubscribe")
            await exchange.start_trade_stream(BTC, told.put)
            await server.received("subscribe")
            await send_trades(server, raw_trade(2))
            assert [trade.id for trade in await told.get()] == ["2"]


class TestTickerStream:
    async def test_the_ticker_arrives_as_a_value(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        told: asyncio.Queue[Ticker] = asyncio.Queue()
        await exchange.start_ticker_stream(BTC, told.put)
        assert (await server.received("subscribe"))["params"]["channels"] == ["ticker.BTC_USD"]
        day = {"h": "110", "l": "90", "a": "100", "c": "0.25", "v": "12.5", "vv": "1250"}
        await send_ticker(server, day | {"b": "99.5", "bs": "1", "k": "100.5", "ks": "2", "t": NOW})
        async with asyncio.timeout(5):
            ticker = await told.get()
        assert ticker == Ticker(
            NOW,
            last=100.0,
            bid=99.5,
            ask=100.5,
            high=110.0,
            low=90.0,
            base_volume=12.5,
            change_percent=25.0,
        )

    async def test_what_a_quiet_market_does_not_tell_is_none(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        told: asyncio.Queue[Ticker] = asyncio.Queue()
        await exchange.start_ticker_stream(BTC, told.put)
        await server.received("subscribe")
        await send_ticker(server, {"a": None, "b": "99.5", "k": "100.5", "v": "0", "t": NOW})
        async with asyncio.timeout(5):
            assert await told.get() == Ticker(NOW, bid=99.5, ask=100.5, base_volume=0.0)


async def send_ticker(server: CryptoComServer, data: dict[str, Any]) -> None:
    await server.send_result(
        {
            "instrument_name": "BTC_USD",
            "subscription": "ticker.BTC_USD",
            "channel": "ticker",
            "data": [{"i": "BTC_USD", **data}],
        }
    )


class TestOrderBookStream:
    async def start(self, exchange: CryptocomExchange, server: CryptoComServer) -> IOrderBookHandle:
        handle = await exchange.start_order_book_stream(BTC)
        await server.received("subscribe")
        return handle

    async def settled(self, handle: IOrderBookHandle, timestamp: int) -> None:
        await until(lambda: (book := handle.snapshot()) is not None and book.timestamp == timestamp)

    async def test_no_book_before_the_first_message(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        assert (await self.start(exchange, server)).snapshot() is None

    async def test_the_book_is_copied_with_the_time_of_its_newest_update(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["99", "1", "1"], ["98", "5", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        await self.settled(handle, NOW)
        before = handle.snapshot(1)
        changes = {"bids": [["99", "0", "0"]], "asks": [["100.5", "4", "1"]]}
        await server.send_book("book.update", {"update": changes, "t": NOW + 50, "u": 2, "pu": 1})
        await self.settled(handle, NOW + 50)
        assert before is not None
        assert before.bids == ((99.0, 1.0),)
        after = handle.snapshot()
        assert after is not None
        assert after.bids == ((98.0, 5.0),)
        assert after.asks == ((100.5, 4.0), (101.0, 2.0))

    async def test_ccxt_writes_into_no_default_of_its_own(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        await self.start(exchange, server)
        params = inspect.signature(exchange.vendor.watch_order_book).parameters["params"]
        assert params.default == {}

    async def test_levels_of_no_amount_never_appear(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["99", "0", "1"], ["98", "5", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        await self.settled(handle, NOW)
        book = handle.snapshot()
        assert book is not None
        assert book.bids == ((98.0, 5.0),)

    async def test_a_crossed_book_ends_the_stream_and_gives_none(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["102", "1", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        with pytest.raises(BadExchangeAnswer, match="crosses"):
            await ended(handle)
        assert handle.snapshot() is None

    async def test_a_book_found_crossed_below_its_top_ends_the_stream_when_it_is_read(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["99", "1", "1"], ["98", "1", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        await self.settled(handle, NOW)
        exchange.vendor.orderbooks[BTC]["bids"][1][0] = 99.5
        assert handle.snapshot() is None
        with pytest.raises(BadExchangeAnswer, match="not sorted"):
            await ended(handle)

    async def test_an_update_that_was_lost_ends_the_stream(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["99", "1", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        await self.settled(handle, NOW)
        await server.send_book(
            "book.update", {"update": {"bids": [], "asks": []}, "t": NOW + 1, "u": 9, "pu": 8}
        )
        with pytest.raises(BadExchangeAnswer):
            await ended(handle)
        assert handle.snapshot() is None

    async def test_who_keeps_a_book_is_told_of_each_change_and_of_its_end(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        seen: asyncio.Queue[int | None] = asyncio.Queue()

        def note() -> None:
            book = handle.snapshot()
            seen.put_nowait(None if book is None else book.timestamp)

        handle = await exchange.start_order_book_stream(BTC, on_change=note)
        await server.received("subscribe")
        levels = {"bids": [["99", "1", "1"]], "asks": [["101", "2", "1"]]}
        async with asyncio.timeout(5):
            await server.send_book("book", levels | {"t": NOW, "u": 1})
            assert await seen.get() == NOW
            await exchange.reset_connections()
            assert await seen.get() is None

    async def test_a_book_that_ended_starts_anew(
        self, exchange: CryptocomExchange, server: CryptoComServer
    ) -> None:
        handle = await self.start(exchange, server)
        levels = {"bids": [["102", "1", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW, "u": 1})
        with pytest.raises(BadExchangeAnswer):
            await ended(handle)
        again = await self.start(exchange, server)
        levels = {"bids": [["99", "1", "1"]], "asks": [["101", "2", "1"]]}
        await server.send_book("book", levels | {"t": NOW + 5, "u": 2})
        await self.settled(again, NOW + 5)


class TestClosing:
    async def test_closing_ends_every_stream_leaves_no_task_and_gates_what_follows(
        self, server: CryptoComServer, clock: ManualClock
    ) -> None:
        exchange = exchange_at(server.url, clock)
        before = asyncio.all_tasks()
        live = await Live().start(exchange, server)
        book = await exchange.start_order_book_stream(BTC)
        await server.received("subscribe")
        await exchange.close()
        await exchange.close()
        await ended(live.handle)
        await ended(book)
        await server.sockets[0].close()
        async with asyncio.timeout(5):
            while left := {t for t in asyncio.all_tasks() - before if "aiohttp" not in repr(t)}:
                await asyncio.wait(left)
        for call in (
            lambda: exchange.check_coin_availability("BTC"),
            lambda: exchange.fetch_order_book(BTC),
            lambda: exchange.fetch_historical_data(BTC, "1m", 0, MINUTE),
            lambda: exchange.start_realtime_stream(BTC, "1m", live.updates.put),
            lambda: exchange.start_order_book_stream(BTC),
        ):
            with pytest.raises(ExchangeUnavailable, match="closed"):
                await call()
        assert exchange.vendor.session is None

    async def test_closing_while_a_request_runs_fails_it_as_unavailable(
        self, server: CryptoComServer, clock: ManualClock
    ) -> None:
        exchange = exchange_at(server.url, clock)
        await exchange.check_coin_availability("BTC")
        entered, hang = asyncio.Event(), asyncio.Event()

        async def slow() -> web.StreamResponse:
            entered.set()
            await hang.wait()
            return web.Response()

        server.answer = lambda _: slow()
        running = asyncio.create_task(exchange.fetch_order_book(BTC))
        async with asyncio.timeout(5):
            await entered.wait()
            await exchange.close()
            hang.set()
            with pytest.raises(ExchangeUnavailable):
                await running

    async def test_closing_a_client_that_never_connected(self, clock: ManualClock) -> None:
        exchange = CryptocomExchange(clock=clock)
        await exchange.close()
        with pytest.raises(ExchangeUnavailable, match="closed"):
            await exchange.check_coin_availability("BTC")
