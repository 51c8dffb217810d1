"""Coinbase's Advanced Trade WebSocket: connections, what they subscribe to, and the feeds behind.

A client sends ``{type, channel, product_ids}`` and is told in a ``subscriptions`` frame what it has
now. Each product begins with a snapshot, which updates follow. Frames are numbered for each
connection. A channel without an update for a while is closed without a word, unless the client
has ``heartbeats`` too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from aiohttp import WSMsgType, web

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from sandbox import coinbase_messages as messages
from sandbox.coinbase_messages import EventType, Product
from sandbox.prices import Trade
from sandbox.sockets import BookFeed, CandleFeed, Feed, Hub, Socket, TickerFeed, TradeFeed
from sandbox.venue import Ticker, Venue

MESSAGE_LIMIT: Final = 64 * 1024
# The only candles that are streamed.
_CANDLES: Final = Interval.parse("5m")
_BOOK_LEVELS: Final = 200
_BATCH_RHYTHM_MS: Final = 5_000
_STATUS_RHYTHM_MS: Final = 5_000
_HEARTBEATS: Final = "heartbeats"
_PRIVATE: Final = ("user", "futures_balance_summary")

_Maker = Callable[[Product, str], Feed]


@dataclass(frozen=True, slots=True)
class CoinbaseTimes:
    """How patient a connection is, in real seconds.

    Heartbeats come every ``heartbeat_s``, which is also how often the rest is looked at. Who has
    subscribed to nothing within ``subscribe_within_s`` is dropped; a channel that was told nothing
    for ``quiet_channel_s`` is closed.
    """

    heartbeat_s: float = 1.0
    subscribe_within_s: float = 5.0
    quiet_channel_s: float = 75.0


class _Refused(Exception):
    """A message that cannot be followed."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(slots=True)
class _Connection:
    """One client: the products of each channel that it has, and the heartbeats it was sent."""

    socket: Socket
    channels: dict[str, dict[str, Product]] = field(default_factory=dict)
    has_subscribed: bool = False
    heartbeats: int = 0


class StatusFeed(Feed):
    """What state a product is in, every few seconds."""

    def __init__(
        self, venue: Venue, product: Product, key: str, encode: Callable[[EventType], str]
    ) -> None:
        super().__init__(venue, product.instrument, key, "status")
        self._encode = encode

    def first(self) -> Sequence[str]:
        return [self._encode("snapshot")]

    def next_tick(self, now: int) -> int:
        return now + self.pace(_STATUS_RHYTHM_MS)

    def tick(self, now: int) -> Sequence[str]:  # noqa: ARG002 - no state depends on the time
        return [self._encode("update")]


