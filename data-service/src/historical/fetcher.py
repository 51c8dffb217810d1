"""History by ranges: storage first, the exchange for what is missing, and what was fetched kept.

An interval that the exchange offers is fetched and kept as itself. It is resampled from a shorter
one only where the exchange does not offer it, no longer gives the range, or cannot be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from domain.candle import Candle
from domain.clock import IClock
from domain.gap import Gap, GapReason, joined
from domain.interval import Interval
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import ExchangeError, Priority
from historical.interfaces import ResolvedSeries
from historical.resampling import resample
from reconciliation.interfaces import IReconciler
from storage.interfaces import IStorageManager

# A request waits this long (real seconds) for the exchange; what is stored is served then.
PATIENCE_S: Final = 30.0
# Candles of a shorter interval that one page is made of at most.
MOST_SOURCE_PERIODS: Final = 50_000
# Of these a shorter interval may know more.
_PERHAPS_RESAMPLED: Final = (GapReason.UNREACHABLE, GapReason.NOT_OFFERED)


@dataclass(frozen=True, slots=True)
class Page:
    """Closed candles of one range, ascending, what is missing, and where they came from.

    ``error`` is why the exchange could not be asked for what is open, or None.
    """

    range: TimeRange
    candles: tuple[Candle, ...]
    gaps: tuple[Gap, ...]
    from_storage: int
    from_exchange: int
    error: ExchangeError | None


@dataclass(frozen=True, slots=True)
class _Read:
    """What is stored of a range, why the rest is not, and which periods were just fetched."""

    candles: tuple[Candle, ...]
    gaps: tuple[Gap, ...]
    fetched: RangeSet
    error: ExchangeError | None = None


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

    def most_periods(self, resolved: ResolvedSeries) -> int | None:
        """How many periods one page may cover, or None for any number."""
        if resolved.offered:
            return None
        ratio = resolved.series.interval.milliseconds // resolved.sources[0].milliseconds
        return max(1, MOST_SOURCE_PERIODS // ratio)

    async def fetch_data(self, resolved: ResolvedSeries, wanted: TimeRange) -> Page:
        """The closed candles of ``wanted``.

        Raises:
            StorageError: storage cannot be listed, read or written.
        """
        wanted = self.closed_part(resolved, wanted)
        if not wanted:
            return Page(wanted, (), (), 0, 0, None)
        if resolved.offered:
            found = await self._read(resolved.series, resolved.market, wanted)
            for source in resolved.sources:
                found = await self._completed(resolved, found, source)
        else:
            source = resolved.sources[0]
            shorter = replace(resolved.series, interval=source)
            found = self._resampled(
                await self._read(shorter, resolved.market, wanted),
                wanted,
                source=source,
                target=resolved.series.interval,
            )
        from_exchange = sum(candle.timestamp in found.fetched for candle in found.candles)
        return Page(
            range=wanted,
            candles=found.candles,
            gaps=found.gaps,
            from_storage=len(found.candles) - from_exchange,
            from_exchange=from_exchange,
            error=found.error,
        )

    async def _read(self, series: Series, market: str, wanted: TimeRange) -> _Read:
        """The series' own candles: what is stored, after the exchange was asked for the rest."""
        fetched, error = RangeSet(), None
        gaps: Sequence[Gap]
        try:
            async with asyncio.timeout(self._patience_s):
                report = await self._reconciler.settle(
                    series, market, wanted, priority=Priority.REQUEST
                )
        except TimeoutError:
            gaps = self._reconciler.view(series, market).gaps(wanted)
        except ExchangeError as exc:
            error = exc
            gaps = self._reconciler.view(series, market).gaps(wanted)
        else:
            gaps, error = report.gaps, report.error
            fetched = RangeSet(report.fetched)
        return await self._stored(series, wanted, gaps, fetched, error)

    async def _stored(
        self,
        series: Series,
        wanted: TimeRange,
        gaps: Sequence[Gap],
        fetched: RangeSet,
        error: ExchangeError | None = None,
    ) -> _Read:
        entries = await self._storage.get_raw_data_range(
            series.exchange,
            series.coin,
            wanted.start,
            wanted.end,
            interval=series.interval.name,
        )
        # Another job or process may have stored since gaps were looked for: what was read is none.
        step = series.interval.milliseconds
        read = {entry.timestamp for entry in entries}
        left = joined(
            Gap(TimeRange(period, period + step), gap.reason)
            for gap in gaps
            for period in range(gap.range.start, gap.range.end, step)
            if period not in read
        )
        return _Read(tuple(entry.candle for entry in entries), left, fetched, error)

    async def _completed(self, resolved: ResolvedSeries, found: _Read, source: Interval) -> _Read:
        """``found`` with what is stored of a shorter interval in the place of what the exchange
        does not give any more, or cannot be asked for."""
        shorter = replace(resolved.series, interval=source)
        view = self._reconciler.view(shorter, resolved.market)
        candles, gaps = list(found.candles), []
        for gap in found.gaps:
            if gap.reason not in _PERHAPS_RESAMPLED or not view.stored_ranges(gap.range):
                gaps.append(gap)
                continue
            stored = await self._stored(shorter, gap.range, view.gaps(gap.range), RangeSet())
            made = resample(
                stored.candles,
                stored.gaps,
                gap.range,
                source=source,
                target=resolved.series.interval,
            )
            candles += made.candles
            # What the shorter one does not know either stays what it was.
            gaps += [
                left if left.reason is GapReason.NO_TRADES else Gap(left.range, gap.reason)
                for left in made.gaps
            ]
        candles.sort(key=lambda candle: candle.timestamp)
        return _Read(tuple(candles), joined(gaps), found.fetched, found.error)

    @staticmethod
    def _resampled(read: _Read, wanted: TimeRange, *, source: Interval, target: Interval) -> _Read:
        made = resample(read.candles, read.gaps, wanted, source=source, target=target)
        fetched = RangeSet(
            TimeRange(candle.timestamp, candle.timestamp + 1)
            for candle in made.candles
            if read.fetched.within(
                TimeRange(candle.timestamp, candle.timestamp + target.milliseconds)
            )
        )
        return _Read(made.candles, made.gaps, fetched, read.error)

    async def pages(
        self, resolved: ResolvedSeries, wanted: TimeRange, *, periods: int
    ) -> AsyncIterator[Page]:
        """The range in pages of ``periods`` each, ascending, as they become available."""
        wanted = self.closed_part(resolved, wanted)
        periods = min(periods, self.most_periods(resolved) or periods)
        reach = periods * resolved.series.interval.milliseconds
        for start in range(wanted.start, wanted.end, reach):
            yield await self.fetch_data(resolved, TimeRange(start, min(start + reach, wanted.end)))
