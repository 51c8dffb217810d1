"""What exchanges really sent, through real ccxt: values, and books equal to a rebuild by us."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import pytest

from domain.candle import Candle, CandleUpdate
from domain.clock import MarketClock
from domain.order_book import BOOK_DEPTH, OrderBook
from domain.ticker import Ticker
from domain.trade import Trade
from exchange_source.interfaces import ExchangeUnavailable, IOrderBookHandle, IStreamHandle
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.binance_exchange import BinanceExchange
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.coinbase_exchange import CoinbaseExchange
from tests.contract.ccxt_plugin_contract import ended
from tests.support.captures import (
    BEST,
    SOURCES,
    BinanceCapture,
    CoinbaseCapture,
    Message,
    binance_capture,
    coinbase_capture,
)
from tests.support.replays import DAY, BinanceReplay, CoinbaseReplay, Replay, playing
from tests.unit.exchange_source.plugins.crypto_com_server import until

MINUTE = 60_000
Item = TypeVar("Item")
Levels = dict[float, float]
Side = tuple[tuple[float, float], ...]
Book = tuple[int, Side, Side]
"""The time of a book in ms, its best bids and its best asks."""


@pytest.fixture(scope="module", params=SOURCES)
def binance(request: pytest.FixtureRequest) -> BinanceCapture:
    return binance_capture(request.param)


@pytest.fixture(scope="module", params=SOURCES)
def coinbase(request: pytest.FixtureRequest) -> CoinbaseCapture:
    return coinbase_capture(request.param)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_of_the_traffic_is_overlooked(source: str) -> None:
    binance, coinbase = binance_capture(source), coinbase_capture(source)
    counted = [
        Counter(message.get("e", BEST) for message in binance.messages),
        Counter(message["type"] for message in coinbase.messages),
    ]
    captured = [
        {"depthUpdate": 177, BEST: 84, "kline": 2, "aggTrade": 2},
        {"l2update": 9_719, "ticker": 107, "match": 97, "snapshot": 10, "last_match": 10},
    ]
    if source == "captured":
        assert counted == captured
        assert (len(binance.snapshots), len(coinbase.told_of)) == (4, 10)
        assert len(coinbase.products) == 162
    else:
        assert [set(kinds) for kinds in counted] == [set(kinds) for kinds in captured]
        assert set(binance.snapshots) == set(binance.instruments)
        assert coinbase.told_of == sorted(product["id"] for product in coinbase.products)


@asynccontextmanager
async def exchange_at(
    plugin: type[CCXTExchangeClient], replay: Replay
) -> AsyncIterator[CCXTExchangeClient]:
    """The plugin before what plays a capture."""
    async with playing(replay):
        clock = MarketClock()
        limiter = RequestLimiter(clock, name=plugin.exchange_name, rate=1_000, concurrency=4)
        exchange = plugin(clock=clock, endpoint=replay.url, limiter=limiter)
        try:
            yield exchange
        finally:
            await exchange.close()


class Told:
    """What streams tell, by market."""

    def __init__(self, exchange: CCXTExchangeClient) -> None:
        self.books: dict[str, IOrderBookHandle] = {}
        self.trades: dict[str, list[Trade]] = {}
        self.tickers: dict[str, list[Ticker]] = {}
        self.candles: dict[str, list[Candle]] = {}
        self._exchange = exchange
        self._news = asyncio.Event()

    async def keep_book(self, market: str) -> None:
        self.books[market] = await self._exchange.start_order_book_stream(
            market, on_change=self._news.set
        )

    async def follow_trades(self, market: str) -> IStreamHandle:
        take = partial(self._take, self.trades.setdefault(market, []))
        return await self._exchange.start_trade_stream(market, take)

    async def follow_ticker(self, market: str) -> IStreamHandle:
        take = partial(self._take_one, self.tickers.setdefault(market, []))
        return await self._exchange.start_ticker_stream(market, take)

    async def follow_candles(self, market: str) -> IStreamHandle:
        take = partial(self._take_candle, self.candles.setdefault(market, []))
        return await self._exchange.start_realtime_stream(market, "1m", take)

    async def _take(self, taken: list[Item], news: Sequence[Item]) -> None:
        taken.extend(news)
        self._news.set()

    async def _take_one(self, taken: list[Item], news: Item) -> None:
        await self._take(taken, [news])

    async def _take_candle(self, taken: list[Candle], update: CandleUpdate) -> None:
        assert (update.exchange, update.interval) == (self._exchange.get_exchange_name(), "1m")
        await self._take(taken, [update.candle])

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds; it is looked at whenever something was told."""
        async with asyncio.timeout(30):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def until_last(
        self, told: Mapping[str, Sequence[Item]], wanted: Mapping[str, Sequence[Item]]
    ) -> None:
        """Wait for the last of what is wanted of each market."""
        await self.until(
            lambda: all(list(told[at][-1:]) == list(items[-1:]) for at, items in wanted.items())
        )

    async def until_books_are(self, wanted: Mapping[str, Book]) -> None:
        await self.until(
            lambda: all(
                told_of(self.books[market].snapshot()) == book for market, book in wanted.items()
            )
        )


