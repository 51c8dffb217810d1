"""What ccxt parsed, as values of the domain: the one place where its structures are believed."""

from __future__ import annotations

from typing import Any

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.ticker import Ticker
from domain.trade import Trade
from errors import InvalidEntry
from exchange_source.interfaces import BadExchangeAnswer


def to_candle(row: Any, interval: Interval, exchange: str) -> Candle:
    """One row ``[ms, open, high, low, close, volume]`` as a value.

    Raises:
        BadExchangeAnswer: the row is no candle of the interval.
    """
    try:
        timestamp, *values = row
        open_, high, low, close, volume = (float(value) for value in values)
        candle = Candle(_integer(timestamp), open_, high, low, close, volume)
    except (TypeError, ValueError, InvalidEntry) as exc:
        raise BadExchangeAnswer(f"{exchange}: no candle: {row!r:.200} ({exc})") from exc
    if not interval.is_aligned(candle.timestamp):
        raise BadExchangeAnswer(f"{exchange}: {candle.timestamp} opens no {interval} period")
    return candle


def to_order_book(book: Any, depth: int, exchange: str) -> OrderBook:
    """ccxt's book as a value: its best ``depth`` levels, without empty ones.

    Raises:
        BadExchangeAnswer: it has no time, is not sorted, or bids and asks cross.
    """
    try:
        return OrderBook(
            timestamp=_integer(book["timestamp"]),
            bids=_levels(book["bids"], depth),
            asks=_levels(book["asks"], depth),
        )
    except (TypeError, ValueError, KeyError, IndexError, InvalidEntry) as exc:
        raise BadExchangeAnswer(f"{exchange}: no order book: {exc}") from exc


def to_trade(trade: Any, exchange: str) -> Trade:
    """ccxt's trade as a value.

    Raises:
        BadExchangeAnswer: it has no id, time, price, amount or side.
    """
    try:
        return Trade(
            id=trade["id"],
            timestamp=_integer(trade["timestamp"]),
            price=float(trade["price"]),
            amount=float(trade["amount"]),
            side=trade["side"],
        )
    except (TypeError, ValueError, KeyError, InvalidEntry) as exc:
        raise BadExchangeAnswer(f"{exchange}: no trade: {trade!r:.300} ({exc})") from exc


def to_ticker(ticker: Any, exchange: str) -> Ticker:
    """ccxt's ticker as a value.

    Raises:
        BadExchangeAnswer: it has no time, or a value that cannot be.
    """
    try:
        return Ticker(
            timestamp=_integer(ticker["timestamp"]),
            last=_number(ticker["last"]),
            bid=_number(ticker["bid"]),
            ask=_number(ticker["ask"]),
            high=_number(ticker["high"]),
            low=_number(ticker["low"]),
            base_volume=_number(ticker["baseVolume"]),
            change_percent=_number(ticker["percentage"]),
        )
    except (TypeError, ValueError, KeyError, InvalidEntry) as exc:
        raise BadExchangeAnswer(f"{exchange}: no ticker: {ticker!r:.300} ({exc})") from exc


def _levels(side: Any, depth: int) -> tuple[tuple[float, float], ...]:
    found: list[tuple[float, float]] = []
    for level in side:
        if len(found) == depth:
            break
        if level[1]:
            found.append((float(level[0]), float(level[1])))
    return tuple(found)


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no time in ms")
    return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
