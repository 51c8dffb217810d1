"""What an exchange's answers prove of a range of periods: a pure decision, no I/O.

``PageProof`` says which window to ask next, is told each answer, and concludes. What it claims:

* closed: an answer holds the row and a later one, or came when the row's period was over by the
  grace;
* empty: an answer, taken when the period was over by the grace, holds rows on both sides of it
  and none inside;
* not offered: an answer that begins much earlier and ends with the oldest row known holds nothing
  older, and neither does one that ends just before that row.

It assumes that an exchange answers a window of more rows than fit with the newest of them. Where
one does not, a claim is missed, never made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

from domain.candle import Candle
from domain.interval import Interval
from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import HistoricalData

# Requests for one page at most, the first included.
MAX_REQUESTS: Final = 20
# How far back to look for an older row, in pages: beyond what the exchanges keep of the shortest
# interval (14 days are 67 pages of 300 minutes).
_REACHES: Final = (1, 100)


class PageProof:
    """The proof of one page.

    Args:
        interval: the length of a period.
        page: the periods that open in it are asked about; aligned to the interval.
        rows: how many rows an answer holds at most.
        grace_ms: how long after a period's end the exchange may still publish it.
    """

    def __init__(self, interval: Interval, page: TimeRange, *, rows: int, grace_ms: int) -> None:
        self._interval = interval
        self._period = interval.milliseconds
        self._page = page
        self._span = (rows - 2) * self._period
        self._grace_ms = grace_ms
        self._requests = 0
        self._known: set[int] = set()
        self._closed: dict[int, Candle] = {}
        self._empty = RangeSet()
        self._not_offered: TimeRange | None = None
        self._latest = 0
        self._earliest: int | None = None
        self._asked_newest = False
        self._no_rows_to = page.end
        self._reach = 0
        self._asked: set[TimeRange] = set()

    def next_window(self) -> TimeRange | None:
        """The periods to ask for next, or None when nothing more can be learned."""
        if self._requests == 0:
            start = self._not_before_time(self._page.start - self._period)
            return TimeRange(start, self._page.end + self._period)
        if self._requests >= MAX_REQUESTS:
            return None
        for hole in reversed(list(self._open_holes())):
            window = self._towards(hole)
            # An answer that taught nothing teaches nothing when it is asked for again.
            if window is not None and window not in self._asked:
                return window
        return None

    def add(self, window: TimeRange, rows: Sequence[Candle], exchange_time: int) -> None:
        """Take in one answer: its validated rows, ascending, and when it was given."""
        self._requests += 1
        self._asked.add(window)
        self._latest = max(self._latest, exchange_time)
        self._earliest = min(self._earliest or exchange_time, exchange_time)
        if window.end > self._interval.floor(exchange_time):
            self._asked_newest = True
        for row, later in zip_longest(rows, rows[1:]):
            self._known.add(row.timestamp)
            if later is not None or self._is_over(row.timestamp, exchange_time):
                self._closed[row.timestamp] = row
            if later is not None:
                over = self._interval.floor(exchange_time - self._grace_ms)
                self._empty.add(TimeRange(row.timestamp + self._period, min(later.timestamp, over)))
        newer = [row for row in rows if row.timestamp >= self._page.end]
        if not newer:
            self._no_rows_to = max(self._no_rows_to, window.end)
        self._note_nothing_older(window, rows)

    def conclude(self) -> HistoricalData:
        """What all answers together prove of the page."""
        empty = self._empty.copy()
        for timestamp in self._known:
            empty.remove(TimeRange(timestamp, timestamp + self._period))
        return HistoricalData(
            candles=tuple(
                self._closed[timestamp]
                for timestamp in sorted(self._closed)
                if timestamp in self._page
            ),
            empty=tuple(empty.within(self._page)),
            not_offered=self._not_offered,
            exchange_time=self._earliest or 0,
        )

    def _is_over(self, timestamp: int, exchange_time: int) -> bool:
        return timestamp + self._period + self._grace_ms <= exchange_time

    def _open_holes(self) -> Iterator[TimeRange]:
        """Runs of periods of the page that are over, not known and not proven to be empty."""
        over = self._interval.floor(self._latest - self._grace_ms)
        settled = self._empty.copy()
        for timestamp in self._known:
            settled.add(TimeRange(timestamp, timestamp + self._period))
        if self._not_offered is not None:
            settled.add(self._not_offered)
        yield from settled.missing(TimeRange(self._page.start, min(self._page.end, over)))

    def _towards(self, hole: TimeRange) -> TimeRange | None:
        newer = min((at for at in self._known if at >= hole.end), default=None)
        older = max((at for at in self._known if at < hole.start), default=None)
        if newer is None:
            return self._towards_newer_row()
        distance = newer - self._no_rows_to
        if distance > self._span:
            # A row far away: the nearest one is found by halving the distance.
            skip = (distance - self._span) // 2 if distance > 2 * self._span else 0
            middle = self._interval.floor(self._no_rows_to + skip)
            return TimeRange(middle - self._period, middle + self._span)
        if older is not None:
            return TimeRange(older, newer + self._period)
        if self._reach < len(_REACHES):
            return TimeRange(self._back(_REACHES[self._reach]), newer + self._period)
        return TimeRange(self._back(_REACHES[-1]), newer)

    def _back(self, pages: int) -> int:
        """``pages`` before the page."""
        return self._not_before_time(self._page.start - pages * self._span)

    def _not_before_time(self, start: int) -> int:
        """``start``, or where that lies before time began, its second period: exchanges refuse a
        window that begins with it."""
        return max(start, self._interval.ceil(self._period))

    def _towards_newer_row(self) -> TimeRange | None:
        if self._asked_newest:
            return None
        now = self._interval.floor(self._latest)
        near = TimeRange(self._no_rows_to - self._period, self._no_rows_to + self._span)
        if self._no_rows_to == self._page.end + self._period and near.end < now:
            return near
        # Everything since: the newest of it, which on a dead market is old too.
        return TimeRange(self._no_rows_to - self._period, now + self._period)

    def _note_nothing_older(self, window: TimeRange, rows: Sequence[Candle]) -> None:
        """Note that ``window`` began before the oldest row known and gave nothing older."""
        oldest = min(self._known, default=0)
        if rows and rows[0].timestamp == oldest and window.end == oldest + self._period:
            reached = [pages for pages in _REACHES if self._back(pages) >= window.start]
            self._reach = max(self._reach, len(reached))
        elif not rows and window.end == oldest and window.start <= self._back(_REACHES[-1]):
            self._not_offered = TimeRange(self._page.start, oldest)
