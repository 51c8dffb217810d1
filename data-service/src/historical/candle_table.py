"""The candles of closed UTC days in a Delta table, beside the documents, to be read as columns.

The documents stay the truth. In every version of the table its rows are just the candles of the
sealed days, so that other engines see what this service serves. Everything blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import date
from functools import partial
from itertools import pairwise
from typing import Final

import pyarrow as pa
import structlog

from config import Settings
from domain.entry import Entry
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from errors import InvalidRequest
from historical.candle_columns import (
    CANDLE,
    EVERYTHING,
    SealedCandles,
    candles_of,
    entries_of,
    merged,
    no_rows,
    numbers,
    outside,
    table_of,
)
from historical.candle_files import Change, SealedFile
from historical.candle_log import CandleLog, FileDamaged, Snapshot, WriteConflict, held
from historical.columns import runs_of
from historical.interfaces import CandleTableUnavailable
from historical.sealed_days import DAY_MS, bits_of, bits_within, ranges_of
from storage.path_utility import day_of
from target_management.delta_engine import DeltaEngine
from target_management.place import patient

_TRIES: Final = 5
# What reading costs goes by the file; the running year gets one a day.
_MOST_FILES: Final = 8
_TIME: Final = ("timestamp",)
_EVER: Final = TimeRange(0, 2**62)
# What rewriting a day costs goes by the rows of its file: a year of 1m is in one, of 1s in many.
_FULL_ROWS: Final = 1_000_000

log = structlog.get_logger(__name__)


class CandleTable:
    """One table on a local disk or on Azure. ``prepare`` before use.

    A day is sealed with all its candles, or with none where it has none; a period belongs to the
    day that it opens in. Sealing and unsealing are one commit for a year of a series each: a
    process that is killed leaves a day sealed or not, and nothing in between.

    Several threads may use it; whoever calls sees to it that one process writes at a time, and that
    it says so first (``take_over``). One that writes all the same changes nothing behind another's
    back: its commit is refused. What it unseals is then decided anew by what is there, and what it
    seals is given up, since the documents that it has read may be others by now.

    Every method raises ``CandleTableUnavailable``, ``CandleTableMismatch`` or ``CandleTableError``.
    A data file that is gone or damaged fails nothing: its days count as not sealed.
    """

    def __init__(
        self,
        engine: DeltaEngine,
        uri: str,
        storage_options: dict[str, str] | None,
        *,
        timeout_s: float = 30.0,
    ) -> None:
        self._log = CandleLog(engine, uri, storage_options, timeout_s=timeout_s)
        self._uri = uri
        self._timeout_s = timeout_s
        self._writing = threading.Lock()
        self._damaged: set[str] = set()
        # The version that this process wrote or saw last, and how often others had written since.
        self._version = -1
        self._others = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> CandleTable:
        """The table beside the documents that the settings name."""
        options = settings.candles_options
        return cls(
            DeltaEngine(), settings.candles_path, None if options is None else patient(options)
        )

    def prepare(self) -> bool:
        """Make the table if it is missing, and check its schema; whether it was missing.

        Raises:
            CandleTableMismatch: it has other columns; the message names the difference.
        """
        return self._log.prepare()

    def take_over(self) -> None:
        """Begin to write: what another process was about to commit is refused from now on."""
        with self._one_writer():
            for _ in range(_TRIES):
                with suppress(WriteConflict):
                    self._commit(self._seen(), "take_over", {})
                    return
        raise self._outrun()

    # -- reading ----------------------------------------------------------------------------

    def sealed(self, series: Series, within: TimeRange) -> list[TimeRange]:
        """The parts of ``within`` that lie in sealed days, ascending."""
        return list(self._ranges(self._chosen(series, within), within))

    def stored(
        self, series: Series, within: TimeRange
    ) -> tuple[tuple[TimeRange, ...], tuple[TimeRange, ...]]:
        """The parts of ``within`` that lie in sealed days, and the runs of periods in them that
        have a candle."""
        runs, read = RangeSet(), []
        for year, file in self._chosen(series, within):
            table = self._read(file, _TIME, None if _is_within(file, within) else within)
            if table is not None:
                read.append((year, file))
                for run in runs_of(numbers(table, "timestamp"), series.interval):
                    runs.add(run)
        return tuple(self._ranges(read, within)), tuple(runs)

    def counts(self, series: Series) -> dict[date, int]:
        """How many candles each sealed day has."""
        found = {}
        known, stored = self.stored(series, _EVER)
        for run in known:
            for start in range(run.start, run.end, DAY_MS):
                found[day_of(start)] = 0
        for run in stored:
            for start in range(run.start // DAY_MS * DAY_MS, run.end, DAY_MS):
                part = run.intersect(TimeRange(start, start + DAY_MS))
                found[day_of(start)] += part.length // series.interval.milliseconds
        return found

    def read(self, series: Series, wanted: TimeRange) -> SealedCandles:
        """The candles of the sealed days of a range, as columns."""
        table, ranges = self._rows(series, wanted, CANDLE)
        return candles_of(table, ranges)

    def read_entries(
        self, series: Series, wanted: TimeRange
    ) -> tuple[tuple[TimeRange, ...], list[Entry]]:
        """The parts of a range that lie in sealed days, and their entries without books."""
        table, ranges = self._rows(series, wanted, EVERYTHING)
        return ranges, entries_of(table, series)

    def _rows(
        self, series: Series, wanted: TimeRange, columns: Sequence[str]
    ) -> tuple[pa.Table, tuple[TimeRange, ...]]:
        read = []
        tables = [no_rows(columns)]
        for year, file in self._chosen(series, wanted):
            table = self._read(file, columns, None if _is_within(file, wanted) else wanted)
            if table is not None:
                tables.append(table)
                read.append((year, file))
        return merged(tables), tuple(self._ranges(read, wanted))

    def _chosen(self, series: Series, wanted: TimeRange) -> list[tuple[int, SealedFile]]:
        """The files that have days of ``wanted``, each with its year."""
        return [
            (year, file)
            for year, files in self._log.snapshot().files_of(series).items()
            if (bits := bits_within(wanted, year))
            for file in files
            if file.days & bits and file.path not in self._damaged
        ]

    @staticmethod
    def _ranges(files: Iterable[tuple[int, SealedFile]], within: TimeRange) -> RangeSet:
        return RangeSet(
            run.intersect(within) for year, file in files for run in ranges_of(file.days, year)
        )

    def _read(
        self, file: SealedFile, columns: Sequence[str], wanted: TimeRange | None = None
    ) -> pa.Table | None:
        """Rows of a file, or None where it is damaged, which is told once."""
        if not file.rows:
            return no_rows(columns)
        try:
            return self._log.read(file, columns, wanted)
        except FileDamaged as exc:
            if file.path not in self._damaged:
                log.warning("candle_file_damaged", error=exc.message)
            self._damaged.add(file.path)
            return None

    def known(self, series: Series, days: Iterable[date]) -> set[date]:
        """Which of these days may be sealed, as far as can be told without a look: for who took
        over, and writes alone."""
        seen = self._log.known()
        if seen is None:
            return set(days)
        sealed: dict[int, int] = {}
        for year, files in seen.files_of(series).items():
            for file in files:
                sealed[year] = sealed.get(year, 0) | file.days
        return {day for day in days if sealed.get(day.year, 0) & bits_of([day])}

    # -- writing ----------------------------------------------------------------------------

    @property
    def others(self) -> int:
        """How often it was noticed that somebody else wrote."""
        return self._others

    def seal(
        self,
        series: Series,
        days: Mapping[date, Sequence[Entry]],
        *,
        read_since: int | None = None,
    ) -> None:
        """Seal days with just these entries, ascending, in place of what was sealed of them.

        Durable when it returns; one commit, whatever the years. ``read_since`` is what ``others``
        was before the entries were read.

        Raises:
            InvalidRequest: an entry is of another series or day, or they do not ascend.
            WriteConflict: somebody else wrote since the entries were read; nothing is sealed.
        """
        for day, entries in days.items():
            _check(series, day, entries)
        years: dict[int, list[date]] = {}
        for day in sorted(days):
            years.setdefault(day.year, []).append(day)

        def changes(seen: Snapshot) -> list[Change]:
            files = seen.files_of(series)
            found = []
            for year, mine in years.items():
                bits = bits_of(mine)
                touched = [file for file in files.get(year, ()) if self._is_touched(file, bits)]
                entries = [entry for day in mine for entry in days[day]]
                found.append(self._replaced(series, year, touched, bits, entries))
            return found

        self._write(series, "seal", changes, read_since=read_since)

    def unseal(self, series: Series, days: Iterable[date]) -> None:
        """Make days be read from documents; those that are not sealed change nothing.

        Durable when it returns: call it before a document of a day is replaced.
        """
        wanted = set(days)

        def changes(seen: Snapshot) -> list[Change]:
            found = []
            for year, files in seen.files_of(series).items():
                bits = bits_of(day for day in wanted if day.year == year)
                touched = [file for file in files if file.days & bits]
                if touched:
                    found.append(self._replaced(series, year, touched, bits, None))
            return found

        self._write(series, "unseal", changes)

    def tidy(self) -> None:
        """Merge small files, remove those that nobody reads any more, and clear the log.

        May be cut off anywhere.
        """
        for series in self._log.snapshot().series:
            self._write(series, "merge_files", partial(self._merges, series))
        # Another process that writes all the same leaves the rest to the next time.
        with self._one_writer(), suppress(WriteConflict):
            self._log.tidy()
            # The library's own commits are none of others.
            self._version = self._log.snapshot().version

    def _merges(self, series: Series, seen: Snapshot) -> list[Change]:
        """Past years in as few files as may be; the running one in a few."""
        years = seen.files_of(series)
        newest = max(years)
        return [
            self._replaced(series, year, small, 0, None)
            for year, files in years.items()
            if (small := [file for file in files if file.rows < _FULL_ROWS])
            and len(small) > (_MOST_FILES if year == newest else 1)
        ]

    def _is_touched(self, file: SealedFile, bits: int) -> bool:
        """Whether a file cannot stay as it is when days are sealed anew."""
        return bool(file.days & bits) or not file.days or file.path in self._damaged

    def _replaced(
        self,
        series: Series,
        year: int,
        files: Sequence[SealedFile],
        days: int,
        entries: Sequence[Entry] | None,
    ) -> Change:
        """One file in place of several, in which ``days`` are sealed with ``entries``, or, where
        that is None, not at all."""
        unwanted = list(ranges_of(days, year))
        tables = [] if entries is None else [table_of(entries)]
        sealed = 0 if entries is None else days
        for file in files:
            if file.days & ~days and (table := self._read(file, EVERYTHING)) is not None:
                tables.append(outside(table, unwanted))
                sealed |= file.days & ~days
        added = self._log.write(series, year, sealed, merged(tables)) if sealed else None
        return Change(year, tuple(files), added)

    def _write(
        self,
        series: Series,
        change: str,
        changes: Callable[[Snapshot], Sequence[Change]],
        *,
        read_since: int | None = None,
    ) -> None:
        """Commit what is decided by the newest version, again and again while others are faster."""
        with self._one_writer():
            for _ in range(_TRIES):
                seen = self._seen()
                if read_since is not None and self._others != read_since:
                    raise WriteConflict(
                        f"{self._uri}: another process wrote since the documents of {series} were "
                        f"read"
                    )
                decided = changes(seen)
                if not decided:
                    return
                with suppress(WriteConflict):
                    self._commit(seen, change, {series: decided})
                    return
        raise self._outrun()

    def _seen(self) -> Snapshot:
        """The newest version; notices where this process did not write it."""
        snapshot = self._log.snapshot()
        if snapshot.version != self._version:
            self._version = snapshot.version
            self._others += 1
        return snapshot

    def _commit(
        self, seen: Snapshot, change: str, changes: Mapping[Series, Sequence[Change]]
    ) -> None:
        self._log.commit(seen, change, changes)
        self._version = seen.version + 1

    def _outrun(self) -> CandleTableUnavailable:
        return CandleTableUnavailable(
            f"{self._uri}: another process wrote first {_TRIES} times in a row; let one service "
            f"collect into a root"
        )

    def _one_writer(self) -> AbstractContextManager[None]:
        return held(self._writing, self._timeout_s, f"{self._uri}: another thread writes")


def _is_within(file: SealedFile, wanted: TimeRange) -> bool:
    """Whether every row of a file is one of ``wanted``."""
    return file.times is not None and file.times[0] in wanted and file.times[1] in wanted


def _check(series: Series, day: date, entries: Sequence[Entry]) -> None:
    if any(entry.series != series or day_of(entry.timestamp) != day for entry in entries):
        raise InvalidRequest(f"{day} of {series} is sealed with entries of that day and series")
    if any(later.timestamp <= entry.timestamp for entry, later in pairwise(entries)):
        raise InvalidRequest(f"{day} of {series} is sealed with entries ascending by time")
