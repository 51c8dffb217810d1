"""Whether a period is settled, decided in one place.

The stream says when to look, the exchange's REST says what is true, storage says what is missing.
A period is settled when its entry is stored and verified, or it is proven to have no trades, or
the exchange does not offer it any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from domain.entry import Entry
from domain.gap import Gap
from domain.order_book import OrderBook
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from exchange_source.interfaces import ExchangeError, Priority
from storage.interfaces import Stored

Sink = Callable[[Sequence[Entry]], Awaitable[list[Stored]]]
"""Takes settled entries of one series, ascending, and returns once they are stored."""

SettledListener = Callable[[Series], Awaitable[None]]
"""Told after every settled page of a series, with the page's entries stored."""


@dataclass(frozen=True, slots=True)
class SettleReport:
    """What settling a range came to.

    Attributes:
        range: the closed periods that were asked for.
        gaps: every run of periods of the range without an entry, ascending, with its reason.
        fetched: the periods whose entries were stored meanwhile.
        error: why the exchange could not be asked for the rest, or None.
    """

    range: TimeRange
    gaps: tuple[Gap, ...]
    fetched: RangeSet
    error: ExchangeError | None = None

    @property
    def open(self) -> tuple[Gap, ...]:
        """The gaps that may still close: pending or unreachable."""
        return tuple(gap for gap in self.gaps if gap.reason.is_open)


class ISeriesView(ABC):
    """What is known of one series, without reading documents."""

    @property
    @abstractmethod
    def series(self) -> Series: ...

    @property
    @abstractmethod
    def market(self) -> str: ...

    @abstractmethod
    async def load(self, wanted: TimeRange) -> None:
        """Know what storage holds of ``wanted``. What was listed of a series without a sink, which
        nobody checks hourly, is listed again after an hour.

        Raises:
            StorageError: storage cannot be listed; then nothing may be concluded.
        """

    @abstractmethod
    async def refresh(self, wanted: TimeRange) -> None:
        """List again what is known of ``wanted``: documents may have been lost or found broken.

        Raises:
            StorageError: storage cannot be listed; what was known stays.
        """

    @abstractmethod
    def stored_ranges(self, within: TimeRange) -> list[TimeRange]:
        """Runs of stored periods, ascending."""

    @abstractmethod
    def booked_count(self, within: TimeRange) -> int:
        """How many stored periods are known to have an order book; see ``learn_books``."""

    @abstractmethod
    async def learn_books(self, within: TimeRange) -> None:
        """Know of every stored period of ``within`` whether it has an order book.

        Documents are read only of periods of which it is not known, a bounded page at a time;
        what is final of that is remembered in the ledger. Settling goes on meanwhile.

        Raises:
            StorageError: documents cannot be read; what was learned before that stays.
        """

    @abstractmethod
    def gaps(self, within: TimeRange) -> list[Gap]:
        """Runs of closed periods without an entry, ascending, with their reasons. Only what was
        loaded is known: load ``within`` first."""

    @abstractmethod
    def open_gaps(self, within: TimeRange) -> list[Gap]:
        """Those of ``gaps`` that may still close; periods of which nobody has looked what storage
        holds are left out."""

    @abstractmethod
    def is_settled(self, within: TimeRange) -> bool:
        """Whether settling the closed periods of ``within`` would ask the exchange for nothing
        now. Only what was loaded is known."""

    @abstractmethod
    def next_look_at(self) -> int | None:
        """When (market ms) the next second look at a period is due; None when none is owed."""

    @abstractmethod
    def looks_due(self) -> TimeRange | None:
        """A range of periods whose look is due, the newest; None when none is.

        It holds every such period that can be reached from the newest without crossing one that
        is open, so that settling it fetches nothing else; what is older comes next.
        """

    @abstractmethod
    def note_book(self, timestamp: int, book: OrderBook) -> None:
        """Remember the book at the close of the period that opens at ``timestamp``."""

    @abstractmethod
    def use_sink(self, sink: Sink | None) -> None:
        """Send settled entries to ``sink``; None sends them to storage alone."""

    @abstractmethod
    def exclusive(self) -> AbstractAsyncContextManager[None]:
        """Hold the series apart from settling, which holds it for one page at a time.

        Inside, no page of the series is under way and none begins; entering waits for the one
        under way. Those who enter take turns, in the order in which they came. Whoever is inside
        must not wait for ``settle`` of the series, which waits for them. In a process that stands
        by nothing is settled, and each view is held by itself alone.
        """


class IReconciler(ABC):
    """Settles ranges of series, whoever asks."""

    @abstractmethod
    def view(self, series: Series, market: str) -> ISeriesView:
        """The one view of the series in this process; a fresh one each time where it stands by,
        since another process writes."""

    @abstractmethod
    async def settle(
        self, series: Series, market: str, wanted: TimeRange, *, priority: Priority
    ) -> SettleReport:
        """Fetch just what is missing of the closed periods of ``wanted``, newest first, verify,
        store, and say what stays open and why.

        Equal requests share one. The work belongs to the reconciler: a caller that is cancelled
        does not end it for others, and when all of them are, it ends at the next page. What was
        asked about after the call by another job is not asked again for this one. An exchange that
        cannot be asked is no error here: its periods stay open with the reason ``unreachable``. In
        a process that stands by no page is begun: what is missing is ``pending``, since another
        one collects; a call that waits at that moment is answered with that, too.

        Raises:
            StorageError: storage cannot be listed or written.
        """

    @abstractmethod
    def retry_in(self, exchange: str) -> float:
        """Real seconds until the exchange may be asked again after a failure; 0 when it may now."""

    @abstractmethod
    async def until_answering(self, exchange: str) -> None:
        """Return as soon as no outage of the exchange is known: at once, or with the first answer
        after one."""

    @abstractmethod
    async def order_book(self, exchange: str, market: str) -> OrderBook:
        """The top of a market's book now, by REST.

        Raises:
            ExchangeError: it cannot be had; during an outage without asking, but for one probe
                at a time.
        """
