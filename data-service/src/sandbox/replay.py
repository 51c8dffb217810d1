"""Recorded candles, played at their own times.

Reads candles as freqtrade stores them (``ETH_BTC-5m.feather``), the same columns as CSV, and this
service's own entry documents. A time without a recorded row is a hole. What was recorded is told
as it was recorded; how a candle came about is not known, so its path is made up: from the open to
one extreme, to the other, to the close, seeded, never leaving the recorded range.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from domain.candle import Candle
from domain.entry import Entry
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.time_range import TimeRange
from errors import DataServiceError, InvalidEntry, InvalidRequest
from sandbox.columns import Columns, from_candles
from sandbox.prices import BookMaker, Instrument, IPriceSource, Noise, Trade

_FILE_NAME: Final = re.compile(
    r"(?P<base>[A-Za-z0-9]+)_(?P<quote>[A-Za-z0-9]+)(_[A-Za-z0-9]+)?-(?P<interval>[0-9]+[smhdw])"
    r"(?P<kind>-futures)?\.(feather|csv)"
)
_STEPS_A_CANDLE: Final = 16
_FIRST_EXTREME: Final = 5
_SECOND_EXTREME: Final = 10
_MOST_DECIMALS: Final = 12


class ReplayError(DataServiceError):
    """The recording cannot be played; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class _Tape:
    """One recorded market: its series, the finest of which everything else is made from."""

    instrument: Instrument
    series: Mapping[Interval, Columns]
    finest: Interval
    book: BookMaker
    order: Noise


class ReplayPrices(IPriceSource):
    """Recorded candles of one or more markets; made by ``load_replay``."""

    def __init__(
        self, recorded: Mapping[tuple[str, str, bool], Mapping[Interval, Columns]], seed: int = 1
    ) -> None:
        self._tapes: dict[Instrument, _Tape] = {}
        for (base, quote, spot), series in sorted(recorded.items()):
            finest = min(series)
            columns = series[finest]
            typical = float(np.median(columns.close))
            instrument = Instrument(
                base,
                quote,
                price_decimals=_price_decimals(columns, typical),
                quantity_decimals=8,
                spot=spot,
            )
            self._tapes[instrument] = _Tape(
                instrument,
                series,
                finest,
                BookMaker(seed, instrument, typical, max(1e-6, float(np.median(columns.volume)))),
                Noise(seed, instrument.symbol, "order of extremes"),
            )

    def markets(self) -> Sequence[Instrument]:
        return tuple(self._tapes)

    def offers(self, instrument: Instrument, interval: Interval) -> bool:
        finest = self._tapes[instrument].finest.milliseconds
        return interval.milliseconds % finest == 0

    def history_start(self, instrument: Instrument) -> int:
        tape = self._tapes[instrument]
        return int(tape.series[tape.finest].timestamp[0])

    def candles(
        self, instrument: Instrument, interval: Interval, part: TimeRange
    ) -> Sequence[Candle]:
        if not self.offers(instrument, interval):
            raise InvalidRequest(f"{interval} is finer than what was recorded")
        tape = self._tapes[instrument]
        if interval in tape.series:
            return tape.series[interval].within(part).candles()
        whole = TimeRange(interval.ceil(part.start), interval.ceil(part.end))
        return tape.series[tape.finest].within(whole).aggregate(interval, None).candles()

    def forming(self, instrument: Instrument, interval: Interval, at_ms: int) -> Candle | None:
        if not self.offers(instrument, interval):
            raise InvalidRequest(f"{interval} is finer than what was recorded")
        tape = self._tapes[instrument]
        base = interval if interval in tape.series else tape.finest
        opened, inner = interval.floor(at_ms), base.floor(at_ms)
        parts = tape.series[base].within(TimeRange(opened, inner)).candles()
        rows = tape.series[base].within(TimeRange(inner, inner + 1))
        if len(rows):
            parts.append(_so_far(_path(tape, rows.candle(0), base), rows.candle(0), at_ms))
        return from_candles(parts).aggregate(interval, None).candle(0) if parts else None

    def trades(self, instrument: Instrument, part: TimeRange) -> Sequence[Trade]:
        tape = self._tapes[instrument]
        rows = tape.series[tape.finest].within(TimeRange(tape.finest.floor(part.start), part.end))
        return [
            trade
            for candle in rows.candles()
            for trade in _path(tape, candle, tape.finest)
            if trade.timestamp in part and trade.amount > 0
        ]

    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        tape = self._tapes[instrument]
        columns = tape.series[tape.finest]
        row = max(0, int(np.searchsorted(columns.timestamp, at_ms, side="right")) - 1)
        candle = columns.candle(row)
        price = candle.open
        for trade in _path(tape, candle, tape.finest):
            if trade.timestamp <= at_ms:
                price = trade.price
        return tape.book.book(price, at_ms, depth)


