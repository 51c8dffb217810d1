"""Spans: what they cost when nobody wants them, what starts them, and who waits for what."""

from __future__ import annotations

import ast
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from domain.time_range import TimeRange
from exchange_source.interfaces import Priority
from observability.tracing import origin, span, trace_ids, tracing, within
from tests.support.clock import settle_loop
from tests.support.market import BTC_5M, HOUR, T0
from tests.unit.reconciliation.test_worker import World

SOURCE = Path(__file__).parents[3] / "src"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


class Spans:
    """What was traced; complete once ``recorded`` is left."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def all(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.all() if span.name == name]
        return found


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    spans = Spans()
    with monkeypatch.context() as patched:
        patched.setattr("observability.otel.OTLPSpanExporter", lambda: spans.exporter)
        with tracing(ENDPOINT):
            yield spans


def test_without_an_endpoint_there_are_no_spans_and_nothing_is_said() -> None:
    with capture_logs() as logs, tracing({}), span("one", coin="BTC") as traced:
        traced.set(entries=1)
        assert (origin(), dict(trace_ids())) == (None, {})
        with within(origin()):
            assert span("another") is traced
    assert logs == []


@pytest.mark.parametrize(
    "switch", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}]
)
def test_the_switches_of_opentelemetry_turn_it_off(switch: dict[str, str]) -> None:
    with capture_logs() as logs, tracing(ENDPOINT | switch), span("one"):
        assert origin() is None
    assert logs == []


def test_an_endpoint_without_the_extra_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "observability.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with capture_logs() as logs, tracing(ENDPOINT), span("one"):
        assert origin() is None
    ((event, level),) = [(line["event"], line["log_level"]) for line in logs]
    assert (event, level) == ("not_tracing", "warning")
    assert ".[otel]" in logs[0]["reason"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_BSP_MAX_QUEUE_SIZE", "0")],
)
def test_a_wrong_variable_is_one_warning(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with capture_logs() as logs, tracing(ENDPOINT | {name: value}), span("one"):
        assert origin() is None
    assert [(line["event"], line["log_level"]) for line in logs] == [("not_tracing", "warning")]


def test_spans_are_parts_of_one_another_and_log_lines_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with recorded(monkeypatch) as spans:
        with span("outer", kind="server") as outer:
            outer.rename("renamed")
            with span("inner", coin="BTC"):
                ids = trace_ids()
        assert origin() is None
    outer_span, inner = spans.named("renamed"), spans.named("inner")
    assert inner.parent == outer_span.context
    assert inner.attributes == {"coin": "BTC"}
    assert inner.context is not None
    assert ids["trace_id"] == f"{inner.context.trace_id:032x}"
    assert ids["span_id"] == f"{inner.context.span_id:016x}"


def test_an_exception_makes_a_span_an_error_of_its_class_and_says_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with recorded(monkeypatch) as spans:
        with pytest.raises(ValueError, match="hunter2"), span("failing"):
            raise ValueError("hunter2")
        with pytest.raises(asyncio.CancelledError), span("left"):
            raise asyncio.CancelledError
    failing = spans.named("failing")
    assert not failing.status.is_ok
    assert failing.attributes == {"error.type": "ValueError"}
    assert "hunter2" not in failing.to_json()
    assert spans.named("left").attributes == {"cancelled": True}


async def test_a_page_that_two_wait_for_is_part_of_the_first_and_linked_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    wanted = TimeRange(T0 + 23 * HOUR, T0 + 24 * HOUR)

    async def ask(name: str) -> None:
        with span(name):
            await world.reconciler.settle(BTC_5M, "BTC/USD", wanted, priority=Priority.REQUEST)

    with recorded(monkeypatch) as spans:
        # Both have asked before anybody works.
        asked = [asyncio.create_task(ask(name)) for name in ("first", "second")]
        await settle_loop()
        async with world.running():
            await asyncio.gather(*asked)
    settled = spans.named("settle")
    assert settled.parent == spans.named("first").context
    assert [link.context for link in settled.links] == [spans.named("second").context]
    assert spans.named("storage save").parent == settled.context


def test_what_is_done_once_a_trade_or_a_forming_candle_knows_of_no_spans() -> None:
    plugins = SOURCE / "exchange_source" / "plugins"
    files = [
        *(SOURCE / "collection").glob("*.py"),
        *(SOURCE / "domain").glob("*.py"),
        plugins / "ccxt_feeds.py",
        plugins / "ccxt_guards.py",
        plugins / "ccxt_values.py",
        plugins / "traded_candles.py",
        SOURCE / "api" / "wire.py",
    ]
    for file in files:
        imported = [
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        assert "observability.tracing" not in imported, file


def test_opentelemetry_is_imported_in_one_place() -> None:
    importing = [
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*.py")
        if "import opentelemetry" in file.read_text() or "from opentelemetry" in file.read_text()
    ]
    assert importing == ["observability/otel.py"]


def test_the_tracer_says_whose_spans_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as spans, span("one"):
        pass
    attributes = spans.named("one").resource.attributes
    assert attributes["service.name"] == "cb-trade-data-service"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with recorded(monkeypatch) as spans, span("one"):
        pass
    assert spans.named("one").resource.attributes["service.name"] == "mine"
