"""What has been: candles of the past, and the newest one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from domain.candle import Candle
from domain.entry import Entry
from domain.gap import Gap
from domain.interval import Interval
from domain.series import Series
from domain.time_range import TimeRange
from errors import DataServiceError
from historical.columns import Candles


class CandleTableError(DataServiceError):
    """The table of sealed candles did not do what was asked. The documents have it all."""


class CandleTableUnavailable(CandleTableError):
    """The table cannot be reached or written for now."""

    retryable = True


class CandleTableDenied(CandleTableUnavailable):
    """Credentials or permissions are wrong; asking again does not mend that."""

    retryable = False


class CandleTableMismatch(CandleTableError):
    """The table has other columns than this service writes; the message names the difference."""


class IJsonWebSocket(Protocol):
    """The smallest part of a WebSocket that streaming history needs."""

    async def send_json(self, data: Any) -> None:
        """Send one JSON text message; raises when the client is gone."""


@dataclass(frozen=True, slots=True)
class ResolvedSeries:
    """Which series a request means. ``since`` is the target's, or None when it is not collected.

    ``sources`` are shorter intervals of the same market, the best first, that it may be resampled
    from: those that are collected. Where the exchange offers no candles of this interval
    (``offered``) it is one, collected or not.
    """

    series: Series
    market: str
    since: int | None = None
    sources: tuple[Interval, ...] = ()
    offered: bool = True


class ISeriesDirectory(ABC):
    """Says which series a coin means when it is read."""

    @abstractmethod
    async def resolve(self, coin: str, *, exchange: str | None, interval: str) -> ResolvedSeries:
        """Without ``exchange``: the one that collects this coin and interval, the most preferred
        first; next the one that has it stored; else the one that selection gives.

        Raises:
            InvalidRequest: the coin can be no name, or the exchange does not offer the interval
                and none that it could be resampled from.
            UnknownExchange: that exchange is not enabled.
            CoinNotAvailable: all exchanges that could be asked say no.
            ExchangeUnavailable: nothing is stored and none could be asked.
        """


@dataclass(frozen=True, slots=True)
class History:
    """Closed candles of a range, and what is missing from it.

    ``from_storage`` and ``from_exchange`` count the candles by where they were found;
    ``next_start`` is where the next page starts, or None.
    """

    series: Series
    market: str | None
    range: TimeRange
    candles: Candles
    gaps: tuple[Gap, ...]
    from_storage: int
    from_exchange: int
    next_start: int | None = None


@dataclass(frozen=True, slots=True)
class CurrentData:
    """The newest candle known: closed (``entry``), or forming (``candle`` of ``market``).

    ``age_ms`` is how old the newest information is, market ms.
    """

    series: Series
    market: str
    candle: Candle
    entry: Entry | None
    age_ms: int

    @property
    def closed(self) -> bool:
        return self.entry is not None


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is stored of what is wanted. Times are period opens (ms), None without an entry."""

    series: Series
    first: int | None
    last: int | None
    expected: int
    stored: int
    with_order_book: int
    ranges: tuple[TimeRange, ...]
    gaps: tuple[Gap, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A range in a few numbers.

    ``change_percent`` is from the first open to the last close; ``vwap`` is approximate: typical
    prices ``(high + low + close) / 3`` weighted by volume, None without volume; ``volatility`` is
    the sample standard deviation of the logarithmic returns between closes, per period, None with
    fewer than three candles; ``max_drawdown_percent`` is the deepest fall of a close below an
    earlier close. ``candles`` are at most 50, each over an equal number of periods.
    """

    series: Series
    market: str | None
    range: TimeRange
    count: int
    first: Candle
    last: Candle
    high: float
    low: float
    change_percent: float
    volume: float
    vwap: float | None
    volatility: float | None
    max_drawdown_percent: float
    candles: Candles
    candle_periods: int
    gaps: tuple[Gap, ...]


class IHistoricalDataManager(ABC):
    """Storage first, the exchange for what is missing; what was fetched is kept.

    ``coin`` is upper-cased on input. Without ``exchange``: the one that collects this coin and
    interval, next the one that has it stored, else the one that selection gives. Ranges are
    ``[start, end)`` in ms; the forming candle is never part of history.

    Raises:
        InvalidRequest: end is not after start, or the interval does not exist.
        UnknownExchange, CoinNotAvailable: as the words say.
        ExchangeUnavailable: nothing is stored and the exchange could not be asked.
    """

    @abstractmethod
    async def get_historical_data(
        self,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        limit: int = 500,
    ) -> History:
        """One page of closed candles."""

    @abstractmethod
    async def stream_historical_data(
        self,
        websocket: IJsonWebSocket,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        chunk_size: int = 1000,
        request_id: str | None = None,
    ) -> None:
        """Send ``historical_data_chunk`` messages as they become available, then one
        ``historical_data_complete``. When the caller cancels it, nothing more is sent. An error
        of the websocket ends it and is passed on."""

    @abstractmethod
    async def get_most_current_data(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> CurrentData:
        """The newest candle.

        Raises:
            NoData: nothing is stored and nothing could be fetched.
        """

    @abstractmethod
    async def summarize_history(
        self,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
    ) -> Summary:
        """The range in a few numbers.

        Raises:
            NoData: there is no candle in the range.
        """

    @abstractmethod
    async def get_coverage(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> Coverage:
        """What is stored, from the target's ``since`` (or the first entry) to now."""
