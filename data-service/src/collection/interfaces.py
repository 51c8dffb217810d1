"""What is being collected, and what its subscribers are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, get_args

from domain.candle import Candle
from domain.entry import Entry
from domain.gap import Gap, GapReason
from domain.order_book import OrderBook
from domain.series import Series
from domain.ticker import Ticker
from domain.trade import Trade
from errors import DataServiceError
from target_management.interfaces import SERVICE, Target


class SlowConsumer(DataServiceError):
    """A subscriber reads slower than what may not be dropped arrives."""


class Channel(StrEnum):
    """What of a coin's market a subscriber is told."""

    CANDLES = "candles"
    TRADES = "trades"
    TICKER = "ticker"
    ORDER_BOOK = "order_book"


class TargetState(StrEnum):
    """Where a target stands."""

    STARTING = "starting"
    LIVE = "live"
    BACKFILLING = "backfilling"
    DEGRADED = "degraded"
    REMOVING = "removing"
    DELISTED = "delisted"


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """A target and how it does. ``last_entry`` is the open (ms) of its newest stored period and
    ``lag_ms`` how far the market is past that period's end; both None while nothing is stored."""

    target: Target
    state: TargetState
    last_entry: int | None
    lag_ms: int | None


FeedPhase = Literal["idle", "starting", "connected", "reconnecting"]
FEED_PHASES: Final[tuple[FeedPhase, ...]] = get_args(FeedPhase)


@dataclass(frozen=True, slots=True)
class FeedStatus:
    """How the feed of an exchange does.

    Attributes:
        state: ``idle`` while nothing of the exchange is wanted, ``starting`` until it was heard for
            the first time, ``connected``, or ``reconnecting`` since it was lost.
        lag_s: real seconds since anything was heard of it, or since it was first listened to; None
            while there is nothing to be heard.
        streams: how many of its streams run.
        losses: how often it was lost since the process started.
        reconnects: how often it was heard again after that.
        stream_failures: how often single streams ended with an error, those of a lost feed too.
    """

    exchange: str
    state: FeedPhase
    lag_s: float | None = None
    streams: int = 0
    losses: int = 0
    reconnects: int = 0
    stream_failures: int = 0


@dataclass(slots=True)
class GapCount:
    """How many gaps there are, and how many periods they take together."""

    gaps: int = 0
    periods: int = 0


OpenGaps = Mapping[tuple[str, str, GapReason], GapCount]
"""Gaps that may still close, by exchange, interval and reason."""


@dataclass(slots=True)
class OutboxTotals:
    """What happened to what readers of one channel had not read yet, since the process started.

    Attributes:
        replaced: forming candles, tickers or books that a newer one, or the closed candle, took the
            place of.
        merged: messages of trades that went out together with the one before.
        dropped: trades, and messages of anything else, that a reader lost by being too slow; with
            the first of them its subscription ends.
    """

    replaced: int = 0
    merged: int = 0
    dropped: int = 0


@dataclass(slots=True)
class OutboxStatus:
    """The readers of one channel now. ``waiting`` is how many trades, and messages of anything else
    that must be told, wait for all of them together, ``deepest`` for the one furthest behind."""

    totals: OutboxTotals
    readers: int = 0
    waiting: int = 0
    deepest: int = 0


@dataclass(frozen=True, slots=True)
class AddCoinResult:
    """``unreachable`` names the exchanges that would have gone first and could not be asked."""

    status: Literal["added", "already_collecting"]
    target: TargetStatus
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MarketAvailability:
    exchange: str
    market: str
    collecting: bool


@dataclass(frozen=True, slots=True)
class Availability:
    """Where a coin can be had. ``unreachable`` names the exchanges that could not be asked."""

    coin: str
    markets: tuple[MarketAvailability, ...]
    unreachable: tuple[str, ...]

    @property
    def available(self) -> bool:
        return bool(self.markets)


@dataclass(frozen=True, slots=True)
class SubscriptionStarted:
    """Always the first event. The first closed candle told is the one after ``last_closed``, which
    is None where no candles are told."""

    series: Series
    market: str
    last_closed: int | None
    channel: Channel = Channel.CANDLES


