"""settle(): the one function that closes candles, resumes, backfills, corrects and repairs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import (
    ExchangeError,
    HistoricalData,
    IExchangeAPIClient,
    Priority,
)
from observability.tracing import Origin, span
from reconciliation.interfaces import SettleReport
from reconciliation.series_state import SeriesState


@dataclass(slots=True)
class Progress:
    """How far a range has been settled: what lies before ``remaining.end`` is still to do.

    ``asked_after`` is the number of the latest request about the series when settling was asked
    for: what stays open in an answer to a later one need not be asked again. ``reason`` is why it
    is wanted, and ``shared_with`` the spans of others that wait for it; both are for traces.
    """

    wanted: TimeRange
    remaining: TimeRange
    asked_after: int
    fetched: RangeSet = field(default_factory=RangeSet)
    error: ExchangeError | None = None
    reason: str = "asked"
    shared_with: list[Origin] = field(default_factory=list)

    @classmethod
    def over(cls, state: SeriesState, wanted: TimeRange, *, reason: str = "asked") -> Progress:
        return cls(wanted=wanted, remaining=wanted, asked_after=state.asks, reason=reason)


Ask = Callable[[SeriesState, TimeRange], Awaitable[HistoricalData]]
"""Asks the exchange about the periods of one page; raises ``ExchangeError``."""


def asking(client: IExchangeAPIClient, priority: Priority) -> Ask:
    """Ask ``client`` directly."""

    async def ask(state: SeriesState, page: TimeRange) -> HistoricalData:
        return await client.fetch_historical_data(
            state.market, state.series.interval.name, page.start, page.end, priority=priority
        )

    return ask


async def settle_page(
    state: SeriesState, progress: Progress, ask: Ask, *, page_periods: int
) -> bool:
    """Settle the newest page of what remains; the series is locked for this one page.

    Returns:
        Whether something remains to be done.

    Raises:
        ExchangeError: the exchange could not be asked; the page stays open.
        StorageError: storage could not be listed or written; nothing was concluded.
    """
    async with state.exclusive():
        await state.load(progress.wanted)
        # One request may settle many holes: everything to do within a page of the newest.
        page = state.next_page(
            progress.remaining, periods=page_periods, asked_after=progress.asked_after
        )
        if page.first is None or page.end is None:
            progress.remaining = TimeRange(progress.wanted.start, progress.wanted.start)
            return False
        reach = TimeRange(page.first, page.end)
        with span(
            "settle",
            links=progress.shared_with,
            exchange=state.series.exchange,
            coin=state.series.coin,
            interval=state.series.interval.name,
            start=reach.start,
            end=reach.end,
            reason=progress.reason,
        ):
            asked_at, request = state.now_ms(), state.begin_request()
            try:
                answer = await ask(state, reach)
            except ExchangeError:
                state.note_unreachable(progress.remaining)
                raise
            for run in await state.record(page, answer, asked_at=asked_at, request=request):
                progress.fetched.add(run)
            await state.save()
        progress.remaining = TimeRange(progress.remaining.start, reach.start)
    return bool(progress.remaining)


def report_of(state: SeriesState, progress: Progress) -> SettleReport:
    """What settling has come to so far."""
    closed = state.closed_part(progress.wanted)
    return SettleReport(
        range=closed,
        gaps=tuple(state.gaps(closed)),
        fetched=progress.fetched,
        error=progress.error,
    )


async def settle(
    state: SeriesState, wanted: TimeRange, ask: Ask, *, page_periods: int
) -> SettleReport:
    """Settle a range page by page, newest first; what the exchange refuses stays open.

    Raises:
        StorageError: storage could not be listed or written; nothing was concluded.
    """
    progress = Progress.over(state, wanted)
    more = True
    while more:
        try:
            more = await settle_page(state, progress, ask, page_periods=page_periods)
        except ExchangeError as exc:
            progress.error = exc
            more = False
    return report_of(state, progress)
