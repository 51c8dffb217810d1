"""The page about metrics says what is exposed; dashboard and alerts ask for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from api.metrics import ApiMetrics, CollectionCollector, ExchangeCollector, StorageCollector
from collection.interfaces import (
    Channel,
    FeedStatus,
    GapCount,
    OpenGaps,
    OutboxStatus,
    OutboxTotals,
)
from domain.gap import GapReason
from storage.interfaces import Change, StorageStatus, StorageTotals
from tests.support.clock import ManualClock
from tests.support.exchange import FakeExchange
from tests.support.metrics import ALERTS, DASHBOARD, Described, Exposed, documented, used


class Storing:
    status = StorageStatus()
    totals = StorageTotals()


class Collecting:
    def feeds(self) -> list[FeedStatus]:
        return [FeedStatus("crypto.com", "connected", lag_s=0.5)]

    def open_gaps(self) -> OpenGaps:
        return {("crypto.com", "5m", GapReason.PENDING): GapCount(1, 2)}

    def outboxes(self) -> Mapping[Channel, OutboxStatus]:
        return {Channel.TRADES: OutboxStatus(OutboxTotals())}


@pytest.fixture
def exposed() -> Exposed:
    """What a service exposes in which everything has happened once."""
    registry = CollectorRegistry()
    metrics = ApiMetrics(registry)
    metrics.http_seconds.labels("/api/v1/coins", "GET", "200").observe(0.1)
    metrics.mcp_seconds.labels("list_coins", "ok").observe(0.1)
    metrics.messages.labels("pong").inc()
    Storing.totals.entries["crypto.com", "5m", Change.ADDED] += 1
    Storing.totals.refused["crypto.com"] += 1
    Storing.totals.written_bytes["crypto.com"] += 1
    exchange = FakeExchange(ManualClock())
    exchange.requests["fetch_order_book"] += 1
    registry.register(StorageCollector(Storing(), lambda: True))
    registry.register(CollectionCollector(Collecting()))
    registry.register(ExchangeCollector([exchange]))
    return Exposed(generate_latest(registry).decode())


def test_the_page_says_what_is_exposed_and_nothing_else(exposed: Exposed) -> None:
    found = {name: Described(kind, exposed.labels(name)) for name, kind in exposed.kinds.items()}
    assert found == documented()


def expressions() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("where", "expression"), [*expressions()])
def test_dashboard_and_alerts_ask_for_what_there_is(where: str, expression: str) -> None:
    known = documented()
    asked = list(used(expression))
    assert asked, where
    for name, labels in asked:
        metric = re.sub(r"_(bucket|sum|count)$", "", name) if name not in known else name
        assert metric in known, where
        # Parts of a histogram are asked for by their names, and nothing else has any.
        assert (metric != name) == (known[metric].kind == "histogram")
        assert labels <= known[metric].labels, where


def test_every_metric_is_on_the_dashboard() -> None:
    text = DASHBOARD.read_text()
    assert [name for name in documented() if name not in text] == []


def test_every_alert_says_how_bad_it_is_and_what_is_wrong() -> None:
    rules = ALERTS.read_text().split("- alert: ")[1:]
    assert len({rule.splitlines()[0] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.count("expr: ") == 1
        assert re.search(r"\n        labels: \{severity: (critical|warning)\}\n", rule)
        assert re.search(r"\n        annotations:\n          summary: \S", rule)
        assert re.fullmatch(r"\d+[smh]", (re.findall(r"\n        for: (.*)\n", rule) or ["1m"])[0])
