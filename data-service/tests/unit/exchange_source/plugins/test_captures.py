"""What exchanges really sent, through real ccxt: values, and books equal to our own rebuild."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import pytest

from domain.candle import CandleUpdate
from domain.clock import MarketClock
from domain.order_book import BOOK_DEPTH, OrderBook
from domain.ticker import Ticker
from domain.trade import Trade
from exchange_source.interfaces import ExchangeUnavailable, IOrderBookHandle
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.binance_exchange import BinanceExchange
from exchange_source.plugins.coinbase_exchange import CoinbaseExchange
from tests.contract.ccxt_plugin_contract import ended
from tests.support.captures import (
    DAY,
    BinanceCapture,
    BinanceReplay,
    CoinbaseCapture,
    CoinbaseReplay,
    as_single_stream,
    binance_capture,
    coinbase_capture,
    playing,
)

IS_CAPTURED = bool(os.environ.get("CB_TRADE_SAMPLE_DATA"))
Levels = dict[float, float]
Top = tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]


def top(bids: Levels, asks: Levels) -> Top:
    """The best levels of a book that is kept as two dictionaries."""
    return (
        tuple(sorted(bids.items(), reverse=True)[:BOOK_DEPTH]),
        tuple(sorted(asks.items())[:BOOK_DEPTH]),
    )


def change(side: Levels, levels: Iterable[Sequence[str]]) -> None:
    for price, amount in levels:
        if float(amount):
            side[float(price)] = float(amount)
        else:
            side.pop(float(price), None)


def rebuilt_binance(capture: BinanceCapture, name: str) -> Top:
    """By the exchange's own recipe: a snapshot, and the updates that end after it."""
    snapshot = capture.snapshots[name]
    bids: Levels = {}
    asks: Levels = {}
    change(bids, snapshot["bids"])
    change(asks, snapshot["asks"])
    for message in capture.messages:
        if message.get("e") != "depthUpdate" or message["s"] != name:
            continue
        if message["u"] > snapshot["lastUpdateId"]:
            change(bids, message["b"])
            change(asks, message["a"])
    return top(bids, asks)


def rebuilt_coinbase(capture: CoinbaseCapture, product: str) -> Top:
    """As the Exchange protocol has it: a snapshot, and every change after it."""
    bids: Levels = {}
    asks: Levels = {}
    for message in capture.messages:
        if message["product_id"] != product:
            continue
        if message["type"] == "snapshot":
            bids, asks = {}, {}
            change(bids, message["bids"])
            change(asks, message["asks"])
        elif message["type"] == "l2update":
            for side, *level in message["changes"]:
                change(bids if side == "buy" else asks, [level])
    return top(bids, asks)


def of(book: OrderBook | None) -> Top | None:
    return None if book is None else (book.bids, book.asks)


class Told:
    """What streams told, by market."""

    def __init__(self) -> None:
        self.books: dict[str, IOrderBookHandle] = {}
        self.trades: dict[str, list[Trade]] = {}
        self.tickers: dict[str, list[Ticker]] = {}
        self.candles: dict[str, list[CandleUpdate]] = {}
        self._news = asyncio.Event()

    def note(self) -> None:
        self._news.set()

    async def take_trades(self, market: str, trades: Sequence[Trade]) -> None:
        self.trades.setdefault(market, []).extend(trades)
        self.note()

    async def take_ticker(self, market: str, ticker: Ticker) -> None:
        self.tickers.setdefault(market, []).append(ticker)
        self.note()

    async def take_candle(self, market: str, update: CandleUpdate) -> None:
        self.candles.setdefault(market, []).append(update)
        self.note()

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(40):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def until_books_are(self, wanted: Mapping[str, Top]) -> None:
        await self.until(
            lambda: all(
                of(self.books[market].snapshot()) == book for market, book in wanted.items()
            )
        )


