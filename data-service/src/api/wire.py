"""How values of the domain are written for clients: plain dictionaries, keys in published order."""

from __future__ import annotations

from typing import Any, Final

from collection.interfaces import (
    Availability,
    ClosedCandle,
    FormingCandle,
    GapTold,
    StatusTold,
    TargetStatus,
)
from domain.candle import Candle
from domain.entry import SCHEMA, Entry
from domain.series import Series
from historical.interfaces import Coverage, CurrentData, History, Summary
from historical.messages import candle_row, gap_out
from models import HISTORY_COLUMNS

CANDLES: Final = "candles"
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
        "rows": [candle_row(entry.candle) for entry in history.entries],
        "count": len(history.entries),
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
        "rows": [candle_row(candle) for candle in summary.candles],
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


def candle_message(
    event: FormingCandle | ClosedCandle, series: Series, market: str
) -> dict[str, Any]:
    """``realtime_data`` without the subscription's own fields. The book is left out: it has a
    channel of its own."""
    if isinstance(event, ClosedCandle):
        data = closed_out(event.entry)
        late = event.late
    else:
        data = forming_out(series, market, event.candle)
        late = False
    del data["order_book"]
    return {
        "channel": CANDLES,
        "exchange": series.exchange,
        "coin": series.coin,
        "market": market,
        "interval": series.interval.name,
        "data": data,
        **({"late": True} if late else {}),
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
