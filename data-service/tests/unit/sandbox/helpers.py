"""What the sandbox's tests share: clocks, an unmodified ccxt client, recordings, sockets."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import ccxt.pro
import orjson

from domain.candle import Candle
from domain.clock import MarketClock
from sandbox.app import RunningSandbox

NOON_MS = 1_795_348_800_000
MINUTE = 60_000
PATIENCE_S = 15.0


def clock_at(market_ms: int, speed: float = 1.0) -> MarketClock:
    """A market clock that shows ``market_ms`` now."""
    return MarketClock(origin=time.time_ns() // 1_000_000, market=market_ms, speed=speed)


async def within_patience(ask: Callable[[], Awaitable[Any]]) -> Any:
    """What ``ask`` gives, which it has ``PATIENCE_S`` for."""
    async with asyncio.timeout(PATIENCE_S):
        return await ask()


def redirected(urls: Any, sandbox: RunningSandbox) -> Any:
    """Every address in ``urls`` with the sandbox's scheme and host."""
    if isinstance(urls, dict):
        return {name: redirected(value, sandbox) for name, value in urls.items()}
    if isinstance(urls, str) and "://" in urls:
        parts = urlsplit(urls)
        scheme = "ws" if parts.scheme == "wss" else "http"
        return urlunsplit((scheme, f"127.0.0.1:{sandbox.port}", parts.path, "", ""))
    return urls


@contextlib.asynccontextmanager
async def ccxt_client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    """An unmodified ``ccxt.pro`` client that asks the sandbox."""
    client = ccxt.pro.cryptocom({"enableRateLimit": False})
    client.urls["api"] = redirected(client.urls["api"], sandbox)
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def binance_client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    """A ``ccxt.pro`` client of Binance that asks the sandbox for spot markets."""
    options = {"fetchMarkets": {"types": ["spot"]}}
    client = ccxt.pro.binance({"enableRateLimit": False, "options": options})
    client.urls["api"] = redirected(client.urls["api"], sandbox)
    # It tells spot sockets from others by the text of the address, which loopback has not.
    client.is_spot_url = lambda _: True
    try:
        yield client
    finally:
        await client.close()


class Http:
    """Plain requests to one sandbox."""

    def __init__(self, session: aiohttp.ClientSession, sandbox: RunningSandbox) -> None:
        self._session = session
        self._url = sandbox.url

    async def get(self, path: str, **query: object) -> tuple[int, Any]:
        """The status and the JSON of an answer; its text where it is no JSON."""
        params = {name: str(value) for name, value in query.items()}
        async with self._session.get(self._url + path, params=params) as response:
            body = await response.read()
            try:
                return response.status, orjson.loads(body)
            except orjson.JSONDecodeError:
                return response.status, body.decode()

    async def candles(self, name: str, timeframe: str, **query: object) -> list[dict[str, Any]]:
        status, answer = await self.get(
            "/exchange/v1/public/get-candlestick",
            instrument_name=name,
            timeframe=timeframe,
            **query,
        )
        assert status == 200, answer
        rows: list[dict[str, Any]] = answer["result"]["data"]
        return rows

    async def send(self, verb: str, path: str, content: object = None) -> tuple[int, Any]:
        async with self._session.request(verb, self._url + path, json=content) as response:
            return response.status, orjson.loads(await response.read())

    async def fault(self, **fields: object) -> int:
        """Add a fault and return its number."""
        status, answer = await self.send("POST", "/_control/faults", fields)
        assert status == 201, answer
        return int(answer["faults"][0]["id"])

    async def hits(self, fault_id: int) -> int:
        _, answer = await self.get("/_control/faults")
        return next(int(item["hits"]) for item in answer["faults"] if item["id"] == fault_id)


@contextlib.asynccontextmanager
async def http_to(sandbox: RunningSandbox) -> AsyncIterator[Http]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Http(session, sandbox)


