"""What Binance's messages look like: pure functions from what the venue tells.

Prices and amounts are texts of at least eight decimals, times are ms. Of a candle's trades Binance
tells more than a candle knows; their number, what they cost and what their takers bought is
estimated here (see ``Turnover``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from sandbox.prices import DAY_MS, Instrument, Trade
from sandbox.protocol import plain
from sandbox.venue import Ticker

_DECIMALS: Final = 8
_ORDER_TYPES: Final = (
    "LIMIT",
    "LIMIT_MAKER",
    "MARKET",
    "STOP_LOSS",
    "STOP_LOSS_LIMIT",
    "TAKE_PROFIT",
    "TAKE_PROFIT_LIMIT",
)
# In smallest steps, what an estimated trade is of.
_TYPICAL_STEPS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Turnover:
    """An estimate of the trades that made a volume: at the mean price, half of it bought.

    Nothing was traded exactly when ``trades`` is 0.
    """

    trades: int
    quote: float
    taker_base: float
    taker_quote: float

    @classmethod
    def of(cls, instrument: Instrument, volume: float, price: float, length_ms: int) -> Turnover:
        """Of ``volume`` at about ``price`` in ``length_ms``: at most one trade a second."""
        steps = round(volume * 10**instrument.quantity_decimals)
        bought = round(volume / 2, instrument.quantity_decimals)
        return cls(
            trades=min(1 + steps // _TYPICAL_STEPS, length_ms // 1_000) if volume else 0,
            quote=round(volume * price, _DECIMALS),
            taker_base=bought,
            taker_quote=round(bought * price, _DECIMALS),
        )

    @classmethod
    def of_candle(cls, instrument: Instrument, candle: Candle, interval: Interval) -> Turnover:
        price = (candle.open + candle.high + candle.low + candle.close) / 4
        return cls.of(instrument, candle.volume, price, interval.milliseconds)


def symbol_of(instrument: Instrument) -> str:
    return f"{instrument.base}{instrument.quote}"


def decimal(value: float) -> str:
    """``value`` with at least eight decimals, and with more where it would not read back else."""
    whole, _, fraction = plain(float(value)).partition(".")
    return f"{whole}.{fraction:0<{_DECIMALS}}"


def levels(side: Sequence[Level]) -> list[list[str]]:
    return [[decimal(price), decimal(amount)] for price, amount in side]


def exchange_info(instruments: Sequence[Instrument], now: int) -> dict[str, Any]:
    limits = (
        ("REQUEST_WEIGHT", "MINUTE", 1, 6_000),
        ("ORDERS", "SECOND", 10, 100),
        ("ORDERS", "DAY", 1, 200_000),
        ("RAW_REQUESTS", "MINUTE", 5, 61_000),
    )
    return {
        "timezone": "UTC",
        "serverTime": now,
        "rateLimits": [
            {"rateLimitType": kind, "interval": unit, "intervalNum": count, "limit": limit}
            for kind, unit, count, limit in limits
        ],
        "exchangeFilters": [],
        "symbols": [_symbol_info(instrument) for instrument in instruments],
    }


def _symbol_info(instrument: Instrument) -> dict[str, Any]:
    return {
        "symbol": symbol_of(instrument),
        "status": "TRADING" if instrument.active else "BREAK",
        "baseAsset": instrument.base,
        "baseAssetPrecision": _DECIMALS,
        "quoteAsset": instrument.quote,
        "quotePrecision": _DECIMALS,
        "quoteAssetPrecision": _DECIMALS,
        "baseCommissionPrecision": _DECIMALS,
        "quoteCommissionPrecision": _DECIMALS,
        "orderTypes": list(_ORDER_TYPES),
        "icebergAllowed": True,
        "ocoAllowed": True,
        "otoAllowed": True,
        "opoAllowed": False,
        "quoteOrderQtyMarketAllowed": True,
        "allowTrailingStop": True,
        "cancelReplaceAllowed": True,
        "amendAllowed": True,
        "pegInstructionsAllowed": False,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": _filters(instrument),
        "permissions": [],
        "permissionSets": [["SPOT"]],
        "defaultSelfTradePreventionMode": "EXPIRE_MAKER",
        "allowedSelfTradePreventionModes": ["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"],
    }


def _filters(instrument: Instrument) -> list[dict[str, Any]]:
    tick = decimal(10.0**-instrument.price_decimals)
    step = decimal(10.0**-instrument.quantity_decimals)
    notional = decimal(0.0001 if instrument.quote == "BTC" else 5.0)
    return [
        {
            "filterType": "PRICE_FILTER",
            "minPrice": tick,
            "maxPrice": decimal(1_000_000.0),
            "tickSize": tick,
        },
        {
            "filterType": "LOT_SIZE",
            "minQty": step,
            "maxQty": decimal(9_000_000.0),
            "stepSize": step,
        },
        {"filterType": "ICEBERG_PARTS", "limit": 100},
        {
            "filterType": "MARKET_LOT_SIZE",
            "minQty": decimal(0.0),
            "maxQty": decimal(100_000.0),
            "stepSize": decimal(0.0),
        },
        {
            "filterType": "PERCENT_PRICE_BY_SIDE",
            "bidMultiplierUp": "5",
            "bidMultiplierDown": "0.2",
            "askMultiplierUp": "5",
            "askMultiplierDown": "0.2",
            "avgPriceMins": 5,
        },
        {
            "filterType": "NOTIONAL",
            "minNotional": notional,
            "applyMinToMarket": True,
            "maxNotional": decimal(9_000_000.0),
            "applyMaxToMarket": False,
            "avgPriceMins": 5,
        },
        {"filterType": "MAX_NUM_ORDERS", "maxNumOrders": 200},
        {"filterType": "MAX_NUM_ALGO_ORDERS", "maxNumAlgoOrders": 5},
    ]


def kline_row(instrument: Instrument, candle: Candle, interval: Interval) -> list[Any]:
    """The twelve columns of REST."""
    turnover = Turnover.of_candle(instrument, candle, interval)
    return [
        candle.timestamp,
        decimal(candle.open),
        decimal(candle.high),
        decimal(candle.low),
        decimal(candle.close),
        decimal(candle.volume),
        candle.timestamp + interval.milliseconds - 1,
        decimal(turnover.quote),
        turnover.trades,
        decimal(turnover.taker_base),
        decimal(turnover.taker_quote),
        "0",
    ]


def kline_event(
    instrument: Instrument,
    candle: Candle,
    interval: Interval,
    trade_ids: tuple[int, int],
    at_ms: int,
    *,
    closed: bool,
) -> dict[str, Any]:
    """``trade_ids`` are the first and the last of the period, -1 for none."""
    turnover = Turnover.of_candle(instrument, candle, interval)
    return {
        "e": "kline",
        "E": at_ms,
        "s": symbol_of(instrument),
        "k": {
            "t": candle.timestamp,
            "T": candle.timestamp + interval.milliseconds - 1,
            "s": symbol_of(instrument),
            "i": interval.name,
            "f": trade_ids[0],
            "L": trade_ids[1],
            "o": decimal(candle.open),
            "c": decimal(candle.close),
            "h": decimal(candle.high),
            "l": decimal(candle.low),
            "v": decimal(candle.volume),
            "n": turnover.trades,
            "x": closed,
            "q": decimal(turnover.quote),
            "V": decimal(turnover.taker_base),
            "Q": decimal(turnover.taker_quote),
            "B": "0",
        },
    }


def trade_row(trade: Trade) -> dict[str, Any]:
    return {
        "id": trade.id,
        "price": decimal(trade.price),
        "qty": decimal(trade.amount),
        "quoteQty": decimal(round(trade.price * trade.amount, _DECIMALS)),
        "time": trade.timestamp,
        "isBuyerMaker": trade.side == "sell",
        "isBestMatch": True,
    }


def aggregate_row(trade: Trade) -> dict[str, Any]:
    """Every trade is an aggregate of its own here."""
    return {
        "a": trade.id,
        "p": decimal(trade.price),
        "q": decimal(trade.amount),
        "f": trade.id,
        "l": trade.id,
        "T": trade.timestamp,
        "m": trade.side == "sell",
        "M": True,
    }


def aggregate_event(instrument: Instrument, trade: Trade, at_ms: int) -> dict[str, Any]:
    return {
        "e": "aggTrade",
        "E": at_ms,
        "s": symbol_of(instrument),
        **aggregate_row(trade),
    }


def trade_event(instrument: Instrument, trade: Trade, at_ms: int) -> dict[str, Any]:
    return {
        "e": "trade",
        "E": at_ms,
        "s": symbol_of(instrument),
        "t": trade.id,
        "p": decimal(trade.price),
        "q": decimal(trade.amount),
        "T": trade.timestamp,
        "m": trade.side == "sell",
        "M": True,
    }


def depth_event(
    instrument: Instrument,
    bids: Sequence[Level],
    asks: Sequence[Level],
    first: int,
    last: int,
    at_ms: int,
) -> dict[str, Any]:
    return {
        "e": "depthUpdate",
        "E": at_ms,
        "s": symbol_of(instrument),
        "U": first,
        "u": last,
        "b": levels(bids),
        "a": levels(asks),
    }


def depth_snapshot(book: OrderBook, number: int) -> dict[str, Any]:
    return {"lastUpdateId": number, "bids": levels(book.bids), "asks": levels(book.asks)}


def book_ticker_event(instrument: Instrument, book: OrderBook, number: int) -> dict[str, Any]:
    (bid, bid_size), (ask, ask_size) = book.bids[0], book.asks[0]
    return {
        "u": number,
        "s": symbol_of(instrument),
        "b": decimal(bid),
        "B": decimal(bid_size),
        "a": decimal(ask),
        "A": decimal(ask_size),
    }


def book_ticker_row(instrument: Instrument, book: OrderBook) -> dict[str, Any]:
    (bid, bid_size), (ask, ask_size) = book.bids[0], book.asks[0]
    return {
        "symbol": symbol_of(instrument),
        "bidPrice": decimal(bid),
        "bidQty": decimal(bid_size),
        "askPrice": decimal(ask),
        "askQty": decimal(ask_size),
    }


@dataclass(frozen=True, slots=True)
class Day:
    """The last 24 hours of a market as Binance tells them: as texts, zeros when nothing traded."""

    symbol: str
    opened: str
    high: str
    low: str
    last: str
    last_amount: str
    change: str
    per_cent: str
    mean: str
    volume: str
    quote_volume: str
    bid: Sequence[str]
    ask: Sequence[str]
    start: int
    end: int
    first_id: int
    last_id: int
    trades: int

    @classmethod
    def of(
        cls, instrument: Instrument, ticker: Ticker, first: Trade | None, last: Trade | None
    ) -> Day:
        """``first`` and ``last`` are the trades at both ends of the 24 hours, None without any."""
        opened, price = ticker.open or 0.0, ticker.last or 0.0
        change = round(price - opened, instrument.price_decimals)
        mean = ticker.quote_volume / ticker.volume if ticker.volume else 0.0
        turnover = Turnover.of(instrument, ticker.volume, mean, DAY_MS)
        return cls(
            symbol=symbol_of(instrument),
            opened=decimal(opened),
            high=decimal(ticker.high or 0.0),
            low=decimal(ticker.low or 0.0),
            last=decimal(price),
            last_amount=decimal(last.amount if last else 0.0),
            change=decimal(change),
            per_cent=f"{100 * (ticker.change or 0.0):.3f}",
            mean=decimal(round(mean, _DECIMALS)),
            volume=decimal(ticker.volume),
            quote_volume=decimal(ticker.quote_volume),
            bid=levels(ticker.book.bids[:1])[0],
            ask=levels(ticker.book.asks[:1])[0],
            start=ticker.timestamp - DAY_MS,
            end=ticker.timestamp,
            first_id=first.id if first else -1,
            last_id=last.id if last else -1,
            trades=turnover.trades,
        )

    def row(self) -> dict[str, Any]:
        return {
            "symbol": self.symbol,
            "priceChange": self.change,
            "priceChangePercent": self.per_cent,
            "weightedAvgPrice": self.mean,
            "prevClosePrice": self.opened,
            "lastPrice": self.last,
            "lastQty": self.last_amount,
            "bidPrice": self.bid[0],
            "bidQty": self.bid[1],
            "askPrice": self.ask[0],
            "askQty": self.ask[1],
            "openPrice": self.opened,
            "highPrice": self.high,
            "lowPrice": self.low,
            "volume": self.volume,
            "quoteVolume": self.quote_volume,
            "openTime": self.start,
            "closeTime": self.end,
            "firstId": self.first_id,
            "lastId": self.last_id,
            "count": self.trades,
        }

    def short_row(self) -> dict[str, Any]:
        """What REST tells when ``type=MINI`` is asked for."""
        left_out = {"priceChange", "priceChangePercent", "weightedAvgPrice", "prevClosePrice"}
        left_out |= {"lastQty", "bidPrice", "bidQty", "askPrice", "askQty"}
        return {name: value for name, value in self.row().items() if name not in left_out}

    def event(self) -> dict[str, Any]:
        return {
            "e": "24hrTicker",
            "E": self.end,
            "s": self.symbol,
            "p": self.change,
            "P": self.per_cent,
            "w": self.mean,
            "x": self.opened,
            "c": self.last,
            "Q": self.last_amount,
            "b": self.bid[0],
            "B": self.bid[1],
            "a": self.ask[0],
            "A": self.ask[1],
            "o": self.opened,
            "h": self.high,
            "l": self.low,
            "v": self.volume,
            "q": self.quote_volume,
            "O": self.start,
            "C": self.end,
            "F": self.first_id,
            "L": self.last_id,
            "n": self.trades,
        }

    def short_event(self) -> dict[str, Any]:
        return {
            "e": "24hrMiniTicker",
            "E": self.end,
            "s": self.symbol,
            "c": self.last,
            "o": self.opened,
            "h": self.high,
            "l": self.low,
            "v": self.volume,
            "q": self.quote_volume,
        }
