"""What one connection may hold, how it ends, and what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect
from structlog.testing import capture_logs

from api.metrics import ApiMetrics
from api.session import Session, SessionLimits
from auth.interfaces import Principal
from tests.support.api import (
    START,
    WAIT_S,
    FakeCollection,
    FakeHistory,
    closed,
    make_entry,
    make_services,
)
from tests.support.clock import ManualClock, settle_loop

NOW_S = 1_700_000_000
BOTH = frozenset({"data:read", "data:write"})


@dataclass
class FakeWebSocket:
    """A client in memory. While ``reading`` is cleared it takes nothing. Once it is ``gone``,
    sending fails as it does on a lost connection: politely once, then as a misuse."""

    inbox: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    outbox: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    told_gone: bool = False
    close_code: int | None = None

    def __post_init__(self) -> None:
        self.reading.set()

    def say(self, message_type: str, **fields: Any) -> None:
        text = json.dumps({"type": message_type, **fields})
        self.inbox.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})

    async def hear(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.outbox.get(), WAIT_S)

    async def receive(self) -> Message:
        return await self.inbox.get()

    async def send_text(self, data: str) -> None:
        await self._ready()
        self.outbox.put_nowait(json.loads(data))

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        await self._ready()
        assert self.close_code is None, "closed twice"
        self.close_code = code

    async def _ready(self) -> None:
        if self.told_gone:
            raise RuntimeError("send after the connection was lost")
        if self.gone:
            self.told_gone = True
            raise WebSocketDisconnect(1006)
        await self.reading.wait()


@dataclass
class Connection:
    """A session that runs."""

    socket: FakeWebSocket
    clock: ManualClock
    collection: FakeCollection
    history: FakeHistory
    registry: CollectorRegistry
    running: asyncio.Task[None]

    async def ended(self) -> None:
        await asyncio.wait_for(asyncio.shield(self.running), WAIT_S)

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"cb_trade_websocket_{name}")


@asynccontextmanager
async def connected(
    *, scopes: frozenset[str] = BOTH, lifetime_s: float = 3600, **limits: Any
) -> AsyncIterator[Connection]:
    clock = ManualClock(NOW_S * 1000)
    collection, history = FakeCollection(clock), FakeHistory(clock)
    registry = CollectorRegistry()
    socket = FakeWebSocket()
    session = Session(
        socket,
        Principal("bot", scopes, NOW_S + lifetime_s),
        make_services(collection, history, clock=clock),
        ApiMetrics(registry),
        limits=SessionLimits(**limits),
    )
    before = asyncio.all_tasks()
    running = asyncio.create_task(session.run())
    try:
        yield Connection(socket, clock, collection, history, registry, running)
    finally:
        socket.reading.set()
        socket.leave()
        await asyncio.wait_for(asyncio.wait([running]), WAIT_S)
        assert asyncio.all_tasks() - before == set(), "the session left tasks behind"
        assert collection.subscriptions == []
        assert history.streaming == 0


class TestLimits:
    async def test_the_last_subscription_that_fits_is_taken_and_the_next_refused(self) -> None:
        async with connected(subscriptions=2) as connection:
            for number in range(3):
                connection.socket.say("subscribe_realtime", coin="BTC", request_id=str(number))
            heard = {message["request_id"]: message for message in await hear_many(connection, 3)}
            assert [heard[str(number)]["type"] for number in range(3)] == [
                "subscribed",
                "subscribed",
                "error",
            ]
            assert heard["2"]["code"] == "too_many_subscriptions"
            assert connection.metric("subscriptions") == 2

            connection.socket.say(
                "unsubscribe_realtime", subscription_id=heard["0"]["subscription_id"]
            )
            assert (await connection.socket.hear())["type"] == "unsubscribed"
            connection.socket.say("subscribe_realtime", coin="ETH")
            assert (await connection.socket.hear())["type"] == "subscribed"

    async def test_a_subscription_that_failed_holds_no_place(self) -> None:
        async with connected(subscriptions=1) as connection:
            for _ in range(3):
                connection.socket.say("subscribe_realtime", coin="NOPE")
                assert (await connection.socket.hear())["code"] == "coin_not_available"

    async def test_two_running_histories_may_not_share_a_request_id(self) -> None:
        async with connected() as connection:
            connection.history.gate.clear()
            for _ in range(2):
                connection.socket.say(
                    "request_historical", coin="BTC", start=0, end=1, request_id="h"
                )
            refused = await connection.socket.hear()
            assert (refused["request_id"], refused["code"]) == ("h", "invalid_request")

    async def test_a_history_that_was_cancelled_part_way_says_how_far_it_came(self) -> None:
        async with connected() as connection:
            connection.history.put([make_entry(START), make_entry(START + 300_000)])
            connection.socket.say(
                "request_historical",
                coin="BTC",
                start=START,
                end=START + 600_000,
                chunk_size=1,
                request_id="h",
            )
            assert (await connection.socket.hear())["index"] == 0
            connection.history.gate.clear()
            # The second chunk may have left before the gate was closed.
            chunks = 1
            connection.socket.say("cancel", request_id="h")
            while (message := await connection.socket.hear())["type"] == "historical_data_chunk":
                chunks += 1
            assert message["type"] == "historical_data_complete"
            assert (message["chunks"], message["count"]) == (chunks, chunks)

    async def test_requests_for_the_newest_candle_wait_for_each_other(self) -> None:
        async with connected(currents=1) as connection:
            connection.history.put([make_entry()])
            for number in range(5):
                connection.socket.say("request_current", coin="BTC", request_id=str(number))
            answered = [message["request_id"] for message in await hear_many(connection, 5)]
            assert answered == ["0", "1", "2", "3", "4"]


class TestScopes:
    @pytest.mark.parametrize(
        ("message_type", "fields"),
        [
            ("subscribe_realtime", {"coin": "BTC"}),
            ("request_historical", {"coin": "BTC", "start": 0, "end": 1}),
            ("request_current", {"coin": "BTC"}),
        ],
    )
    async def test_a_token_that_may_not_read_gets_no_data(
        self, message_type: str, fields: dict[str, Any]
    ) -> None:
        async with connected(scopes=frozenset({"data:write"})) as connection:
            connection.socket.say(message_type, **fields)
            assert (await connection.socket.hear())["code"] == "forbidden"
            assert connection.collection.calls == []
            assert connection.history.calls == []


class TestEnding:
    async def test_the_connection_ends_with_its_token(self) -> None:
        async with connected(lifetime_s=150) as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            await connection.socket.hear()
            await connection.clock.advance(149_999)
            assert not connection.running.done()
            await connection.clock.advance(1)
            await connection.ended()
            assert connection.socket.close_code == 4401
            assert connection.collection.subscriptions == []

    async def test_a_token_that_expired_during_the_handshake_ends_it_at_once(self) -> None:
        async with connected(lifetime_s=0) as connection:
            await connection.ended()
            assert connection.socket.close_code == 4401

    async def test_a_client_that_leaves_is_not_closed_again(self) -> None:
        async with connected() as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            await connection.socket.hear()
            assert connection.metric("connections") == 1
            connection.socket.leave()
            await connection.ended()
            assert connection.socket.close_code is None
            assert connection.metric("connections") == 0
            assert connection.metric("subscriptions") == 0

    async def test_a_client_that_vanishes_while_being_sent_to_is_gone(self) -> None:
        async with connected() as connection:
            for _ in range(2):
                connection.socket.say("subscribe_realtime", coin="BTC")
                await connection.socket.hear()
            connection.socket.gone = True
            with capture_logs() as logs:
                for subscription in connection.collection.subscriptions:
                    subscription.push(closed())
                await connection.ended()
            assert [line for line in logs if line["log_level"] == "error"] == []
            assert connection.socket.close_code is None

    async def test_a_service_that_stops_closes_with_1012(self) -> None:
        async with connected() as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            await connection.socket.hear()
            connection.running.cancel()
            await asyncio.wait([connection.running])
            assert connection.running.cancelled()
            assert connection.socket.close_code == 1012
            assert connection.collection.subscriptions == []

    async def test_a_client_that_takes_nothing_is_closed_as_slow(self) -> None:
        async with connected(send_timeout_s=0.01) as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            await connection.socket.hear()
            connection.socket.reading.clear()
            [subscription] = connection.collection.subscriptions
            subscription.push(closed())
            await asyncio.wait_for(subscription.closed.wait(), WAIT_S)
            connection.socket.reading.set()
            await connection.ended()
            assert connection.socket.close_code == 1013
            assert connection.metric("slow_consumers_total") == 1

    async def test_a_client_that_does_not_even_take_the_close_is_let_go(self) -> None:
        async with connected(send_timeout_s=0.01, close_timeout_s=0.01) as connection:
            connection.socket.reading.clear()
            connection.socket.say("ping")
            await connection.ended()
            assert connection.socket.close_code is None

    async def test_a_bug_of_the_session_is_logged_and_closes_with_1011(self) -> None:
        async with connected() as connection:
            bug = KeyError("nobody foresaw this")
            with capture_logs() as logs:
                connection.socket.inbox.put_nowait(Broken(bug))
                await connection.ended()
            assert connection.socket.close_code == 1011
            [crash] = [line for line in logs if line["log_level"] == "error"]
            assert bug in crash["exc_info"].exceptions


class TestAnswers:
    async def test_a_crash_behind_one_request_leaves_the_others_alone(self) -> None:
        async with connected() as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            await connection.socket.hear()
            connection.history.fail_with = RuntimeError("the password is hunter2")
            with capture_logs() as logs:
                connection.socket.say("request_current", coin="BTC", request_id="c")
                assert await connection.socket.hear() == {
                    "type": "error",
                    "request_id": "c",
                    "code": "internal",
                    "message": "the service failed; its log says why",
                }
            assert [line["exc_info"] for line in logs] == [connection.history.fail_with]
            [subscription] = connection.collection.subscriptions
            subscription.push(closed())
            assert (await connection.socket.hear())["type"] == "realtime_data"

    async def test_a_slow_request_does_not_hold_up_the_others(self) -> None:
        async with connected() as connection:
            connection.history.gate.clear()
            connection.socket.say("request_historical", coin="BTC", start=0, end=1)
            connection.socket.say("ping", request_id="p")
            assert await connection.socket.hear() == {"type": "pong", "request_id": "p"}

    async def test_nothing_of_a_subscription_follows_its_end(self) -> None:
        async with connected() as connection:
            connection.socket.say("subscribe_realtime", coin="BTC")
            subscription_id = (await connection.socket.hear())["subscription_id"]
            [subscription] = connection.collection.subscriptions
            connection.socket.say("unsubscribe_realtime", subscription_id=subscription_id)
            subscription.push(closed(), closed(START + 300_000))
            messages: list[dict[str, Any]] = []
            while not messages or messages[-1]["type"] != "unsubscribed":
                messages.append(await connection.socket.hear())
            subscription.push(closed(START + 600_000))
            await settle_loop()
            assert connection.socket.outbox.empty()


class Broken(dict[str, Any]):
    """A message that no server sends."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def __getitem__(self, key: str) -> Any:
        raise self._error


async def hear_many(connection: Connection, number: int) -> list[dict[str, Any]]:
    return [await connection.socket.hear() for _ in range(number)]
