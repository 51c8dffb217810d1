"""A price source whose every candle and trade the test decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.time_range import TimeRange
from errors import InvalidRequest
from sandbox.columns import from_candles
from sandbox.prices import MINUTE_MS, BookMaker, Instrument, IPriceSource, Trade

BTC = Instrument("BTC", "USD", price_decimals=2, quantity_decimals=4)
ETH = Instrument("ETH", "USD", price_decimals=2, quantity_decimals=4)


class ScriptedPrices(IPriceSource):
    """BTC/USD and ETH/USD; what was put last is what happened. A candle that forms has its final
    values from its open on; a book is invented until one is put."""

    def __init__(self) -> None:
        self._minutes: dict[Instrument, dict[int, Candle]] = {BTC: {}, ETH: {}}
        self._trades: dict[Instrument, list[Trade]] = {BTC: [], ETH: []}
        self._books: dict[Instrument, list[OrderBook]] = {BTC: [], ETH: []}

    def put(self, instrument: Instrument, minutes: Iterable[Candle]) -> None:
        """Add candles of a minute, or replace those of the same one."""
        self._minutes[instrument].update((candle.timestamp, candle) for candle in minutes)

    def put_trades(self, instrument: Instrument, *trades: Trade) -> None:
        self._trades[instrument] += trades

    def put_book(self, instrument: Instrument, book: OrderBook) -> None:
        """Have this book from its timestamp on, which is later than those put before: a state that
        somebody was told must not change afterwards."""
        self._books[instrument].append(book)

    def markets(self) -> Sequence[Instrument]:
        return (BTC, ETH)

    def offers(self, instrument: Instrument, interval: Interval) -> bool:
        return interval.milliseconds % MINUTE_MS == 0

    def history_start(self, instrument: Instrument) -> int:
        return min(self._minutes[instrument], default=0)

    def candles(
        self, instrument: Instrument, interval: Interval, part: TimeRange
    ) -> Sequence[Candle]:
        if not self.offers(instrument, interval):
            raise InvalidRequest(f"{interval} is not offered")
        whole = TimeRange(interval.ceil(part.start), interval.ceil(part.end))
        known = self._minutes[instrument]
        minutes = [known[at] for at in sorted(known) if at in whole]
        return from_candles(minutes).aggregate(interval, None).candles()

    def forming(self, instrument: Instrument, interval: Interval, at_ms: int) -> Candle | None:
        opened = interval.floor(at_ms)
        part = TimeRange(opened, MINUTE_MS * (at_ms // MINUTE_MS + 1))
        known = self._minutes[instrument]
        minutes = [known[at] for at in sorted(known) if at in part]
        return from_candles(minutes).aggregate(interval, None).candle(0) if minutes else None

    def trades(self, instrument: Instrument, part: TimeRange) -> Sequence[Trade]:
        return [trade for trade in self._trades[instrument] if trade.timestamp in part]

    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        for book in reversed(self._books[instrument]):
            if book.timestamp <= at_ms:
                return OrderBook(at_ms, book.bids[:depth], book.asks[:depth])
        return BookMaker(1, instrument, 100.0, 1.0).book(100.0, at_ms, depth)
