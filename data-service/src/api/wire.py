"""How values of the domain are written for clients: plain dictionaries, keys in published order."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import msgspec
import orjson

from collection.interfaces import (
    Availability,
    BookTold,
    CandleEvent,
    Channel,
    ChannelEvent,
    ClosedCandle,
    FormingCandle,
    GapTold,
    StatusTold,
    TargetStatus,
    TickerTold,
    TradesTold,
)
from domain.candle import Candle
from domain.entry import SCHEMA, Entry
from domain.series import Series
from historical.interfaces import Coverage, CurrentData, History, Summary
from historical.messages import gap_out
from models import HISTORY_COLUMNS

_ENCODED_EVENTS: Final = 1_024
VWAP_METHOD: Final = "approximate: typical price (high + low + close) / 3 weighted by volume"


def target_out(status: TargetStatus) -> dict[str, Any]:
    target = status.target
    return {
        "target_id": target.target_id,
        "coin": target.coin,
        "exchange": target.exchange,
        "exchange_id": target.exchange_id,
        "market": target.market,
        "interval": target.interval,
        "enabled": target.enabled,
        "since": target.since,
        "created_at": target.created_at,
        "last_updated": target.last_updated,
        "state": status.state.value,
        "last_entry": status.last_entry,
        "lag_ms": status.lag_ms,
    }


def availability_out(found: Availability) -> dict[str, Any]:
    return {
        "coin": found.coin,
        "available": found.available,
        "markets": [
            {"exchange": item.exchange, "market": item.market, "collecting": item.collecting}
            for item in found.markets
        ],
        "unreachable": list(found.unreachable),
    }


def candle_out(candle: Candle) -> dict[str, Any]:
    return {
        "timestamp": candle.timestamp,
        "open": candle.open,
        "high": candle.high,
        "low": candle.low,
        "close": candle.close,
        "volume": candle.volume,
    }


def closed_out(entry: Entry) -> dict[str, Any]:
    return {**entry.to_document(), "closed": True}


def forming_out(series: Series, market: str, candle: Candle) -> dict[str, Any]:
    """In the shape of an entry; revision 0, because nothing of it is stored yet."""
    return {
        "exchange": series.exchange,
        "coin": series.coin,
        "market": market,
        "interval": series.interval.name,
        **candle_out(candle),
        "order_book": None,
        "source": "stream",
        "revision": 0,
        "schema": SCHEMA,
        "closed": False,
    }


def current_out(current: CurrentData) -> dict[str, Any]:
    data = (
        forming_out(current.series, current.market, current.candle)
        if current.entry is None
        else closed_out(current.entry)
    )
    return {"data": data, "age_ms": current.age_ms}


def history_out(history: History) -> dict[str, Any]:
    interval = history.series.interval
    return {
        "exchange": history.series.exchange,
        "coin": history.series.coin,
        "market": history.market,
        "interval": interval.name,
        "start": history.range.start,
        "end": history.range.end,
        "columns": list(HISTORY_COLUMNS),
        "rows": history.candles.rows(),
        "count": len(history.candles),
        "next_start": history.next_start,
        "gaps": [gap_out(gap, interval) for gap in history.gaps],
        "sources": {"storage": history.from_storage, "exchange": history.from_exchange},
    }


def summary_out(summary: Summary) -> dict[str, Any]:
    interval = summary.series.interval
    return {
        "exchange": summary.series.exchange,
        "coin": summary.series.coin,
        "market": summary.market,
        "interval": interval.name,
        "start": summary.range.start,
        "end": summary.range.end,
        "count": summary.count,
        "first": candle_out(summary.first),
        "last": candle_out(summary.last),
        "high": summary.high,
        "low": summary.low,
        "change_percent": summary.change_percent,
        "volume": summary.volume,
        "vwap": summary.vwap,
        "vwap_method": VWAP_METHOD,
        "volatility": summary.volatility,
        "max_drawdown_percent": summary.max_drawdown_percent,
        "columns": list(HISTORY_COLUMNS),
        "rows": summary.candles.rows(),
        "periods_per_row": summary.candle_periods,
        "gaps": [gap_out(gap, interval) for gap in summary.gaps],
    }


def coverage_out(coverage: Coverage) -> dict[str, Any]:
    interval = coverage.series.interval
    return {
        "first": coverage.first,
        "last": coverage.last,
        "expected": coverage.expected,
        "stored": coverage.stored,
        "with_order_book": coverage.with_order_book,
        "ranges": [
            {
                "start": item.start,
                "end": item.end,
                "count": item.length // interval.milliseconds,
            }
            for item in coverage.ranges
        ],
        "gaps": [gap_out(gap, interval) for gap in coverage.gaps],
    }


class EventEncoder:
    """Events as JSON, each written once for all its subscribers: by far the most of what a message
    costs. It remembers the last that it wrote."""

    def __init__(self) -> None:
        # With the event itself, so that no other can take its id while it is remembered.
        self._written: OrderedDict[tuple[int, Series], tuple[object, bytes]] = OrderedDict()
        self._values = msgspec.json.Encoder()

    def message(
        self,
        event: CandleEvent | ChannelEvent,
        series: Series,
        market: str,
        *,
        subscription_id: str,
        sequence: int,
    ) -> tuple[str, str]:
        """One message of a subscription: its type, and its text."""
        kind = "gap" if isinstance(event, GapTold) else "realtime_data"
        head = {"type": kind, "subscription_id": subscription_id, "sequence": sequence}
        text = orjson.dumps(head)[:-1] + b"," + self._rest(event, series, market)
        return kind, text.decode()

    def _rest(self, event: CandleEvent | ChannelEvent, series: Series, market: str) -> bytes:
        key = (id(event), series)
        known = self._written.get(key)
        if known is not None:
            return known[1]
        rest = orjson.dumps(self._fields(event, series, market))[1:]
        self._written[key] = (event, rest)
        if len(self._written) > _ENCODED_EVENTS:
            self._written.popitem(last=False)
        return rest

    def _fields(
        self, event: CandleEvent | ChannelEvent, series: Series, market: str
    ) -> dict[str, Any]:
        late: dict[str, Any] = {}
        data: Any
        match event:
            case GapTold():
                return gap_message(event)
            case ClosedCandle():
                channel, data = Channel.CANDLES, closed_out(event.entry)
                late = {"late": True} if event.late else {}
            case FormingCandle():
                channel, data = Channel.CANDLES, forming_out(series, market, event.candle)
            case TradesTold():
                channel, data = Channel.TRADES, orjson.Fragment(self._values.encode(event.trades))
            case TickerTold():
                channel, data = Channel.TICKER, orjson.Fragment(self._values.encode(event.ticker))
            case BookTold():
                channel, data = Channel.ORDER_BOOK, _book_out(event)
        if channel is Channel.CANDLES:
            # The book has a channel of its own.
            del data["order_book"]
        return {
            "channel": channel.value,
            "exchange": series.exchange,
            "coin": series.coin,
            "market": market,
            "interval": series.interval.name,
            "data": data,
            **late,
        }


def _book_out(event: BookTold) -> dict[str, Any]:
    book = event.book
    return {
        "timestamp": book.timestamp,
        "bids": book.bids,
        "asks": book.asks,
        "stale": event.stale,
    }


def gap_message(event: GapTold) -> dict[str, Any]:
    """``gap`` without the subscription's own fields."""
    return {
        "start": event.gap.range.start,
        "end": event.gap.range.end,
        "reason": event.gap.reason.value,
        **({"late": True} if event.late else {}),
    }


def status_message(event: StatusTold) -> dict[str, Any]:
    exchange = {} if event.exchange is None else {"exchange": event.exchange}
    return {
        "type": "status",
        "component": event.component,
        **exchange,
        "state": event.state,
        "since": event.since,
    }
