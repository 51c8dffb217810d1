"""A tiny Crypto.com on loopback whose every word a test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import WSMsgType, web

from domain.candle import Candle
from domain.clock import IClock, http_date

API = "/exchange/v1"
Answer = Callable[[web.Request], web.StreamResponse | Awaitable[web.StreamResponse] | None]


def instrument(symbol: str, *, tradable: bool = True) -> dict[str, Any]:
    base, quote = symbol.split("_")
    return {
        "symbol": symbol,
        "inst_type": "CCY_PAIR",
        "display_name": symbol.replace("_", "/"),
        "base_ccy": base,
        "quote_ccy": quote,
        "quote_decimals": 2,
        "quantity_decimals": 5,
        "price_tick_size": "0.01",
        "qty_tick_size": "0.00001",
        "tradable": tradable,
        "expiry_timestamp_ms": 0,
    }


def row(candle: Candle) -> dict[str, Any]:
    return {
        "o": str(candle.open),
        "h": str(candle.high),
        "l": str(candle.low),
        "c": str(candle.close),
        "v": str(candle.volume),
        "t": candle.timestamp,
    }


class CryptoComServer:
    """Speaks just enough of the protocol; ``clock`` gives the ``Date`` of its answers.

    ``answer`` may replace any REST answer, ``rows`` caps the candles of one (newest first, as the
    exchange does), ``refuse`` maps a channel to the error code that its subscription gets,
    ``acknowledge`` off leaves subscriptions and unsubscriptions unanswered. ``channels`` are what
    each of the ``sockets`` has subscribed to.
    """

    def __init__(self, clock: IClock) -> None:
        self.clock = clock
        self.url = ""
        self.instruments = [instrument("BTC_USD"), instrument("ETH_USDT")]
        self.candles: dict[tuple[str, str], dict[int, Candle]] = {}
        self.book = {"bids": [["99", "1", "1"]], "asks": [["101", "2", "1"]], "t": 1}
        self.rows = 300
        self.dated = True
        self.answer: Answer | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.refuse: dict[str, int] = {}
        self.acknowledge = True
        self.sockets: list[web.WebSocketResponse] = []
        self.channels: list[set[str]] = []
        self.connections = 0
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def asked(self, method: str) -> list[dict[str, str]]:
        """The queries of every request of one method."""
        return [query for path, query in self.requests if path == f"{API}/public/{method}"]

    def put(self, market: str, interval: str, candles: Iterable[Candle]) -> None:
        known = self.candles.setdefault((market.replace("/", "_"), interval), {})
        known.update((candle.timestamp, candle) for candle in candles)

    async def received(self, method: str) -> dict[str, Any]:
        """The next message of that method; others before it are dropped."""
        async with asyncio.timeout(5):
            while (message := await self.messages.get())["method"] != method:
                pass
        return message

    async def send(self, text: str) -> None:
        """Send one frame to every open socket."""
        for ws in self.sockets:
            if not ws.closed:
                await ws.send_str(text)

    async def send_candles(self, market: str, interval: str, *candles: Candle) -> None:
        name = market.replace("/", "_")
        await self.send_result(
            {
                "instrument_name": name,
                "subscription": f"candlestick.{interval}.{name}",
                "channel": "candlestick",
                "interval": interval,
                "data": [row(candle) for candle in candles],
            }
        )

    async def send_book(self, channel: str, data: dict[str, Any]) -> None:
        await self.send_result(
            {
                "instrument_name": "BTC_USD",
                "subscription": "book.BTC_USD.50",
                "channel": channel,
                "depth": 50,
                "data": [data],
            }
        )

    async def send_result(self, result: dict[str, Any]) -> None:
        await self.send(json.dumps({"id": -1, "method": "subscribe", "code": 0, "result": result}))

    async def _rest(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path, dict(request.query)))
        if self.answer is not None:
            answer = self.answer(request)
            if isinstance(answer, web.StreamResponse):
                return answer
            if answer is not None:
                return await answer
        method = request.match_info["method"]
        if method == "get-instruments":
            return ok({"data": self.instruments})
        if method == "get-book":
            return ok({"data": [self.book], "depth": 50})
        return ok({"data": self._rows(request.query), "interval": request.query["timeframe"]})

    def _rows(self, query: Any) -> list[dict[str, Any]]:
        start = int(query.get("start_ts", 0))
        end = int(query.get("end_ts", 10**18))
        known = self.candles.get((query["instrument_name"], query["timeframe"]), {})
        now = self.clock.now_ms()
        found = [known[at] for at in sorted(known) if start <= at < end and at <= now]
        count = min(int(query.get("count", 25)), self.rows)
        return [row(candle) for candle in found[-count:]]

    async def _market(self, request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(timeout=0.1)
        await ws.prepare(request)
        self.connections += 1
        self.sockets.append(ws)
        self.channels.append(set())
        async for frame in ws:
            if frame.type != WSMsgType.TEXT:
                break
            message = frame.json()
            await self._handle(ws, message)
            self.messages.put_nowait(message)
        return ws

    async def _handle(self, ws: web.WebSocketResponse, message: dict[str, Any]) -> None:
        if not self.acknowledge or message["method"] not in ("subscribe", "unsubscribe"):
            return
        channels = message["params"]["channels"]
        held = self.channels[self.sockets.index(ws)]
        if message["method"] == "subscribe":
            held.update(channels)
        else:
            held.difference_update(channels)
        for channel in channels:
            if channel in self.refuse:
                await ws.send_json(
                    {
                        "id": -1,
                        "method": message["method"],
                        "code": self.refuse[channel],
                        "message": "Unknown symbol",
                        "original": json.dumps({"channels": [channel]}),
                    }
                )
                return
        await ws.send_json({"id": message.get("id", -1), "method": message["method"], "code": 0})


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until ``condition`` holds, for at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  ccxt has no event for what it took in
            await asyncio.sleep(0)


def ok(result: dict[str, Any]) -> web.Response:
    return web.json_response({"id": -1, "method": "public/any", "code": 0, "result": result})


@asynccontextmanager
async def running_server(clock: IClock) -> AsyncIterator[CryptoComServer]:
    """Serve on a free port of loopback."""
    server = CryptoComServer(clock)
    app = web.Application()
    app.router.add_get(f"{API}/market", server._market)
    app.router.add_get(f"{API}/public/{{method}}", server._rest)

    async def date(_: web.Request, response: web.StreamResponse) -> None:
        if server.dated:
            response.headers["Date"] = http_date(server.clock.now_ms())
        else:
            response.headers.popall("Date", None)

    app.on_response_prepare.append(date)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        for ws in server.sockets:
            await ws.close()
        await runner.cleanup()
