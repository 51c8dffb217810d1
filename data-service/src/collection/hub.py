"""The hub: who is told what of a series, and in which order.

Guarantees, per subscription to candles:

- Each closed period after its start is told exactly once and in order: its entry, after it was
  stored, or a gap in its place. An unsettled period holds the order for at most 60 s of market
  time; then its gap is told, and what settles there later comes marked ``late``.
- A correction is told as the same period with a higher revision.
- Forming candles keep only the newest; the rest waits in the bounded queue of each reader.

Readers of the other channels of a series' market are attached here too: they count as its
subscribers, hear what changes behind it, and end with it.

Not guaranteed: that a subscriber sees every forming update.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from collection.interfaces import (
    Channel,
    ClosedCandle,
    FormingCandle,
    GapTold,
    OutboxStatus,
    OutboxTotals,
    StatusTold,
    StreamEvent,
)
from collection.subscription import Reader, Subscription
from domain.candle import Candle
from domain.clock import IClock
from domain.entry import Entry
from domain.gap import Gap, GapReason
from domain.series import Series
from domain.time_range import TimeRange
from errors import CoinNotAvailable
from reconciliation.interfaces import ISeriesView
from storage.interfaces import Change, IStorageManager, Stored

# How long (market ms) an unsettled period may hold back those after it.
ORDER_PATIENCE_MS: Final = 60_000
QUEUE_BOUND: Final = 2_000
# Told gaps older than the newest of these are not announced again when they are filled.
TOLD_GAPS_BOUND: Final = 20_000


@dataclass(slots=True, eq=False)
class _Topic:
    """One series: the next period to tell, what is told already, and to whom."""

    view: ISeriesView
    next_open: int
    opened_at: int
    subscriptions: set[Subscription] = field(default_factory=set)
    # Those of other channels.
    others: set[Reader] = field(default_factory=set)
    fresh: dict[int, Entry] = field(default_factory=dict)
    told_gaps: dict[int, GapReason] = field(default_factory=dict)
    forming: Candle | None = None
    forming_at: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def series(self) -> Series:
        return self.view.series

    @property
    def step(self) -> int:
        return self.series.interval.milliseconds

    @property
    def readers(self) -> list[Reader]:
        return [*self.subscriptions, *self.others]

    def leave(self, reader: Reader) -> None:
        self.others.discard(reader)
        if isinstance(reader, Subscription):
            self.subscriptions.discard(reader)

    def patience_ends(self, period: int) -> int:
        """Until when (market ms) an open period may hold the order; a series that was just opened
        on old periods first gets the time to settle them."""
        return max(period + self.step, self.opened_at) + ORDER_PATIENCE_MS


def _not_told(series: Series) -> CoinNotAvailable:
    return CoinNotAvailable(f"{series} is not collected any more; add it again")


class Hub:
    """Publish and subscribe by series; a broker can stand behind it when one process is not
    enough."""

    def __init__(
        self, clock: IClock, storage: IStorageManager, *, queue_bound: int = QUEUE_BOUND
    ) -> None:
        self._clock = clock
        self._storage = storage
        self._queue_bound = queue_bound
        self._topics: dict[Series, _Topic] = {}
        # What is not as it should be, for those who come while it lasts.
        self._troubles: dict[tuple[str, str | None], StatusTold] = {}
        self._totals = {channel: OutboxTotals() for channel in Channel}

    def open(self, view: ISeriesView, next_open: int) -> None:
        """Begin to tell a series; ``next_open`` is the first period to be told."""
        opened = _Topic(view=view, next_open=next_open, opened_at=self._clock.now_ms())
        self._topics.setdefault(view.series, opened)

    def close(self, series: Series) -> None:
        """Stop telling a series; its subscriptions end with ``CoinNotAvailable``."""
        topic = self._topics.pop(series, None)
        for reader in topic.readers if topic is not None else ():
            reader.end(_not_told(series))

    def subscriber_count(self, series: Series) -> int:
        """How many read the series."""
        topic = self._topics.get(series)
        return len(topic.readers) if topic is not None else 0

    def outboxes(self) -> dict[Channel, OutboxStatus]:
        """Who reads each channel, and how much waits for them."""
        found = {channel: OutboxStatus(totals) for channel, totals in self._totals.items()}
        for topic in self._topics.values():
            for reader in topic.readers:
                outbox = found[reader.channel]
                outbox.readers += 1
                outbox.waiting += reader.depth
                outbox.deepest = max(outbox.deepest, reader.depth)
        return found

    def forming(self, series: Series) -> tuple[Candle, int] | None:
        """The newest forming candle of a series that is told, and when (market ms) it came."""
        topic = self._topics.get(series)
        if topic is None or topic.forming is None:
            return None
        return topic.forming, topic.forming_at

    def subscribe(self, series: Series) -> Subscription:
        """Read a series from now on.

        Raises:
            CoinNotAvailable: the series is not told.
        """
        topic = self._told(series)
        subscription = Subscription(
            topic.view,
            topic.next_open,
            self._queue_bound,
            topic.leave,
            totals=self._totals[Channel.CANDLES],
        )
        topic.subscriptions.add(subscription)
        self._tell_troubles(series, subscription)
        if topic.forming is not None and topic.forming.timestamp >= topic.next_open:
            subscription.offer_newest(FormingCandle(topic.forming))
        return subscription

    def attach(self, series: Series, of: str, *, channel: Channel, bound: int) -> Reader:
        """A reader of another channel of the series' market, which somebody else serves.

        Raises:
            CoinNotAvailable: the series is not told.
        """
        topic = self._told(series)
        reader = Reader(of, bound, topic.leave, channel=channel, totals=self._totals[channel])
        topic.others.add(reader)
        self._tell_troubles(series, reader)
        return reader

    def publish_forming(self, series: Series, candle: Candle) -> None:
        """Tell a candle whose period is not over."""
        topic = self._topics.get(series)
        if topic is None or candle.timestamp < topic.next_open:
            return
        if topic.forming is not None and candle.timestamp < topic.forming.timestamp:
            return
        topic.forming, topic.forming_at = candle, self._clock.now_ms()
        event = FormingCandle(candle)
        for subscription in topic.subscriptions:
            subscription.offer_newest(event)

    def publish_stored(self, stored: Stored) -> None:
        """Take a stored entry: one that is due is told in its turn, a correction or what settles
        where a gap was told at once; older backfill is history and is not told."""
        entry = stored.entry
        topic = self._topics.get(entry.series)
        if topic is None:
            return
        if entry.timestamp >= topic.next_open:
            topic.fresh[entry.timestamp] = entry
        elif topic.told_gaps.pop(entry.timestamp, None) is not None:
            self._tell(topic, ClosedCandle(entry, late=True))
        elif stored.change is Change.REVISED:
            self._tell(topic, ClosedCandle(entry))
        else:
            for subscription in topic.subscriptions:
                if subscription.is_expected(entry.timestamp):
                    subscription.offer(ClosedCandle(entry, late=True))

    async def advance(self, series: Series) -> None:
        """Tell what is settled beyond the mark, and the gap of what has held the order too long."""
        topic = self._topics.get(series)
        if topic is None:
            return
        async with topic.lock:
            await self._advance(topic)

    def next_deadline(self, series: Series) -> int | None:
        """When (market ms) the next period's gap is told, should it not settle before."""
        topic = self._topics.get(series)
        return topic.patience_ends(topic.next_open) if topic is not None else None

    def publish_status(self, status: StatusTold) -> None:
        """Tell the subscribers of an exchange, or all, what changed behind them; who subscribes
        while something is not connected is told that first."""
        key = (status.component, status.exchange)
        self._troubles.pop(key, None)
        if status.state != "connected":
            self._troubles[key] = status
        for topic in self._topics.values():
            if status.exchange in (None, topic.series.exchange):
                for reader in topic.readers:
                    reader.offer(status)

    async def until_read(self) -> None:
        """Return once every reader has passed on what it was told; how long that may take is the
        caller's to say."""
        for topic in list(self._topics.values()):
            for reader in topic.readers:
                await reader.until_read()

    def _told(self, series: Series) -> _Topic:
        topic = self._topics.get(series)
        if topic is None:
            raise _not_told(series)
        return topic

    def _tell_troubles(self, series: Series, reader: Reader) -> None:
        for trouble in self._troubles.values():
            if trouble.exchange in (None, series.exchange):
                reader.offer(trouble)

    async def _advance(self, topic: _Topic) -> None:
        step, now = topic.step, self._clock.now_ms()
        due = TimeRange(topic.next_open, topic.series.interval.floor(now))
        self._tell_proven_late(topic)
        if not due:
            return
        await self._fetch_unread(topic, due)
        gaps = topic.view.gaps(due)
        reasons = {
            period: gap.reason
            for gap in gaps
            for period in range(gap.range.start, gap.range.end, step)
        }
        for period in range(due.start, due.end, step):
            entry = topic.fresh.pop(period, None)
            if entry is not None:
                topic.next_open = period + step
                self._tell(topic, ClosedCandle(entry))
                continue
            reason = reasons.get(period, GapReason.PENDING)
            if reason.is_open and now < topic.patience_ends(period):
                break
            topic.next_open = period + step
            self._note_gap(topic, period, reason)
            self._tell(topic, GapTold(Gap(TimeRange(period, period + step), reason)))

    async def _fetch_unread(self, topic: _Topic, due: TimeRange) -> None:
        """Read what is stored beyond the mark and was not published by this process."""
        unread = [
            run
            for run in topic.view.stored_ranges(due)
            if any(period not in topic.fresh for period in range(run.start, run.end, topic.step))
        ]
        for run in unread:
            entries = await self._storage.get_raw_data_range(
                topic.series.exchange,
                topic.series.coin,
                run.start,
                run.end,
                interval=topic.series.interval.name,
            )
            for entry in entries:
                topic.fresh.setdefault(entry.timestamp, entry)

    def _tell_proven_late(self, topic: _Topic) -> None:
        """Tell that a period whose gap was told as open is now proven to have no trades."""
        for period, told in list(topic.told_gaps.items()):
            if not told.is_open:
                continue
            for gap in topic.view.gaps(TimeRange(period, period + topic.step)):
                if gap.reason is GapReason.NO_TRADES:
                    topic.told_gaps[period] = gap.reason
                    self._tell(topic, GapTold(gap, late=True))
        for subscription in topic.subscriptions:
            for gap in subscription.newly_proven():
                subscription.offer(GapTold(gap, late=True))

    def _note_gap(self, topic: _Topic, period: int, reason: GapReason) -> None:
        topic.told_gaps[period] = reason
        if len(topic.told_gaps) > TOLD_GAPS_BOUND:
            del topic.told_gaps[next(iter(topic.told_gaps))]

    @staticmethod
    def _tell(topic: _Topic, event: StreamEvent) -> None:
        for subscription in topic.subscriptions:
            subscription.offer(event)
