"""An exchange as a package of its own; it speaks as Crypto.com does, so ccxt knows its words."""

from __future__ import annotations

from typing import Any, ClassVar

from domain.interval import Interval
from domain.time_range import TimeRange
from exchange_source.plugins.ccxt_exchange import CCXTExchangeClient
from exchange_source.plugins.ccxt_guards import VendorGuards


class ExampleGuards(VendorGuards):
    """The shape of the exchange's answers."""

    def document_problem(self, response: Any) -> str | None:
        coded = isinstance(response, dict) and "code" in response
        return None if coded else "has no code"


class ExampleExchange(CCXTExchangeClient):
    """The exchange's spot markets."""

    exchange_name: ClassVar[str] = "example"
    exchange_id: ClassVar[str] = "cryptocom"
    page_rows: ClassVar[int] = 300
    requests_per_second: ClassVar[float] = 20.0
    guards: ClassVar[type[VendorGuards]] = ExampleGuards

    def candle_query(
        self, window: TimeRange, period: Interval
    ) -> tuple[int | None, int, dict[str, Any]]:
        return None, self.page_rows, {"start_ts": window.start - 1, "end_ts": window.end - 1}
