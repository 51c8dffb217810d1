"""Crypto.com Exchange v1: the public part of its REST and WebSocket market data.

Numbers travel as texts, times as ms. A REST answer is ``{id, method, code, result}``; ``code`` is
0, or HTTP 400 comes with a message. WebSocket data is ``{id: -1, method: "subscribe", code: 0,
result}``, whose ``result`` names its channel and subscription. Of books, a subscription of
``SNAPSHOT_AND_UPDATE`` gets the whole book once and then changes, chained by ``pu`` to the ``u``
before; the default gets the whole book each time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson
from aiohttp import WSMsgType, web

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from domain.time_range import TimeRange
from sandbox.prices import Instrument, Trade
from sandbox.protocol import IProtocol, plain
from sandbox.sockets import BookFeed, CandleFeed, Feed, Hub, Socket, TickerFeed, TradeFeed
from sandbox.venue import Ticker, Venue

MESSAGE_LIMIT: Final = 64 * 1024
_PREFIX: Final = "/exchange/v1"
_INTERVALS: Final[Mapping[str, str]] = {
    **{name: name for name in ("1m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "12h")},
    "1D": "1d",
    "7D": "1w",
}
_DEPTHS: Final = (10, 50, 150)
_CANDLES: Final = (25, 300)
_TRADES: Final = (25, 150)
_HEARTBEAT_ANSWER_S: Final = 5.0

_BAD_REQUEST: Final = 40_003
_BAD_PARAMETER: Final = 40_004
_UNKNOWN_INSTRUMENT: Final = 30_003
_TOO_MANY_SUBSCRIPTIONS: Final = 40_107
_TOO_MANY_REQUESTS: Final = 42_901
_INTERNAL: Final = 50_001

_Handler = Callable[[Mapping[str, str]], dict[str, Any]]


class _Refused(Exception):
    """What was asked cannot be answered; ``code`` is Crypto.com's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class CryptocomProtocol(IProtocol):
    """Serves the venue as Crypto.com would.

    ``heartbeat_s`` is how often, in real seconds, a socket is asked for a sign of life; one that
    does not answer within 5 s is dropped.
    """

    def __init__(self, venue: Venue, hub: Hub, *, heartbeat_s: float = 30.0) -> None:
        self._venue = venue
        self._hub = hub
        self._heartbeat_s = heartbeat_s
        self._instruments = {_name(item): item for item in venue.instruments()}

    def add_routes(self, router: web.UrlDispatcher) -> None:
        answers: dict[str, _Handler] = {
            "public/get-instruments": self._get_instruments,
            "public/get-candlestick": self._get_candlestick,
            "public/get-book": self._get_book,
            "public/get-tickers": self._get_tickers,
            "public/get-trades": self._get_trades,
        }
        for method, answer in answers.items():
            router.add_get(f"{_PREFIX}/{method}", self._rest(method, answer))
        router.add_get(f"{_PREFIX}/market", self._market)

    def serves(self, path: str) -> bool:
        return path.startswith(f"{_PREFIX}/")

    def asked_for(self, request: web.Request) -> tuple[str | None, str | None]:
        return request.query.get("instrument_name"), request.query.get("timeframe")

    def failure(self, request: web.Request, status: int) -> dict[str, Any]:
        code, message = {
            400: (_BAD_REQUEST, "Invalid request"),
            404: (_BAD_REQUEST, "Invalid request"),
            429: (_TOO_MANY_REQUESTS, "Too many requests"),
        }.get(status, (_INTERNAL, "Internal error"))
        method = request.path.removeprefix(f"{_PREFIX}/")
        return {"id": -1, "method": method, "code": code, "message": message}

    def _rest(self, method: str, answer: _Handler) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            try:
                # Off the loop: candles of many months take a moment the first time.
                result = await asyncio.to_thread(answer, dict(request.query))
            except _Refused as exc:
                refusal = {"id": -1, "method": method, "code": exc.code, "message": exc.message}
                return _json(refusal, status=400)
            return _json({"id": -1, "method": method, "code": 0, "result": result})

        return handle

    def _get_instruments(self, query: Mapping[str, str]) -> dict[str, Any]:  # noqa: ARG002
        listed = filter(self._venue.is_listed, self._venue.instruments())
        return {"data": [_instrument(item) for item in listed]}

    def _get_candlestick(self, query: Mapping[str, str]) -> dict[str, Any]:
        instrument = self._instrument(query)
        name = query.get("timeframe", "1m")
        interval = self._interval(instrument, name)
        count = _integer(query, "count", _CANDLES[0], most=_CANDLES[1])
        part = _range(query)
        candles = self._venue.candles(instrument, interval, part, count)
        return {
            "interval": name,
            "data": [_candle(candle) for candle in candles],
            "instrument_name": _name(instrument),
        }

    def _get_book(self, query: Mapping[str, str]) -> dict[str, Any]:
        instrument = self._instrument(query)
        depth = _integer(query, "depth", 50, most=50)
        book = self._venue.book(instrument, depth)
        return {
            "depth": depth,
            "data": [_book(book)],
            "instrument_name": _name(instrument),
        }

    def _get_tickers(self, query: Mapping[str, str]) -> dict[str, Any]:
        if "instrument_name" in query:
            wanted = [self._instrument(query)]
        else:
            wanted = [
                item
                for item in self._venue.instruments()
                if item.active and self._venue.is_listed(item)
            ]
        return {"data": [_ticker(item, self._venue.ticker(item)) for item in wanted]}

    def _get_trades(self, query: Mapping[str, str]) -> dict[str, Any]:
        instrument = self._instrument(query)
        count = _integer(query, "count", _TRADES[0], most=_TRADES[1])
        trades = self._venue.trades(instrument, _range(query), count)
        return {
            "data": [_trade(instrument, trade) for trade in reversed(trades)],
            "instrument_name": _name(instrument),
        }

    def _instrument(self, query: Mapping[str, str]) -> Instrument:
        name = query.get("instrument_name")
        if name is None:
            raise _Refused(_BAD_PARAMETER, "Missing or invalid argument: instrument_name")
        instrument = self._instruments.get(name)
        if instrument is None or not self._venue.is_listed(instrument):
            raise _Refused(_UNKNOWN_INSTRUMENT, f"Unknown symbol: {name}")
        return instrument

    def _interval(self, instrument: Instrument, name: str) -> Interval:
        known = _INTERVALS.get(name)
        interval = None if known is None else Interval.parse(known)
        if interval is None or not self._venue.prices.offers(instrument, interval):
            raise _Refused(_BAD_PARAMETER, f"Missing or invalid argument: timeframe {name}")
        return interval

    async def _market(self, request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(max_msg_size=MESSAGE_LIMIT, timeout=2.0, compress=False)
        await ws.prepare(request)
        async with self._hub.connected(request, ws) as socket:
            heartbeat = asyncio.create_task(self._heartbeat(socket))
            try:
                async for message in ws:
                    socket.last_heard = self._venue.clock.monotonic()
                    if message.type != WSMsgType.TEXT:
                        break
                    self._on_message(socket, message.data)
            finally:
                heartbeat.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await heartbeat
        return ws

    async def _heartbeat(self, socket: Socket) -> None:
        clock = self._venue.clock
        while True:
            await clock.sleep_real(self._heartbeat_s)
            if self._venue.faults.take("mute_sockets", channel="heartbeat") is not None:
                continue
            asked = clock.monotonic()
            beat = {"id": clock.real_ms(), "method": "public/heartbeat", "code": 0}
            socket.send(orjson.dumps(beat).decode())
            await clock.sleep_real(min(_HEARTBEAT_ANSWER_S, self._heartbeat_s))
            if socket.last_heard < asked:
                socket.abort()

    def _on_message(self, socket: Socket, text: str) -> None:
        try:
            message = orjson.loads(text)
        except orjson.JSONDecodeError:
            message = None
        if not isinstance(message, dict):
            socket.send(_refusal(-1, "", _Refused(_BAD_REQUEST, "Invalid request"), text[:200]))
            return
        method, params = message.get("method"), message.get("params")
        number = message.get("id", -1)
        if not isinstance(number, int | str):
            number = -1
        if method == "public/respond-heartbeat":
            return
        channels = params.get("channels") if isinstance(params, dict) else None
        if (
            method not in ("subscribe", "unsubscribe")
            or not isinstance(channels, list)
            or not all(isinstance(channel, str) for channel in channels)
        ):
            refused = _Refused(_BAD_REQUEST, "Invalid request")
            socket.send(_refusal(number, str(method)[:50], refused, text[:200]))
            return
        socket.send(orjson.dumps({"id": number, "method": method, "code": 0}).decode())
        for channel in channels:
            try:
                if method == "subscribe":
                    self._subscribe(socket, channel, updates=_wants_updates(message))
                else:
                    for updates in (False, True):
                        self._hub.unsubscribe(socket, _key(channel, updates=updates))
            except _Refused as exc:
                # An exchange names no request in this answer, only what it was asked for.
                original = orjson.dumps({"channels": [channel]}).decode()
                socket.send(_refusal(-1, method, exc, original))

    def _subscribe(self, socket: Socket, channel: str, *, updates: bool) -> None:
        kind, _, rest = channel.partition(".")
        makers: dict[str, Callable[[str, str, bool], Callable[[], Feed]]] = {
            "candlestick": self._candle_feed,
            "trade": self._trade_feed,
            "ticker": self._ticker_feed,
            "book": self._book_feed,
        }
        if kind not in makers:
            raise _Refused(_BAD_PARAMETER, f"Unknown channel {channel}")
        updates = updates and kind == "book"
        make = makers[kind](channel, rest, updates)
        if not self._hub.subscribe(socket, _key(channel, updates=updates), make):
            raise _Refused(_TOO_MANY_SUBSCRIPTIONS, "Too many subscriptions")

    def _candle_feed(self, channel: str, rest: str, _: bool) -> Callable[[], Feed]:  # noqa: FBT001
        timeframe, _dot, name = rest.partition(".")
        instrument = self._instrument({"instrument_name": name})
        interval = self._interval(instrument, timeframe)
        encode = _candle_frames(channel, instrument, timeframe)
        return lambda: CandleFeed(self._venue, instrument, channel, interval, encode)

    def _trade_feed(self, channel: str, rest: str, _: bool) -> Callable[[], Feed]:  # noqa: FBT001
        instrument = self._instrument({"instrument_name": rest})
        encode = _trade_frames(channel, instrument)
        return lambda: TradeFeed(self._venue, instrument, channel, encode)

    def _ticker_feed(self, channel: str, rest: str, _: bool) -> Callable[[], Feed]:  # noqa: FBT001
        instrument = self._instrument({"instrument_name": rest})
        encode = _ticker_frames(channel, instrument)
        return lambda: TickerFeed(self._venue, instrument, channel, encode)

    def _book_feed(
        self,
        channel: str,
        rest: str,
        updates: bool,  # noqa: FBT001 - every maker of a feed is called alike
    ) -> Callable[[], Feed]:
        name, _, depth_text = rest.partition(".")
        instrument = self._instrument({"instrument_name": name})
        depth = {"": 50, **{str(depth): depth for depth in _DEPTHS}}.get(depth_text)
        if depth is None:
            raise _Refused(_BAD_PARAMETER, f"Invalid depth {depth_text}, use one of {_DEPTHS}")
        whole, changes = _book_frames(channel, instrument, depth)
        key = _key(channel, updates=updates)
        return lambda: BookFeed(
            self._venue, instrument, key, depth, whole, changes if updates else None
        )


def _name(instrument: Instrument) -> str:
    if instrument.spot:
        return f"{instrument.base}_{instrument.quote}"
    return f"{instrument.base}{instrument.quote}-PERP"


def _key(channel: str, *, updates: bool) -> str:
    return f"{channel} updates" if updates else channel


def _wants_updates(message: Mapping[str, Any]) -> bool:
    """Documented in snake case; ccxt writes it in camel case, and both are read."""
    params = message["params"]
    wanted = params.get("book_subscription_type", params.get("bookSubscriptionType"))
    return bool(wanted == "SNAPSHOT_AND_UPDATE")


def _integer(query: Mapping[str, str], name: str, default: int, *, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
        raise _Refused(_BAD_PARAMETER, f"Missing or invalid argument: {name}")
    return int(text)


def _range(query: Mapping[str, str]) -> TimeRange:
    """``[start_ts, end_ts)`` in ms."""
    start = _integer(query, "start_ts", 0, most=10**18)
    end = _integer(query, "end_ts", 10**18, most=10**18)
    return TimeRange(start, end)


def _instrument(instrument: Instrument) -> dict[str, Any]:
    price_step = format(10.0**-instrument.price_decimals, f".{instrument.price_decimals}f")
    amount_step = format(10.0**-instrument.quantity_decimals, f".{instrument.quantity_decimals}f")
    pair = f"{instrument.base}/{instrument.quote}"
    return {
        "symbol": _name(instrument),
        "inst_type": "CCY_PAIR" if instrument.spot else "PERPETUAL_SWAP",
        "display_name": pair if instrument.spot else f"{instrument.base}{instrument.quote} Perp",
        "base_ccy": instrument.base,
        "quote_ccy": instrument.quote,
        "quote_decimals": instrument.price_decimals,
        "quantity_decimals": instrument.quantity_decimals,
        "price_tick_size": price_step,
        "qty_tick_size": amount_step,
        "max_leverage": "50",
        "tradable": instrument.active,
        "expiry_timestamp_ms": 0,
        "beta_product": False,
        "margin_buy_enabled": False,
        "margin_sell_enabled": False,
        "contract_size": "1",
    }


def _candle(candle: Candle) -> dict[str, Any]:
    return {
        "o": plain(candle.open),
        "h": plain(candle.high),
        "l": plain(candle.low),
        "c": plain(candle.close),
        "v": plain(candle.volume),
        "t": candle.timestamp,
    }


def _trade(instrument: Instrument, trade: Trade) -> dict[str, Any]:
    return {
        "d": str(trade.id),
        "s": trade.side.upper(),
        "p": plain(trade.price),
        "q": plain(trade.amount),
        "t": trade.timestamp,
        "tn": str(trade.timestamp * 1_000_000),
        "i": _name(instrument),
    }


def _ticker(instrument: Instrument, ticker: Ticker) -> dict[str, Any]:
    (bid, bid_size), (ask, ask_size) = ticker.book.bids[0], ticker.book.asks[0]
    return {
        "i": _name(instrument),
        "h": _or_null(ticker.high),
        "l": _or_null(ticker.low),
        "a": _or_null(ticker.last),
        "v": plain(ticker.volume),
        "vv": plain(ticker.quote_volume),
        "c": _or_null(ticker.change),
        "b": plain(bid),
        "bs": plain(bid_size),
        "k": plain(ask),
        "ks": plain(ask_size),
        "t": ticker.timestamp,
    }


def _or_null(value: float | None) -> str | None:
    return None if value is None else plain(value)


def _levels(levels: Sequence[Level]) -> list[list[str]]:
    return [[plain(price), plain(amount), "1" if amount else "0"] for price, amount in levels]


def _book(book: OrderBook) -> dict[str, Any]:
    return {"bids": _levels(book.bids), "asks": _levels(book.asks), "t": book.timestamp}


def _frame(channel: str, subscription: str, instrument: Instrument, **rest: Any) -> str:
    result = {
        "instrument_name": _name(instrument),
        "subscription": subscription,
        "channel": channel,
        **rest,
    }
    return orjson.dumps({"id": -1, "method": "subscribe", "code": 0, "result": result}).decode()


def _candle_frames(
    channel: str, instrument: Instrument, timeframe: str
) -> Callable[[Sequence[Candle]], str]:
    def encode(candles: Sequence[Candle]) -> str:
        data = [_candle(candle) for candle in candles]
        return _frame("candlestick", channel, instrument, interval=timeframe, data=data)

    return encode


def _trade_frames(channel: str, instrument: Instrument) -> Callable[[Sequence[Trade]], str]:
    def encode(trades: Sequence[Trade]) -> str:
        data = [_trade(instrument, trade) for trade in trades]
        return _frame("trade", channel, instrument, data=data)

    return encode


def _ticker_frames(channel: str, instrument: Instrument) -> Callable[[Ticker], str]:
    def encode(ticker: Ticker) -> str:
        return _frame("ticker", channel, instrument, data=[_ticker(instrument, ticker)])

    return encode


def _book_frames(
    channel: str, instrument: Instrument, depth: int
) -> tuple[
    Callable[[OrderBook, int], str],
    Callable[[Sequence[Level], Sequence[Level], int, int, int], str],
]:
    def whole(book: OrderBook, number: int) -> str:
        data = [{**_book(book), "tt": book.timestamp, "u": number}]
        return _frame("book", channel, instrument, depth=depth, data=data)

    def changes(
        bids: Sequence[Level], asks: Sequence[Level], at_ms: int, number: int, previous: int
    ) -> str:
        update = {"bids": _levels(bids), "asks": _levels(asks)}
        data = [{"update": update, "t": at_ms, "tt": at_ms, "u": number, "pu": previous}]
        return _frame("book.update", channel, instrument, depth=depth, data=data)

    return whole, changes


def _refusal(number: int | str, method: str, refused: _Refused, original: str) -> str:
    return orjson.dumps(
        {
            "id": number,
            "method": method,
            "code": refused.code,
            "message": refused.message,
            "original": original,
        }
    ).decode()


def _json(content: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
