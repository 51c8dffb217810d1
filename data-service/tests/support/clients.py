"""Clients of a real service that remember what they were told: an agent and a subscriber."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from tests.support.market import MINUTE
from tests.support.processes import Feed, Stack
from tests.support.records import Row

PATIENCE_S: Final = 40.0
VALUES: Final = ("open", "high", "low", "close", "volume")


def row_of(candle: dict[str, Any]) -> Row:
    """The values of a candle as messages and documents have them."""
    opened, high, low, close, volume = (float(candle[name]) for name in VALUES)
    return opened, high, low, close, volume


class Agent:
    """An agent with a session of its own, by the official client."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    async def tools(self) -> set[str]:
        """The names of the tools it is offered."""
        return {tool.name for tool in (await self._session.list_tools()).tools}

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """What a tool answers; a failure of it fails the test."""
        result = await self._session.call_tool(tool, arguments)
        assert not result.isError, result.content
        (content,) = result.content
        assert content.type == "text"
        answer: dict[str, Any] = json.loads(content.text)
        return answer


@asynccontextmanager
async def agent(running: Stack, token: str) -> AsyncIterator[Agent]:
    """An agent that is connected for as long as the context lasts."""
    async with (
        running.http(token) as client,
        streamable_http_client(f"{running.url}/mcp", http_client=client) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield Agent(session)


class Subscriber:
    """A client that is told the minutes of one coin.

    What comes is checked as it comes: numbers grow by one, each closed period is the next one, and
    what is late, or corrected, lies before that.
    """

    def __init__(self, feed: Feed, first: int) -> None:
        self.first = first
        self.next_open = first
        self.closed: dict[int, Row] = {}
        self.statuses: list[tuple[str, str]] = []
        self.forming: dict[str, Any] = {"timestamp": 0}
        self._feed = feed
        self._sequence = 0

    async def until_told(self, end: int) -> None:
        """Listen until every period before ``end`` was told, or its gap."""
        async with asyncio.timeout(PATIENCE_S):
            while self.next_open < end:
                await self._hear()

    async def until_closed(self, periods: set[int]) -> None:
        """Listen until the candles of these periods were told, in order or late."""
        async with asyncio.timeout(PATIENCE_S):
            while not periods <= self.closed.keys():
                await self._hear()

    async def until_forming(self, period: int) -> None:
        """Listen until the forming candle of a period, or of a later one, was told."""
        async with asyncio.timeout(PATIENCE_S):
            while self.forming["timestamp"] < period:
                await self._hear()

    async def until_status(self, component: str, state: str) -> None:
        """Listen until this was told of what stands behind the coin."""
        async with asyncio.timeout(PATIENCE_S):
            while (component, state) not in self.statuses:
                await self._hear()

    async def _hear(self) -> None:
        message = await self._feed.next("realtime_data", "gap", "status")
        if message["type"] == "status":
            self.statuses.append((message["component"], message["state"]))
            return
        self._sequence += 1
        assert message["sequence"] == self._sequence
        late = message.get("late", False)
        if message["type"] == "gap":
            start, end = message["start"], message["end"]
        else:
            data = message["data"]
            if not data["closed"]:
                self.forming = data
                return
            start, end = data["timestamp"], data["timestamp"] + MINUTE
            assert start in self.closed or data["revision"] == 1
            late = late or data["revision"] > 1
            self.closed[start] = row_of(data)
        if late:
            assert start < self.next_open
        else:
            assert start == self.next_open
            self.next_open = end


@asynccontextmanager
async def subscriber(
    running: Stack, token: str, coin: str, **resume: int
) -> AsyncIterator[Subscriber]:
    """A client that is subscribed for as long as the context lasts; ``from`` resumes."""
    async with running.websocket(token) as socket:
        feed = Feed(socket)
        await feed.send(type="subscribe_realtime", coin=coin, interval="1m", **resume)
        last_closed = (await feed.next("subscribed"))["last_closed"]
        yield Subscriber(feed, resume.get("from", last_closed + MINUTE))
