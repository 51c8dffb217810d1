"""WebSockets and the feeds that fill them, whatever the protocol.

A feed exists once for all its subscribers and is paced by market time: every frame is encoded
once. What differs from client to client, such as a number, is put in as a frame is sent. Each
socket has a bounded outbox; a client that reads too slowly is dropped. Guarantees: frames of one
feed arrive in order; no closed period that has a candle is skipped, unless a fault asks for it. A
feed that nobody listens to does not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

from aiohttp import web

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from domain.time_range import TimeRange
from sandbox.faults import Fault
from sandbox.prices import Instrument, Trade
from sandbox.venue import Ticker, Venue

_OUTBOX: Final = 2_000
_SEND_TIMEOUT_S: Final = 20.0
# Frames of one channel are never closer than this, in real ms.
_CLOSEST_MS: Final = 100
_RHYTHM_MS: Final = 1_000
_BOOK_RHYTHM_MS: Final = 500
# A period shorter than this in real ms shares its frame with its neighbours.
_SHORT_PERIOD_MS: Final = 500
_CANDLES_A_FRAME: Final = 50
_TRADES_A_FRAME: Final = 200
_FIRST_TRADES: Final = 10
_MOST_CHANNELS: Final = 400

_log = logging.getLogger(__name__)


class Feed(ABC):
    """One channel: what to send to a new subscriber, and what at each tick to all of them.

    Of a feed that ``is_chained`` each frame after the first names the one before it, so that a
    reader notices when one is left out.
    """

    def __init__(self, venue: Venue, instrument: Instrument, key: str, channel: str) -> None:
        self.venue = venue
        self.instrument = instrument
        self.key = key
        self.channel = channel
        self.timeframe: str | None = None
        self.is_chained = False

    @abstractmethod
    def first(self) -> Sequence[str]:
        """The frames that a new subscriber starts with."""

    @abstractmethod
    def tick(self, now: int) -> Sequence[str]:
        """The frames of this moment; ``now`` is in market ms."""

    def next_tick(self, now: int) -> int:
        """When the next tick is due, in market ms."""
        return now + self.pace(_RHYTHM_MS)

    def pace(self, rhythm_ms: int) -> int:
        """``rhythm_ms`` of market time, or longer where that would be too fast in real time."""
        return max(rhythm_ms, int(_CLOSEST_MS * self.venue.clock.speed))


class CandleFeed(Feed):
    """Forming candles about every ``rhythm_ms``, the final state at each close, then the next.

    ``encode`` makes a frame of candles that follow each other. With ``encode_final`` each final
    candle has a frame of its own, which that makes. A new subscriber starts with the forming
    candle; ``encode_first`` makes a frame of its own of that, also where nobody has traded yet.
    """

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        interval: Interval,
        encode: Callable[[Sequence[Candle]], str],
        *,
        encode_first: Callable[[Sequence[Candle]], str] | None = None,
        encode_final: Callable[[Candle], str] | None = None,
        rhythm_ms: int = _RHYTHM_MS,
    ) -> None:
        super().__init__(venue, instrument, key, "candlestick")
        self.timeframe = interval.name
        self._interval = interval
        self._encode = encode
        self._encode_first = encode_first
        self._encode_final = encode_final
        self._rhythm_ms = rhythm_ms
        self._period = interval.floor(venue.clock.now_ms())
        self._told: Candle | None = None

    def first(self) -> Sequence[str]:
        forming = self.venue.forming(self.instrument, self._interval, self.venue.clock.now_ms())
        if self._encode_first is not None:
            return [self._encode_first([forming] if forming else [])]
        return [self._encode([forming])] if forming else []

    def next_tick(self, now: int) -> int:
        paced = now + self.pace(self._rhythm_ms)
        if self._is_short:
            return paced
        return min(paced, self._interval.floor(now) + self._interval.milliseconds)

    def tick(self, now: int) -> Sequence[str]:
        current = self._interval.floor(now)
        # The exchange's clock may have been set back: what follows is then told again.
        self._period = min(self._period, current)
        closed = self.venue.closed(
            self.instrument, self._interval, TimeRange(self._period, current), now
        )
        closed = [candle for candle in closed if self._withheld() is None]
        self._period = current
        forming = self.venue.forming(self.instrument, self._interval, now)
        if forming == self._told or (forming is not None and self._is_near_withheld_end(now)):
            forming = None
        self._told = forming or self._told
        if self._encode_final is not None:
            finals = [self._encode_final(candle) for candle in closed]
            return [*finals, self._encode([forming])] if forming else finals
        candles = [*closed, forming] if forming else closed
        size = _CANDLES_A_FRAME if self._is_short or len(closed) > 2 else 1
        return [self._encode(candles[at : at + size]) for at in range(0, len(candles), size)]

    @property
    def _is_short(self) -> bool:
        return self._interval.milliseconds / self.venue.clock.speed < _SHORT_PERIOD_MS

    def _withheld(self) -> Fault | None:
        return self.venue.faults.take(
            "final_update_withheld", instrument=self.instrument.symbol, timeframe=self.timeframe
        )

    def _is_near_withheld_end(self, now: int) -> bool:
        """Whether an update now could already be the final state that a fault withholds."""
        length = self._interval.milliseconds
        if now - self._interval.floor(now) < 0.9 * length:
            return False
        acting = self.venue.faults.acting(
            "final_update_withheld", instrument=self.instrument.symbol, timeframe=self.timeframe
        )
        return next(acting, None) is not None


class TradeFeed(Feed):
    """Every trade once, in order, in frames of up to ``most_a_frame``; a new subscriber starts
    with the last ``backlog`` ones, in frames of their own kind where ``encode_first`` makes them.
    """

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        encode: Callable[[Sequence[Trade]], str],
        *,
        encode_first: Callable[[Sequence[Trade]], str] | None = None,
        backlog: int = _FIRST_TRADES,
        most_a_frame: int = _TRADES_A_FRAME,
    ) -> None:
        super().__init__(venue, instrument, key, "trade")
        self._encode = encode
        self._encode_first = encode_first or encode
        self._backlog = backlog
        self._most_a_frame = most_a_frame
        self._told_until = venue.clock.now_ms() + 1

    def first(self) -> Sequence[str]:
        part = TimeRange(0, self._told_until)
        trades = self.venue.trades(self.instrument, part, self._backlog) if self._backlog else []
        return self._frames(trades, self._encode_first)

    def tick(self, now: int) -> Sequence[str]:
        part = TimeRange(self._told_until, now + 1)
        self._told_until = now + 1
        return self._frames(self.venue.prices.trades(self.instrument, part), self._encode)

    def _frames(
        self, trades: Sequence[Trade], encode: Callable[[Sequence[Trade]], str]
    ) -> Sequence[str]:
        size = self._most_a_frame
        return [encode(trades[at : at + size]) for at in range(0, len(trades), size)]


class TickerFeed(Feed):
    """The ticker about every ``rhythm_ms``; ``when_traded`` only after somebody has.

    A new subscriber starts with one of its own kind where ``encode_first`` makes it.
    """

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        encode: Callable[[Ticker], str],
        *,
        encode_first: Callable[[Ticker], str] | None = None,
        rhythm_ms: int = _RHYTHM_MS,
        when_traded: bool = False,
    ) -> None:
        super().__init__(venue, instrument, key, "ticker")
        self._encode = encode
        self._encode_first = encode_first or encode
        self._rhythm_ms = rhythm_ms
        self._when_traded = when_traded
        self._told_until = venue.clock.now_ms() + 1

    def first(self) -> Sequence[str]:
        return [self._encode_first(self.venue.ticker(self.instrument))]

    def next_tick(self, now: int) -> int:
        return now + self.pace(self._rhythm_ms)

    def tick(self, now: int) -> Sequence[str]:
        since, self._told_until = self._told_until, now + 1
        if self._when_traded and not self.venue.prices.trades(
            self.instrument, TimeRange(since, now + 1)
        ):
            return []
        return [self._encode(self.venue.ticker(self.instrument))]


class BookFeed(Feed):
    """The order book: whole each time, or once whole and then what changed.

    ``encode_update`` takes the changed bids and asks (an amount of 0 removes a level), the
    moment, the number of this state and that of the one before. Numbers are market ms, so that
    they grow over restarts too.
    """

    def __init__(
        self,
        venue: Venue,
        instrument: Instrument,
        key: str,
        depth: int,
        encode: Callable[[OrderBook, int], str],
        encode_update: Callable[[Sequence[Level], Sequence[Level], int, int, int], str] | None,
    ) -> None:
        super().__init__(venue, instrument, key, "book")
        self._depth = depth
        self._encode = encode
        self._encode_update = encode_update
        self.is_chained = encode_update is not None
        self._book = venue.book(instrument, depth)
        self._number = self._book.timestamp

    def first(self) -> Sequence[str]:
        # Of the state that updates go on from, not of this moment.
        return [self._encode(self._book, self._number)]

    def next_tick(self, now: int) -> int:
        return now + self.pace(_BOOK_RHYTHM_MS)

    def tick(self, now: int) -> Sequence[str]:
        before, book = self._book, self.venue.book(self.instrument, self._depth)
        previous, number = self._number, max(self._number + 1, now)
        if self._encode_update is None:
            self._book, self._number = book, number
            return [self._encode(book, number)]
        bids = changed_levels(before.bids, book.bids)
        asks = changed_levels(before.asks, book.asks)
        if not bids and not asks:
            return []
        self._book, self._number = book, number
        return [self._encode_update(bids, asks, book.timestamp, number, previous)]


def changed_levels(before: Sequence[Level], after: Sequence[Level]) -> list[Level]:
    """What makes ``after`` of the side ``before``; an amount of 0 removes a level."""
    old, new = dict(before), dict(after)
    gone = [(price, 0.0) for price in old if price not in new]
    return gone + [(price, amount) for price, amount in after if old.get(price) != amount]


class Socket:
    """One client's WebSocket: channels, and an outbox that a task of its own empties.

    ``finish`` makes of a frame for all what this client gets: it is called once for each, in the
    order in which they are sent, and for those that are lost on their way too. ``told`` is when
    each channel had its last frame, or began, in real seconds.
    """

    def __init__(
        self,
        number: int,
        ws: web.WebSocketResponse,
        transport: Any,
        finish: Callable[[str], str] | None = None,
    ) -> None:
        self.number = number
        self.channels: set[str] = set()
        self.told: dict[str, float] = {}
        self.last_heard: float = 0.0
        self._finish = finish
        self._ws = ws
        self._transport = transport
        self._outbox: asyncio.Queue[str] = asyncio.Queue(_OUTBOX)

    @property
    def is_numbered(self) -> bool:
        """Whether its client can tell that a frame was lost."""
        return self._finish is not None

    def send(self, text: str, *, broken: bool = False) -> bool:
        """Queue a frame, or but half of it where it is ``broken``.

        A client that lets its outbox run full is dropped (False).
        """
        text = self._finished(text)
        if broken:
            text = text[: len(text) // 2]
        try:
            self._outbox.put_nowait(text)
        except asyncio.QueueFull:
            self.abort()
            return False
        return True

    def lose(self, text: str) -> None:
        """Let a frame be lost on its way: the client misses it, its number is used up."""
        self._finished(text)

    def abort(self) -> None:
        """Break the TCP connection now, without a closing handshake."""
        if self._transport is not None:
            self._transport.abort()

    async def write(self) -> None:
        """Send what is queued until the connection ends or a send takes too long."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                text = await self._outbox.get()
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await self._ws.send_str(text)
        self.abort()

    def _finished(self, text: str) -> str:
        return text if self._finish is None else self._finish(text)