class CoinbaseStreams:
    """Serves the public channels of ``products``, which are the venue's markets by id."""

    def __init__(
        self, venue: Venue, hub: Hub, products: Mapping[str, Product], times: CoinbaseTimes
    ) -> None:
        self._venue = venue
        self._hub = hub
        self._products = products
        self._times = times
        self._makers: Mapping[str, _Maker] = {
            "candles": self._candles,
            "market_trades": self._trades,
            "ticker": self._ticker,
            "ticker_batch": self._ticker_batch,
            "level2": self._level2,
            "status": self._status,
        }

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Serve one connection until it ends."""
        ws = web.WebSocketResponse(max_msg_size=MESSAGE_LIMIT, timeout=2.0, compress=False)
        await ws.prepare(request)
        async with self._hub.connected(request, ws, messages.numbering()) as socket:
            connection = _Connection(socket)
            watching = asyncio.create_task(self._watch(connection))
            try:
                async for message in ws:
                    socket.last_heard = self._venue.clock.monotonic()
                    if message.type != WSMsgType.TEXT:
                        break
                    self._on_message(connection, message.data)
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        return ws

    async def _watch(self, connection: _Connection) -> None:
        clock = self._venue.clock
        opened = clock.monotonic()
        while True:
            await clock.sleep_real(self._times.heartbeat_s)
            waited = clock.monotonic() - opened
            if not connection.has_subscribed and waited >= self._times.subscribe_within_s:
                connection.socket.abort()
            if _HEARTBEATS in connection.channels:
                self._send_heartbeat(connection)
            else:
                self._close_quiet_channels(connection)

    def _send_heartbeat(self, connection: _Connection) -> None:
        clock = self._venue.clock
        event = messages.heartbeat_event(clock.now_ms(), clock.monotonic(), connection.heartbeats)
        connection.heartbeats += 1
        text = messages.frame(_HEARTBEATS, clock.now_ms(), event)
        self._hub.deliver(connection.socket, text, channel="heartbeat")

    def _close_quiet_channels(self, connection: _Connection) -> None:
        quiet_since = self._venue.clock.monotonic() - self._times.quiet_channel_s
        for channel, products in list(connection.channels.items()):
            told = (connection.socket.told[_key(channel, product)] for product in products.values())
            if max(told) < quiet_since:
                self._unsubscribe(connection, channel, list(products))

    def _on_message(self, connection: _Connection, text: str) -> None:
        try:
            kind, channel, names = _parsed(text)
            if kind == "subscribe":
                self._subscribe(connection, channel, names)
            else:
                known = connection.channels.get(channel, {})
                self._unsubscribe(connection, channel, names or list(known))
        except _Refused as exc:
            connection.socket.send(messages.error(exc.message))
            return
        event = messages.subscriptions_event(
            {name: list(ids) or [name] for name, ids in connection.channels.items()}
        )
        now = self._venue.clock.now_ms()
        connection.socket.send(messages.frame("subscriptions", now, event))

    def _subscribe(self, connection: _Connection, channel: str, names: Sequence[str]) -> None:
        if channel in _PRIVATE:
            raise _Refused("authentication failure")
        if channel == _HEARTBEATS:
            connection.channels.setdefault(channel, {})
            connection.has_subscribed = True
            return
        make = self._makers.get(channel)
        if make is None:
            raise _Refused(f"channel {channel} is not supported")
        if not names:
            raise _Refused(f"channel {channel} requires product_ids")
        wanted = [self._product(name, channel) for name in names]
        for product in wanted:
            key = _key(channel, product)
            source = self._products[product.told_as]
            if not self._hub.subscribe(connection.socket, key, _made(make, source, key)):
                raise _Refused("too many subscriptions")
            connection.channels.setdefault(channel, {})[product.id] = product
            connection.has_subscribed = True

    def _unsubscribe(self, connection: _Connection, channel: str, names: Sequence[str]) -> None:
        products = connection.channels.get(channel)
        if products is None:
            return
        gone = [products.pop(name) for name in names if name in products]
        # A product may still be told under another name.
        kept = {_key(channel, product) for product in products.values()}
        for product in gone:
            if _key(channel, product) not in kept:
                self._hub.unsubscribe(connection.socket, _key(channel, product))
        if not products:
            del connection.channels[channel]

    def _product(self, name: str, channel: str) -> Product:
        product = self._products.get(name)
        if product is None or not self._venue.is_listed(product.instrument):
            raise _Refused(f"{name} is not a valid product")
        if channel == "candles" and not self._venue.prices.offers(product.instrument, _CANDLES):
            raise _Refused(f"{name} has no candles of {_CANDLES}")
        return product

    def _candles(self, product: Product, key: str) -> Feed:
        def encoded(kind: EventType) -> Callable[[Sequence[Candle]], str]:
            return lambda candles: self._frame(
                "candles", messages.candles_event(kind, product.id, candles)
            )

        return CandleFeed(
            self._venue,
            product.instrument,
            key,
            _CANDLES,
            encoded("update"),
            encode_first=encoded("snapshot"),
        )

    def _trades(self, product: Product, key: str) -> Feed:
        def encoded(kind: EventType) -> Callable[[Sequence[Trade]], str]:
            return lambda trades: self._frame(
                "market_trades", messages.trades_event(kind, product.id, trades)
            )

        return TradeFeed(
            self._venue,
            product.instrument,
            key,
            encoded("update"),
            encode_first=encoded("snapshot"),
        )

    def _ticker(self, product: Product, key: str) -> Feed:
        return TickerFeed(
            self._venue,
            product.instrument,
            key,
            self._ticker_frames("ticker", "update", product, with_book=True),
            encode_first=self._ticker_frames("ticker", "snapshot", product, with_book=True),
            when_traded=True,
        )

    def _ticker_batch(self, product: Product, key: str) -> Feed:
        return TickerFeed(
            self._venue,
            product.instrument,
            key,
            self._ticker_frames("ticker_batch", "update", product, with_book=False),
            encode_first=self._ticker_frames("ticker_batch", "snapshot", product, with_book=False),
            rhythm_ms=_BATCH_RHYTHM_MS,
            when_traded=True,
        )

    def _ticker_frames(
        self, channel: str, kind: EventType, product: Product, *, with_book: bool
    ) -> Callable[[Ticker], str]:
        return lambda ticker: self._frame(
            channel, messages.ticker_event(kind, product.id, ticker, with_book=with_book)
        )

    def _level2(self, product: Product, key: str) -> Feed:
        def whole(book: OrderBook, _: int) -> str:
            event = messages.level2_event(
                "snapshot", product.id, book.bids, book.asks, book.timestamp
            )
            return messages.frame("l2_data", book.timestamp, event)

        def changes(
            bids: Sequence[Level], asks: Sequence[Level], at_ms: int, _number: int, _before: int
        ) -> str:
            event = messages.level2_event("update", product.id, bids, asks, at_ms)
            return messages.frame("l2_data", at_ms, event)

        return BookFeed(self._venue, product.instrument, key, _BOOK_LEVELS, whole, changes)

    def _status(self, product: Product, key: str) -> Feed:
        def encoded(kind: EventType) -> str:
            return self._frame("status", messages.status_event(kind, product))

        return StatusFeed(self._venue, product, key, encoded)

    def _frame(self, channel: str, event: Mapping[str, Any]) -> str:
        return messages.frame(channel, self._venue.clock.now_ms(), event)


def _key(channel: str, product: Product) -> str:
    return f"{channel} {product.told_as}"


def _made(make: _Maker, product: Product, key: str) -> Callable[[], Feed]:
    return lambda: make(product, key)


def _parsed(text: str) -> tuple[str, str, list[str]]:
    """The type, the channel and the product ids of a message."""
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise _Refused("message is no valid JSON") from exc
    if not isinstance(message, dict):
        raise _Refused("message must be an object")
    kind, channel = message.get("type"), message.get("channel")
    if kind not in ("subscribe", "unsubscribe"):
        raise _Refused("type must be subscribe or unsubscribe")
    if not isinstance(channel, str) or not channel:
        raise _Refused("channel is required")
    names = message.get("product_ids", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Refused("product_ids must be a list of product ids")
    return kind, channel, names
