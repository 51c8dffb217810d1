"""The log of a running service in JSON: one line an event, whose request it is of, no secret."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import websockets

from tests.support.clients import agent
from tests.support.processes import (
    SECRET,
    Feed,
    Stack,
    events,
    market_clock,
    run,
    stack,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
SPEED = 60


@asynccontextmanager
async def logging_service(folder: Path, **settings: str) -> AsyncIterator[Stack]:
    """A service that logs everything that it ever logs."""
    async with stack(
        folder,
        market_clock(NOON, SPEED),
        **{"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG", "BACKFILL_DAYS": "0.02", **settings},
    ) as running:
        yield running


def requests_of(running: Stack, request_id: str) -> list[dict[str, Any]]:
    told = events(running.logs(), "request")
    return [event for event in told if event["request_id"] == request_id]


async def test_each_request_has_a_line_that_names_it(tmp_path: Path) -> None:
    async with (
        logging_service(tmp_path) as running,
        running.http(running.token()) as client,
    ):
        params = {"coin": "BTC"}
        await client.get("/api/v1/availability", params=params, headers={"X-Request-ID": "mine-1"})
        answer = await client.get("/nowhere/BTC", headers={"X-Request-ID": "no good\u007f"})
        await client.get("/health/ready", headers={"X-Request-ID": "probe"})
        (told,) = requests_of(running, "mine-1")
        assert told["level"] == "info"
        assert (told["method"], told["route"]) == ("GET", "/api/v1/availability")
        assert told["status"] == 200
        assert told["duration_ms"] > 0
        made = answer.headers["x-request-id"]
        assert made.isalnum()
        (lost,) = requests_of(running, made)
        assert (lost["route"], lost["status"]) == ("other", 404)
        # Machines ask every few seconds: nobody wants to read that.
        (probe,) = requests_of(running, "probe")
        assert probe["level"] == "debug"


async def test_an_agents_call_and_what_it_leads_to_carry_one_request_id(tmp_path: Path) -> None:
    async with logging_service(tmp_path) as running:
        async with agent(running, running.token()) as bot:
            await bot.call("list_coins")
        told = events(running.logs(), "request")
        (inner,) = [event for event in told if event["route"] == "/api/v1/coins"]
        assert inner["tool"] == "list_coins"
        outer = requests_of(running, inner["request_id"])
        assert [event["route"] for event in outer] == ["/api/v1/coins", "/mcp"]


async def test_what_a_connection_leads_to_carries_its_id_and_the_subscriptions(
    tmp_path: Path,
) -> None:
    async with logging_service(tmp_path) as running:
        await running.fault({"kind": "refuse_connections"})
        headers = {"Authorization": f"Bearer {running.token()}", "X-Request-ID": "socket-1"}
        address = running.url.replace("http", "ws", 1) + "/ws/data"
        async with websockets.connect(address, additional_headers=headers) as connection:
            feed = Feed(connection)
            await feed.send(type="subscribe_realtime", coin="BTC", request_id="ask-1")
            assert (await feed.next("error"))["code"] == "exchange_unavailable"
        (failed,) = events(running.logs(), "request_failed")
        assert failed["request_id"] == "socket-1"
        assert failed["subscription_id"] == "sub-1"
        assert failed["message_request_id"] == "ask-1"
        (handshake,) = requests_of(running, "socket-1")
        assert (handshake["route"], handshake["status"]) == ("/ws/data", 101)

        async def is_closed() -> bool:
            return bool(events(running.logs(), "websocket_closed"))

        await until(is_closed)
        (closed,) = events(running.logs(), "websocket_closed")
        assert (closed["request_id"], closed["code"]) == ("socket-1", 1000)
        with pytest.raises(websockets.InvalidStatus) as denied:
            await websockets.connect(address, additional_headers={"X-Request-ID": "socket-2"})
        assert denied.value.response.headers["X-Request-ID"] == "socket-2"
        (refused,) = requests_of(running, "socket-2")
        assert refused["status"] == 401


async def test_a_log_of_everything_holds_no_secret_and_one_event_a_line(tmp_path: Path) -> None:
    password, wrong = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    api_key, api_secret, collector_key = (secrets.token_hex(16) for _ in range(3))
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    async with logging_service(
        tmp_path,
        AUTH_USERS=json.dumps({"ann": hashed}),
        EXCHANGE_CREDENTIALS=json.dumps({"crypto.com": {"apiKey": api_key, "secret": api_secret}}),
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_HEADERS=f"api-key={collector_key}",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as running:
        token = running.token()
        async with running.http(None) as client:
            for tried in (password, wrong):
                form = {"username": "ann", "password": tried, "grant_type": "password"}
                answer = await client.post("/auth/token", data=form)
            assert answer.status_code == 401
            bad = {"Authorization": f"Bearer {token}x"}
            assert (await client.get("/api/v1/coins", headers=bad)).status_code == 401
        async with agent(running, token) as bot:
            await bot.call("add_coin", coin="BTC", interval="1m")
        address = running.url.replace("http", "ws", 1) + "/ws/data"
        async with (
            running.websocket(token) as by_header,
            websockets.connect(
                address,
                subprotocols=["cb-trade.v1", f"bearer.{token}"],  # type: ignore[list-item]
            ) as by_protocol,
        ):
            for connection in (by_header, by_protocol):
                feed = Feed(connection)
                await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
                await feed.next_closed()

        async def is_tried() -> bool:
            return bool(events(running.logs(), "traces_cannot_be_exported"))

        await until(is_tried)
        assert await running.stop_service() == 0
        assert running.service is not None
        assert running.service.stdout is not None
        assert await running.service.stdout.read() == b""
        log = running.logs()
    told = events(log)
    assert {"collecting", "request", "stopped"} <= {event["event"] for event in told}
    assert all({"level", "logger", "timestamp"} <= set(event) for event in told)
    for secret in (
        SECRET,
        token,
        token.split(".")[2],
        password,
        wrong,
        hashed,
        api_key,
        api_secret,
        collector_key,
    ):
        assert secret not in log


async def test_an_azure_key_is_not_logged_while_its_account_is_away(tmp_path: Path) -> None:
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    async with logging_service(
        tmp_path,
        STORAGE_TYPE="azure",
        STORAGE_ROOT="candles",
        STATE_DIR=str(tmp_path / "state"),
        AZURE_STORAGE_CONNECTION_STRING=(
            "DefaultEndpointsProtocol=http;AccountName=account;"
            f"AccountKey={key};BlobEndpoint=http://127.0.0.1:9/account;"
        ),
    ) as running:
        async with running.http(running.token()) as client:
            assert (await client.get("/api/v1/coins")).status_code == 503
        assert events(running.logs(), "started_without_storage")
        assert key not in running.logs()


async def test_what_stops_the_start_is_an_event_too(tmp_path: Path) -> None:
    code, lines, errors = await run("serve", folder=tmp_path, LOG_FORMAT="json", PORT="no port")
    assert (code, lines, len(errors)) == (2, [], 1)
    told = json.loads(errors[0])
    assert (told["event"], told["level"]) == ("not_started", "critical")
    assert told["error"].startswith("PORT: ")
