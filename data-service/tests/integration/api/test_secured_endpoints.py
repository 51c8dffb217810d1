"""What needs a token, what needs which scope, and what is open to all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import bcrypt
import httpx
import pytest
from structlog.testing import capture_logs

from api.middleware import MAX_BODY_BYTES
from tests.support.api import (
    START,
    World,
    bearer,
    http_client,
    make_entry,
    make_settings,
    make_token,
    make_world,
)
from tests.support.clock import ManualClock

RANGE = {"start": START, "end": START + 1}
READS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/api/v1/coins", {}),
    ("GET", "/api/v1/availability", {"params": {"coin": "BTC"}}),
    ("GET", "/api/v1/current", {"params": {"coin": "BTC"}}),
    ("GET", "/api/v1/history", {"params": {"coin": "BTC", **RANGE}}),
    ("GET", "/api/v1/summary", {"params": {"coin": "BTC", **RANGE}}),
    ("GET", "/api/v1/coverage", {"params": {"coin": "BTC"}}),
]
WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/v1/coins", {"json": {"coin": "ETH"}}),
    ("DELETE", "/api/v1/coins", {"params": {"coin": "BTC"}}),
]
INVALID = [
    "Bearer nonsense",
    "Bearer ",
    "Bearer",
    f"Basic {make_token()}",
    make_token(),
    f"Bearer {make_token(settings=make_settings(auth_secret='x' * 32))}",
    f"Bearer {make_token(settings=make_settings(auth_audience='another service'))}",
    f"Bearer {make_token(clock=ManualClock(1_600_000_000_000))}",
]
PASSWORD = "correct horse"
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


@pytest.fixture
async def world() -> World:
    world = make_world(make_settings(auth_users={"ada": HASH}))
    await world.collection.add_coin("BTC")
    world.history.put([make_entry()])
    return world


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(world) as client:
        yield client


def code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["code"])


@pytest.mark.parametrize(("method", "path", "rest"), READS + WRITES)
class TestSecured:
    async def test_with_a_valid_token_access_is_granted(
        self, client: httpx.AsyncClient, method: str, path: str, rest: dict[str, Any]
    ) -> None:
        response = await client.request(method, path, headers=bearer(), **rest)
        assert response.is_success

    async def test_without_a_token_access_is_refused(
        self, client: httpx.AsyncClient, method: str, path: str, rest: dict[str, Any]
    ) -> None:
        response = await client.request(method, path, **rest)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert code(response) == "unauthorized"

    async def test_with_an_invalid_token_access_is_refused(
        self, client: httpx.AsyncClient, method: str, path: str, rest: dict[str, Any]
    ) -> None:
        for authorization in INVALID:
            headers = {"Authorization": authorization}
            response = await client.request(method, path, headers=headers, **rest)
            assert response.status_code == 401, authorization
            assert response.headers["www-authenticate"] == "Bearer"
            assert code(response) == "unauthorized"

    async def test_a_token_of_another_scope_is_forbidden(
        self,
        client: httpx.AsyncClient,
        world: World,
        method: str,
        path: str,
        rest: dict[str, Any],
    ) -> None:
        needed = "data:read" if method == "GET" else "data:write"
        other = "data:write" if needed == "data:read" else "data:read"
        before = list(world.collection.calls)
        response = await client.request(
            method, path, headers=bearer(make_token(scope=other)), **rest
        )
        assert response.status_code == 403
        assert code(response) == "forbidden"
        assert needed in response.json()["detail"]
        assert world.collection.calls == before
        assert world.history.calls == []


class TestOpen:
    @pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
    async def test_the_revision_of_an_image_is_told_where_there_is_one(self, path: str) -> None:
        for revision in ("4be1c0d", None):
            async with http_client(make_world(make_settings(revision=revision))) as client:
                assert (await client.get(path)).json().get("revision") == revision

    @pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
    async def test_operations_need_no_token(self, client: httpx.AsyncClient, path: str) -> None:
        assert (await client.get(path)).status_code == 200

    async def test_readiness_tells_its_reasons(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        world.health.warnings = ["the disk is nearly full"]
        response = await client.get("/health/ready")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ready",
            "reasons": [],
            "warnings": ["the disk is nearly full"],
        }
        world.health.reasons = ["storage: the disk is full"]
        response = await client.get("/health/ready")
        assert response.status_code == 503
        assert response.json() == {
            "status": "not_ready",
            "reasons": ["storage: the disk is full"],
            "warnings": ["the disk is nearly full"],
        }

    async def test_requests_are_timed_by_route_not_by_path(self, client: httpx.AsyncClient) -> None:
        await client.get("/api/v1/coins", headers=bearer())
        await client.post("/api/v1/coins", json={"coin": "BTC"}, headers=bearer())
        await client.get("/made/up/path")
        await client.request("MADEUP", "/api/v1/coins")
        text = (await client.get("/metrics")).text
        for labels in (
            'method="GET",route="/api/v1/coins",status="200"',
            'method="POST",route="/api/v1/coins",status="200"',
            'method="GET",route="other",status="404"',
            'method="other",route="/api/v1/coins",status="405"',
        ):
            assert f"cb_trade_http_request_seconds_count{{{labels}}} 1.0" in text
        assert "made" not in text.lower()
        assert "BTC" not in text


class TestTokens:
    async def test_a_user_gets_a_token_that_grants_access(self, client: httpx.AsyncClient) -> None:
        form = {"grant_type": "password", "username": "ada", "password": PASSWORD}
        response = await client.post("/auth/token", data=form)
        assert response.status_code == 200
        assert response.headers["cache-control"] == "no-store"
        body = response.json()
        assert body["token_type"] == "bearer"
        assert body["expires_in"] == 3600
        answer = await client.get("/api/v1/coins", headers=bearer(body["access_token"]))
        assert answer.status_code == 200

    @pytest.mark.parametrize("username", ["ada", "eve"])
    async def test_a_wrong_user_or_password_is_unauthorized(
        self, client: httpx.AsyncClient, username: str
    ) -> None:
        form = {"username": username, "password": "wrong"}
        response = await client.post("/auth/token", data=form)
        assert response.status_code == 401
        assert code(response) == "unauthorized"
        assert response.json()["detail"] == "user and password do not fit"

    async def test_a_form_without_password_names_it(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/auth/token", data={"username": "ada"})
        assert response.status_code == 422
        assert response.json()["detail"] == "password is missing"

    async def test_without_users_there_is_no_such_route(self) -> None:
        async with http_client(make_world()) as client:
            response = await client.post("/auth/token", data={})
        assert response.status_code == 404
        assert code(response) == "not_found"


class TestRefusals:
    async def test_an_unknown_path_is_a_problem(self, client: httpx.AsyncClient) -> None:
        with capture_logs() as logs:
            response = await client.get("/api/v2/coins")
        assert response.status_code == 404
        assert code(response) == "not_found"
        # A line as of any request, by no name that a caller made up.
        ((event, level, route),) = [
            (line["event"], line["log_level"], line["route"]) for line in logs
        ]
        assert (event, level, route) == ("request", "info", "other")

    async def test_another_method_is_a_problem_that_names_the_right_ones(
        self, client: httpx.AsyncClient
    ) -> None:
        response = await client.put("/api/v1/history")
        assert response.status_code == 405
        assert code(response) == "method_not_allowed"
        assert response.headers["allow"] == "GET"

    async def test_a_body_that_is_too_large_is_refused_unread(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        async def in_chunks() -> AsyncIterator[bytes]:
            for _ in range(MAX_BODY_BYTES // 1024 + 1):
                yield b" " * 1024

        before = list(world.collection.calls)
        for content in (b" " * (MAX_BODY_BYTES + 1), in_chunks()):
            response = await client.post("/api/v1/coins", content=content, headers=bearer())
            assert response.status_code == 413
            assert code(response) == "payload_too_large"
        assert world.collection.calls == before

    async def test_a_body_of_the_largest_size_is_read(self, client: httpx.AsyncClient) -> None:
        body = b'{"coin": "ETH"}'
        response = await client.post(
            "/api/v1/coins",
            content=body.ljust(MAX_BODY_BYTES),
            headers={**bearer(), "Content-Type": "application/json"},
        )
        assert response.status_code == 201

    @pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("a b\tc", False), ("", False)])
    async def test_an_answer_carries_the_requests_id(
        self, client: httpx.AsyncClient, sent: str, kept: bool
    ) -> None:
        response = await client.get("/health/live", headers={"X-Request-ID": sent})
        received = response.headers["x-request-id"]
        assert (received == sent) is kept
        assert received

    async def test_what_nobody_foresaw_leaks_nothing_and_is_logged_with_its_traceback_once(
        self, client: httpx.AsyncClient, world: World
    ) -> None:
        error = RuntimeError("the password is hunter2")
        world.collection.fail_with = error
        with capture_logs() as logs:
            response = await client.get("/api/v1/coins", headers=bearer())
        assert response.status_code == 500
        assert code(response) == "internal"
        assert "hunter2" not in response.text
        assert [line["exc_info"] for line in logs if line["log_level"] == "error"] == [error]
