"""Crypto.com Exchange (API v1): what differs from other ccxt exchanges.

Candles: 300 in an answer; about 14 days of the short intervals. A socket carries many markets, and
400 subscriptions at most.
"""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from typing import Any, ClassVar

from ccxt.base.errors import BaseError

from domain.interval import Interval
from domain.time_range import TimeRange
from exchange_source.interfaces import ExchangeError, ExchangeUnavailable
from exchange_source.plugins.ccxt_errors import translate
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.ccxt_guards import SUBSCRIBER, VendorGuards


class CryptocomGuards(VendorGuards):
    """The shapes of Crypto.com's answers and messages, and sockets that are not overfilled."""

    most_subscriptions: ClassVar[int] = 400
    """Of one socket, as the exchange documents them."""

    def socket_address(self, url: str) -> str:
        """The first socket with room for one more, or the one that this topic has already: ccxt
        knows sockets by their addresses, and a fragment of one is never sent."""
        subscriber = SUBSCRIBER.get()
        if subscriber is not None and subscriber.socket is not None:
            held: str = subscriber.socket.url
            return held
        addresses = itertools.chain([url], (f"{url}#{number}" for number in itertools.count(2)))
        return next(address for address in addresses if self._has_room(address))

    def _has_room(self, address: str) -> bool:
        socket = self.clients.get(address)
        return socket is None or len(socket.subscriptions) < self.most_subscriptions

    def document_problem(self, response: Any) -> str | None:
        coded = isinstance(response, dict) and "code" in response
        return None if coded else "has no code"

    def answer_problem(self, url: str, response: Any) -> str | None:  # noqa: ARG002  all are alike
        result = response.get("result")
        data = result.get("data") if isinstance(result, dict) else None
        if not isinstance(data, list):
            return "has no result.data"
        if not all(isinstance(item, dict) for item in data):
            return "has something else than objects in result.data"
        return None

    def refused_watches(self, message: Any) -> tuple[list[str], ExchangeError] | None:
        # {"id": -1, "method": "subscribe", "code": 40003, "message": "...", "original": "{...}"}:
        # the id is not the request's, so ccxt cannot tell whose watch it is.
        if not isinstance(message, dict) or message.get("method") != "subscribe":
            return None
        code = str(message.get("code") or 0)
        if code == "0":
            return None
        error: ExchangeError
        try:
            self.throw_exactly_matched_exception(
                self.exceptions["exact"], code, json.dumps(message)
            )
            error = ExchangeUnavailable(f"{self.public_name}: subscription refused: {message}")
        except BaseError as exc:
            error = translate(exc, self.public_name)
            error.__cause__ = exc
        return [self._message_hash(channel) for channel in _channels(message)], error

    def topics_of(self, message: Any) -> list[str]:
        result = message.get("result") if isinstance(message, dict) else None
        channel = result.get("subscription") if isinstance(result, dict) else None
        return [self._message_hash(channel)] if isinstance(channel, str) else []

    def parse_ws_ticker(self, ticker: Any, market: Any = None) -> Any:
        parsed = super().parse_ws_ticker(ticker, market)
        # A fraction here (0.01 is one per cent), which ccxt takes for a percentage.
        change = ticker.get("c")
        parsed["percentage"] = None if change is None else float(Decimal(change) * 100)
        return parsed

    def handle_order_book(self, client: Any, message: Any) -> None:
        super().handle_order_book(client, message)
        # ccxt takes a book's time from its snapshot alone, not from the updates after it.
        symbol = self.safe_market(message["instrument_name"])["symbol"]
        book = self.orderbooks[symbol]
        book["timestamp"] = self.safe_integer(message["data"][0], "t")

    def _message_hash(self, channel: str) -> str:
        kind, _, rest = channel.partition(".")
        if kind != "book":
            return channel
        market_id = rest.rpartition(".")[0]
        return f"orderbook:{self.safe_market(market_id)['symbol']}"


def _channels(message: dict[str, Any]) -> list[str]:
    """The channels of the request that an error message answers; none when it does not say."""
    original = message.get("original")
    try:
        request = json.loads(original) if isinstance(original, str) else original
        # Only what was asked for, or the whole request.
        channels = request.get("params", request)["channels"] if request else []
    except (AttributeError, TypeError, KeyError, ValueError):
        return []
    return [channel for channel in channels if isinstance(channel, str)]


class CryptocomExchange(CCXTExchangeClient):
    """Crypto.com's spot markets."""

    exchange_name: ClassVar[str] = "crypto.com"
    exchange_id: ClassVar[str] = "cryptocom"
    page_rows: ClassVar[int] = 300
    # The exchange allows 100 a second for each public method and address.
    requests_per_second: ClassVar[float] = 50.0
    concurrency: ClassVar[int] = 8
    guards: ClassVar[type[VendorGuards]] = CryptocomGuards

    def candle_query(
        self,
        window: TimeRange,
        period: Interval,  # noqa: ARG002  it asks by the window's ends
    ) -> tuple[int | None, int, dict[str, Any]]:
        # Not by ccxt's `since`: alone it gives the last 25 rows, and with a limit `until` is
        # ignored. A millisecond off the periods' opens, it does not matter whether the exchange
        # counts the ends of a window in.
        return None, self.page_rows, {"start_ts": window.start - 1, "end_ts": window.end - 1}
