"""The keeper of one target: everything that keeps its series complete, live and in order.

Correctness never depends on having seen an event. Updates and reconnects only say when to look;
the clock looks anyway, and each look asks storage what is missing.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import structlog

from collection.feed import FeedSupervisor
from collection.hub import Hub
from collection.interfaces import TargetState, TargetStatus
from collection.processor import RealTimeProcessor
from collection.waiting import first_of
from domain.back_off import back_off_s
from domain.clock import IClock
from domain.entry import BOOK_TOLERANCE_MS
from domain.gap import Gap
from domain.time_range import TimeRange
from errors import DataServiceError
from exchange_source.interfaces import (
    ExchangeError,
    ExchangeRefused,
    IExchangeAPIClient,
    Priority,
)
from reconciliation.interfaces import IReconciler, SettleReport
from target_management.interfaces import Target

# How far back periods are live (market ms); what is older is repair. What is settled at a close
# reaches as far, and so takes along the second looks that are due by then, the last of which comes
# an hour after a period's end.
LIVE_REACH_MS: Final = 3_600_000
# A look waits so long (market ms) for the settling of a close to take it along.
LOOK_PATIENCE_MS: Final = 15_000
REPAIR_EVERY_MS: Final = 3_600_000
# What a repair leaves open though the exchange answers is asked for again after this (market ms),
# doubling.
FIRST_REPAIR_MS: Final = 60_000
# By the clock a period is asked for this long after its end (market ms), should no update of the
# next one have said so before: a little more than plugins want to call it closed.
CLOSE_GRACE_MS: Final = 7_000
# A closed period that the exchange has not published yet is asked for again after this (market
# ms), doubling; never more often than the real pause, however fast the market clock runs.
FIRST_POLL_MS: Final = 2_000
LONGEST_POLL_MS: Final = 60_000
SHORTEST_REAL_PAUSE_S: Final = 0.05
# How often the looks that are owed are counted (market ms).
LOOK_RHYTHM_MS: Final = 30_000
FIRST_RETRY_S: Final = 1.0
LONGEST_RETRY_S: Final = 60.0
# Those who wait for the end of an outage come back within this of its pause (real time).
PROBE_SPREAD_S: Final = 5.0
# What the exchange refuses is not asked for again sooner than this (real time).
REFUSED_PAUSE_S: Final = 5.0

log = structlog.get_logger(__name__)


class SeriesKeeper:
    """Keeps one target; ``run`` until cancelled."""

    def __init__(
        self,
        target: Target,
        *,
        client: IExchangeAPIClient,
        reconciler: IReconciler,
        processor: RealTimeProcessor,
        hub: Hub,
        feed: FeedSupervisor,
        clock: IClock,
        rng: random.Random,
    ) -> None:
        self.target = target
        self.series = target.series
        self.view = reconciler.view(self.series, target.market)
        self.opened = asyncio.Event()
        """Set once subscribers can be told."""
        self.removed_by: str | None = None
        """Who asked for its removal, which waits for its last subscriber; or None."""
        self._client = client
        self._reconciler = reconciler
        self._processor = processor
        self._hub = hub
        self._feed = feed
        self._clock = clock
        self._rng = rng
        self._step = self.series.interval.milliseconds
        self._wake = asyncio.Event()
        self._newest_update = 0
        self._settled_until = 0
        self._settled_once = False
        self._backfilled = False
        self._delisted = False
        # Why the exchange refuses to tell of the market, listed or not.
        self._refusal: ExchangeRefused | None = None
        self._failing = False
        # Cleared while the market is delisted or refused: then only the repair asks, hour by hour.
        self._served = asyncio.Event()
        self._served.set()
        self._repair_now = asyncio.Event()
        # What takes in and looks for more, while it runs.
        self._intake: list[asyncio.Task[None]] = []

    @property
    def removing(self) -> bool:
        """Whether it goes when its last subscriber leaves."""
        return self.removed_by is not None

    def status(self) -> TargetStatus:
        """How the target does."""
        now = self._clock.now_ms()
        stored = self.view.stored_ranges(TimeRange(0, now))
        end = stored[-1].end if stored else None
        return TargetStatus(
            target=self.target,
            state=self._state(),
            last_entry=end - self._step if end is not None else None,
            lag_ms=max(0, now - end) if end is not None else None,
        )

    def open_gaps(self) -> list[Gap]:
        """What of the wanted periods is missing and may still come."""
        return self.view.open_gaps(TimeRange(self.target.since, self._clock.now_ms()))

    def open_from_now(self) -> None:
        """Tell subscribers from the period that runs now: for a target that was just added."""
        self._open(self.series.interval.floor(self._clock.now_ms()))

    def note_reconnect(self) -> None:
        """The feed is back: look at what it may have missed, and at everything wanted."""
        self._wake.set()
        self._repair_now.set()

    async def run(self) -> None:
        """Keep the series until cancelled."""
        self._processor.route(self.series, self.target.market, self._on_update)
        self.view.use_sink(self._processor.process_settled)
        try:
            async with asyncio.TaskGroup() as group:
                self._intake = [
                    group.create_task(work)
                    for work in (
                        self._feed.keep_candles(
                            self.target.market,
                            self.target.interval,
                            on_refused=self._stream_refused,
                        ),
                        self._feed.keep_book(self.target.market, on_refused=self._stream_refused),
                        self._follow(),
                        self._repair(),
                        self._look_again(),
                    )
                ]
                group.create_task(self._capture_books())
                group.create_task(self._tell())
        finally:
            self.view.use_sink(None)
            self._processor.unroute(self.series, self.target.market)

    async def finish(self) -> None:
        """Take in nothing more, and settle what has closed by now and is still open.

        Its order books are in memory only, and gone with the process. What the exchange has not
        told by its grace is left to the next start. How long this may take is the caller's to say;
        ``run`` goes on, so that what is settled is stored and told as ever.
        """
        for task in self._intake:
            task.cancel()
        closed_end = self.series.interval.floor(self._clock.now_ms())
        window = self._live_window(closed_end)
        patience = closed_end + CLOSE_GRACE_MS + FIRST_POLL_MS
        failures = 0
        while self._served.is_set() and self.view.open_gaps(window):
            is_last = self._clock.now_ms() >= patience
            report = await self._settle(window, Priority.LIVE)
            if report is None or report.error is not None:
                if not await self._waited_out():
                    await self._back_off(failures)
                    failures += 1
                continue
            if is_last:
                break
            await self._clock.sleep_real(SHORTEST_REAL_PAUSE_S)
            await self._clock.sleep_until(self._clock.now_ms() + FIRST_POLL_MS)
        # What is stored is not always told yet: its ledger is written in between.
        await self._hub.advance(self.series)

    # -- the tasks --------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Settle what has just closed: at the next period's first update, or by the clock."""
        poll = FIRST_POLL_MS
        interval = self.series.interval
        while True:
            await self._served.wait()
            self._wake.clear()
            closed_end = interval.floor(self._clock.now_ms())
            report = await self._settle(self._live_window(closed_end), Priority.LIVE)
            if report is not None and report.error is None:
                self._settled_until = closed_end
            next_look = closed_end + self._step + CLOSE_GRACE_MS
            if report is not None and not report.open:
                poll = FIRST_POLL_MS
                self._restart_if_silent(closed_end - self._step)
                await self._wait(next_look)
                continue
            await self._clock.sleep_real(SHORTEST_REAL_PAUSE_S)
            if await self._waited_out():
                continue
            if poll == LONGEST_POLL_MS and report is not None and report.error is None:
                # It answers, and has told nothing newer for minutes.
                await self._check_listed()
            # Not back to the first pause at the next close: a market without trades stays open for
            # hours, and its first update wakes this anyway.
            await self._wait(min(self._clock.now_ms() + poll, next_look))
            poll = min(2 * poll, LONGEST_POLL_MS)

    async def _repair(self) -> None:
        """Settle everything wanted: backfill at first, then what was missed, hour by hour, after
        each loss of the feed, and as soon as a market is served again."""
        failures = left_open = 0
        while True:
            self._repair_now.clear()
            closed_end = self.series.interval.floor(self._clock.now_ms())
            report = await self._settle(TimeRange(self.target.since, closed_end), Priority.BACKFILL)
            if self._served.is_set() and (report is None or report.error is not None):
                if not await self._waited_out():
                    await self._back_off(failures)
                    failures += 1
                continue
            failures = 0
            if report is not None and report.error is None:
                self._backfilled = True
                if not self._served.is_set():
                    await self._check_listed()
            # What the exchange refuses, or answers without a proof, it may give a little later.
            soon = not self._delisted and (
                report is None
                or report.error is not None
                or any(gap.range.start < self._live_edge(closed_end) for gap in report.open)
            )
            again = REPAIR_EVERY_MS
            if soon:
                again = min(again, FIRST_REPAIR_MS * 2 ** min(left_open, 10))
            left_open = left_open + 1 if soon else 0
            await first_of(self._pause(again), self._repair_now.wait())
            await self._check_what_is_stored()

    async def _look_again(self) -> None:
        """Take the second looks that are owed: exchanges publish late and correct themselves."""
        failures = 0
        while True:
            await self._served.wait()
            due = self.view.looks_due()
            if due is not None:
                report = await self._settle(due, Priority.BACKFILL)
                if report is None or report.error is not None:
                    if not await self._waited_out():
                        await self._back_off(failures)
                        failures += 1
                    continue
                failures = 0
            await self._clock.sleep_real(SHORTEST_REAL_PAUSE_S)
            soon = self._clock.now_ms() + LOOK_RHYTHM_MS
            next_look = self.view.next_look_at() or soon
            await self._clock.sleep_until(min(soon, next_look + LOOK_PATIENCE_MS))

    async def _capture_books(self) -> None:
        """At each period's end, by the clock, copy the live book's top; else ask REST for it."""
        interval = self.series.interval
        while True:
            close = interval.floor(self._clock.now_ms()) + self._step
            await self._clock.sleep_until(close)
            if not self._served.is_set():
                continue
            book = self._feed.book(self.target.market)
            if book is None or abs(book.timestamp - close) > BOOK_TOLERANCE_MS:
                try:
                    book = await self._reconciler.order_book(
                        self.series.exchange, self.target.market
                    )
                except ExchangeError as exc:
                    log.debug("no_order_book", series=str(self.series), error=exc.message)
            if book is not None and abs(book.timestamp - close) <= BOOK_TOLERANCE_MS:
                self.view.note_book(close - self._step, book)

    async def _tell(self) -> None:
        """Let nothing hold back the order of what subscribers are told for too long."""
        while not self.opened.is_set():
            try:
                await self._open_where_it_was_left()
            except DataServiceError as exc:
                log.warning("series_not_opened", series=str(self.series), error=exc.message)
                await self._clock.sleep_real(FIRST_RETRY_S)
        while True:
            deadline = self._hub.next_deadline(self.series)
            if deadline is not None:
                await self._clock.sleep_until(deadline)
            try:
                await self._hub.advance(self.series)
            except DataServiceError as exc:
                log.warning("series_not_told", series=str(self.series), error=exc.message)
                await self._clock.sleep_real(FIRST_RETRY_S)
            await self._clock.sleep_real(SHORTEST_REAL_PAUSE_S)

    # -- inside -----------------------------------------------------------------------------

    def _live_window(self, closed_end: int) -> TimeRange:
        """The periods that are settled live now; after an outage everything that it swallowed."""
        settled_until = min(closed_end, self._settled_until or closed_end)
        start = settled_until - LIVE_REACH_MS - 2 * self._step
        return TimeRange(max(self.target.since, start), closed_end)

    def _live_edge(self, closed_end: int) -> int:
        """From where on periods are live; what is older is repair."""
        return closed_end - max(LIVE_REACH_MS, 2 * self._step)

    def _on_update(self, period: int) -> None:
        self._feed.note_data()
        if period > self._newest_update:
            self._newest_update = period
            self._wake.set()
            if not self._served.is_set():
                self._repair_now.set()  # it trades again: the repair sees to it

    async def _settle(self, wanted: TimeRange, priority: Priority) -> SettleReport | None:
        """Settle a range; None when storage, or the worker, refused."""
        try:
            report = await self._reconciler.settle(
                self.series, self.target.market, wanted, priority=priority
            )
        except DataServiceError as exc:
            if not self._failing:
                log.warning("series_not_settled", series=str(self.series), error=exc.message)
            self._failing = True
            return None
        if report.error is not None and not self._failing:
            self._note_error(report.error)
        self._failing = report.error is not None
        self._settled_once = self._settled_once or report.error is None
        if report.error is None:
            self._refusal = None
        elif isinstance(report.error, ExchangeRefused):
            self._refusal = report.error
            await self._check_listed()
        return report

    def _note_error(self, error: ExchangeError) -> None:
        """Tell the first of a series of errors, if nobody else does: of an outage of the exchange
        its worker tells, of a refusal ``_check_listed``."""
        outage = self._reconciler.retry_in(self.series.exchange) > 0
        if not outage and not isinstance(error, ExchangeRefused):
            log.warning("series_not_settled", series=str(self.series), error=error.message)

    async def _check_listed(self) -> None:
        """Know whether the exchange still serves the market.

        An exchange that cannot be asked leaves what is known as it is.
        """
        try:
            market = await self._client.check_coin_availability(
                self.target.market, priority=Priority.BACKFILL
            )
        except ExchangeError as exc:
            log.debug("listing_unknown", series=str(self.series), error=exc.message)
            return
        delisted = market is None
        served = not delisted and self._refusal is None
        if delisted and not self._delisted:
            log.warning("market_delisted", series=str(self.series), market=self.target.market)
        elif not delisted and self._refusal is not None and self._served.is_set():
            log.warning("market_refused", series=str(self.series), error=self._refusal.message)
        elif served and not self._served.is_set():
            log.info("market_served_again", series=str(self.series), market=self.target.market)
        self._delisted = delisted
        if served:
            self._served.set()
        elif self._served.is_set():
            self._served.clear()
            self._repair_now.set()  # from now on the repair alone asks

    async def _stream_refused(self, error: ExchangeRefused) -> None:
        """Return when it is worth subscribing again: when a delisted market is served again, an
        hour later where the stream alone is refused."""
        await self._check_listed()
        if not self._served.is_set():
            await self._served.wait()
            return
        log.warning("stream_refused", series=str(self.series), error=error.message)
        await self._clock.sleep_real(REFUSED_PAUSE_S)
        await self._clock.sleep_until(self._clock.now_ms() + REPAIR_EVERY_MS)

    def _restart_if_silent(self, period: int) -> None:
        """Subscribe anew when a period has a candle of which the stream has said nothing, though
        the feed was heard meanwhile."""
        market, interval = self.target.market, self.target.interval
        since = self._feed.heard_since(market, interval)
        heard = self._newest_update >= period
        if heard or since is None or since > period or self._feed.heard_at < period:
            return
        if self.view.stored_ranges(TimeRange(period, period + self._step)):
            log.warning("stream_silent", series=str(self.series), since=since)
            self._feed.restart_candles(market, interval)

    async def _waited_out(self) -> bool:
        """Wait for the end of an outage of the exchange, or for a turn to probe it; False at once
        when none is known."""
        exchange = self.series.exchange
        retry_in = self._reconciler.retry_in(exchange)
        if retry_in == 0:
            return False
        await first_of(
            # Spread, so that of many who wait one probes, and its answer lets the others go.
            self._clock.sleep_real(retry_in + self._rng.uniform(0.0, PROBE_SPREAD_S)),
            self._reconciler.until_answering(exchange),
        )
        return True

    async def _back_off(self, failures: int) -> None:
        """The pause after a failure that is this market's own, or of storage (real time)."""
        await self._clock.sleep_real(
            back_off_s(failures, first_s=FIRST_RETRY_S, longest_s=LONGEST_RETRY_S, rng=self._rng)
        )

    async def _pause(self, market_ms: int) -> None:
        """The pause of the repair: by the market's clock, but not in quick succession."""
        await self._clock.sleep_real(
            SHORTEST_REAL_PAUSE_S if self._served.is_set() else REFUSED_PAUSE_S
        )
        await self._clock.sleep_until(self._clock.now_ms() + market_ms)

    async def _check_what_is_stored(self) -> None:
        try:
            await self.view.refresh(TimeRange(self.target.since, self._clock.now_ms()))
        except DataServiceError as exc:
            log.warning("series_not_listed", series=str(self.series), error=exc.message)

    async def _wait(self, until: int) -> None:
        """Wait for a moment of market time, or to be woken."""
        await first_of(self._clock.sleep_until(until), self._wake.wait())

    async def _open_where_it_was_left(self) -> None:
        """Tell from the oldest open period of the last hour on, else from the newest settled."""
        interval = self.series.interval
        closed_end = interval.floor(self._clock.now_ms())
        start = interval.floor(max(self.target.since, self._live_edge(closed_end)))
        last = TimeRange(start, closed_end)
        await self.view.load(last)
        still_open = [gap for gap in self.view.gaps(last) if gap.reason.is_open]
        self._open(still_open[0].range.start if still_open else closed_end)

    def _open(self, next_open: int) -> None:
        self._hub.open(self.view, next_open)
        self.opened.set()

    def _state(self) -> TargetState:
        if self.removing:
            return TargetState.REMOVING
        if self._delisted:
            return TargetState.DELISTED
        if self._failing or self._feed.state == "reconnecting":
            return TargetState.DEGRADED
        if not self._settled_once:
            return TargetState.STARTING
        return TargetState.LIVE if self._backfilled else TargetState.BACKFILLING
