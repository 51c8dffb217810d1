"""What is collected: adding, removing, listing, and one iterator a subscriber."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import structlog

from collection.channels import MarketChannels
from collection.collection_list import CoinCollectionList
from collection.feed import FeedState, FeedSupervisor
from collection.hub import Hub
from collection.interfaces import (
    AddCoinResult,
    Availability,
    Channel,
    ClosedCandle,
    FeedStatus,
    GapCount,
    GapTold,
    IDataCollectionManager,
    MarketAvailability,
    OpenGaps,
    OutboxStatus,
    StatusTold,
    StreamEvent,
    SubscriptionStarted,
    TargetState,
    TargetStatus,
)
from collection.keeper import SeriesKeeper
from collection.processor import RealTimeProcessor
from collection.subscription import Subscription
from domain.clock import IClock
from domain.gap import Gap, GapReason, joined
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import CoinNotAvailable, DataServiceError, InvalidRequest
from exchange_source.interfaces import (
    ExchangeError,
    ExchangeUnavailable,
    IDataSourceConnector,
    Priority,
)
from historical.interfaces import ISeriesDirectory, ResolvedSeries
from historical.resampling import can_resample
from reconciliation.interfaces import IReconciler, ISeriesView
from storage.interfaces import IStorageManager, NotTheCollector, StorageUnavailable
from storage.path_utility import StoragePathUtility
from target_management.interfaces import SERVICE, Target

DAY_MS: Final = 86_400_000
REPLAY_PERIODS: Final = 500
OPEN_TIMEOUT_S: Final = 10.0
APART_TIMEOUT_S: Final = 15.0
RESTART_PAUSE_S: Final = 5.0
STATUSES_AT_ONCE: Final = 8

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Kept:
    keeper: SeriesKeeper
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class _Selected:
    """The exchange that serves a coin, its market, and who could not be asked before it."""

    exchange: str
    market: str
    unreachable: tuple[str, ...]


class DataCollectionManagerImpl(IDataCollectionManager, ISeriesDirectory):
    """Owns one keeper a target. ``run`` watches the feeds until cancelled.

    Between ``resume`` and ``stand_by`` this process collects; while it stands by, another one does:
    the table is read anew for each question then, and what would change it is refused.
    """

    def __init__(
        self,
        *,
        connector: IDataSourceConnector,
        collection: CoinCollectionList,
        storage: IStorageManager,
        reconciler: IReconciler,
        processor: RealTimeProcessor,
        hub: Hub,
        clock: IClock,
        preferences: Mapping[str, Sequence[str]],
        backfill_days: float,
        rng: random.Random,
    ) -> None:
        self._connector = connector
        self._collection = collection
        self._storage = storage
        self._reconciler = reconciler
        self._processor = processor
        self._hub = hub
        self._clock = clock
        self._preferences = preferences
        self._backfill_ms = round(backfill_days * DAY_MS)
        self._rng = rng
        self._standing_by = False
        self._finishing = False
        self._kept: dict[Series, _Kept] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._feeds = {
            name: FeedSupervisor(
                connector.get_client(name),
                processor.process_realtime_entry,
                clock,
                on_state=self._on_feed_state,
                rng=rng,
            )
            for name in connector.exchange_names
        }
        self._channels = MarketChannels(self._feeds, hub, clock)

    # -- the lifespan -----------------------------------------------------------------------

    async def resume(self) -> None:
        """Start to keep every enabled target of an exchange that is enabled."""
        if self._finishing:
            return
        targets = await self._collection.load()
        self._standing_by = False
        for target in targets:
            if target.exchange in self._feeds:
                self._keep(target)
            else:
                log.warning("target_of_disabled_exchange", target=target.target_id)

    async def stand_by(self) -> None:
        """Stop to keep anything: another process collects."""
        self._standing_by = True
        await self._stop(list(self._kept))

    async def finish(self) -> None:
        """Take in nothing more, begin to collect nothing more, and settle what has closed by now.

        Returns when that is stored and told. How long that may take is the caller's to say: given
        up at any moment, nothing is lost but the order books of what is still open.
        """
        self._finishing = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._channels.close())
            for kept in self._kept.values():
                group.create_task(kept.keeper.finish())

    async def run(self) -> None:
        """Watch the feeds until cancelled; then stop every keeper and channel."""
        try:
            async with asyncio.TaskGroup() as group:
                for feed in self._feeds.values():
                    group.create_task(feed.watch())
        finally:
            await self._stop(list(self._kept))
            await self._channels.close()

    # -- how it goes ------------------------------------------------------------------------

    def feeds(self) -> list[FeedStatus]:
        """How the feed of each enabled exchange does."""
        return [feed.status for feed in self._feeds.values()]

    def outboxes(self) -> Mapping[Channel, OutboxStatus]:
        """Who reads each channel, and how much waits for them."""
        return self._hub.outboxes()

    def open_gaps(self) -> OpenGaps:
        """What is missing of everything that is collected here; no gap, too, is told as such."""
        found: dict[tuple[str, str, GapReason], GapCount] = {}
        for series, kept in self._kept.items():
            counts = {
                reason: found.setdefault(
                    (series.exchange, series.interval.name, reason), GapCount()
                )
                for reason in GapReason
                if reason.is_open
            }
            for gap in kept.keeper.open_gaps():
                counts[gap.reason].gaps += 1
                counts[gap.reason].periods += gap.count(series.interval)
        return found

    # -- what is collected ------------------------------------------------------------------

    async def add_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        since: int | None = None,
        by: str = SERVICE,
    ) -> AddCoinResult:
        coin = self._coin(coin)
        wanted = Interval.parse(interval)
        exchange = self._exchange(exchange)
        self._refuse_who_comes_in_vain()
        async with self._lock(coin):
            for target in self._preferred(self._collection.find(coin, interval=interval)):
                if exchange in (None, target.exchange):
                    kept = self._kept.get(target.series)
                    if kept is not None:
                        if kept.keeper.removing:
                            await self._collection.set_enabled(target, enabled=True, by=by)
                            kept.keeper.removed_by = None
                        return AddCoinResult("already_collecting", kept.keeper.status())
            now = self._clock.now_ms()
            if since is not None and since > now:
                raise InvalidRequest(f"since {since} lies in the future; the time is {now} now")
            selected = await self._select(coin, exchange)
            self._refuse_who_comes_in_vain()
            self._check_offered(selected.exchange, interval)
            client = self._connector.get_client(selected.exchange)
            target = Target(
                coin=coin,
                exchange=selected.exchange,
                exchange_id=client.get_exchange_id(),
                market=selected.market,
                interval=interval,
                enabled=True,
                since=wanted.floor(now - self._backfill_ms if since is None else since),
                created_at=now,
                last_updated=now,
            )
            async with self._apart(self._reconciler.view(target.series, target.market)):
                target = await self._collection.add(target, by=by)
                keeper = self._keep(target)
                keeper.open_from_now()
            log.info(
                "target_added", target=target.target_id, market=target.market, since=target.since
            )
            return AddCoinResult("added", keeper.status(), selected.unreachable)

    async def remove_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str | None = None,
        by: str = SERVICE,
    ) -> TargetStatus:
        coin = self._coin(coin)
        exchange = self._exchange(exchange)
        if interval is not None:
            Interval.parse(interval)
        self._refuse_who_comes_in_vain()
        async with self._lock(coin):
            found = self._collection.find(coin, exchange=exchange, interval=interval)
            if len(found) != 1:
                have = ", ".join(target.target_id for target in found or self._collection.all())
                problem = "several targets fit" if found else "no target fits"
                raise InvalidRequest(
                    f"{problem} {coin}; name exchange and interval of one of: {have or 'none'}"
                )
            kept = self._kept.get(found[0].series)
            if kept is None:
                await self._collection.remove(found[0], by=by)
                return self._status(found[0])
            kept.keeper.removed_by = by
            status = kept.keeper.status()
            if self._hub.subscriber_count(kept.keeper.series) == 0:
                try:
                    await self._drop(kept.keeper)
                except DataServiceError:
                    # Nobody would come to finish it: it is collected as before.
                    self._kept[kept.keeper.series].keeper.removed_by = None
                    raise
            else:
                # What was answered holds, also when this process does not live to the end of it.
                await self._collection.set_enabled(found[0], enabled=False, by=by)
            return status

    async def check_availability(self, coin: str, *, exchange: str | None = None) -> Availability:
        coin = self._coin(coin)
        exchange = self._exchange(exchange)
        await self._catch_up()
        names = (exchange,) if exchange is not None else self._order(coin)
        answers = await asyncio.gather(*(self._market_on(name, coin) for name in names))
        unreachable: dict[str, ExchangeError] = {}
        markets: list[MarketAvailability] = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, ExchangeError):
                unreachable[name] = answer
            elif answer is not None:
                collecting = bool(self._collection.find(coin, exchange=name))
                markets.append(MarketAvailability(name, answer, collecting))
        if len(unreachable) == len(names):
            raise _none_could_be_asked(unreachable)
        return Availability(coin, tuple(markets), tuple(unreachable))

    async def list_targets(self) -> list[TargetStatus]:
        await self._catch_up()
        if self._standing_by:
            return await self._statuses_from_storage()
        return [self._status(target) for target in self._collection.all()]

    # -- what subscribers are told ----------------------------------------------------------

    async def stream_realtime_data(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        channel: Channel = Channel.CANDLES,
        from_ms: int | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        self._refuse_who_comes_in_vain()
        if from_ms is not None and channel is not Channel.CANDLES:
            raise InvalidRequest(f"from takes a time for candles only; {channel} begin with now")
        keeper = self._keeper(self._coin(coin), self._exchange(exchange), interval)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await keeper.opened.wait()
        except TimeoutError:
            raise StorageUnavailable(
                f"{keeper.series} is still starting: storage does not say what it holds",
                retry_after=OPEN_TIMEOUT_S,
            ) from None
        events = (
            self._candle_events(keeper, from_ms)
            if channel is Channel.CANDLES
            else self._channel_events(keeper, channel)
        )
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            await self._drop_if_left(keeper)

    async def _channel_events(
        self, keeper: SeriesKeeper, channel: Channel
    ) -> AsyncGenerator[StreamEvent, None]:
        reader = self._channels.subscribe(keeper.series, keeper.target.market, channel)
        try:
            yield SubscriptionStarted(keeper.series, keeper.target.market, None, channel)
            async for event in reader.events():
                yield event
        finally:
            await self._channels.leave(reader)

    async def _candle_events(
        self, keeper: SeriesKeeper, from_ms: int | None
    ) -> AsyncGenerator[StreamEvent, None]:
        subscription = self._hub.subscribe(keeper.series)
        if from_ms is not None:
            self._begin_at(keeper, subscription, from_ms)
        try:
            yield SubscriptionStarted(keeper.series, keeper.target.market, subscription.last_closed)
            if from_ms is not None:
                async for event in self._replay(keeper, subscription, from_ms):
                    yield event
            async for event in subscription.events():
                yield event
        finally:
            subscription.close()

    @staticmethod
    def _begin_at(keeper: SeriesKeeper, subscription: Subscription, from_ms: int) -> None:
        """Let a reader begin where it wants to, should the series begin before: after a restart it
        begins anew where something was open."""
        first_told = subscription.last_closed + keeper.series.interval.milliseconds
        wanted = keeper.series.interval.ceil(from_ms)
        if wanted > first_told:
            subscription.resume_at(wanted, _reasons(keeper, TimeRange(first_told, wanted)))

    async def _replay(
        self, keeper: SeriesKeeper, subscription: Subscription, from_ms: int
    ) -> AsyncIterator[StreamEvent]:
        """Closed candles from ``from_ms`` up to where the subscription began, then what was
        queued meanwhile without what the replay told already."""
        series, step = keeper.series, keeper.series.interval.milliseconds
        end = subscription.last_closed + step
        told: dict[int, int] = {}
        without_trades: set[int] = set()
        at = series.interval.ceil(from_ms)
        await keeper.view.load(TimeRange(at, end))
        while at < end:
            known = keeper.view.gaps(TimeRange(at, end))
            if known and known[0].range.start == at and known[0].reason is GapReason.NOT_OFFERED:
                # Years perhaps: one gap and not one a page.
                yield GapTold(known[0])
                at = known[0].range.end
                continue
            window = TimeRange(at, min(end, at + REPLAY_PERIODS * step))
            await self._reconciler.settle(
                series, keeper.target.market, window, priority=Priority.REQUEST
            )
            reasons = _reasons(keeper, window)
            # Before reading: what settles from now on is either read or told as late.
            subscription.expect(reasons)
            entries = await self._storage.get_raw_data_range(
                series.exchange,
                series.coin,
                window.start,
                window.end,
                interval=series.interval.name,
            )
            subscription.no_longer_expect(entry.timestamp for entry in entries)
            found = {entry.timestamp for entry in entries}
            events: list[tuple[int, StreamEvent]] = [
                (entry.timestamp, ClosedCandle(entry)) for entry in entries
            ]
            # A document that is listed and cannot be read is neither: it is told as pending.
            left = [
                Gap(TimeRange(period, period + step), reasons.get(period, GapReason.PENDING))
                for period in range(window.start, window.end, step)
                if period not in found
            ]
            events += [(gap.range.start, GapTold(gap)) for gap in joined(left)]
            without_trades.update(
                gap.range.start for gap in left if gap.reason is GapReason.NO_TRADES
            )
            told.update((entry.timestamp, entry.revision) for entry in entries)
            for _, event in sorted(events, key=lambda item: item[0]):
                yield event
            at = window.end
        for event in subscription.waiting():
            if (
                isinstance(event, ClosedCandle)
                and told.get(event.entry.timestamp, 0) >= event.entry.revision
            ):
                continue
            if isinstance(event, GapTold) and event.gap.range.start in without_trades:
                continue
            yield event

    # -- which series a request means -------------------------------------------------------

    async def resolve(self, coin: str, *, exchange: str | None, interval: str) -> ResolvedSeries:
        coin = self._coin(coin)
        wanted = Interval.parse(interval)
        exchange = self._exchange(exchange)
        await self._catch_up()
        collected = self._preferred(
            self._collection.find(coin, exchange=exchange, interval=interval)
        )
        if collected:
            target = collected[0]
            return self._resolved(target.series, target.market, target.since)
        for name in (exchange,) if exchange is not None else self._order(coin):
            newest = await self._storage.get_latest_entry(name, coin, interval=interval)
            if newest is not None:
                return self._resolved(newest.series, newest.market)
        try:
            selected = await self._select(coin, exchange)
        except ExchangeUnavailable:
            shorter = self._preferred(self._shorter(coin, exchange, wanted))
            if not shorter:
                raise
            selected = _Selected(shorter[0].exchange, shorter[0].market, ())
        resolved = self._resolved(Series(selected.exchange, coin, wanted), selected.market)
        if not resolved.offered and not resolved.sources:
            self._check_offered(selected.exchange, interval)
        return resolved

    def _resolved(self, series: Series, market: str, since: int | None = None) -> ResolvedSeries:
        """A series, and which shorter ones it may be resampled from."""
        if series.exchange not in self._connector.exchange_names:
            return ResolvedSeries(series, market, since)
        collected = sorted(
            {
                target.series.interval
                for target in self._shorter(series.coin, series.exchange, series.interval)
                if target.market == market
            },
            reverse=True,
        )
        names = self._connector.get_client(series.exchange).intervals
        if series.interval.name in names:
            return ResolvedSeries(series, market, since, tuple(collected))
        fitting = [
            item for item in map(Interval.parse, names) if can_resample(item, series.interval)
        ]
        sources = [*collected, *sorted(fitting, reverse=True)][:1]
        return ResolvedSeries(series, market, since, tuple(sources), offered=False)

    def _shorter(self, coin: str, exchange: str | None, interval: Interval) -> list[Target]:
        """What is collected of a coin that an interval may be resampled from."""
        return [
            target
            for target in self._collection.find(coin, exchange=exchange)
            if can_resample(target.series.interval, interval)
        ]

    # -- inside -----------------------------------------------------------------------------

    def _coin(self, coin: str) -> str:
        """The coin as it is kept; refuses what can stand in no path."""
        name = coin.strip().upper()
        StoragePathUtility.encode_name(name)
        return name

    def _exchange(self, exchange: str | None) -> str | None:
        if exchange is None:
            return None
        return self._connector.get_client(exchange.strip().lower()).get_exchange_name()

    def _check_offered(self, exchange: str, interval: str) -> None:
        offered = self._connector.get_client(exchange).intervals
        if interval not in offered:
            raise InvalidRequest(
                f"{exchange} does not offer the interval {interval}; it offers {', '.join(offered)}"
            )

    def _order(self, coin: str) -> tuple[str, ...]:
        """The exchanges to ask for a coin: those that are preferred for it, then the others."""
        enabled = self._connector.exchange_names
        preferred = [name for name in self._preferences.get(coin, ()) if name in enabled]
        return tuple(dict.fromkeys([*preferred, *enabled]))

    def _preferred(self, targets: Iterable[Target]) -> list[Target]:
        def rank(target: Target) -> int:
            order = self._order(target.coin)
            return order.index(target.exchange) if target.exchange in order else len(order)

        return sorted(targets, key=rank)

    async def _select(self, coin: str, exchange: str | None) -> _Selected:
        """The exchange that serves a coin: the first in order that lists it, of those that can be
        asked."""
        asked: list[str] = []
        unreachable: dict[str, ExchangeError] = {}
        for name in (exchange,) if exchange is not None else self._order(coin):
            answer = await self._market_on(name, coin)
            if isinstance(answer, ExchangeError):
                unreachable[name] = answer
            elif answer is not None:
                return _Selected(name, answer, tuple(unreachable))
            else:
                asked.append(name)
        if unreachable and not asked:
            raise _none_could_be_asked(unreachable)
        message = f"no active spot market of {coin} on {', '.join(asked) or 'any exchange'}"
        if unreachable:
            message += f"; {', '.join(unreachable)} could not be asked"
        raise CoinNotAvailable(message)

    async def _market_on(self, name: str, coin: str) -> str | ExchangeError | None:
        """The market that an exchange lists for a coin, None, or why it could not be asked."""
        try:
            return await self._connector.check_coin_availability(name, coin)
        except ExchangeError as exc:
            return exc

    def _refuse_who_comes_in_vain(self) -> None:
        if self._finishing:
            raise NotTheCollector(
                "this service is stopping and begins nothing more: ask again in a few seconds"
            )
        if self._standing_by:
            raise NotTheCollector(
                "another service collects into this root, and this one stands by: ask that one, "
                "or again when it is gone"
            )

    async def _catch_up(self) -> None:
        """Know the targets as the one who collects has them now."""
        if self._standing_by:
            await self._collection.load()

    async def _statuses_from_storage(self) -> list[TargetStatus]:
        """How targets do as far as what is stored tells: another process keeps them."""
        asking = asyncio.Semaphore(STATUSES_AT_ONCE)

        async def status(target: Target) -> TargetStatus:
            async with asking:
                newest = await self._storage.get_latest_entry(
                    target.exchange, target.coin, interval=target.interval
                )
            if newest is None:
                return TargetStatus(target, TargetState.DEGRADED, None, None)
            lag_ms = max(0, self._clock.now_ms() - newest.end)
            return TargetStatus(target, TargetState.DEGRADED, newest.timestamp, lag_ms)

        tasks = [asyncio.create_task(status(target)) for target in self._collection.all()]
        try:
            # Not a task group: callers know the error itself, and no group of it.
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _status(self, target: Target) -> TargetStatus:
        kept = self._kept.get(target.series)
        if kept is None:  # its exchange is not enabled
            return TargetStatus(target, TargetState.DEGRADED, None, None)
        return kept.keeper.status()

    def _keeper(self, coin: str, exchange: str | None, interval: str) -> SeriesKeeper:
        Interval.parse(interval)
        found = self._preferred(self._collection.find(coin, exchange=exchange, interval=interval))
        for target in found:
            kept = self._kept.get(target.series)
            if kept is not None:
                return kept.keeper
        raise CoinNotAvailable(f"{coin} is not collected in {interval}; add it first")

    def _keep(self, target: Target) -> SeriesKeeper:
        keeper = SeriesKeeper(
            target,
            client=self._connector.get_client(target.exchange),
            reconciler=self._reconciler,
            processor=self._processor,
            hub=self._hub,
            feed=self._feeds[target.exchange],
            clock=self._clock,
            rng=self._rng,
        )
        task = asyncio.create_task(
            self._guard(keeper),
            name=f"keeper {target.target_id}",
            # It outlives the request that added it, and its logs do not speak of that one.
            context=Context(),
        )
        self._kept[target.series] = _Kept(keeper, task)
        return keeper

    async def _guard(self, keeper: SeriesKeeper) -> None:
        """Keep a target whatever happens to it; one that breaks never disturbs the others."""
        while True:
            try:
                await keeper.run()
            except Exception:
                # The outermost loop of a target: what went wrong is told, the target goes on.
                log.exception("keeper_failed", target=keeper.target.target_id)
                await self._clock.sleep_real(RESTART_PAUSE_S)

    async def _drop_if_left(self, keeper: SeriesKeeper) -> None:
        """Finish a removal that waited for its last subscriber."""
        async with self._lock(keeper.series.coin):
            if keeper.removing and self._hub.subscriber_count(keeper.series) == 0:
                try:
                    await self._drop(keeper)
                except DataServiceError as exc:
                    # Disabled it is already: the next start, or the next one who leaves, drops it.
                    log.warning("target_not_removed", series=str(keeper.series), error=exc.message)

    async def _drop(self, keeper: SeriesKeeper) -> None:
        if keeper.series not in self._kept:
            return
        async with self._apart(keeper.view):
            # First of all nobody can subscribe any more: whoever did would wait for ever.
            await self._stop([keeper.series])
            try:
                await self._collection.remove(keeper.target, by=keeper.removed_by or SERVICE)
            except DataServiceError:
                self._keep(keeper.target).removed_by = keeper.removed_by
                raise
        log.info("target_removed", target=keeper.target.target_id)

    @asynccontextmanager
    async def _apart(self, view: ISeriesView) -> AsyncIterator[None]:
        """Hold a series apart from settling, which holds it for one page at a time."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(APART_TIMEOUT_S):
                    await stack.enter_async_context(view.exclusive())
            except TimeoutError:
                raise ExchangeUnavailable(
                    f"{view.series} is being settled and its exchange is slow; ask again later",
                    retry_after=APART_TIMEOUT_S,
                ) from None
            yield

    async def _stop(self, serieses: Sequence[Series]) -> None:
        kept = [self._kept.pop(series) for series in serieses]
        for item in kept:
            self._hub.close(item.keeper.series)
            item.task.cancel()
        if kept:
            await asyncio.wait([item.task for item in kept])

    def _lock(self, coin: str) -> asyncio.Lock:
        lock = self._locks.get(coin)
        if lock is None:
            lock = asyncio.Lock()
            self._locks[coin] = lock
        return lock

    def _on_feed_state(self, exchange: str, state: FeedState) -> None:
        self._hub.publish_status(StatusTold("feed", state, self._clock.now_ms(), exchange))
        if state == "connected":
            for kept in self._kept.values():
                if kept.keeper.series.exchange == exchange:
                    kept.keeper.note_reconnect()


def _reasons(keeper: SeriesKeeper, window: TimeRange) -> dict[int, GapReason]:
    """The periods of a window that have no entry, and why."""
    step = keeper.series.interval.milliseconds
    return {
        period: gap.reason
        for gap in keeper.view.gaps(window)
        for period in range(gap.range.start, gap.range.end, step)
    }


def _none_could_be_asked(errors: Mapping[str, ExchangeError]) -> ExchangeUnavailable:
    """One error for all the exchanges that gave no answer."""
    delays = [error.retry_after for error in errors.values() if error.retry_after is not None]
    return ExchangeUnavailable(
        "; ".join(error.message for error in errors.values()),
        retry_after=min(delays, default=None),
    )
