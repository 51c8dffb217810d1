"""Exchange traffic as it was captured: what really came, in the order in which it came.

Lines of a capture: ``URL <-> time`` (a connection), ``URL <- time: json`` (sent), ``URL -> time:
json`` (an answer), ``time: json`` (received). Where nothing was captured, and beside it, traffic of
the same kinds is made up, seeded, by the rules of the exchange: what of a capture the tests use is
all that is made.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.coinbase_messages import time_text
from sandbox.prices import Instrument

Message = dict[str, Any]
BEST = "bookTicker"
"""The one kind of Binance's messages that does not say of which it is: best prices."""
SOURCES = ("generated", "captured") if os.environ.get("CB_TRADE_SAMPLE_DATA") else ("generated",)
"""Where traffic comes from: it is always generated, and captured where there is some."""


@dataclass(frozen=True, slots=True)
class BinanceCapture:
    """``instruments`` by their names there, ``snapshots`` of books by the same; ``messages`` out of
    their envelopes, those that have no time with that of their arrival."""

    instruments: Mapping[str, Instrument]
    snapshots: Mapping[str, Message]
    messages: Sequence[Message]

    def of(self, kind: str, name: str | None = None) -> list[Message]:
        """The messages of one kind, of one instrument or of all."""
        return [
            message
            for message in self.messages
            if message.get("e", BEST) == kind and name in (None, message["s"])
        ]


@dataclass(frozen=True, slots=True)
class CoinbaseCapture:
    """``products`` and ``messages`` of the older Exchange protocol, confirmations left out; those
    that have no time have that of their arrival."""

    products: Sequence[Message]
    messages: Sequence[Message]

    @property
    def told_of(self) -> list[str]:
        """The products that the messages are about."""
        return sorted({message["product_id"] for message in self.messages})

    def of(self, kind: str, product: str | None = None) -> list[Message]:
        """The messages of one kind, of one product or of all."""
        return [
            message
            for message in self.messages
            if message["type"] == kind and product in (None, message["product_id"])
        ]


def binance_capture(source: str) -> BinanceCapture:
    """Binance's traffic from one of the ``SOURCES``."""
    if source == "generated":
        return _generated_binance()
    snapshots = {
        re.findall(r"/depth\?symbol=(\w+)", line.url)[0]: line.document
        for line in _lines("BINANCE.http.0.0")
        if "/depth?" in line.url
    }
    messages = [
        {"E": line.at_ms, **line.document["data"]}
        for line in _lines("BINANCE.ws.1.0")
        if not line.url and "data" in line.document
    ]
    return BinanceCapture(_instruments(), snapshots, messages)