class Listener:
    """A WebSocket client that reads frame by frame."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def ask(self, method: str, *channels: str, **params: object) -> None:
        await self.ws.send_json(
            {"id": 7, "method": method, "params": {"channels": list(channels), **params}}
        )

    async def message(self) -> dict[str, Any]:
        """The next JSON message."""
        async with asyncio.timeout(PATIENCE_S):
            content: dict[str, Any] = orjson.loads(await self.ws.receive_str())
        return content

    async def data(self) -> dict[str, Any]:
        """The ``result`` of the next message that has one."""
        while True:
            message = await self.message()
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result

    async def ended(self) -> None:
        """Wait until the connection is gone."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.ws.receive()).type not in (
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.ERROR,
                aiohttp.WSMsgType.CLOSE,
            ):
                pass


@contextlib.asynccontextmanager
async def listening(
    sandbox: RunningSandbox, *channels: str, **params: object
) -> AsyncIterator[Listener]:
    """A socket that is subscribed to ``channels``."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{sandbox.ws_url}/exchange/v1/market") as ws,
    ):
        listener = Listener(ws)
        if channels:
            await listener.ask("subscribe", *channels, **params)
        yield listener


@contextlib.asynccontextmanager
async def connected(
    sandbox: RunningSandbox, path: str, *, autoping: bool = True
) -> AsyncIterator[Listener]:
    """A socket of ``path``, which may name streams."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{sandbox.ws_url}{path}", autoping=autoping) as ws,
    ):
        yield Listener(ws)


async def eventually(holds: Callable[[], bool]) -> None:
    """Let the loop run until ``holds``."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0)


def recorded_with_holes(
    start: int, length_ms: int, count: int, holes: Sequence[range]
) -> list[Candle]:
    """A series of awkward numbers with holes where ``holes`` say so, one row without volume."""
    missing = {at for hole in holes for at in hole}
    candles = []
    for at in range(count):
        if at in missing:
            continue
        opened = 0.098 + (at * 7919 % 101) * 0.000013
        close = 0.098 + (at * 104729 % 97) * 0.000011
        candles.append(
            Candle(
                timestamp=start + at * length_ms,
                open=opened,
                high=max(opened, close) * 1.0007,
                low=min(opened, close) / 1.0003,
                close=close,
                volume=0.0 if at == 3 else 0.1 * (at % 13 + 1) + 1e-9 * at,
            )
        )
    return candles


def write_csv(path: Path, candles: Sequence[Candle]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "open", "high", "low", "close", "volume"])
        writer.writerows(
            [item.timestamp, *(repr(value) for value in values_of(item))] for item in candles
        )


def values_of(candle: Candle) -> tuple[float, float, float, float, float]:
    return (candle.open, candle.high, candle.low, candle.close, candle.volume)


def row_values(row: dict[str, Any]) -> tuple[float, ...]:
    """Open, high, low, close and volume of a REST row or a frame's candle."""
    return tuple(float(row[name]) for name in ("o", "h", "l", "c", "v"))


@contextlib.asynccontextmanager
async def coinbase_client(sandbox: RunningSandbox) -> AsyncIterator[Any]:
    """A ``ccxt.pro`` client of Coinbase that asks the sandbox, and asks for no currencies."""
    client = ccxt.pro.coinbase({"enableRateLimit": False})
    client.urls["api"] = redirected(client.urls["api"], sandbox)
    client.has["fetchCurrencies"] = False
    try:
        yield client
    finally:
        await client.close()


class CoinbaseListener(Listener):
    """A client of Coinbase's Advanced Trade WebSocket that reads frame by frame."""

    async def send(self, kind: str, channel: str, *products: str) -> None:
        await self.ws.send_json({"type": kind, "channel": channel, "product_ids": list(products)})

    async def frame(self, channel: str) -> dict[str, Any]:
        """The next frame of ``channel``."""
        while True:
            message = await self.message()
            if message.get("channel") == channel:
                return message

    async def event(self, channel: str) -> dict[str, Any]:
        """The only event of the next frame of ``channel``."""
        (event,) = (await self.frame(channel))["events"]
        content: dict[str, Any] = event
        return content


@contextlib.asynccontextmanager
async def coinbase_listening(
    sandbox: RunningSandbox, channel: str | None = None, *products: str
) -> AsyncIterator[CoinbaseListener]:
    """A socket that is subscribed to ``products`` of ``channel``."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{sandbox.ws_url}/") as ws,
    ):
        listener = CoinbaseListener(ws)
        if channel is not None:
            await listener.send("subscribe", channel, *products)
        yield listener
