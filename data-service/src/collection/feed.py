"""The feed supervisor of one exchange: starts its streams, and judges whether they are alive.

A feed is alive when data arrives within its rhythm; pings prove nothing. A stream that ends is
started again with a growing, jittered pause; a feed that has gone mute has its connections closed,
so that each of its streams ends and is started anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Literal

import structlog

from domain.candle import CandleUpdate
from domain.clock import IClock
from domain.order_book import OrderBook
from errors import DataServiceError
from exchange_source.interfaces import (
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
)

# A feed of live markets that is silent this long is not alive: market ms, and at least real
# seconds, because on a fast market clock the network is as slow as ever.
RHYTHM_MS: Final = 60_000
RHYTHM_REAL_S: Final = 10.0
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0
# A stream that lived this long starts its back-off anew.
HEALTHY_AFTER_S: Final = 30.0
STOP_TIMEOUT_S: Final = 5.0

FeedState = Literal["connected", "reconnecting"]
StreamCallback = Callable[[CandleUpdate], Awaitable[None]]

log = structlog.get_logger(__name__)


class FeedSupervisor:
    """Keeps the candle streams and order books of one exchange running.

    ``on_state`` is told ``reconnecting`` when the feed is lost and ``connected`` when data
    arrives again; ``on_reconnect`` of a market after its stream came back.
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
        self._last_data_ms = clock.now_ms()
        self._last_data_real = clock.monotonic()
        # Several targets may mean one market; each holds the book by a handle of its own.
        self._books: dict[str, list[IOrderBookHandle]] = {}
        self._book_times: dict[str, int] = {}
        self._streams = 0

    @property
    def state(self) -> FeedState | None:
        """``connected`` once data has arrived, ``reconnecting`` after a loss, None before."""
        return self._state

    def note_data(self) -> None:
        """Data of any market of the exchange has arrived."""
        self._last_data_ms = self._clock.now_ms()
        self._last_data_real = self._clock.monotonic()
        if self._state != "connected":
            if self._state == "reconnecting":
                log.info("feed_restored", exchange=self._exchange)
            self._state = "connected"
            self._on_state(self._exchange, "connected")

    def book(self, market: str) -> OrderBook | None:
        """The top of the market's live book, or None."""
        snapshots = (handle.snapshot() for handle in self._books.get(market, ()))
        return next((book for book in snapshots if book is not None), None)

    async def keep_candles(
        self, market: str, interval: str, on_reconnect: Callable[[], None]
    ) -> None:
        """Keep one candle stream running until cancelled."""

        async def start() -> IStreamHandle:
            return await self._client.start_realtime_stream(market, interval, self._callback)

        self._streams += 1
        # Silence is counted from the moment that there is something to hear.
        self._last_data_ms = self._clock.now_ms()
        self._last_data_real = self._clock.monotonic()
        try:
            await self._keep(start, on_reconnect, market=market)
        finally:
            self._streams -= 1

    async def keep_book(self, market: str) -> None:
        """Keep one order book running until cancelled."""

        own: list[IOrderBookHandle] = []

        def forget() -> None:
            handles = self._books.get(market, [])
            handles[:] = [handle for handle in handles if handle not in own]
            own.clear()
            if not handles:
                self._books.pop(market, None)
                self._book_times.pop(market, None)

        async def start() -> IStreamHandle:
            forget()
            handle = await self._client.start_order_book_stream(market)
            own.append(handle)
            self._books.setdefault(market, []).append(handle)
            return handle

        try:
            await self._keep(start, lambda: None, market=market)
        finally:
            forget()

    async def watch(self) -> None:
        """Judge the feed until cancelled."""
        while True:
            await self._clock.sleep_until(self._clock.now_ms() + RHYTHM_MS // 4)
            await self._clock.sleep_real(RHYTHM_REAL_S / 4)
            self._hear_books()
            if self._streams and self._is_mute():
                self._lost("no data though the connection stands")
                self._last_data_ms = self._clock.now_ms()
                self._last_data_real = self._clock.monotonic()
                await self._client.reset_connections()

    def _is_mute(self) -> bool:
        return (
            self._clock.now_ms() - self._last_data_ms > RHYTHM_MS
            and self._clock.monotonic() - self._last_data_real > RHYTHM_REAL_S
        )

    def _hear_books(self) -> None:
        for market in list(self._books):
            book = self.book(market)
            if book is not None and book.timestamp != self._book_times.get(market):
                self._book_times[market] = book.timestamp
                self.note_data()

    async def _keep(
        self,
        start: Callable[[], Awaitable[IStreamHandle]],
        on_reconnect: Callable[[], None],
        *,
        market: str,
    ) -> None:
        failures = 0
        while True:
            started = self._clock.monotonic()
            try:
                handle = await start()
                try:
                    if failures:
                        on_reconnect()
                    await handle.wait()
                finally:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(STOP_TIMEOUT_S):
                            await handle.stop()
            except DataServiceError as exc:
                self._lost(exc.message, market=market)
                if self._clock.monotonic() - started > HEALTHY_AFTER_S:
                    failures = 0
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, 16))
                failures += 1
                await self._clock.sleep_real(
                    max(pause * self._rng.uniform(0.75, 1.25), exc.retry_after or 0.0)
                )

    def _lost(self, why: str, *, market: str | None = None) -> None:
        if self._state == "reconnecting":
            return
        log.warning("feed_lost", exchange=self._exchange, market=market, why=why)
        self._state = "reconnecting"
        self._on_state(self._exchange, "reconnecting")
