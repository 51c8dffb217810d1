"""What a drill does and when: pure data, made from a seed before anything runs.

Times are market ms. Everything that the checker must know, such as which periods are wanted, when
the service and its feed were up, and what the exchange says in the end, comes from here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final

from tests.drills.checker import Revision, Row, Series

MINUTE: Final = 60_000
# A minute of the market takes a real second: a book must be of the same sixth of a second as the
# close of its candle.
SPEED: Final = 60
SECOND: Final = SPEED * 1_000
"""A real second, in market ms."""

# What is wanted before the service is there, and how long after the last fault looks are owed.
BACKFILL_MS: Final = 120 * MINUTE
LOOKS_MS: Final = 62 * MINUTE
# When the first fault comes: everything is set up and live by then.
SETTLING_IN_MS: Final = 12 * SECOND
# How long a killed service takes until it is up again with a live feed, and a feed after a fault.
RESTART_MS: Final = 6 * SECOND
RECONNECT_MS: Final = 3 * SECOND
# A service that starts while REST fails knows no market, and so has no feed, until REST is back;
# a request that hangs is given up after ten seconds.
GIVEN_UP_MS: Final = 10 * SECOND
# How long after its end a candle is revised.
REVISED_AFTER_MS: Final = (20_000, 2 * MINUTE, 7 * MINUTE, 30 * MINUTE, 55 * MINUTE)

Fault = Mapping[str, Any]

# Each comes in its turn, in a new order each round; several in one line come together.
_FEED_FAULTS: Final[tuple[tuple[Fault, ...], ...]] = (
    ({"kind": "drop_sockets"},),
    ({"kind": "mute_sockets", "seconds": 3},),
    ({"kind": "mute_sockets", "seconds": 14},),
    ({"kind": "ws_broken_frame", "count": 2},),
    ({"kind": "ws_refuse", "status": 503, "seconds": 2}, {"kind": "drop_sockets"}),
    ({"kind": "refuse_connections", "seconds": 3}, {"kind": "drop_sockets"}),
)
_REST_FAULTS: Final[tuple[tuple[Fault, ...], ...]] = (
    ({"kind": "rest_status", "status": 429, "retry_after": 1, "seconds": 2},),
    ({"kind": "rest_status", "status": 503, "body": "html", "seconds": 3},),
    ({"kind": "rest_garbage", "seconds": 3},),
    ({"kind": "rest_garbage", "body": "html", "seconds": 2},),
    ({"kind": "rest_empty", "seconds": 3},),
    ({"kind": "rest_delay", "delay": 0.4, "seconds": 4},),
    ({"kind": "rest_hang", "seconds": 3},),
    ({"kind": "rest_missing_rows", "rows": 2, "seconds": 3},),
    ({"kind": "final_update_withheld", "seconds": 5},),
    ({"kind": "candle_late", "after_close": 90, "seconds": 5},),
)


@dataclass(frozen=True, slots=True)
class Form:
    """How long a drill is: kills, and real seconds of faults for each of them."""

    name: str
    kills: int
    seconds_a_kill: int


SHORT: Final = Form("short", kills=5, seconds_a_kill=20)
LONG: Final = Form("long", kills=30, seconds_a_kill=24)


@dataclass(frozen=True, slots=True)
class Timed:
    """A fault, and when it is asked for."""

    at: int
    fault: Fault

    @property
    def over(self) -> int:
        """When it does nothing more."""
        lasts = round(float(self.fault.get("seconds", 0)) * SECOND)
        lasts += GIVEN_UP_MS if self.fault["kind"] == "rest_hang" else 0
        return self.at + lasts + round(float(self.fault.get("after_close", 0)) * 1_000)

    @property
    def is_of_rest(self) -> bool:
        """Whether requests fail while it lasts."""
        return str(self.fault["kind"]).startswith("rest_")

    @property
    def withholds_candles(self) -> bool:
        """Whether closed candles cannot be had while it lasts."""
        return self.is_of_rest or self.fault["kind"] == "candle_late"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that will happen.

    Attributes:
        start: when the market's clock is started.
        faults: by time; a revision is asked for long before it is due.
        kills: when the service is killed, and at once started again.
        revisions: what the exchange says later, by series.
        end: when the last fault is over; the last wanted period closes then.
        down: when the service, or its feed, is not up, or not yet again.
    """

    seed: int
    start: int
    faults: tuple[Timed, ...]
    kills: tuple[int, ...]
    revisions: Mapping[Series, tuple[Revision, ...]]
    end: int
    down: tuple[tuple[int, int], ...]

    @property
    def wanted_from(self) -> int:
        return self.start - BACKFILL_MS

    @property
    def over(self) -> int:
        """When the looks at the last wanted period are over."""
        return self.end + LOOKS_MS

    @property
    def live_from(self) -> int:
        """From when on the service is expected to capture books."""
        return self.start + SETTLING_IN_MS

    def is_up(self, moment: int) -> bool:
        """Whether the service and its feed were up, by the schedule."""
        return self.live_from <= moment < self.end and not any(
            start <= moment < end for start, end in self.down
        )


