"""Binance: the public part of its spot REST API v3; ``binance_streams`` has the WebSockets.

Numbers travel as texts, times as ms. An answer is what was asked for, without an envelope; an error
is HTTP 400 with ``{code, msg}``. Rows ascend: from ``startTime`` on where it is given, else they
are the newest. Every answer tells the weight used in this minute, which is counted but not limited.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson
from aiohttp import web

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox import binance_messages as messages
from sandbox.binance_books import BookStates
from sandbox.binance_streams import BinanceStreams, day_of, interval_named
from sandbox.prices import Instrument, Trade
from sandbox.protocol import IProtocol
from sandbox.sockets import Hub
from sandbox.venue import Venue

_PREFIX: Final = "/api/v3/"
# What another exchange has below the same prefix.
_FOREIGN: Final = "/api/v3/brokerage/"
_SOCKETS: Final = ("/ws", "/stream")
_SYMBOL: Final = re.compile(r"[A-Z0-9_.-]{1,20}")
_INTEGER: Final = re.compile(r"[0-9]{1,18}")
_MINUTE_MS: Final = 60_000

_UNKNOWN: Final = -1000
_DISCONNECTED: Final = -1001
_TOO_MANY_REQUESTS: Final = -1003
_SERVER_BUSY: Final = -1008
_ILLEGAL_CHARS: Final = -1100
_MANDATORY: Final = -1102
_BAD_INTERVAL: Final = -1120
_BAD_SYMBOL: Final = -1121
_BAD_COMBINATION: Final = -1128
_BAD_DATA: Final = -1130
_NO_SUCH_PATH: Final = -5000

_BUSY: Final = (
    "Server is currently overloaded with other requests. Please try again in a few minutes."
)
_BANNED: Final = (
    "Way too much request weight used; IP banned until {}. "
    "Please use WebSocket Streams for live updates to avoid bans."
)
_TOO_MUCH: Final = (
    "Too much request weight used; current limit is 6000 request weight per 1 MINUTE. "
    "Please use WebSocket Streams for live updates to avoid polling the API."
)
_INTERNAL: Final = (
    _DISCONNECTED,
    "Internal error; unable to process your request. Please try again.",
)
_FAILURES: Final[Mapping[int, tuple[int, str]]] = {
    400: (_BAD_DATA, "Data sent for a parameter is not valid."),
    429: (_TOO_MANY_REQUESTS, _TOO_MUCH),
    500: (_UNKNOWN, "An unknown error occurred while processing the request."),
    503: (_SERVER_BUSY, _BUSY),
}
_LIMITED: Final = (418, 429)
# The sandbox limits by the second.
_RETRY_AFTER_S: Final = 1

_Query = Mapping[str, str]


class _Refused(Exception):
    """What was asked cannot be answered; ``code`` is Binance's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BinanceProtocol(IProtocol):
    """Serves the venue's spot markets as Binance would.

    ``heartbeat_s`` is how often, in real seconds, a socket is pinged.
    """

    def __init__(self, venue: Venue, hub: Hub, *, heartbeat_s: float = 30.0) -> None:
        self._venue = venue
        self._states = BookStates(venue)
        self._streams = BinanceStreams(venue, hub, self._states, heartbeat_s=heartbeat_s)
        self._instruments = {
            messages.symbol_of(item): item for item in venue.instruments() if item.spot
        }
        self._minute = 0
        self._used_weight = 0

    def add_routes(self, router: web.UrlDispatcher) -> None:
        answers: dict[str, Callable[[_Query], Any]] = {
            "ping": lambda _: {},
            "time": lambda _: {"serverTime": self._venue.clock.now_ms()},
            "exchangeInfo": self._exchange_info,
            "klines": self._klines,
            "depth": self._depth,
            "trades": self._trades,
            "aggTrades": self._aggregate_trades,
            "ticker/24hr": self._day_tickers,
            "ticker/price": self._price_tickers,
            "ticker/bookTicker": self._book_tickers,
        }
        for name, answer in answers.items():
            router.add_get(f"{_PREFIX}{name}", _rest(answer))
        for path in (*_SOCKETS, "/ws/{names:.*}"):
            router.add_get(path, self._streams.serve)

    def serves(self, path: str) -> bool:
        if path.startswith(_PREFIX):
            return not path.startswith(_FOREIGN)
        return path in _SOCKETS or path.startswith("/ws/")

    def asked_for(self, request: web.Request) -> tuple[str | None, str | None]:
        return request.query.get("symbol"), request.query.get("interval")

    def failure(self, request: web.Request, status: int) -> dict[str, Any]:
        if status == 418:
            until = self._venue.clock.real_ms() + _RETRY_AFTER_S * 1_000
            return _error(_TOO_MANY_REQUESTS, _BANNED.format(until))
        if status == 404:
            invalid = f"Path {request.path}, Method {request.method} is invalid"
            return _error(_NO_SUCH_PATH, invalid)
        return _error(*_FAILURES.get(status, _INTERNAL))

    def on_answer(self, request: web.Request, status: int) -> Mapping[str, str]:
        minute = self._venue.clock.real_ms() // _MINUTE_MS
        if minute != self._minute:
            self._minute, self._used_weight = minute, 0
        self._used_weight += _weight(request)
        used = str(self._used_weight)
        headers = {"X-MBX-USED-WEIGHT": used, "X-MBX-USED-WEIGHT-1M": used}
        if status in _LIMITED:
            headers["Retry-After"] = str(_RETRY_AFTER_S)
        return headers

    def _exchange_info(self, query: _Query) -> dict[str, Any]:
        wanted = self._wanted(query)
        if wanted is None:
            wanted = self._listed()
        return messages.exchange_info(wanted, self._venue.clock.now_ms())

    def _klines(self, query: _Query) -> list[Any]:
        instrument = self._instrument(query)
        interval = self._interval(query, instrument)
        limit = _limit(query, 500, most=1_000)
        candles = self._venue.candles(
            instrument, interval, _range(query), limit, oldest="startTime" in query
        )
        return [messages.kline_row(instrument, candle, interval) for candle in candles]

    def _depth(self, query: _Query) -> dict[str, Any]:
        instrument = self._instrument(query)
        limit = _limit(query, 100, most=5_000)
        number = self._states.current()
        return messages.depth_snapshot(self._states.book(instrument, number).top(limit), number)

    def _trades(self, query: _Query) -> list[dict[str, Any]]:
        instrument = self._instrument(query)
        limit = _limit(query, 500, most=1_000)
        everything = TimeRange(0, self._venue.clock.now_ms() + 1)
        trades = self._venue.trades(instrument, everything, limit)
        return [messages.trade_row(trade) for trade in trades]

    def _aggregate_trades(self, query: _Query) -> list[dict[str, Any]]:
        instrument = self._instrument(query)
        limit = _limit(query, 500, most=1_000)
        trades: Sequence[Trade]
        if "fromId" in query:
            if "startTime" in query or "endTime" in query:
                raise _Refused(_BAD_COMBINATION, "Combination of optional parameters invalid.")
            trades = self._venue.trades_from(instrument, _integer(query, "fromId", 0), limit)
        else:
            trades = self._venue.trades(
                instrument, _range(query), limit, oldest="startTime" in query
            )
        return [messages.aggregate_row(trade) for trade in trades]

    def _day_tickers(self, query: _Query) -> Any:
        kind = query.get("type", "FULL")
        if kind not in ("FULL", "MINI"):
            raise _Refused(_BAD_DATA, "Data sent for parameter 'type' is not valid.")

        def row(instrument: Instrument) -> dict[str, Any]:
            day = day_of(self._venue, instrument, self._venue.ticker(instrument))
            return day.row() if kind == "FULL" else day.short_row()

        return self._rows(query, row)

    def _price_tickers(self, query: _Query) -> Any:
        def row(instrument: Instrument) -> dict[str, Any]:
            price = self._venue.ticker(instrument).last or 0.0
            return {"symbol": messages.symbol_of(instrument), "price": messages.decimal(price)}

        return self._rows(query, row)

    def _book_tickers(self, query: _Query) -> Any:
        number = self._states.current()

        def row(instrument: Instrument) -> dict[str, Any]:
            return messages.book_ticker_row(instrument, self._states.book(instrument, number))

        return self._rows(query, row)

    def _rows(self, query: _Query, row: Callable[[Instrument], dict[str, Any]]) -> Any:
        """The row of one ``symbol``, or a list of those of ``symbols`` or of all that trade."""
        wanted = self._wanted(query)
        if wanted is None:
            return [row(item) for item in self._listed() if item.active]
        rows = [row(item) for item in wanted]
        return rows[0] if "symbol" in query else rows

    def _listed(self) -> list[Instrument]:
        return [item for item in self._instruments.values() if self._venue.is_listed(item)]

    def _wanted(self, query: _Query) -> list[Instrument] | None:
        """What ``symbol`` or ``symbols`` name; None when neither is given."""
        if "symbols" not in query:
            return [self._instrument(query)] if "symbol" in query else None
        if "symbol" in query:
            raise _Refused(_BAD_COMBINATION, "Combination of optional parameters invalid.")
        try:
            names = orjson.loads(query["symbols"])
        except orjson.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise _illegal("symbols", r'^\["[A-Z0-9-_.]{1,20}"(,"[A-Z0-9-_.]{1,20}"){0,}\]$')
        return [self._instrument({"symbol": name}) for name in names]

    def _instrument(self, query: _Query) -> Instrument:
        name = _mandatory(query, "symbol")
        if _SYMBOL.fullmatch(name) is None:
            raise _illegal("symbol", "^[A-Z0-9-_.]{1,20}$")
        instrument = self._instruments.get(name)
        if instrument is None or not self._venue.is_listed(instrument):
            raise _Refused(_BAD_SYMBOL, "Invalid symbol.")
        return instrument

    def _interval(self, query: _Query, instrument: Instrument) -> Interval:
        interval = interval_named(self._venue, instrument, _mandatory(query, "interval"))
        if interval is None:
            raise _Refused(_BAD_INTERVAL, "Invalid interval.")
        return interval


