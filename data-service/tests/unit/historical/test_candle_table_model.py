"""Whatever is done in whatever order, the table has just the candles of the sealed days."""

from __future__ import annotations

import shutil
import tempfile
from datetime import date
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from domain.entry import Entry
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from historical.candle_table import CandleTable
from tests.support.entries import BTC
from tests.support.sealing import ALL, HOURLY, day, entries_of, range_of, table_at

SERIES = st.sampled_from([BTC, HOURLY])
# Two years meet in the middle, so that commits are of both.
NUMBERS = st.integers(-4, 5)
CONTENTS = st.tuples(st.integers(0, 3), st.integers(0, 4))


class Sealing(RuleBasedStateMachine):
    """``sealed`` is what should be there, by series and day."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="candles-"))
        self.sealed: dict[Series, dict[date, list[Entry]]] = {BTC: {}, HOURLY: {}}

    @initialize()
    def begin(self) -> None:
        self.table: CandleTable = table_at(self.folder / "candles_delta")

    @rule(series=SERIES, days=st.dictionaries(NUMBERS, CONTENTS, min_size=1, max_size=4))
    def seal(self, series: Series, days: dict[int, tuple[int, int]]) -> None:
        contents = {
            day(at): entries_of(day(at), series=series, seed=seed, count=count)
            for at, (seed, count) in days.items()
        }
        self.table.seal(series, contents)
        self.sealed[series].update(contents)

    @rule(series=SERIES, days=st.sets(NUMBERS, min_size=1, max_size=4))
    def unseal(self, series: Series, days: set[int]) -> None:
        self.table.unseal(series, [day(at) for at in days])
        for at in days:
            self.sealed[series].pop(day(at), None)

    @rule()
    def tidy(self) -> None:
        self.table.tidy()

    @rule()
    def reopen(self) -> None:
        self.table = table_at(self.folder / "candles_delta")

    @rule(series=SERIES, hours=st.tuples(st.integers(-120, 170), st.integers(0, 170)))
    def read_a_part(self, series: Series, hours: tuple[int, int]) -> None:
        start = range_of(day(0)).start + hours[0] * 3_600_000
        wanted = TimeRange(start, start + hours[1] * 3_600_000 + 1)
        found = self.table.read(series, wanted)
        expected = [entry for entry in self.expected(series) if entry.timestamp in wanted]
        assert list(found.candles) == [entry.candle for entry in expected]
        ranges = self.expected_ranges(series).within(wanted)
        assert list(found.ranges) == ranges
        known, stored = self.table.stored(series, wanted)
        assert list(known) == ranges
        assert list(stored) == list(
            RangeSet(TimeRange(entry.timestamp, entry.end) for entry in expected)
        )

    @invariant()
    def the_sealed_days_are_there_and_nothing_else(self) -> None:
        for series in self.sealed:
            ranges, entries = self.table.read_entries(series, ALL)
            assert entries == self.expected(series)
            assert list(ranges) == list(self.expected_ranges(series))
            assert self.table.sealed(series, ALL) == list(ranges)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def expected(self, series: Series) -> list[Entry]:
        return [entry for _, entries in sorted(self.sealed[series].items()) for entry in entries]

    def expected_ranges(self, series: Series) -> RangeSet:
        return RangeSet(range_of(one) for one in self.sealed[series])


TestSealing = Sealing.TestCase
TestSealing.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
