"""Coinbase Advanced Trade: the public part of its REST API, and the v2 paths that ccxt asks too.

Numbers travel as texts, times of candles and of queries as seconds. An answer names what it holds
and has no envelope; an error is ``{error, error_details, message}``, in v2 ``{errors: [{id,
message}]}``. Candles and trades come with the newest first. A period without trades has no candle,
and a range of more than 300 periods is refused. Spot products only; ``coinbase_streams`` has the
WebSocket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
from aiohttp import web
from multidict import MultiMapping

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox import coinbase_messages as messages
from sandbox.coinbase_messages import Product, products_of
from sandbox.coinbase_streams import CoinbaseStreams, CoinbaseTimes
from sandbox.protocol import IProtocol, plain
from sandbox.sockets import Hub
from sandbox.venue import Venue

_V3: Final = "/api/v3/brokerage/"
_V2: Final = "/v2/"
_SOCKET: Final = "/"
_GRANULARITIES: Final[Mapping[str, str]] = {
    "ONE_MINUTE": "1m",
    "FIVE_MINUTE": "5m",
    "FIFTEEN_MINUTE": "15m",
    "THIRTY_MINUTE": "30m",
    "ONE_HOUR": "1h",
    "TWO_HOUR": "2h",
    "SIX_HOUR": "6h",
    "ONE_DAY": "1d",
}
# The API's own documentation has come to speak of 350; who keeps to this is right with both.
_MOST_CANDLES: Final = 300
_TRADES: Final = (100, 1_000)
_LEVELS: Final = (50, 1_000)
_MOST_PRODUCTS: Final = 1_000
_INVALID: Final = "INVALID_ARGUMENT"
_NOT_FOUND: Final = "NOT_FOUND"
_FAILURES: Final[Mapping[int, tuple[str, str]]] = {
    400: (_INVALID, "invalid argument"),
    401: ("unauthorized", "Unauthorized"),
    403: ("PERMISSION_DENIED", "permission denied"),
    404: (_NOT_FOUND, "not found"),
    429: ("rate_limit_exceeded", "Too many requests"),
    503: ("UNAVAILABLE", "service unavailable"),
}
_INTERNAL: Final = ("INTERNAL", "internal server error")
_OLD_FAILURES: Final[Mapping[int, tuple[str, str]]] = {
    400: ("invalid_request", "Invalid request"),
    401: ("authentication_error", "Unauthorized"),
    404: ("not_found", "Not found"),
    429: ("rate_limit_exceeded", "Too many requests"),
}
_OLD_INTERNAL: Final = ("internal_server_error", "Internal server error")

_Query = MultiMapping[str]


class _Refused(Exception):
    """What was asked cannot be answered; ``status`` is HTTP's and ``error`` Coinbase's."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error
        self.message = message


