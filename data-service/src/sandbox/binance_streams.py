"""Binance's WebSocket streams: connections, what they subscribe to, and the feeds behind.

Streams are named in the address (``/ws/btcusdt@trade``, ``/stream?streams=a/b``) or asked for by
``SUBSCRIBE``. Below ``/stream`` each event comes in an envelope that names its stream. What does
not exist is subscribed to like anything else and stays silent.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from aiohttp import WSMsgType, web

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from domain.time_range import TimeRange
from sandbox import binance_messages as messages
from sandbox.binance_books import BookStates, DepthFeed, TopFeed
from sandbox.prices import DAY_MS, Instrument, Trade
from sandbox.sockets import CandleFeed, Feed, Hub, Socket, TickerFeed, TradeFeed
from sandbox.venue import Ticker, Venue

INTERVALS: Final = frozenset(
    ("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w")
)
_MOST_STREAMS: Final = 1_024
_MOST_MESSAGES_A_SECOND: Final = 5
_MESSAGE_LIMIT: Final = 64 * 1024
_PONG_TIMEOUT_S: Final = 5.0
_KLINE_RHYTHM_MS: Final = 2_000
_HOUR_MS: Final = 3_600_000
# The number that ccxt gives a connection is no stream.
_CONNECTION_NUMBER: Final = re.compile(r"[0-9]+")
_STREAM: Final = re.compile(
    r"(?P<symbol>[a-z0-9]+)@("
    r"(?P<kind>trade|aggTrade|ticker|miniTicker|bookTicker)"
    r"|kline_(?P<interval>[0-9]+[a-zA-Z])"
    r"|(?P<book>depth(?P<depth>5|10|20)?(@(?P<rhythm>100|1000)ms)?))"
)
_METHODS: Final = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS")
_INVALID_REQUEST: Final = 2
_INVALID_JSON: Final = 3

_Encode = Callable[[Any], str]


class _Refused(Exception):
    """A message that is no request; ``code`` is Binance's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class _Connection:
    """One client: the streams it asked for, in that order, each with its feed or None."""

    socket: Socket
    combined: bool
    streams: dict[str, str | None] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=deque)


