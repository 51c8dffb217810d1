"""History for those who ask: pages, streams, the newest candle, summaries and coverage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from domain.candle import Candle
from domain.clock import IClock
from domain.gap import Gap, joined
from domain.series import Series
from domain.time_range import TimeRange
from errors import InvalidRequest, NoData
from exchange_source.interfaces import ExchangeError
from historical.columns import Candles
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher, Page
from historical.interfaces import (
    Coverage,
    CurrentData,
    History,
    IHistoricalDataManager,
    IJsonWebSocket,
    ISeriesDirectory,
    ResolvedSeries,
    Summary,
)
from historical.messages import gap_out
from historical.summary import (
    max_drawdown_percent,
    thinned,
    total,
    typical_price_vwap,
    volatility,
)
from models import HISTORY_COLUMNS
from reconciliation.interfaces import IReconciler
from storage.interfaces import StorageUnavailable

SUMMARY_CANDLES: Final = 50
SUMMARY_PAGE: Final = 5_000
# A page of history asks the exchange for at most this many windows: a range without candles is
# walked through by the client, with next_start, and never ties up a request.
WINDOWS_A_PAGE: Final = 10
# How far back (periods) the newest candle of a series that is not collected is looked for.
CURRENT_REACH: Final = 50

FormingLookup = Callable[[Series], tuple[Candle, int] | None]
"""The forming candle of a series that is collected, and when (market ms) it came."""


class HistoricalDataManagerImpl(IHistoricalDataManager):
    """Decides which series is meant, cuts ranges into pages, and says what is missing."""

    def __init__(
        self,
        *,
        directory: ISeriesDirectory,
        fetcher: HistoricalFetcher,
        current: CurrentDataFetcher,
        reconciler: IReconciler,
        forming: FormingLookup,
        clock: IClock,
    ) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._current = current
        self._reconciler = reconciler
        self._forming = forming
        self._clock = clock

    async def get_historical_data(
        self,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        limit: int = 500,
    ) -> History:
        wanted = _range(start, end)
        resolved = await self._directory.resolve(coin, exchange=exchange, interval=interval)
        step = resolved.series.interval.milliseconds
        closed = self._fetcher.closed_part(resolved, wanted)
        pages: list[Page] = []
        count, at = 0, closed.start
        most = self._fetcher.most_periods(resolved) or limit
        while at < closed.end and count < limit and len(pages) < WINDOWS_A_PAGE:
            window = TimeRange(at, min(closed.end, at + min(limit - count, most) * step))
            page = await self._fetcher.fetch_data(resolved, window)
            pages.append(page)
            count += len(page.candles)
            at = window.end
        error = _error_of_none(pages)
        if error is not None:
            await self._refuse_if_nothing_is_stored(resolved.series, error)
        return History(
            series=resolved.series,
            market=resolved.market,
            range=wanted,
            candles=Candles.joined([page.candles for page in pages]),
            gaps=joined(gap for page in pages for gap in page.gaps),
            from_storage=sum(page.from_storage for page in pages),
            from_exchange=sum(page.from_exchange for page in pages),
            next_start=at if at < closed.end else None,
        )

    async def stream_historical_data(
        self,
        websocket: IJsonWebSocket,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        chunk_size: int = 1000,
        request_id: str | None = None,
    ) -> None:
        wanted = _range(start, end)
        resolved = await self._directory.resolve(coin, exchange=exchange, interval=interval)
        series = resolved.series
        answers = {} if request_id is None else {"request_id": request_id}
        chunks = count = from_storage = from_exchange = 0
        gaps: list[Gap] = []
        unanswered: ExchangeError | None = None
        async with aclosing(self._fetcher.pages(resolved, wanted, periods=chunk_size)) as pages:
            async for page in pages:
                # Joined as they come: of ten years without a candle one is left.
                gaps[-1:] = joined([*gaps[-1:], *page.gaps])
                unanswered = page.error or unanswered
                if not len(page.candles):
                    continue
                await websocket.send_json(
                    {
                        "type": "historical_data_chunk",
                        **answers,
                        "index": chunks,
                        "exchange": series.exchange,
                        "coin": series.coin,
                        "market": resolved.market,
                        "interval": series.interval.name,
                        "columns": HISTORY_COLUMNS,
                        "rows": page.candles.rows(),
                    }
                )
                chunks += 1
                count += len(page.candles)
                from_storage += page.from_storage
                from_exchange += page.from_exchange
        if count == 0 and unanswered is not None:
            await self._refuse_if_nothing_is_stored(series, unanswered)
        await websocket.send_json(
            {
                "type": "historical_data_complete",
                **answers,
                "count": count,
                "chunks": chunks,
                "gaps": [gap_out(gap, series.interval) for gap in gaps],
                "sources": {"storage": from_storage, "exchange": from_exchange},
            }
        )

    async def get_most_current_data(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> CurrentData:
        resolved = await self._directory.resolve(coin, exchange=exchange, interval=interval)
        _check_kept(resolved)
        series = resolved.series
        if resolved.since is None:
            # Nobody keeps this series: what is stored may be old.
            closed_end = series.interval.floor(self._clock.now_ms())
            reach = CURRENT_REACH * series.interval.milliseconds
            page = await self._fetcher.fetch_data(
                resolved, TimeRange(closed_end - reach, closed_end)
            )
            error = page.error
        else:
            error = None
        forming = self._forming(series)
        try:
            entry = await self._current.get_latest_entry(series)
        except StorageUnavailable:
            # What is heard live needs no storage.
            if forming is None:
                raise
            entry = None
        now = self._clock.now_ms()
        if forming is not None and (entry is None or forming[0].timestamp > entry.timestamp):
            candle, heard_at = forming
            return CurrentData(series, resolved.market, candle, None, max(0, now - heard_at))
        if entry is not None:
            return CurrentData(
                series, resolved.market, entry.candle, entry, max(0, now - entry.end)
            )
        if error is not None:
            raise error
        raise NoData(f"nothing is known of {series} yet; add the coin, or ask again later")

    async def summarize_history(
        self,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
    ) -> Summary:
        wanted = _range(start, end)
        resolved = await self._directory.resolve(coin, exchange=exchange, interval=interval)
        async with aclosing(self._fetcher.pages(resolved, wanted, periods=SUMMARY_PAGE)) as found:
            pages = [page async for page in found]
        error = _error_of_none(pages)
        if error is not None:
            raise error
        candles = Candles.joined([page.candles for page in pages])
        if not len(candles):
            raise NoData(
                f"there is no candle of {resolved.series} between {start} and {end}; "
                f"get_coverage says what is stored"
            )
        first, last = candles[0], candles[-1]
        shown, periods = thinned(candles, resolved.series.interval.milliseconds, SUMMARY_CANDLES)
        return Summary(
            series=resolved.series,
            market=resolved.market,
            range=wanted,
            count=len(candles),
            first=first,
            last=last,
            high=float(candles.high.max()),
            low=float(candles.low.min()),
            change_percent=(last.close / first.open - 1) * 100,
            volume=total(candles.volume),
            vwap=typical_price_vwap(candles),
            volatility=volatility(candles),
            max_drawdown_percent=max_drawdown_percent(candles),
            candles=shown,
            candle_periods=periods,
            gaps=joined(gap for page in pages for gap in page.gaps),
        )

    async def get_coverage(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> Coverage:
        resolved = await self._directory.resolve(coin, exchange=exchange, interval=interval)
        _check_kept(resolved)
        series = resolved.series
        view = self._reconciler.view(series, resolved.market)
        now = series.interval.floor(self._clock.now_ms())
        await view.load(TimeRange(resolved.since or 0, now))
        start = resolved.since
        if start is None:
            stored = view.stored_ranges(TimeRange(0, now))
            start = stored[0].start if stored else now
        wanted = TimeRange(start, now)
        # What is read for that may show that a document is broken: ranges and gaps come after it.
        await view.learn_books(wanted)
        ranges = view.stored_ranges(wanted)
        step = series.interval.milliseconds
        return Coverage(
            series=series,
            first=ranges[0].start if ranges else None,
            last=ranges[-1].end - step if ranges else None,
            expected=wanted.length // step,
            stored=sum(run.length for run in ranges) // step,
            with_order_book=view.booked_count(wanted),
            ranges=tuple(ranges),
            gaps=tuple(view.gaps(wanted)),
        )

    async def _refuse_if_nothing_is_stored(self, series: Series, error: ExchangeError) -> None:
        """With nothing of the series in storage, the exchange's silence is the answer; else the
        gaps say it."""
        if await self._current.get_latest_entry(series) is None:
            raise error


def _range(start: int, end: int) -> TimeRange:
    if start < 0:
        raise InvalidRequest(f"start {start} lies before 1970; times are ms since the epoch, UTC")
    if end <= start:
        raise InvalidRequest(f"end {end} is not after start {start}; ranges are [start, end)")
    return TimeRange(start, end)


def _check_kept(resolved: ResolvedSeries) -> None:
    """Refuse what is told of stored entries only, of an interval that is resampled."""
    if not resolved.offered:
        raise InvalidRequest(
            f"{resolved.series.exchange} does not offer {resolved.series.interval}; its history is "
            f"resampled from {resolved.sources[0]}: ask for that one"
        )


def _error_of_none(pages: list[Page]) -> ExchangeError | None:
    """Why the exchange could not be asked, where there is not a single candle."""
    if any(len(page.candles) for page in pages):
        return None
    return next((page.error for page in pages if page.error is not None), None)