def told_of(book: OrderBook | None) -> Book | None:
    return None if book is None else (book.timestamp, book.bids, book.asks)


def is_newest_of(told: Sequence[Item], happened: Sequence[Item]) -> bool:
    """Whether what was told is what happened, in order and up to the last; what something newer
    replaced before it was told may be missing."""
    rest = iter(happened)
    return list(told[-1:]) == list(happened[-1:]) and all(item in rest for item in told)


def milliseconds(time: str) -> int:
    """A time in ISO 8601 as ms, cut off and not rounded."""
    moment = datetime.fromisoformat(time)
    return int(moment.replace(microsecond=0).timestamp()) * 1000 + moment.microsecond // 1000


# -- books rebuilt ---------------------------------------------------------------------------------


def change(side: Levels, levels: Iterable[Sequence[str]]) -> None:
    for price, amount in levels:
        if float(amount):
            side[float(price)] = float(amount)
        else:
            side.pop(float(price), None)


def rebuilt(at: int, bids: Levels, asks: Levels) -> Book:
    return (
        at,
        tuple(sorted(bids.items(), reverse=True)[:BOOK_DEPTH]),
        tuple(sorted(asks.items())[:BOOK_DEPTH]),
    )


def rebuilt_binance(capture: BinanceCapture, name: str) -> Book:
    """By the exchange's own recipe: a snapshot, and the updates that end after it."""
    snapshot = capture.snapshots[name]
    number, at = snapshot["lastUpdateId"], 0
    bids: Levels = {}
    asks: Levels = {}
    change(bids, snapshot["bids"])
    change(asks, snapshot["asks"])
    for message in capture.of("depthUpdate", name):
        if message["u"] <= number:
            continue
        assert message["U"] <= number + 1, "the capture has a gap"
        number, at = message["u"], message["E"]
        change(bids, message["b"])
        change(asks, message["a"])
    return rebuilt(at, bids, asks)


def rebuilt_coinbase(capture: CoinbaseCapture, product: str) -> Book:
    """As the Exchange protocol has it: a snapshot, and every change after it."""
    bids: Levels = {}
    asks: Levels = {}
    (snapshot,) = capture.of("snapshot", product)
    change(bids, snapshot["bids"])
    change(asks, snapshot["asks"])
    updates = capture.of("l2update", product)
    for message in updates:
        for side, *level in message["changes"]:
            change(bids if side == "buy" else asks, [level])
    return rebuilt(milliseconds([snapshot, *updates][-1]["time"]), bids, asks)


# -- Binance ---------------------------------------------------------------------------------------


def binance_trades(capture: BinanceCapture, name: str) -> list[Trade]:
    return [
        Trade(
            id=str(message["l"]),
            timestamp=message["T"],
            price=float(message["p"]),
            amount=float(message["q"]),
            side="sell" if message["m"] else "buy",  # whether its buyer was the maker
        )
        for message in capture.of("aggTrade", name)
    ]


def binance_tickers(capture: BinanceCapture, name: str) -> list[Ticker]:
    return [
        Ticker(
            timestamp=message["E"],
            last=float(DAY["c"]),
            bid=float(message["b"]),
            ask=float(message["a"]),
            high=float(DAY["h"]),
            low=float(DAY["l"]),
            base_volume=float(DAY["v"]),
            change_percent=float(DAY["P"]),
        )
        for message in capture.of(BEST, name)
    ]


def binance_candles(capture: BinanceCapture, name: str) -> list[Candle]:
    rows = [message["k"] for message in capture.of("kline", name)]
    return [Candle(row["t"], *(float(row[value]) for value in "ohlcv")) for row in rows]


def later_updates(capture: BinanceCapture, name: str) -> list[Message]:
    """The updates of a book that come after its snapshot."""
    number = capture.snapshots[name]["lastUpdateId"]
    return [item for item in capture.of("depthUpdate", name) if item["U"] > number]


def busiest(capture: BinanceCapture) -> str:
    return max(capture.instruments, key=lambda name: len(capture.of("depthUpdate", name)))


def by_market(
    capture: BinanceCapture, find: Callable[[BinanceCapture, str], Item]
) -> dict[str, Item]:
    return {item.symbol: find(capture, name) for name, item in capture.instruments.items()}


