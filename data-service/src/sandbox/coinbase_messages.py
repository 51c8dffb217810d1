"""What Coinbase's Advanced Trade API writes: products, REST rows and WebSocket frames.

Numbers travel as texts. Times are ISO 8601 in UTC, those of candles seconds since the epoch. A
frame is ``{channel, client_id, timestamp, sequence_num, events}``; it is encoded once for all
clients, and ``numbering`` puts in the ``sequence_num`` of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

from domain.candle import Candle
from domain.order_book import Level, OrderBook
from sandbox.prices import Instrument, Side, Trade
from sandbox.protocol import plain
from sandbox.venue import Ticker

# Of a trade the side of its maker is told.
_MAKER_SIDES: Final[Mapping[Side, str]] = {"buy": "SELL", "sell": "BUY"}
_NUMBER: Final = '"sequence_num":'
_NO_NUMBER: Final = f"{_NUMBER}null"
_FIAT: Final[Mapping[str, str]] = {"USD": "US Dollar", "EUR": "Euro"}
_COINS: Final[Mapping[str, str]] = {
    "BTC": "Bitcoin",
    "ETH": "Ethereum",
    "SOL": "Solana",
    "XRP": "XRP",
    "ADA": "Cardano",
    "DOGE": "Dogecoin",
    "CRO": "Cronos",
    "LRC": "Loopring",
    "LUNA": "Terra",
    "USDT": "Tether",
    "USDC": "USDC",
}

EventType = Literal["snapshot", "update"]


@dataclass(frozen=True, slots=True)
class Product:
    """A market by one of its names.

    Coinbase has one order book for what is quoted in USD and in USDC: ``BTC-USDC`` is an ``alias``
    of ``BTC-USD``, which is ``alias_to`` it.
    """

    id: str
    base: str
    quote: str
    instrument: Instrument
    alias: str = ""
    alias_to: tuple[str, ...] = ()

    @property
    def told_as(self) -> str:
        """The id under which streams tell its data."""
        return self.alias or self.id


def products_of(instruments: Sequence[Instrument]) -> dict[str, Product]:
    """Every product of the spot markets among ``instruments``, by id."""
    spot = {(item.base, item.quote): item for item in instruments if item.spot}
    found: dict[str, Product] = {}
    for (base, quote), instrument in spot.items():
        name, twin = f"{base}-{quote}", f"{base}-USDC"
        has_twin = quote == "USD" and base != "USDC" and (base, "USDC") not in spot
        found[name] = Product(name, base, quote, instrument, alias_to=(twin,) if has_twin else ())
        if has_twin:
            found[twin] = Product(twin, base, "USDC", instrument, alias=name)
    return found


def numbering() -> Callable[[str], str]:
    """What numbers the frames of one connection from 0; texts that are no frames have no number."""
    numbers = itertools.count()

    def numbered(text: str) -> str:
        head, place, rest = text.partition(_NO_NUMBER)
        return f"{head}{_NUMBER}{next(numbers)}{rest}" if place else text

    return numbered


def time_text(timestamp: int) -> str:
    """``timestamp`` (ms) as ISO 8601 with microseconds."""
    moment = datetime.fromtimestamp(timestamp // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{timestamp % 1000:03d}000Z"


def currency_name(code: str) -> str:
    return _FIAT.get(code) or _COINS.get(code, code)


def is_fiat(code: str) -> bool:
    return code in _FIAT


def product_row(product: Product, ticker: Ticker) -> dict[str, Any]:
    instrument = product.instrument
    price_step = _step(instrument.price_decimals)
    amount_step = _step(instrument.quantity_decimals)
    return {
        "product_id": product.id,
        "price": _or_empty(ticker.last),
        "price_percentage_change_24h": _percent(ticker.change),
        "volume_24h": plain(ticker.volume),
        "volume_percentage_change_24h": "",
        "base_increment": amount_step,
        "quote_increment": price_step,
        "quote_min_size": "1",
        "quote_max_size": "50000000",
        "base_min_size": amount_step,
        "base_max_size": "100000000",
        "base_name": currency_name(product.base),
        "quote_name": currency_name(product.quote),
        "watched": False,
        "is_disabled": not instrument.active,
        "new": False,
        "status": _status(instrument),
        "cancel_only": False,
        "limit_only": False,
        "post_only": False,
        "trading_disabled": not instrument.active,
        "auction_mode": False,
        "product_type": "SPOT",
        "quote_currency_id": product.quote,
        "base_currency_id": product.base,
        "fcm_trading_session_details": None,
        "mid_market_price": "",
        "alias": product.alias,
        "alias_to": list(product.alias_to),
        "base_display_symbol": product.base,
        "quote_display_symbol": product.quote,
        "view_only": not instrument.active,
        "price_increment": price_step,
        "display_name": product.id,
        "product_venue": "CBE",
        "approximate_quote_24h_volume": plain(ticker.quote_volume),
        "new_at": "2020-01-01T00:00:00Z",
    }


def candle_row(candle: Candle) -> dict[str, str]:
    return {
        "start": str(candle.timestamp // 1000),
        "low": plain(candle.low),
        "high": plain(candle.high),
        "open": plain(candle.open),
        "close": plain(candle.close),
        "volume": plain(candle.volume),
    }


def trade_row(product_id: str, trade: Trade) -> dict[str, str]:
    return {**_trade(product_id, trade), "bid": "", "ask": "", "exchange": "coinbase"}


def book_answer(product_id: str, book: OrderBook, last: float | None) -> dict[str, Any]:
    """The book as REST tells it, with figures of its middle."""
    bid, ask = book.bids[0][0], book.asks[0][0]
    middle = (bid + ask) / 2
    return {
        "pricebook": {
            "product_id": product_id,
            "bids": _levels(book.bids),
            "asks": _levels(book.asks),
            "time": time_text(book.timestamp),
        },
        "last": _or_empty(last),
        "mid_market": plain(middle),
        "spread_bps": plain(round((ask - bid) / middle * 10_000, 12)),
        "spread_absolute": plain(round(ask - bid, 12)),
    }


def frame(channel: str, timestamp: int, *events: Mapping[str, Any]) -> str:
    """A frame that has no number yet."""
    return orjson.dumps(
        {
            "channel": channel,
            "client_id": "",
            "timestamp": time_text(timestamp),
            "sequence_num": None,
            "events": events,
        }
    ).decode()


def error(message: str) -> str:
    return orjson.dumps({"type": "error", "message": message}).decode()


def subscriptions_event(channels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {"subscriptions": {name: list(ids) for name, ids in channels.items()}}


def heartbeat_event(timestamp: int, monotonic: float, counter: int) -> dict[str, Any]:
    moment = datetime.fromtimestamp(timestamp // 1000, UTC)
    current = (
        f"{moment:%Y-%m-%d %H:%M:%S}.{timestamp % 1000:03d}000000 +0000 UTC m=+{monotonic:.9f}"
    )
    return {"current_time": current, "heartbeat_counter": counter}


def candles_event(kind: EventType, product_id: str, candles: Sequence[Candle]) -> dict[str, Any]:
    rows = [{**candle_row(candle), "product_id": product_id} for candle in candles]
    return {"type": kind, "candles": rows}


def trades_event(kind: EventType, product_id: str, trades: Sequence[Trade]) -> dict[str, Any]:
    """``trades``, which ascend, with the newest first."""
    return {"type": kind, "trades": [_trade(product_id, trade) for trade in reversed(trades)]}


def ticker_event(
    kind: EventType, product_id: str, ticker: Ticker, *, with_book: bool
) -> dict[str, Any]:
    """The ticker; nobody looks back over 52 weeks here, whose extremes are those of the day."""
    low, high = _or_empty(ticker.low), _or_empty(ticker.high)
    row = {
        "type": "ticker",
        "product_id": product_id,
        "price": _or_empty(ticker.last),
        "volume_24_h": plain(ticker.volume),
        "low_24_h": low,
        "high_24_h": high,
        "low_52_w": low,
        "high_52_w": high,
        "price_percent_chg_24_h": _percent(ticker.change),
    }
    if with_book:
        (bid, bid_size), (ask, ask_size) = ticker.book.bids[0], ticker.book.asks[0]
        row |= {
            "best_bid": plain(bid),
            "best_bid_quantity": plain(bid_size),
            "best_ask": plain(ask),
            "best_ask_quantity": plain(ask_size),
        }
    return {"type": kind, "tickers": [row]}


def level2_event(
    kind: EventType,
    product_id: str,
    bids: Sequence[Level],
    asks: Sequence[Level],
    timestamp: int,
) -> dict[str, Any]:
    """Levels and the amount that each has now; 0 removes it."""
    at = time_text(timestamp)
    updates = [
        {
            "side": side,
            "event_time": at,
            "price_level": plain(price),
            "new_quantity": plain(amount) if amount else "0",
        }
        for side, levels in (("bid", bids), ("offer", asks))
        for price, amount in levels
    ]
    return {"type": kind, "product_id": product_id, "updates": updates}


def status_event(kind: EventType, product: Product) -> dict[str, Any]:
    instrument = product.instrument
    row = {
        "product_type": "SPOT",
        "id": product.id,
        "base_currency": product.base,
        "quote_currency": product.quote,
        "base_increment": _step(instrument.quantity_decimals),
        "quote_increment": _step(instrument.price_decimals),
        "display_name": f"{product.base}/{product.quote}",
        "status": _status(instrument),
        "status_message": "",
        "min_market_funds": "1",
    }
    return {"type": kind, "products": [row]}


def _trade(product_id: str, trade: Trade) -> dict[str, str]:
    return {
        "trade_id": str(trade.id),
        "product_id": product_id,
        "price": plain(trade.price),
        "size": plain(trade.amount),
        "time": time_text(trade.timestamp),
        "side": _MAKER_SIDES[trade.side],
    }


def _levels(levels: Sequence[Level]) -> list[dict[str, str]]:
    return [{"price": plain(price), "size": plain(amount)} for price, amount in levels]


def _status(instrument: Instrument) -> str:
    return "online" if instrument.active else "delisted"


def _step(decimals: int) -> str:
    return format(10.0**-decimals, f".{decimals}f")


def _percent(change: float | None) -> str:
    return "" if change is None else plain(round(change * 100, 4))


def _or_empty(value: float | None) -> str:
    return "" if value is None else plain(value)
