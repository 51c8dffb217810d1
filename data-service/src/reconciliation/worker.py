"""The settling worker of one exchange: who is settled first, and how an outage is probed.

Jobs wait in a queue by priority, a page at a time, so that a live candle never stands behind a
whole backfill; every so many pages the last in line goes first, so that endless requests do not
keep it waiting for ever. A series is worked at by one runner, so that a slow one holds up no other.
After a failure the exchange is left alone for a while that grows; then one job asks, and the others
follow only once it was answered.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from domain.back_off import back_off_s
from domain.clock import IClock
from domain.order_book import OrderBook
from domain.time_range import TimeRange
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    Priority,
)
from observability.tracing import Origin, origin, within
from reconciliation.interfaces import SettledListener, SettleReport
from reconciliation.series_state import SeriesState
from reconciliation.settler import Ask, Progress, asking, report_of, settle_page

RUNNERS: Final = 8
QUEUE_BOUND: Final = 10_000
# Each page of this many is one of the least urgent job that waits.
FAIR_TURN: Final = 8
# Of those who share a job as many are told to its trace.
MOST_LINKS: Final = 16
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class Outage:
    """Whether the exchange may be asked now (real time).

    It cannot once it has failed two markets in a row: what fails for one alone is that market's
    trouble, and costs the others nothing. An exchange that asks for a pause gets it at once.
    """

    def __init__(self, exchange: str, clock: IClock, rng: random.Random) -> None:
        self._exchange = exchange
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._until = 0.0
        self._probing = False
        # Two of each say enough.
        self._markets: set[str] = set()
        self._failing: set[str] = set()
        self._over = asyncio.Event()
        self._over.set()

    async def until_over(self) -> None:
        """Return as soon as no outage is known."""
        await self._over.wait()

    def enter(self, market: str) -> bool:
        """Let a request about a market out; during an outage that is one probe at a time.

        Returns:
            Whether the request is that probe.

        Raises:
            ExchangeUnavailable: it is too early to ask again.
        """
        if len(self._markets) < 2:
            self._markets.add(market)
        if self._failures == 0:
            return False
        if self._probing or self._clock.monotonic() < self._until:
            raise ExchangeUnavailable(
                f"{self._exchange} could not be asked a moment ago and is left alone until the "
                f"next try",
                retry_after=self.retry_in,
            )
        self._probing = True
        return True

    def answered(self) -> None:
        if self._failures:
            log.info("exchange_answers_again", exchange=self._exchange)
        self._failures = 0
        self._probing = False
        self._failing.clear()
        self._over.set()

    def failed(self, error: ExchangeError, market: str, *, probe: bool) -> None:
        if self._failures and not probe:
            return  # sent before the outage began: no further failure
        if self._failures == 0:
            self._failing.add(market)
            if error.retry_after is None and len(self._failing) < len(self._markets):
                return
            log.warning("exchange_cannot_be_asked", exchange=self._exchange, error=error.message)
        pause = back_off_s(
            self._failures,
            first_s=FIRST_PAUSE_S,
            longest_s=LONGEST_PAUSE_S,
            rng=self._rng,
            asked_for_s=error.retry_after,
        )
        self._failures += 1
        self._over.clear()
        self._until = self._clock.monotonic() + pause
        self._probing = False

    def released(self, *, probe: bool) -> None:
        """The request ended without an answer of the exchange, such as by cancellation."""
        self._probing = self._probing and not probe

    @property
    def retry_in(self) -> float:
        """Real seconds until the next request may be tried."""
        if self._failures == 0:
            return 0.0
        return max(0.05, self._until - self._clock.monotonic())


_Key = tuple[SeriesState, TimeRange, Priority]


@dataclass(slots=True, eq=False)
class _Job:
    key: _Key
    priority: Priority
    state: SeriesState
    progress: Progress
    done: asyncio.Future[SettleReport]
    asked_in: Origin | None
    """The span of who asked first; a runner works for it in a task of its own."""
    waiters: int = 0
    ending: bool = False


class SettlingWorker:
    """Runs the settling jobs of one exchange; ``run`` is owned by the lifespan."""

    def __init__(
        self,
        client: IExchangeAPIClient,
        clock: IClock,
        *,
        on_settled: SettledListener,
        rng: random.Random,
        runners: int = RUNNERS,
    ) -> None:
        self._client = client
        self._outage = Outage(client.get_exchange_name(), clock, rng)
        self._on_settled = on_settled
        self._page_periods = client.history_page
        self._runners = runners
        self._queues: dict[Priority, deque[_Job]] = {priority: deque() for priority in Priority}
        self._busy: set[SeriesState] = set()
        self._taken = 0
        self._ready = asyncio.Condition()
        # As few books as jobs are under way at once, so that hardly any is when an outage begins.
        self._books = asyncio.Semaphore(runners)
        self._jobs: dict[_Key, _Job] = {}
        self._stopped = False

    @property
    def retry_in(self) -> float:
        """Real seconds until the exchange may be asked again; 0 when it may now."""
        return self._outage.retry_in

    async def until_answering(self) -> None:
        """Return as soon as no outage of the exchange is known."""
        await self._outage.until_over()

    async def order_book(self, market: str) -> OrderBook:
        """The top of the book now, by REST; see ``IReconciler.order_book``."""
        async with self._books:
            return await self._ask(
                market, lambda: self._client.fetch_order_book(market, priority=Priority.LIVE)
            )

    async def settle(
        self, state: SeriesState, wanted: TimeRange, *, priority: Priority
    ) -> SettleReport:
        """Queue a range and wait for what it comes to; see ``IReconciler.settle``."""
        key = (state, wanted, priority)
        job = self._jobs.get(key)
        if job is None:
            if len(self._jobs) >= QUEUE_BOUND or self._stopped:
                raise ExchangeUnavailable(
                    f"{self._client.get_exchange_name()} has {len(self._jobs)} ranges waiting; "
                    f"ask again later",
                    retry_after=LONGEST_PAUSE_S,
                )
            done: asyncio.Future[SettleReport] = asyncio.get_running_loop().create_future()
            progress = Progress.over(state, wanted, reason=priority.name.lower())
            job = _Job(key, priority, state, progress, done, origin())
            self._jobs[key] = job
            self._queues[priority].append(job)
        elif (other := origin()) is not None and len(job.progress.shared_with) < MOST_LINKS:
            job.progress.shared_with.append(other)
        job.waiters += 1
        try:
            async with self._ready:
                self._ready.notify()
            return await asyncio.shield(job.done)
        finally:
            job.waiters -= 1

    def end_all(self) -> None:
        """Begin no page of the jobs that there are; they end with what they came to."""
        for job in self._jobs.values():
            job.ending = True

    async def run(self) -> None:
        """Work until cancelled; jobs that are left then end with ``ExchangeUnavailable``."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._runners):
                    group.create_task(self._run_jobs())
        finally:
            self._stopped = True
            for job in list(self._jobs.values()):
                self._fail(job, ExchangeUnavailable("the service is shutting down"))

    async def _run_jobs(self) -> None:
        while True:
            async with self._ready:
                while (taken := self._take()) is None:
                    await self._ready.wait()
            job, priority = taken
            try:
                with within(job.asked_in):
                    more = await self._work(job, priority)
            finally:
                self._busy.discard(job.state)
            if more:
                self._queues[job.priority].append(job)
            # Where all is settled nothing was waited for: the loop has others to serve.
            await asyncio.sleep(0)

    def _take(self) -> tuple[_Job, Priority] | None:
        """The job whose page is next, out of its queue, and how urgently it may ask."""
        fair = (self._taken + 1) % FAIR_TURN == 0
        for priority in reversed(Priority) if fair else Priority:
            queue = self._queues[priority]
            # Of one series what is live goes first all the same: it may leave the other nothing.
            live = set() if priority is Priority.LIVE else self._waiting_live()
            for at, job in enumerate(queue):
                if job.state in self._busy or job.state in live:
                    continue
                del queue[at]
                self._taken += 1
                self._busy.add(job.state)
                # The exchange's limiter knows no turns: there, too, it must not wait for ever.
                return job, min(priority, Priority.REQUEST) if fair else priority
        return None

    def _waiting_live(self) -> set[SeriesState]:
        return {job.state for job in self._queues[Priority.LIVE]}

    async def _work(self, job: _Job, priority: Priority) -> bool:
        """Settle one page of a job; whether it has to be queued again."""
        progress, more = job.progress, False
        if job.waiters == 0:
            # Everybody who wanted it has left.
            del self._jobs[job.key]
            job.done.cancel()
            return False
        try:
            if job.ending:
                await job.state.load(progress.wanted)
            else:
                more = await settle_page(
                    job.state, progress, self._asking(priority), page_periods=self._page_periods
                )
                await self._on_settled(job.state.series)
        except ExchangeError as exc:
            progress.error = exc
        except asyncio.CancelledError:
            self._fail(job, ExchangeUnavailable("the service is shutting down"))
            raise
        except Exception as exc:
            # The outermost loop: the caller gets the error; where all have left, the log.
            if job.waiters == 0:
                log.exception("settling_failed", series=str(job.state.series))
            self._fail(job, exc)
            return False
        if not more:
            del self._jobs[job.key]
            job.done.set_result(report_of(job.state, progress))
        return more

    def _fail(self, job: _Job, error: Exception) -> None:
        if self._jobs.pop(job.key, None) is not None:
            job.done.set_exception(error)
            # A caller that has left must not make the loop complain that nobody asked.
            job.done.exception()

    def _asking(self, priority: Priority) -> Ask:
        direct = asking(self._client, priority)

        async def ask(state: SeriesState, page: TimeRange) -> HistoricalData:
            return await self._ask(state.market, lambda: direct(state, page))

        return ask

    async def _ask(self, market: str, request: Callable[[], Awaitable[_T]]) -> _T:
        """Make a request about a market, if no outage forbids it, and note what it says of one."""
        probe = self._outage.enter(market)
        try:
            answer = await request()
        except (BadExchangeAnswer, ExchangeRefused):
            # It answers: what is wrong may be wrong with this market alone.
            self._outage.answered()
            raise
        except ExchangeError as exc:
            self._outage.failed(exc, market, probe=probe)
            raise
        except BaseException:
            self._outage.released(probe=probe)
            raise
        self._outage.answered()
        return answer
