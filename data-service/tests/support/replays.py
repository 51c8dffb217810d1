"""Exchanges on loopback that play what was captured to whoever subscribes to it.

Binance's capture is of combined streams, of aggregated trades and of best prices. It is played as
the single streams that ccxt asks for: an aggregated trade of one trade as that trade, best prices
as a ticker that holds them. Coinbase's is of the older Exchange protocol: it is translated into
Advanced Trade's, message by message.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import WSMsgType, web

from sandbox import binance_messages
from tests.support.captures import BEST, BinanceCapture, CoinbaseCapture, Message

DAY: Final[Message] = {
    "p": "-0.5", "P": "-1.250", "w": "10.0", "x": "10.0", "c": "10.25", "Q": "1.0", "o": "10.5",
    "h": "11.5", "l": "9.5", "v": "400.5", "q": "4005.0", "O": 0, "F": 1, "L": 9, "n": 9,
}  # fmt: skip
"""What Binance's tickers, which are made of best prices alone, say of the day."""

_BINANCE_STREAMS: Final = {
    "depthUpdate": "depth@100ms",
    "trade": "trade",
    "24hrTicker": "ticker",
    "kline": "kline_1m",
}
_SIDES: Final = {"buy": "bid", "sell": "offer"}


def as_single_stream(message: Message) -> Message:
    """A message of Binance's capture as the stream that ccxt subscribes to tells it."""
    match message.get("e", BEST):
        case "aggTrade":
            assert message["f"] == message["l"], "of several trades the prices are known, no more"
            told = {name: message[name] for name in ("E", "s", "p", "q", "T", "m", "M")}
            return {"e": "trade", "t": message["l"], **told}
        case "bookTicker":
            best = {name: message[name] for name in ("E", "s", "b", "B", "a", "A")}
            return {"e": "24hrTicker", **DAY, **best, "C": message["E"]}
    return message


def as_advanced(message: Message) -> tuple[str, Message]:
    """The channel and the event that Advanced Trade has for a message of the Exchange protocol.

    A match tells its maker's side there as here. The last match before a subscription is here in
    the snapshot that a subscription begins with.
    """
    of = {"product_id": message["product_id"]}
    match message["type"]:
        case "snapshot":
            updates = [
                {"side": side, "price_level": price, "new_quantity": amount}
                for side, levels in (("bid", message["bids"]), ("offer", message["asks"]))
                for price, amount in levels
            ]
            return "level2", {"type": "snapshot", **of, "updates": _timed(updates, message)}
        case "l2update":
            updates = [
                {"side": _SIDES[side], "price_level": price, "new_quantity": amount}
                for side, price, amount in message["changes"]
            ]
            return "level2", {"type": "update", **of, "updates": _timed(updates, message)}
        case "match" | "last_match":
            kind = "update" if message["type"] == "match" else "snapshot"
            trade = {name: message[name] for name in ("price", "size", "time")}
            number, side = str(message["trade_id"]), message["side"].upper()
            trades = [{"trade_id": number, **of, **trade, "side": side}]
            return "market_trades", {"type": kind, "trades": trades}
        case "ticker":
            change = float(message["price"]) / float(message["open_24h"]) - 1
            ticker = {
                "price": message["price"],
                "volume_24_h": message["volume_24h"],
                "low_24_h": message["low_24h"],
                "high_24_h": message["high_24h"],
                "price_percent_chg_24_h": str(change * 100),
                "best_bid": message["best_bid"],
                "best_ask": message["best_ask"],
            }
            tickers = [{"type": "ticker", **of, **ticker}]
            return "ticker", {"type": "update", "tickers": tickers}
    raise ValueError(f"no message of the Exchange protocol: {message}")


def _timed(updates: list[Message], message: Message) -> list[Message]:
    return [{"event_time": message["time"], **update} for update in updates]