def make_schedule(
    seed: int, form: Form, recorded: Mapping[Series, Mapping[int, Row]], start: int
) -> Schedule:
    """The schedule of a seed over recorded series, the market's clock starting at ``start``."""
    rng = random.Random(seed)
    begin = start + SETTLING_IN_MS
    slot = form.seconds_a_kill * SECOND
    end = begin + form.kills * slot
    kills = tuple(
        begin + number * slot + round(rng.uniform(0.2, 0.8) * slot) for number in range(form.kills)
    )
    timed: list[Timed] = []
    down: list[tuple[int, int]] = []
    feed, rest = _in_turns(rng, _FEED_FAULTS), _in_turns(rng, _REST_FAULTS)
    # One of the feed and three of REST for each kill and a half, so that every kind has its turn.
    last = end - 15 * SECOND
    for at in _moments(rng, begin, last, max(len(_FEED_FAULTS), form.kills)):
        for fault in next(feed):
            timed.append(Timed(at, fault))
            down.append((at, timed[-1].over + RECONNECT_MS))
    for at in _moments(rng, begin, last, max(len(_REST_FAULTS), 2 * form.kills)):
        timed += [Timed(at, fault) for fault in next(rest)]
    down += [(at, _up_again(at, timed)) for at in kills]
    # The book of a candle that the exchange had not given when the service was killed is gone.
    down += [
        (item.at, kill)
        for kill in kills
        for item in timed
        if item.withholds_candles and item.at < kill < item.over + MINUTE
    ]
    revisions = {
        series: tuple(_revisions(rng, rows, series, begin, end))
        for series, rows in recorded.items()
    }
    for series, revised in revisions.items():
        timed += [
            Timed(
                begin,
                {
                    "kind": "candle_revised",
                    "instrument": series.market,
                    "timeframe": series.interval,
                    "timestamp": revision.timestamp,
                    "at": revision.at,
                    "values": dict(zip(("close", "volume"), revision.row[3:], strict=True)),
                },
            )
            for revision in revised
        ]
    return Schedule(
        seed=seed,
        start=start,
        faults=tuple(sorted(timed, key=lambda item: item.at)),
        kills=kills,
        revisions=revisions,
        end=end,
        down=tuple(sorted(down)),
    )


def _up_again(killed: int, timed: Iterable[Timed]) -> int:
    """When a service that is killed is expected to have a live feed again."""
    up = killed + RESTART_MS
    for item in sorted(timed, key=lambda item: item.at):
        if item.is_of_rest and item.at < up and killed < item.over:
            up = max(up, item.over + RECONNECT_MS)
    return up


def _in_turns(
    rng: random.Random, faults: tuple[tuple[Fault, ...], ...]
) -> Iterator[tuple[Fault, ...]]:
    """Every fault once, in some order, and again, without end."""
    while True:
        yield from rng.sample(faults, len(faults))


def _moments(rng: random.Random, begin: int, end: int, count: int) -> list[int]:
    """``count`` moments, spread over the time."""
    slot = (end - begin) / count
    return [round(begin + (number + rng.random()) * slot) for number in range(count)]


def _revisions(
    rng: random.Random, rows: Mapping[int, Row], series: Series, begin: int, end: int
) -> Iterator[Revision]:
    """A candle in seven is revised, each at one of the distances in turn."""
    # Of periods that open once the revisions are asked for, and close before the drill's end.
    opens = [at for at in sorted(rows) if begin + MINUTE <= at < end - series.step]
    chosen = sorted(rng.sample(opens, len(opens) // 7))
    for at, after in zip(chosen, islice(cycle(REVISED_AFTER_MS), len(chosen)), strict=True):
        opened, high, low, close, volume = rows[at]
        row = (opened, high, low, low if close != low else high, round(volume * 1.5 + 1, 6))
        yield Revision(at, at + series.step + after, row)
