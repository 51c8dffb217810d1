"""Captured exchange traffic, played to a plugin: what really came, in the order in which it came.

Lines of a capture: ``URL <-> time`` (a connection), ``URL <- time: json`` (sent), ``URL -> time:
json`` (an answer), ``time: json`` (received). Without captured traffic recordings of the same form
are made up, seeded, by the rules of the exchange.

Binance's capture is of combined streams and of aggregated trades; it is played as the single
streams that ccxt asks for, an aggregated trade of one trade as that trade. Coinbase's is of the
older Exchange protocol: it is translated into Advanced Trade's, message by message.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from sandbox import binance_messages
from sandbox.prices import Instrument

Message = dict[str, Any]
_LINE = re.compile(r"(?:(?P<url>\S+) (?P<way><-|->|<->) )?(?P<time>[0-9.]+)(?:: (?P<body>.*))?")
_START_MS = 1_633_998_510_000
_SAMPLES = os.environ.get("CB_TRADE_SAMPLE_DATA") or None


def _lines(name: str) -> Iterator[tuple[str | None, str | None, Any]]:
    """Of each line with a document: its address, which way it went, and the document."""
    assert _SAMPLES is not None
    with (Path(_SAMPLES) / "captures" / name).open() as file:
        for line in file:
            match = _LINE.fullmatch(line.rstrip("\n"))
            if match is not None and match["body"] is not None:
                yield match["url"], match["way"], json.loads(match["body"])


@dataclass(frozen=True, slots=True)
class BinanceCapture:
    """``instruments`` by their names there; ``snapshots`` by the same, ``messages`` as received
    without their envelopes."""

    instruments: Mapping[str, Instrument]
    snapshots: Mapping[str, Message]
    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class CoinbaseCapture:
    """``products`` and ``messages`` of the Exchange protocol, subscriptions left out."""

    products: Sequence[str]
    messages: Sequence[Message]


def binance_capture() -> BinanceCapture:
    """What was captured, or a recording of the same kind."""
    if _SAMPLES is None:
        return _recorded_binance()
    pairs = (("NKN", "USDT"), ("BLZ", "ETH"), ("LRC", "BTC"), ("RUNE", "EUR"))
    snapshots = {}
    for url, way, document in _lines("BINANCE.http.0.0"):
        if way == "->" and "/depth?" in (url or ""):
            snapshots[re.findall(r"symbol=(\w+)", url or "")[0]] = document
    messages = [
        document["data"]
        for url, _, document in _lines("BINANCE.ws.1.0")
        if url is None and "data" in document
    ]
    return BinanceCapture(_instruments(pairs), snapshots, messages)


def coinbase_capture() -> CoinbaseCapture:
    """What was captured, or a recording of the same kind."""
    if _SAMPLES is None:
        return _recorded_coinbase()
    messages = [
        document
        for url, _, document in _lines("COINBASE.ws.28.0")
        if url is None and document["type"] != "subscriptions"
    ]
    products = sorted({message["product_id"] for message in messages})
    return CoinbaseCapture(products, messages)


def _instruments(pairs: Sequence[tuple[str, str]]) -> dict[str, Instrument]:
    return {
        f"{base}{quote}": Instrument(base, quote, price_decimals=8, quantity_decimals=8)
        for base, quote in pairs
    }


# -- recordings where nothing was captured --------------------------------------------------------


class _Book:
    """A book that changes at random and never crosses: whole levels round a price that wanders."""

    def __init__(self, rng: random.Random, levels: int) -> None:
        self._rng = rng
        self._levels = levels
        self._middle = 10_000
        self.sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.change()

    def change(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Move a little; the changed bids and asks, an amount of 0 where a level is gone."""
        self._middle += self._rng.randint(-3, 3)
        changes: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for side, step, told in zip(self.sides, (-1, 1), changes, strict=True):
            wanted = {self._middle + step * at for at in range(1, self._levels + 1)}
            for price in [price for price in side if price not in wanted]:
                del side[price]
                told.append((price, 0))
            for price in sorted(wanted):
                if price not in side or self._rng.random() < 0.05:
                    side[price] = self._rng.randint(1, 900)
                    told.append((price, side[price]))
        return changes


def _texts(levels: Sequence[tuple[int, int]]) -> list[list[str]]:
    return [[f"{price / 1000:.8f}", f"{amount:.8f}"] for price, amount in levels]


