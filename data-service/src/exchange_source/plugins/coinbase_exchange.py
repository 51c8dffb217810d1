"""Coinbase (Advanced Trade): what differs from other ccxt exchanges.

Candles: 300 in an answer and never more than that asked for; none of a period without trades. Of
live candles there is a channel for 5m; those of other intervals are made of trades. Live books are
the whole book. A channel that is quiet is closed unless heartbeats are subscribed beside it, and
what a socket lost shows in the numbers of its messages. Of a trade the side of its maker is told.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from ccxt.async_support.base.ws.cache import ArrayCache, ArrayCacheByTimestamp

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import TimeRange
from exchange_source.interfaces import ExchangeUnavailable, Priority
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.ccxt_guards import VendorGuards
from exchange_source.plugins.ws_requests import GatheredRequests

# 8 messages a second are allowed to who has no account.
_MESSAGE_PAUSE_S: Final = 0.2
_PRODUCTS_A_MESSAGE: Final = 100
_HEARTBEATS: Final = {"type": "subscribe", "channel": "heartbeats", "product_ids": []}
_STREAMED: Final = "5m"
# 2012-01-01: nothing was traded here before.
_FIRST_DAY_MS: Final = 1_325_376_000_000
# What the taker did, by the side that is told of a trade, its maker's.
_TAKEN: Final = {"BUY": "sell", "SELL": "buy"}
_CANDLES_KEPT: Final = 100
_TRADES_KEPT: Final = 1_000
# The field that an answer of a path cannot do without.
_CONTENT: Final = {
    "candles": "candles",
    "products": "products",
    "product_book": "pricebook",
}


class CoinbaseGuards(VendorGuards):
    """The shapes of Coinbase's answers and messages, and what ccxt leaves out of its protocol."""

    def answer_problem(self, url: str, response: Any) -> str | None:
        wanted = _CONTENT.get(urlsplit(url).path.rpartition("/")[2])
        if wanted is None or (isinstance(response, dict) and response.get(wanted) is not None):
            return None
        return f"has no {wanted}"

    async def request(self, path: str, *args: Any, **kwargs: Any) -> Any:
        # Of markets ccxt asks for futures too: a second request in the slot of one.
        params = args[2] if len(args) > 2 else kwargs.get("params")
        if isinstance(params, dict) and params.get("product_type") == "FUTURE":
            return {}
        return await super().request(path, *args, **kwargs)

    def client(self, url: str) -> Any:
        socket = super().client(url)
        if not hasattr(socket, "last_number"):
            socket.last_number = None
            requests = GatheredRequests(
                socket.send,
                names="product_ids",
                kind=_kind,
                tasks=self.closing,
                pause_s=_MESSAGE_PAUSE_S,
                most=_PRODUCTS_A_MESSAGE,
            )
            send, heartbeats = requests.send, [_HEARTBEATS]

            async def send_after_heartbeats(message: Any) -> None:
                while heartbeats:
                    await send(heartbeats.pop())
                await send(message)

            socket.send = send_after_heartbeats
        return socket

    def handle_message(self, client: Any, message: Any) -> None:
        number = message.get("sequence_num") if isinstance(message, dict) else None
        if isinstance(number, int):
            lost = client.last_number is not None and number > client.last_number + 1
            client.last_number = number
            if lost:
                self.fail_socket(
                    client,
                    ExchangeUnavailable(f"{self.public_name}: messages before {number} lost"),
                )
                return
        super().handle_message(client, message)

    def topics_of(self, message: Any) -> list[str]:
        channel = message.get("channel") if isinstance(message, dict) else None
        topic = "level2" if channel == "l2_data" else channel
        return [
            f"{topic}::{symbol}"
            for product in dict.fromkeys(
                part["product_id"] for part in _parts(message) if "product_id" in part
            )
            for symbol in self._symbols(product)
        ]

    def handle_trade(self, client: Any, message: Any) -> None:
        # ccxt puts all of a message into the cache of its first product, and takes the maker's side
        # for the taker's. Only what a trade is: its own parsing takes three times as long.
        told: dict[str, Any] = {}
        for event in message["events"]:
            for trade in reversed(event["trades"]):  # they come newest first
                parsed = {
                    "id": str(trade["trade_id"]),
                    "timestamp": self.parse8601(trade["time"]),
                    "price": trade["price"],
                    "amount": trade["size"],
                    "side": _TAKEN[trade["side"]],
                }
                for symbol in self._symbols(trade["product_id"]):
                    told.setdefault(symbol, []).append(parsed)
        for symbol, trades in told.items():
            cache = self.trades.setdefault(symbol, ArrayCache(_TRADES_KEPT))
            for trade in trades:
                cache.append(trade)
            client.resolve(cache, f"market_trades::{symbol}")

    async def watch_ohlcv(
        self, symbol: str, timeframe: str, since: Any = None, limit: Any = None, params: Any = None
    ) -> Any:
        del since, limit, params  # what there is is told from now on
        if timeframe != _STREAMED:
            raise ValueError(f"candles of {timeframe} are not streamed here")
        return await self.subscribe("candles", isPrivate=False, symbol=symbol)

    async def un_watch_ohlcv(self, symbol: str, timeframe: str, params: Any = None) -> Any:
        del params
        await self.un_subscribe("ohlcv", "candles", isPrivate=False, symbol=symbol)
        self.ohlcvs.get(symbol, {}).pop(timeframe, None)

    async def un_subscribe(
        self,
        topic: str,
        name: str,
        isPrivate: bool,  # noqa: FBT001, N803  ccxt calls it by position and name
        symbol: Any = None,
    ) -> Any:
        # ccxt waits for an answer that comes only when nothing at all is left subscribed, and
        # makes every other unsubscription wait for it.
        del isPrivate
        socket = self.client(self.urls["api"]["ws"])
        message_hash = f"{name}::{symbol}"
        product = self.market(symbol)["id"]
        await socket.send({"type": "unsubscribe", "product_ids": [product], "channel": name})
        self.clean_unsubscription(socket, message_hash, None)
        self.clean_cache({"topic": topic, "symbols": [symbol]})

    def take(self, client: Any, message: Any) -> None:
        if message.get("channel") != "candles":
            super().take(client, message)
            return
        told: dict[str, Any] = {}
        for event in message["events"]:
            for candle in sorted(event["candles"], key=lambda candle: int(candle["start"])):
                for symbol in self._symbols(candle["product_id"]):
                    series = self.ohlcvs.setdefault(symbol, {})
                    if _STREAMED not in series:
                        series[_STREAMED] = ArrayCacheByTimestamp(_CANDLES_KEPT)
                    series[_STREAMED].append(self.parse_ohlcv(candle))
                    told[symbol] = series[_STREAMED]
        for symbol, cache in told.items():
            client.resolve(cache, f"candles::{symbol}")

    def _symbols(self, product: str) -> list[str]:
        """The markets that news of a product is about: what is told of one against USD is told of
        the same against USDC too, which is subscribed by its own name."""
        symbol = self.safe_market(product)["symbol"]
        twin = f"{symbol}C"
        return [symbol, twin] if symbol.endswith("/USD") and twin in self.markets else [symbol]