class CoinbaseProtocol(IProtocol):
    """Serves the venue's spot markets as Coinbase would; ``times`` are of its sockets."""

    def __init__(self, venue: Venue, hub: Hub, *, times: CoinbaseTimes) -> None:
        self._venue = venue
        self._products = products_of(venue.instruments())
        self._streams = CoinbaseStreams(venue, hub, self._products, times)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        product = f"{_V3}market/products/{{product_id}}"
        answers: dict[str, Callable[[str, _Query], dict[str, Any]]] = {
            f"{_V3}time": self._time,
            f"{_V3}market/products": self._list_products,
            product: self._one_product,
            f"{product}/candles": self._candles,
            f"{product}/ticker": self._trades,
            f"{_V3}market/product_book": self._book,
            f"{_V2}time": self._old_time,
            f"{_V2}currencies": self._fiat_currencies,
            f"{_V2}currencies/crypto": self._coins,
            f"{_V2}exchange-rates": self._exchange_rates,
        }
        for path, answer in answers.items():
            router.add_get(path, _rest(answer))
        router.add_get(_SOCKET, self._streams.serve)

    def serves(self, path: str) -> bool:
        return path == _SOCKET or path.startswith((_V3, _V2))

    def asked_for(self, request: web.Request) -> tuple[str | None, str | None]:
        name = request.match_info.get("product_id") or request.query.get("product_id")
        granularity = request.query.get("granularity")
        if granularity is None:
            return name, None
        # The one name of a timeframe that no other spelling makes comparable.
        return name, _GRANULARITIES.get(granularity, granularity)

    def failure(self, request: web.Request, status: int) -> dict[str, Any]:
        if request.path.startswith(_V2):
            identity, message = _OLD_FAILURES.get(status, _OLD_INTERNAL)
            return {"errors": [{"id": identity, "message": message}]}
        return _error(*_FAILURES.get(status, _INTERNAL))

    def _time(self, _: str, _query: _Query) -> dict[str, Any]:
        now = self._venue.clock.now_ms()
        return {
            "iso": messages.time_text(now),
            "epochSeconds": str(now // 1000),
            "epochMillis": str(now),
        }

    def _old_time(self, _: str, _query: _Query) -> dict[str, Any]:
        now = self._venue.clock.now_ms()
        return {"data": {"iso": messages.time_text(now), "epoch": now // 1000}}

    def _list_products(self, _: str, query: _Query) -> dict[str, Any]:
        kind = query.get("product_type", "UNKNOWN_PRODUCT_TYPE")
        if kind not in ("UNKNOWN_PRODUCT_TYPE", "SPOT", "FUTURE"):
            raise _invalid("product_type argument is invalid")
        limit = _integer(query, "limit", _MOST_PRODUCTS, least=1, most=_MOST_PRODUCTS)
        offset = _integer(query, "offset", 0, least=0, most=10**9)
        names = query.getall("product_ids", None)
        wanted = [
            product
            for name, product in self._products.items()
            if kind != "FUTURE"
            and (names is None or name in names)
            and self._venue.is_listed(product.instrument)
        ]
        part = wanted[offset : offset + limit]
        return {"products": [self._row(item) for item in part], "num_products": len(wanted)}

    def _one_product(self, name: str, _query: _Query) -> dict[str, Any]:
        return self._row(self._product(name))

    def _candles(self, name: str, query: _Query) -> dict[str, Any]:
        product = self._product(name)
        timeframe = _GRANULARITIES.get(query.get("granularity", ""))
        interval = None if timeframe is None else Interval.parse(timeframe)
        if interval is None or not self._venue.prices.offers(product.instrument, interval):
            raise _invalid("granularity argument is invalid")
        start, end = _seconds(query, "start"), _seconds(query, "end")
        if start is None or end is None or end < start:
            raise _invalid("start and end argument is invalid")
        part = TimeRange(start, end)
        if part.length > _MOST_CANDLES * interval.milliseconds:
            raise _invalid(
                "start and end argument is invalid - number of candles requested should be "
                f"less than or equal to {_MOST_CANDLES}"
            )
        limit = _integer(query, "limit", _MOST_CANDLES, least=1, most=_MOST_CANDLES)
        candles = self._venue.candles(product.instrument, interval, part, limit)
        return {"candles": [messages.candle_row(candle) for candle in reversed(candles)]}

    def _trades(self, name: str, query: _Query) -> dict[str, Any]:
        product = self._product(name)
        limit = _integer(query, "limit", _TRADES[0], least=1, most=_TRADES[1])
        start, end = _seconds(query, "start"), _seconds(query, "end")
        part = TimeRange(0 if start is None else start, 10**18 if end is None else end)
        trades = self._venue.trades(product.instrument, part, limit)
        book = self._venue.book(product.instrument, 1)
        return {
            "trades": [messages.trade_row(product.id, trade) for trade in reversed(trades)],
            "best_bid": plain(book.bids[0][0]),
            "best_ask": plain(book.asks[0][0]),
        }

    def _book(self, _: str, query: _Query) -> dict[str, Any]:
        product = self._product(query.get("product_id", ""))
        limit = _integer(query, "limit", _LEVELS[0], least=1, most=_LEVELS[1])
        book = self._venue.book(product.instrument, limit)
        last = self._venue.ticker(product.instrument).last
        return messages.book_answer(product.id, book, last)

    def _fiat_currencies(self, _: str, _query: _Query) -> dict[str, Any]:
        return {
            "data": [
                {"id": code, "name": messages.currency_name(code), "min_size": "0.01"}
                for code in filter(messages.is_fiat, self._codes())
            ]
        }

    def _coins(self, _: str, _query: _Query) -> dict[str, Any]:
        codes = [code for code in self._codes() if not messages.is_fiat(code)]
        return {
            "data": [
                {
                    "asset_id": f"00000000-0000-4000-8000-{number:012d}",
                    "code": code,
                    "name": messages.currency_name(code),
                    "color": "#0052FF",
                    "sort_index": number,
                    "exponent": 8,
                    "type": "crypto",
                    "address_regex": "^[0-9A-Za-z]+$",
                }
                for number, code in enumerate(codes, start=100)
            ]
        }

    def _exchange_rates(self, _: str, query: _Query) -> dict[str, Any]:
        """How much of each coin one USD buys, as far as it is traded for USD."""
        currency = query.get("currency", "USD")
        if currency != "USD":
            raise _Refused(400, "invalid_request", f"Invalid currency ({currency})")
        rates = {"USD": "1.0"}
        for product in self._products.values():
            if product.quote == "USD":
                last = self._venue.ticker(product.instrument).last
                if last:
                    rates[product.base] = plain(float(f"{1 / last:.8g}"))
        return {"data": {"currency": "USD", "rates": rates}}

    def _codes(self) -> list[str]:
        products = self._products.values()
        return sorted({code for item in products for code in (item.base, item.quote)})

    def _row(self, product: Product) -> dict[str, Any]:
        return messages.product_row(product, self._venue.ticker(product.instrument))

    def _product(self, name: str) -> Product:
        product = self._products.get(name)
        if product is None or not self._venue.is_listed(product.instrument):
            raise _Refused(404, _NOT_FOUND, "valid product_id is required")
        return product


def _rest(answer: Callable[[str, _Query], dict[str, Any]]) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.Response:
        name = request.match_info.get("product_id", "")
        try:
            # Off the loop: candles of many months take a moment the first time.
            content = await asyncio.to_thread(answer, name, request.query)
        except _Refused as exc:
            if request.path.startswith(_V2):
                old = {"errors": [{"id": exc.error, "message": exc.message}]}
                return _json(old, status=exc.status)
            return _json(_error(exc.error, exc.message), status=exc.status)
        return _json(content)

    return handle


def _seconds(query: _Query, name: str) -> int | None:
    """The moment that ``name`` gives in seconds, in ms."""
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise _invalid(f"{name} argument is invalid")
    return int(text) * 1000


def _integer(query: _Query, name: str, default: int, *, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
        raise _invalid(f"{name} argument is invalid")
    return int(text)


def _invalid(message: str) -> _Refused:
    return _Refused(400, _INVALID, message)


def _error(error: str, message: str) -> dict[str, Any]:
    return {"error": error, "error_details": message, "message": message}


def _json(content: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
