"""Faults on demand: what a real exchange does wrong, done when a test asks for it.

A fault knows which requests or frames it is for, how often or how long it acts, and counts what
it hit. Names of instruments and timeframes are compared as any protocol writes them: ``BTC_USD``,
``BTC-USD`` and ``BTC/USD`` are one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from domain.clock import IClock
from errors import InvalidRequest

_REST_FILTERS: Final = frozenset({"path", "instrument", "timeframe"})
_CANDLE_FILTERS: Final = frozenset({"instrument", "timeframe"})
_FRAME_FILTERS: Final = frozenset({"instrument", "timeframe", "channel"})
_FOR_ALL: Final = frozenset({"count", "seconds"})
_FOR_ONE_FRAME: Final = frozenset({"ws_broken_frame", "ws_sequence_gap"})
_MOST_FAULTS: Final = 1_000

# What each kind takes beside ``count`` and ``seconds``, and what it cannot do without.
# ``mute_sockets`` loses frames of any feed on their way; ``ws_sequence_gap`` only such whose reader
# can tell: a book's update that the next one is chained to, or any frame of a connection whose
# frames are numbered. Either way what numbers them has counted them. ``ws_sequence_gap`` and
# ``ws_broken_frame`` hit one frame where no count is asked for.
KINDS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "drop_sockets": (frozenset(), frozenset()),
    "mute_sockets": (_FRAME_FILTERS, frozenset()),
    "rest_status": (_REST_FILTERS | {"status", "retry_after", "body"}, frozenset({"status"})),
    "rest_delay": (_REST_FILTERS | {"delay"}, frozenset({"delay"})),
    "rest_garbage": (_REST_FILTERS | {"body"}, frozenset()),
    "rest_empty": (_REST_FILTERS, frozenset()),
    "rest_missing_rows": (_CANDLE_FILTERS | {"rows", "timestamps"}, frozenset()),
    "rest_hang": (_REST_FILTERS, frozenset()),
    "ws_broken_frame": (_FRAME_FILTERS, frozenset()),
    "ws_sequence_gap": (_FRAME_FILTERS, frozenset()),
    "candle_late": (_CANDLE_FILTERS | {"after_close"}, frozenset({"after_close"})),
    "candle_provisional": (_CANDLE_FILTERS | {"after_close"}, frozenset({"after_close"})),
    "candle_revised": (_CANDLE_FILTERS | {"timestamp", "at", "values"}, frozenset({"timestamp"})),
    "final_update_withheld": (_CANDLE_FILTERS, frozenset()),
    "refuse_connections": (frozenset(), frozenset()),
    "ws_refuse": (frozenset({"status"}), frozenset()),
    "delisted": (frozenset({"instrument"}), frozenset({"instrument"})),
}
_PRICES: Final = ("open", "high", "low", "close", "volume")


@dataclass(eq=False, slots=True)
class Fault:
    """One fault as it was asked for, and what became of it.

    ``seconds`` and ``delay`` are real seconds, ``after_close`` is in market seconds, ``timestamp``
    and ``at`` in market ms. ``cleared`` is set when the fault stops acting for good.
    """

    id: int
    kind: str
    fields: Mapping[str, Any]
    until: float | None = None
    hits: int = 0
    cleared: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def count(self) -> int | None:
        count = self.fields.get("count")
        return None if count is None else int(count)

    def is_active(self, monotonic: float) -> bool:
        """Whether it still acts at ``monotonic`` real seconds."""
        if self.cleared.is_set() or (self.count is not None and self.hits >= self.count):
            return False
        return self.until is None or monotonic < self.until

    def is_for(self, **what: str | None) -> bool:
        """Whether its filters let through what has these names; no filter lets all through."""
        for name, value in what.items():
            wanted = self.fields.get(name)
            if wanted is None:
                continue
            if value is None:
                return False
            if name == "path":
                if wanted not in value:
                    return False
            elif plain_name(wanted) != plain_name(value):
                return False
        return True


class FaultBoard:
    """Every fault asked for since the last clearing, in the order of asking."""

    def __init__(self, clock: IClock) -> None:
        self._clock = clock
        self._faults: list[Fault] = []
        self._next_id = 1
        self._listeners: list[Callable[[Fault], None]] = []

    def on_added(self, listener: Callable[[Fault], None]) -> None:
        """Call ``listener`` with each fault that is added; for faults that act at once."""
        self._listeners.append(listener)

    def add(self, asked: object) -> list[Fault]:
        """Add one fault (an object) or several (a list of objects); all of them or none.

        Raises:
            InvalidRequest: a kind or a field is unknown or wrong; the message says what is right.
        """
        wanted = asked if isinstance(asked, list) else [asked]
        checked = [_checked(item) for item in wanted]
        if len(self._faults) + len(checked) > _MOST_FAULTS:
            raise InvalidRequest(f"no more than {_MOST_FAULTS} faults; clear some first")
        added = []
        for kind, fields in checked:
            seconds = fields.get("seconds")
            fault = Fault(
                id=self._next_id,
                kind=kind,
                fields=fields,
                until=None if seconds is None else self._clock.monotonic() + seconds,
            )
            self._next_id += 1
            self._faults.append(fault)
            added.append(fault)
        for fault in added:
            for listener in self._listeners:
                listener(fault)
        return added

    def clear(self, fault_id: int | None = None) -> int:
        """Forget one fault, or all; returns how many."""
        gone = [fault for fault in self._faults if fault_id is None or fault.id == fault_id]
        for fault in gone:
            fault.cleared.set()
        self._faults = [fault for fault in self._faults if fault not in gone]
        return len(gone)

    def acting(self, kind: str, **what: str | None) -> Iterator[Fault]:
        """The faults of ``kind`` that act now on what has these names; counts nothing."""
        if not self._faults:
            return
        now = self._clock.monotonic()
        for fault in list(self._faults):
            if fault.kind == kind and fault.is_active(now) and fault.is_for(**what):
                yield fault

    def take(self, kind: str, **what: str | None) -> Fault | None:
        """The first fault of ``kind`` that acts on what has these names, counted as a hit."""
        for fault in self.acting(kind, **what):
            fault.hits += 1
            return fault
        return None

    def describe(self) -> list[dict[str, Any]]:
        """Each fault with what it was asked, what it hit and whether it still acts."""
        now = self._clock.monotonic()
        return [describe(fault, now) for fault in self._faults]


def describe(fault: Fault, monotonic: float) -> dict[str, Any]:
    return {
        "id": fault.id,
        "kind": fault.kind,
        **fault.fields,
        "hits": fault.hits,
        "active": fault.is_active(monotonic),
    }


def plain_name(name: str) -> str:
    """A name without case and separators, as far as protocols differ in them."""
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def _checked(asked: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(asked, dict):
        raise InvalidRequest("a fault is a JSON object with a kind")
    fields = dict(asked)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidRequest(f"fault kind {kind!r} does not exist; use one of {', '.join(KINDS)}")
    takes, needs = KINDS[kind]
    allowed = takes | _FOR_ALL
    for name, value in fields.items():
        if name not in allowed:
            raise InvalidRequest(f"{kind} has no field {name!r}; it takes {sorted(allowed)}")
        problem = _problem(name, value)
        if problem is not None:
            raise InvalidRequest(f"{kind}: {name} takes {problem}, got {value!r}")
    if missing := sorted(needs - fields.keys()):
        raise InvalidRequest(f"{kind} needs {', '.join(missing)}")
    if kind in _FOR_ONE_FRAME:
        fields.setdefault("count", 1)
    return kind, fields


def _problem(name: str, value: object) -> str | None:
    """What the field takes, when ``value`` is not that."""
    takes, right = _RULES[name]
    return None if right(value) else takes


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


def _is_values(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(name in _PRICES and _is_number(number, 1e15) for name, number in value.items())
    )


def _is_timestamps(value: object) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= 1_000
        and all(_is_integer(item, 0, 10**15) for item in value)
    )


_RULES: Final[Mapping[str, tuple[str, Callable[[object], bool]]]] = {
    "count": ("a whole number from 1", lambda value: _is_integer(value, 1, 10**9)),
    "seconds": ("real seconds up to 86400", lambda value: _is_number(value, 86_400)),
    "path": ("a part of the path", _is_text),
    "instrument": ("an instrument's name", _is_text),
    "timeframe": ("a timeframe", _is_text),
    "channel": ("a channel's name", _is_text),
    "status": ("an HTTP status from 400 to 599", lambda value: _is_integer(value, 400, 599)),
    "retry_after": ("real seconds up to 86400", lambda value: _is_number(value, 86_400)),
    "body": ("'json' or 'html'", lambda value: value in ("json", "html")),
    "delay": ("real seconds up to 600", lambda value: _is_number(value, 600)),
    "rows": ("a whole number from 1 to 300", lambda value: _is_integer(value, 1, 300)),
    "timestamps": ("a list of period opens in ms", _is_timestamps),
    "after_close": ("market seconds up to 10^7", lambda value: _is_number(value, 1e7)),
    "timestamp": ("the period's open in ms", lambda value: _is_integer(value, 0, 10**15)),
    "at": ("a market time in ms", lambda value: _is_integer(value, 0, 10**15)),
    "values": ("an object of some of open, high, low, close, volume", _is_values),
}
