"""What ``/metrics`` says is so: an outage, a gap and a slow client read from it. Real processes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import websockets

from tests.support.clients import agent
from tests.support.metrics import Exposed, documented
from tests.support.processes import Feed, Stack, market_clock, stack, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
# A minute of the market takes a real second.
SPEED = 60
ON = {"exchange": "crypto.com"}
CHANNELS = ("candles", "trades", "ticker", "order_book")


async def scrape(running: Stack) -> Exposed:
    async with running.http(None) as client:
        return Exposed((await client.get("/metrics")).text)


async def until_exposed(
    running: Stack, what: Callable[[Exposed], bool], *, within_s: float = 40.0
) -> Exposed:
    """The first answer of which it is so."""
    answers: list[Exposed] = []

    async def is_so() -> bool:
        answers.append(await scrape(running))
        return what(answers[-1])

    await until(is_so, within_s=within_s)
    return answers[-1]


def is_complete(exposed: Exposed) -> bool:
    """Whether candles are stored, and no older one than the newest is missing."""
    return (
        exposed.value("entries_stored_total", **ON, change="added") > 0
        and exposed.value("gap_periods_open") <= 1
    )


async def until_told(feed: Feed, state: str) -> None:
    """Read until the client was told this of the exchange's feed."""
    while (told := await feed.next("status"))["state"] != state:
        assert told["component"] == "feed"


@asynccontextmanager
async def collecting(folder: Path) -> AsyncIterator[tuple[Stack, Feed]]:
    """A service that collects a coin, and a client that reads it."""
    async with (
        stack(folder, market_clock(NOON, SPEED), BACKFILL_DAYS="0.2") as running,
        running.websocket(running.token()) as connection,
    ):
        feed = Feed(connection)
        await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
        await feed.next("subscribed")
        await feed.next_closed()
        await until_exposed(running, is_complete)
        yield running, feed


async def test_a_service_exposes_what_is_documented_and_counts_what_is_stored(
    tmp_path: Path,
) -> None:
    async with collecting(tmp_path) as (running, _):
        async with agent(running, running.token()) as bot:
            await bot.call("list_coins")
        before = await scrape(running)
        documents = running.documents("BTC")
        after = await scrape(running)
        assert before.kinds == {name: metric.kind for name, metric in documented().items()}
        added = [item.value("entries_stored_total", change="added") for item in (before, after)]
        assert added[0] <= len(documents) <= added[1]
        assert after.value("stored_bytes_total", **ON) >= sum(
            len(json.dumps(document, separators=(",", ":"))) for document in documents
        )
        assert after.value("store_seconds_count") > 0
        assert after.value("feed_state", **ON, state="connected") == 1
        assert after.value("feed_lag_seconds", **ON) < 10
        assert after.value("exchange_requests_total", **ON, priority="backfill") > 0
        assert after.value("exchange_requests_total", **ON, priority="live") > 0
        assert after.value("subscribers", channel="candles") == 1
        assert after.value("websocket_subscriptions") == 1
        assert after.value("mcp_call_seconds_count", tool="list_coins", outcome="ok") == 1
        assert after.value("http_request_seconds_count", route="/metrics", status="200") > 0
        assert after.value("event_loop_lag_seconds_count") > 0


async def test_an_outage_shows_while_it_lasts_and_is_counted_when_it_is_over(
    tmp_path: Path,
) -> None:
    async with collecting(tmp_path) as (running, feed):
        await running.fault({"kind": "refuse_connections"}, {"kind": "drop_sockets"})
        await until_told(feed, "reconnecting")
        during = await until_exposed(
            running, lambda exposed: exposed.value("gap_periods_open", reason="unreachable") >= 3
        )
        assert during.value("feed_state", **ON, state="reconnecting") == 1
        assert during.value("feed_state", **ON) == 1
        # The exchange was silent for at least the three minutes that are missing.
        assert during.value("feed_lag_seconds", **ON) >= 2
        assert during.value("feed_losses_total", **ON) == 1
        assert during.value("feed_reconnects_total", **ON) == 0
        assert during.value("feed_streams", **ON) == 0
        assert during.value("exchange_request_failures_total", **ON) > 0
        assert during.value("gaps_open", **ON, interval="1m") >= 1
        await running.clear_faults()
        await until_told(feed, "connected")
        after = await until_exposed(running, is_complete)
        assert after.value("feed_reconnects_total", **ON) == 1
        assert after.value("feed_state", **ON, state="connected") == 1
        assert after.value("feed_lag_seconds", **ON) < 10


async def test_a_gap_shows_until_it_is_closed_though_the_feed_is_there(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (running, _):
        await running.fault({"kind": "rest_empty", "path": "get-candlestick"})
        during = await until_exposed(
            running, lambda exposed: exposed.value("gap_periods_open", **ON, interval="1m") >= 3
        )
        assert during.value("feed_state", **ON, state="connected") == 1
        async with running.http(running.token()) as client:
            coverage = await client.get(
                "/api/v1/coverage", params={"coin": "BTC", "interval": "1m"}
            )
        open_gaps = [
            gap["count"]
            for gap in coverage.json()["gaps"]
            if gap["reason"] in ("pending", "unreachable")
        ]
        later = await scrape(running)
        assert during.value("gap_periods_open") <= sum(open_gaps) <= later.value("gap_periods_open")
        await running.clear_faults()
        await until_exposed(running, is_complete)


async def test_a_client_that_does_not_read_shows_until_it_is_closed(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (running, _), unread(running) as slow:
        before = await scrape(running)
        for number in range(60):
            for channel in ("order_book", "trades", "ticker"):
                await slow.send(
                    json.dumps(
                        {
                            "type": "subscribe_realtime",
                            "coin": "BTC",
                            "interval": "1m",
                            "channel": channel,
                            "request_id": f"{channel}-{number}",
                        }
                    )
                )
        during = await until_exposed(
            running,
            lambda exposed: (
                exposed.value("subscribers", channel="trades") == 60
                and exposed.value("outbox_deepest", channel="trades") > 0
                and exposed.value("outbox_unsent_total", channel="order_book", policy="replaced")
                > before.value("outbox_unsent_total", channel="order_book", policy="replaced") + 100
            ),
        )
        assert during.value("websocket_connections") == 2
        assert during.value("websocket_slow_consumers_total") == 0
        assert during.value("outbox_depth", channel="trades") >= during.value(
            "outbox_deepest", channel="trades"
        )
        after = await until_exposed(
            running, lambda exposed: exposed.value("websocket_connections") == 1
        )
        assert after.value("websocket_slow_consumers_total") == 1
        assert after.value("outbox_depth", channel="trades") == 0
        assert [after.value("subscribers", channel=channel) for channel in CHANNELS] == [1, 0, 0, 0]


@asynccontextmanager
async def unread(running: Stack) -> AsyncIterator[websockets.ClientConnection]:
    """A client that reads nothing, with as little room for what it is sent as the system gives."""
    host, port = running.url.removeprefix("http://").split(":")
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
    connection = await websockets.connect(
        f"ws://{host}:{port}/ws/data",
        sock=narrow,
        additional_headers={"Authorization": f"Bearer {running.token()}"},
        max_queue=1,
        ping_interval=None,
        compression=None,
    )
    try:
        yield connection
    finally:
        connection.transport.abort()