def coinbase_capture(source: str) -> CoinbaseCapture:
    """Coinbase's traffic from one of the ``SOURCES``."""
    if source == "generated":
        return _generated_coinbase()
    (products,) = (line.document for line in _lines("COINBASE.0") if line.way == "->")
    messages = [
        {"time": time_text(line.at_ms), **line.document}
        for line in _lines("COINBASE.ws.28.0")
        if not line.url and line.document["type"] != "subscriptions"
    ]
    return CoinbaseCapture(products, messages)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that holds a document; what was received has neither ``url`` nor ``way``."""

    url: str
    way: str
    at_ms: int
    document: Any


_LINE = re.compile(r"(?:(?P<url>\S+) (?P<way><-|->) )?(?P<time>[0-9.]+): (?P<body>.*)")


def _lines(name: str) -> Iterator[_Line]:
    with (Path(os.environ["CB_TRADE_SAMPLE_DATA"]) / "captures" / name).open() as file:
        for text in file:
            line = _LINE.fullmatch(text.rstrip("\n"))
            if line is not None:
                at_ms = round(float(line["time"]) * 1000)
                yield _Line(line["url"] or "", line["way"] or "", at_ms, json.loads(line["body"]))


def _instruments() -> dict[str, Instrument]:
    pairs = (("NKN", "USDT"), ("BLZ", "ETH"), ("LRC", "BTC"), ("RUNE", "EUR"))
    return {
        f"{base}{quote}": Instrument(base, quote, price_decimals=8, quantity_decimals=8)
        for base, quote in pairs
    }


# -- traffic that is made up ----------------------------------------------------------------------

_BINANCE_START_MS = 1_633_998_510_000
# A little before the end of a minute, so that candles of two are made of what is traded.
_COINBASE_START_MS = 1_618_677_832_000


class _Book:
    """A book that changes at random and never crosses: whole levels round a price that wanders."""

    def __init__(self, rng: random.Random, levels: int) -> None:
        self._rng = rng
        self._levels = levels
        self._middle = 10_000
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}
        self.change()

    def change(self) -> tuple[list[list[str]], list[list[str]]]:
        """Move a little; the bids and asks that changed, with an amount of 0 where one is gone."""
        self._middle += self._rng.randint(-3, 3)
        return self._changed(self.bids, -1), self._changed(self.asks, 1)

    def _changed(self, side: dict[int, int], step: int) -> list[list[str]]:
        wanted = [self._middle + step * at for at in range(1, self._levels + 1)]
        gone = set(side) - set(wanted)
        changed = [price for price in wanted if price not in side or self._rng.random() < 0.05]
        for price in gone:
            del side[price]
        side.update((price, self._rng.randint(1, 900)) for price in changed)
        return _texts({price: side.get(price, 0) for price in (*sorted(gone), *changed)})

    def best(self) -> tuple[list[str], list[str]]:
        """Price and amount of the highest bid and of the lowest ask."""
        (bid,) = _texts({price: self.bids[price] for price in [max(self.bids)]})
        (ask,) = _texts({price: self.asks[price] for price in [min(self.asks)]})
        return bid, ask


def _texts(levels: Mapping[int, int]) -> list[list[str]]:
    return [[f"{price / 1000:.8f}", f"{amount:.8f}"] for price, amount in levels.items()]


def _generated_binance() -> BinanceCapture:
    rng = random.Random(5)
    instruments = _instruments()
    books = {name: _Book(rng, 80) for name in instruments}
    numbers = dict.fromkeys(instruments, 1_000)
    snapshots: dict[str, Message] = {}
    klines: dict[str, Message] = {}
    messages: list[Message] = []
    for tick in range(120):
        at = _BINANCE_START_MS + tick * 100
        for name, book in books.items():
            bids, asks = book.change()
            first, numbers[name] = numbers[name] + 1, numbers[name] + rng.randint(1, 4)
            of = {"E": at, "s": name}
            messages.append(
                {"e": "depthUpdate", **of, "U": first, "u": numbers[name], "b": bids, "a": asks}
            )
            (bid, bid_amount), (ask, ask_amount) = book.best()
            best = {"b": bid, "B": bid_amount, "a": ask, "A": ask_amount}
            messages.append({**of, "u": numbers[name], **best})
            if tick == 3:
                snapshots[name] = {
                    "lastUpdateId": numbers[name],
                    "bids": _texts(dict(sorted(book.bids.items(), reverse=True))),
                    "asks": _texts(dict(sorted(book.asks.items()))),
                }
            if rng.random() < 0.02:
                amount = rng.randint(1, 90)
                klines[name] = _grown(klines.get(name), ask, amount, at, tick)
                trade = {"a": tick, "p": ask, "q": f"{amount:.8f}", "f": tick, "l": tick, "T": at}
                messages.append({"e": "aggTrade", **of, **trade, "m": tick % 2 == 0, "M": True})
                messages.append({"e": "kline", **of, "k": {"s": name, **klines[name]}})
    return BinanceCapture(instruments, snapshots, messages)


def _grown(kline: Message | None, price: str, amount: int, at: int, number: int) -> Message:
    """The candle of the minute after one more trade."""
    opened = at - at % 60_000
    before = kline or {"o": price, "h": price, "l": price, "v": "0", "f": number, "n": 0}
    return {
        "t": opened, "T": opened + 59_999, "i": "1m", "f": before["f"], "L": number,
        "o": before["o"], "c": price, "h": max(before["h"], price, key=float),
        "l": min(before["l"], price, key=float), "v": f"{float(before['v']) + amount:.8f}",
        "n": before["n"] + 1, "x": False, "q": "1.0", "V": "1.0", "Q": "1.0", "B": "0",
    }  # fmt: skip


def _generated_coinbase() -> CoinbaseCapture:
    rng = random.Random(6)
    pairs = [(base, quote) for base in ("SKL", "BAND", "NMR") for quote in ("USD", "EUR")]
    products = [
        {
            "id": f"{base}-{quote}", "base_currency": base, "quote_currency": quote,
            "quote_increment": "0.001", "base_increment": "0.01", "status": "online",
            "trading_disabled": False,
        }
        for base, quote in pairs
    ]  # fmt: skip
    books = {f"{base}-{quote}": _Book(rng, 60) for base, quote in pairs}
    messages: list[Message] = []
    for number, (product, book) in enumerate(books.items()):
        of = {"product_id": product, "time": time_text(_COINBASE_START_MS)}
        levels = {"bids": _texts(book.bids), "asks": _texts(book.asks)}
        messages.append({"type": "snapshot", **of, **levels})
        match, _ = _traded(rng, book, of, number)
        messages.append({**match, "type": "last_match"})
    for tick in range(150):
        for product, book in books.items():
            of = {"product_id": product, "time": time_text(_COINBASE_START_MS + tick * 100)}
            # Both sides at once: between two messages the book would cross.
            changes = [
                [side, *level]
                for side, levels in zip(("buy", "sell"), book.change(), strict=True)
                for level in levels
            ]
            messages.append({"type": "l2update", **of, "changes": changes})
            if rng.random() < 0.1:
                messages += _traded(rng, book, of, 1_000 + tick)
    return CoinbaseCapture(products, messages)


def _traded(rng: random.Random, book: _Book, of: Message, number: int) -> tuple[Message, Message]:
    """A match at the best bid or ask, which tells its maker's side, and the ticker of it, which
    tells its taker's."""
    (bid, _), (ask, _) = book.best()
    maker, taker, price = rng.choice((("buy", "sell", bid), ("sell", "buy", ask)))
    trade = {**of, "trade_id": 880_000 + number, "price": price, "sequence": number}
    size = f"{rng.randint(1, 90)}"
    day = {"open_24h": "10", "volume_24h": "400.5", "low_24h": "9.5", "high_24h": "11"}
    return (
        {"type": "match", **trade, "side": maker, "size": size},
        {
            "type": "ticker", **trade, **day, "best_bid": bid, "best_ask": ask, "side": taker,
            "last_size": size,
        },
    )  # fmt: skip
