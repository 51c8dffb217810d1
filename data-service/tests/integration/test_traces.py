"""Traces of a running service, as a collector of OpenTelemetry receives them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.clients import agent
from tests.support.market import HOUR
from tests.support.processes import Feed, Stack, events, market_clock, stack, until
from tests.support.receiver import Receiver, attributes, receiving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
SPEED = 60
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
ASKED: dict[str, Any] = {
    "coin": "BTC",
    "interval": "1m",
    "start": NOON - 2 * HOUR,
    "end": NOON - HOUR,
}
# Nothing else is traced: above all no trade and no forming candle.
NAMES = {
    "settle",
    "exchange request",
    "storage list",
    "storage read",
    "storage read latest",
    "storage read sealed",
    "storage save",
    "ws subscribe_realtime",
}


@asynccontextmanager
async def traced_service(folder: Path, endpoint: str, **settings: str) -> AsyncIterator[Stack]:
    async with stack(
        folder,
        market_clock(NOON, SPEED),
        LOG_FORMAT="json",
        BACKFILL_DAYS="0.02",
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="100",
        **settings,
    ) as running:
        yield running


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


async def test_a_request_for_history_is_one_trace_from_the_caller_to_the_disk(
    tmp_path: Path, receiver: Receiver
) -> None:
    async with (
        traced_service(tmp_path, receiver.url) as running,
        running.http(running.token()) as client,
    ):
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        answer = await client.get("/api/v1/history", params=ASKED, headers=headers)
        assert answer.json()["sources"]["exchange"] == 60
        trace = bytes.fromhex(TRACE)
        request = await receiver.until_named("GET /api/v1/history", within=trace)
        assert request.parent_span_id.hex() == CALLER
        assert request.kind == Span.SPAN_KIND_SERVER
        assert attributes(request) == {
            "http.request.method": "GET",
            "http.route": "/api/v1/history",
            "http.response.status_code": 200,
        }
        (settled,) = receiver.named("settle", within=trace)
        assert receiver.above(settled) == ["settle", "GET /api/v1/history"]
        said = attributes(settled)
        assert (said["exchange"], said["coin"], said["interval"]) == ("crypto.com", "BTC", "1m")
        assert (said["start"], said["end"]) == (ASKED["start"], ASKED["end"])
        assert said["reason"] == "request"
        fetched = [
            span
            for span in receiver.named("exchange request", within=trace)
            if span.parent_span_id == settled.span_id
        ]
        assert fetched
        assert attributes(fetched[-1]) == {
            "exchange": "crypto.com",
            "http.request.method": "GET",
            "http.response.status_code": 200,
        }
        (saved,) = receiver.named("storage save", within=trace)
        assert receiver.above(saved) == ["storage save", "settle", "GET /api/v1/history"]
        assert attributes(saved)["entries"] == 60
        assert receiver.services == {"cb-trade-data-service"}
        # The line of the request leads to its trace.
        told = [event for event in events(running.logs(), "request") if "trace_id" in event]
        (line,) = [event for event in told if event["trace_id"] == TRACE]
        assert line["span_id"] == request.span_id.hex()


async def test_an_agents_call_is_one_trace(tmp_path: Path, receiver: Receiver) -> None:
    async with traced_service(tmp_path, receiver.url) as running:
        async with agent(running, running.token()) as bot:
            await bot.call("get_historical_data", **ASKED)
        settled = await receiver.until_named("settle")
        await receiver.until_named("POST /mcp", within=settled.trace_id)
        assert receiver.above(settled) == [
            "settle",
            "GET /api/v1/history",
            "mcp get_historical_data",
            "POST /mcp",
        ]


async def test_what_is_asked_over_a_connection_is_a_trace_each_and_what_is_told_is_none(
    tmp_path: Path, receiver: Receiver
) -> None:
    async with (
        traced_service(tmp_path, receiver.url, LOG_LEVEL="DEBUG") as running,
        running.websocket(running.token()) as connection,
    ):
        feed = Feed(connection)
        for channel in ("candles", "trades", "ticker", "order_book"):
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m", channel=channel)
        closed = 0
        while closed < 5:
            data = (await feed.next("realtime_data"))["data"]
            closed += isinstance(data, dict) and data.get("closed", False)
        begun = await receiver.until_named("ws subscribe_realtime")
        assert begun.parent_span_id == b""
        live = [span for span in receiver.named("settle") if attributes(span)["reason"] == "live"]
        assert live
        # What goes on after a request is no part of it.
        requests = {span.trace_id for span in receiver.named("ws subscribe_realtime")}
        assert len(requests) == 4
        assert not requests & {span.trace_id for span in live}
        await running.readiness()
        assert {span.name for span in receiver.spans.values()} <= NAMES
        assert await running.stop_service() == 0
        # What had not been sent yet is sent at the end.
        assert {span.name for span in receiver.spans.values()} <= NAMES


async def test_what_fails_is_an_error_of_its_span(tmp_path: Path, receiver: Receiver) -> None:
    async with (
        traced_service(tmp_path, receiver.url) as running,
        running.http(running.token()) as client,
    ):
        await running.fault({"kind": "refuse_connections"})
        answer = await client.get("/api/v1/history", params=ASKED)
        assert answer.status_code == 503
        request = await receiver.until_named("GET /api/v1/history")
        assert request.status.code == Status.STATUS_CODE_ERROR
        assert attributes(request)["error.type"] == "503"
        (asked, *_) = receiver.named("exchange request", within=request.trace_id)
        assert asked.status.code == Status.STATUS_CODE_ERROR
        assert attributes(asked) == {
            "exchange": "crypto.com",
            "error.type": attributes(asked)["error.type"],
        }


async def test_a_receiver_out_of_order_costs_a_line_and_is_served_when_it_is_in_order_again(
    tmp_path: Path, receiver: Receiver
) -> None:
    receiver.out_of_order = True
    async with (
        traced_service(tmp_path, receiver.url) as running,
        running.http(running.token()) as client,
    ):

        async def ask() -> None:
            answer = await client.get("/api/v1/availability", params={"coin": "BTC"})
            assert answer.status_code == 200

        async def is_refused() -> bool:
            await ask()
            return receiver.refused >= 5

        await until(is_refused)
        assert len(events(running.logs(), "traces_cannot_be_exported")) == 1
        assert not events(running.logs(), "traces_are_exported_again")
        receiver.out_of_order = False

        async def is_served() -> bool:
            await ask()
            return bool(events(running.logs(), "traces_are_exported_again"))

        await until(is_served)
        assert receiver.spans
        (served,) = events(running.logs(), "traces_are_exported_again")
        assert served["lost"] >= 5
        loggers = {event["logger"] for event in events(running.logs())}
        assert not [name for name in loggers if name.startswith(("opentelemetry", "urllib3"))]


async def test_a_receiver_that_never_answers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        async with stack(
            tmp_path,
            market_clock(NOON, SPEED),
            LOG_FORMAT="json",
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            OTEL_BSP_SCHEDULE_DELAY="100",
        ) as running:
            async with running.http(running.token()) as client:
                await client.get("/api/v1/availability", params={"coin": "BTC"})
            held, _ = await asyncio.to_thread(mute.accept)
            with held:
                began = time.monotonic()
                assert await running.stop_service() == 0
                assert time.monotonic() - began < 5
        assert events(running.logs(), "stopped")
