"""Sealing: which closed days are copied from their documents into the table of candles, and when.

The documents stay the truth. A day is sealed an hour after it ended at the earliest, when its
periods have had their last look, and once nothing of it was written for a while, so that a backfill
seals each day once. Whoever writes a document of a sealed day unseals the day first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import Final

import structlog

from domain.clock import IClock
from domain.entry import Entry
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from historical.candle_log import WriteConflict
from historical.interfaces import CandleTableError, CandleTableUnavailable
from historical.sealed_days import DAY_MS, is_sealable
from historical.sealed_store import SealedCandleStore
from storage.entry_decoder import entry_decoder
from storage.interfaces import (
    Decode,
    IRawDataStorage,
    ISealedDays,
    SealedPeriods,
    StorageError,
    StorageUnavailable,
)
from storage.path_utility import day_of, day_start

# How often (market ms) is looked for days to seal, and for days that nobody told of.
EVERY_MS: Final = 600_000
LOOK_EVERYWHERE_MS: Final = 24 * 3_600_000
# A day is sealed this long after its end: its last period's last look is an hour after it.
CLOSED_FOR_MS: Final = 3_900_000
# ... and this long after something of it was written.
QUIET_FOR_MS: Final = 600_000
# Two rounds are this far apart at least (real seconds), however fast the market's clock.
_LEAST_PAUSE_S: Final = 1.0
# So many candles are sealed in one commit, and held in memory, about.
_AT_ONCE: Final = 20_000
# How long (real seconds) who writes a document waits for a commit of its series.
_PATIENCE_S: Final = 30.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Sealing:
    """Days of one series on their way into the table; ``touched`` are not to be sealed any more."""

    touched: set[date]
    committing: asyncio.Lock = field(default_factory=asyncio.Lock)


class CandleSealer(ISealedDays):
    """Seals days of the ``exchanges`` of one root, and unseals them for those who write documents.

    One process of a root seals, the one that collects: between ``take_over`` and ``stand_by``,
    while ``may_write`` says that it still is the one. ``run`` is owned by the lifespan.
    """

    def __init__(
        self,
        store: SealedCandleStore,
        storage: IRawDataStorage,
        exchanges: Sequence[str],
        clock: IClock,
        *,
        may_write: Callable[[], bool],
    ) -> None:
        self._store = store
        self._storage = storage
        self._exchanges = exchanges
        self._clock = clock
        self._may_write = may_write
        self._collecting = asyncio.Event()
        self._look_everywhere_at = 0
        # Days with documents that are not sealed, and when (market ms) they were written to last.
        self._unsealed: dict[Series, dict[date, int]] = {}
        self._being_written: dict[Series, Counter[date]] = {}
        self._sealing: dict[Series, _Sealing] = {}
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why days cannot be sealed, or sealed ones not be read, for now, or None."""
        return self._trouble or self._store.trouble

    # -- the lifespan -----------------------------------------------------------------------

    async def take_over(self) -> None:
        """This process has the root now: nothing that another was about to seal is sealed later.

        Raises:
            CandleTableError: the table cannot be used.
        """
        await self._store.take_over()
        self._unsealed.clear()
        self._look_everywhere_at = 0
        self._collecting.set()

    def stand_by(self) -> None:
        """Another process has the root."""
        self._collecting.clear()

    async def run(self) -> None:
        """Seal what is to be sealed; until cancelled."""
        while True:
            await self._collecting.wait()
            await self._clock.sleep_real(_LEAST_PAUSE_S)
            await self._clock.sleep_until(self._clock.now_ms() + EVERY_MS)
            if self._collecting.is_set() and self._may_write():
                await self.seal_due()

    async def seal_due(self) -> None:
        """One round: seal every day that is to be sealed by now. What fails is told once, and tried
        again in the next."""
        try:
            await self._make_sure_of_table()
            if self._clock.now_ms() >= self._look_everywhere_at:
                await self._look_everywhere()
                self._look_everywhere_at = self._clock.now_ms() + LOOK_EVERYWHERE_MS
            count = 0
            for series in list(self._unsealed):
                count += await self._seal_series(series, self._ready(series))
            if count:
                await self._store.tidy()
        except WriteConflict:
            # Another process may have the root; whether it has shows when the lock is renewed.
            log.info("sealing_given_up")
        except (CandleTableError, StorageError) as exc:
            if self._trouble is None:
                log.warning("sealing_fails", error=exc.message)
            self._trouble = exc.message
        else:
            if self._trouble is not None:
                log.info("sealing_works_again")
            self._trouble = None

    # -- sealing ----------------------------------------------------------------------------

    async def seal_now(
        self,
        chosen: Callable[[Series], bool],
        *,
        progress: Callable[[int, int], None],
    ) -> int:
        """Seal every closed day of the chosen series at once, for who asks for it; how many.

        ``progress`` is told how many days are done, and of how many.

        Raises:
            CandleTableError, StorageError: something cannot be read or written; what was sealed
                before that stays.
        """
        await self._look_everywhere()
        waiting = {
            series: days
            for series in sorted(self._unsealed)
            if chosen(series) and (days := self._ready(series, quiet_for=0))
        }
        total = sum(map(len, waiting.values()))
        done = 0
        for series, days in waiting.items():
            for part in _parts(series, days):
                if not self._may_write():
                    raise CandleTableUnavailable(
                        f"{self._storage.address}: another service collects into it by now"
                    )
                await self._seal(series, part)
                done += len(part)
                progress(done, total)
        if done:
            await self._store.tidy()
        return done

    async def _look_everywhere(self) -> None:
        """Learn of every day that has documents and is not sealed."""
        for exchange in self._exchanges:
            for coin in await self._storage.list_coins(exchange):
                for name, days in (await self._storage.list_days(exchange, coin)).items():
                    series = Series(exchange, coin, Interval.parse(name))
                    if is_sealable(series.interval):
                        await self._compare(series, days)

    async def _compare(self, series: Series, documents: Mapping[date, int]) -> None:
        """Unseal days of which documents came or went behind the service's back, and learn which
        are not sealed; ``documents`` are how many each day has."""
        sealed = await self._store.counts(series)
        if self._store.trouble is not None:
            raise CandleTableUnavailable(self._store.trouble)
        if changed := [day for day, count in sealed.items() if documents.get(day, 0) != count]:
            log.warning("sealed_days_differ", series=str(series), days=len(changed))
            await self._store.unseal(series, changed)
        unsealed = self._unsealed.setdefault(series, {})
        for day in documents:
            if day not in sealed or day in changed:
                unsealed.setdefault(day, 0)

    def _ready(self, series: Series, *, quiet_for: int = QUIET_FOR_MS) -> list[date]:
        """Which days of a series are to be sealed now, ascending."""
        now = self._clock.now_ms()
        return sorted(
            day
            for day, written_at in self._unsealed[series].items()
            if written_at + quiet_for <= now and day_start(day) + DAY_MS + CLOSED_FOR_MS <= now
        )

    async def _seal_series(self, series: Series, days: Sequence[date]) -> int:
        """Seal days of a series; how many. One that cannot be sealed holds up no other."""
        count = 0
        for part in _parts(series, days):
            if not self._may_write():
                break
            try:
                await self._seal(series, part)
            except (StorageUnavailable, CandleTableUnavailable, WriteConflict):
                raise
            except StorageError as exc:
                # Documents of a newer version: they are looked at again with everything else.
                log.warning("day_not_sealed", series=str(series), error=exc.message)
                for day in part:
                    self._unsealed[series].pop(day, None)
            else:
                count += len(part)
        return count

    async def _seal(self, series: Series, days: Sequence[date]) -> None:
        sealing = _Sealing(set(self._being_written.get(series, ())))
        read_since = self._store.others
        self._sealing[series] = sealing
        try:
            entries = {day: await self._documents(series, day) for day in days}
            async with sealing.committing:
                kept = {day: entries[day] for day in days if day not in sealing.touched}
                if kept:
                    await self._store.seal(series, kept, read_since=read_since)
                for day in kept:
                    self._unsealed[series].pop(day, None)
        finally:
            del self._sealing[series]

    async def _documents(self, series: Series, day: date) -> list[Entry]:
        """The entries of a day as they lie in the backend, without their books."""
        return await self._storage.get_range(
            series.exchange,
            series.coin,
            day_start(day),
            day_start(day) + DAY_MS,
            interval=series.interval.name,
            decode=_without_book(entry_decoder(series)),
        )

    # -- for those who write and list documents ---------------------------------------------

    @asynccontextmanager
    async def changing(self, series: Series, timestamps: Iterable[int]) -> AsyncIterator[None]:
        days = {day_of(timestamp) for timestamp in timestamps}
        being_written = self._being_written.setdefault(series, Counter())
        being_written.update(days)
        try:
            await self._unseal(series, days)
            yield
        finally:
            being_written.subtract(days)
            for day in days:
                if not being_written[day]:
                    del being_written[day]
            if not being_written:
                self._being_written.pop(series, None)
            if is_sealable(series.interval):
                now = self._clock.now_ms()
                self._unsealed.setdefault(series, {}).update(dict.fromkeys(days, now))

    async def _unseal(self, series: Series, days: set[date]) -> None:
        sealing = self._sealing.get(series)
        try:
            if sealing is not None:
                sealing.touched |= days
                async with asyncio.timeout(_PATIENCE_S), sealing.committing:
                    pass
            if sealed := self._store.known(series, days):
                try:
                    await self._store.unseal(series, sealed)
                except CandleTableUnavailable:
                    await self._make_sure_of_table()
                    await self._store.unseal(series, sealed)
        except TimeoutError:
            raise StorageUnavailable(
                f"{self._storage.address}: days of {series} are being sealed for more than "
                f"{_PATIENCE_S:g} s"
            ) from None
        except CandleTableError as exc:
            raise StorageUnavailable(
                f"a day of {series} cannot be unsealed: {exc.message}"
            ) from exc

    async def _make_sure_of_table(self) -> None:
        """Make the table anew where it was moved away, but not in the place of a root that is."""
        await self._storage.check_writable()
        if await self._store.prepare():
            log.warning("candle_table_made_anew", storage=self._storage.address)
            # Everything is to be sealed again.
            self._look_everywhere_at = 0

    async def periods(self, series: Series, within: TimeRange) -> SealedPeriods:
        if not is_sealable(series.interval):
            return SealedPeriods()
        known, stored = await self._store.stored(series, within)
        return SealedPeriods(known, stored)


def _parts(series: Series, days: Sequence[date]) -> Iterator[Sequence[date]]:
    """Days of one commit each."""
    count = max(1, _AT_ONCE * series.interval.milliseconds // DAY_MS)
    return (days[at : at + count] for at in range(0, len(days), count))


def _without_book(decode: Decode) -> Decode:
    def bare(timestamp: int, content: bytes) -> Entry | None:
        entry: Entry | None = decode(timestamp, content)
        return entry if entry is None or entry.order_book is None else entry.with_order_book(None)

    return bare
