"""What all exchanges that are reached through ccxt have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self, TypeVar, cast

import ccxt.pro

from config import Settings
from domain.candle import Candle, CandleUpdate
from domain.clock import IClock
from domain.interval import KNOWN_INTERVALS, Interval
from domain.order_book import BOOK_DEPTH, OrderBook
from domain.time_range import RangeSet, TimeRange
from domain.trade import Trade
from errors import InvalidRequest
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
    HistoricalData,
    IExchangeAPIClient,
    IOrderBookHandle,
    IStreamHandle,
    OnBookChange,
    Priority,
    RequestTotals,
    TickerCallback,
    TradesCallback,
    UpdateCallback,
)
from exchange_source.limiter import RequestLimiter
from exchange_source.plugins.ccxt_errors import TRANSLATED, parse_http_date, translate
from exchange_source.plugins.ccxt_feeds import (
    CandleFeed,
    Feed,
    OrderBookFeed,
    OrderBookStream,
    Stream,
    TickerFeed,
    TradeFeed,
)
from exchange_source.plugins.ccxt_guards import ANSWER, Answer, VendorGuards, guarded, redirect_urls
from exchange_source.plugins.ccxt_values import to_candle, to_order_book
from exchange_source.plugins.traded_candles import TradedCandles
from exchange_source.proof import PageProof
from observability.tracing import span

# Real seconds: how old the list of markets may be before it is asked for again, for a coin that
# it holds and for one that it does not.
_MARKETS_MAX_AGE_S: Final = 3600.0
_UNKNOWN_COIN_MAX_AGE_S: Final = 60.0
# The same once the exchange has refused a market that its list holds.
_DOUBTED_MAX_AGE_S: Final = 5.0
# Real seconds of silence after a refusal for asking too much that names no delay.
_DEFAULT_PENALTY_S: Final = 2.0
_LONGEST_PENALTY_S: Final = 3600.0
# Nothing is asked further in the future than this, in ms: no clock is that wrong.
_FUTURE_MS: Final = 86_400_000

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Feed)
_S = TypeVar("_S", bound=Stream)
_Topic = tuple[str, str, str]
"""What is told, of which market, and in which interval; that is empty where there is none."""


class CCXTExchangeClient(IExchangeAPIClient):
    """One exchange through its ccxt.pro class; a subclass says which and what differs.

    Nothing connects before the first call. Requests run side by side on one ccxt instance, each
    in a slot of the limiter.

    Args:
        clock: market time for periods, real time for delays.
        quotes: quote currencies, most preferred first.
        endpoint: base URL that replaces scheme and host of every API URL, or None.
        credentials: what ccxt calls ``apiKey``, ``secret`` and so on.
        limiter: the exchange's limiter; None makes one with the plugin's own rates.
        timeout_s: real seconds that one request may take, once it has its slot.
        vendor: a ccxt instance to use instead of one of its own.
    """

    exchange_name: ClassVar[str]
    exchange_id: ClassVar[str]
    page_rows: ClassVar[int] = 300
    """Candles in one answer at most."""
    grace_ms: ClassVar[int] = 5_000
    """Market ms after a period's end until which its candle may still be published."""
    requests_per_second: ClassVar[float] = 10.0
    concurrency: ClassVar[int] = 4
    markets_weight: ClassVar[float] = 1.0
    """What a request for the list of markets counts of the rate, in requests for candles."""
    book_weight: ClassVar[float] = 1.0
    """What one for the top of a book counts."""
    snapshot_weight: ClassVar[float] = 1.0
    """What one for the book that a live one begins with counts."""
    subscription_weight: ClassVar[float] = 1.0
    """What a subscription counts; nothing where many of them go out in one message."""
    guards: ClassVar[type[VendorGuards]] = VendorGuards
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """ccxt's own options for this exchange."""
    kept_levels: ClassVar[int | None] = BOOK_DEPTH
    """Levels of a live book that ccxt keeps a side; None, all that it is told of, where updates are
    of the whole book: of a book that is cut off, what moves up into it is never told."""
    streamed_intervals: ClassVar[frozenset[str] | None] = None
    """The intervals whose candles the exchange streams; those of the others are made of trades, and
    provisional. None where it streams them all."""
    books_are_timed: ClassVar[bool] = True
    """Whether a book by REST says of when it is; else it is taken to be of now."""
    asks_backwards: ClassVar[bool] = False
    """Whether rows are asked for by the end of a window alone, so that some may lie before it."""
    unaligned_intervals: ClassVar[frozenset[str]] = frozenset({"3d", "1w"})
    """Intervals left out because exchanges do not agree where their periods begin."""

    def __init__(
        self,
        *,
        clock: IClock,
        quotes: Sequence[str] = ("USD", "USDT", "USDC", "EUR"),
        endpoint: str | None = None,
        credentials: Mapping[str, str] | None = None,
        limiter: RequestLimiter | None = None,
        timeout_s: float = 10.0,
        vendor: Any | None = None,
    ) -> None:
        self._clock = clock
        self._quotes = tuple(quotes)
        self._timeout_s = timeout_s
        self._limiter = limiter or RequestLimiter(
            clock,
            name=self.exchange_name,
            rate=self.requests_per_second,
            concurrency=self.concurrency,
        )
        self.vendor: Any = vendor or self._make_vendor(endpoint, credentials or {})
        self._skew_ms = 0
        self._knows_time = False
        self._spot: dict[str, bool] = {}
        self._loaded_at: float | None = None
        self._doubted = False
        self._loading = asyncio.Lock()
        self._feeds: dict[_Topic, Feed] = {}
        self._turns: dict[_Topic, asyncio.Lock] = {}
        self._closed = False

    @classmethod
    def from_settings(cls, settings: Settings, clock: IClock) -> Self:
        """The exchange as the settings describe it."""
        secrets = settings.exchange_credentials.get(cls.exchange_name, {})
        return cls(
            clock=clock,
            quotes=settings.exchange_quotes,
            endpoint=settings.exchange_endpoints.get(cls.exchange_name),
            credentials={name: secret.get_secret_value() for name, secret in secrets.items()},
        )

    def _make_vendor(self, endpoint: str | None, credentials: Mapping[str, str]) -> Any:
        vendor = guarded(getattr(ccxt.pro, self.exchange_id), self.guards)(
            {
                **credentials,
                # The limiter paces; ccxt's own would keep the slots of calls that were cancelled.
                "enableRateLimit": False,
                "timeout": round(self._timeout_s * 1000),
                "options": dict(self.options),
            }
        )
        vendor.public_name = self.exchange_name
        vendor.closing = set()
        vendor.ask_for_book = self._ask_for_book
        # Currencies need an account on some exchanges, and nothing here needs currencies.
        vendor.has["fetchCurrencies"] = False
        if endpoint is not None:
            vendor.urls = redirect_urls(vendor.urls, endpoint)
            if endpoint.startswith("http:"):
                vendor.timeout_on_exit = 0  # what ccxt waits for there is the end of TLS sessions
        return vendor

    def get_exchange_name(self) -> str:
        return self.exchange_name

    def get_exchange_id(self) -> str:
        return self.exchange_id

    @property
    def intervals(self) -> tuple[str, ...]:
        return tuple(
            name
            for name in KNOWN_INTERVALS
            if name in self.vendor.timeframes and name not in self.unaligned_intervals
        )

    @property
    def history_page(self) -> int:
        return self.page_rows - 2

    @property
    def clock_skew_ms(self) -> int | None:
        return self._skew_ms if self._knows_time else None

    @property
    def request_totals(self) -> RequestTotals:
        return self._limiter.totals

    async def check_coin_availability(
        self, coin_symbol: str, *, priority: Priority = Priority.REQUEST
    ) -> str | None:
        self._check_open()
        coin = coin_symbol.strip().upper()
        wanted = [coin] if "/" in coin else [f"{coin}/{quote}" for quote in self._quotes]
        for max_age_s in (_MARKETS_MAX_AGE_S, _UNKNOWN_COIN_MAX_AGE_S):
            await self._load_markets(priority, max_age_s)
            for market in wanted:
                if self._spot.get(market):
                    return market
        return None

    async def fetch_historical_data(
        self,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        self._check_open()
        period = self._interval(interval)
        if not 0 <= start < end:
            raise InvalidRequest(
                f"range from {start} to {end} is empty; use a start before the end, both in ms"
            )
        await self._know(market, priority)
        now = self._clock.now_ms() + self._skew_ms
        first = period.ceil(max(start, period.milliseconds))
        stop = period.ceil(min(end, now + _FUTURE_MS))
        parts: list[HistoricalData] = []
        not_offered: TimeRange | None = None
        while stop > first and not_offered is None:
            page = TimeRange(
                max(first, stop - self.history_page * period.milliseconds),
                stop,
            )
            part = await self._fetch_page(market, period, page, priority)
            parts.append(part)
            if part.not_offered is not None:
                # Newest first: what is older than the oldest need not be asked.
                not_offered = TimeRange(first, part.not_offered.end)
            stop = page.start
        empty = RangeSet(run for part in parts for run in part.empty)
        return HistoricalData(
            candles=tuple(candle for part in reversed(parts) for candle in part.candles),
            empty=tuple(empty),
            not_offered=not_offered,
            exchange_time=min((part.exchange_time for part in parts), default=now),
        )

    async def fetch_order_book(
        self, market: str, *, priority: Priority = Priority.REQUEST
    ) -> OrderBook:
        self._check_open()
        await self._know(market, priority)
        book, _ = await self._request(
            priority,
            lambda: self.vendor.fetch_order_book(market, BOOK_DEPTH),
            weight=self.book_weight,
        )
        if not self.books_are_timed:
            book["timestamp"] = self._clock.now_ms() + self._skew_ms
        return to_order_book(book, BOOK_DEPTH, self.exchange_name)

    async def start_realtime_stream(
        self, market: str, interval: str, callback: UpdateCallback
    ) -> IStreamHandle:
        self._check_open()
        period = self._interval(interval)
        if self.streamed_intervals is not None and interval not in self.streamed_intervals:
            return await self._start_traded_candles(market, period, callback)
        feed = self._feed(
            ("candles", market, interval),
            lambda **kwargs: CandleFeed(self, market, period, **kwargs),
        )
        return _joined(Stream(feed, callback), feed)

    async def _start_traded_candles(
        self, market: str, period: Interval, callback: UpdateCallback
    ) -> IStreamHandle:
        candles = TradedCandles(period)

        async def take(trades: Sequence[Trade]) -> None:
            for candle in candles.add(trades):
                await callback(CandleUpdate(self.exchange_name, market, period.name, candle))

        return await self.start_trade_stream(market, take)

    async def start_trade_stream(self, market: str, callback: TradesCallback) -> IStreamHandle:
        self._check_open()
        feed = self._feed(
            ("trades", market, ""), lambda **kwargs: TradeFeed(self, market, **kwargs)
        )
        return _joined(Stream(feed, callback), feed)

    async def start_ticker_stream(self, market: str, callback: TickerCallback) -> IStreamHandle:
        self._check_open()
        feed = self._feed(
            ("ticker", market, ""), lambda **kwargs: TickerFeed(self, market, **kwargs)
        )
        return _joined(Stream(feed, callback), feed)

    async def start_order_book_stream(
        self, market: str, *, on_change: OnBookChange | None = None
    ) -> IOrderBookHandle:
        self._check_open()
        feed = self._feed(
            ("order_book", market, ""),
            lambda **kwargs: OrderBookFeed(self, market, self.kept_levels, **kwargs),
        )
        return _joined(OrderBookStream(feed, on_change), feed)

    async def reset_connections(self) -> None:
        self._fail_sockets(ExchangeUnavailable(f"{self.exchange_name}: connections were reset"))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        feeds = list(self._feeds.values())
        for feed in feeds:
            feed.end_streams(None)
        self._fail_sockets(self._closed_error())
        await asyncio.gather(*(feed.close() for feed in feeds))
        await self._limiter.close()
        await asyncio.gather(*self.vendor.closing, return_exceptions=True)
        await self.vendor.close()

    async def prepare_feed(self, market: str) -> None:
        """Know the market, and wait for the limiter's leave to subscribe."""
        await self._know(market, Priority.LIVE)
        async with self._limiter.slot(Priority.LIVE, weight=self.subscription_weight):
            self._check_open()

    def doubt_markets(self) -> None:
        """Ask for the list of markets again when it is needed next."""
        self._doubted = True

    def candle_query(
        self,
        window: TimeRange,
        period: Interval,  # noqa: ARG002  for subclasses
    ) -> tuple[int | None, int, dict[str, Any]]:
        """``since``, ``limit`` and ``params`` for ccxt's ``fetch_ohlcv`` to ask for one window."""
        return window.start, self.page_rows, {"until": window.end - 1}

    async def _fetch_page(
        self, market: str, period: Interval, page: TimeRange, priority: Priority
    ) -> HistoricalData:
        proof = PageProof(period, page, rows=self.page_rows, grace_ms=self.grace_ms)
        while (window := proof.next_window()) is not None:
            rows, exchange_time = await self.fetch_rows(market, period, window, priority)
            proof.add(window, rows, exchange_time)
        return proof.conclude()

    async def fetch_rows(
        self, market: str, period: Interval, window: TimeRange, priority: Priority
    ) -> tuple[list[Candle], int]:
        """The rows of ``window``, checked, ascending, and the exchange's time.

        Of more rows than fit into an answer it is the newest; none means that there is none in the
        whole window, however long that is.
        """
        since, limit, params = self.candle_query(window, period)
        rows, exchange_time = await self._request(
            priority,
            lambda: self.vendor.fetch_ohlcv(market, period.name, since, limit, params),
        )
        if not isinstance(rows, list):
            raise BadExchangeAnswer(f"{self.exchange_name}: no list of candles")
        candles = [to_candle(row, period, self.exchange_name) for row in rows]
        times = [candle.timestamp for candle in candles]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise BadExchangeAnswer(f"{self.exchange_name}: candles of {market} are out of order")
        # Exchanges do not agree whether the ends of a window belong to it: one period of slack.
        earliest = 0 if self.asks_backwards else window.start - period.milliseconds
        slack = TimeRange(earliest, window.end + period.milliseconds)
        for time in times:
            if time not in slack:
                raise BadExchangeAnswer(
                    f"{self.exchange_name}: candle {time} of {market} is not of what was asked, "
                    f"{window.start} to {window.end}"
                )
        return [candle for candle in candles if candle.timestamp in window], exchange_time

    async def _request(
        self, priority: Priority, ask: Callable[[], Awaitable[_T]], *, weight: float = 1.0
    ) -> tuple[_T, int]:
        """Ask the exchange within a slot and the timeout; the answer, and the exchange's time."""
        async with self._limiter.slot(priority, weight=weight):
            self._check_open()
            answer = Answer()
            token = ANSWER.set(answer)
            sent = self._clock.now_ms()
            totals = self._limiter.totals
            totals.sent[priority] += 1
            try:
                result = await self._traced(ask, answer)
            except ExchangeUnavailable as exc:
                totals.failed[priority] += 1
                self._penalize(exc)
                raise
            except ExchangeRefused:
                self._doubted = True
                raise
            except TRANSLATED as exc:
                failed = translate(exc, self.exchange_name)
                if failed.retryable:
                    totals.failed[priority] += 1
                self._penalize(failed)
                raise failed from exc
            except RuntimeError as exc:
                # A session that is closed under a request says so with a bare RuntimeError.
                if not self._closed:
                    raise
                raise self._closed_error() from exc
            finally:
                ANSWER.reset(token)
        told = parse_http_date(answer.headers.get("date", ""))
        if told is None:
            return result, sent + self._skew_ms
        self._skew_ms = told - (sent + self._clock.now_ms()) // 2
        self._knows_time = True
        return result, told

    async def _traced(self, ask: Callable[[], Awaitable[_T]], answer: Answer) -> _T:
        """Ask within the timeout; the wait for a slot lies before the span of it."""
        with span("exchange request", kind="client", exchange=self.exchange_name) as traced:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await ask()
            finally:
                if answer.status:
                    traced.set(**{"http.request.method": answer.method})
                    traced.set(**{"http.response.status_code": answer.status})

    def _penalize(self, error: ExchangeError) -> None:
        delay = error.retry_after
        if delay is None and isinstance(error, ExchangeRateLimited):
            delay = _DEFAULT_PENALTY_S
        if delay is not None:
            self._limiter.penalize(min(delay, _LONGEST_PENALTY_S))

    async def _ask_for_book(self, market: str, levels: int | None) -> Any:
        """The book that a live one begins with, as ccxt gives it."""
        # After what closes a candle: of many books that begin at once none is as urgent.
        book, _ = await self._request(
            Priority.REQUEST,
            lambda: self.vendor.fetch_order_book(market, levels),
            weight=self.snapshot_weight,
        )
        return book

    async def _load_markets(self, priority: Priority, max_age_s: float) -> None:
        """Have a list of markets that is no older than ``max_age_s`` real seconds.

        A list that is only old is good enough while the exchange cannot be asked.
        """
        async with self._loading:
            # One at a time, and not through ccxt's own load_markets: whoever is cancelled there
            # takes everybody else who waits for the same load along.
            if self._loaded_at is not None:
                age = self._clock.monotonic() - self._loaded_at
                if age < (_DOUBTED_MAX_AGE_S if self._doubted else max_age_s):
                    return
            try:
                markets, _ = await self._request(
                    priority, self.vendor.fetch_markets, weight=self.markets_weight
                )
                self._take_markets(markets)
            except ExchangeUnavailable:
                if self._loaded_at is None or max_age_s < _MARKETS_MAX_AGE_S:
                    raise

    def _take_markets(self, markets: Any) -> None:
        spot = {market["symbol"]: bool(market["active"]) for market in markets if market["spot"]}
        if not spot:
            raise BadExchangeAnswer(f"{self.exchange_name}: its list holds no spot market")
        self.vendor.set_markets(markets)
        self._spot = spot
        self._doubted = False
        self._loaded_at = self._clock.monotonic()

    async def _know(self, market: str, priority: Priority) -> None:
        """Have ``market`` in the list.

        Raises:
            ExchangeRefused: the exchange lists no such spot market.
        """
        for max_age_s in (_MARKETS_MAX_AGE_S, _UNKNOWN_COIN_MAX_AGE_S):
            await self._load_markets(priority, max_age_s)
            if market in self._spot:
                return
        raise ExchangeRefused(f"{self.exchange_name} does not know the market {market}")

    def _interval(self, name: str) -> Interval:
        if name not in self.intervals:
            raise InvalidRequest(
                f"interval {name!r} is not offered by {self.exchange_name}; use one of "
                f"{', '.join(self.intervals)}"
            )
        return Interval.parse(name)

    def _feed(self, topic: _Topic, make: Callable[..., _F]) -> _F:
        """The feed of a topic that may be joined: the one that runs, or a new one."""
        feed = self._feeds.get(topic)
        if feed is None:
            turn = self._turns.setdefault(topic, asyncio.Lock())
            feed = self._feeds[topic] = make(turn=turn, forget=self._forget)
        return cast("_F", feed)

    def _forget(self, feed: Feed) -> None:
        self._feeds = {topic: known for topic, known in self._feeds.items() if known is not feed}

    def _fail_sockets(self, error: ExchangeUnavailable) -> None:
        for socket in list(self.vendor.clients.values()):
            self.vendor.fail_socket(socket, error)

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ExchangeUnavailable:
        return ExchangeUnavailable(f"{self.exchange_name} is closed")


def _joined(stream: _S, feed: Feed) -> _S:
    feed.join(stream)
    return stream
