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

from tests.drills.checker import Revision, Row, Series, moment_of

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
SETTLING_IN_MS: Final = 18 * SECOND
# How long a killed service takes until it is up again with a live feed, and a feed after a fault.
RESTART_MS: Final = 6 * SECOND
RECONNECT_MS: Final = 3 * SECOND
# A service that starts while REST fails knows no market, and so has no feed, until REST is back;
# a request that hangs is given up after ten seconds.
GIVEN_UP_MS: Final = 10 * SECOND
# A service that is killed is started again after this; in one slot of five it is killed once more
# while it still starts (real seconds).
AGAIN_AFTER_S: Final = (0.2, 2.5)
WHILE_STARTING_S: Final = (0.4, 2.5)
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

# What some starts begin with.
_WHILE_STARTING: Final[Fault] = {"kind": "rest_status", "status": 503, "seconds": 6}
# A fault has at least so much time, or its own length, to find something to hit.
HIT_WITHIN_MS: Final = 3 * SECOND
# And keeps so much from others where it can: the best of so many moments is taken.
APART_MS: Final = 2 * SECOND
TRIES: Final = 30


@dataclass(frozen=True, slots=True)
class Form:
    """How long a drill is: kills of a running service, and real seconds of faults for each."""

    name: str
    kills: int
    seconds_a_kill: int