@dataclass(frozen=True, slots=True)
class FormingCandle:
    """A candle whose period is not over; the newest replaces one that was not sent yet."""

    candle: Candle


@dataclass(frozen=True, slots=True)
class ClosedCandle:
    """A stored entry. ``late`` when a gap was told in its place before."""

    entry: Entry
    late: bool = False


@dataclass(frozen=True, slots=True)
class GapTold:
    """Periods without an entry, told in their place."""

    gap: Gap
    late: bool = False


@dataclass(frozen=True, slots=True)
class TradesTold:
    """Trades in the order of their arrival, each once."""

    trades: tuple[Trade, ...]


@dataclass(frozen=True, slots=True)
class TickerTold:
    """The newest ticker; it replaces one that was not sent yet."""

    ticker: Ticker


@dataclass(frozen=True, slots=True)
class BookTold:
    """The top of the live book; it replaces one that was not sent yet. ``stale`` when it is older
    than the rhythm of its feed, or its feed is lost."""

    book: OrderBook
    stale: bool


@dataclass(frozen=True, slots=True)
class StatusTold:
    """What stands behind the subscription changed. ``since`` is market ms."""

    component: Literal["feed", "storage"]
    state: Literal["connected", "reconnecting", "degraded"]
    since: int
    exchange: str | None = None


CandleEvent = FormingCandle | ClosedCandle | GapTold
ChannelEvent = TradesTold | TickerTold | BookTold
StreamEvent = SubscriptionStarted | CandleEvent | ChannelEvent | StatusTold


class IDataCollectionManager(ABC):
    """Adds, removes and lists what is collected, and tells subscribers about it.

    ``coin`` is upper-cased on input. Without ``exchange``: the one that collects this coin and
    interval, the most preferred first; else the one that selection gives.
    """

    @abstractmethod
    async def add_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        since: int | None = None,
        by: str = SERVICE,
    ) -> AddCoinResult:
        """Collect a coin from now on and back to ``since`` (ms). Idempotent.

        ``by`` is who asks, as the table's history tells it.

        Raises:
            InvalidRequest: coin, interval or ``since`` cannot be meant; or the exchange does not
                offer the interval.
            UnknownExchange: that exchange is not enabled.
            CoinNotAvailable: all exchanges that could be asked say no; names them.
            ExchangeUnavailable: none could be asked.
        """

    @abstractmethod
    async def remove_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str | None = None,
        by: str = SERVICE,
    ) -> TargetStatus:
        """Stop collecting; what is stored stays. ``by`` is who asks.

        Raises:
            InvalidRequest: several targets fit (they are named), or none does.
        """

    @abstractmethod
    async def check_availability(self, coin: str, *, exchange: str | None = None) -> Availability:
        """Which exchanges list the coin.

        Raises:
            UnknownExchange: that exchange is not enabled.
            ExchangeUnavailable: none of the exchanges could be asked.
        """

    @abstractmethod
    async def list_targets(self) -> list[TargetStatus]:
        """Every target, by id."""

    @abstractmethod
    def stream_realtime_data(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        channel: Channel = Channel.CANDLES,
        from_ms: int | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of one subscriber to a collected coin, without end.

        The first is ``SubscriptionStarted``. Then, of candles, each closed period exactly once and
        in order: its ``ClosedCandle`` after it was stored, or a ``GapTold`` in its place;
        corrections as the same period with a higher revision. With ``from_ms`` the closed candles
        from that time on come first, without gap or repeat at the seam. Of the other channels of
        its market: each trade that arrives, the newest ticker, the newest top of the book. The
        iterator must be closed (``aclose``).

        Raises:
            InvalidRequest: ``from_ms`` of another channel than candles.
            ExchangeRefused: the exchange does not tell this channel of the market.
            CoinNotAvailable: the coin is not collected.
            SlowConsumer: the reader fell too far behind; the subscription is over.
        """