class Hub:
    """Every open socket and running feed of the exchange."""

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._numbers = itertools.count(1)
        self._sockets: dict[int, Socket] = {}
        self._feeds: dict[str, Feed] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._subscribers: dict[str, set[Socket]] = {}
        self.sockets_opened = 0
        self.sockets_dropped_slow = 0
        self.frames_sent = 0
        venue.faults.on_added(self._on_fault)

    @property
    def open_sockets(self) -> int:
        return len(self._sockets)

    @property
    def running_feeds(self) -> dict[str, int]:
        """The subscribers of each running feed."""
        return {key: len(sockets) for key, sockets in sorted(self._subscribers.items())}

    @contextlib.asynccontextmanager
    async def connected(
        self,
        request: web.Request,
        ws: web.WebSocketResponse,
        finish: Callable[[str], str] | None = None,
    ) -> Any:
        """The socket of ``ws``, which was prepared, for as long as it is open."""
        socket = Socket(next(self._numbers), ws, request.transport, finish)
        socket.last_heard = self._venue.clock.monotonic()
        self._sockets[socket.number] = socket
        self.sockets_opened += 1
        writer = asyncio.create_task(socket.write())
        try:
            yield socket
        finally:
            del self._sockets[socket.number]
            for key in list(socket.channels):
                self.unsubscribe(socket, key)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def subscribe(
        self, socket: Socket, key: str, make: Callable[[], Feed], *, most: int = _MOST_CHANNELS
    ) -> bool:
        """Let ``socket`` have the feed ``key``; False when it has ``most`` already."""
        if key in socket.channels:
            return True
        if len(socket.channels) >= most:
            return False
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = make()
            self._subscribers[key] = set()
            task = self._tasks[key] = asyncio.create_task(self._run(feed), name=f"feed {key}")
            task.add_done_callback(lambda done: self._on_feed_ended(key, done))
        self._subscribers[key].add(socket)
        socket.channels.add(key)
        socket.told[key] = self._venue.clock.monotonic()
        for text in feed.first():
            self._tell(feed, socket, text, chained=False)
        return True

    def unsubscribe(self, socket: Socket, key: str) -> None:
        """Take the feed ``key`` from ``socket``; one that nobody has any more is stopped."""
        socket.channels.discard(key)
        socket.told.pop(key, None)
        listening = self._subscribers.get(key)
        if listening is None:
            return
        listening.discard(socket)
        if not listening:
            del self._subscribers[key], self._feeds[key]
            self._tasks.pop(key).cancel()

    async def close(self) -> None:
        """Stop every feed and break every connection."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for socket in list(self._sockets.values()):
            socket.abort()

    async def _run(self, feed: Feed) -> None:
        clock = self._venue.clock
        while True:
            # Bounded, so that a clock that was set back or forth is noticed soon.
            await clock.sleep_until(feed.next_tick(clock.now_ms()))
            for text in feed.tick(clock.now_ms()):
                for socket in list(self._subscribers[feed.key]):
                    self._tell(feed, socket, text, chained=feed.is_chained)

    def _tell(self, feed: Feed, socket: Socket, text: str, *, chained: bool) -> None:
        if not self._venue.is_listed(feed.instrument):
            return
        socket.told[feed.key] = self._venue.clock.monotonic()
        self.deliver(
            socket,
            text,
            channel=feed.channel,
            instrument=feed.instrument.symbol,
            timeframe=feed.timeframe,
            chained=chained,
        )

    def deliver(
        self,
        socket: Socket,
        text: str,
        *,
        channel: str,
        instrument: str | None = None,
        timeframe: str | None = None,
        chained: bool = False,
    ) -> None:
        """Send a frame to ``socket`` as far as the faults for what has these names let it through.

        A frame that is ``chained`` to the one before, or numbered, may be left out as a gap.
        """
        names = {"instrument": instrument, "timeframe": timeframe, "channel": channel}
        take = self._venue.faults.take
        is_in_sequence = chained or socket.is_numbered
        if take("mute_sockets", **names) is not None or (
            is_in_sequence and take("ws_sequence_gap", **names) is not None
        ):
            socket.lose(text)
        elif socket.send(text, broken=take("ws_broken_frame", **names) is not None):
            self.frames_sent += 1
        else:
            self.sockets_dropped_slow += 1

    def _on_feed_ended(self, key: str, done: asyncio.Task[None]) -> None:
        if done.cancelled() or done.exception() is None:
            return
        _log.error("feed %s failed", key, exc_info=done.exception())
        for socket in list(self._subscribers.get(key, ())):
            socket.abort()

    def _on_fault(self, fault: Fault) -> None:
        if fault.kind != "drop_sockets":
            return
        for socket in list(self._sockets.values())[: fault.count]:
            socket.abort()
            fault.hits += 1
        fault.cleared.set()
