"""The reconciler: one view a series, one settling worker an exchange."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Mapping
from typing import Final
from weakref import WeakValueDictionary

import structlog

from domain.clock import IClock
from domain.order_book import OrderBook
from domain.series import Series
from domain.time_range import TimeRange
from errors import DataServiceError, UnknownExchange
from exchange_source.interfaces import IExchangeAPIClient, Priority
from reconciliation.interfaces import IReconciler, SettledListener, SettleReport
from reconciliation.series_state import SeriesState
from reconciliation.settler import Progress, report_of
from reconciliation.worker import SettlingWorker
from storage.interfaces import IStorageManager

RECENT_STATES: Final = 256

log = structlog.get_logger(__name__)


class Reconciler(IReconciler):
    """Settles ranges on any of the enabled exchanges; ``run`` is owned by the lifespan."""

    def __init__(
        self,
        clients: Mapping[str, IExchangeAPIClient],
        storage: IStorageManager,
        clock: IClock,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._listeners: list[SettledListener] = []
        # There is one state a series as long as anybody holds it: a keeper, a job, a request. What
        # was learned for the latest requests is kept a while longer.
        self._states: WeakValueDictionary[Series, SeriesState] = WeakValueDictionary()
        self._recent: deque[SeriesState] = deque(maxlen=RECENT_STATES)
        self._standing_by = False
        seeded = rng if rng is not None else random.Random()  # noqa: S311  jitter is no secret
        self._workers = {
            name: SettlingWorker(client, clock, on_settled=self._settled, rng=seeded)
            for name, client in clients.items()
        }

    def listen(self, listener: SettledListener) -> None:
        """Tell ``listener`` after every settled page."""
        self._listeners.append(listener)

    def stand_by(self) -> None:
        """Begin no page from now on, also of what was asked for before: another process does."""
        self._standing_by = True
        for worker in self._workers.values():
            worker.end_all()
        self._forget()

    def collect(self) -> None:
        """Fetch what is missing; what was known is forgotten, since another process may have
        written."""
        self._standing_by = False
        self._forget()

    def view(self, series: Series, market: str) -> SeriesState:
        if self._standing_by:
            # Another process writes: what is known now is not kept.
            return SeriesState(series, market, self._storage, self._clock, read_only=True)
        state = self._states.get(series)
        if state is None:
            state = SeriesState(series, market, self._storage, self._clock)
            self._states[series] = state
            self._recent.append(state)
        return state

    async def settle(
        self, series: Series, market: str, wanted: TimeRange, *, priority: Priority
    ) -> SettleReport:
        state = self.view(series, market)
        if self._standing_by:
            await state.load(wanted)
            return report_of(state, Progress.over(state, wanted))
        return await self._worker(series.exchange).settle(state, wanted, priority=priority)

    def retry_in(self, exchange: str) -> float:
        return self._worker(exchange).retry_in

    async def until_answering(self, exchange: str) -> None:
        await self._worker(exchange).until_answering()

    async def order_book(self, exchange: str, market: str) -> OrderBook:
        return await self._worker(exchange).order_book(market)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for worker in self._workers.values():
                group.create_task(worker.run())

    def _forget(self) -> None:
        self._states = WeakValueDictionary()
        self._recent.clear()

    async def _settled(self, series: Series) -> None:
        for listener in self._listeners:
            try:
                await listener(series)
            except DataServiceError as exc:
                # Level-triggered: the next settling, or the clock, tells it again.
                log.warning("settled_but_not_told", series=str(series), error=exc.message)

    def _worker(self, exchange: str) -> SettlingWorker:
        try:
            return self._workers[exchange]
        except KeyError:
            known = ", ".join(sorted(self._workers))
            raise UnknownExchange(
                f"exchange {exchange!r} is not enabled; these are: {known}"
            ) from None