def _parts(message: Any) -> list[dict[str, Any]]:
    """The events of a message and what they hold."""
    found: list[dict[str, Any]] = []
    events = message.get("events") if isinstance(message, dict) else None
    for event in events if isinstance(events, list) else ():
        if isinstance(event, dict):
            held = [item for items in event.values() if isinstance(items, list) for item in items]
            found += [event, *(item for item in held if isinstance(item, dict))]
    return found


def _kind(message: Any) -> tuple[Any, Any] | None:
    """What it does, and of which channel; None for what is about no products."""
    if not isinstance(message, dict) or "product_ids" not in message:
        return None
    return message["type"], message["channel"]


class CoinbaseExchange(CCXTExchangeClient):
    """Coinbase's spot markets."""

    exchange_name: ClassVar[str] = "coinbase"
    exchange_id: ClassVar[str] = "coinbase"
    page_rows: ClassVar[int] = 300
    # 10 a second and address for who has no account.
    requests_per_second: ClassVar[float] = 8.0
    subscription_weight: ClassVar[float] = 0.0
    concurrency: ClassVar[int] = 4
    guards: ClassVar[type[VendorGuards]] = CoinbaseGuards
    kept_levels: ClassVar[int | None] = None
    streamed_intervals: ClassVar[frozenset[str] | None] = frozenset({_STREAMED})

    def candle_query(
        self,
        window: TimeRange,
        period: Interval,  # noqa: ARG002  it asks by the window's ends
    ) -> tuple[int | None, int, dict[str, Any]]:
        # Seconds there, and both ends belong to the window.
        return window.start, self.page_rows, {"until": window.end - 1_000}

    async def fetch_rows(
        self, market: str, period: Interval, window: TimeRange, priority: Priority
    ) -> tuple[list[Candle], int]:
        # A longer window than one of `page_rows` periods is refused. So it is asked for in parts,
        # newest first, until there are as many rows as would fit; where a part is empty, longer
        # candles say where the next rows are.
        rest = TimeRange(max(window.start, _FIRST_DAY_MS), window.end)
        rows: list[Candle] = []
        earliest: int | None = None
        while rest and len(rows) < self.page_rows:
            start = max(rest.start, rest.end - self.page_rows * period.milliseconds)
            older, told_at = await super().fetch_rows(
                market, period, TimeRange(start, rest.end), priority
            )
            earliest = min(earliest or told_at, told_at)
            rows = older + rows
            rest = TimeRange(rest.start, start)
            longer = self._longer(period)
            if rest and not older and longer is not None:
                part = TimeRange(longer.floor(rest.start), rest.end)
                found, told_at = await self.fetch_rows(market, longer, part, priority)
                earliest = min(earliest, told_at)
                last = found[-1].timestamp + longer.milliseconds if found else rest.start
                rest = TimeRange(rest.start, min(rest.end, last))
        return rows[-self.page_rows :], earliest or 0

    def _longer(self, period: Interval) -> Interval | None:
        """The longest interval of whose periods each fits into one answer of ``period``."""
        offered = [Interval.parse(name) for name in self.intervals]
        most = self.page_rows * period.milliseconds
        fitting = [item for item in offered if period < item and item.milliseconds <= most]
        return max(fitting, default=None)