class BinanceStreams:
    """Serves the sockets of ``venue``; books are told in the numbering of ``states``.

    A client is asked for a sign of life by a ping every ``heartbeat_s`` real seconds and dropped
    when it does not answer within half of that; so is one that sends more than five messages a
    second (answers to pings are none) or wants more than 1024 streams.
    """

    def __init__(
        self, venue: Venue, hub: Hub, states: BookStates, *, heartbeat_s: float = 30.0
    ) -> None:
        self._venue = venue
        self._hub = hub
        self._states = states
        self._heartbeat_s = heartbeat_s
        self._instruments = {
            messages.symbol_of(item).lower(): item for item in venue.instruments() if item.spot
        }

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Serve one connection until it ends."""
        # Pings of the client are answered below, where they count as messages.
        ws = web.WebSocketResponse(
            max_msg_size=_MESSAGE_LIMIT,
            timeout=2.0,
            compress=False,
            autoping=False,
            heartbeat=self._heartbeat_s,
        )
        await ws.prepare(request)
        combined = request.path.startswith("/stream")
        named = request.query.get("streams", "") if combined else request.match_info.get("names")
        async with self._hub.connected(request, ws) as socket:
            connection = _Connection(socket, combined)
            for name in filter(None, (named or "").split("/")):
                if combined or _CONNECTION_NUMBER.fullmatch(name) is None:
                    self._subscribe(connection, name)
            async for message in ws:
                socket.last_heard = self._venue.clock.monotonic()
                if message.type == WSMsgType.PONG:
                    continue
                if not self._is_paced(connection):
                    socket.abort()
                    break
                if message.type == WSMsgType.PING:
                    async with asyncio.timeout(_PONG_TIMEOUT_S):
                        await ws.pong(message.data)
                elif message.type == WSMsgType.TEXT:
                    self._on_message(connection, message.data)
                else:
                    break
        return ws

    def _is_paced(self, connection: _Connection) -> bool:
        now = self._venue.clock.monotonic()
        recent = connection.recent
        while recent and recent[0] <= now - 1:
            recent.popleft()
        recent.append(now)
        return len(recent) <= _MOST_MESSAGES_A_SECOND

    def _on_message(self, connection: _Connection, text: str) -> None:
        number: object = None
        try:
            message = _parsed(text)
            number = _identity(message)
            method = message.get("method")
            if method == "LIST_SUBSCRIPTIONS":
                result: object = list(connection.streams)
                names: Sequence[str] = ()
            else:
                result, names = None, _streams(message)
        except _Refused as exc:
            error = {"code": exc.code, "msg": exc.message}
            connection.socket.send(orjson.dumps({"error": error, "id": number}).decode())
            return
        connection.socket.send(orjson.dumps({"result": result, "id": number}).decode())
        for name in names:
            if method == "SUBSCRIBE":
                self._subscribe(connection, name)
            elif (key := connection.streams.pop(name, None)) is not None:
                self._hub.unsubscribe(connection.socket, key)

    def _subscribe(self, connection: _Connection, name: str) -> None:
        if name in connection.streams:
            return
        if len(connection.streams) >= _MOST_STREAMS:
            connection.socket.abort()
            return
        # Envelope or not, each form is encoded once for all who want it.
        key = f"/stream {name}" if connection.combined else f"/ws {name}"
        make = self._maker(name, key, _in_envelope(name) if connection.combined else _text)
        connection.streams[name] = None if make is None else key
        if make is not None:
            self._hub.subscribe(connection.socket, key, make, most=_MOST_STREAMS)

    def _maker(self, name: str, key: str, encode: _Encode) -> Callable[[], Feed] | None:
        """What makes the feed of the stream ``name``; None when there is no such stream."""
        match = _STREAM.fullmatch(name)
        instrument = self._instruments.get(match["symbol"]) if match else None
        if match is None or instrument is None:
            return None
        makers: Mapping[str, Callable[[], Feed]] = {
            "trade": lambda: self._trades(instrument, messages.trade_event, key, encode),
            "aggTrade": lambda: self._trades(instrument, messages.aggregate_event, key, encode),
            "ticker": lambda: self._ticker(instrument, messages.Day.event, key, encode),
            "miniTicker": lambda: self._ticker(instrument, messages.Day.short_event, key, encode),
            "bookTicker": lambda: self._book_ticker(instrument, key, encode),
        }
        if match["interval"] is not None:
            interval = interval_named(self._venue, instrument, match["interval"])
            if interval is None:
                return None
            return lambda: self._klines(instrument, interval, key, encode)
        if match["book"] is not None:
            rhythm = int(match["rhythm"] or 1_000)
            depth = match["depth"]
            if depth is None:
                return lambda: self._depth(instrument, rhythm, key, encode)
            return lambda: self._top(instrument, int(depth), rhythm, key, encode)
        return makers[match["kind"]]

    def _klines(
        self, instrument: Instrument, interval: Interval, key: str, encode: _Encode
    ) -> Feed:
        def event(candle: Candle, *, closed: bool) -> str:
            now = self._venue.clock.now_ms()
            ids = self._trade_ids(instrument, candle, interval, now)
            return encode(
                messages.kline_event(instrument, candle, interval, ids, now, closed=closed)
            )

        return CandleFeed(
            self._venue,
            instrument,
            key,
            interval,
            lambda candles: event(candles[-1], closed=False),
            encode_final=lambda candle: event(candle, closed=True),
            rhythm_ms=_KLINE_RHYTHM_MS,
        )

    def _trade_ids(
        self, instrument: Instrument, candle: Candle, interval: Interval, now: int
    ) -> tuple[int, int]:
        """The first and the last trade of ``candle``, looked for in an hour at either end of it."""
        if not candle.volume:
            return -1, -1
        start, end = candle.timestamp, min(candle.timestamp + interval.milliseconds, now + 1)
        trades = self._venue.prices.trades
        first = trades(instrument, TimeRange(start, min(end, start + _HOUR_MS)))
        last = trades(instrument, TimeRange(max(start, end - _HOUR_MS), end))
        return (first[0].id if first else -1), (last[-1].id if last else -1)

    def _trades(
        self,
        instrument: Instrument,
        event: Callable[[Instrument, Trade, int], dict[str, Any]],
        key: str,
        encode: _Encode,
    ) -> Feed:
        def encoded(trades: Sequence[Trade]) -> str:
            return encode(event(instrument, trades[0], self._venue.clock.now_ms()))

        return TradeFeed(self._venue, instrument, key, encoded, backlog=0, most_a_frame=1)

    def _ticker(
        self,
        instrument: Instrument,
        event: Callable[[messages.Day], dict[str, Any]],
        key: str,
        encode: _Encode,
    ) -> Feed:
        def encoded(ticker: Ticker) -> str:
            return encode(event(day_of(self._venue, instrument, ticker)))

        return TickerFeed(self._venue, instrument, key, encoded)

    def _book_ticker(self, instrument: Instrument, key: str, encode: _Encode) -> Feed:
        def encoded(book: OrderBook, number: int) -> str:
            return encode(messages.book_ticker_event(instrument, book, number))

        return TopFeed(self._venue, instrument, key, self._states, 1, 100, encoded, always=False)

    def _depth(self, instrument: Instrument, rhythm: int, key: str, encode: _Encode) -> Feed:
        def encoded(
            bids: Sequence[Level], asks: Sequence[Level], first: int, last: int, at_ms: int
        ) -> str:
            return encode(messages.depth_event(instrument, bids, asks, first, last, at_ms))

        return DepthFeed(self._venue, instrument, key, self._states, rhythm, encoded)

    def _top(
        self, instrument: Instrument, depth: int, rhythm: int, key: str, encode: _Encode
    ) -> Feed:
        def encoded(book: OrderBook, number: int) -> str:
            return encode(messages.depth_snapshot(book, number))

        return TopFeed(
            self._venue, instrument, key, self._states, depth, rhythm, encoded, always=True
        )


def interval_named(venue: Venue, instrument: Instrument, name: str) -> Interval | None:
    """Binance's interval ``name``, None where there is none or it cannot be told."""
    interval = Interval.parse(name) if name in INTERVALS else None
    if interval is None or not venue.prices.offers(instrument, interval):
        return None
    return interval


