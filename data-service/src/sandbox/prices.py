"""Where prices come from: one small interface, and a generator that invents a market.

The generator is a pure function of (seed, market, market time). Any moment is computed on its own,
so a restarted sandbox tells the same past. Amounts and prices are whole numbers of the market's
smallest steps until they leave this module, so that a candle is exactly what its trades add up to.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from domain.time_range import TimeRange
from errors import InvalidRequest
from sandbox.columns import Columns, Floats, Integers, concatenate, from_candles

MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
_MINUTES_A_DAY: Final = 1440
# 2020-01-01T00:00:00Z, the first moment that the generated exchange remembers.
DEFAULT_HISTORY_START_MS: Final = 1_577_836_800_000

Side = Literal["buy", "sell"]
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Instrument:
    """One market of the exchange.

    ``price_decimals`` and ``quantity_decimals`` give its smallest steps: 2 means 0.01.
    """

    base: str
    quote: str
    price_decimals: int
    quantity_decimals: int
    spot: bool = True
    active: bool = True

    @property
    def symbol(self) -> str:
        """The unified symbol: ``BTC/USD``, or ``BTC/USD:USD`` for a perpetual swap."""
        pair = f"{self.base}/{self.quote}"
        return pair if self.spot else f"{pair}:{self.quote}"


@dataclass(frozen=True, slots=True)
class Trade:
    """One trade; ``timestamp`` in ms, ``id`` grows with time within a market."""

    id: int
    timestamp: int
    price: float
    amount: float
    side: Side


class IPriceSource(ABC):
    """What really happened, and will happen, in some markets at every market time.

    Guarantees: the same question always has the same answer, whoever asks and whenever; no answer
    depends on the present. Candles of every interval and trades agree with each other. A period
    without a candle is a hole. ``instrument`` arguments come from ``markets()``.
    """

    @abstractmethod
    def markets(self) -> Sequence[Instrument]:
        """Every market, in a fixed order."""

    @abstractmethod
    def offers(self, instrument: Instrument, interval: Interval) -> bool:
        """Whether candles of ``interval`` can be told."""

    @abstractmethod
    def history_start(self, instrument: Instrument) -> int:
        """The first market time, in ms, that anything is known of."""

    @abstractmethod
    def candles(
        self, instrument: Instrument, interval: Interval, part: TimeRange
    ) -> Sequence[Candle]:
        """The final candles of the periods that open in ``part``, ascending, holes left out.

        Raises:
            InvalidRequest: the interval is not offered.
        """

    @abstractmethod
    def forming(self, instrument: Instrument, interval: Interval, at_ms: int) -> Candle | None:
        """The candle of the period around ``at_ms`` as it stands then; None before it traded."""

    @abstractmethod
    def trades(self, instrument: Instrument, part: TimeRange) -> Sequence[Trade]:
        """The trades in ``part``, ascending."""

    @abstractmethod
    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        """The best ``depth`` levels of each side at ``at_ms``; never crossed."""

    def candle(self, instrument: Instrument, interval: Interval, open_ms: int) -> Candle | None:
        """The final candle of the period that opens at ``open_ms``, or None for a hole."""
        found = self.candles(instrument, interval, TimeRange(open_ms, open_ms + 1))
        return found[0] if found else None


def merge(parts: Sequence[Candle], timestamp: int, decimals: int | None) -> Candle | None:
    """One candle at ``timestamp`` from candles that follow each other; None from none."""
    if not parts:
        return None
    volume = float(sum(part.volume for part in parts))
    return Candle(
        timestamp=timestamp,
        open=parts[0].open,
        high=max(part.high for part in parts),
        low=min(part.low for part in parts),
        close=parts[-1].close,
        volume=volume if decimals is None else round(volume, decimals),
    )


def candle_of_trades(trades: Sequence[Trade], timestamp: int, decimals: int) -> Candle | None:
    """What ``trades`` make of one period; None from none."""
    if not trades:
        return None
    prices = [trade.price for trade in trades]
    return Candle(
        timestamp=timestamp,
        open=prices[0],
        high=max(prices),
        low=min(prices),
        close=prices[-1],
        volume=round(sum(trade.amount for trade in trades), decimals),
    )


class Noise:
    """Numbers that look random and are a pure function of a name and an index."""

    __slots__ = ("_stream",)

    def __init__(self, *name: object) -> None:
        digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
        self._stream = np.uint64(int.from_bytes(digest, "big"))

    def hashes(self, index: Integers) -> _Hashes:
        """64 well mixed bits for each index (the finalizer of SplitMix64)."""
        mixed = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._stream
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))

    def units(self, index: Integers) -> Floats:
        """A number in [0, 1) for each index."""
        return high_unit(self.hashes(index))


def high_unit(hashes: _Hashes) -> Floats:
    """The upper half of each hash as a number in [0, 1)."""
    return (hashes >> np.uint64(32)).astype(np.float64) / 2.0**32


def low_unit(hashes: _Hashes) -> Floats:
    """The lower half of each hash as a number in [0, 1)."""
    return (hashes & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32


class BookMaker:
    """Draws an order book round a price: levels on a fixed grid, whose sizes change now and then.

    A level keeps its size for some seconds, so that two books shortly after each other differ in
    a few levels only, as real ones do.
    """

    _LEVEL_LIFE_MS: Final = 4_000

    def __init__(
        self, seed: int, instrument: Instrument, typical_price: float, typical_amount: float
    ) -> None:
        self._scale = 10**instrument.price_decimals
        self._amount_scale = 10**instrument.quantity_decimals
        # About two hundredths of a thousandth of the price lie between two levels.
        self._gap = max(1, round(typical_price * self._scale * 2e-5))
        self._typical_steps = max(5.0, typical_amount * self._amount_scale)
        self._life = Noise(seed, instrument.symbol, "level life")
        self._size = Noise(seed, instrument.symbol, "level size")

    def book(self, price: float, at_ms: int, depth: int) -> OrderBook:
        middle = max(1, round(price * self._scale))
        first_bid = (middle - 1) // self._gap
        lowest = max(1, first_bid - depth + 1)
        bids = np.arange(first_bid, lowest - 1, -1, dtype=np.int64)
        first_ask = middle // self._gap + 1
        asks = np.arange(first_ask, first_ask + depth, dtype=np.int64)
        return OrderBook(at_ms, self._levels(bids, at_ms), self._levels(asks, at_ms))

    def _levels(self, grid: Integers, at_ms: int) -> tuple[Level, ...]:
        offset = (self._life.units(grid) * self._LEVEL_LIFE_MS).astype(np.int64)
        life = (at_ms + offset) // self._LEVEL_LIFE_MS
        size = -np.log1p(-self._size.units(grid * 1_000_003 + life)) * self._typical_steps
        amounts = (1 + np.floor(size)) / self._amount_scale
        prices = grid * self._gap / self._scale
        return tuple(zip(prices.tolist(), amounts.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Listing:
    """How a generated market trades.

    ``trades_a_minute`` is the mean. A ``quiet`` market has minutes, and now and then a quarter of
    an hour, in which nobody trades.
    """

    instrument: Instrument
    trades_a_minute: float
    quiet: bool = False


# What a coin is worth, in USD, before the noise; and how wild it is, as a factor.
_COINS: Final[dict[str, tuple[float, float]]] = {
    "BTC": (90_000.0, 1.0),
    "ETH": (3_000.0, 1.2),
    "SOL": (140.0, 1.5),
    "XRP": (2.2, 1.5),
    "ADA": (0.55, 1.6),
    "DOGE": (0.16, 1.8),
    "CRO": (0.12, 1.6),
    "LRC": (0.08, 2.0),
    "LUNA": (0.09, 2.0),
    "EUR": (1.09, 0.08),
    "USDT": (1.0, 0.004),
    "USDC": (1.0, 0.002),
    "USD": (1.0, 0.0),
}

LISTINGS: Final = (
    Listing(Instrument("BTC", "USD", 2, 5), 9.0),
    Listing(Instrument("ETH", "USD", 2, 4), 8.0),
    Listing(Instrument("SOL", "USD", 3, 3), 6.0),
    Listing(Instrument("XRP", "USD", 5, 0), 5.0),
    Listing(Instrument("ADA", "USD", 5, 0), 4.0),
    Listing(Instrument("DOGE", "USD", 6, 0), 4.0),
    Listing(Instrument("BTC", "USDT", 2, 5), 7.0),
    Listing(Instrument("ETH", "USDT", 2, 4), 6.0),
    Listing(Instrument("BTC", "EUR", 2, 5), 3.0),
    Listing(Instrument("ETH", "BTC", 6, 4), 3.0),
    Listing(Instrument("CRO", "USD", 5, 0), 0.9, quiet=True),
    Listing(Instrument("LRC", "USD", 5, 0), 0.25, quiet=True),
    Listing(Instrument("LUNA", "USD", 5, 0, active=False), 0.25, quiet=True),
    Listing(Instrument("BTC", "USD", 1, 4, spot=False), 9.0),
    Listing(Instrument("SOL", "USDT", 2, 3), 5.0),
    Listing(Instrument("LRC", "USDT", 5, 0), 0.25, quiet=True),
)

# The octaves of the price noise: the period in minutes. Each is as high as a random walk strays in
# its period, up to a bound that keeps prices near where they started.
_OCTAVES: Final = (4, 11, 32, 90, 270, 720, 2_160, 6_480, 20_000, 60_000, 180_000)
_STRAY_A_ROOT_MINUTE: Final = 0.0005
_WIDEST: Final = 0.05
_TRADE_NOISE: Final = 0.0002
_TRADE_USD: Final = 700.0
_LEVEL_USD: Final = 3_000.0
_QUIET_SPELL_MINUTES: Final = 15
_QUIET_SPELL_SHARE: Final = 0.25
_MOST_TRADES_A_MINUTE: Final = 512


@dataclass(frozen=True, slots=True)
class _DayOfTrades:
    timestamp: Integers
    price: Floats
    amount: Floats
    buy: npt.NDArray[np.bool_]
    ordinal: Integers
    # The price at each minute's edge, 1441 of them.
    edges: Floats


class GeneratedPrices(IPriceSource):
    """An invented exchange that has always existed and always will.

    A market's price is the ratio of what its two coins are worth, each a sum of smooth noise of
    many periods over its logarithm, so ETH/BTC agrees with ETH/USD and BTC/USD. Days are computed
    whole and kept in bounded caches: minutes of 400 market-days, trades of 32.
    """

    def __init__(
        self,
        seed: int = 1,
        *,
        listings: Sequence[Listing] = LISTINGS,
        history_start_ms: int = DEFAULT_HISTORY_START_MS,
    ) -> None:
        self._seed = seed
        self._history_start = history_start_ms
        self._listings = {listing.instrument: listing for listing in listings}
        self._octaves = {
            coin: [
                (period, Noise(seed, coin, "octave", period), _amplitude(period) * wildness)
                for period in _OCTAVES
            ]
            for coin, (_, wildness) in _COINS.items()
        }
        self._books = {
            instrument: BookMaker(
                seed,
                instrument,
                typical_price=_COINS[instrument.base][0] / _COINS[instrument.quote][0],
                typical_amount=_LEVEL_USD / _COINS[instrument.base][0],
            )
            for instrument in self._listings
        }
        self._minutes_of_day = lru_cache(maxsize=400)(self._make_minutes)
        self._trades_of_day = lru_cache(maxsize=32)(self._make_trades)
        self._whole_day = lru_cache(maxsize=8192)(self._make_whole_day)

    def markets(self) -> Sequence[Instrument]:
        return tuple(self._listings)

    def offers(self, instrument: Instrument, interval: Interval) -> bool:  # noqa: ARG002 - all alike
        return interval.milliseconds % MINUTE_MS == 0

    def history_start(self, instrument: Instrument) -> int:  # noqa: ARG002 - one for all
        return self._history_start

    def candles(
        self, instrument: Instrument, interval: Interval, part: TimeRange
    ) -> Sequence[Candle]:
        if not self.offers(instrument, interval):
            raise InvalidRequest(f"{interval} is not offered")
        first = interval.ceil(max(part.start, self._history_start))
        whole = TimeRange(first, interval.ceil(part.end))
        if not whole:
            return []
        columns = self._columns(instrument, whole, days=interval.milliseconds % DAY_MS == 0)
        return columns.aggregate(interval, instrument.quantity_decimals).candles()

    def forming(self, instrument: Instrument, interval: Interval, at_ms: int) -> Candle | None:
        opened = interval.floor(at_ms)
        if opened < self._history_start:
            return None
        minute = at_ms - at_ms % MINUTE_MS
        decimals = instrument.quantity_decimals
        closed = self._columns(
            instrument, TimeRange(opened, minute), days=interval.milliseconds > DAY_MS
        ).aggregate(interval, decimals)
        parts = closed.candles()
        current = candle_of_trades(
            self.trades(instrument, TimeRange(minute, at_ms + 1)), minute, decimals
        )
        return merge([*parts, current] if current else parts, opened, decimals)

    def trades(self, instrument: Instrument, part: TimeRange) -> Sequence[Trade]:
        start = max(part.start, self._history_start)
        found: list[Trade] = []
        for day in range(start // DAY_MS, -(-part.end // DAY_MS)):
            trades = self._trades_of_day(instrument, day)
            first, last = np.searchsorted(trades.timestamp, (start, part.end))
            rows = slice(int(first), int(last))
            found += (
                Trade(id_, timestamp, price, amount, "buy" if buy else "sell")
                for id_, timestamp, price, amount, buy in zip(
                    trades.ordinal[rows].tolist(),
                    trades.timestamp[rows].tolist(),
                    trades.price[rows].tolist(),
                    trades.amount[rows].tolist(),
                    trades.buy[rows].tolist(),
                    strict=True,
                )
            )
        return found

    def book(self, instrument: Instrument, at_ms: int, depth: int) -> OrderBook:
        day, within = divmod(at_ms, DAY_MS)
        minute, rest = divmod(within, MINUTE_MS)
        edges = self._trades_of_day(instrument, day).edges
        share = rest / MINUTE_MS
        price = float(edges[minute] * (1 - share) + edges[minute + 1] * share)
        return self._books[instrument].book(price, at_ms, depth)

    def _columns(self, instrument: Instrument, part: TimeRange, *, days: bool) -> Columns:
        """Candles of at most a day that cover ``part``; whole ``days`` as one each, where told."""
        parts: list[Columns] = []
        for day in range(part.start // DAY_MS, -(-part.end // DAY_MS)):
            whole = TimeRange(day * DAY_MS, (day + 1) * DAY_MS)
            covered = whole.intersect(part)
            if days and covered == whole:
                parts.append(self._whole_day(instrument, day))
            else:
                parts.append(self._minutes_of_day(instrument, day).within(covered))
        return concatenate(parts) if parts else from_candles(())

    def _make_whole_day(self, instrument: Instrument, day: int) -> Columns:
        minutes = self._minutes_of_day(instrument, day)
        return minutes.aggregate(Interval.parse("1d"), instrument.quantity_decimals)

    def _make_minutes(self, instrument: Instrument, day: int) -> Columns:
        # Not through the cache of trades: months of minutes would push today's trades out of it.
        trades = self._make_trades(instrument, day)
        ticks = Columns(
            trades.timestamp, trades.price, trades.price, trades.price, trades.price, trades.amount
        ).within(TimeRange(self._history_start, (day + 1) * DAY_MS))
        return ticks.aggregate(Interval.parse("1m"), instrument.quantity_decimals)

    def _make_trades(self, instrument: Instrument, day: int) -> _DayOfTrades:
        listing = self._listings[instrument]
        name = (self._seed, instrument.symbol)
        minutes = np.arange(_MINUTES_A_DAY + 1, dtype=np.int64) + day * _MINUTES_A_DAY
        logs = self._worth(instrument.base, minutes) - self._worth(instrument.quote, minutes)
        counts = self._counts(listing, minutes[:-1])
        minute = np.repeat(np.arange(_MINUTES_A_DAY), counts)
        starts = np.cumsum(counts) - counts
        ordinal = np.arange(len(minute)) - starts[minute]
        key = (minutes[minute]) * _MOST_TRADES_A_MINUTE + ordinal
        when = Noise(*name, "trade time").hashes(key)
        what = Noise(*name, "trade size").hashes(key)
        offset = np.floor(high_unit(when) * MINUTE_MS).astype(np.int64)
        timestamp = minutes[minute] * MINUTE_MS + offset
        log = logs[minute] + (logs[minute + 1] - logs[minute]) * (offset / MINUTE_MS)
        log += (low_unit(when) - 0.5) * _TRADE_NOISE
        scale = 10.0**instrument.price_decimals
        price = np.maximum(1.0, np.rint(np.exp(log) * scale)) / scale
        amount_scale = 10.0**instrument.quantity_decimals
        typical = _TRADE_USD / _COINS[instrument.base][0] * amount_scale
        amount = (1.0 + np.floor(-np.log1p(-high_unit(what)) * typical)) / amount_scale
        order = np.argsort(timestamp, kind="stable")
        return _DayOfTrades(
            timestamp=timestamp[order],
            price=price[order],
            amount=amount[order],
            buy=low_unit(what)[order] < 0.5,
            # Within a minute the n-th trade by time takes the n-th number.
            ordinal=key,
            edges=np.exp(logs),
        )

    def _worth(self, coin: str, minutes: Integers) -> Floats:
        """The logarithm of what ``coin`` is worth in USD at each minute's edge."""
        typical, _ = _COINS[coin]
        total = np.full(len(minutes), np.log(typical))
        for period, noise, amplitude in self._octaves[coin]:
            if amplitude == 0:
                continue
            cell = minutes // period
            share = (minutes - cell * period) / period
            smooth = share * share * (3 - 2 * share)
            left = noise.units(cell)
            right = noise.units(cell + 1)
            total += amplitude * (2 * (left + (right - left) * smooth) - 1)
        return total

    def _counts(self, listing: Listing, minutes: Integers) -> Integers:
        """How many trades each minute has."""
        name = (self._seed, listing.instrument.symbol)
        spread = -np.log1p(-Noise(*name, "count").units(minutes))
        if not listing.quiet:
            counts = 1 + np.floor(spread * (listing.trades_a_minute - 0.5))
        else:
            counts = np.floor(spread * (listing.trades_a_minute + 0.5))
            spell = Noise(*name, "spell").units(minutes // _QUIET_SPELL_MINUTES)
            counts[spell < _QUIET_SPELL_SHARE] = 0
        whole: Integers = np.minimum(counts, _MOST_TRADES_A_MINUTE - 1).astype(np.int64)
        return whole


def _amplitude(period: int) -> float:
    return float(min(_WIDEST, _STRAY_A_ROOT_MINUTE * period**0.5))