class Replay(ABC):
    """One of the exchanges. It plays ``messages`` once, as soon as so many streams as are
    ``wanted`` are subscribed to, and of them only what belongs to these; ``left_out``, one of them,
    is lost on the way.
    """

    def __init__(
        self, messages: Sequence[Message], wanted: int, left_out: Message | None = None
    ) -> None:
        self.url = ""
        self._messages = messages
        self._wanted = wanted
        self._left_out = left_out
        self._subscribed: set[str] = set()

    def play_again(self, wanted: int) -> None:
        """Play everything once more, whole, to who subscribes from now on."""
        self._wanted = wanted
        self._left_out = None
        self._subscribed.clear()

    @abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve what a client asks for."""

    @abstractmethod
    def _answer(self, request: Message) -> Message | None:
        """What a client's message is answered with, if it is."""

    @abstractmethod
    def _asked_for(self, request: Message) -> list[str]:
        """The streams that a client's message subscribes to."""

    @abstractmethod
    def _told(self, message: Message, number: int) -> tuple[str, Message]:
        """The stream that tells a captured message, and how; ``number`` counts what is told."""

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for frame in ws:
            if frame.type != WSMsgType.TEXT:
                break
            asked = frame.json()
            if answer := self._answer(asked):
                await ws.send_json(answer)
            streams = self._asked_for(asked)
            self._subscribed.update(streams)
            if streams and len(self._subscribed) == self._wanted:
                await self._play(ws)
        return ws

    async def _play(self, ws: web.WebSocketResponse) -> None:
        number = 0
        for captured in self._messages:
            stream, message = self._told(captured, number)
            if stream not in self._subscribed:
                continue
            number += 1
            if captured is not self._left_out:
                await ws.send_json(message)
                # As in life: answers to other requests come in between.
                await asyncio.sleep(0)


class BinanceReplay(Replay):
    """Binance. Snapshots of books are answered while ``gives_snapshots`` is set."""

    def __init__(
        self, capture: BinanceCapture, wanted: int, left_out: Message | None = None
    ) -> None:
        super().__init__(capture.messages, wanted, left_out)
        self.gives_snapshots = asyncio.Event()
        self.gives_snapshots.set()
        self._capture = capture

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v3/exchangeInfo", self._exchange_info)
        router.add_get("/api/v3/depth", self._depth)
        router.add_get("/ws/{number}", self._socket)

    async def _exchange_info(self, _: web.Request) -> web.Response:
        instruments = list(self._capture.instruments.values())
        return web.json_response(binance_messages.exchange_info(instruments, now=0))

    async def _depth(self, request: web.Request) -> web.Response:
        await self.gives_snapshots.wait()
        return web.json_response(self._capture.snapshots[request.query["symbol"]])

    def _answer(self, request: Message) -> Message:
        return {"result": None, "id": request["id"]}

    def _asked_for(self, request: Message) -> list[str]:
        return list(request["params"]) if request["method"] == "SUBSCRIBE" else []

    def _told(self, message: Message, number: int) -> tuple[str, Message]:
        del number  # books alone are numbered here, by themselves
        told = as_single_stream(message)
        return f"{told['s'].lower()}@{_BINANCE_STREAMS[told['e']]}", told


class CoinbaseReplay(Replay):
    """Coinbase, as Advanced Trade."""

    def __init__(
        self, capture: CoinbaseCapture, wanted: int, left_out: Message | None = None
    ) -> None:
        super().__init__(capture.messages, wanted, left_out)
        self._capture = capture

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v3/brokerage/market/products", self._products)
        router.add_get("/", self._socket)

    async def _products(self, _: web.Request) -> web.Response:
        products = [
            {
                "product_id": product["id"],
                "product_type": "SPOT",
                "base_currency_id": product["base_currency"],
                "quote_currency_id": product["quote_currency"],
                "base_increment": product["base_increment"],
                "quote_increment": product["quote_increment"],
                "price_increment": product["quote_increment"],
                "status": product["status"],
                "trading_disabled": product["trading_disabled"],
                "is_disabled": False,
                "alias_to": [],
            }
            for product in self._capture.products
        ]
        return web.json_response({"products": products, "num_products": len(products)})

    def _answer(self, request: Message) -> None:
        del request  # what confirms a subscription is nothing that anybody waits for

    def _asked_for(self, request: Message) -> list[str]:
        if request["type"] != "subscribe" or request["channel"] == "heartbeats":
            return []
        return [f"{request['channel']} {product}" for product in request["product_ids"]]

    def _told(self, message: Message, number: int) -> tuple[str, Message]:
        channel, event = as_advanced(message)
        envelope = {
            "channel": "l2_data" if channel == "level2" else channel,
            "client_id": "",
            "timestamp": message["time"],
            "sequence_num": number,
        }
        return f"{channel} {message['product_id']}", {**envelope, "events": [event]}


@asynccontextmanager
async def playing(replay: Replay) -> AsyncIterator[None]:
    """Serve a replay on a free port for as long as the context lasts."""
    app = web.Application()
    replay.add_routes(app.router)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        replay.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
    finally:
        await runner.cleanup()