@asynccontextmanager
async def binance(replay: BinanceReplay) -> AsyncIterator[BinanceExchange]:
    async with playing(replay):
        clock = MarketClock()
        limiter = RequestLimiter(clock, name="binance", rate=1_000, concurrency=4)
        exchange = BinanceExchange(clock=clock, endpoint=replay.url, limiter=limiter)
        yield exchange
        await exchange.close()


@asynccontextmanager
async def coinbase(replay: CoinbaseReplay) -> AsyncIterator[CoinbaseExchange]:
    async with playing(replay):
        clock = MarketClock()
        limiter = RequestLimiter(clock, name="coinbase", rate=1_000, concurrency=4)
        exchange = CoinbaseExchange(clock=clock, endpoint=replay.url, limiter=limiter)
        yield exchange
        await exchange.close()


class TestBinance:
    async def test_trades_tickers_candles_and_books_are_what_was_captured(self) -> None:
        capture, told = binance_capture(), Told()
        markets = {name: item.symbol for name, item in capture.instruments.items()}
        async with binance(BinanceReplay(capture, 4 * len(markets))) as exchange:
            for market in markets.values():
                told.books[market] = await exchange.start_order_book_stream(
                    market, on_change=told.note
                )
                await exchange.start_trade_stream(market, partial(told.take_trades, market))
                await exchange.start_ticker_stream(market, partial(told.take_ticker, market))
                await exchange.start_realtime_stream(
                    market, "1m", partial(told.take_candle, market)
                )
            await told.until_books_are(
                {market: rebuilt_binance(capture, name) for name, market in markets.items()}
            )
            wanted_trades = self.trades(capture, markets)
            await told.until(lambda: told.trades == wanted_trades)
            await told.until(
                lambda: (
                    {at: items[-1] for at, items in told.tickers.items()}
                    == self.last_tickers(capture, markets)
                )
            )
            candles = {
                market: [update.candle for update in updates]
                for market, updates in told.candles.items()
            }
        klines = [item for item in capture.messages if item.get("e") == "kline"]
        assert {market: len(found) for market, found in candles.items()} == {
            markets[name]: sum(item["s"] == name for item in klines)
            for name in {item["s"] for item in klines}
        }
        for item in klines:
            row, candle = item["k"], candles[markets[item["s"]]][0]
            if candle.timestamp == row["t"] and candle.volume == float(row["v"]):
                assert [candle.open, candle.high, candle.low, candle.close] == [
                    float(row[name]) for name in "ohlc"
                ]
        if IS_CAPTURED:
            assert (len(markets), len(klines)) == (4, 2)
            assert sum(map(len, told.trades.values())) == 2

    @staticmethod
    def trades(capture: BinanceCapture, markets: Mapping[str, str]) -> dict[str, list[Trade]]:
        found: dict[str, list[Trade]] = {}
        for message in capture.messages:
            if message.get("e") == "aggTrade":
                found.setdefault(markets[message["s"]], []).append(
                    Trade(
                        str(message["l"]),
                        message["T"],
                        float(message["p"]),
                        float(message["q"]),
                        "sell" if message["m"] else "buy",
                    )
                )
        return found

    @staticmethod
    def last_tickers(capture: BinanceCapture, markets: Mapping[str, str]) -> dict[str, Ticker]:
        return {
            markets[message["s"]]: Ticker(
                as_single_stream(message, DAY)["E"],
                last=10.25,
                bid=float(message["b"]),
                ask=float(message["a"]),
                high=11.5,
                low=9.5,
                base_volume=400.5,
                change_percent=-1.25,
            )
            for message in capture.messages
            if "e" not in message
        }

    async def test_a_book_that_misses_an_update_ends_and_begins_anew(self) -> None:
        capture, told = binance_capture(), Told()
        name = next(iter(capture.instruments))
        market = capture.instruments[name].symbol
        last_of_snapshot = capture.snapshots[name]["lastUpdateId"]
        later = [
            number
            for number, message in enumerate(capture.messages)
            if message.get("e") == "depthUpdate"
            and message["s"] == name
            and message["U"] > last_of_snapshot
        ]
        replay = BinanceReplay(capture, 1)
        replay.left_out = later[2]
        async with binance(replay) as exchange:
            broken = await exchange.start_order_book_stream(market)
            with pytest.raises(ExchangeUnavailable):
                await ended(broken)
            assert broken.snapshot() is None
            replay.restart()
            told.books[market] = await exchange.start_order_book_stream(market, on_change=told.note)
            await told.until_books_are({market: rebuilt_binance(capture, name)})


