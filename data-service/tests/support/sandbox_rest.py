"""What an exchange says of its candles, asked by REST from the sandbox and not by the service."""

from __future__ import annotations

from typing import Any, Final

import httpx

from tests.support.market import MINUTE
from tests.support.records import Row

Rows = dict[int, Row]
PAGE: Final = 300


async def candles(url: str, exchange: str, market: str, start: int, end: int) -> Rows:
    """The minutes of a market that an exchange lists in ``[start, end)``, by time."""
    found: Rows = {}
    async with httpx.AsyncClient(base_url=url) as client:
        for at in range(start, end, PAGE * MINUTE):
            # Some exchanges include the end of what is asked for.
            last = min(end, at + PAGE * MINUTE) - 1
            path, query = _request(exchange, market, at, last)
            answer = (await client.get(path, params=query)).raise_for_status().json()
            found |= {opened: row for opened, row in _rows(exchange, answer) if at <= opened < end}
    return found


def _request(exchange: str, market: str, start: int, last: int) -> tuple[str, dict[str, Any]]:
    base, quote = market.split("/")
    match exchange:
        case "crypto.com":
            return "/exchange/v1/public/get-candlestick", {
                "instrument_name": f"{base}_{quote}", "timeframe": "1m",
                "start_ts": start, "end_ts": last + 1, "count": PAGE,
            }  # fmt: skip
        case "binance":
            return "/api/v3/klines", {
                "symbol": base + quote, "interval": "1m",
                "startTime": start, "endTime": last, "limit": PAGE,
            }  # fmt: skip
        case "coinbase":
            return f"/api/v3/brokerage/market/products/{base}-{quote}/candles", {
                "granularity": "ONE_MINUTE", "start": start // 1000, "end": last // 1000,
            }  # fmt: skip
    raise ValueError(f"the sandbox does not speak as {exchange}")


def _rows(exchange: str, answer: Any) -> list[tuple[int, Row]]:
    match exchange:
        case "crypto.com":
            return [
                (row["t"], _row(row[key] for key in "ohlcv")) for row in answer["result"]["data"]
            ]
        case "binance":
            return [(row[0], _row(row[1:6])) for row in answer]
    names = ("open", "high", "low", "close", "volume")
    return [
        (int(row["start"]) * 1000, _row(row[name] for name in names)) for row in answer["candles"]
    ]


def _row(values: Any) -> Row:
    opened, high, low, close, volume = map(float, values)
    return opened, high, low, close, volume
