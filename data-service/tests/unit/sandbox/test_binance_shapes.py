"""The sandbox's messages have the fields, and the kinds of values, of those Binance sent.

The shapes are written down below; where captured traffic is at hand (``CB_TRADE_SAMPLE_DATA``) they
are taken from it as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from sandbox.app import SandboxConfig, running_sandbox
from tests.unit.sandbox.helpers import NOON_MS, clock_at, connected, http_to

Shape = Any
SOURCES = ("written", "captured") if os.environ.get("CB_TRADE_SAMPLE_DATA") else ("written",)

DECIMAL = "decimal text"
LEVELS = [[DECIMAL, DECIMAL]]
SHAPES: dict[str, Shape] = {
    "depth@100ms": {
        "e": "text",
        "E": "integer",
        "s": "text",
        "U": "integer",
        "u": "integer",
        "b": LEVELS,
        "a": LEVELS,
    },
    "bookTicker": {
        "u": "integer",
        "s": "text",
        "b": DECIMAL,
        "B": DECIMAL,
        "a": DECIMAL,
        "A": DECIMAL,
    },
    "kline_1m": {
        "e": "text",
        "E": "integer",
        "s": "text",
        "k": {
            "t": "integer",
            "T": "integer",
            "s": "text",
            "i": "text",
            "f": "integer",
            "L": "integer",
            "o": DECIMAL,
            "c": DECIMAL,
            "h": DECIMAL,
            "l": DECIMAL,
            "v": DECIMAL,
            "n": "integer",
            "x": "truth",
            "q": DECIMAL,
            "V": DECIMAL,
            "Q": DECIMAL,
            "B": "text",
        },
    },
    "aggTrade": {
        "e": "text",
        "E": "integer",
        "s": "text",
        "a": "integer",
        "p": DECIMAL,
        "q": DECIMAL,
        "f": "integer",
        "l": "integer",
        "T": "integer",
        "m": "truth",
        "M": "truth",
    },
    "/depth": {"lastUpdateId": "integer", "bids": LEVELS, "asks": LEVELS},
}
STREAMS = [name for name in SHAPES if not name.startswith("/")]


def shape_of(value: object) -> Shape:
    """The fields of an object in their order, the one shape of rows, the kind of a value."""
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    if isinstance(value, list):
        items = [shape_of(item) for item in value]
        if not all(isinstance(item, list) for item in items):
            return items
        return [only(items)] if items else []
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "integer"
    assert isinstance(value, str), value
    return DECIMAL if re.fullmatch(r"[0-9]+\.[0-9]{8}", value) else "text"


def only(shapes: Iterable[Shape]) -> Shape:
    """The one shape that ``shapes`` have; an empty list fits any list."""
    found, *others = shapes
    for shape in others:
        found = merged(found, shape)
    return found


def merged(one: Shape, other: Shape) -> Shape:
    if isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        return {name: merged(one[name], other[name]) for name in one}
    if isinstance(one, list) and isinstance(other, list) and not (one and other):
        return one or other
    assert one == other
    return one


@pytest.fixture(scope="module", params=SOURCES)
def shapes(request: pytest.FixtureRequest) -> dict[str, Shape]:
    if request.param == "written":
        return SHAPES
    return captured_shapes(Path(os.environ["CB_TRADE_SAMPLE_DATA"]) / "captures")


@pytest.mark.parametrize("name", STREAMS)
async def test_an_event_has_the_shape_of_binances(name: str, shapes: dict[str, Shape]) -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    seen = []
    async with (
        running_sandbox(config) as sandbox,
        connected(sandbox, f"/stream?streams=btcusdt@{name}") as listener,
    ):
        for _ in range(5):
            message = await listener.message()
            assert list(message) == ["stream", "data"]
            seen.append(shape_of(message["data"]))
    shape = only(seen)
    assert shape == shapes[name]
    assert list(shape) == list(shapes[name])


async def test_a_snapshot_of_a_book_has_the_shape_of_binances(shapes: dict[str, Shape]) -> None:
    async with running_sandbox() as sandbox, http_to(sandbox) as http:
        _, book = await http.get("/api/v3/depth", symbol="ETHBTC", limit=1_000)
    shape = shape_of(book)
    assert shape == shapes["/depth"]
    assert list(shape) == list(shapes["/depth"])


def captured_shapes(folder: Path) -> dict[str, Shape]:
    """The shape of each kind of message in the captures, whose lines are ``time: json``."""
    found: dict[str, list[Shape]] = {}
    for line in (folder / "BINANCE.ws.1.0").read_text().splitlines():
        _, _, text = line.partition(": ")
        if line.startswith("wss://") or not text.startswith('{"stream"'):
            continue
        message = orjson.loads(text)
        kind = message["stream"].partition("@")[2]
        found.setdefault(kind, []).append(shape_of(message["data"]))
    for line in (folder / "BINANCE.http.0.0").read_text().splitlines():
        _, arrow, answer = line.partition(" -> ")
        if arrow and "/depth?" in line[:100]:
            found.setdefault("/depth", []).append(shape_of(orjson.loads(answer.split(": ", 1)[1])))
    return {name: only(shapes) for name, shapes in found.items()}
