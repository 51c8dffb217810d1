"""The feed supervisor of one exchange: starts its streams, and judges whether they are alive.

A feed is alive when data arrives within its rhythm; pings prove nothing. It is lost when the last
of its streams has ended, or when it has gone mute: then its connections are closed, so that each
of its streams ends. While it is lost one stream at a time tries, in turn, with a growing, jittered
pause between; what is heard first lets all the others go. A single stream that ends while others
run is started again with a pause of its own and disturbs nobody.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

import structlog

from collection.interfaces import FeedStatus
from collection.waiting import first_of
from domain.back_off import back_off_s
from domain.candle import CandleUpdate
from domain.clock import IClock
from domain.order_book import OrderBook
from errors import DataServiceError
from exchange_source.interfaces import (
    ExchangeRefused,
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
    OnBookChange,
    TickerCallback,
    TradesCallback,
)

# A feed of live markets that is silent this long is not alive: market ms, and at least real
# seconds, because on a fast market clock the network is as slow as ever.
RHYTHM_MS: Final = 60_000
RHYTHM_REAL_S: Final = 10.0
# How often a lost feed is listened to; its books do not tell by themselves that they have come.
LISTEN_EVERY_S: Final = 0.1
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0
# A stream, or a feed, that lived this long starts its back-off anew.
HEALTHY_AFTER_S: Final = 30.0
# How long one stream of a lost feed may be silent before the next one tries too: its market may
# be a quiet one.
PROBE_S: Final = 2.0
STOP_TIMEOUT_S: Final = 5.0

FeedState = Literal["connected", "reconnecting"]
StreamCallback = Callable[[CandleUpdate], Awaitable[None]]
OnRefused = Callable[[ExchangeRefused], Awaitable[None]]
"""Told that the exchange refuses a stream; returns when it is worth asking again."""

_Handle = TypeVar("_Handle", bound=IStreamHandle)
_Update = TypeVar("_Update")
_Key = TypeVar("_Key", bound=Hashable)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Running(Generic[_Handle]):
    """A stream that runs, since when (market ms), and whether it is to be started anew."""

    handle: _Handle
    since: int
    restart: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Tries:
    """How long a lost feed is left alone, and whose turn it is to try (real time)."""

    failures: int = 0
    next_at: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class FeedSupervisor:
    """Keeps the streams and order books of one exchange running.

    ``on_state`` is told ``reconnecting`` when the feed is lost and ``connected`` when data
    arrives again.
    """

    def __init__(
        self,
        client: IExchangeAPIClient,
        callback: StreamCallback,
        clock: IClock,
        *,
        on_state: Callable[[str, FeedState], None],
        rng: random.Random,
    ) -> None:
        self._client = client
        self._callback = callback
        self._clock = clock
        self._on_state = on_state
        self._rng = rng
        self._exchange = client.get_exchange_name()
        self._state: FeedState | None = None
        self._tries = _Tries()
        self._heard = asyncio.Event()
        self._connected_at = clock.monotonic()
        self._last_data_ms = clock.now_ms()
        self._last_data_real = clock.monotonic()
        # Several targets may mean one market; each holds its streams by handles of its own.
        self._candles: dict[tuple[str, str], list[_Running[IStreamHandle]]] = {}
        self._books: dict[str, list[_Running[IOrderBookHandle]]] = {}
        self._book_times: dict[str, int] = {}
        self._others: dict[tuple[str, str], list[_Running[IStreamHandle]]] = {}
        self._streams = 0
        self._wanted = 0
        self._silent_since = clock.monotonic()
        self._losses = 0
        self._reconnects = 0
        self._stream_failures = 0

    @property
    def status(self) -> FeedStatus:
        """How the feed does at this moment."""
        listens = self._wanted > 0 and (self._streams > 0 or self._is_lost)
        return FeedStatus(
            exchange=self._exchange,
            state=(self._state or "starting") if self._wanted else "idle",
            lag_s=self._clock.monotonic() - self._silent_since if listens else None,
            streams=self._streams,
            losses=self._losses,
            reconnects=self._reconnects,
            stream_failures=self._stream_failures,
        )

    @property
    def state(self) -> FeedState | None:
        """``connected`` once data has arrived, ``reconnecting`` after a loss, None before."""
        return self._state

    def note_data(self) -> None:
        """Data of any market of the exchange has arrived."""
        self._listen_from_now()
        self._silent_since = self._last_data_real
        if self._state == "connected":
            return
        if self._state == "reconnecting":
            self._reconnects += 1
            log.info("feed_restored", exchange=self._exchange)
        self._state = "connected"
        self._connected_at = self._last_data_real
        self._heard.set()
        self._on_state(self._exchange, "connected")

    def book(self, market: str) -> OrderBook | None:
        """The top of the market's live book, or None."""
        snapshots = (item.handle.snapshot() for item in self._books.get(market, ()))
        return next((book for book in snapshots if book is not None), None)

    @property
    def heard_at(self) -> int:
        """When (market ms) anything was heard of the exchange last."""
        return self._last_data_ms

    def heard_since(self, market: str, interval: str) -> int | None:
        """Since when (market ms) every candle stream of the market has run, or None."""
        running = self._candles.get((market, interval), ())
        return max((item.since for item in running), default=None)

    def restart_candles(self, market: str, interval: str) -> None:
        """Subscribe anew to a market whose stream is silent though others speak."""
        for item in self._candles.get((market, interval), ()):
            item.restart.set()

    async def keep_candles(self, market: str, interval: str, *, on_refused: OnRefused) -> None:
        """Keep one candle stream running until cancelled."""
        await self._keep(
            lambda: self._client.start_realtime_stream(market, interval, self._callback),
            self._candles,
            (market, interval),
            on_refused=on_refused,
        )

    async def keep_book(
        self, market: str, *, on_refused: OnRefused, on_change: OnBookChange | None = None
    ) -> None:
        """Keep one order book running until cancelled."""
        await self._keep(
            lambda: self._client.start_order_book_stream(market, on_change=on_change),
            self._books,
            market,
            on_refused=on_refused,
        )

    async def keep_trades(
        self, market: str, callback: TradesCallback, *, on_refused: OnRefused
    ) -> None:
        """Keep one trade stream running until cancelled."""
        await self._keep(
            lambda: self._client.start_trade_stream(market, self._heard_before(callback)),
            self._others,
            ("trades", market),
            on_refused=on_refused,
        )

    async def keep_ticker(
        self, market: str, callback: TickerCallback, *, on_refused: OnRefused
    ) -> None:
        """Keep one ticker stream running until cancelled."""
        await self._keep(
            lambda: self._client.start_ticker_stream(market, self._heard_before(callback)),
            self._others,
            ("ticker", market),
            on_refused=on_refused,
        )

    async def watch(self) -> None:
        """Judge the feed until cancelled."""
        while True:
            await self._clock.sleep_until(self._clock.now_ms() + RHYTHM_MS // 4)
            await self._clock.sleep_real(RHYTHM_REAL_S / 4)
            self._hear_books()
            if self._streams and self._is_mute():
                self._lose("no data though the connection stands")
                self._listen_from_now()
                await self._client.reset_connections()

    # -- inside -----------------------------------------------------------------------------

    @property
    def _is_lost(self) -> bool:
        return self._state == "reconnecting"

    def _listen_from_now(self) -> None:
        self._last_data_ms = self._clock.now_ms()
        self._last_data_real = self._clock.monotonic()

    def _is_mute(self) -> bool:
        return (
            self._clock.now_ms() - self._last_data_ms > RHYTHM_MS
            and self._clock.monotonic() - self._last_data_real > RHYTHM_REAL_S
        )

    def _heard_before(
        self, callback: Callable[[_Update], Awaitable[None]]
    ) -> Callable[[_Update], Awaitable[None]]:
        async def heard(update: _Update) -> None:
            self.note_data()
            await callback(update)

        return heard

    def _hear_books(self) -> None:
        books = ((market, self.book(market)) for market in self._books)
        times = {market: book.timestamp for market, book in books if book is not None}
        if any(time != self._book_times.get(market) for market, time in times.items()):
            self.note_data()
        self._book_times = times

    async def _keep(
        self,
        start: Callable[[], Awaitable[_Handle]],
        running: dict[_Key, list[_Running[_Handle]]],
        key: _Key,
        *,
        on_refused: OnRefused,
    ) -> None:
        self._wanted += 1
        try:
            await self._restart_for_ever(start, running, key, on_refused=on_refused)
        finally:
            self._wanted -= 1

    async def _restart_for_ever(
        self,
        start: Callable[[], Awaitable[_Handle]],
        running: dict[_Key, list[_Running[_Handle]]],
        key: _Key,
        *,
        on_refused: OnRefused,
    ) -> None:
        failures = 0
        while True:
            started = self._clock.monotonic()
            try:
                async with AsyncExitStack() as stack:
                    async with self._turn():
                        handle = await start()
                        stack.push_async_callback(_stop, handle)
                        item = stack.enter_context(self._counted(handle, running, key))
                        if self._is_lost:
                            await self._prove(handle)
                    await first_of(handle.wait(), item.restart.wait())
            except ExchangeRefused as exc:
                failures = 0
                await on_refused(exc)
            except DataServiceError as exc:
                self._stream_failures += 1
                if self._clock.monotonic() - started > HEALTHY_AFTER_S:
                    failures = 0
                if self._streams == 0:
                    self._lose(exc.message, retry_after=exc.retry_after)
                if not self._is_lost:
                    if failures == 1:
                        log.warning(
                            "stream_fails", exchange=self._exchange, stream=key, why=exc.message
                        )
                    await self._clock.sleep_real(self._pause(failures, exc.retry_after))
                failures += 1

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Held while a stream is started: while the feed is lost by one at a time, not too soon."""
        if not self._is_lost:
            yield
            return
        async with self._tries.turn:
            pause = self._tries.next_at - self._clock.monotonic()
            if self._is_lost and pause > 0:
                await first_of(self._clock.sleep_real(pause), self._heard.wait())
            try:
                yield
            except ExchangeRefused:
                raise
            except DataServiceError as exc:
                self._put_off(exc.retry_after)
                raise

    async def _prove(self, handle: IStreamHandle) -> None:
        """Wait for a sign of life of a feed that was lost, or for the end of the stream."""

        async def listen() -> None:
            while self._is_lost:
                self._hear_books()
                await self._clock.sleep_real(LISTEN_EVERY_S)

        await first_of(handle.wait(), self._heard.wait(), listen(), self._clock.sleep_real(PROBE_S))

    @contextmanager
    def _counted(
        self, handle: _Handle, running: dict[_Key, list[_Running[_Handle]]], key: _Key
    ) -> Iterator[_Running[_Handle]]:
        if self._streams == 0:
            # Silence is counted from the moment that there is something to hear.
            self._listen_from_now()
            if not self._is_lost:
                self._silent_since = self._last_data_real
        item = _Running(handle, self._clock.now_ms())
        running.setdefault(key, []).append(item)
        self._streams += 1
        try:
            yield item
        finally:
            self._streams -= 1
            running[key].remove(item)
            if not running[key]:
                del running[key]

    def _lose(self, why: str, *, retry_after: float | None = None) -> None:
        if self._is_lost:
            return
        self._losses += 1
        log.warning("feed_lost", exchange=self._exchange, why=why)
        if self._clock.monotonic() - self._connected_at > HEALTHY_AFTER_S:
            self._tries.failures = 0
        self._put_off(retry_after)
        self._heard.clear()
        self._state = "reconnecting"
        self._on_state(self._exchange, "reconnecting")

    def _put_off(self, retry_after: float | None) -> None:
        """Leave a lost feed alone for a while."""
        pause = self._pause(self._tries.failures, retry_after)
        self._tries.next_at = self._clock.monotonic() + pause
        self._tries.failures += 1

    def _pause(self, failures: int, retry_after: float | None) -> float:
        """Real seconds until the next try."""
        return back_off_s(
            failures,
            first_s=FIRST_PAUSE_S,
            longest_s=LONGEST_PAUSE_S,
            rng=self._rng,
            asked_for_s=retry_after,
        )


async def _stop(handle: IStreamHandle) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await handle.stop()