SHORT: Final = Form("short", kills=5, seconds_a_kill=19)
LONG: Final = Form("long", kills=30, seconds_a_kill=24)


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL at ``at``, and the next start at ``again``."""

    at: int
    again: int


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
        kills: by time; some are of a service that still starts.
        revisions: what the exchange says later, by series.
        end: when the last fault is over.
        down: when the service, or its feed, is not up, or not yet again.
    """

    seed: int
    start: int
    faults: tuple[Timed, ...]
    kills: tuple[Kill, ...]
    revisions: Mapping[Series, tuple[Revision, ...]]
    end: int
    down: tuple[tuple[int, int], ...]

    @property
    def since(self) -> int:
        """What every target is added with."""
        return self.start - BACKFILL_MS

    def wanted(self, series: Series) -> tuple[int, int]:
        """The wanted periods of a series open in ``[start, end)``; the last one closes when the
        last fault is over, or shortly before."""
        return -(-self.since // series.step) * series.step, self.end // series.step * series.step

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
        return self.live_from <= moment < self.over - MINUTE and not any(
            start <= moment < end for start, end in self.down
        )

    def told(self) -> str:
        """Everything but revisions, by time, in real seconds since the market's clock started."""
        events = [
            (item.at, str(dict(item.fault)))
            for item in self.faults
            if item.fault["kind"] != "candle_revised"
        ]
        events += [(kill.at, "SIGKILL") for kill in self.kills]
        events += [(kill.again, "start") for kill in self.kills]
        return "\n".join(
            f"{moment_of(at)}  {(at - self.start) / SECOND:6.1f} s  {what}"
            for at, what in sorted(events)
        )


def make_schedule(
    seed: int, form: Form, recorded: Mapping[Series, Mapping[int, Row]], start: int
) -> Schedule:
    """The schedule of a seed over recorded series, the market's clock starting at ``start``."""
    rng = random.Random(seed)
    begin = start + SETTLING_IN_MS
    slot = form.seconds_a_kill * SECOND
    end = begin + form.kills * slot
    kills = tuple(_kills(rng, form, begin, slot))
    timed: list[Timed] = []
    down: list[tuple[int, int]] = []
    # One of the feed and two of REST for each kill, and every kind at least once.
    feed = _in_turns(rng, _FEED_FAULTS, max(len(_FEED_FAULTS), form.kills))
    rest = _in_turns(rng, _REST_FAULTS, max(len(_REST_FAULTS), 2 * form.kills))
    placing = _Placing(rng, kills, begin, end - 15 * SECOND)
    for faults in feed:
        for item in placing.place(faults):
            timed.append(item)
            down.append((item.at, item.over + RECONNECT_MS))
    for faults in rest:
        timed += placing.place(faults)
    timed += [Timed(kill.at, _WHILE_STARTING) for kill in kills[::3]]
    end = max(end, *(item.over + RECONNECT_MS for item in timed))
    down += [(kill.at, _up_again(kill, timed)) for kill in kills]
    # The book of a candle that the exchange had not given when the service was killed is gone.
    down += [
        (item.at, kill.at)
        for kill in kills
        for item in timed
        if item.withholds_candles and item.at < kill.at < item.over + MINUTE
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


def _kills(rng: random.Random, form: Form, begin: int, slot: int) -> Iterator[Kill]:
    """One kill in each slot, and now and then another one right after it."""
    for number in range(form.kills):
        at = begin + number * slot + round(rng.uniform(0.2, 0.7) * slot)
        again = at + round(rng.uniform(*AGAIN_AFTER_S) * SECOND)
        yield Kill(at, again)
        if number % 5 == 2:
            at = again + round(rng.uniform(*WHILE_STARTING_S) * SECOND)
            yield Kill(at, at + round(rng.uniform(*AGAIN_AFTER_S) * SECOND))


def _up_again(kill: Kill, timed: Iterable[Timed]) -> int:
    """When a service that is killed is expected to have a live feed again."""
    up = kill.again + RESTART_MS
    for item in sorted(timed, key=lambda item: item.at):
        if item.is_of_rest and item.at < up and kill.again < item.over:
            up = max(up, item.over + RECONNECT_MS)
    return up


def _in_turns(
    rng: random.Random, faults: tuple[tuple[Fault, ...], ...], count: int
) -> list[tuple[Fault, ...]]:
    """``count`` of them: every one once, in some order, and again."""
    rounds = (rng.sample(faults, len(faults)) for _ in range(-(-count // len(faults))))
    return [each for round_ in rounds for each in round_][:count]


class _Placing:
    """Finds moments for faults: where they find a service that is up and stays so for a while,
    and where others hide them the least."""

    def __init__(self, rng: random.Random, kills: tuple[Kill, ...], begin: int, end: int) -> None:
        self._rng = rng
        self._kills = kills
        self._begin = begin
        self._end = end
        self._taken: list[tuple[int, int]] = []

    def place(self, faults: tuple[Fault, ...]) -> list[Timed]:
        """Give faults that come together one moment."""
        length = max(item.over - item.at for item in (Timed(0, fault) for fault in faults))
        need = SECOND // 2 + min(HIT_WITHIN_MS, length)
        moments = [
            self._when_up(self._rng.randint(self._begin, self._end), need) for _ in range(TRIES)
        ]
        at = min(moments, key=lambda moment: self._shared(moment, moment + length + APART_MS))
        self._taken.append((at, at + length + APART_MS))
        return [Timed(at, fault) for fault in faults]

    def _when_up(self, at: int, need: int) -> int:
        for kill in self._kills:
            if kill.at - need < at < kill.again + RESTART_MS:
                at = kill.again + RESTART_MS
        return at

    def _shared(self, start: int, end: int) -> int:
        return sum(max(0, min(end, over) - max(start, at)) for at, over in self._taken)


def _revisions(
    rng: random.Random, rows: Mapping[int, Row], series: Series, begin: int, end: int
) -> Iterator[Revision]:
    """A candle in seven is revised, each at one of the distances in turn, and one in five of these
    once more at the last of them; so are a few that closed before the first fault."""
    # Revisions are asked for when the faults begin; a minute later that is done.
    last = REVISED_AFTER_MS[-1]
    before = [at for at in sorted(rows) if begin - last < at <= begin - last // 4 - series.step]
    opens = [at for at in sorted(rows) if begin + MINUTE <= at < end - series.step]
    chosen = sorted(rng.sample(opens, len(opens) // 7))
    plan = [(at, last) for at in rng.sample(before, len(before) // 7)]
    plan = [(at, after) for at, after in plan if at + series.step + after > begin + MINUTE]
    plan += zip(chosen, islice(cycle(REVISED_AFTER_MS), len(chosen)), strict=True)
    for number, (at, after) in enumerate(plan):
        opened, high, low, close, volume = rows[at]
        row = (opened, high, low, low if close != low else high, round(volume * 1.5 + 1, 6))
        yield Revision(at, at + series.step + after, row)
        if number % 5 == 0 and after < last:
            again = (*row[:3], opened, round(volume * 2 + 2, 6))
            yield Revision(at, at + series.step + last, again)
