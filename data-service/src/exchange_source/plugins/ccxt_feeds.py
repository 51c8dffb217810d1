"""Live feeds: one watch loop for each topic, however many streams read it.

ccxt hands all watchers of a topic one future and one count of news: two of them would steal
updates from each other, and cancelling one would cancel both. So a topic is watched once, and its
streams are served from there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from domain.candle import CandleUpdate
from domain.interval import Interval
from domain.order_book import BOOK_DEPTH, OrderBook
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRefused,
    ExchangeUnavailable,
    IOrderBookHandle,
    IStreamHandle,
    OnBookChange,
)
from exchange_source.plugins.ccxt_errors import FAILURES, TRANSLATED, translate
from exchange_source.plugins.ccxt_guards import SUBSCRIBER, Subscriber
from exchange_source.plugins.ccxt_values import to_candle, to_order_book, to_ticker, to_trade

# The first message of a subscription may hold hours of candles; the forming one and the one that
# just closed are what a live feed is about.
_RECENT_ROWS: Final = 2
# Real seconds that an exchange gets to confirm an unsubscription that nobody depends on.
_UNSUBSCRIBE_TIMEOUT_S: Final = 2.0
# Trades that may wait to be handed on, minutes of the busiest market there is.
_MOST_ARRIVALS: Final = 100_000

Callback = Callable[[Any], Awaitable[None]]


class IFeedSource(Protocol):
    """What a feed needs of its exchange."""

    vendor: Any

    def get_exchange_name(self) -> str: ...

    async def prepare_feed(self, market: str) -> None:
        """Know the market, and wait for the limiter's leave to subscribe."""

    def doubt_markets(self) -> None:
        """The exchange refuses a market: its list may have changed."""


