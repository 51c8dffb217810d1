"""The exchange itself, whatever protocol it speaks: its clock, and what it tells at this moment.

The price source knows what really happened; the venue decides how much of it is told, and
when, and puts the candle faults in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from domain.candle import Candle
from domain.clock import IClock
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.time_range import TimeRange
from sandbox.faults import Fault, FaultBoard
from sandbox.prices import DAY_MS, Instrument, IPriceSource, Trade

_MINUTE: Final = Interval.parse("1m")
_WIDEST_LOOK: Final = 20_000
_TRADES_WINDOW_MS: Final = 600_000


class ExchangeClock(IClock):
    """Market time as this exchange sees it: the market's, and ``skew_ms`` ahead of it.

    Real time is not skewed. Skew may be changed at any moment.
    """

    def __init__(self, market: IClock, skew_ms: int = 0) -> None:
        self._market = market
        self.skew_ms = skew_ms

    @property
    def speed(self) -> float:
        return self._market.speed

    def now_ms(self) -> int:
        return self._market.now_ms() + self.skew_ms

    def real_ms(self) -> int:
        return self._market.real_ms()

    def monotonic(self) -> float:
        return self._market.monotonic()

    async def sleep_until(self, market_ms: int) -> None:
        await self._market.sleep_until(market_ms - self.skew_ms)

    async def sleep_real(self, seconds: float) -> None:
        await self._market.sleep_real(seconds)


@dataclass(frozen=True, slots=True)
class Ticker:
    """The last 24 hours of a market; prices of the day are None when nothing traded in it.

    ``change`` is a fraction: 0.01 is one per cent. ``quote_volume`` is approximate.
    """

    timestamp: int
    open: float | None
    last: float | None
    high: float | None
    low: float | None
    change: float | None
    volume: float
    quote_volume: float
    book: OrderBook


class Venue:
    """What the exchange tells at this moment. Reads are pure but for faults that count their hits.

    Candles are listed from their first trade on; none lies in the future of the exchange's clock.
    """

    def __init__(self, prices: IPriceSource, clock: ExchangeClock, faults: FaultBoard) -> None:
        self.prices = prices
        self.clock = clock
        self.faults = faults

    def instruments(self) -> Sequence[Instrument]:
        """Every market there is, those included that a fault has delisted."""
        return self.prices.markets()

    def is_listed(self, instrument: Instrument) -> bool:
        """Whether the exchange knows of ``instrument`` now; to be asked when it is asked for."""
        return self.faults.take("delisted", instrument=instrument.symbol) is None

    def candles(
        self,
        instrument: Instrument,
        interval: Interval,
        part: TimeRange,
        limit: int,
        *,
        oldest: bool = False,
    ) -> list[Candle]:
        """The last ``limit`` candles listed in ``part``, ascending, the forming one included.

        With ``oldest`` the first ``limit`` ones instead.

        Raises:
            InvalidRequest: the interval is not offered.
        """
        now = self.clock.now_ms()
        first = max(part.start, self.prices.history_start(instrument) - interval.milliseconds)
        end = min(part.end, now + 1)
        found: list[Candle] = []
        hit: set[Fault] = set()
        width = limit + 1
        # Holes take no place among the rows, so a market with holes is looked at further.
        while end > first and len(found) < limit:
            length = (width - 1) * interval.milliseconds
            if oldest:
                look = TimeRange(first, min(end, interval.ceil(first) + length))
                found = found + self._listed(instrument, interval, look, now, hit)
                first = look.end
            else:
                look = TimeRange(max(first, interval.floor(end - 1) - length), end)
                found = self._listed(instrument, interval, look, now, hit) + found
                end = look.start
            width = min(2 * width, _WIDEST_LOOK)
        found = found[:limit] if oldest else found[-limit:]
        found = self._without_missing(instrument, interval, found, hit)
        for fault in hit:
            fault.hits += 1
        return found

    def forming(self, instrument: Instrument, interval: Interval, now: int) -> Candle | None:
        """The candle of the period around ``now`` as a stream tells it."""
        candle = self.prices.forming(instrument, interval, now)
        if candle is None:
            return None
        return self._as_streamed(instrument, interval, [candle], now)[0]

    def closed(
        self, instrument: Instrument, interval: Interval, part: TimeRange, now: int
    ) -> list[Candle]:
        """The final candles of the periods that open in ``part``, as a stream tells them."""
        closed = self.prices.candles(instrument, interval, part) if part else ()
        return self._as_streamed(instrument, interval, closed, now)

    def trades(
        self, instrument: Instrument, part: TimeRange, limit: int, *, oldest: bool = False
    ) -> list[Trade]:
        """The newest ``limit`` trades in ``part`` up to now, ascending; of one day at most.

        With ``oldest`` the first ``limit`` ones instead.
        """
        end = min(part.end, self.clock.now_ms() + 1)
        first = max(part.start, self.prices.history_start(instrument))
        if oldest:
            end = min(end, first + DAY_MS)
        else:
            first = max(first, end - DAY_MS)
        found: list[Trade] = []
        width = _TRADES_WINDOW_MS
        while end > first and len(found) < limit:
            if oldest:
                look = TimeRange(first, min(end, first + width))
                found = [*found, *self.prices.trades(instrument, look)]
                first = look.end
            else:
                look = TimeRange(max(first, end - width), end)
                found = [*self.prices.trades(instrument, look), *found]
                end = look.start
            width *= 2
        return found[:limit] if oldest else found[-limit:]

    def trades_from(self, instrument: Instrument, number: int, limit: int) -> list[Trade]:
        """The first ``limit`` trades up to now whose id is ``number`` or more, ascending."""
        low, high = self.prices.history_start(instrument), self.clock.now_ms() + 1
        # Ids grow with time: the earliest moment from which on every trade has a high enough one.
        while low < high:
            middle = (low + high) // 2
            later = self.trades(instrument, TimeRange(middle, high), 1, oldest=True)
            if later and later[0].id < number:
                low = later[0].timestamp + 1
            else:
                high = middle
        found = self.trades(instrument, TimeRange(low, 10**18), limit, oldest=True)
        return [trade for trade in found if trade.id >= number]

    def book(self, instrument: Instrument, depth: int) -> OrderBook:
        return self.prices.book(instrument, self.clock.now_ms(), depth)

    def ticker(self, instrument: Instrument) -> Ticker:
        now = self.clock.now_ms()
        fine = next(
            interval
            for interval in (_MINUTE, *map(Interval.parse, ("5m", "15m", "1h", "4h", "1d", "1w")))
            if self.prices.offers(instrument, interval)
        )
        minutes = [
            *self.prices.candles(instrument, fine, TimeRange(now - DAY_MS, fine.floor(now))),
            *filter(None, [self.prices.forming(instrument, fine, now)]),
        ]
        book = self.prices.book(instrument, now, 1)
        if not minutes:
            return Ticker(now, None, None, None, None, None, 0.0, 0.0, book)
        last = minutes[-1].close
        return Ticker(
            timestamp=now,
            open=minutes[0].open,
            last=last,
            high=max(minute.high for minute in minutes),
            low=min(minute.low for minute in minutes),
            change=round(last / minutes[0].open - 1, 6),
            volume=round(sum(minute.volume for minute in minutes), instrument.quantity_decimals),
            quote_volume=round(sum(minute.volume * minute.close for minute in minutes), 2),
            book=book,
        )

    def _as_streamed(
        self, instrument: Instrument, interval: Interval, candles: Sequence[Candle], now: int
    ) -> list[Candle]:
        hit: set[Fault] = set()
        told = [self._revised(instrument, interval, candle, now, hit) for candle in candles]
        for fault in hit:
            fault.hits += 1
        return told

    def _listed(
        self,
        instrument: Instrument,
        interval: Interval,
        part: TimeRange,
        now: int,
        hit: set[Fault],
    ) -> list[Candle]:
        current = interval.floor(now)
        closed = self.prices.candles(instrument, interval, part.intersect(TimeRange(0, current)))
        rows = []
        for candle in closed:
            told = self._as_listed(instrument, interval, candle, now, hit)
            if told is not None:
                rows.append(told)
        if current in part and not self._is_late(instrument, interval, current, now, hit):
            forming = self.prices.forming(instrument, interval, now)
            if forming is not None:
                rows.append(self._revised(instrument, interval, forming, now, hit))
        return rows

    def _as_listed(
        self,
        instrument: Instrument,
        interval: Interval,
        candle: Candle,
        now: int,
        hit: set[Fault],
    ) -> Candle | None:
        if self._is_late(instrument, interval, candle.timestamp, now, hit):
            return None
        end = candle.timestamp + interval.milliseconds
        for fault in self._acting("candle_provisional", instrument, interval):
            if now < end + fault.fields["after_close"] * 1000:
                hit.add(fault)
                return _provisional(candle, instrument)
        return self._revised(instrument, interval, candle, now, hit)

    def _is_late(
        self, instrument: Instrument, interval: Interval, opened: int, now: int, hit: set[Fault]
    ) -> bool:
        for fault in self._acting("candle_late", instrument, interval):
            if now < opened + interval.milliseconds + fault.fields["after_close"] * 1000:
                hit.add(fault)
                return True
        return False

    def _revised(
        self,
        instrument: Instrument,
        interval: Interval,
        candle: Candle,
        now: int,
        hit: set[Fault],
    ) -> Candle:
        for fault in self._acting("candle_revised", instrument, interval):
            if fault.fields["timestamp"] == candle.timestamp and now >= fault.fields.get("at", 0):
                hit.add(fault)
                candle = _revision(candle, instrument, fault)
        return candle

    def _without_missing(
        self, instrument: Instrument, interval: Interval, rows: list[Candle], hit: set[Fault]
    ) -> list[Candle]:
        for fault in self._acting("rest_missing_rows", instrument, interval):
            timestamps = fault.fields.get("timestamps")
            if timestamps is None:
                # From the middle, where neither a first nor a last row gives it away.
                count = min(fault.fields.get("rows", 1), len(rows))
                start = (len(rows) - count) // 2
                kept = rows[:start] + rows[start + count :]
            else:
                kept = [row for row in rows if row.timestamp not in timestamps]
            if len(kept) < len(rows):
                hit.add(fault)
                rows = kept
        return rows

    def _acting(self, kind: str, instrument: Instrument, interval: Interval) -> Sequence[Fault]:
        return list(self.faults.acting(kind, instrument=instrument.symbol, timeframe=interval.name))


def _provisional(candle: Candle, instrument: Instrument) -> Candle:
    """Values of a closed candle that are still to change: a lower volume, another close."""
    close = candle.low if candle.close != candle.low else candle.high
    if close == candle.close:
        close = candle.close + 10.0**-instrument.price_decimals
    return replace(
        candle,
        close=close,
        high=max(candle.high, close),
        volume=round(candle.volume * 0.9, instrument.quantity_decimals),
    )


def _revision(candle: Candle, instrument: Instrument, fault: Fault) -> Candle:
    """The candle that replaces ``candle``: as the fault says, else with half as much volume more.

    Values that would make no candle are stretched: high and low always hold open and close.
    """
    values = fault.fields.get("values")
    if values is None:
        step = 10.0**-instrument.quantity_decimals
        volume = round(candle.volume * 1.5 + step, instrument.quantity_decimals)
        return replace(candle, volume=volume)
    changed = {name: float(value) for name, value in values.items()}
    opened = changed.get("open", candle.open)
    close = changed.get("close", candle.close)
    return Candle(
        timestamp=candle.timestamp,
        open=opened,
        high=max(changed.get("high", candle.high), opened, close),
        low=min(changed.get("low", candle.low), opened, close),
        close=close,
        volume=changed.get("volume", candle.volume),
    )
