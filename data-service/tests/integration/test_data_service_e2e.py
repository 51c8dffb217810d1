"""The whole service, end to end: real processes, a real socket, real files, real clients.

The sandbox exchange replays a recorded series on a fast market clock; what the service has stored
at the end is read from disk by this file alone and compared with the record.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from tests.support.market import DAY, MINUTE
from tests.support.processes import (
    SECRET,
    Feed,
    Stack,
    clean_environment,
    line_with,
    market_clock,
    stack,
    stop,
    until,
)
from tests.support.records import Record, from_sample, generated

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

RECORDS: dict[str, Callable[[Path], Record]] = {"generated": generated}
if os.environ.get("CB_TRADE_SAMPLE_DATA"):
    RECORDS["ETH_BTC-5m"] = lambda _: from_sample("ETH_BTC-5m", days=14)
    RECORDS["UNITTEST_BTC-1m"] = lambda _: from_sample("UNITTEST_BTC-1m", days=9)
# Real seconds that one period of the record takes.
PERIOD_S = 3.0


def stored_rows(running: Stack, record: Record) -> dict[int, tuple[float, ...]]:
    """What lies on disk, by time; a period stored twice or under a wrong name fails."""
    rows: dict[int, tuple[float, ...]] = {}
    for document in running.documents(record.folder):
        at = document["timestamp"]
        assert at not in rows
        assert document["interval"] == record.interval
        assert document["market"] == record.coin
        rows[at] = tuple(document[name] for name in ("open", "high", "low", "close", "volume"))
    return rows


async def open_gaps(client: httpx.AsyncClient, record: Record) -> int:
    """How many wanted periods the service itself calls open."""
    answer = await client.get(
        "/api/v1/coverage", params={"coin": record.coin, "interval": record.interval}
    )
    answer.raise_for_status()
    return sum(
        gap["count"] for gap in answer.json()["gaps"] if gap["reason"] in ("pending", "unreachable")
    )


@asynccontextmanager
async def replaying(folder: Path, record: Record) -> AsyncIterator[Stack]:
    clock = market_clock(record.live_from(), record.step / 1000 / PERIOD_S)
    async with stack(
        folder,
        clock,
        sandbox_arguments=("--replay", str(record.path)),
        BACKFILL_DAYS=str(record.days),
    ) as running:
        yield running


async def add_by_agent(running: Stack, token: str, record: Record) -> dict[str, Any]:
    """Add the coin as an agent does: over MCP, with the official client."""
    async with (
        running.http(token) as client,
        streamable_http_client(f"{running.url}/mcp", http_client=client) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        tools = {tool.name for tool in (await session.list_tools()).tools}
        assert {"add_coin", "list_coins", "get_historical_data", "get_current_data"} <= tools
        result = await session.call_tool(
            "add_coin", {"coin": record.coin, "interval": record.interval}
        )
        assert not result.isError, result.content
        (content,) = result.content
        assert content.type == "text"
        answer: dict[str, Any] = json.loads(content.text)
        return answer


async def read_history(feed: Feed, record: Record, start: int, end: int) -> dict[str, Any]:
    """Ask for a range in chunks; the rows by time, with what the completion said."""
    await feed.send(
        type="request_historical",
        request_id="history",
        coin=record.coin,
        interval=record.interval,
        start=start,
        end=end,
        chunk_size=1000,
    )
    rows: dict[int, tuple[float, ...]] = {}
    index = 0
    while True:
        message = await feed.next("historical_data_chunk", "historical_data_complete", "error")
        assert message["type"] != "error", message
        assert message["request_id"] == "history"
        if message["type"] == "historical_data_complete":
            assert message["chunks"] == index
            assert message["count"] == len(rows)
            return {"rows": rows, "gaps": message["gaps"], "chunks": index}
        assert message["index"] == index
        assert message["columns"][0] == "timestamp"
        assert len(message["rows"]) <= 1000
        for at, *values in message["rows"]:
            assert at not in rows
            rows[at] = tuple(values)
        index += 1


@pytest.mark.parametrize("name", sorted(RECORDS))
async def test_a_recorded_series_flows_from_the_exchange_to_agents_clients_and_disk(
    name: str, tmp_path: Path
) -> None:
    record = RECORDS[name](tmp_path / "record")
    async with replaying(tmp_path, record) as running:
        token = await running.token()
        added = await add_by_agent(running, token, record)
        assert added["status"] == "added"
        since = added["target"]["since"]
        assert since == (running.clock.now_ms() - record.days * DAY) // record.step * record.step

        async with running.websocket(token) as socket, running.http(token) as client:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin=record.coin, interval=record.interval)
            subscribed = await feed.next("subscribed")
            next_open = subscribed["last_closed"] + record.step

            history = await read_history(feed, record, since, next_open)
            assert history["rows"] == record.between(since, next_open)
            assert history["chunks"] >= 1
            holes = {
                at for gap in history["gaps"] for at in range(gap["start"], gap["end"], record.step)
            }
            assert holes == set(range(since, next_open, record.step)) - set(record.rows)
            assert {gap["reason"] for gap in history["gaps"]} <= {"no_trades"}

            told = await follow(feed, record, next_open, periods=4)
            assert told == next_open + 4 * record.step

            # The service dies, and comes back two candles later.
            await running.kill_service()
            await running.clock.sleep_until(told + 2 * record.step + record.step // 2)
            await running.start_service()

        async with running.websocket(token) as socket, running.http(token) as client:
            feed = Feed(socket)
            await feed.send(
                type="subscribe_realtime",
                coin=record.coin,
                interval=record.interval,
                **{"from": told},
            )
            assert (await feed.next("subscribed"))["last_closed"] >= told - record.step
            told = await follow(feed, record, told, periods=4)

            async def nothing_open() -> bool:
                return await open_gaps(client, record) == 0

            await until(nothing_open)
        assert await running.stop_service() == 0

        stored = stored_rows(running, record)
        assert stored == record.between(since, max(stored) + record.step)
        assert max(stored) >= max(at for at in record.rows if at < told)
        books = [
            (document["order_book"]["timestamp"], document["timestamp"] + record.step)
            for document in running.documents(record.folder)
            if document["order_book"] is not None
        ]
        assert books != []
        assert [late for taken, late in books if abs(taken - late) > 10_000] == []
        await running.start_service()


async def follow(feed: Feed, record: Record, next_open: int, *, periods: int) -> int:
    """Read closed periods, each of which must be the next one and what the record says; late
    ones and corrections aside. Returns the first period not told yet."""
    last = next_open + periods * record.step
    while next_open < last:
        message = await feed.next_told()
        late = message.get("late", False)
        if message["type"] == "gap":
            start, end = message["start"], message["end"]
            assert message["reason"] != "no_trades" or not record.between(start, end)
        else:
            data = message["data"]
            start, end = data["timestamp"], data["timestamp"] + record.step
            row = tuple(data[key] for key in ("open", "high", "low", "close", "volume"))
            assert row == record.rows[start]
            late = late or data["revision"] > 1
        if late:
            assert start < next_open
        else:
            assert start == next_open
            next_open = end
    return next_open


@asynccontextmanager
async def invented(folder: Path, *, seconds_a_minute: float = 2.0) -> AsyncIterator[Stack]:
    """A service on the sandbox's own market, an hour of history collected."""
    noon = 1_763_985_600_000
    clock = market_clock(noon, 60 / seconds_a_minute)
    async with stack(folder, clock, BACKFILL_DAYS="0.04") as running:
        yield running