class TestCoinbase:
    async def test_trades_tickers_and_books_are_what_was_captured(self) -> None:
        capture, told = coinbase_capture(), Told()
        markets = {product: product.replace("-", "/") for product in capture.products}
        async with coinbase(CoinbaseReplay(capture, 3 * len(markets))) as exchange:
            for market in markets.values():
                told.books[market] = await exchange.start_order_book_stream(
                    market, on_change=told.note
                )
                await exchange.start_trade_stream(market, partial(told.take_trades, market))
                await exchange.start_ticker_stream(market, partial(told.take_ticker, market))
            await told.until_books_are(
                {market: rebuilt_coinbase(capture, product) for product, market in markets.items()}
            )
            wanted = self.trades(capture, markets)
            await told.until(lambda: told.trades == wanted)
            tickers = self.last_tickers(capture, markets)
            await told.until(
                lambda: (
                    {at: items[-1].last for at, items in told.tickers.items()}
                    == {at: ticker["price"] for at, ticker in tickers.items()}
                )
            )
        for market, wanted_ticker in tickers.items():
            ticker = told.tickers[market][-1]
            assert (ticker.bid, ticker.ask) == (wanted_ticker["bid"], wanted_ticker["ask"])
            assert ticker.base_volume == wanted_ticker["volume"]
        if IS_CAPTURED:
            assert len(markets) == 10
            assert sum(map(len, told.trades.values())) == 97

    @staticmethod
    def trades(capture: CoinbaseCapture, markets: Mapping[str, str]) -> dict[str, list[Trade]]:
        found: dict[str, list[Trade]] = {}
        for message in capture.messages:
            if message["type"] == "match":
                moment = datetime.fromisoformat(message["time"]).timestamp()
                found.setdefault(markets[message["product_id"]], []).append(
                    Trade(
                        str(message["trade_id"]),
                        int(round(moment * 1_000_000) // 1_000),
                        float(message["price"]),
                        float(message["size"]),
                        # The older protocol tells the maker's side.
                        "sell" if message["side"] == "buy" else "buy",
                    )
                )
        return found

    @staticmethod
    def last_tickers(
        capture: CoinbaseCapture, markets: Mapping[str, str]
    ) -> dict[str, dict[str, float]]:
        return {
            markets[message["product_id"]]: {
                "price": float(message["price"]),
                "bid": float(message["best_bid"]),
                "ask": float(message["best_ask"]),
                "volume": float(message["volume_24h"]),
            }
            for message in capture.messages
            if message["type"] == "ticker"
        }

    async def test_books_of_a_socket_that_lost_a_message_end_and_begin_anew(self) -> None:
        capture, told = coinbase_capture(), Told()
        product = capture.products[0]
        market = product.replace("-", "/")
        replay = CoinbaseReplay(capture, 1)
        replay.left_out = 40  # whatever product that is about
        async with coinbase(replay) as exchange:
            broken = await exchange.start_order_book_stream(market)
            with pytest.raises(ExchangeUnavailable, match="lost"):
                await ended(broken)
            assert broken.snapshot() is None
            replay.restart()
            told.books[market] = await exchange.start_order_book_stream(market, on_change=told.note)
            await told.until_books_are({market: rebuilt_coinbase(capture, product)})
