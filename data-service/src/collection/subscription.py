"""What one subscriber has not read yet.

A reader has a bounded queue of what must be told, and one place for the newest of what may be
replaced: a forming candle, a ticker, a book. A reader that lets its queue fill up gets
``SlowConsumer`` and is gone. Nobody ever waits for a reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Final

from collection.interfaces import (
    Channel,
    ClosedCandle,
    FormingCandle,
    GapTold,
    OutboxTotals,
    SlowConsumer,
    StreamEvent,
    TradesTold,
)
from domain.gap import Gap, GapReason
from domain.time_range import TimeRange
from errors import DataServiceError
from reconciliation.interfaces import ISeriesView

# Reasons of gaps that may still close.
# Trades that waited are told this many at once.
_TRADES_AT_ONCE: Final = 1_000


class Reader:
    """One subscriber of one series, whatever it is told of.

    Args:
        of: what it reads, for messages.
        bound: how much may wait: closed candles and gaps, or trades.
        leave: called when it is closed.
        channel: what kind of events it is told.
        totals: where it counts what was not told as it came, with all of its channel.
    """

    def __init__(
        self,
        of: str,
        bound: int,
        leave: Callable[[Reader], None],
        *,
        channel: Channel,
        totals: OutboxTotals,
    ) -> None:
        self.channel = channel
        self._totals = totals
        self._of = of
        self._bound = bound
        self._leave = leave
        self._queue: deque[StreamEvent] = deque()
        self._newest: StreamEvent | None = None
        self._wakes = asyncio.Event()
        # Set while whoever reads has passed on everything and waits for more, or has left.
        self._idle = asyncio.Event()
        self._weight = 0
        self._overrun = False
        self._ended_with: DataServiceError | None = None

    @property
    def depth(self) -> int:
        """How many trades, and messages of anything else that must be told, wait."""
        return self._weight

    def offer(self, event: StreamEvent) -> None:
        """Queue what must be told; a full queue ends the subscription."""
        weight = _weight(event)
        if self._overrun:
            self._totals.dropped += weight
            return
        if self._queue and self._weight + weight > self._bound:
            self._overrun = True
            self._totals.dropped += self._weight + weight
            self._queue.clear()
            self._weight = 0
        else:
            self._weight += weight
            self._queue.append(event)
        self._idle.clear()
        self._wakes.set()

    def offer_newest(self, event: StreamEvent) -> None:
        """Keep this in the place of the one before."""
        if self._newest is not None:
            self._totals.replaced += 1
        self._newest = event
        self._idle.clear()
        self._wakes.set()

    async def events(self) -> AsyncIterator[StreamEvent]:
        """What is told, without end.

        Raises:
            SlowConsumer: the queue was full.
            DataServiceError: what the subscription was ended with.
        """
        while True:
            if self._overrun:
                raise SlowConsumer(
                    f"more than {self._bound} {self._of} were waiting to be read; read faster, or "
                    f"subscribe again"
                )
            if self._queue:
                yield self._next()
            elif self._newest is not None:
                newest, self._newest = self._newest, None
                yield newest
            elif self._ended_with is not None:
                raise self._ended_with
            else:
                self._wakes.clear()
                self._idle.set()
                await self._wakes.wait()

    async def until_read(self) -> None:
        """Return once whoever reads has passed on what it was told, or has left."""
        await self._idle.wait()

    def waiting(self) -> list[StreamEvent]:
        """Take out what must be told and has not been read yet."""
        taken = list(self._queue)
        self._queue.clear()
        self._weight = 0
        return taken

    def end(self, error: DataServiceError) -> None:
        """Tell what waits, and then that there is nothing more."""
        self._ended_with = error
        self._wakes.set()

    def close(self) -> None:
        """Leave; idempotent."""
        self._idle.set()
        self._leave(self)

    def _next(self) -> StreamEvent:
        event = self._queue.popleft()
        self._weight -= _weight(event)
        if not isinstance(event, TradesTold) or not self._queue:
            return event
        # A reader that is behind gets in one message what waits.
        trades = list(event.trades)
        while self._queue and len(trades) < _TRADES_AT_ONCE:
            following = self._queue[0]
            if not isinstance(following, TradesTold):
                break
            self._queue.popleft()
            self._weight -= _weight(following)
            self._totals.merged += 1
            trades += following.trades
        return TradesTold(tuple(trades))


class Subscription(Reader):
    """One reader of the candles of one series, whose next period to be told is ``next_open``."""

    def __init__(
        self,
        view: ISeriesView,
        next_open: int,
        bound: int,
        leave: Callable[[Reader], None],
        *,
        totals: OutboxTotals,
    ) -> None:
        super().__init__(
            f"closed candles of {view.series}",
            bound,
            leave,
            channel=Channel.CANDLES,
            totals=totals,
        )
        self._view = view
        self._step = view.series.interval.milliseconds
        self.last_closed = next_open - self._step
        """The open of the newest closed period told before this subscription began."""
        self._resumes_at = 0
        self._expected: dict[int, GapReason] = {}

    def resume_at(self, period: int, still_open: Mapping[int, GapReason]) -> None:
        """Begin with ``period``: the reader knows what lies before it.

        Of that it is told corrections, and as late what settles where it was ``still_open``.
        """
        self._resumes_at = period
        self.expect(still_open)

    def expect(self, periods: Mapping[int, GapReason]) -> None:
        """Periods before this subscription's start whose gap a replay tells: what settles there
        is told as late."""
        self._expected.update(periods)

    def no_longer_expect(self, periods: Iterable[int]) -> None:
        """These were told after all."""
        for period in periods:
            self._expected.pop(period, None)

    def is_expected(self, period: int) -> bool:
        """Whether the period's gap was told in a replay; asking takes it off the list."""
        return self._expected.pop(period, None) is not None

    def newly_proven(self) -> list[Gap]:
        """The gaps that a replay told as open and that are proven to have no trades by now."""
        found = []
        for period in [period for period, told in self._expected.items() if told.is_open]:
            for gap in self._view.gaps(TimeRange(period, period + self._step)):
                if gap.reason is GapReason.NO_TRADES:
                    self._expected[period] = gap.reason
                    found.append(gap)
        return found

    def offer(self, event: StreamEvent) -> None:
        told = self._for_reader(event)
        if told is None:
            return
        super().offer(told)
        if (
            isinstance(told, ClosedCandle)
            and isinstance(self._newest, FormingCandle)
            and self._newest.candle.timestamp <= told.entry.timestamp
        ):
            self._totals.replaced += 1
            self._newest = None

    def _for_reader(self, event: StreamEvent) -> StreamEvent | None:
        """What the event is to a reader that resumes later than the series does; None for
        nothing."""
        if isinstance(event, GapTold):
            known = event.gap.range.start < self._resumes_at and not event.late
            return None if known else event
        if not isinstance(event, ClosedCandle) or event.entry.timestamp >= self._resumes_at:
            return event
        was_open = self.is_expected(event.entry.timestamp)
        if event.late or event.entry.revision > 1:
            return event
        return ClosedCandle(event.entry, late=True) if was_open else None


def _weight(event: StreamEvent) -> int:
    return len(event.trades) if isinstance(event, TradesTold) else 1