async def test_forming_candles_still_arrive_when_rest_answers_503(tmp_path: Path) -> None:
    async with invented(tmp_path) as running:
        token = await running.token()
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
            await feed.next("subscribed")
            await feed.next_closed()
            (fault,) = await running.fault({"kind": "rest_status", "status": 503})
            forming = await feed.next_forming()
            period = forming["timestamp"]
            while forming["timestamp"] < period + 3 * MINUTE:
                forming = await feed.next_forming()
            assert (await running.hits())[fault] > 0
            # When it answers again, everything that it swallowed is told, in order or late.
            await running.clear_faults()
            wanted = {period, period + MINUTE, period + 2 * MINUTE}
            while wanted:
                data = await feed.next_closed()
                wanted.discard(data.get("timestamp", 0))


async def test_closed_candles_still_arrive_when_the_socket_is_mute(tmp_path: Path) -> None:
    async with invented(tmp_path) as running:
        token = await running.token()
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin="BTC", interval="1m")
            await feed.next("subscribed")
            first = await feed.next_closed()
            (fault,) = await running.fault({"kind": "mute_sockets"})
            closed = [await feed.next_closed() for _ in range(3)]
            assert [data["timestamp"] for data in closed] == [
                first["timestamp"] + at * MINUTE for at in (1, 2, 3)
            ]
            assert (await running.hits())[fault] > 0