class TestBinance:
    async def test_trades_tickers_candles_and_books_are_what_was_sent(
        self, binance: BinanceCapture
    ) -> None:
        trades = by_market(binance, binance_trades)
        tickers = by_market(binance, binance_tickers)
        candles = by_market(binance, binance_candles)
        books = by_market(binance, rebuilt_binance)
        async with exchange_at(BinanceExchange, BinanceReplay(binance, 4 * len(books))) as exchange:
            told = Told(exchange)
            for market in books:
                await told.keep_book(market)
                await told.follow_trades(market)
                await told.follow_ticker(market)
                await told.follow_candles(market)
            await told.until_books_are(books)
            await told.until_last(told.trades, trades)
            await told.until_last(told.tickers, tickers)
            await told.until_last(told.candles, candles)
        assert told.trades == trades
        for market in books:
            assert is_newest_of(told.tickers[market], tickers[market])
            assert is_newest_of(told.candles[market], candles[market])

    async def test_the_best_prices_of_its_books_are_those_that_the_exchange_told_beside_them(
        self, binance: BinanceCapture
    ) -> None:
        books = by_market(binance, rebuilt_binance)
        async with exchange_at(BinanceExchange, BinanceReplay(binance, len(books))) as exchange:
            told = Told(exchange)
            for market in books:
                await told.keep_book(market)
            await told.until_books_are(books)
            found = {market: book.snapshot(1) for market, book in told.books.items()}
        compared = 0
        for name, instrument in binance.instruments.items():
            number = binance.of("depthUpdate", name)[-1]["u"]
            best = [item for item in binance.of(BEST, name) if item["u"] <= number][-1:]
            for message in best:
                bid, bid_amount, ask, ask_amount = (float(message[value]) for value in "bBaA")
                book = found[instrument.symbol]
                assert book is not None
                assert (book.bids, book.asks) == (((bid, bid_amount),), ((ask, ask_amount),))
                compared += 1
        assert compared >= 3

    async def test_a_book_is_right_however_late_its_snapshot_comes(
        self, binance: BinanceCapture
    ) -> None:
        books = by_market(binance, rebuilt_binance)
        replay = BinanceReplay(binance, len(books))
        replay.gives_snapshots.clear()
        async with exchange_at(BinanceExchange, replay) as exchange:
            told = Told(exchange)
            for market in books:
                await told.keep_book(market)
            for name, instrument in binance.instruments.items():
                await until_buffered(exchange, instrument.symbol, binance.of("depthUpdate", name))
            assert all(book.snapshot() is None for book in told.books.values())
            replay.gives_snapshots.set()
            await told.until_books_are(books)

    async def test_a_book_that_misses_an_update_ends_alone_and_another_is_right(
        self, binance: BinanceCapture
    ) -> None:
        books = by_market(binance, rebuilt_binance)
        name = busiest(binance)
        missed = binance.instruments[name].symbol
        replay = BinanceReplay(binance, len(books), later_updates(binance, name)[2])
        async with exchange_at(BinanceExchange, replay) as exchange:
            told = Told(exchange)
            for market in books:
                await told.keep_book(market)
            with pytest.raises(ExchangeUnavailable):
                await ended(told.books[missed])
            assert told.books[missed].snapshot() is None
            await told.until_books_are({at: book for at, book in books.items() if at != missed})
            replay.play_again(1)
            await told.keep_book(missed)
            await told.until_books_are(books)

    async def test_a_book_that_misses_an_update_before_its_snapshot_comes_ends_too(
        self, binance: BinanceCapture
    ) -> None:
        name = busiest(binance)
        market = binance.instruments[name].symbol
        updates = binance.of("depthUpdate", name)
        missing = later_updates(binance, name)[2]
        replay = BinanceReplay(binance, 1, missing)
        replay.gives_snapshots.clear()
        async with exchange_at(BinanceExchange, replay) as exchange:
            told = Told(exchange)
            await told.keep_book(market)
            await until_buffered(exchange, market, [it for it in updates if it is not missing])
            replay.gives_snapshots.set()
            with pytest.raises(ExchangeUnavailable):
                await ended(told.books[market])
            assert told.books[market].snapshot() is None
            replay.play_again(1)
            await told.keep_book(market)
            await told.until_books_are({market: rebuilt_binance(binance, name)})


async def until_buffered(
    exchange: CCXTExchangeClient, market: str, updates: Sequence[Message]
) -> None:
    """Wait until all that was told of a book waits for its snapshot."""

    def buffered() -> list[Any]:
        book = exchange.vendor.orderbooks.get(market)
        return [] if book is None else list(book.cache)

    await until(lambda: buffered() == list(updates))


# -- Coinbase --------------------------------------------------------------------------------------


def coinbase_trades(capture: CoinbaseCapture, product: str) -> list[Trade]:
    """The last trade before the subscription, and those after it."""
    return [
        Trade(
            id=str(message["trade_id"]),
            timestamp=milliseconds(message["time"]),
            price=float(message["price"]),
            amount=float(message["size"]),
            side="sell" if message["side"] == "buy" else "buy",  # the maker's is told
        )
        for kind in ("last_match", "match")
        for message in capture.of(kind, product)
    ]