def _rest(answer: Callable[[_Query], Any]) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.Response:
        try:
            # Off the loop: candles of many months take a moment the first time.
            content = await asyncio.to_thread(answer, dict(request.query))
        except _Refused as exc:
            return _json(_error(exc.code, exc.message), status=400)
        return _json(content)

    return handle


def _weight(request: web.Request) -> int:
    """What ``request`` costs of the 6000 that Binance allows a minute."""
    name, query = request.path.removeprefix(_PREFIX), request.query
    if name == "depth":
        text = query.get("limit", "100")
        limit = int(text) if _INTEGER.fullmatch(text) else 0
        return next(
            (cost for most, cost in ((100, 5), (500, 25), (1_000, 50)) if limit <= most), 250
        )
    is_single = "symbol" in query
    return {
        "exchangeInfo": 20,
        "klines": 2,
        "trades": 25,
        "aggTrades": 4,
        "ticker/24hr": 2 if is_single else 80,
        "ticker/price": 2 if is_single else 4,
        "ticker/bookTicker": 2 if is_single else 4,
    }.get(name, 1)


def _mandatory(query: _Query, name: str) -> str:
    text = query.get(name)
    if not text:
        raise _Refused(
            _MANDATORY,
            f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.",
        )
    return text


def _illegal(name: str, legal: str) -> _Refused:
    return _Refused(
        _ILLEGAL_CHARS,
        f"Illegal characters found in parameter '{name}'; legal range is '{legal}'.",
    )


def _integer(query: _Query, name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if _INTEGER.fullmatch(text) is None:
        raise _illegal(name, "^[0-9]{1,20}$")
    return int(text)


def _limit(query: _Query, default: int, *, most: int) -> int:
    """How many rows are wanted; more than ``most`` are as good as ``most``."""
    limit = _integer(query, "limit", default)
    if limit == 0:
        raise _Refused(_BAD_DATA, "Data sent for parameter 'limit' is not valid.")
    return min(limit, most)


def _range(query: _Query) -> TimeRange:
    """``startTime`` to ``endTime`` in ms, both included."""
    return TimeRange(_integer(query, "startTime", 0), _integer(query, "endTime", 10**18) + 1)


def _error(code: int, message: str) -> dict[str, Any]:
    return {"code": code, "msg": message}


def _json(content: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