async def test_bad_input_is_answered_as_documented_and_adds_nothing(tmp_path: Path) -> None:
    async with invented(tmp_path) as running:
        token, reader = await running.token(), await running.token("data:read")
        now = running.clock.now_ms()
        async with running.http(token) as client:
            for status, code, answer in (
                (404, "coin_not_available", await client.post(
                    "/api/v1/coins", json={"coin": "NOSUCHCOIN"})),
                (404, "unknown_exchange", await client.post(
                    "/api/v1/coins", json={"coin": "BTC", "exchange": "kraken"})),
                (422, "invalid_request", await client.post(
                    "/api/v1/coins", json={"coin": "BTC", "interval": "7m"})),
                (422, "invalid_request", await client.post("/api/v1/coins", json={})),
                (422, "invalid_request", await client.post("/api/v1/coins", content=b"{")),
                (422, "invalid_request", await client.get(
                    "/api/v1/history", params={"coin": "BTC", "start": now, "end": now - 1})),
                (404, "coin_not_available", await client.get(
                    "/api/v1/current", params={"coin": "NOSUCHCOIN"})),
            ):  # fmt: skip
                assert answer.status_code == status, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["code"] == code
            assert (await client.get("/api/v1/coins")).json() == {"targets": []}
        for wrong in (None, "nonsense", token[:-4] + "AAAA"):
            async with running.http(wrong) as client:
                answer = await client.get("/api/v1/coins")
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
                assert "www-authenticate" in answer.headers
        async with running.http(reader) as client:
            answer = await client.post("/api/v1/coins", json={"coin": "BTC"})
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        with pytest.raises(websockets.InvalidStatus) as refused:
            await running.websocket("nonsense")
        assert refused.value.response.status_code == 401
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            await socket.send("{broken")
            assert (await feed.next("error"))["code"] == "invalid_message"
            for code, message in (
                ("invalid_message", {"type": "no_such_type"}),
                ("coin_not_available", {"type": "subscribe_realtime", "coin": "NOSUCHCOIN"}),
                ("unknown_exchange",
                 {"type": "request_current", "coin": "BTC", "exchange": "kraken"}),
                ("invalid_request",
                 {"type": "request_historical", "coin": "BTC", "start": now, "end": now - 1}),
                ("invalid_request",
                 {"type": "subscribe_realtime", "coin": "BTC", "interval": "7m"}),
            ):  # fmt: skip
                await feed.send(request_id=code, **message)
                error = await feed.next("error")
                assert (error["code"], error["request_id"]) == (code, code)
            await feed.send(type="ping")
            await feed.next("pong")
        async with running.http(token) as client:
            assert (await client.get("/api/v1/coins")).json() == {"targets": []}
            assert (await client.get("/health/ready")).status_code == 200
        assert "Traceback" not in running.logs()


async def test_two_runs_side_by_side_print_live_candles_and_stop_clean(tmp_path: Path) -> None:
    async def run(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "errors.log").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "demo",
                env=clean_environment(PORT="0", AUTH_SECRET=SECRET),
                cwd=folder,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        try:
            assert "SIMULATED" in await line_with(process, "cb-trade data service")
            assert "TOKEN=" in await line_with(process, "TOKEN=")
            await line_with(process, "BTC/USD   forming")
        finally:
            assert await stop(process, signal.SIGINT) == 0
        assert (folder / "data-sandbox" / "raw_data" / "crypto.com" / "BTC").is_dir()
        # Nothing is left running in what was its session.
        assert [line for line in processes() if str(folder) in line] == []

    await asyncio.gather(run("one"), run("two"))


def processes() -> list[str]:
    """The working folder of every process that still runs."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    return found
