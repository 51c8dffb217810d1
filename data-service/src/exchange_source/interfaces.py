"""What an exchange plugin promises, and how it fails. No vendor's name goes above this line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from domain.candle import Candle, CandleUpdate
from domain.order_book import BOOK_DEPTH, OrderBook
from domain.ticker import Ticker
from domain.time_range import TimeRange
from domain.trade import Trade
from errors import DataServiceError
from observability.durations import Durations


class ExchangeError(DataServiceError):
    """An exchange did not do what was asked; the message holds the exchange's own words."""


class ExchangeUnavailable(ExchangeError):
    """The exchange is away, overloaded, silent or refusing for now."""

    retryable = True


class ExchangeRateLimited(ExchangeUnavailable):
    """The exchange asks for fewer requests; ``retry_after`` is the delay that it named, if any."""


class BadExchangeAnswer(ExchangeUnavailable):
    """The exchange answered with something that cannot be believed, such as half a document."""


class ExchangeRefused(ExchangeError):
    """The request itself is wrong for this exchange; asking again changes nothing."""


class Priority(IntEnum):
    """Who goes first when an exchange may not be asked everything at once."""

    LIVE = 0
    REQUEST = 1
    BACKFILL = 2


# Upper bounds (real seconds) of how long a request waits for its turn: from none at all, over the
# spacing of the slowest exchange, to the patience after which it is given up.
WAIT_BOUNDS_S: Final = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class RequestTotals:
    """What asking one exchange by REST came to since the process started.

    Attributes:
        sent: requests that were sent, by priority.
        failed: those of them that the exchange did not answer, or not usefully.
        waited_s: how long a turn took to come (real time), by priority; a subscription that takes
            a turn counts too.
        turned_away: what got no turn: too many waited, it did not come in time, or the exchange
            had asked for a longer pause than that.
        pauses: how often the exchange asked to be left alone.
        waiting: how many wait for their turn now.
    """

    sent: Counter[Priority] = field(default_factory=Counter)
    failed: Counter[Priority] = field(default_factory=Counter)
    waited_s: Mapping[Priority, Durations] = field(
        default_factory=lambda: {priority: Durations(WAIT_BOUNDS_S) for priority in Priority}
    )
    turned_away: Counter[Priority] = field(default_factory=Counter)
    pauses: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class HistoricalData:
    """What one exchange said of a range, and what that proves.

    Attributes:
        candles: closed candles of the range, ascending, no period twice. Closed means: the same
            answer holds a later row, or the exchange's own time is past the period's end by the
            plugin's grace.
        empty: runs of closed periods of the range proven to be without a candle by rows on both
            sides of each run, none inside.
        not_offered: what is older than anything the exchange still gives, from the start of the
            range to the oldest candle, which may lie after the range's end; proven by a request
            that began earlier and gave nothing older.
        exchange_time: the exchange's own time at the answer, market ms.

    What is in none of the three is open: not closed yet, or not proven.
    """

    candles: tuple[Candle, ...]
    empty: tuple[TimeRange, ...] = ()
    not_offered: TimeRange | None = None
    exchange_time: int = 0


UpdateCallback = Callable[[CandleUpdate], Awaitable[None]]
TradesCallback = Callable[[Sequence[Trade]], Awaitable[None]]
TickerCallback = Callable[[Ticker], Awaitable[None]]
OnBookChange = Callable[[], None]
"""Told that a snapshot of the book would differ from the one before, or that there is none any
more; it must be quick."""


class IStreamHandle(ABC):
    """A running stream of one market."""

    @abstractmethod
    async def wait(self) -> None:
        """Return when the stream was stopped.

        Raises:
            ExchangeError: what ended the stream; it does not mend itself, start another.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End the stream and wait until its callback is not called any more. Idempotent."""


class IOrderBookHandle(IStreamHandle):
    """A running order book of one market."""

    @abstractmethod
    def snapshot(self, depth: int = BOOK_DEPTH) -> OrderBook | None:
        """The book's top as it stands now, copied; None while none has arrived since the start."""


