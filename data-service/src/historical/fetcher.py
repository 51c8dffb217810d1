"""History by ranges: storage first, the exchange for what is missing, and what was fetched kept.

An interval that the exchange offers is fetched and kept as itself. It is resampled from a shorter
one only where the exchange does not offer it, no longer gives the range, or cannot be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from domain.clock import IClock
from domain.gap import Gap, GapReason, joined
from domain.interval import Interval
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import ExchangeError, Priority
from historical.columns import NOTHING, Candles, runs_of
from historical.interfaces import ResolvedSeries
from historical.reader import CandleReader
from historical.resampling import resample
from historical.sealed_store import SealedCandleStore
from reconciliation.interfaces import IReconciler
from storage.interfaces import IStorageManager

# A request waits this long (real seconds) for the exchange; what is stored is served then.
PATIENCE_S: Final = 30.0
# Candles of a shorter interval that one page is made of at most.
MOST_SOURCE_PERIODS: Final = 50_000
# Of what is settled, so many periods at most are read ahead of the pages that they are cut into,
# and fewer where that takes longer (real seconds). Reading many at once costs hardly more than few.
READ_AHEAD_PERIODS: Final = 10_000
_READ_AHEAD_S: Final = 0.25
_READ_AHEAD_GROWTH: Final = 4
# Of these a shorter interval may know more.
_PERHAPS_RESAMPLED: Final = (GapReason.UNREACHABLE, GapReason.NOT_OFFERED)


@dataclass(frozen=True, slots=True)
class Page:
    """Closed candles of one range, what is missing, and where they came from.

    ``fetched`` are the runs of periods whose candle was asked from the exchange for this, all
    others were stored before. ``error`` is why the exchange could not be asked for what is open, or
    None.
    """

    range: TimeRange
    candles: Candles
    gaps: tuple[Gap, ...] = ()
    fetched: tuple[TimeRange, ...] = ()
    error: ExchangeError | None = None

    @property
    def from_exchange(self) -> int:
        return self.candles.count_within(self.fetched)

    @property
    def from_storage(self) -> int:
        return len(self.candles) - self.from_exchange

    def cut(self, reach: int) -> Iterator[Page]:
        """Pages of ``reach`` ms each, ascending."""
        gaps = iter(self.gaps)
        gap = next(gaps, None)
        starts = range(self.range.start, self.range.end, reach)
        for start, candles in zip(starts, self.candles.cut(starts), strict=True):
            part = TimeRange(start, min(start + reach, self.range.end))
            mine = []
            while gap is not None and gap.range.start < part.end:
                mine.append(Gap(gap.range.intersect(part), gap.reason))
                if gap.range.end > part.end:
                    break
                gap = next(gaps, None)
            yield Page(part, candles, tuple(mine), self.fetched, self.error)


@dataclass(frozen=True, slots=True)
class _Read:
    """What is stored of a range, why the rest is not, and which periods were just fetched."""

    candles: Candles
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
        sealed: SealedCandleStore | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._reader = CandleReader(storage, sealed)
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
            return Page(wanted, NOTHING)
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
        return Page(wanted, found.candles, found.gaps, tuple(found.fetched), found.error)

    async def _read(self, series: Series, market: str, wanted: TimeRange) -> _Read:
        """The series' own candles: what is stored, after the exchange was asked for the rest."""
        found = await self._settled(series, market, wanted)
        if await self._is_short(series, market, wanted, found):
            found = await self._settled(series, market, wanted)
        return found

    async def _is_short(self, series: Series, market: str, wanted: TimeRange, found: _Read) -> bool:
        """Whether documents are gone that are known to be stored; they are known to be missing
        then, and neither a row nor a gap would tell of them."""
        view = self._reconciler.view(series, market)
        read = RangeSet(runs_of(found.candles.timestamp, series.interval))
        if not any(read.missing(run) for run in view.stored_ranges(wanted)):
            return False
        await view.refresh(wanted)
        return True

    async def _settled(self, series: Series, market: str, wanted: TimeRange) -> _Read:
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
        candles = await self._reader.read(series, wanted)
        # Another job or process may have stored since gaps were looked for: what was read is none.
        left = []
        for gap in gaps:
            inside = candles.within(gap.range).timestamp
            read = RangeSet(runs_of(inside, series.interval))
            left += [Gap(part, gap.reason) for part in read.missing(gap.range)]
        return _Read(candles, joined(left), fetched, error)

    async def _completed(self, resolved: ResolvedSeries, found: _Read, source: Interval) -> _Read:
        """``found`` with what is stored of a shorter interval in the place of what the exchange
        does not give any more, or cannot be asked for."""
        shorter = replace(resolved.series, interval=source)
        view = self._reconciler.view(shorter, resolved.market)
        parts, gaps = [found.candles], []
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
            parts.append(made.candles)
            # What the shorter one does not know either stays what it was.
            gaps += [
                left if left.reason is GapReason.NO_TRADES else Gap(left.range, gap.reason)
                for left in made.gaps
            ]
        return _Read(Candles.joined(parts), joined(gaps), found.fetched, found.error)

    @staticmethod
    def _resampled(read: _Read, wanted: TimeRange, *, source: Interval, target: Interval) -> _Read:
        made = resample(read.candles, read.gaps, wanted, source=source, target=target)
        # One that a single fetched candle is part of is of the exchange.
        fetched = RangeSet(
            TimeRange(target.floor(run.start), target.ceil(run.end)) for run in read.fetched
        )
        return _Read(made.candles, made.gaps, fetched, read.error)

    async def pages(
        self, resolved: ResolvedSeries, wanted: TimeRange, *, periods: int
    ) -> AsyncGenerator[Page, None]:
        """The range in pages of ``periods`` each, ascending, as they become available.

        What is settled is read ahead of them, a bounded part, while the pages before it are used;
        what the exchange has to be asked for is asked page by page. Close it when it is left early.
        """
        wanted = self.closed_part(resolved, wanted)
        periods = min(periods, self.most_periods(resolved) or periods)
        reach = periods * resolved.series.interval.milliseconds
        most = max(1, READ_AHEAD_PERIODS // periods) if resolved.offered else 1
        at, ahead = wanted.start, 1
        coming: asyncio.Task[Page] | None = None
        try:
            while at < wanted.end:
                began = self._clock.monotonic()
                if coming is not None:
                    page, coming = await coming, None
                else:
                    page = await self.fetch_data(
                        resolved, TimeRange(at, min(at + reach, wanted.end))
                    )
                waited = self._clock.monotonic() - began
                at = page.range.end
                ahead = min(_READ_AHEAD_GROWTH * ahead, most) if waited < _READ_AHEAD_S else 1
                window = TimeRange(at, min(at + ahead * reach, wanted.end))
                if window and await self._is_settled(resolved, window):
                    coming = asyncio.create_task(self._read_settled(resolved, window))
                    # It begins to read now, and not when somebody waits for it.
                    await asyncio.sleep(0)
                for part in page.cut(reach):
                    yield part
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait([coming])

    async def _read_settled(self, resolved: ResolvedSeries, wanted: TimeRange) -> Page:
        """A page of what nobody has to be asked for."""
        view = self._reconciler.view(resolved.series, resolved.market)
        found = await self._stored(resolved.series, wanted, view.gaps(wanted), RangeSet())
        if await self._is_short(resolved.series, resolved.market, wanted, found):
            return await self.fetch_data(resolved, wanted)
        for source in resolved.sources:
            found = await self._completed(resolved, found, source)
        return Page(wanted, found.candles, found.gaps)

    async def _is_settled(self, resolved: ResolvedSeries, wanted: TimeRange) -> bool:
        if not resolved.offered:
            return False
        view = self._reconciler.view(resolved.series, resolved.market)
        await view.load(wanted)
        return view.is_settled(wanted)
