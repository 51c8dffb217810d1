"""History by ranges: storage first, the exchange for what is missing, and what was fetched kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from domain.clock import IClock
from domain.entry import Entry
from domain.gap import Gap, joined
from domain.time_range import TimeRange
from exchange_source.interfaces import ExchangeError, Priority
from historical.interfaces import ResolvedSeries
from reconciliation.interfaces import IReconciler
from storage.interfaces import IStorageManager

# A request waits this long (real seconds) for the exchange; what is stored is served then.
PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Page:
    """Closed candles of one range, ascending, what is missing, and where they came from.

    ``error`` is why the exchange could not be asked for what is open, or None.
    """

    range: TimeRange
    entries: tuple[Entry, ...]
    gaps: tuple[Gap, ...]
    from_storage: int
    from_exchange: int
    error: ExchangeError | None


class HistoricalFetcher:
    """Reads ranges of a series, completing them from the exchange."""

    def __init__(
        self,
        storage: IStorageManager,
        reconciler: IReconciler,
        clock: IClock,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._storage = storage
        self._reconciler = reconciler
        self._clock = clock
        self._patience_s = patience_s

    def closed_part(self, resolved: ResolvedSeries, wanted: TimeRange) -> TimeRange:
        """The closed periods of ``wanted``: the forming candle is never part of history."""
        interval = resolved.series.interval
        return TimeRange(
            interval.ceil(wanted.start),
            min(interval.ceil(wanted.end), interval.floor(self._clock.now_ms())),
        )

    async def fetch_data(self, resolved: ResolvedSeries, wanted: TimeRange) -> Page:
        """The closed candles of ``wanted``.

        Raises:
            StorageError: storage cannot be listed, read or written.
        """
        series = resolved.series
        wanted = self.closed_part(resolved, wanted)
        if not wanted:
            return Page(wanted, (), (), 0, 0, None)
        step = series.interval.milliseconds
        fetched, error = set[int](), None
        gaps: tuple[Gap, ...]
        try:
            async with asyncio.timeout(self._patience_s):
                report = await self._reconciler.settle(
                    series, resolved.market, wanted, priority=Priority.REQUEST
                )
        except TimeoutError:
            gaps = tuple(self._reconciler.view(series, resolved.market).gaps(wanted))
        except ExchangeError as exc:
            error = exc
            gaps = tuple(self._reconciler.view(series, resolved.market).gaps(wanted))
        else:
            gaps, error = report.gaps, report.error
            fetched.update(
                period for run in report.fetched for period in range(run.start, run.end, step)
            )
        entries = await self._storage.get_raw_data_range(
            series.exchange,
            series.coin,
            wanted.start,
            wanted.end,
            interval=series.interval.name,
        )
        # Another job or process may have stored since gaps were looked for: what was read is none.
        read = {entry.timestamp for entry in entries}
        gaps = joined(
            Gap(TimeRange(period, period + step), gap.reason)
            for gap in gaps
            for period in range(gap.range.start, gap.range.end, step)
            if period not in read
        )
        from_exchange = sum(entry.timestamp in fetched for entry in entries)
        return Page(
            range=wanted,
            entries=tuple(entries),
            gaps=gaps,
            from_storage=len(entries) - from_exchange,
            from_exchange=from_exchange,
            error=error,
        )

    async def pages(
        self, resolved: ResolvedSeries, wanted: TimeRange, *, periods: int
    ) -> AsyncIterator[Page]:
        """The range in pages of ``periods`` each, ascending, as they become available."""
        wanted = self.closed_part(resolved, wanted)
        reach = periods * resolved.series.interval.milliseconds
        for start in range(wanted.start, wanted.end, reach):
            yield await self.fetch_data(resolved, TimeRange(start, min(start + reach, wanted.end)))