class IExchangeAPIClient(ABC):
    """One exchange: spot markets, their closed candles, and their live feed.

    ``market`` is a ccxt unified symbol (``BTC/USD``), ``interval`` a ccxt timeframe, times are
    market ms. Every method that asks the exchange raises ``ExchangeUnavailable`` or one of its
    kinds (retryable) or ``ExchangeRefused`` (terminal), never a vendor's error, and never waits
    without a limit. Every request goes through the exchange's one rate limiter.
    """

    @abstractmethod
    def get_exchange_name(self) -> str:
        """The public lower-case name, ``crypto.com``."""

    @abstractmethod
    def get_exchange_id(self) -> str:
        """The ccxt id, ``cryptocom``."""

    @property
    @abstractmethod
    def intervals(self) -> tuple[str, ...]:
        """The intervals that the exchange offers."""

    @property
    @abstractmethod
    def history_page(self) -> int:
        """How many periods one ``fetch_historical_data`` covers with a single request."""

    @property
    @abstractmethod
    def clock_skew_ms(self) -> int | None:
        """How far the exchange's clock is ahead of this service's (market ms), as its last answer
        said, to about a second; None before the first."""

    @property
    @abstractmethod
    def request_totals(self) -> RequestTotals:
        """What asking came to so far; it goes on counting."""

    @abstractmethod
    async def check_coin_availability(
        self, coin_symbol: str, *, priority: Priority = Priority.REQUEST
    ) -> str | None:
        """The active spot market that the coin means here, or None.

        A base currency (``BTC``) goes through the configured quotes in order; an exact unified
        symbol (``BTC/EUR``) means itself. Markets are cached; a coin that the cache does not hold
        is asked for again, at most once a minute.
        """

    @abstractmethod
    async def fetch_historical_data(
        self,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        """What the exchange says of the closed periods that open in ``[start, end)``.

        A range longer than ``history_page`` is paged.

        Raises:
            InvalidRequest: the range is empty, or the interval is not one of ``intervals``.
            ExchangeRefused: the exchange does not know the market.
        """

    @abstractmethod
    async def fetch_order_book(
        self, market: str, *, priority: Priority = Priority.REQUEST
    ) -> OrderBook:
        """The top of the book now, by REST."""

    @abstractmethod
    async def start_realtime_stream(
        self, market: str, interval: str, callback: UpdateCallback
    ) -> IStreamHandle:
        """Await ``callback`` with each candle update of the market, in order of arrival.

        Returns at once; the connection is made in the background. Updates are of forming or just
        closed candles and prove nothing. The stream ends with an error on a lost connection or a
        broken frame; whether silence is a failure is for the caller to judge.
        """

    @abstractmethod
    async def start_trade_stream(self, market: str, callback: TradesCallback) -> IStreamHandle:
        """Await ``callback`` with the trades of the market as they come, in order of arrival.

        While a stream runs none is left out, and none is told twice; a new stream may begin with
        the last few that there were. Otherwise as ``start_realtime_stream``.
        """

    @abstractmethod
    async def start_ticker_stream(self, market: str, callback: TickerCallback) -> IStreamHandle:
        """Await ``callback`` with the market's ticker; one that a newer replaced meanwhile is left
        out. Otherwise as ``start_realtime_stream``."""

    @abstractmethod
    async def start_order_book_stream(
        self, market: str, *, on_change: OnBookChange | None = None
    ) -> IOrderBookHandle:
        """Keep the market's live book.

        A break in its chain of updates, a failed check sum, or a book that cannot be ends the
        stream: what follows begins with a fresh snapshot.
        """

    @abstractmethod
    async def reset_connections(self) -> None:
        """Close every socket, so that each stream ends with an error: for a peer gone mute."""

    @abstractmethod
    async def close(self) -> None:
        """Stop every stream and release every connection. Idempotent; nothing works after it."""


class IDataSourceConnector(ABC):
    """The microkernel: every enabled exchange behind one door."""

    @property
    @abstractmethod
    def exchange_names(self) -> tuple[str, ...]:
        """The enabled exchanges, most preferred first."""

    @abstractmethod
    def get_client(self, exchange_name: str) -> IExchangeAPIClient:
        """The plugin of that name.

        Raises:
            UnknownExchange: none is enabled under it; the message names those that are.
        """

    @abstractmethod
    async def check_coin_availability(
        self, exchange_name: str, coin_symbol: str, *, priority: Priority = Priority.REQUEST
    ) -> str | None:
        """As the plugin of that name says."""

    @abstractmethod
    async def fetch_historical_data(
        self,
        exchange_name: str,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        """As the plugin of that name says."""

    @abstractmethod
    async def start_realtime_stream(
        self, exchange_name: str, market: str, interval: str, callback: UpdateCallback
    ) -> IStreamHandle:
        """As the plugin of that name does."""

    @abstractmethod
    async def close(self) -> None:
        """Close every plugin. Idempotent."""
