"""Live market data beside candles: trades, tickers and order books, for as long as they are read.

One upstream stream for each market and channel, however many read it: started for the first reader,
stopped after the last. Guarantees, per reader:

- Each trade that arrives is told once and in order of arrival, across reconnects too; trades that
  happened while the feed was lost and that the exchange does not send again are not made up.
- Of tickers and books the newest is told, at once to a new reader. A book comes whole, never
  crossed; one that is older than its feed's rhythm, or whose feed is lost, is told once more,
  ``stale``.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import Context
from typing import Final, NoReturn

import structlog

from collection.feed import RHYTHM_MS, RHYTHM_REAL_S, FeedSupervisor
from collection.hub import Hub
from collection.interfaces import BookTold, Channel, ChannelEvent, TickerTold, TradesTold
from collection.subscription import Reader
from domain.clock import IClock
from domain.series import Series
from domain.ticker import Ticker
from domain.trade import Trade
from errors import DataServiceError
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable

# Trades, or changes behind the series, that may wait for one reader.
QUEUE_BOUND: Final = 10_000
# So many trades back a repetition is noticed: more than any exchange begins a stream with.
REMEMBERED_TRADES: Final = 2_000

_Key = tuple[str, str, Channel]
"""Exchange, market and channel."""

log = structlog.get_logger(__name__)


class _Upstream(ABC):
    """One channel of one market, and who reads it."""

    def __init__(self, feed: FeedSupervisor, market: str, clock: IClock) -> None:
        self.readers: set[Reader] = set()
        self.task: asyncio.Task[None] | None = None
        self._feed = feed
        self._market = market
        self._clock = clock
        self._newest: ChannelEvent | None = None

    def join(self, reader: Reader) -> None:
        self.readers.add(reader)
        if self._newest is not None:
            reader.offer_newest(self._newest)

    async def run(self) -> None:
        """Serve the readers until cancelled, or until they have been ended with an error."""
        try:
            await self._keep()
        except ExchangeRefused as exc:
            self._end(exc)
        except Exception:
            # The outermost loop of a channel: what went wrong is told, nobody waits for ever.
            log.exception("channel_failed", market=self._market)
            self._end(ExchangeUnavailable(f"the channel of {self._market} failed; subscribe again"))

    @abstractmethod
    async def _keep(self) -> None:
        """Keep the stream running until cancelled."""

    async def _refused(self, error: ExchangeRefused) -> NoReturn:
        raise error

    def _tell_newest(self, event: ChannelEvent) -> None:
        self._newest = event
        for reader in self.readers:
            reader.offer_newest(event)

    def _end(self, error: DataServiceError) -> None:
        for reader in self.readers:
            reader.end(error)


class _Trades(_Upstream):
    def __init__(self, feed: FeedSupervisor, market: str, clock: IClock) -> None:
        super().__init__(feed, market, clock)
        self._told: set[str] = set()
        self._order: deque[str] = deque()

    async def _keep(self) -> None:
        await self._feed.keep_trades(self._market, self._take, on_refused=self._refused)

    async def _take(self, trades: Sequence[Trade]) -> None:
        fresh = tuple(trade for trade in trades if self._is_new(trade.id))
        if fresh:
            event = TradesTold(fresh)
            for reader in self.readers:
                reader.offer(event)

    def _is_new(self, trade_id: str) -> bool:
        if trade_id in self._told:
            return False
        self._told.add(trade_id)
        self._order.append(trade_id)
        if len(self._order) > REMEMBERED_TRADES:
            self._told.discard(self._order.popleft())
        return True


class _Ticker(_Upstream):
    async def _keep(self) -> None:
        await self._feed.keep_ticker(self._market, self._take, on_refused=self._refused)

    async def _take(self, ticker: Ticker) -> None:
        self._tell_newest(TickerTold(ticker))


class _Book(_Upstream):
    def __init__(self, feed: FeedSupervisor, market: str, clock: IClock) -> None:
        super().__init__(feed, market, clock)
        self._changed = asyncio.Event()
        # The book may be kept already, and stand still.
        self._changed.set()
        self._told: BookTold | None = None
        # The rhythm in market time, but not faster than a network is, however fast that passes.
        self._rhythm_ms = max(RHYTHM_MS, round(RHYTHM_REAL_S * 1000 * clock.speed))

    async def _keep(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell_changes())
                group.create_task(self._tell_age())
                group.create_task(
                    self._feed.keep_book(
                        self._market, on_refused=self._refused, on_change=self._changed.set
                    )
                )
        except* ExchangeRefused as refused:
            raise refused.exceptions[0] from None

    async def _tell_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            book = self._feed.book(self._market)
            if book is not None:
                age = self._clock.now_ms() - book.timestamp
                self._tell(BookTold(book, stale=age > self._rhythm_ms))
            elif self._told is not None and not self._told.stale:
                self._tell(BookTold(self._told.book, stale=True))

    async def _tell_age(self) -> None:
        """Say so when a book that was fresh is not any more."""
        while True:
            told = self._told
            fresh = told is not None and not told.stale
            since = told.book.timestamp if told is not None and fresh else self._clock.now_ms()
            await self._clock.sleep_until(since + self._rhythm_ms + 1)
            if told is not None and fresh and self._told is told:
                self._tell(BookTold(told.book, stale=True))

    def _tell(self, event: BookTold) -> None:
        self._told = event
        self._tell_newest(event)


_UPSTREAMS: Final[Mapping[Channel, type[_Upstream]]] = {
    Channel.TRADES: _Trades,
    Channel.TICKER: _Ticker,
    Channel.ORDER_BOOK: _Book,
}


class MarketChannels:
    """Every channel that somebody reads; owns one task for each."""

    def __init__(
        self,
        feeds: Mapping[str, FeedSupervisor],
        hub: Hub,
        clock: IClock,
        *,
        queue_bound: int = QUEUE_BOUND,
    ) -> None:
        self._feeds = feeds
        self._hub = hub
        self._clock = clock
        self._queue_bound = queue_bound
        self._upstreams: dict[_Key, _Upstream] = {}
        self._reading: dict[Reader, tuple[_Key, _Upstream]] = {}

    def subscribe(self, series: Series, market: str, channel: Channel) -> Reader:
        """Read a channel of the market of a series that is told.

        Raises:
            CoinNotAvailable: the series is not told.
        """
        reader = self._hub.attach(
            series,
            f"{channel} of {market} on {series.exchange}",
            channel=channel,
            bound=self._queue_bound,
        )
        key = (series.exchange, market, channel)
        upstream = self._upstreams.get(key)
        if upstream is None or upstream.task is None or upstream.task.done():
            upstream = _UPSTREAMS[channel](self._feeds[series.exchange], market, self._clock)
            upstream.task = asyncio.create_task(
                upstream.run(),
                name=f"{channel} of {market}",
                # It outlives the first who reads it, and its logs do not speak of that one.
                context=Context(),
            )
            self._upstreams[key] = upstream
        upstream.join(reader)
        self._reading[reader] = (key, upstream)
        return reader

    async def leave(self, reader: Reader) -> None:
        """End a reader; a channel that nobody reads any more is stopped. Idempotent."""
        reader.close()
        if reader not in self._reading:
            return
        key, upstream = self._reading.pop(reader)
        upstream.readers.discard(reader)
        if upstream.readers:
            return
        if self._upstreams.get(key) is upstream:
            del self._upstreams[key]
        await _end(upstream)

    async def close(self) -> None:
        """Stop every channel. Idempotent; those who read it stay, and are told nothing more."""
        tasks = [item.task for item in self._upstreams.values() if item.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._upstreams.clear()


async def _end(upstream: _Upstream) -> None:
    if upstream.task is not None:
        upstream.task.cancel()
        await asyncio.wait([upstream.task])
