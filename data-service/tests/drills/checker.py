"""What must be true at the end of a drill, judged by nobody who took part in it.

Nothing of the service is imported here, nor anything that imports it: recordings, documents and
messages are read as anybody would read them who has only been told their formats. Times are
market ms; a period is named by its open. Every function returns what is wrong, as sentences.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

Row = tuple[float, float, float, float, float]
"""Open, high, low, close, volume."""

VALUES: Final = ("open", "high", "low", "close", "volume")
BOOK_DEPTH: Final = 50
BOOK_TOLERANCE_MS: Final = 10_000
_FIELDS: Final = {
    "exchange", "coin", "market", "interval", "timestamp", *VALUES, "order_book", "source",
    "revision", "schema",
}  # fmt: skip
_OPEN_REASONS: Final = ("pending", "unreachable")
_REASONS: Final = (*_OPEN_REASONS, "no_trades", "not_offered")


@dataclass(frozen=True, slots=True)
class Series:
    """One series of the drill; ``step`` is its interval in ms."""

    coin: str
    market: str
    interval: str
    step: int
    exchange: str = "crypto.com"

    def __str__(self) -> str:
        return f"{self.coin} {self.interval}"


@dataclass(frozen=True, slots=True)
class Revision:
    """From ``at`` on the exchange gives ``row`` for a period."""

    timestamp: int
    at: int
    row: Row


@dataclass(frozen=True, slots=True)
class Truth:
    """What the exchange says of each period: what was recorded, then its revisions in order."""

    versions: Mapping[int, tuple[Row, ...]]

    @classmethod
    def of(cls, recorded: Mapping[int, Row], revisions: Iterable[Revision]) -> Truth:
        versions: dict[int, tuple[Row, ...]] = {at: (row,) for at, row in recorded.items()}
        for revision in sorted(revisions, key=lambda revision: revision.at):
            versions[revision.timestamp] += (revision.row,)
        return cls(versions)

    def final(self, start: int, end: int) -> dict[int, Row]:
        """What it says in the end of the periods that open in ``[start, end)``."""
        return {at: rows[-1] for at, rows in self.versions.items() if start <= at < end}


def read_recording(path: Path) -> dict[int, Row]:
    """The rows of a recording, ``.csv`` or ``.feather``, by their open."""
    if path.suffix == ".csv":
        with path.open(newline="") as lines:
            return {
                int(line["date"]): _row(float(line[name]) for name in VALUES)
                for line in csv.DictReader(lines)
            }
    import pyarrow as pa  # noqa: PLC0415  only captured samples are feather
    from pyarrow import feather  # noqa: PLC0415

    table = feather.read_table(path)
    opens = table.column("date").cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64()).to_pylist()
    columns = [table.column(name).to_pylist() for name in VALUES]
    return {at: _row(values) for at, *values in zip(opens, *columns, strict=True)}


def _row(values: Iterable[float]) -> Row:
    opened, high, low, close, volume = values
    return opened, high, low, close, volume


# -- what is stored -------------------------------------------------------------------------


@dataclass(slots=True)
class Stored:
    """What lies on the disk of one series."""

    rows: dict[int, Row] = field(default_factory=dict)
    with_book: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    """Documents and files that break a rule of their own, whatever the exchange says."""


def read_stored(root: Path, series: Series) -> Stored:
    """Read every file below a series' coin, which has no other series."""
    stored = Stored()
    folder = root / "raw_data" / series.exchange / series.coin
    suffix = "" if series.interval == "5m" else f"_{series.interval}"
    name = re.compile(
        rf"(\d{{4}})/(\d\d)/(\d\d)/(\1\2\3\d{{6}}){re.escape(suffix)}\.json", re.ASCII
    )
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        where = path.relative_to(folder).as_posix()
        match = name.fullmatch(where)
        if match is None:
            stored.problems.append(f"{where} is no entry of {series}")
            continue
        moment = datetime.strptime(match[4], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        at = round(moment.timestamp() * 1000)
        try:
            document = json.loads(path.read_bytes())
            wrong = list(_wrong_with(document, series, at))
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            wrong = [f"is not what a document looks like: {exc!r}"]
        if wrong:
            stored.problems += [f"{where} {what}" for what in wrong]
            continue
        stored.rows[at] = _row(float(document[value]) for value in VALUES)
        if document["order_book"] is not None:
            stored.with_book.add(at)
    return stored


def _wrong_with(document: Mapping[str, Any], series: Series, at: int) -> Iterator[str]:
    if document.keys() != _FIELDS:
        yield f"has the fields {sorted(document)}"
        return
    expected = {
        "exchange": series.exchange,
        "coin": series.coin,
        "market": series.market,
        "interval": series.interval,
        "timestamp": at,
        "schema": 1,
    }
    for name, value in expected.items():
        if document[name] != value:
            yield f"says {name} {document[name]!r} and not {value!r}"
    if document["source"] not in ("stream", "rest"):
        yield f"says source {document['source']!r}"
    if not isinstance(document["revision"], int) or document["revision"] < 1:
        yield f"says revision {document['revision']!r}"
    if at % series.step:
        yield f"opens at no period of {series.interval}"
    if document["order_book"] is not None:
        yield from _wrong_with_book(document["order_book"], at + series.step)


def _wrong_with_book(book: Mapping[str, Any], close: int) -> Iterator[str]:
    if abs(book["timestamp"] - close) > BOOK_TOLERANCE_MS:
        yield f"has a book {book['timestamp'] - close} ms from its close"
    for side, falling in (("bids", True), ("asks", False)):
        prices = [price for price, _ in book[side]]
        if not 0 < len(prices) <= BOOK_DEPTH:
            yield f"has a book of {len(prices)} {side}"
        if prices != sorted(set(prices), reverse=falling):
            yield f"has a book with {side} out of order"
        if any(price <= 0 or amount <= 0 for price, amount in book[side]):
            yield f"has a book with {side} that are not above zero"
    if book["bids"] and book["asks"] and book["bids"][0][0] >= book["asks"][0][0]:
        yield "has a book that crosses"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The periods in which what is stored is not what the exchange says."""

    missing: list[int]
    extra: list[int]
    different: list[int]

    def told(self, series: Series) -> list[str]:
        """One sentence for each kind of difference there is."""
        return [
            f"{series}: {len(periods)} {kind}: {', '.join(map(moment_of, periods[:10]))}"
            for kind, periods in (
                ("missing", self.missing),
                ("extra", self.extra),
                ("different", self.different),
            )
            if periods
        ]


def compare(stored: Stored, truth: Truth, start: int, end: int) -> Comparison:
    """Compare the wanted periods, which open in ``[start, end)``, with what was said in the end.

    What is stored outside of them, such as what closed after the drill's last wanted period, may
    be there, but never where the exchange has no candle.
    """
    final = truth.final(start, end)
    return Comparison(
        missing=sorted(final.keys() - stored.rows.keys()),
        extra=sorted(stored.rows.keys() - truth.versions.keys()),
        different=sorted(at for at in final if stored.rows.get(at, final[at]) != final[at]),
    )


def moment_of(at: int) -> str:
    """A time as people read it."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def document_of(root: Path, series: Series, at: int) -> Path:
    """Where the document of a period lies."""
    day, _, moment = moment_of(at).partition(" ")
    suffix = "" if series.interval == "5m" else f"_{series.interval}"
    name = f"{day.replace('-', '')}{moment.replace(':', '')}{suffix}.json"
    return root / "raw_data" / series.exchange / series.coin / day.replace("-", "/") / name


# -- what subscribers were told -------------------------------------------------------------


@dataclass(slots=True)
class Connection:
    """What one subscriber got on one connection: its answer, and every message after it."""

    series: Series
    resumed_from: int | None
    subscribed: Mapping[str, Any] | None = None
    messages: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The first period that it has to be told."""
        if self.resumed_from is not None:
            return self.resumed_from
        if self.subscribed is None:
            raise ValueError("it was never subscribed")
        return int(self.subscribed["last_closed"]) + self.series.step


@dataclass(slots=True)
class Listening:
    """One connection, message by message, and what it is owed next."""

    connection: Connection
    truth: Truth
    gaps_told_to_others: frozenset[int] = frozenset()
    next_open: int = 0
    gaps: dict[int, str] = field(default_factory=dict)
    """Periods told as a gap and not as a candle since, with the newest reason."""
    told: dict[int, tuple[int, Row]] = field(default_factory=dict)
    """Periods told as a candle, with their newest revision and its values."""
    problems: list[str] = field(default_factory=list)

    def hear_all(self) -> None:
        """Judge every message of the connection."""
        connection = self.connection
        if connection.subscribed is None:
            return
        self.next_open = connection.first
        sequence = 0
        for message in connection.messages:
            if message["type"] == "status":
                continue
            if message["type"] not in ("realtime_data", "gap"):
                self._wrong(f"got {message}")
                continue
            sequence += 1
            if message["sequence"] != sequence:
                self._wrong(f"sequence {message['sequence']} came in place of {sequence}")
                sequence = message["sequence"]
            if message["subscription_id"] != connection.subscribed["subscription_id"]:
                self._wrong(f"got a message of subscription {message['subscription_id']}")
            if message["type"] == "gap":
                self._gap(message)
            elif message["data"]["closed"]:
                self._closed(message["data"], late=message.get("late", False))

    def _gap(self, message: Mapping[str, Any]) -> None:
        start, end, reason = message["start"], message["end"], message["reason"]
        step = self.connection.series.step
        if reason not in _REASONS or start >= end or start % step or end % step:
            self._wrong(f"got the gap {message}")
            return
        if message.get("late", False):
            for at in range(start, end, step):
                before = self.gaps.get(at)
                if before is not None:
                    if before not in _OPEN_REASONS:
                        self._wrong(f"the gap at {moment_of(at)} was told late after {before}")
                    self.gaps[at] = reason
                elif at >= self.connection.first or at not in self.gaps_told_to_others:
                    self._wrong(f"a late gap at {moment_of(at)} where none had been told")
            return
        if start != self.next_open:
            self._wrong(f"the gap at {moment_of(start)} came where {self._due} was due")
        self.gaps.update(dict.fromkeys(range(start, end, step), reason))
        self.next_open = max(self.next_open, end)

    def _closed(self, data: Mapping[str, Any], *, late: bool) -> None:
        at, revision = data["timestamp"], data["revision"]
        row = _row(float(data[name]) for name in VALUES)
        if row not in self.truth.versions.get(at, ()):
            self._wrong(f"the candle of {moment_of(at)} is none that the exchange ever gave")
        before = self.told.get(at)
        if late:
            self._late(at)
        elif before is not None:
            if revision <= before[0]:
                self._wrong(f"{moment_of(at)} was told twice: revision {before[0]}, {revision}")
        elif at in self.gaps:
            self._wrong(f"{moment_of(at)} came after its gap and was not late")
        elif at < self.connection.first:
            if revision < 2:
                self._wrong(f"{moment_of(at)} came, which closed before it was subscribed")
        elif at != self.next_open:
            self._wrong(f"{moment_of(at)} came where {self._due} was due")
        self.told[at] = (revision, row)
        if not late:
            self.next_open = max(self.next_open, at + self.connection.series.step)

    def _late(self, at: int) -> None:
        if at in self.told:
            self._wrong(f"{moment_of(at)} was told late after it had been told")
        if self.gaps.pop(at, None) is None and (
            at >= self.connection.first or at not in self.gaps_told_to_others
        ):
            self._wrong(f"{moment_of(at)} was told late where no gap had been told")

    @property
    def _due(self) -> str:
        return moment_of(self.next_open)

    def _wrong(self, what: str) -> None:
        self.problems.append(f"{self.connection.series}: {what}")

    def unlike_the_end(self, until: int) -> list[str]:
        """What somebody who listened until the looks were over knows and the exchange does not
        say, or the other way round; for a connection that lasted as long."""
        start, series = self.connection.first, self.connection.series
        final = self.truth.final(start, until)
        wrong = []
        if self.next_open < until:
            wrong.append(f"{series}: nothing was told from {self._due} on")
        for at in range(start, min(until, self.next_open), series.step):
            row = final.get(at)
            known = self.told[at][1] if at in self.told else None
            if known != row:
                wrong.append(f"{series}: told in the end of {moment_of(at)}: {known} and not {row}")
            elif row is None and self.gaps.get(at) != "no_trades":
                wrong.append(
                    f"{series}: the hole at {moment_of(at)} was told as {self.gaps.get(at)}"
                )
        return wrong


def check_subscriber(
    connections: Sequence[Connection], truth: Truth, told_to_others: frozenset[int], until: int
) -> list[str]:
    """Judge all connections of one subscriber, the last of which lasted until after ``until``."""
    wrong: list[str] = []
    listening: Listening | None = None
    for number, connection in enumerate(connections, 1):
        listening = Listening(connection, truth, told_to_others)
        listening.hear_all()
        wrong += [f"connection {number}: {problem}" for problem in listening.problems]
    if listening is None or listening.connection.subscribed is None:
        return [*wrong, "the last connection was never subscribed"]
    return wrong + listening.unlike_the_end(until)


def gaps_told(connections: Iterable[Connection]) -> frozenset[int]:
    """Every period that was told as a gap on any of these connections."""
    return frozenset(
        at
        for connection in connections
        for message in connection.messages
        if message["type"] == "gap"
        for at in range(message["start"], message["end"], connection.series.step)
    )