def _recorded_binance() -> BinanceCapture:
    rng = random.Random(5)
    instruments = _instruments((("NKN", "USDT"), ("BLZ", "ETH"), ("LRC", "BTC"), ("RUNE", "EUR")))
    snapshots: dict[str, Message] = {}
    messages: list[Message] = []
    books = {name: _Book(rng, 80) for name in instruments}
    numbers = dict.fromkeys(instruments, 1_000)
    for tick in range(120):
        at = _START_MS + tick * 100
        for name, book in books.items():
            bids, asks = book.change()
            first, numbers[name] = numbers[name] + 1, numbers[name] + rng.randint(1, 4)
            messages.append(
                {
                    "e": "depthUpdate", "E": at, "s": name, "U": first, "u": numbers[name],
                    "b": _texts(bids), "a": _texts(asks),
                }
            )  # fmt: skip
            if tick == 3:
                sides = [sorted(side.items(), reverse=not at) for at, side in enumerate(book.sides)]
                snapshots[name] = {
                    "lastUpdateId": numbers[name],
                    "bids": _texts(sides[0]),
                    "asks": _texts(sides[1]),
                }
            (bid, bid_amount), (ask, ask_amount) = (
                max(book.sides[0].items()),
                min(book.sides[1].items()),
            )
            messages.append(
                {
                    "u": numbers[name], "s": name, "b": f"{bid / 1000:.8f}",
                    "B": f"{bid_amount:.8f}", "a": f"{ask / 1000:.8f}", "A": f"{ask_amount:.8f}",
                }
            )  # fmt: skip
        if tick % 40 == 20:
            name = rng.choice(list(instruments))
            messages += _recorded_trade(name, at, tick)
    return BinanceCapture(instruments, snapshots, messages)


def _recorded_trade(name: str, at: int, number: int) -> list[Message]:
    price = "10.00000000"
    kline = {
        "t": at - at % 60_000, "T": at - at % 60_000 + 59_999, "s": name, "i": "1m", "f": number,
        "L": number, "o": price, "c": price, "h": price, "l": price, "v": "58.00000000", "n": 1,
        "x": False, "q": "580.00000000", "V": "58.00000000", "Q": "580.00000000", "B": "0",
    }  # fmt: skip
    return [
        {"e": "aggTrade", "E": at, "s": name, "a": number, "p": price, "q": "58.00000000",
         "f": number, "l": number, "T": at, "m": bool(number % 2), "M": True},
        {"e": "kline", "E": at, "s": name, "k": kline},
    ]  # fmt: skip


def _recorded_coinbase() -> CoinbaseCapture:
    rng = random.Random(6)
    products = [f"{base}-{quote}" for base in ("SKL", "BAND", "NMR") for quote in ("USD", "EUR")]
    books = {product: _Book(rng, 60) for product in products}
    messages: list[Message] = [
        {
            "type": "snapshot", "product_id": product,
            "bids": _texts(list(book.sides[0].items())),
            "asks": _texts(list(book.sides[1].items())),
        }
        for product, book in books.items()
    ]  # fmt: skip
    for tick in range(150):
        time = f"2021-04-17T16:43:{tick // 10:02}.{tick % 10}00000Z"
        for product, book in books.items():
            # Both sides at once: between two messages the book would cross.
            changes = [
                [side, *level]
                for side, levels in zip(("buy", "sell"), book.change(), strict=True)
                for level in _texts(levels)
            ]
            messages.append(
                {"type": "l2update", "product_id": product, "changes": changes, "time": time}
            )
        if tick % 3 == 0:
            product, side = rng.choice(products), rng.choice(("buy", "sell"))
            trade = {
                "trade_id": 880_000 + tick, "product_id": product, "price": "10.01",
                "time": time, "sequence": tick,
            }  # fmt: skip
            messages.append({"type": "match", "side": side, "size": "0.25", **trade})
            messages.append(
                {
                    "type": "ticker", **trade, "open_24h": "10", "volume_24h": "400.5",
                    "low_24h": "9.5", "high_24h": "11", "best_bid": "10.00", "best_ask": "10.02",
                    "side": side, "last_size": "0.25",
                }
            )  # fmt: skip
    return CoinbaseCapture(products, messages)


# -- what ccxt asks for ---------------------------------------------------------------------------


def as_single_stream(message: Message, day: Mapping[str, Message]) -> Message:
    """A message of Binance's capture as the stream that ccxt subscribes tells it.

    Of best bids and asks a ticker is made, whose ``day`` is made up.
    """
    if message.get("e") == "aggTrade":
        assert message["f"] == message["l"]
        return {
            "e": "trade", "E": message["E"], "s": message["s"], "t": message["l"],
            "p": message["p"], "q": message["q"], "T": message["T"], "m": message["m"], "M": True,
        }  # fmt: skip
    if "e" not in message:
        best = {name: message[name] for name in ("s", "b", "B", "a", "A")}
        at = _START_MS + message["u"] % 1_000
        return {"e": "24hrTicker", **day, **best, "E": at, "C": at}
    return message


DAY: Mapping[str, Any] = {
    "p": "-0.5", "P": "-1.250", "w": "10.0", "x": "10.0", "c": "10.25", "Q": "1.0", "o": "10.5",
    "h": "11.5", "l": "9.5", "v": "400.5", "q": "4005.0", "O": 0, "F": 1, "L": 9, "n": 9,
}  # fmt: skip
"""The day of every ticker of Binance that is made of a best bid and ask."""


