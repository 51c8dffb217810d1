"""The control page: what a test or a person tells the sandbox to do, and what it has counted.

``/_control`` shows the state; ``/_control/faults`` adds, lists and clears faults;
``/_control/clock`` reads and sets the skew; ``/_control/stats`` counts requests. Bodies are
bounded by the application. What is wrong gets a 422 with a message.
"""

from __future__ import annotations

import html
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from aiohttp import web

from errors import InvalidRequest
from sandbox.faults import describe
from sandbox.sockets import Hub
from sandbox.venue import Venue

PREFIX: Final = "/_control"
_SECONDS_KEPT: Final = 3_600
_WIDEST_SKEW_MS: Final = 366 * 86_400_000

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sandbox exchange</title></head>
<body><h1>Sandbox exchange</h1>
<p>A simulated market. Faults are added with <code>POST /_control/faults</code>, listed with
<code>GET</code> and cleared with <code>DELETE</code>.</p>
<pre>{state}</pre></body></html>
"""


@dataclass(slots=True)
class RequestLog:
    """How many requests came, by path and by real second, of which the last hour is kept; how many
    REST requests were of each market; and how each that was answered was answered."""

    by_path: Counter[str] = field(default_factory=Counter)
    by_market: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    seconds: deque[tuple[int, Counter[str]]] = field(
        default_factory=lambda: deque(maxlen=_SECONDS_KEPT)
    )

    def add(self, path: str, real_ms: int) -> None:
        second = real_ms // 1000
        self.by_path[path] += 1
        if not self.seconds or self.seconds[-1][0] != second:
            self.seconds.append((second, Counter()))
        self.seconds[-1][1][path] += 1


class Control:
    """Serves the control page over the running exchange."""

    def __init__(self, venue: Venue, hub: Hub, log: RequestLog, *, source: str) -> None:
        self._venue = venue
        self._hub = hub
        self._log = log
        self._source = source

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get(PREFIX, self._page)
        router.add_get(f"{PREFIX}/faults", self._list_faults)
        router.add_post(f"{PREFIX}/faults", self._add_faults)
        router.add_delete(f"{PREFIX}/faults", self._clear_faults)
        router.add_get(f"{PREFIX}/clock", self._get_clock)
        router.add_post(f"{PREFIX}/clock", self._set_clock)
        router.add_get(f"{PREFIX}/stats", self._get_stats)

    async def _page(self, request: web.Request) -> web.Response:
        state = {
            "source": self._source,
            "markets": [item.symbol for item in self._venue.instruments()],
            "clock": self._clock(),
            "stats": self._stats(),
            "faults": self._venue.faults.describe(),
        }
        if "text/html" not in request.headers.get("Accept", ""):
            return answer(state)
        text = html.escape(orjson.dumps(state, option=orjson.OPT_INDENT_2).decode())
        return web.Response(text=_PAGE.format(state=text), content_type="text/html")

    async def _list_faults(self, _: web.Request) -> web.Response:
        return answer({"faults": self._venue.faults.describe()})

    async def _add_faults(self, request: web.Request) -> web.Response:
        try:
            added = self._venue.faults.add(await _body(request))
        except InvalidRequest as exc:
            return answer({"error": exc.message}, status=422)
        now = self._venue.clock.monotonic()
        return answer({"faults": [describe(fault, now) for fault in added]}, status=201)

    async def _clear_faults(self, request: web.Request) -> web.Response:
        text = request.query.get("id")
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10):
            return answer({"error": "id takes the number of a fault"}, status=422)
        cleared = self._venue.faults.clear(None if text is None else int(text))
        return answer({"cleared": cleared})

    async def _get_clock(self, _: web.Request) -> web.Response:
        return answer(self._clock())

    async def _set_clock(self, request: web.Request) -> web.Response:
        try:
            content = await _body(request)
        except InvalidRequest as exc:
            return answer({"error": exc.message}, status=422)
        skew = content.get("skew_ms") if isinstance(content, dict) and len(content) == 1 else None
        if (
            not isinstance(skew, int)
            or isinstance(skew, bool)
            or not -_WIDEST_SKEW_MS <= skew <= _WIDEST_SKEW_MS
        ):
            message = 'takes {"skew_ms": whole ms ahead of the market, up to a year either way}'
            return answer({"error": message}, status=422)
        self._venue.clock.skew_ms = skew
        return answer(self._clock())

    async def _get_stats(self, _: web.Request) -> web.Response:
        return answer(self._stats())

    def _clock(self) -> dict[str, Any]:
        clock = self._venue.clock
        return {
            "now_ms": clock.now_ms(),
            "real_ms": clock.real_ms(),
            "skew_ms": clock.skew_ms,
            "speed": clock.speed,
        }

    def _stats(self) -> dict[str, Any]:
        return {
            "requests": dict(self._log.by_path),
            "markets": dict(self._log.by_market),
            "statuses": {str(status): count for status, count in self._log.by_status.items()},
            "per_second": [
                {"second": second, "requests": counts.total(), "by_path": dict(counts)}
                for second, counts in self._log.seconds
            ],
            "open_sockets": self._hub.open_sockets,
            "sockets_opened": self._hub.sockets_opened,
            "sockets_dropped_slow": self._hub.sockets_dropped_slow,
            "frames_sent": self._hub.frames_sent,
            "feeds": self._hub.running_feeds,
        }


async def _body(request: web.Request) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(f"the body is no JSON: {exc}") from exc


def answer(content: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
