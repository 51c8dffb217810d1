"""The table of sealed candles, for the event loop: work in threads, within a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from typing import Final, TypeVar

import structlog

from domain.clock import IClock
from domain.entry import Entry
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_columns import SealedCandles
from historical.candle_table import CandleTable
from historical.columns import NOTHING
from historical.interfaces import CandleTableError, CandleTableUnavailable
from historical.sealed_days import DAY_MS
from observability.tracing import span

_READERS: Final = 2
_EVER: Final = TimeRange(0, 2**62)
_NOTHING_SEALED: Final = SealedCandles((), NOTHING)

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class SealedCandleStore:
    """What is sealed, read and written from coroutines.

    A table that cannot be read costs speed, not truth: nothing counts as sealed then, the documents
    have it all. What writes raises ``CandleTableError``, or the kind of it that fits.
    """

    def __init__(self, table: CandleTable, clock: IClock, *, timeout_s: float = 30.0) -> None:
        self._table = table
        self._clock = clock
        self._timeout_s = timeout_s
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="candles-read")
        # One at a time, and never behind reads.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="candles-write")
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why sealed days cannot be read for now, or None."""
        return self._trouble

    async def close(self) -> None:
        """Take no more work. Idempotent."""
        for threads in (self._readers, self._writer):
            threads.shutdown(wait=False, cancel_futures=True)

    # -- reading ----------------------------------------------------------------------------

    async def read(self, series: Series, wanted: TimeRange) -> SealedCandles:
        """The candles of the sealed days of a range."""
        past = self._past(wanted)
        with span(
            "storage read sealed",
            exchange=series.exchange,
            coin=series.coin,
            interval=series.interval.name,
        ):
            return await self._answer(lambda: self._table.read(series, past), past, _NOTHING_SEALED)

    async def stored(
        self, series: Series, within: TimeRange
    ) -> tuple[tuple[TimeRange, ...], tuple[TimeRange, ...]]:
        """The parts of a range that lie in sealed days, and the runs of periods in them that have
        a candle."""
        past = self._past(within)
        return await self._answer(lambda: self._table.stored(series, past), past, ((), ()))

    async def counts(self, series: Series) -> dict[date, int]:
        """How many candles each sealed day has."""
        nothing: dict[date, int] = {}
        return await self._answer(lambda: self._table.counts(series), _EVER, nothing)

    def _past(self, wanted: TimeRange) -> TimeRange:
        """The part of a range that may be sealed: no day is before it is over."""
        today = self._clock.now_ms() // DAY_MS * DAY_MS
        return wanted.intersect(TimeRange(0, today))

    async def _answer(self, work: Callable[[], _T], past: TimeRange, nothing: _T) -> _T:
        """What the table says of ``past``, or ``nothing`` where it cannot be read."""
        if not past:
            return nothing
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.wrap_future(self._submitted(self._readers, work))
        except TimeoutError:
            self._note_unreadable(f"the table of candles gave no answer in {self._timeout_s:g} s")
            return nothing
        except CandleTableError as exc:
            self._note_unreadable(exc.message)
            return nothing
        if self._trouble is not None:
            self._trouble = None
            log.info("sealed_candles_readable_again")
        return found

    def _note_unreadable(self, why: str) -> None:
        if self._trouble is None:
            log.warning("sealed_candles_unreadable", error=why)
        self._trouble = why

    # -- writing ----------------------------------------------------------------------------

    async def take_over(self) -> None:
        """Make the table where it is missing, and begin to write; see ``CandleTable.take_over``."""

        def begin() -> None:
            self._table.prepare()
            self._table.take_over()

        await self._limited(begin)

    async def prepare(self) -> bool:
        """See ``CandleTable.prepare``."""
        return await self._limited(self._table.prepare)

    def known(self, series: Series, days: Iterable[date]) -> set[date]:
        """See ``CandleTable.known``."""
        return self._table.known(series, days)

    @property
    def others(self) -> int:
        """See ``CandleTable.others``."""
        return self._table.others

    async def seal(
        self, series: Series, days: Mapping[date, Sequence[Entry]], *, read_since: int
    ) -> None:
        """See ``CandleTable.seal``."""
        await self._whole(lambda: self._table.seal(series, days, read_since=read_since))

    async def unseal(self, series: Series, days: Iterable[date]) -> None:
        """See ``CandleTable.unseal``."""
        await self._limited(lambda: self._table.unseal(series, days))

    async def tidy(self) -> None:
        """See ``CandleTable.tidy``."""
        await self._limited(self._table.tidy)

    async def _limited(self, work: Callable[[], _T]) -> _T:
        """Do ``work`` that writes, and that may still be done after somebody gave it up: what comes
        next waits behind it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(self._submitted(self._writer, work))
        except TimeoutError:
            raise CandleTableUnavailable(
                f"the table of candles gave no answer in {self._timeout_s:g} s"
            ) from None

    async def _whole(self, work: Callable[[], _T]) -> _T:
        """Do ``work`` to its end: days that were read may still be committed, so nobody may write a
        document of theirs before it is known. Those who wait for that have a limit of their own."""
        job = self._submitted(self._writer, work)
        answer = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.wait({answer}, timeout=self._timeout_s)
            if answer.done() and not answer.cancelled():
                answer.exception()  # nobody is left to be told
            raise

    def _submitted(self, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> Future[_T]:
        try:
            return threads.submit(work)
        except RuntimeError as exc:
            raise CandleTableUnavailable("the table of candles is closed") from exc
