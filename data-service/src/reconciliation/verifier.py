"""Whether what is stored equals what the exchange says now: reads and compares, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from domain.candle import Candle
from domain.clock import IClock
from domain.entry import Entry
from domain.time_range import RangeSet, TimeRange
from errors import DataServiceError, UnknownExchange
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    Priority,
)
from storage.interfaces import StorageUnavailable
from storage.reader import Broken, StoredDocuments
from target_management.interfaces import Target

# A service is expected to have settled a period so long (market ms) after its end.
SETTLED_AFTER_MS: Final = 60_000
# An exchange that cannot be asked is asked again after these pauses (real seconds), and no more;
# one that asks for a longer pause than this is not waited for.
PAUSES_S: Final = (1.0, 3.0)
LONGEST_PAUSE_S: Final = 30.0
# How many differences of a target are told one by one.
MOST_TOLD: Final = 20
_VALUES: Final = ("open", "high", "low", "close", "volume")
_NOTHING: Final = HistoricalData(candles=())

Stored = Mapping[int, Entry | Broken]


class Kind(StrEnum):
    """How what is stored of a period differs from what should be."""

    MISSING = "missing"
    """The exchange has a candle, storage has none."""
    DIFFERENT = "different"
    """Other values, another market, or a document that cannot be read."""
    EXTRA = "extra"
    """Stored where the exchange proves that there is no candle."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A period (its open in ms) whose document is not what it should be, and how it differs."""

    timestamp: int
    kind: Kind
    detail: str


@dataclass(slots=True)
class Verdict:
    """What verifying one target came to.

    Attributes:
        range: the periods that were to be checked.
        checked: how many of them could be: there is a proof of what they should be, or something
            is stored that cannot be right.
        counts: how many of those differ, by kind.
        told: the newest of the differences, descending, ``MOST_TOLD`` at most.
        stopped: why what was left could not be checked, or None.
    """

    target: Target
    range: TimeRange
    checked: int = 0
    counts: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    told: list[Difference] = field(default_factory=list)
    stopped: DataServiceError | None = None

    @property
    def differences(self) -> int:
        return sum(self.counts.values())

    @property
    def not_checkable(self) -> int:
        """How many periods the exchange offers no more, proves nothing about, or was not asked
        about any more."""
        return self.range.length // self.target.series.interval.milliseconds - self.checked

    def add(self, checked: int, differences: Iterable[Difference]) -> None:
        """Take in what a page, the next older one, came to."""
        self.checked += checked
        for difference in sorted(differences, key=lambda item: item.timestamp, reverse=True):
            self.counts[difference.kind] += 1
            if len(self.told) < MOST_TOLD:
                self.told.append(difference)


