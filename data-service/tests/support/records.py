"""Recorded series for end-to-end tests: captured ones where they are, a generated one always."""

from __future__ import annotations

import csv
import os
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from tests.support.market import DAY, MINUTE

Row = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Record:
    """A recorded series: its file, what it is of, and its rows (OHLCV by open in ms)."""

    path: Path
    coin: str
    interval: str
    step: int
    days: int
    rows: dict[int, Row]

    @property
    def folder(self) -> str:
        """The name of the coin's folder in storage."""
        return self.coin.replace("/", "-")

    @property
    def first(self) -> int:
        return min(self.rows)

    @property
    def end(self) -> int:
        return max(self.rows) + self.step

    def between(self, start: int, end: int) -> dict[int, Row]:
        return {at: row for at, row in self.rows.items() if start <= at < end}

    def live_from(self) -> int:
        """A moment, ``days`` after the start, shortly before a hole where the record has one
        there: what is live then is told with its gap."""
        earliest = self.first + self.days * DAY + self.step
        for at in range(earliest + self.step, self.end - 20 * self.step, self.step):
            quiet = at not in self.rows
            if quiet and {at - self.step, at + self.step, at + 2 * self.step} <= set(self.rows):
                return at - self.step + self.step // 2
        return earliest + self.step // 2


def from_sample(name: str, *, days: int) -> Record:
    """A captured series, such as ``ETH_BTC-5m``."""
    path = Path(os.environ["CB_TRADE_SAMPLE_DATA"]) / "candles" / f"{name}.feather"
    market, interval = name.split("-")
    frame = pd.read_feather(path)
    opens = frame["date"].astype("datetime64[ms, UTC]").astype("int64")
    rows = {
        int(row[0]): (float(row[1]), float(row[2]), float(row[3]), float(row[4]), float(row[5]))
        for row in zip(
            opens,
            frame["open"],
            frame["high"],
            frame["low"],
            frame["close"],
            frame["volume"],
            strict=True,
        )
    }
    step = int(interval.removesuffix("m")) * MINUTE
    return Record(path, market.replace("_", "/"), interval, step, days, rows)


def generated(folder: Path) -> Record:
    """Two days of one-minute candles with holes of every kind, as a CSV of our own."""
    rng = random.Random(11)
    start = int(datetime(2021, 2, 27, tzinfo=UTC).timestamp() * 1000)
    rows: dict[int, Row] = {}
    price, quiet_until = 50.0, 0
    for at in range(start, start + 2 * DAY, MINUTE):
        if at < quiet_until:
            continue
        if at > start + MINUTE and rng.random() < 0.03:
            quiet_until = at + rng.randint(1, 4) * MINUTE
            continue
        opened = round(price, 4)
        price = round(max(1.0, price + rng.uniform(-0.2, 0.2)), 4)
        high = round(max(opened, price) + rng.uniform(0, 0.1), 4)
        low = round(min(opened, price) - rng.uniform(0, 0.1), 4)
        rows[at] = (opened, high, low, price, round(rng.uniform(0, 5), 6))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "TEST_BTC-1m.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "open", "high", "low", "close", "volume"])
        for at, row in rows.items():
            writer.writerow([datetime.fromtimestamp(at / 1000, UTC).isoformat(), *row])
    return Record(path, "TEST/BTC", "1m", MINUTE, 1, rows)
