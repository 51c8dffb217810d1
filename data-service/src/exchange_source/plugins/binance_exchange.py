"""Binance (spot): what differs from other ccxt exchanges.

Candles: 1000 in an answer, all of history; a period without trades has a flat one of volume 0,
only the exchange's own outages leave holes. One socket carries 1024 streams and takes 5 messages a
second. Live books are the whole book: updates on top of a snapshot by REST.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from ccxt.base.errors import ChecksumError

from domain.interval import Interval
from domain.order_book import BOOK_DEPTH
from domain.time_range import TimeRange
from exchange_source.interfaces import ExchangeError, ExchangeUnavailable
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.ccxt_guards import VendorGuards
from exchange_source.plugins.ws_requests import GatheredRequests

_STREAMS_A_SOCKET: Final = 1_000
# 5 messages a second are allowed, pongs among them.
_MESSAGE_PAUSE_S: Final = 0.25
_STREAMS_A_MESSAGE: Final = 100
# Levels a side of the snapshot that a live book begins with: what is farther away is not known, and
# twice as many count twice as much.
_SNAPSHOT_LEVELS: Final = 500


class BinanceGuards(VendorGuards):
    """The shapes of Binance's messages, and the rules of its books."""

    def answer_problem(self, url: str, response: Any) -> str | None:
        path = urlsplit(url).path.rpartition("/")[2]
        if path == "klines" and not _is_list_of(response, list):
            return "is no list of rows"
        if path == "exchangeInfo" and not _is_list_of(_field(response, "symbols"), dict):
            return "has no symbols"
        if path == "depth" and not all(
            _is_list_of(_field(response, side), list) for side in ("bids", "asks")
        ):
            return "has no bids and asks"
        return None

    def is_spot_url(self, _client: Any) -> bool:
        # ccxt reads it off the name of the host, which another endpoint does not have.
        return True

    def stream(self, _type: str, topic: str, _streams: int = 1) -> str:
        # ccxt would open a socket for each of the first fifty topics.
        sockets = self.options["streamBySubscriptionsHash"]
        if topic not in sockets:
            sockets[topic] = str(len(sockets) // _STREAMS_A_SOCKET)
        return str(sockets[topic])

    def client(self, url: str) -> Any:
        socket = super().client(url)
        if not hasattr(socket, "requests"):
            socket.requests = GatheredRequests(
                socket.send,
                names="params",
                kind=_kind,
                tasks=self.closing,
                pause_s=_MESSAGE_PAUSE_S,
                most=_STREAMS_A_MESSAGE,
            )
            socket.send = socket.requests.send
        return socket

    def handle_message(self, client: Any, message: Any) -> None:
        if not isinstance(message, dict) or "id" not in message or "e" in message:
            super().handle_message(client, message)
        elif "error" not in message:
            for request_id in client.requests.answered(message["id"]):
                super().handle_message(client, {**message, "id": request_id})
        elif not client.requests.refused(message["id"]):
            super().handle_message(client, message)

    def refused_watches(self, message: Any) -> tuple[list[str], ExchangeError] | None:
        # An error has a code, a msg, and the id of the request.
        if not isinstance(message, dict) or "error" not in message:
            return None
        error = ExchangeUnavailable(f"{self.public_name}: subscription refused: {message['error']}")
        hashes = [
            message_hash
            for socket in self.clients.values()
            for message_hash, subscription in socket.subscriptions.items()
            if isinstance(subscription, dict)
            and str(subscription.get("id")) == str(message.get("id"))
        ]
        return hashes, error

    def topics_of(self, message: Any) -> list[str]:
        if not isinstance(message, dict) or not isinstance(message.get("s"), str):
            return []
        symbol = self.safe_market(message["s"], None, None, "spot")["symbol"]
        match message.get("e"):
            case "kline":
                interval = self.find_timeframe(message.get("k", {}).get("i"))
                return [f"ohlcv::{symbol}::{interval}"]
            case "depthUpdate":
                return [f"orderbook::{symbol}"]
            case "trade":
                return [f"trade::{symbol}"]
            case "24hrTicker":
                return [f"ticker:ticker@{symbol}"]
        return []

    def take(self, client: Any, message: Any) -> None:
        if isinstance(message, dict) and message.get("e") == "trade":
            self._take_trade(client, message)
        else:
            super().take(client, message)

    def _take_trade(self, client: Any, message: Any) -> None:
        # Only what a trade is: ccxt's dispatch and parsing take several times as long as the rest.
        symbol = self.safe_market(message["s"], None, None, "spot")["symbol"]
        cache = self.trades.get(symbol)
        if cache is None:
            return
        cache.append(
            {
                "id": str(message["t"]),
                "timestamp": message["T"],
                "price": message["p"],
                "amount": message["q"],
                "side": "sell" if message["m"] else "buy",
            }
        )
        client.resolve(cache, f"trade::{symbol}")

    def order_book(self, snapshot: Any = None, _depth: int | None = None) -> Any:
        # Whole: of a book that is cut off, what moves up into it is never told.
        return super().order_book(snapshot or {}, None)

    async def fetch_rest_order_book_safe(
        self, symbol: str, limit: int | None = None, params: Any = None
    ) -> Any:
        snapshot = await super().fetch_rest_order_book_safe(symbol, limit, params)
        book = self.orderbooks.get(symbol)
        if book is not None:
            book.reach = _reach(snapshot)
            # What waits for the snapshot is passed over by ccxt from a gap on, without a word.
            if not _follow(book.cache, snapshot["nonce"]):
                raise ChecksumError(f"{self.public_name}: the snapshot's updates have a gap")
        return snapshot

    def handle_order_book_message(self, client: Any, message: Any, orderbook: Any) -> Any:
        told = super().handle_order_book_message(client, message, orderbook)
        lowest, highest = orderbook.reach
        if _last_of_top(orderbook["bids"]) < lowest or _last_of_top(orderbook["asks"]) > highest:
            raise ChecksumError(f"{self.public_name}: the market has left what its snapshot showed")
        return told


def _field(document: Any, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else None


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _kind(message: Any) -> str | None:
    """Whether a message subscribes or unsubscribes."""
    return message.get("method") if isinstance(message, dict) and "params" in message else None


def _follow(updates: Sequence[Any], number: int) -> bool:
    """Whether updates follow each other, and what ``number`` is of, without a gap."""
    for update in updates:
        if update["U"] > number + 1:
            return False
        number = max(number, update["u"])
    return True


def _reach(snapshot: Any) -> tuple[float, float]:
    """The lowest bid and the highest ask up to which a snapshot tells every level."""
    bids, asks = snapshot["bids"], snapshot["asks"]
    return (
        bids[-1][0] if len(bids) >= _SNAPSHOT_LEVELS else 0.0,
        asks[-1][0] if len(asks) >= _SNAPSHOT_LEVELS else math.inf,
    )


def _last_of_top(side: Any) -> float:
    """The price of the last level that anybody is told of."""
    if not side:
        return math.nan
    price: float = side[min(len(side), BOOK_DEPTH) - 1][0]
    return price


class BinanceExchange(CCXTExchangeClient):
    """Binance's spot markets."""

    exchange_name: ClassVar[str] = "binance"
    exchange_id: ClassVar[str] = "binance"
    page_rows: ClassVar[int] = 1_000
    # 6000 of weight a minute and address are allowed, and candles weigh 2: this is 80 %. The list
    # of markets weighs 20, the top of a book 5, a snapshot of 500 levels 25.
    requests_per_second: ClassVar[float] = 40.0
    markets_weight: ClassVar[float] = 10.0
    book_weight: ClassVar[float] = 2.5
    snapshot_weight: ClassVar[float] = 12.5
    subscription_weight: ClassVar[float] = 0.0
    concurrency: ClassVar[int] = 8
    guards: ClassVar[type[VendorGuards]] = BinanceGuards
    books_are_timed: ClassVar[bool] = False
    asks_backwards: ClassVar[bool] = True
    kept_levels: ClassVar[int | None] = None
    options: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "fetchMarkets": {"types": ["spot"]},
            "watchOrderBookLimit": _SNAPSHOT_LEVELS,
            "watchTicker": {"name": "ticker"},
            "watchTickers": {"name": "ticker"},
        }
    )

    def candle_query(
        self, window: TimeRange, period: Interval
    ) -> tuple[int | None, int, dict[str, Any]]:
        # With a start the exchange would give the oldest rows of a long window.
        rows = min(self.page_rows, window.length // period.milliseconds)
        return None, rows, {"until": window.end - 1}