def as_advanced(message: Message) -> tuple[str, Message] | None:
    """The channel and the event that Advanced Trade has for a message of the Exchange protocol.

    There ``side`` is the maker's, here the taker's. The last match before a subscription is what a
    snapshot begins with, and told by the older protocol as something else.
    """
    product = message["product_id"]
    match message["type"]:
        case "snapshot":
            updates = [
                {"side": side, "price_level": price, "new_quantity": amount}
                for side, levels in (("bid", message["bids"]), ("offer", message["asks"]))
                for price, amount in levels
            ]
            return "l2_data", {"type": "snapshot", "product_id": product, "updates": updates}
        case "l2update":
            sides = {"buy": "bid", "sell": "offer"}
            updates = [
                {
                    "side": sides[side],
                    "event_time": message["time"],
                    "price_level": price,
                    "new_quantity": amount,
                }
                for side, price, amount in message["changes"]
            ]
            return "l2_data", {"type": "update", "product_id": product, "updates": updates}
        case "match":
            trade = {
                "trade_id": str(message["trade_id"]),
                "product_id": product,
                "price": message["price"],
                "size": message["size"],
                "time": message["time"],
                "side": "SELL" if message["side"] == "buy" else "BUY",
            }
            return "market_trades", {"type": "update", "trades": [trade]}
        case "ticker":
            change = float(message["price"]) / float(message["open_24h"]) - 1
            ticker = {
                "type": "ticker",
                "product_id": product,
                "price": message["price"],
                "volume_24_h": message["volume_24h"],
                "low_24_h": message["low_24h"],
                "high_24_h": message["high_24h"],
                "price_percent_chg_24_h": str(change * 100),
                "best_bid": message["best_bid"],
                "best_ask": message["best_ask"],
            }
            return "ticker", {"type": "update", "tickers": [ticker]}
    return None


# -- the exchange that plays them ----------------------------------------------------------------


@dataclass
class Replay:
    """An exchange on loopback that plays a capture once all that a test wants is subscribed.

    ``left_out`` counts messages from the first that is not told, and keeps its number.
    """

    wanted: int
    url: str = ""
    left_out: int | None = None
    subscribed: set[str] = field(default_factory=set)

    def restart(self) -> None:
        """Play everything again, whole, to who subscribes next."""
        self.left_out = None
        self.subscribed.clear()


class BinanceReplay(Replay):
    """Binance's side of it."""

    def __init__(self, capture: BinanceCapture, wanted: int) -> None:
        super().__init__(wanted)
        self._capture = capture

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v3/exchangeInfo", self._exchange_info)
        router.add_get("/api/v3/depth", self._depth)
        router.add_get("/ws/{number}", self._socket)

    async def _exchange_info(self, _: web.Request) -> web.Response:
        instruments = list(self._capture.instruments.values())
        return web.json_response(binance_messages.exchange_info(instruments, _START_MS))

    async def _depth(self, request: web.Request) -> web.Response:
        return web.json_response(self._capture.snapshots[request.query["symbol"]])

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for frame in ws:
            if frame.type != WSMsgType.TEXT:
                break
            asked = frame.json()
            await ws.send_json({"result": None, "id": asked["id"]})
            if asked["method"] == "SUBSCRIBE":
                self.subscribed.update(asked["params"])
                if len(self.subscribed) == self.wanted:
                    await self._play(ws)
        return ws

    async def _play(self, ws: web.WebSocketResponse) -> None:
        for number, message in enumerate(self._capture.messages):
            if number != self.left_out:
                await ws.send_json(as_single_stream(message, DAY))
            # As in life: answers to other requests come in between.
            await asyncio.sleep(0)


class CoinbaseReplay(Replay):
    """Coinbase's side of it."""

    def __init__(self, capture: CoinbaseCapture, wanted: int) -> None:
        super().__init__(wanted)
        self._capture = capture

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v3/brokerage/market/products", self._products)
        router.add_get("/", self._socket)

    async def _products(self, _: web.Request) -> web.Response:
        products = [
            {
                "product_id": product,
                "base_currency_id": product.split("-")[0],
                "quote_currency_id": product.split("-")[1],
                "product_type": "SPOT",
                "trading_disabled": False,
                "is_disabled": False,
                "status": "online",
                "base_increment": "0.00000001",
                "quote_increment": "0.00000001",
                "price_increment": "0.00000001",
                "alias_to": [],
            }
            for product in self._capture.products
        ]
        return web.json_response({"products": products, "num_products": len(products)})

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for frame in ws:
            if frame.type != WSMsgType.TEXT:
                break
            asked = frame.json()
            if asked["type"] == "subscribe" and asked["channel"] != "heartbeats":
                self.subscribed.update(
                    f"{asked['channel']} {product}" for product in asked["product_ids"]
                )
                if len(self.subscribed) == self.wanted:
                    await self._play(ws)
        return ws

    async def _play(self, ws: web.WebSocketResponse) -> None:
        number, at = 0, "2021-04-17T16:43:00Z"
        for message in self._capture.messages:
            told = as_advanced(message)
            if told is None:
                continue
            channel, event = told
            at = message.get("time", at)
            if number != self.left_out:
                envelope = {"client_id": "", "timestamp": at, "sequence_num": number}
                await ws.send_json({"channel": channel, **envelope, "events": [event]})
            number += 1


@asynccontextmanager
async def playing(replay: BinanceReplay | CoinbaseReplay) -> AsyncIterator[None]:
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
