"""What is known of one series: an index of what is stored, and what has been proven.

All times are market ms; a period is named by its open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from domain.clock import IClock
from domain.entry import BOOK_TOLERANCE_MS, Entry
from domain.gap import Gap, GapReason
from domain.order_book import OrderBook
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import HistoricalData
from reconciliation.interfaces import ISeriesView, Sink
from reconciliation.ledger import Ledger
from storage.interfaces import Change, IStorageManager, StorageError, Stored
from storage.path_utility import StoragePathUtility

# Exchanges publish late and correct themselves: a period is looked at again this long after its
# end. A look taken after the last of these is final.
LOOKS_MS: Final = (60_000, 300_000, 3_600_000)
# A period is empty for good when two answers this far apart say so.
SECOND_PROOF_MS: Final = 60_000
# Without a ledger, what lies this close to the newest entry is owed its last look.
UNLEDGERED_LOOKS_MS: Final = 2 * 3_600_000
# A stored candle that the exchange no longer tells is looked for this long after its end.
KEEP_LOOKING_MS: Final = 24 * 3_600_000
# What the exchange did not offer is asked for again after this.
ASK_OLDER_AGAIN_MS: Final = 3_600_000
# An entry counts as settled live when it is settled this soon after its period's end.
LIVE_WITHIN_MS: Final = 60_000
_FOREVER: Final = 2**62

log = structlog.get_logger(__name__)


class SeriesState(ISeriesView):
    """The one view of a series in this process; settling changes it under ``lock``."""

    def __init__(
        self, series: Series, market: str, storage: IStorageManager, clock: IClock
    ) -> None:
        self._series = series
        self._market = market
        self._storage = storage
        self._clock = clock
        self._step = series.interval.milliseconds
        self._listed = RangeSet()
        self._stored = RangeSet()
        self._ledger = Ledger()
        self._ledger_loaded = False
        self._ledger_changed = False
        self._ledger_failing = False
        self._looks: dict[int, int] = {}
        self._postponed: dict[int, int] = {}
        self._oldest_offered = 0
        self._oldest_learned_at = 0
        self._unreachable = False
        self._books: dict[int, OrderBook] = {}
        self._sink: Sink | None = None
        self._load_lock = asyncio.Lock()
        self.lock = asyncio.Lock()

    # -- what is known ----------------------------------------------------------------------

    @property
    def series(self) -> Series:
        return self._series

    @property
    def market(self) -> str:
        return self._market

    async def load(self, wanted: TimeRange) -> None:
        async with self._load_lock:
            if not self._ledger_loaded:
                self._ledger = await self._load_ledger()
                self._ledger_loaded = True
            for part in self._listed.missing(wanted):
                for run in await self._storage.stored_ranges(
                    self._series.exchange,
                    self._series.coin,
                    part.start,
                    part.end,
                    interval=self._series.interval.name,
                ):
                    self._stored.add(run)
                # What closes from now on is written by this process alone: it is known without
                # asking, also while storage is away.
                reaches_now = part.end >= self._series.interval.floor(self._clock.now_ms())
                self._listed.add(TimeRange(part.start, _FOREVER) if reaches_now else part)

    async def refresh(self, wanted: TimeRange) -> None:
        # No page is being settled meanwhile, so nothing that is written now is overlooked.
        async with self.lock, self._load_lock:
            for part in self._listed.within(wanted):
                runs = await self._storage.stored_ranges(
                    self._series.exchange,
                    self._series.coin,
                    part.start,
                    part.end,
                    interval=self._series.interval.name,
                )
                self._stored.remove(part)
                for run in runs:
                    self._stored.add(run)

    def stored_ranges(self, within: TimeRange) -> list[TimeRange]:
        return self._stored.within(within)

    def booked_count(self, within: TimeRange) -> int:
        return sum(run.length for run in self._ledger.booked.within(within)) // self._step

    def gaps(self, within: TimeRange) -> list[Gap]:
        # By runs and not by periods: what is missing may be years.
        within = self.closed_part(within)
        empty = RangeSet(self._ledger.empty.within(within))
        for period in self._ledger.suspected:
            if period in within:
                empty.add(TimeRange(period, period + self._step))
        edge = self._not_offered_before
        still_open = GapReason.UNREACHABLE if self._unreachable else GapReason.PENDING
        found: list[Gap] = []
        for run in self._stored.missing(within):
            found += [Gap(part, GapReason.NO_TRADES) for part in empty.within(run)]
            for part in empty.missing(run):
                older = TimeRange(part.start, min(part.end, edge))
                newer = TimeRange(max(part.start, edge), part.end)
                found += [Gap(older, GapReason.NOT_OFFERED)] if older else []
                found += [Gap(newer, still_open)] if newer else []
        return sorted(found, key=lambda gap: gap.range)

    def now_ms(self) -> int:
        """Market time."""
        return self._clock.now_ms()

    def closed_part(self, wanted: TimeRange) -> TimeRange:
        """The periods of ``wanted`` whose end has passed by the market's clock."""
        interval = self._series.interval
        return TimeRange(
            interval.ceil(wanted.start),
            min(interval.ceil(wanted.end), interval.floor(self._clock.now_ms())),
        )

    def next_look_at(self) -> int | None:
        return min((self._look_due_at(period) for period in self._owed()), default=None)

    def looks_due(self) -> TimeRange | None:
        now = self._clock.now_ms()
        due = [period for period in self._owed() if self._look_due_at(period) <= now]
        return TimeRange(min(due), max(due) + self._step) if due else None

    def work(self, wanted: TimeRange) -> RangeSet:
        """The periods of ``wanted`` that the exchange has to be asked about now."""
        wanted = self.closed_part(wanted)
        now = self._clock.now_ms()
        ledger = self._ledger
        work = RangeSet(self._stored.missing(wanted))
        for proven in ledger.empty.within(wanted):
            work.remove(proven)
        for period in ledger.suspected:
            work.remove(TimeRange(period, period + self._step))
        work.remove(TimeRange(0, self._not_offered_before))
        for period in self._owed():
            if period in wanted and self._look_due_at(period) <= now:
                work.add(TimeRange(period, period + self._step))
        return work

    # -- what changes it --------------------------------------------------------------------

    def note_book(self, timestamp: int, book: OrderBook) -> None:
        self._books[timestamp] = book
        # The last look at a period is the last chance to keep its book.
        horizon = self._clock.now_ms() - LOOKS_MS[-1] - 2 * self._step
        for period in [period for period in self._books if period < horizon]:
            del self._books[period]

    def use_sink(self, sink: Sink | None) -> None:
        self._sink = sink

    def note_unreachable(self) -> None:
        """The exchange could not be asked; what is open stays open for that reason."""
        self._unreachable = True

    async def record(self, asked: RangeSet, answer: HistoricalData, *, asked_at: int) -> RangeSet:
        """Store what the exchange said of the periods of ``asked``, then remember what it proves.

        ``asked_at`` is when (market ms) it was asked: what an answer proves is as young as that.

        Returns:
            The periods whose entry is new or changed.

        Raises:
            StorageError: the entries could not be stored; nothing is concluded then.
        """
        entries = [self._entry(answer, at) for at in range(len(answer.candles))]
        entries = [entry for entry in entries if entry.timestamp in asked]
        outcomes = await self._store(entries) if entries else []
        changed = RangeSet()
        for outcome in outcomes:
            self._note_stored(outcome, asked_at)
            if outcome.change is not Change.UNCHANGED:
                period = outcome.entry.timestamp
                changed.add(TimeRange(period, period + self._step))
        for run in answer.empty:
            for part in asked.within(run):
                for period in self._periods(part):
                    self._note_empty(period, asked_at)
        if answer.not_offered is not None:
            self._oldest_offered = self._series.interval.floor(answer.not_offered.end)
            self._oldest_learned_at = asked_at
            self._give_up_on(asked, self._oldest_offered)
        for period in list(self._owed()):
            # Asked and not answered: the next answer may hold it, but not at once.
            if period in asked and self._look_due_at(period) <= asked_at:
                self._postpone(period, asked_at)
        self._unreachable = False
        return changed

    async def save(self) -> None:
        """Keep the ledger when it changed. A failure is told and costs no more than requests."""
        if not self._ledger_changed:
            return
        try:
            await self._storage.write_record(self._ledger_path, self._ledger.to_bytes())
        except StorageError as exc:
            if not self._ledger_failing:
                log.warning("ledger_not_kept", series=str(self._series), error=exc.message)
            self._ledger_failing = True
        else:
            self._ledger_changed = self._ledger_failing = False

    # -- inside -----------------------------------------------------------------------------

    @property
    def _not_offered_before(self) -> int:
        """What opens before this was not offered when it was asked for last, a while ago."""
        fresh = self._clock.now_ms() - self._oldest_learned_at < ASK_OLDER_AGAIN_MS
        return self._oldest_offered if fresh else 0

    @property
    def _ledger_path(self) -> str:
        return StoragePathUtility.get_ledger_path(
            self._series.exchange, self._series.coin, interval=self._series.interval.name
        )

    async def _load_ledger(self) -> Ledger:
        content = await self._storage.read_record(self._ledger_path)
        ledger = Ledger.from_bytes(content) if content is not None else None
        if ledger is not None:
            return ledger
        newest = await self._storage.get_latest_entry(
            self._series.exchange, self._series.coin, interval=self._series.interval.name
        )
        ledger = Ledger()
        if newest is not None:
            oldest_owed = self._series.interval.floor(newest.end - UNLEDGERED_LOOKS_MS)
            ledger.verified.add(TimeRange(0, oldest_owed))
        return ledger

    async def _store(self, entries: Sequence[Entry]) -> list[Stored]:
        if self._sink is not None:
            return await self._sink(entries)
        return await self._storage.store_batch(entries)

    def _entry(self, answer: HistoricalData, at: int) -> Entry:
        candle = answer.candles[at]
        end = candle.timestamp + self._step
        book = self._books.get(candle.timestamp)
        if book is not None and abs(book.timestamp - end) > BOOK_TOLERANCE_MS:
            book = None
        live = self._clock.now_ms() - end <= LIVE_WITHIN_MS
        return Entry(
            series=self._series,
            market=self._market,
            candle=candle,
            order_book=book,
            source="stream" if live else "rest",
        )

    def _note_stored(self, outcome: Stored, asked_at: int) -> None:
        entry = outcome.entry
        period = TimeRange(entry.timestamp, entry.end)
        ledger = self._ledger
        self._stored.add(period)
        self._ledger_changed |= ledger.suspected.pop(entry.timestamp, None) is not None
        if entry.order_book is not None and entry.timestamp not in ledger.booked:
            ledger.booked.add(period)
            self._ledger_changed = True
        self._postponed.pop(entry.timestamp, None)
        if self._count_looks(entry.timestamp, asked_at) == len(LOOKS_MS):
            ledger.verified.add(period)
            self._ledger_changed = True

    def _note_empty(self, period: int, asked_at: int) -> None:
        ledger = self._ledger
        if period in self._stored:
            # The exchange has dropped a candle that it gave before, or left it out of this answer:
            # what is stored stays, and is looked at again until an answer holds it.
            self._postpone(period, asked_at)
            return
        looks = self._count_looks(period, asked_at)
        proven_at = ledger.suspected.get(period)
        if proven_at is None:
            ledger.suspected[period] = asked_at
        elif asked_at - proven_at >= SECOND_PROOF_MS and looks == len(LOOKS_MS):
            del ledger.suspected[period]
            ledger.empty.add(TimeRange(period, period + self._step))
        self._ledger_changed = True

    def _postpone(self, period: int, asked_at: int) -> None:
        """Look again a little later; after a day without a word of it, what is stored is final."""
        end = period + self._step
        if period in self._stored and asked_at - end > KEEP_LOOKING_MS:
            self._ledger.verified.add(TimeRange(period, end))
            self._postponed.pop(period, None)
            self._ledger_changed = True
        else:
            self._postponed[period] = asked_at + SECOND_PROOF_MS

    def _give_up_on(self, asked: RangeSet, before: int) -> None:
        """Take what was proven of periods that the exchange gives no more as final."""
        ledger = self._ledger
        for period in [period for period in self._owed() if period < before and period in asked]:
            run = TimeRange(period, period + self._step)
            if ledger.suspected.pop(period, None) is not None:
                ledger.empty.add(run)
            else:
                ledger.verified.add(run)
            self._ledger_changed = True

    def _count_looks(self, period: int, asked_at: int) -> int:
        age = asked_at - (period + self._step)
        looks = sum(age >= threshold for threshold in LOOKS_MS)
        if looks == len(LOOKS_MS):
            self._looks.pop(period, None)
            self._postponed.pop(period, None)
        else:
            self._looks[period] = looks
        return looks

    def _owed(self) -> Iterator[int]:
        """The periods whose last look has not been taken."""
        ledger = self._ledger
        for run in self._stored:
            for part in ledger.verified.missing(run):
                yield from self._periods(part)
        yield from ledger.suspected

    def _look_due_at(self, period: int) -> int:
        end = period + self._step
        proven_at = self._ledger.suspected.get(period)
        due = end + LOOKS_MS[self._looks.get(period, 0)]
        if proven_at is not None:
            due = max(due, proven_at + SECOND_PROOF_MS)
        return max(due, self._postponed.get(period, 0))

    def _periods(self, run: TimeRange) -> range:
        return range(run.start, run.end, self._step)