def coinbase_tickers(capture: CoinbaseCapture, product: str) -> list[Ticker]:
    return [
        Ticker(
            timestamp=milliseconds(message["time"]),
            last=float(message["price"]),
            bid=float(message["best_bid"]),
            ask=float(message["best_ask"]),
            high=float(message["high_24h"]),
            low=float(message["low_24h"]),
            base_volume=float(message["volume_24h"]),
            change_percent=(float(message["price"]) / float(message["open_24h"]) - 1) * 100,
        )
        for message in capture.of("ticker", product)
    ]


def coinbase_candles(capture: CoinbaseCapture, product: str) -> list[Candle]:
    """Of each minute that began while trades were told: its candle."""
    found: dict[int, Candle] = {}
    for trade in coinbase_trades(capture, product):
        opened, price = trade.timestamp // MINUTE * MINUTE, trade.price
        known = found.get(opened, Candle(opened, price, price, price, price, 0.0))
        found[opened] = Candle(
            opened,
            known.open,
            max(known.high, price),
            min(known.low, price),
            price,
            known.volume + trade.amount,
        )
    return [found[opened] for opened in sorted(found)[1:]]


def by_product(
    capture: CoinbaseCapture, find: Callable[[CoinbaseCapture, str], Item]
) -> dict[str, Item]:
    return {product.replace("-", "/"): find(capture, product) for product in capture.told_of}


class TestCoinbase:
    async def test_trades_tickers_and_books_are_what_was_sent(
        self, coinbase: CoinbaseCapture
    ) -> None:
        trades = by_product(coinbase, coinbase_trades)
        tickers = by_product(coinbase, coinbase_tickers)
        books = by_product(coinbase, rebuilt_coinbase)
        replay = CoinbaseReplay(coinbase, 3 * len(books))
        async with exchange_at(CoinbaseExchange, replay) as exchange:
            told = Told(exchange)
            for market in books:
                await told.keep_book(market)
                await told.follow_trades(market)
                await told.follow_ticker(market)
            await told.until_books_are(books)
            await told.until_last(told.trades, trades)
            await told.until_last(told.tickers, tickers)
        assert told.trades == trades
        for market in books:
            assert is_newest_of(told.tickers[market], tickers[market])

    async def test_the_side_of_a_trade_is_what_its_ticker_calls_the_takers(
        self, coinbase: CoinbaseCapture
    ) -> None:
        takers = {
            (message["product_id"].replace("-", "/"), str(message["trade_id"])): message["side"]
            for message in coinbase.of("ticker")
        }
        trades = by_product(coinbase, coinbase_trades)
        async with exchange_at(CoinbaseExchange, CoinbaseReplay(coinbase, len(trades))) as exchange:
            told = Told(exchange)
            for market in trades:
                await told.follow_trades(market)
            await told.until_last(told.trades, trades)
        sides = {(at, item.id): item.side for at, items in told.trades.items() for item in items}
        both = takers.keys() & sides.keys()
        assert len(both) >= len(coinbase.of("match"))
        assert {key: sides[key] for key in both} == {key: takers[key] for key in both}

    async def test_candles_of_the_minutes_that_began_meanwhile_are_made_of_the_trades(
        self, coinbase: CoinbaseCapture
    ) -> None:
        candles = by_product(coinbase, coinbase_candles)
        async with exchange_at(
            CoinbaseExchange, CoinbaseReplay(coinbase, len(candles))
        ) as exchange:
            told = Told(exchange)
            for market in candles:
                await told.follow_candles(market)
            await told.until_last(told.candles, candles)
        newest = {
            market: list({candle.timestamp: candle for candle in found}.values())
            for market, found in told.candles.items()
        }
        assert newest == candles
        assert any(candles.values())

    async def test_everything_ends_with_a_lost_message_and_what_follows_is_right(
        self, coinbase: CoinbaseCapture
    ) -> None:
        books = by_product(coinbase, rebuilt_coinbase)
        lost = coinbase.of("l2update")[len(coinbase.of("l2update")) // 2]
        replay = CoinbaseReplay(coinbase, 2 * len(books), lost)
        async with exchange_at(CoinbaseExchange, replay) as exchange:
            told = Told(exchange)
            trades = []
            for market in books:
                await told.keep_book(market)
                trades.append(await told.follow_trades(market))
            for handle in (*told.books.values(), *trades):
                with pytest.raises(ExchangeUnavailable, match="lost"):
                    await ended(handle)
            assert all(book.snapshot() is None for book in told.books.values())
            replay.play_again(len(books))
            for market in books:
                await told.keep_book(market)
            await told.until_books_are(books)