def load_replay(path: Path, seed: int = 1) -> ReplayPrices:
    """Read a recording: one file, or every file of a folder and its subfolders.

    Raises:
        ReplayError: nothing can be read there, a file is malformed, or two files hold the same
            series.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    recorded: dict[tuple[str, str, bool], dict[Interval, Columns]] = {}
    documents: dict[tuple[str, str, Interval], list[Candle]] = {}
    exchanges: dict[tuple[str, str, Interval], str] = {}
    for file in files:
        if file.suffix == ".json":
            _read_document(file, documents, exchanges)
            continue
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            if file == path:
                raise ReplayError(f"{file}: the name needs the form BASE_QUOTE-5m.feather or .csv")
            continue
        try:
            interval = Interval.parse(match["interval"])
        except InvalidRequest as exc:
            raise ReplayError(f"{file}: {exc.message}") from exc
        columns = _read_feather(file) if file.suffix == ".feather" else _read_csv(file)
        market = (match["base"].upper(), match["quote"].upper(), match["kind"] is None)
        _add(recorded, market, interval, _checked(columns, interval, str(file)), str(file))
    for (base, quote, interval), candles in documents.items():
        candles.sort(key=lambda candle: candle.timestamp)
        where = f"the documents of {base}/{quote} {interval}"
        columns = _checked(from_candles(candles), interval, where)
        _add(recorded, (base, quote, True), interval, columns, where)
    if not recorded:
        raise ReplayError(f"{path}: no candles are recorded there")
    return ReplayPrices(recorded, seed)


def _add(
    recorded: dict[tuple[str, str, bool], dict[Interval, Columns]],
    market: tuple[str, str, bool],
    interval: Interval,
    columns: Columns,
    where: str,
) -> None:
    series = recorded.setdefault(market, {})
    if interval in series:
        raise ReplayError(f"{where}: the same series is recorded twice")
    series[interval] = columns


def _read_document(
    file: Path,
    documents: dict[tuple[str, str, Interval], list[Candle]],
    exchanges: dict[tuple[str, str, Interval], str],
) -> None:
    try:
        content = orjson.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise InvalidEntry("is no JSON object")
        entry = Entry.from_document(content)
    except (ValueError, InvalidEntry) as exc:
        raise ReplayError(f"{file}: {exc}") from exc
    base, _, quote = entry.market.partition("/")
    if not quote or ":" in quote:
        raise ReplayError(f"{file}: market {entry.market!r} is no spot market")
    key = (base, quote, entry.series.interval)
    if exchanges.setdefault(key, entry.series.exchange) != entry.series.exchange:
        raise ReplayError(f"{file}: two exchanges recorded {entry.market}, name one's folder")
    documents.setdefault(key, []).append(entry.candle)


def _read_feather(file: Path) -> Columns:
    # Arrow costs a fifth of a second to import, which a sandbox that generates has no use for.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import feather  # noqa: PLC0415

    try:
        table = feather.read_table(file)
        moments = table.column("date").cast(pa.timestamp("ms", tz="UTC"), safe=False)
        return Columns(
            moments.cast(pa.int64()).to_numpy(),
            *(
                table.column(name).cast(pa.float64()).to_numpy()
                for name in ("open", "high", "low", "close", "volume")
            ),
        )
    except (pa.ArrowException, KeyError) as exc:
        raise ReplayError(f"{file}: {exc}") from exc


def _read_csv(file: Path) -> Columns:
    candles = []
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            try:
                candles.append(_csv_candle(row))
            except (KeyError, TypeError, ValueError, InvalidEntry) as exc:
                raise ReplayError(f"{file}: row {len(candles) + 2}: {exc!r}") from exc
    return from_candles(candles)


def _csv_candle(row: Mapping[str, Any]) -> Candle:
    date = str(row["date"])
    if date.isdecimal():
        timestamp = int(date)
    else:
        moment = datetime.fromisoformat(date)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        timestamp = round(moment.timestamp() * 1000)
    return Candle(
        timestamp=timestamp,
        open=float(row["open"]),
        high=float(row["high"]),
        low=float(row["low"]),
        close=float(row["close"]),
        volume=float(row["volume"]),
    )


def _checked(columns: Columns, interval: Interval, where: str) -> Columns:
    if not len(columns):
        raise ReplayError(f"{where}: no candles")
    if (np.diff(columns.timestamp) <= 0).any():
        raise ReplayError(f"{where}: the candles do not ascend by time")
    anchor = interval.floor(0)
    if ((columns.timestamp - anchor) % interval.milliseconds).any():
        raise ReplayError(f"{where}: a candle does not open at a period of {interval}")
    try:
        columns.candles()
    except InvalidEntry as exc:
        raise ReplayError(f"{where}: {exc.message}") from exc
    return columns


def _path(tape: _Tape, candle: Candle, interval: Interval) -> list[Trade]:
    """The made-up trades of a recorded candle; amounts are zero where its volume is."""
    low_first = bool(tape.order.hashes(np.array([candle.timestamp]))[0] & np.uint64(1))
    extremes = (candle.low, candle.high) if low_first else (candle.high, candle.low)
    corners = (
        (0, candle.open),
        (_FIRST_EXTREME, extremes[0]),
        (_SECOND_EXTREME, extremes[1]),
        (_STEPS_A_CANDLE - 1, candle.close),
    )
    share, rest = _shares(candle.volume)
    step_ms = interval.milliseconds / _STEPS_A_CANDLE
    number = candle.timestamp // interval.milliseconds * _STEPS_A_CANDLE
    trades: list[Trade] = []
    for (left, left_price), (right, right_price) in itertools.pairwise(corners):
        for step in range(left if left == 0 else left + 1, right + 1):
            # The corners are told as they were recorded, what lies between is rounded.
            price = right_price if step == right else left_price
            if left < step < right:
                way = (step - left) / (right - left)
                between = left_price + (right_price - left_price) * way
                rounded = round(between, tape.instrument.price_decimals)
                price = min(max(rounded, candle.low), candle.high)
            before = trades[-1].price if trades else candle.open
            trades.append(
                Trade(
                    id=number + step,
                    timestamp=candle.timestamp + math.floor(step * step_ms),
                    price=price,
                    amount=rest if step == _STEPS_A_CANDLE - 1 else share,
                    side="buy" if price >= before else "sell",
                )
            )
    return trades


def _shares(volume: float) -> tuple[float, float]:
    """What each trade but the last, and what the last takes of a candle's volume."""
    exact = Decimal(repr(volume))
    if not exact:
        return 0.0, 0.0
    share = round(exact / _STEPS_A_CANDLE, max(8, 4 - exact.adjusted()))
    rest = exact - share * (_STEPS_A_CANDLE - 1)
    return float(share), float(rest)


def _so_far(path: Sequence[Trade], candle: Candle, at_ms: int) -> Candle:
    """``candle`` as far as its path has come at ``at_ms``."""
    done = [trade for trade in path if trade.timestamp <= at_ms]
    if len(done) == len(path):
        return candle
    prices = [trade.price for trade in done]
    return Candle(
        timestamp=candle.timestamp,
        open=candle.open,
        high=max(prices),
        low=min(prices),
        close=prices[-1],
        volume=float(sum(Decimal(repr(trade.amount)) for trade in done)),
    )


def _price_decimals(columns: Columns, typical: float) -> int:
    """Enough decimals for every recorded price, and for a book of many levels round it."""
    newest: Iterable[float] = columns.close[-500:].tolist()
    written = max(max(0, -int(Decimal(repr(price)).as_tuple().exponent)) for price in newest)
    fine = math.ceil(-math.log10(typical * 1e-6))
    return min(_MOST_DECIMALS, max(2, fine, min(8, written)))
