"""What is known of one series: an index of what is stored, and what has been proven.

All times are market ms; a period is named by its open. Everything is kept by runs of periods and
asked by ranges, so that a quiet market of years costs what its runs do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from domain.clock import IClock
from domain.entry import BOOK_TOLERANCE_MS, Entry
from domain.gap import Gap, GapReason, joined
from domain.order_book import OrderBook
from domain.series import Series
from domain.time_range import RangeMap, RangeSet, TimeRange
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
# A look that no answer gave is tried again after this, or after this part of the period's age.
TRY_AGAIN_MS: Final = 60_000
TRY_AGAIN_PART: Final = 60
# A period that the exchange does not offer any more is looked for this long after its end.
KEEP_LOOKING_MS: Final = 24 * 3_600_000
# What the exchange did not offer is asked for again after this.
ASK_OLDER_AGAIN_MS: Final = 3_600_000
# What was listed of a series that nobody keeps, and so nobody checks, is believed this long.
LISTED_FOR_MS: Final = 3_600_000
# An entry counts as settled live when it is settled this soon after its period's end.
LIVE_WITHIN_MS: Final = 60_000
# Exchanges tell their time in whole seconds.
EXCHANGE_TIME_GRAIN_MS: Final = 1_000
# How many periods are read at once to learn which have a book.
BOOKS_PAGE: Final = 1_000
_FOREVER: Final = 2**62

log = structlog.get_logger(__name__)


class SeriesState(ISeriesView):
    """The one view of a series in this process; settling changes it inside ``exclusive``.

    With ``read_only`` the ledger is read and never written: another process keeps it.
    """

    def __init__(
        self,
        series: Series,
        market: str,
        storage: IStorageManager,
        clock: IClock,
        *,
        read_only: bool = False,
    ) -> None:
        self._series = series
        self._market = market
        self._storage = storage
        self._clock = clock
        self._read_only = read_only
        self._step = series.interval.milliseconds
        # What was listed, and when.
        self._listed: RangeMap[int] = RangeMap()
        self._stored = RangeSet()
        self._stored_meanwhile = RangeSet()
        self._ledger = Ledger()
        self._ledger_loaded = False
        self._ledger_changed = False
        self._ledger_failing = False
        # The periods that are owed a look, and when it is due.
        self._due: RangeMap[int] = RangeMap()
        # The periods that stayed open when they were asked about, and which request that was.
        self._unanswered: RangeMap[int] = RangeMap()
        self._asks = 0
        self._unreachable = RangeSet()
        self._oldest_offered = 0
        self._oldest_learned_at = 0
        self._books: dict[int, OrderBook] = {}
        self._sink: Sink | None = None
        self._load_lock = asyncio.Lock()
        self._books_lock = asyncio.Lock()
        self._save_lock = asyncio.Lock()
        self._lock = asyncio.Lock()

    # -- what is known ----------------------------------------------------------------------

    @property
    def series(self) -> Series:
        return self._series

    @property
    def market(self) -> str:
        return self._market

    async def load(self, wanted: TimeRange) -> None:
        wanted = self._whole_periods(wanted)
        async with self._load_lock:
            if not self._ledger_loaded:
                await self._load_ledger()
            if self._sink is None:
                long_ago = self._clock.now_ms() - LISTED_FOR_MS
                for part, listed_at in self._listed.within(wanted):
                    if listed_at <= long_ago:
                        await self._list(part)
            for part in self._listed.missing(wanted):
                await self._list(part)

    async def refresh(self, wanted: TimeRange) -> None:
        wanted = self._whole_periods(wanted)
        async with self._load_lock:
            for part, _ in self._listed.within(wanted):
                await self._list(part, from_documents=True)

    def stored_ranges(self, within: TimeRange) -> list[TimeRange]:
        return self._stored.within(within)

    async def learn_books(self, within: TimeRange) -> None:
        async with self._books_lock:
            known = RangeSet((*self._ledger.booked, *self._ledger.bookless))
            reach = BOOKS_PAGE * self._step
            for part in known.missing(within):
                at = part.start
                while unknown := self._stored.within(TimeRange(at, part.end)):
                    page = TimeRange(unknown[0].start, min(unknown[0].start + reach, part.end))
                    await self._learn_books_of(page)
                    at = page.end
            await self.save()

    def booked_count(self, within: TimeRange) -> int:
        return sum(run.length for run in self._ledger.booked.within(within)) // self._step

    def gaps(self, within: TimeRange) -> list[Gap]:
        within = self.closed_part(within)
        empty = RangeSet(self._ledger.empty.within(within))
        for run, _ in self._ledger.suspected.within(within):
            empty.add(run)
        edge = self._not_offered_before
        found: list[Gap] = []
        for run in self._stored.missing(within):
            found += [Gap(part, GapReason.NO_TRADES) for part in empty.within(run)]
            for part in empty.missing(run):
                older = TimeRange(part.start, min(part.end, edge))
                newer = TimeRange(max(part.start, edge), part.end)
                found += [Gap(older, GapReason.NOT_OFFERED)] if older else []
                found += self._open_gaps_in(newer)
        return sorted(found, key=lambda gap: gap.range)

    def open_gaps(self, within: TimeRange) -> list[Gap]:
        found: list[Gap] = []
        for listed, _ in self._listed.within(within):
            part = self.closed_part(listed)
            suspected = RangeSet(run for run, _ in self._ledger.suspected.within(part))
            for run in self._stored.missing(part, self._ledger.empty, suspected):
                found += self._open_gaps_in(
                    TimeRange(max(run.start, self._not_offered_before), run.end)
                )
        # What was listed at different times is one gap all the same.
        return list(joined(sorted(found, key=lambda gap: gap.range)))

    def is_settled(self, within: TimeRange) -> bool:
        return not self._work(self.closed_part(within), self._asks)

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
        return min(self._due.values(), default=None)

    def looks_due(self) -> TimeRange | None:
        now = self._clock.now_ms()
        due = [run for run, at in self._due if at <= now]
        if not due:
            return None
        start, end = due[-1].start, due[-1].end
        for run in reversed(due[:-1]):
            # Nobody may want what is open between what two clients had asked for.
            if self._open(TimeRange(run.end, start)):
                break
            start = run.start
        return TimeRange(start, end)

    @property
    def asks(self) -> int:
        """The number of the latest request about this series."""
        return self._asks

    def next_page(self, remaining: TimeRange, *, periods: int, asked_after: int) -> RangeSet:
        """The newest periods of ``remaining`` that the exchange has to be asked about now, within
        ``periods`` of the newest; empty when there are none.

        What stayed open in an answer to a request later than number ``asked_after`` is as fresh
        as whoever asks now can wish.
        """
        remaining = self.closed_part(remaining)
        reach = periods * self._step
        # Looked for in windows that grow: a year in which all is settled costs few of them, and
        # one with much to do only the newest.
        end, width = remaining.end, reach
        while end > remaining.start:
            window = TimeRange(max(remaining.start, end - width), end)
            newest = self._work(window, asked_after).end
            if newest is not None:
                page = TimeRange(max(remaining.start, newest - reach), newest)
                return self._work(page, asked_after)
            end, width = window.start, 2 * width
        return RangeSet()

    # -- what changes it --------------------------------------------------------------------

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._lock:
            yield

    def note_book(self, timestamp: int, book: OrderBook) -> None:
        self._books[timestamp] = book
        horizon = self._last_chance_of_books
        for period in [period for period in self._books if period < horizon]:
            del self._books[period]

    def use_sink(self, sink: Sink | None) -> None:
        self._sink = sink

    def begin_request(self) -> int:
        """Number the request that is about to be sent."""
        self._asks += 1
        return self._asks

    def note_unreachable(self, wanted: TimeRange) -> None:
        """The exchange could not be asked; what is open of ``wanted`` stays open for that."""
        self._unreachable.add(self.closed_part(wanted))

    async def record(
        self, asked: RangeSet, answer: HistoricalData, *, asked_at: int, request: int
    ) -> RangeSet:
        """Store what the exchange said of the periods of ``asked``, then remember what it proves.

        ``asked_at`` is when (market ms) it was asked: what an answer proves is as young as that,
        and as the exchange's own clock was if that is behind. ``request`` is its number.

        Returns:
            The periods whose entry is new or changed.

        Raises:
            StorageError: the entries could not be stored; nothing is concluded then.
        """
        looked_at = asked_at
        if answer.exchange_time:
            looked_at = min(asked_at, answer.exchange_time + EXCHANGE_TIME_GRAIN_MS)
        entries = [
            self._entry(answer, at)
            for at, candle in enumerate(answer.candles)
            if candle.timestamp in asked
        ]
        outcomes = await self._store(entries) if entries else []
        changed = self._note_stored(outcomes, asked_at, looked_at)
        for run in answer.empty:
            for part in asked.within(run):
                self._note_empty(part, asked_at, looked_at)
        if answer.not_offered is not None:
            self._note_not_offered(answer.not_offered.end, asked_at)
        for part in asked:
            self._note_asked(part, asked_at, request)
        return changed

    async def save(self) -> None:
        """Keep the ledger when it changed. A failure is told and costs no more than requests."""
        async with self._save_lock:
            if not self._ledger_changed or self._read_only:
                return
            # What changes while this is written is for the next time.
            self._ledger_changed, kept = False, False
            try:
                await self._storage.write_record(self._ledger_path, self._ledger.to_bytes())
                kept = True
                if self._ledger_failing:
                    log.info("ledger_kept_again", series=str(self._series))
            except StorageError as exc:
                if not self._ledger_failing:
                    log.warning("ledger_not_kept", series=str(self._series), error=exc.message)
            finally:
                self._ledger_failing = not kept
                self._ledger_changed |= not kept

    # -- what is stored ---------------------------------------------------------------------

    @property
    def _ledger_path(self) -> str:
        return StoragePathUtility.get_ledger_path(
            self._series.exchange, self._series.coin, interval=self._series.interval.name
        )

    async def _load_ledger(self) -> None:
        content = await self._storage.read_record(self._ledger_path)
        ledger = Ledger.from_bytes(content) if content is not None else None
        # Without one nothing is verified: everything stored is owed a look.
        self._ledger = ledger if ledger is not None else Ledger()
        for run, proven_at in self._ledger.suspected:
            self._due.set(run, proven_at + SECOND_PROOF_MS)
        self._ledger_loaded = True

    def _open_gaps_in(self, run: TimeRange) -> list[Gap]:
        """The gaps of a run of periods that are offered, and neither stored nor proven empty."""
        if not run:
            return []
        return [
            *(Gap(item, GapReason.UNREACHABLE) for item in self._unreachable.within(run)),
            *(Gap(item, GapReason.PENDING) for item in self._unreachable.missing(run)),
        ]

    def _whole_periods(self, wanted: TimeRange) -> TimeRange:
        """Every period that ``wanted`` meets: what is listed in part would be half unknown."""
        interval = self._series.interval
        return TimeRange(interval.floor(wanted.start), interval.ceil(wanted.end))

    async def _list(self, part: TimeRange, *, from_documents: bool = False) -> None:
        """Learn what storage holds of ``part``; the load lock is held."""
        self._stored_meanwhile = RangeSet()
        now = self._clock.now_ms()
        runs = await self._storage.stored_ranges(
            self._series.exchange,
            self._series.coin,
            part.start,
            part.end,
            interval=self._series.interval.name,
            from_documents=from_documents,
        )
        # A listing may or may not show what was stored while it was made.
        held = RangeSet((*runs, *self._stored_meanwhile.within(part)))
        lost = False
        for gone in held.missing(part):
            for known in self._stored.within(gone):
                self._due.remove(known)
            self._stored.remove(gone)
            for proofs in (self._ledger.verified, self._ledger.booked, self._ledger.bookless):
                lost |= bool(proofs.within(gone))
                self._drop(proofs, gone)
        for run in held:
            for found in self._stored.missing(run):
                self._stored.add(found)
                self._drop(self._ledger.empty, found)
                self._no_longer_suspect(found)
                for owed in self._ledger.verified.missing(found):
                    self._owe(owed)
        # What closes from now on is written by this process alone: it is known without asking,
        # also while storage is away.
        reaches_now = part.end >= self._series.interval.floor(self._clock.now_ms())
        until = _FOREVER if reaches_now and not self._listed.within(part) else part.end
        self._listed.set(TimeRange(part.start, until), now)
        if lost:
            # Whoever is killed once they are stored anew must not find what was known of them.
            await self.save()

    async def _learn_books_of(self, page: TimeRange) -> None:
        entries = await self._storage.get_raw_data_range(
            self._series.exchange,
            self._series.coin,
            page.start,
            page.end,
            interval=self._series.interval.name,
        )
        ledger = self._ledger
        without = RangeSet()
        for entry in entries:
            period = TimeRange(entry.timestamp, entry.end)
            if entry.timestamp not in self._stored:
                continue
            if entry.order_book is not None:
                self._add(ledger.booked, period)
            elif entry.timestamp not in ledger.booked:
                without.add(period)
        for run in without:
            final = TimeRange(run.start, min(run.end, self._last_chance_of_books))
            for part in (final, *ledger.verified.within(run)):
                self._add(ledger.bookless, part)
        read = RangeSet(TimeRange(entry.timestamp, entry.end) for entry in entries)
        if any(read.missing(run) for run in self._stored.within(page)):
            await self.refresh(page)

    async def _store(self, entries: Sequence[Entry]) -> list[Stored]:
        if self._sink is not None:
            return await self._sink(entries)
        return await self._storage.store_batch(entries)

    def _entry(self, answer: HistoricalData, at: int) -> Entry:
        candle = answer.candles[at]
        end = candle.timestamp + self._step
        book = self._books.get(candle.timestamp)
        if book is not None and (
            abs(book.timestamp - end) > BOOK_TOLERANCE_MS
            or candle.timestamp < self._last_chance_of_books
        ):
            book = None
        live = self._clock.now_ms() - end <= LIVE_WITHIN_MS
        return Entry(
            series=self._series,
            market=self._market,
            candle=candle,
            order_book=book,
            source="stream" if live else "rest",
        )

    # -- what is proven ---------------------------------------------------------------------

    @property
    def _not_offered_before(self) -> int:
        """What opens before this was not offered when it was asked for last, a while ago."""
        fresh = self._clock.now_ms() - self._oldest_learned_at < ASK_OLDER_AGAIN_MS
        return self._oldest_offered if fresh else 0

    @property
    def _last_chance_of_books(self) -> int:
        """What opens before this gets no book any more: its last look is over."""
        return self._series.interval.floor(self._clock.now_ms() - LOOKS_MS[-1] - 2 * self._step)

    def _open(self, window: TimeRange) -> RangeSet:
        """The periods of ``window`` that are neither stored nor proven."""
        found = RangeSet(self._stored.missing(window))
        for proven in self._ledger.empty.within(window):
            found.remove(proven)
        for proven, _ in self._ledger.suspected.within(window):
            found.remove(proven)
        found.remove(TimeRange(window.start, self._not_offered_before))
        return found

    def _work(self, window: TimeRange, asked_after: int) -> RangeSet:
        now = self._clock.now_ms()
        work = self._open(window)
        for run, request in self._unanswered.within(window):
            if request > asked_after:
                work.remove(run)
        for run, due in self._due.within(window):
            if due <= now:
                work.add(run)
        return work

    def _note_stored(self, outcomes: Sequence[Stored], asked_at: int, looked_at: int) -> RangeSet:
        """Entries are stored now; the periods whose entry is new or changed."""
        ledger = self._ledger
        stored, changed, booked = RangeSet(), RangeSet(), RangeSet()
        for outcome in outcomes:
            period = TimeRange(outcome.entry.timestamp, outcome.entry.end)
            stored.add(period)
            if outcome.change is not Change.UNCHANGED:
                changed.add(period)
            if outcome.entry.order_book is not None:
                booked.add(period)
        old = self._final_before(looked_at)
        for run in stored:
            self._stored.add(run)
            self._stored_meanwhile.add(run)
            self._drop(ledger.empty, run)
            self._no_longer_suspect(run)
            final = TimeRange(run.start, min(run.end, old))
            self._due.remove(final)
            self._add(ledger.verified, final)
            self._owe_next(TimeRange(max(run.start, old), run.end), asked_at, looked_at)
        for run in booked:
            self._add(ledger.booked, run)
            self._drop(ledger.bookless, run)
        # What is unchanged, or waits in the spool, may have been judged by memory alone, which
        # holds no books.
        if not self._storage.status.spooled:
            for run in changed:
                for bare in booked.missing(TimeRange(run.start, min(run.end, old))):
                    self._drop(ledger.booked, bare)
                    self._add(ledger.bookless, bare)
        return changed

    def _note_empty(self, run: TimeRange, asked_at: int, looked_at: int) -> None:
        """The periods of ``run`` were proven to be without a candle."""
        ledger = self._ledger
        for part in self._stored.missing(run):
            # Ended an hour ago or longer by then: the answer is final, if it is the second.
            late = TimeRange(part.start, min(part.end, self._final_before(looked_at)))
            for again, proven_at in ledger.suspected.within(late):
                if asked_at - proven_at >= SECOND_PROOF_MS:
                    self._no_longer_suspect(again)
                    self._due.remove(again)
                    self._add(ledger.empty, again)
            for rest in RangeSet(ledger.empty.within(part)).missing(part):
                for new in ledger.suspected.missing(rest):
                    ledger.suspected.set(new, asked_at)
                    self._ledger_changed = True
                for suspect, proven_at in ledger.suspected.within(rest):
                    self._owe_next(
                        suspect, asked_at, looked_at, not_before=proven_at + SECOND_PROOF_MS
                    )
        for part in self._stored.within(run):
            # The exchange has dropped a candle that it gave before, or left it out of this answer:
            # what is stored stays, and is looked at again until an answer holds it.
            self._postpone(part, asked_at)

    def _note_asked(self, run: TimeRange, asked_at: int, request: int) -> None:
        """The periods of ``run`` were asked about, and what was said of them has been noted."""
        self._unreachable.remove(run)
        self._unanswered.remove(run)
        for still_open in self._open(run):
            self._unanswered.set(still_open, request)
        # Owed and not answered: the next answer may hold it, but not at once.
        for part, due in self._due.within(run):
            if due <= asked_at:
                self._postpone(part, asked_at)

    def _postpone(self, run: TimeRange, asked_at: int) -> None:
        """Look again a little later, the later the older the periods are."""
        later = max(TRY_AGAIN_MS, (asked_at - run.end) // TRY_AGAIN_PART)
        if run.start < self._not_offered_before:
            later = max(later, ASK_OLDER_AGAIN_MS)
        for part, _ in self._due.within(run):
            self._due.set(part, asked_at + later)

    def _note_not_offered(self, before: int, asked_at: int) -> None:
        """Nothing that opens before ``before`` is offered: after a day, nobody looks for it."""
        interval = self._series.interval
        self._oldest_offered = interval.floor(before)
        self._oldest_learned_at = asked_at
        given_up = TimeRange(
            0, min(self._oldest_offered, interval.floor(asked_at - KEEP_LOOKING_MS))
        )
        for part, _ in self._due.within(given_up):
            for kept in self._stored.within(part):
                self._add(self._ledger.verified, kept)
            # Proven once only, and never to be proven again.
            self._no_longer_suspect(part)
        self._due.remove(given_up)

    # -- what is owed -----------------------------------------------------------------------

    def _owe(self, run: TimeRange) -> None:
        """Nobody knows of a look at the periods of ``run``: each is due from its first on."""
        first = self._step + LOOKS_MS[0]
        over = self._series.interval.floor(self._clock.now_ms() - first) + self._step
        past = TimeRange(run.start, min(run.end, over))
        self._due.set(past, past.start + first)
        for period in range(max(run.start, over), run.end, self._step):
            self._due.set(TimeRange(period, period + self._step), period + first)

    def _owe_next(
        self, run: TimeRange, asked_at: int, looked_at: int, *, not_before: int = 0
    ) -> None:
        """Owe the periods of ``run`` the look after one that was taken at ``looked_at``."""
        soon = max(not_before, asked_at + 1)
        old = self._final_before(looked_at)
        self._due.set(TimeRange(run.start, min(run.end, old)), soon)
        behind = asked_at - looked_at
        for period in range(max(run.start, old), run.end, self._step):
            end = period + self._step
            due = next(end + look for look in LOOKS_MS if looked_at < end + look)
            self._due.set(TimeRange(period, end), max(due + behind, soon))

    def _final_before(self, looked_at: int) -> int:
        """The periods before this had ended so long ago that a look at that time is their last."""
        return self._series.interval.floor(looked_at - LOOKS_MS[-1])

    # -- the ledger -------------------------------------------------------------------------

    def _add(self, proofs: RangeSet, run: TimeRange) -> None:
        if run and proofs.missing(run):
            proofs.add(run)
            self._ledger_changed = True

    def _drop(self, proofs: RangeSet, run: TimeRange) -> None:
        if proofs.within(run):
            proofs.remove(run)
            self._ledger_changed = True

    def _no_longer_suspect(self, run: TimeRange) -> None:
        if self._ledger.suspected.within(run):
            self._ledger.suspected.remove(run)
            self._ledger_changed = True
