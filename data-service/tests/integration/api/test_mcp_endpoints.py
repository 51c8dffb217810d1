"""The operations over HTTP, and as the tools of a real MCP client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from structlog.testing import capture_logs

from api.metrics import ApiMetrics
from errors import CoinNotAvailable, DataServiceError, NoData, UnknownExchange
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
)
from storage.interfaces import StorageConflict, StorageUnavailable
from target_management.interfaces import TargetStoreUnavailable
from tests.support.api import (
    FIVE_MINUTES,
    START,
    Server,
    World,
    bearer,
    http_client,
    make_candle,
    make_entry,
    make_series,
    make_token,
    make_world,
    row,
    serving,
)

OPERATIONS = {
    "add_coin",
    "remove_coin",
    "list_coins",
    "check_availability",
    "get_current_data",
    "get_historical_data",
    "summarize_history",
    "get_coverage",
}


WRONG_BODIES: list[tuple[Any, str]] = [
    ({}, "coin is missing"),
    ({"coin": 7}, "coin should be a valid string"),
    ({"coin": "   "}, "coin text should have at least 1 character"),
    ({"coin": "B TC"}, "coin takes a name without spaces"),
    ({"coin": "BTC", "interval": "7m"}, "interval '7m' does not exist; use one of"),
    ({"coin": "BTC", "since": 1795338600.5}, "since takes integer milliseconds"),
    ({"coin": "BTC", "since": 1795338600}, "looks like seconds"),
    ({"coin": "BTC", "intervall": "5m"}, "intervall does not exist here"),
    ([], "the body should be a valid dictionary"),
]


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(world) as client:
        client.headers.update(bearer())
        yield client


def problem(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail", "code"}
    assert body["status"] == response.status_code
    return body


class TestAddCoin:
    async def test_a_valid_request_asks_the_manager_and_tells_the_target(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        response = await client.post("/api/v1/coins", json={"coin": "btc", "since": START})
        assert response.status_code == 201
        assert world.collection.called("add_coin") == [
            {"coin": "BTC", "exchange": None, "interval": "5m", "since": START}
        ]
        body = response.json()
        now = world.collection.targets["crypto.com:BTC:5m"].target.created_at
        assert body == {
            "status": "added",
            "target": {
                "target_id": "crypto.com:BTC:5m",
                "coin": "BTC",
                "exchange": "crypto.com",
                "exchange_id": "cryptocom",
                "market": "BTC/USD",
                "interval": "5m",
                "enabled": True,
                "since": START,
                "created_at": now,
                "last_updated": now,
                "state": "starting",
                "last_entry": None,
                "lag_ms": None,
            },
        }

    async def test_exchanges_that_could_not_be_asked_are_named(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        world.collection.unreachable = ("binance",)
        response = await client.post("/api/v1/coins", json={"coin": "BTC"})
        assert response.json()["unreachable"] == ["binance"]

    async def test_who_adds_and_removes_is_told_to_the_manager(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        await client.post("/api/v1/coins", json={"coin": "BTC"})
        await client.delete("/api/v1/coins", params={"coin": "BTC"})
        assert world.collection.asked_by == ["bot", "bot"]

    async def test_a_coin_that_is_collected_already_is_told_as_such(
        self, client: httpx.AsyncClient
    ) -> None:
        await client.post("/api/v1/coins", json={"coin": "BTC"})
        again = await client.post("/api/v1/coins", json={"coin": "BTC"})
        assert (again.status_code, again.json()["status"]) == (200, "already_collecting")

    async def test_an_invalid_token_is_unauthorized(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        response = await client.post(
            "/api/v1/coins", json={"coin": "BTC"}, headers=bearer("nonsense")
        )
        assert response.status_code == 401
        assert problem(response)["code"] == "unauthorized"
        assert world.collection.calls == []

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (CoinNotAvailable("DOGE is not listed by crypto.com"), 404, "coin_not_available"),
            (UnknownExchange("kraken is not enabled"), 404, "unknown_exchange"),
            (NoData("nothing is known"), 404, "no_data"),
            (ExchangeUnavailable("crypto.com is away"), 503, "exchange_unavailable"),
            (ExchangeRateLimited("too fast", retry_after=7.2), 503, "exchange_unavailable"),
            (BadExchangeAnswer("half a document"), 503, "exchange_unavailable"),
            (ExchangeRefused("no such symbol"), 422, "invalid_request"),
            (StorageUnavailable("the disk is full"), 503, "storage_unavailable"),
            (TargetStoreUnavailable("the table is away"), 503, "storage_unavailable"),
            (StorageConflict("another market"), 500, "internal"),
            (DataServiceError("something of ours"), 500, "internal"),
            (RuntimeError("a secret in a traceback"), 500, "internal"),
        ],
    )
    async def test_a_failure_of_the_manager_is_told_as_a_problem(
        self,
        client: httpx.AsyncClient,
        world: World,
        error: Exception,
        status: int,
        code: str,
    ) -> None:
        world.collection.fail_with = error
        with capture_logs() as logs:
            response = await client.post("/api/v1/coins", json={"coin": "BTC"})
        assert response.status_code == status
        # Failures of the service itself are logged as errors, once.
        assert [line["code"] for line in logs if line["log_level"] == "error"] == (
            [code] if status >= 500 else []
        )
        body = problem(response)
        assert body["code"] == code
        assert (str(error) == body["detail"]) == (code != "internal")
        assert ("retry-after" in response.headers) == (status == 503)

    async def test_the_delay_that_the_exchange_named_is_passed_on(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        world.collection.fail_with = ExchangeRateLimited("too fast", retry_after=7.2)
        response = await client.post("/api/v1/coins", json={"coin": "BTC"})
        assert response.headers["retry-after"] == "8"

    async def test_a_wrong_field_is_named_with_what_is_right(
        self, client: httpx.AsyncClient
    ) -> None:
        for body, told in WRONG_BODIES:
            response = await client.post("/api/v1/coins", json=body)
            assert response.status_code == 422
            answer = problem(response)
            assert answer["code"] == "invalid_request"
            assert told in answer["detail"]

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
    async def test_a_body_that_is_no_json_is_invalid(
        self, client: httpx.AsyncClient, content: bytes
    ) -> None:
        response = await client.post(
            "/api/v1/coins", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 422
        assert problem(response)["code"] == "invalid_request"


class TestCheckAvailability:
    async def test_a_valid_request_asks_the_manager_and_tells_the_markets(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        response = await client.get("/api/v1/availability", params={"coin": "btc/eur"})
        assert response.status_code == 200
        assert world.collection.called("check_availability") == [
            {"coin": "BTC/EUR", "exchange": None}
        ]
        assert response.json() == {
            "coin": "BTC/EUR",
            "available": True,
            "markets": [{"exchange": "crypto.com", "market": "BTC/EUR", "collecting": False}],
            "unreachable": [],
        }

    async def test_a_coin_that_nobody_lists_is_no_error(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/api/v1/availability", params={"coin": "NOPE"})
        assert response.status_code == 200
        assert response.json()["available"] is False

    async def test_an_invalid_token_is_unauthorized(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        response = await client.get(
            "/api/v1/availability", params={"coin": "BTC"}, headers=bearer("nonsense")
        )
        assert response.status_code == 401
        assert problem(response)["code"] == "unauthorized"
        assert world.collection.calls == []


class TestTargets:
    async def test_what_is_collected_is_listed(self, client: httpx.AsyncClient) -> None:
        await client.post("/api/v1/coins", json={"coin": "ETH"})
        await client.post("/api/v1/coins", json={"coin": "BTC"})
        response = await client.get("/api/v1/coins")
        assert [item["coin"] for item in response.json()["targets"]] == ["BTC", "ETH"]

    async def test_a_removed_coin_is_told_and_gone(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        await client.post("/api/v1/coins", json={"coin": "BTC/EUR"})
        response = await client.delete("/api/v1/coins", params={"coin": "BTC/EUR", "exchange": ""})
        assert response.status_code == 200
        assert response.json()["status"] == "removed"
        assert response.json()["target"]["market"] == "BTC/EUR"
        assert world.collection.targets == {}

    async def test_a_removal_that_fits_several_names_them(self, client: httpx.AsyncClient) -> None:
        for interval in ("1m", "5m"):
            await client.post("/api/v1/coins", json={"coin": "BTC", "interval": interval})
        response = await client.delete("/api/v1/coins", params={"coin": "BTC"})
        assert response.status_code == 422
        assert "crypto.com:BTC:1m, crypto.com:BTC:5m" in problem(response)["detail"]


class TestReading:
    async def test_the_newest_closed_candle_is_an_entry(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        entry = make_entry(book=True)
        world.history.put([entry])
        response = await client.get("/api/v1/current", params={"coin": "BTC"})
        assert response.status_code == 200
        assert response.json() == {
            "data": {**entry.to_document(), "closed": True},
            "age_ms": 340,
        }

    async def test_a_forming_candle_has_an_entrys_shape(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        world.history.forming[make_series()] = make_candle()
        body = (await client.get("/api/v1/current", params={"coin": "BTC"})).json()
        assert set(body["data"]) == {*make_entry().to_document(), "closed"}
        assert body["data"]["closed"] is False
        assert body["data"]["revision"] == 0
        assert body["data"]["order_book"] is None

    async def test_without_any_candle_there_is_no_data(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/api/v1/current", params={"coin": "BTC"})
        assert response.status_code == 404
        assert problem(response)["code"] == "no_data"

    async def test_history_comes_in_pages_with_its_gaps(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        entries = [make_entry(START + n * FIVE_MINUTES) for n in (0, 1, 3)]
        world.history.put(entries)
        params: dict[str, Any] = {
            "coin": "BTC",
            "start": START,
            "end": START + 4 * FIVE_MINUTES,
            "limit": 2,
        }
        response = await client.get("/api/v1/history", params=params)
        assert response.status_code == 200
        assert response.json() == {
            "exchange": "crypto.com",
            "coin": "BTC",
            "market": "BTC/USD",
            "interval": "5m",
            "start": START,
            "end": START + 4 * FIVE_MINUTES,
            "columns": ["timestamp", "open", "high", "low", "close", "volume"],
            "rows": [row(entry) for entry in entries[:2]],
            "count": 2,
            "next_start": START + 3 * FIVE_MINUTES,
            "gaps": [
                {
                    "start": START + 2 * FIVE_MINUTES,
                    "end": START + 3 * FIVE_MINUTES,
                    "count": 1,
                    "reason": "no_trades",
                }
            ],
            "sources": {"storage": 2, "exchange": 0},
        }

    @pytest.mark.parametrize(
        "start",
        ["2026-11-22T09:10:00Z", "2026-11-22T09:10:00", "2026-11-22T11:10:00+02:00", str(START)],
    )
    async def test_a_time_may_be_written_in_several_ways(
        self, client: httpx.AsyncClient, world: World, start: str
    ) -> None:
        params: dict[str, Any] = {"coin": "BTC", "start": start, "end": START + 1}
        response = await client.get("/api/v1/history", params=params)
        assert response.status_code == 200
        assert world.history.called("get_historical_data")[0]["start"] == START

    async def test_without_an_end_the_range_ends_now(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        now = world.history.clock.now_ms()
        start = now - 3_600_000
        await client.get("/api/v1/history", params={"coin": "BTC", "start": start})
        await client.get("/api/v1/summary", params={"coin": "BTC", "start": start})
        for method in ("get_historical_data", "summarize_history"):
            assert now <= world.history.called(method)[0]["end"] <= now + 60_000

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"end": START}, "end takes a time after start"),
            ({"end": START - 1}, "end takes a time after start"),
            ({"start": "yesterday"}, "start takes integer milliseconds"),
            ({"start": ""}, "start takes integer milliseconds"),
            ({"limit": 0}, "limit should be greater than or equal to 1"),
            ({"limit": 5001}, "limit should be less than or equal to 5000"),
            ({"offset": 3}, "offset does not exist here"),
        ],
    )
    async def test_a_wrong_parameter_is_named_with_what_is_right(
        self, client: httpx.AsyncClient, changes: dict[str, Any], told: str
    ) -> None:
        params: dict[str, Any] = {"coin": "BTC", "start": START, "end": START + 1, **changes}
        response = await client.get("/api/v1/history", params=params)
        assert response.status_code == 422
        assert told in problem(response)["detail"]

    async def test_a_range_is_summarized(self, client: httpx.AsyncClient, world: World) -> None:
        world.history.put([make_entry(START), make_entry(START + FIVE_MINUTES, close=110.0)])
        params: dict[str, Any] = {"coin": "BTC", "start": START, "end": START + 3 * FIVE_MINUTES}
        body = (await client.get("/api/v1/summary", params=params)).json()
        assert body["count"] == 2
        assert body["last"]["close"] == 110.0
        assert body["change_percent"] == pytest.approx(10.0)
        assert "approximate" in body["vwap_method"]
        assert body["rows"][0][0] == START
        assert body["gaps"][0]["count"] == 1

    async def test_coverage_counts_candles(self, client: httpx.AsyncClient, world: World) -> None:
        world.history.put([make_entry(START, book=True), make_entry(START + 2 * FIVE_MINUTES)])
        response = await client.get("/api/v1/coverage", params={"coin": "BTC"})
        assert response.json() == {
            "first": START,
            "last": START + 2 * FIVE_MINUTES,
            "expected": 3,
            "stored": 2,
            "with_order_book": 1,
            "ranges": [
                {"start": START, "end": START + FIVE_MINUTES, "count": 1},
                {"start": START + 2 * FIVE_MINUTES, "end": START + 3 * FIVE_MINUTES, "count": 1},
            ],
            "gaps": [
                {
                    "start": START + FIVE_MINUTES,
                    "end": START + 2 * FIVE_MINUTES,
                    "count": 1,
                    "reason": "no_trades",
                }
            ],
        }


class TestTools:
    """Through the MCP SDK's own client and a real server."""

    @pytest.fixture
    async def server(self, world: World) -> AsyncIterator[Server]:
        async with serving(world) as server:
            yield server

    @staticmethod
    @asynccontextmanager
    async def session(server: Server, token: str) -> AsyncIterator[ClientSession]:
        async with (
            httpx.AsyncClient(headers=bearer(token), trust_env=False) as http,
            streamable_http_client(f"{server.url}/mcp", http_client=http) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            yield session

    async def test_the_tools_are_the_operations_and_their_calls_reach_the_managers(
        self, server: Server, world: World
    ) -> None:
        world.history.put([make_entry(START)])
        async with self.session(server, make_token()) as session:
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            assert set(tools) == OPERATIONS
            assert "start collecting" in str(tools["add_coin"].description).lower()
            assert tools["get_historical_data"].inputSchema["required"] == ["coin", "start"]

            added = await session.call_tool("add_coin", {"coin": "BTC", "exchange": None})
            assert not added.isError
            assert json.loads(added.content[0].text)["status"] == "added"  # type: ignore[union-attr]
            assert world.collection.called("add_coin")[0]["coin"] == "BTC"

            page = await session.call_tool(
                "get_historical_data",
                {"coin": "BTC", "start": "2026-11-22T09:10:00Z", "end": START + FIVE_MINUTES},
            )
            assert not page.isError
            rows = json.loads(page.content[0].text)["rows"]  # type: ignore[union-attr]
            assert rows == [row(make_entry(START))]

            removed = await session.call_tool("remove_coin", {"coin": "BTC"})
            assert not removed.isError
            assert world.collection.targets == {}

    async def test_a_failure_tells_the_agent_its_code_and_reason(
        self, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with self.session(server, make_token(scope="data:read")) as session:
            unknown = await session.call_tool("get_current_data", {"coin": "BTC"})
            forbidden = await session.call_tool("add_coin", {"coin": "BTC"})
        for result, code in ((unknown, "no_data"), (forbidden, "forbidden")):
            assert result.isError
            assert f'"code":"{code}"' in result.content[0].text  # type: ignore[union-attr]
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []

    async def test_calls_are_timed_by_tool_and_outcome(self, server: Server, world: World) -> None:
        async with self.session(server, make_token()) as session:
            await session.call_tool("list_coins", {})
            await session.call_tool("get_current_data", {"coin": "BTC"})
            await session.call_tool("get_current_data", {})
            await session.call_tool("made_up", {})
        metrics: ApiMetrics = world.app.state.metrics
        counts = {
            (tool, outcome): metrics.registry.get_sample_value(
                "cb_trade_mcp_call_seconds_count", {"tool": tool, "outcome": outcome}
            )
            for tool in ("list_coins", "get_current_data", "made_up", "other")
            for outcome in ("ok", "error")
        }
        assert {called: count for called, count in counts.items() if count} == {
            ("list_coins", "ok"): 1,
            # What the tool's own schema refuses is a call, too.
            ("get_current_data", "error"): 2,
            ("other", "error"): 1,
        }

    async def test_without_a_valid_token_there_is_no_session(self, server: Server) -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            for method in ("GET", "POST", "DELETE"):
                for headers in ({}, bearer("nonsense")):
                    response = await http.request(method, f"{server.url}/mcp", headers=headers)
                    assert response.status_code == 401
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert problem(response)["code"] == "unauthorized"

    async def test_there_is_no_stream_to_open(self, server: Server) -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            response = await http.get(f"{server.url}/mcp", headers=bearer())
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
