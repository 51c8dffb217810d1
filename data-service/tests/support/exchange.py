"""An exchange in memory that keeps the contract of ``IExchangeAPIClient``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from domain.candle import Candle, CandleUpdate
from domain.clock import IClock
from domain.interval import Interval
from domain.order_book import BOOK_DEPTH, OrderBook
from domain.ticker import Ticker
from domain.time_range import RangeSet, TimeRange
from domain.trade import Trade
from errors import InvalidRequest
from exchange_source.interfaces import (
    ExchangeError,
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
    OnBookChange,
    Priority,
    RequestTotals,
    TickerCallback,
    TradesCallback,
    UpdateCallback,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One ``fetch_historical_data`` as it arrived."""

    market: str
    interval: str
    range: TimeRange
    priority: Priority


class FakeStream(IOrderBookHandle):
    """A stream that ends when it is stopped, or when the test says with what. ``method`` is what
    started it; ``interval`` is empty but for candles."""

    def __init__(
        self,
        exchange: FakeExchange,
        method: str,
        market: str,
        interval: str = "",
        *,
        callback: Callable[[Any], Awaitable[None]] | None = None,
        on_change: OnBookChange | None = None,
    ) -> None:
        self.method = method
        self.market = market
        self.interval = interval
        self.on_change = on_change
        self._exchange = exchange
        self._callback = callback
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A stream that nobody waits for may end with an error that nobody reads.
        self._ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def deliver(self, update: Any) -> None:
        """Await the callback; its failure ends the stream, as with a real one."""
        assert self._callback is not None
        try:
            await self._callback(update)
        except Exception as exc:
            self.end(exc)
            raise

    def end(self, error: Exception | None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
        if self.on_change is not None:
            self.on_change()

    async def wait(self) -> None:
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        self.end(None)

    def snapshot(self, depth: int = BOOK_DEPTH) -> OrderBook | None:
        book = self._exchange.book
        return book.top(depth) if book is not None and self.running else None


@dataclass
class FakeExchange(IExchangeAPIClient):
    """What an exchange says is what its attributes hold at that moment; tests change them freely.

    ``candles`` maps (market, interval) to its candles by timestamp, of the future too: a candle
    shows from its period's open on, or from ``publish_at`` (by market, interval and timestamp,
    market ms). ``history_ms`` is how far back it gives, ``time_offset_ms`` how far its own clock
    is ahead of ``clock``. ``fail_with`` is raised by every request while it is set; with
    ``refuse_history`` those for candles are refused, and those about one of ``failing_markets``
    fail. Requests wait while ``gate`` is cleared.
    Markets of ``inactive`` are listed and not traded. ``requests`` counts calls by method,
    ``asked`` holds the histories asked for.
    """

    clock: IClock
    markets: Sequence[str] = ("BTC/USD", "ETH/USD")
    candles: dict[tuple[str, str], dict[int, Candle]] = field(default_factory=dict)
    name: str = "crypto.com"
    exchange_id: str = "cryptocom"
    quotes: Sequence[str] = ("USD", "USDT", "USDC", "EUR")
    intervals: tuple[str, ...] = ("1m", "5m", "15m", "30m", "1h", "4h", "1d")
    history_page: int = 298
    history_ms: int | None = None
    grace_ms: int = 5_000
    time_offset_ms: int = 0
    publish_at: dict[tuple[str, str, int], int] = field(default_factory=dict)
    inactive: set[str] = field(default_factory=set)
    book: OrderBook | None = None
    fail_with: ExchangeError | None = None
    refuse_history: bool = False
    failing_markets: set[str] = field(default_factory=set)
    requests: Counter[str] = field(default_factory=Counter)
    asked: list[Asked] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    totals: RequestTotals = field(default_factory=RequestTotals)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    def put(self, market: str, interval: str, candles: Iterable[Candle]) -> None:
        """Add candles, or replace those of the same period."""
        known = self.candles.setdefault((market, interval), {})
        known.update((candle.timestamp, candle) for candle in candles)

    async def push(self, update: CandleUpdate) -> None:
        """Hand ``update`` to every running stream of its market and interval, and wait for it."""
        for stream in list(self.streams):
            if (stream.market, stream.interval) == (update.market, update.interval) and (
                stream.running
            ):
                await stream.deliver(update)

    async def push_trades(self, market: str, *trades: Trade) -> None:
        """Hand trades to every running trade stream of the market."""
        await self._push("start_trade_stream", market, trades)

    async def push_ticker(self, market: str, ticker: Ticker) -> None:
        """Hand a ticker to every running ticker stream of the market."""
        await self._push("start_ticker_stream", market, ticker)

    def change_book(self, book: OrderBook) -> None:
        """Have another book, and tell those that keep it."""
        self.book = book
        for stream in list(self.streams):
            if stream.running and stream.on_change is not None:
                stream.on_change()

    async def _push(self, method: str, market: str, update: Any) -> None:
        for stream in list(self.streams):
            if (stream.method, stream.market) == (method, market) and stream.running:
                await stream.deliver(update)

    def end_streams(self, error: Exception | None = None) -> None:
        """End every stream, candles and books alike, with ``error``."""
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.end(error)

    @property
    def running_streams(self) -> list[FakeStream]:
        """The candle streams that have not ended."""
        return [stream for stream in self.streams if stream.running and stream.interval]

    def get_exchange_name(self) -> str:
        return self.name

    def get_exchange_id(self) -> str:
        return self.exchange_id

    @property
    def clock_skew_ms(self) -> int | None:
        return self.time_offset_ms if self.requests else None

    @property
    def request_totals(self) -> RequestTotals:
        return self.totals

    async def check_coin_availability(
        self, coin_symbol: str, *, priority: Priority = Priority.REQUEST
    ) -> str | None:
        await self._request("check_coin_availability")
        coin = coin_symbol.upper()
        wanted = [coin] if "/" in coin else [f"{coin}/{quote}" for quote in self.quotes]
        active = [market for market in self.markets if market not in self.inactive]
        return next((market for market in wanted if market in active), None)

    async def fetch_historical_data(
        self,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        if interval not in self.intervals or start >= end:
            raise InvalidRequest(f"{interval} from {start} to {end} cannot be fetched")
        period = Interval.parse(interval)
        self.asked.append(Asked(market, interval, TimeRange(start, end), priority))
        await self._request("fetch_historical_data", market)
        if self.refuse_history:
            raise ExchangeRefused(f"{self.name} gives no history of {market}")
        now = self.clock.now_ms() + self.time_offset_ms
        rows = self._visible(market, period, now)
        candles: list[Candle] = []
        empty = RangeSet()
        offered_from = period.ceil(start)
        oldest, newest = min(rows, default=0), max(rows, default=0)
        for timestamp in range(offered_from, end, period.milliseconds):
            over = timestamp + period.milliseconds + self.grace_ms <= now
            before = bool(rows) and oldest < timestamp
            after = bool(rows) and newest > timestamp
            if timestamp in rows:
                if over or after:
                    candles.append(rows[timestamp])
            elif before and after and over:
                empty.add(TimeRange(timestamp, timestamp + period.milliseconds))
        first = min(rows, default=offered_from)
        not_offered = TimeRange(offered_from, first)
        return HistoricalData(
            candles=tuple(candles),
            empty=tuple(empty),
            not_offered=not_offered or None,
            exchange_time=now,
        )

    async def fetch_order_book(
        self, market: str, *, priority: Priority = Priority.REQUEST
    ) -> OrderBook:
        await self._request("fetch_order_book", market)
        if self.book is None:
            raise ExchangeUnavailable(f"{self.name} has no book of {market} now")
        return self.book

    async def start_realtime_stream(
        self, market: str, interval: str, callback: UpdateCallback
    ) -> IStreamHandle:
        return self._start("start_realtime_stream", market, interval, callback=callback)

    async def start_trade_stream(self, market: str, callback: TradesCallback) -> IStreamHandle:
        return self._start("start_trade_stream", market, callback=callback)

    async def start_ticker_stream(self, market: str, callback: TickerCallback) -> IStreamHandle:
        return self._start("start_ticker_stream", market, callback=callback)

    async def start_order_book_stream(
        self, market: str, *, on_change: OnBookChange | None = None
    ) -> IOrderBookHandle:
        return self._start("start_order_book_stream", market, on_change=on_change)

    async def reset_connections(self) -> None:
        self.requests["reset_connections"] += 1
        self.end_streams(ExchangeUnavailable(f"{self.name} connections were reset"))

    async def close(self) -> None:
        self.closed = True
        self.end_streams()

    def _start(self, method: str, market: str, interval: str = "", **kwargs: Any) -> FakeStream:
        self.requests[method] += 1
        if self.closed:
            raise ExchangeUnavailable(f"{self.name} is closed")
        stream = FakeStream(self, method, market, interval, **kwargs)
        self.streams.append(stream)
        if self.fail_with is not None:
            stream.end(self.fail_with)
        elif market not in self.markets:
            stream.end(ExchangeRefused(f"{self.name} does not know the market {market}"))
        elif self.book is not None and stream.on_change is not None:
            asyncio.get_running_loop().call_soon(stream.on_change)
        return stream

    async def _request(self, method: str, market: str | None = None) -> None:
        self.requests[method] += 1
        await self.gate.wait()
        if self.closed:
            raise ExchangeUnavailable(f"{self.name} is closed")
        if self.fail_with is not None:
            raise self.fail_with
        if market in self.failing_markets:
            raise ExchangeUnavailable(f"{self.name} does not answer about {market}")
        if market is not None and market not in self.markets:
            raise ExchangeRefused(f"{self.name} does not know the market {market}")

    def _visible(self, market: str, period: Interval, now: int) -> dict[int, Candle]:
        oldest = now - self.history_ms if self.history_ms is not None else 0
        return {
            timestamp: candle
            for timestamp, candle in self.candles.get((market, period.name), {}).items()
            if oldest <= timestamp
            and now >= self.publish_at.get((market, period.name, timestamp), timestamp)
        }