class Verifier:
    """Compares targets with their exchanges, one page after the other.

    One request at a time: a service beside it asks the same exchange by a limiter of its own.
    An exchange, or a storage, that was away for one target is not asked again for the next.
    """

    def __init__(
        self,
        documents: StoredDocuments,
        clients: Mapping[str, IExchangeAPIClient],
        clock: IClock,
    ) -> None:
        self._documents = documents
        self._clients = clients
        self._clock = clock
        self._exchanges_away: dict[str, ExchangeUnavailable] = {}
        self._storage_away: StorageUnavailable | None = None

    async def verify(self, target: Target, *, not_before: int = 0) -> Verdict:
        """Check a target from its ``since``, or ``not_before`` (ms) where that is later, to the
        last period that ended ``SETTLED_AFTER_MS`` ago."""
        interval = target.series.interval
        end = interval.floor(self._clock.now_ms() - SETTLED_AFTER_MS)
        start = interval.ceil(max(target.since, not_before))
        verdict = Verdict(target, TimeRange(start, max(start, end)))
        try:
            self._refuse_away(target)
            await self._verify(verdict, self._client(target))
        except StorageUnavailable as exc:
            verdict.stopped = self._storage_away = exc
        except ExchangeUnavailable as exc:
            verdict.stopped = exc
            # It answers: what is wrong may be wrong with this market alone.
            if not isinstance(exc, BadExchangeAnswer):
                self._exchanges_away[target.exchange] = exc
        except DataServiceError as exc:
            verdict.stopped = exc
        return verdict

    async def _verify(self, verdict: Verdict, client: IExchangeAPIClient) -> None:
        wanted, step = verdict.range, verdict.target.series.interval.milliseconds
        end, offered_from = wanted.end, wanted.start
        while end > wanted.start:
            page = TimeRange(max(wanted.start, end - client.history_page * step), end)
            # What is older than the exchange gives is not asked for; a document there that
            # cannot be right is told nevertheless.
            asked = client if page.end > offered_from else None
            periods = range(page.start, page.end, step)
            answer, (checked, differences) = await self._compare(verdict.target, periods, asked)
            if differences:
                # Settled, or corrected, while it was compared, perhaps.
                suspects = sorted(difference.timestamp for difference in differences)
                _, (again, differences) = await self._compare(verdict.target, suspects, asked)
                checked += again - len(suspects)
            verdict.add(checked, differences)
            if answer.not_offered is not None:
                offered_from = answer.not_offered.end
            end = page.start

    async def _compare(
        self, target: Target, periods: Sequence[int], client: IExchangeAPIClient | None
    ) -> tuple[HistoricalData, tuple[int, list[Difference]]]:
        step = target.series.interval.milliseconds
        span = TimeRange(periods[0], periods[-1] + step)
        answer = _NOTHING if client is None else await self._ask(client, target, span)
        stored = await self._documents.read(target.series, periods)
        return answer, compare(target.market, periods, stored, answer)

    async def _ask(
        self, client: IExchangeAPIClient, target: Target, span: TimeRange
    ) -> HistoricalData:
        for pause_s in PAUSES_S:
            try:
                return await self._ask_once(client, target, span)
            except ExchangeUnavailable as exc:
                asked_for = exc.retry_after or 0.0
                if asked_for > LONGEST_PAUSE_S:
                    raise
            await self._clock.sleep_real(max(pause_s, asked_for))
        return await self._ask_once(client, target, span)

    @staticmethod
    async def _ask_once(
        client: IExchangeAPIClient, target: Target, span: TimeRange
    ) -> HistoricalData:
        return await client.fetch_historical_data(
            target.market, target.interval, span.start, span.end, priority=Priority.BACKFILL
        )

    def _client(self, target: Target) -> IExchangeAPIClient:
        client = self._clients.get(target.exchange)
        if client is None:
            raise UnknownExchange(
                f"{target.exchange} is not enabled; add it to EXCHANGES to have this checked"
            )
        return client

    def _refuse_away(self, target: Target) -> None:
        away = self._storage_away or self._exchanges_away.get(target.exchange)
        if away is not None:
            raise away


def compare(
    market: str, periods: Iterable[int], stored: Stored, answer: HistoricalData
) -> tuple[int, list[Difference]]:
    """How many of the periods could be checked, and those that differ.

    ``periods`` are opens in ms, ``market`` is the one that the series is of.
    """
    candles = {candle.timestamp: candle for candle in answer.candles}
    empty = RangeSet(answer.empty)
    checked, differences = 0, []
    for period in periods:
        candle, document = candles.get(period), stored.get(period)
        proven_empty = period in empty
        if document is not None:
            found = _problem(market, document, candle, proven_empty=proven_empty)
        elif candle is not None:
            found = Kind.MISSING, f"the exchange has {_values(candle)}"
        else:
            found = None
        if found is not None:
            differences.append(Difference(period, *found))
        checked += proven_empty or candle is not None or found is not None
    return checked, differences


def _problem(
    market: str, document: Entry | Broken, candle: Candle | None, *, proven_empty: bool
) -> tuple[Kind, str] | None:
    """What is wrong with a document, where something surely is."""
    if isinstance(document, Broken):
        return Kind.DIFFERENT, f"the document is broken: {document.why}"
    if document.market != market:
        return Kind.DIFFERENT, f"stored is the market {document.market}, wanted is {market}"
    ours = document.candle
    if candle is None and proven_empty:
        return Kind.EXTRA, f"stored is {_values(ours)}, the exchange has none"
    if candle in (None, ours):
        return None
    changed = [name for name in _VALUES if getattr(ours, name) != getattr(candle, name)]
    both = (
        f"{name} is {getattr(ours, name)!r} and {getattr(candle, name)!r} on the exchange"
        for name in changed
    )
    return Kind.DIFFERENT, ", ".join(both)


def _values(candle: Candle) -> str:
    return " ".join(f"{name} {getattr(candle, name)!r}" for name in _VALUES)