class Stream(IStreamHandle):
    """One reader of a feed."""

    def __init__(self, feed: Feed, callback: Callback | None = None) -> None:
        self.callback = callback
        self._feed = feed
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A stream that nobody waits for may end with an error that nobody reads.
        self._ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    @property
    def running(self) -> bool:
        return not self._ended.done()

    def end(self, error: BaseException | None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    async def wait(self) -> None:
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        await self._feed.leave(self)


class Feed(ABC):
    """The watching of one topic, from its first stream until its last.

    ``turn`` is the topic's lock: a feed that follows another waits until that one has
    unsubscribed. ``forget`` is called when no further stream may join.
    """

    def __init__(
        self,
        source: IFeedSource,
        market: str,
        *,
        turn: asyncio.Lock,
        forget: Callable[[Feed], None],
    ) -> None:
        self.streams: list[Stream] = []
        self._source = source
        self._market = market
        self._turn = turn
        self._forget = forget
        self._subscriber = Subscriber()
        self._delivering = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def join(self, stream: Stream) -> None:
        """Serve ``stream`` from now on."""
        self.streams.append(stream)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def leave(self, stream: Stream) -> None:
        """End ``stream``; return when its callback is not called any more."""
        stream.end(None)
        if stream in self.streams:
            self.streams.remove(stream)
        if asyncio.current_task() is self._task:
            return  # a callback that stops its own stream: the loop sees it when that returns
        if self.streams:
            async with self._delivering:
                return
        await self.close()

    async def close(self) -> None:
        """End every stream and the watching. Idempotent."""
        self._forget(self)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.end_streams(None)

    @abstractmethod
    async def _watch(self) -> Any:
        """The topic's next news, as ccxt gives them."""

    @abstractmethod
    async def _unwatch(self) -> None:
        """Unsubscribe."""

    @abstractmethod
    async def _take(self, news: Any) -> None:
        """Check what came and hand it on.

        Raises:
            BadExchangeAnswer: it cannot be believed.
        """

    async def _run(self) -> None:
        SUBSCRIBER.set(self._subscriber)
        error: BaseException | None = None
        try:
            async with self._turn:
                try:
                    await self._source.prepare_feed(self._market)
                    while self.streams:
                        await self._take(await self._next())
                finally:
                    self._forget(self)
                    await self._unsubscribe()
        except Exception as exc:  # noqa: BLE001  outermost: the streams raise it where they are awaited
            error = exc
        finally:
            self._forget(self)
            self.end_streams(error)

    async def _next(self) -> Any:
        """Wait for news. What ccxt fails with here breaks the socket, unless it is about this topic
        alone: a refusal, or something that cannot be believed."""
        name = self._source.get_exchange_name()
        self._check_socket()
        try:
            return await self._watch()
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # ccxt cancels the watchers of a socket that it closes.
            failed = ExchangeUnavailable(f"{name}: connection closed")
            self._break_socket(failed)
            raise failed from exc
        except ExchangeRefused:
            self._subscriber.socket = None  # there is nothing to unsubscribe from
            self._source.doubt_markets()
            raise
        except ExchangeError:
            # Ours: of a socket that was broken already, or about this topic alone, such as a
            # snapshot that could not be had.
            raise
        except TRANSLATED as exc:
            translated = translate(exc, name)
            if not isinstance(translated, BadExchangeAnswer):
                self._break_socket(translated)
            raise translated from exc

    def _check_socket(self) -> None:
        """Notice a socket that failed between two watches: the next one would open another, and
        what was lost in between would never show."""
        socket = self._subscriber.socket
        if socket is None or self._source.vendor.clients.get(socket.url) is socket:
            return
        name = self._source.get_exchange_name()
        if isinstance(socket.error, ExchangeError):
            raise socket.error
        raise ExchangeUnavailable(f"{name}: connection closed") from socket.error

    def _break_socket(self, error: ExchangeError) -> None:
        socket = self._subscriber.socket
        if socket is not None:
            self._source.vendor.fail_socket(socket, error)

    async def _unsubscribe(self) -> None:
        """Best effort, and only where the socket that was subscribed through still stands."""
        socket = self._subscriber.socket
        vendor = self._source.vendor
        if socket is None or vendor.clients.get(socket.url) is not socket or not socket.isConnected:
            return
        heard = socket.frames
        try:
            async with asyncio.timeout(_UNSUBSCRIBE_TIMEOUT_S):
                await self._unwatch()
        except FAILURES:
            # Whether it still sends or not: the next watch of the topic subscribes afresh.
            for noted in self._subscriber.hashes:
                socket.subscriptions.pop(noted, None)
            if socket.frames == heard:
                # Of several sockets one may be mute while the others keep the exchange heard.
                name = self._source.get_exchange_name()
                vendor.fail_socket(socket, ExchangeUnavailable(f"{name}: a connection is mute"))

    def end_streams(self, error: BaseException | None) -> None:
        """Let every stream go, with ``error`` if that is why."""
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.end(error)

    async def _deliver(self, update: Any) -> None:
        """Hand an update to every stream."""
        for stream in list(self.streams):
            await self._deliver_to(stream, update)

    async def _deliver_to(self, stream: Stream, update: Any) -> None:
        """Await the stream's callback; a callback that fails ends its stream with that error."""
        if stream.callback is None or not stream.running:
            return
        try:
            async with self._delivering:
                await stream.callback(update)
        except Exception as exc:  # noqa: BLE001  outermost of the caller's code: wait() raises it
            stream.end(exc)
            if stream in self.streams:
                self.streams.remove(stream)


class CandleFeed(Feed):
    """The candles of one market and interval."""

    def __init__(self, source: IFeedSource, market: str, interval: Interval, **kwargs: Any) -> None:
        super().__init__(source, market, **kwargs)
        self._interval = interval

    async def _watch(self) -> Any:
        return await self._source.vendor.watch_ohlcv(self._market, self._interval.name)

    async def _unwatch(self) -> None:
        await self._source.vendor.un_watch_ohlcv(self._market, self._interval.name)

    async def _take(self, news: Any) -> None:
        updates = self._copied(news)
        while updates and self.streams:
            for update in updates:
                await self._deliver(update)
            # What came while the callbacks ran waits in ccxt's cache, and would until more comes.
            cached = self._source.vendor.ohlcvs.get(self._market, {}).get(self._interval.name, [])
            seen = updates
            updates = [
                update
                for update in self._copied(cached)
                if update not in seen and update.candle.timestamp >= seen[0].candle.timestamp
            ]

    def _copied(self, rows: Sequence[Any]) -> list[CandleUpdate]:
        """The newest rows as values: ccxt goes on changing its own."""
        name = self._source.get_exchange_name()
        return [
            CandleUpdate(
                exchange=name,
                market=self._market,
                interval=self._interval.name,
                candle=to_candle(row, self._interval, name),
            )
            for row in list(rows)[-_RECENT_ROWS:]
        ]


class _Arrivals(list[Any]):
    """Stands where ccxt would keep a market's last thousand trades: those that were not handed on
    yet, so that a burst pushes none out unread."""

    def append(self, trade: Any) -> None:
        if len(self) >= _MOST_ARRIVALS:
            raise OverflowError(f"more than {_MOST_ARRIVALS} trades were not handed on")
        super().append(trade)

    def getLimit(self, _symbol: str | None, limit: int | None) -> int | None:  # noqa: N802  ccxt's
        return limit

    def take(self) -> list[Any]:
        taken = list(self)
        self.clear()
        return taken


class TradeFeed(Feed):
    """The trades of one market."""

    def __init__(self, source: IFeedSource, market: str, **kwargs: Any) -> None:
        super().__init__(source, market, **kwargs)
        self._arrivals = _Arrivals()

    async def _watch(self) -> Any:
        # Each time, for unsubscribing clears ccxt's caches away.
        self._source.vendor.trades[self._market] = self._arrivals
        return await self._source.vendor.watch_trades(self._market)

    async def _unwatch(self) -> None:
        await self._source.vendor.un_watch_trades(self._market)

    def end_streams(self, error: BaseException | None) -> None:
        # What still comes after the end is nobody's.
        trades = self._source.vendor.trades
        if trades.get(self._market) is self._arrivals:
            del trades[self._market]
        super().end_streams(error)

    async def _take(self, news: Any) -> None:  # noqa: ARG002  they arrived where they are kept
        name = self._source.get_exchange_name()
        while self.streams and (arrived := self._arrivals.take()):
            await self._deliver(tuple(to_trade(trade, name) for trade in arrived))


class TickerFeed(Feed):
    """The ticker of one market."""

    async def _watch(self) -> Any:
        return await self._source.vendor.watch_ticker(self._market)

    async def _unwatch(self) -> None:
        await self._source.vendor.un_watch_ticker(self._market)

    async def _take(self, news: Any) -> None:
        taken = None
        while self.streams and news is not taken:
            await self._deliver(to_ticker(news, self._source.get_exchange_name()))
            # What came while the callbacks ran would wait for the next one.
            taken, news = news, self._source.vendor.tickers.get(self._market, news)


class OrderBookFeed(Feed):
    """The live book of one market, of which ccxt keeps so many levels a side, or all."""

    def __init__(self, source: IFeedSource, market: str, levels: int | None, **kwargs: Any) -> None:
        super().__init__(source, market, **kwargs)
        self._levels = levels
        self._live: Any = None

    async def _watch(self) -> Any:
        # A fresh dictionary each time: ccxt writes into the one that it is given, or into its own
        # default.
        return await self._source.vendor.watch_order_book(self._market, self._levels, {})

    async def _unwatch(self) -> None:
        await self._source.vendor.un_watch_order_book(self._market, {})

    async def _take(self, news: Any) -> None:
        if news["timestamp"] is None:
            return  # a snapshot that does not say of when it is; the first update does
        to_order_book(news, 1, self._source.get_exchange_name())
        self._live = news
        self._tell_change(self.streams)

    def snapshot(self, depth: int) -> OrderBook | None:
        """The top of the book now, or None; an impossible book also ends the streams."""
        if self._live is None:
            return None
        try:
            return to_order_book(self._live, depth, self._source.get_exchange_name())
        except BadExchangeAnswer as exc:
            self._live = None
            self.end_streams(exc)
            self._forget(self)
            if self._task is not None:
                self._task.cancel()
            return None

    def end_streams(self, error: BaseException | None) -> None:
        self._live = None
        ended = list(self.streams)
        super().end_streams(error)
        self._tell_change(ended)

    @staticmethod
    def _tell_change(streams: Sequence[Stream]) -> None:
        for stream in streams:
            if isinstance(stream, OrderBookStream) and stream.on_change is not None:
                stream.on_change()


class OrderBookStream(Stream, IOrderBookHandle):
    """One reader of a live book."""

    def __init__(self, feed: OrderBookFeed, on_change: OnBookChange | None = None) -> None:
        super().__init__(feed)
        self.on_change = on_change
        self._book = feed

    def snapshot(self, depth: int = BOOK_DEPTH) -> OrderBook | None:
        return self._book.snapshot(depth) if self.running else None