def day_of(venue: Venue, instrument: Instrument, ticker: Ticker) -> messages.Day:
    """``ticker`` with the trades at both ends of its day, as far as an hour there tells."""
    start, end = ticker.timestamp - DAY_MS, ticker.timestamp + 1
    first = venue.prices.trades(instrument, TimeRange(start, start + _HOUR_MS))
    last = venue.prices.trades(instrument, TimeRange(end - _HOUR_MS, end))
    return messages.Day.of(
        instrument, ticker, first[0] if first else None, last[-1] if last else None
    )


def _text(event: Any) -> str:
    return orjson.dumps(event).decode()


def _in_envelope(name: str) -> _Encode:
    return lambda event: orjson.dumps({"stream": name, "data": event}).decode()


def _parsed(text: str) -> dict[str, Any]:
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise _Refused(_INVALID_JSON, f"Invalid JSON: {exc}") from exc
    if not isinstance(message, dict):
        raise _Refused(_INVALID_REQUEST, "Invalid request: expected an object")
    return message


def _identity(message: Mapping[str, Any]) -> int | str | None:
    number = message.get("id")
    is_text = isinstance(number, str) and len(number) <= 36 and number.isalnum()
    is_integer = isinstance(number, int) and not isinstance(number, bool)
    if number is not None and not is_text and not is_integer:
        raise _Refused(
            _INVALID_REQUEST,
            "Invalid request: request ID must be an integer, an alphanumeric string or null",
        )
    return number


def _streams(message: Mapping[str, Any]) -> list[str]:
    method, params = message.get("method"), message.get("params")
    if method is None:
        raise _Refused(_INVALID_REQUEST, "Invalid request: missing field `method`")
    if method not in _METHODS:
        one_of = ", ".join(f"`{name}`" for name in _METHODS)
        raise _Refused(
            _INVALID_REQUEST,
            f"Invalid request: unknown variant `{str(method)[:50]}`, expected one of {one_of}",
        )
    if not isinstance(params, list) or not all(isinstance(name, str) for name in params):
        raise _Refused(_INVALID_REQUEST, "Invalid request: params must be a list of stream names")
    return params
