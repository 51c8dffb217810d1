"""What Prometheus is told: what the routes count, and what is read of the parts when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from collection.interfaces import FEED_PHASES, Channel, FeedStatus, OpenGaps, OutboxStatus
from domain.clock import IClock
from exchange_source.interfaces import IExchangeAPIClient, Priority
from observability.durations import Durations
from storage.interfaces import StorageStatus, StorageTotals

_BUCKETS_S: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LAG_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
# How often the event loop is asked how late it is (real time).
LAG_EVERY_S: Final = 0.25


class ApiMetrics:
    """What runs, requests and calls, what the WebSocket connections hold, how busy the loop is."""

    def __init__(
        self, registry: CollectorRegistry, *, version: str = "", revision: str = ""
    ) -> None:
        self.registry = registry
        Gauge(
            "cb_trade_build_info",
            "What runs here: always 1",
            ("version", "revision"),
            registry=registry,
        ).labels(version, revision).set(1)
        self.http_seconds = Histogram(
            "cb_trade_http_request_seconds",
            "Real time from a request to the end of its answer",
            ("route", "method", "status"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.mcp_seconds = Histogram(
            "cb_trade_mcp_call_seconds",
            "Real time from an agent's call of a tool to its answer",
            ("tool", "outcome"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.loop_lag = Histogram(
            "cb_trade_event_loop_lag_seconds",
            "How much too late the event loop wakes who asked to be woken",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        self.connections = Gauge(
            "cb_trade_websocket_connections", "Open WebSocket connections", registry=registry
        )
        self.subscriptions = Gauge(
            "cb_trade_websocket_subscriptions", "Running subscriptions", registry=registry
        )
        self.messages = Counter(
            "cb_trade_websocket_messages_total", "Messages sent", ("type",), registry=registry
        )
        self.slow_consumers = Counter(
            "cb_trade_websocket_slow_consumers_total",
            "Connections closed because the client read too slowly",
            registry=registry,
        )


class IStoring(Protocol):
    """How storing goes, and what it came to."""

    @property
    def status(self) -> StorageStatus: ...

    @property
    def totals(self) -> StorageTotals: ...


class StorageCollector(Collector):
    """How storing goes, read when it is asked for."""

    def __init__(self, storage: IStoring, collecting: Callable[[], bool]) -> None:
        self._storage = storage
        self._collecting = collecting

    def collect(self) -> Iterable[Metric]:
        status = self._storage.status
        for name, help_text, value in (
            ("cb_trade_collecting", "1 where this process collects into the root",
             self._collecting()),
            ("cb_trade_storage_available", "0 while the storage backend cannot be written to",
             status.away is None),
            ("cb_trade_storage_stuck_series",
             "Series whose entries the storage refuses though it answers", len(status.stuck)),
            ("cb_trade_spool_entries", "Entries that wait locally for the storage",
             status.spooled),
            ("cb_trade_spool_bytes", "What the documents of those entries take",
             status.spooled_bytes),
            ("cb_trade_spool_full", "1 where a further entry would be refused",
             status.spool_full),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, help_text, value=float(value))
        totals = self._storage.totals
        stored = CounterMetricFamily(
            "cb_trade_entries_stored_total",
            "Entries taken, by what they did to what was stored",
            labels=("exchange", "interval", "change"),
        )
        for (exchange, interval, change), count in totals.entries.items():
            stored.add_metric((exchange, interval, change.value), count)
        yield stored
        yield _by_label(
            CounterMetricFamily,
            "cb_trade_entries_refused_total", "Entries that could not be stored", "exchange",
            totals.refused,
        )  # fmt: skip
        yield _by_label(
            CounterMetricFamily,
            "cb_trade_stored_bytes_total", "What the documents take that were written to the "
            "storage backend", "exchange", totals.written_bytes,
        )  # fmt: skip
        seconds = HistogramMetricFamily(
            "cb_trade_store_seconds", "Real time until a batch of entries was stored, for good"
        )
        _add_durations(seconds, (), totals.store_s)
        yield seconds


class ICollecting(Protocol):
    """How collecting goes."""

    def feeds(self) -> Sequence[FeedStatus]: ...

    def open_gaps(self) -> OpenGaps: ...

    def outboxes(self) -> Mapping[Channel, OutboxStatus]: ...


class CollectionCollector(Collector):
    """Feeds, gaps and subscribers, read when they are asked for."""

    def __init__(self, collection: ICollecting) -> None:
        self._collection = collection

    def collect(self) -> Iterable[Metric]:
        yield from self._feeds()
        yield from self._gaps()
        yield from self._outboxes()

    def _feeds(self) -> Iterable[Metric]:
        feeds = self._collection.feeds()
        state = GaugeMetricFamily(
            "cb_trade_feed_state",
            "1 for the state that the feed is in",
            labels=("exchange", "state"),
        )
        lag = GaugeMetricFamily(
            "cb_trade_feed_lag_seconds",
            "Real time since anything was heard of an exchange that is listened to",
            labels=("exchange",),
        )
        for feed in feeds:
            for phase in FEED_PHASES:
                state.add_metric((feed.exchange, phase), float(feed.state == phase))
            if feed.lag_s is not None:
                lag.add_metric((feed.exchange,), feed.lag_s)
        yield state
        yield lag
        yield _by_label(
            GaugeMetricFamily,
            "cb_trade_feed_streams", "Running streams of an exchange", "exchange",
            {feed.exchange: feed.streams for feed in feeds},
        )  # fmt: skip
        for name, help_text, counts in (
            ("cb_trade_feed_losses_total", "How often a feed was lost",
             {feed.exchange: feed.losses for feed in feeds}),
            ("cb_trade_feed_reconnects_total", "How often a lost feed was heard again",
             {feed.exchange: feed.reconnects for feed in feeds}),
            ("cb_trade_feed_stream_failures_total",
             "How often a single stream ended with an error, those of a lost feed too",
             {feed.exchange: feed.stream_failures for feed in feeds}),
        ):  # fmt: skip
            yield _by_label(CounterMetricFamily, name, help_text, "exchange", counts)

    def _gaps(self) -> Iterable[Metric]:
        labels = ("exchange", "interval", "reason")
        gaps = GaugeMetricFamily(
            "cb_trade_gaps_open", "Runs of closed periods whose entry is still to come",
            labels=labels,
        )  # fmt: skip
        periods = GaugeMetricFamily(
            "cb_trade_gap_periods_open", "Closed periods whose entry is still to come",
            labels=labels,
        )  # fmt: skip
        for (exchange, interval, reason), count in self._collection.open_gaps().items():
            gaps.add_metric((exchange, interval, reason.value), count.gaps)
            periods.add_metric((exchange, interval, reason.value), count.periods)
        yield gaps
        yield periods

    def _outboxes(self) -> Iterable[Metric]:
        outboxes = self._collection.outboxes()
        for name, help_text, values in (
            ("cb_trade_subscribers", "Readers of a channel",
             {channel.value: outbox.readers for channel, outbox in outboxes.items()}),
            ("cb_trade_outbox_depth",
             "Trades, and messages of anything else, that wait for the readers of a channel",
             {channel.value: outbox.waiting for channel, outbox in outboxes.items()}),
            ("cb_trade_outbox_deepest", "What waits for the reader that is furthest behind",
             {channel.value: outbox.deepest for channel, outbox in outboxes.items()}),
        ):  # fmt: skip
            yield _by_label(GaugeMetricFamily, name, help_text, "channel", values)
        unsent = CounterMetricFamily(
            "cb_trade_outbox_unsent_total",
            "Events that readers were not told as they came, by what was done with them",
            labels=("channel", "policy"),
        )
        for channel, outbox in outboxes.items():
            for policy, count in (
                ("replaced", outbox.totals.replaced),
                ("merged", outbox.totals.merged),
                ("dropped", outbox.totals.dropped),
            ):
                unsent.add_metric((channel, policy), count)
        yield unsent


class ExchangeCollector(Collector):
    """What is known of the exchanges, read when it is asked for."""

    def __init__(self, clients: Sequence[IExchangeAPIClient]) -> None:
        self._clients = clients

    def collect(self) -> Iterable[Metric]:
        skew = GaugeMetricFamily(
            "cb_trade_exchange_clock_skew_seconds",
            "How far an exchange's clock is ahead of this service's, to about a second",
            labels=("exchange",),
        )
        for client in self._clients:
            if client.clock_skew_ms is not None:
                skew.add_metric((client.get_exchange_name(),), client.clock_skew_ms / 1000)
        yield skew
        yield from self._requests()

    def _requests(self) -> Iterable[Metric]:
        totals = {client.get_exchange_name(): client.request_totals for client in self._clients}
        for name, help_text, counts in (
            ("cb_trade_exchange_requests_total", "REST requests sent",
             {exchange: item.sent for exchange, item in totals.items()}),
            ("cb_trade_exchange_request_failures_total",
             "REST requests that were not answered, or not usefully",
             {exchange: item.failed for exchange, item in totals.items()}),
            ("cb_trade_rate_limit_turned_away_total",
             "Requests that got no turn of the exchange's rate limit",
             {exchange: item.turned_away for exchange, item in totals.items()}),
        ):  # fmt: skip
            family = CounterMetricFamily(name, help_text, labels=("exchange", "priority"))
            for exchange, by_priority in counts.items():
                for priority in Priority:
                    family.add_metric((exchange, priority.name.lower()), by_priority[priority])
            yield family
        waits = HistogramMetricFamily(
            "cb_trade_rate_limit_wait_seconds",
            "Real time until a request, or a subscription, got its turn",
            labels=("exchange", "priority"),
        )
        for exchange, item in totals.items():
            for priority, waited in item.waited_s.items():
                _add_durations(waits, (exchange, priority.name.lower()), waited)
        yield waits
        yield _by_label(
            GaugeMetricFamily,
            "cb_trade_rate_limit_waiting", "Requests that wait for their turn", "exchange",
            {exchange: item.waiting for exchange, item in totals.items()},
        )  # fmt: skip
        yield _by_label(
            CounterMetricFamily,
            "cb_trade_exchange_pauses_total", "How often an exchange asked to be left alone",
            "exchange", {exchange: item.pauses for exchange, item in totals.items()},
        )  # fmt: skip


async def watch_loop(clock: IClock, lag: Histogram) -> None:
    """Observe how late the event loop is until cancelled."""
    while True:
        due = clock.monotonic() + LAG_EVERY_S
        await clock.sleep_real(LAG_EVERY_S)
        lag.observe(max(0.0, clock.monotonic() - due))


def _by_label(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    help_text: str,
    label: str,
    numbers: Mapping[str, float],
) -> Metric:
    """A counter or a gauge with one label."""
    metric = family(name, help_text, labels=(label,))
    for value, number in numbers.items():
        metric.add_metric((value,), number)
    return metric


def _add_durations(
    family: HistogramMetricFamily, labels: Sequence[str], durations: Durations
) -> None:
    cumulative = list(accumulate(durations.counts))
    bounds = [*(str(bound) for bound in durations.bounds), "+Inf"]
    family.add_metric(
        labels, list(zip(bounds, cumulative, strict=True)), sum_value=durations.total_s
    )
