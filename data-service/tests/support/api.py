"""Managers in memory that keep their interfaces' contracts, and a server on loopback to ask them
through."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from api.app import build_app
from api.services import Readiness, Services
from auth.module import AuthenticationModuleImpl, issue_token
from collection.interfaces import (
    AddCoinResult,
    Availability,
    Channel,
    ClosedCandle,
    FormingCandle,
    IDataCollectionManager,
    MarketAvailability,
    StreamEvent,
    SubscriptionStarted,
    TargetState,
    TargetStatus,
)
from config import Settings
from domain.candle import Candle
from domain.clock import IClock, MarketClock
from domain.entry import Entry
from domain.gap import Gap, GapReason
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.series import Series
from domain.time_range import RangeSet, TimeRange
from errors import CoinNotAvailable, DataServiceError, InvalidRequest, NoData, UnknownExchange
from historical.columns import Candles
from historical.interfaces import (
    Coverage,
    CurrentData,
    History,
    IHistoricalDataManager,
    IJsonWebSocket,
    Summary,
)
from target_management.interfaces import SERVICE, Target

SECRET = "a secret of the tests that is long enough"
EXCHANGE = "crypto.com"
FIVE_MINUTES = 300_000
START = 1_795_338_600_000
"""The open of a 5m period."""
WAIT_S = 5.0
"""How long a test waits at most for what must happen at once."""


def make_settings(**changes: Any) -> Settings:
    """Settings that depend on nothing outside the test."""
    return Settings(_env_file=None, **{"auth_secret": SECRET, **changes})


def make_token(
    *,
    scope: str = "data:read data:write",
    subject: str = "bot",
    ttl_s: int = 3600,
    settings: Settings | None = None,
    clock: IClock | None = None,
) -> str:
    return issue_token(
        settings or make_settings(), subject=subject, scope=scope, ttl_s=ttl_s, clock=clock
    )


def bearer(token: str | None = None) -> dict[str, str]:
    """The header that carries ``token``, by default one that may do everything."""
    return {"Authorization": f"Bearer {token or make_token()}"}


def make_series(coin: str = "BTC", interval: str = "5m") -> Series:
    return Series(EXCHANGE, coin, Interval.parse(interval))


def make_candle(timestamp: int = START, close: float = 101.0) -> Candle:
    return Candle(timestamp, 100.0, max(102.0, close), min(99.0, close), close, 1.5)


def make_entry(
    timestamp: int = START,
    *,
    close: float = 101.0,
    revision: int = 1,
    book: bool = False,
    series: Series | None = None,
) -> Entry:
    series = series or make_series()
    order_book = None
    if book:
        order_book = OrderBook(
            timestamp + series.interval.milliseconds - 50, ((100.5, 1.0),), ((101.5, 2.0),)
        )
    return Entry(
        series=series,
        market=f"{series.coin}/USD",
        candle=make_candle(timestamp, close),
        order_book=order_book,
        source="stream",
        revision=revision,
    )


@dataclass
class FakeSubscription:
    """One subscriber of ``FakeCollection``; events wait until they are read, without a bound."""

    series: Series
    from_ms: int | None
    events: asyncio.Queue[StreamEvent | DataServiceError] = field(default_factory=asyncio.Queue)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, *events: StreamEvent | DataServiceError) -> None:
        """Tell ``events``; an error ends the subscription."""
        for event in events:
            self.events.put_nowait(event)


@dataclass
class FakeCollection(IDataCollectionManager):
    """Collects whatever ``markets`` lists, on one exchange.

    ``calls`` holds each call as (method, arguments). ``fail_with`` is raised by every method while
    it is set, ``stream_fails_with`` by the streams alone. ``opened`` gets every subscription.
    """

    clock: IClock = field(default_factory=MarketClock)
    markets: dict[str, str] = field(
        default_factory=lambda: {"BTC": "BTC/USD", "ETH": "ETH/USD", "BTC/EUR": "BTC/EUR"}
    )
    targets: dict[str, TargetStatus] = field(default_factory=dict)
    subscriptions: list[FakeSubscription] = field(default_factory=list)
    opened: asyncio.Queue[FakeSubscription] = field(default_factory=asyncio.Queue)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked_by: list[str] = field(default_factory=list)
    unreachable: tuple[str, ...] = ()
    last_closed: int | None = START - FIVE_MINUTES
    fail_with: Exception | None = None
    stream_fails_with: Exception | None = None

    async def add_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        since: int | None = None,
        by: str = SERVICE,
    ) -> AddCoinResult:
        self.asked_by.append(by)
        self._called("add_coin", coin=coin, exchange=exchange, interval=interval, since=since)
        coin = coin.upper()
        market = self._market(coin, exchange)
        target_id = f"{EXCHANGE}:{coin}:{interval}"
        if target_id in self.targets:
            return AddCoinResult("already_collecting", self.targets[target_id])
        now = self.clock.now_ms()
        target = Target(
            coin=coin,
            exchange=EXCHANGE,
            exchange_id="cryptocom",
            market=market,
            interval=interval,
            enabled=True,
            since=START if since is None else since,
            created_at=now,
            last_updated=now,
        )
        self.targets[target_id] = TargetStatus(target, TargetState.STARTING, None, None)
        return AddCoinResult("added", self.targets[target_id], self.unreachable)

    async def remove_coin(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str | None = None,
        by: str = SERVICE,
    ) -> TargetStatus:
        self.asked_by.append(by)
        self._called("remove_coin", coin=coin, exchange=exchange, interval=interval)
        fitting = [
            status
            for status in self.targets.values()
            if status.target.coin == coin.upper() and interval in (None, status.target.interval)
        ]
        if len(fitting) != 1:
            named = ", ".join(status.target.target_id for status in fitting)
            raise InvalidRequest(f"one target takes the removal; found: {named or 'none'}")
        removed = self.targets.pop(fitting[0].target.target_id)
        return replace(removed, target=replace(removed.target, enabled=False))

    async def check_availability(self, coin: str, *, exchange: str | None = None) -> Availability:
        self._called("check_availability", coin=coin, exchange=exchange)
        coin = coin.upper()
        try:
            market = self._market(coin, exchange)
        except CoinNotAvailable:
            return Availability(coin, (), ())
        collecting = any(status.target.coin == coin for status in self.targets.values())
        return Availability(coin, (MarketAvailability(EXCHANGE, market, collecting),), ())

    async def list_targets(self) -> list[TargetStatus]:
        self._called("list_targets")
        return [self.targets[target_id] for target_id in sorted(self.targets)]

    async def stream_realtime_data(
        self,
        coin: str,
        *,
        exchange: str | None = None,
        interval: str = "5m",
        channel: Channel = Channel.CANDLES,
        from_ms: int | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        self._called(
            "stream_realtime_data",
            coin=coin,
            exchange=exchange,
            interval=interval,
            channel=channel,
            from_ms=from_ms,
        )
        if self.stream_fails_with is not None:
            raise self.stream_fails_with
        status = self.targets.get(f"{EXCHANGE}:{coin.upper()}:{interval}")
        if status is None:
            raise CoinNotAvailable(f"{coin} {interval} is not collected")
        subscription = FakeSubscription(status.target.series, from_ms)
        self.subscriptions.append(subscription)
        self.opened.put_nowait(subscription)
        try:
            yield SubscriptionStarted(
                status.target.series,
                status.target.market,
                self.last_closed if channel is Channel.CANDLES else None,
                channel,
            )
            while True:
                event = await subscription.events.get()
                if isinstance(event, DataServiceError):
                    raise event
                yield event
        finally:
            self.subscriptions.remove(subscription)
            subscription.closed.set()

    def called(self, method: str) -> list[dict[str, Any]]:
        """The arguments of every call of ``method``."""
        return [arguments for name, arguments in self.calls if name == method]

    def _called(self, method: str, **arguments: Any) -> None:
        self.calls.append((method, arguments))
        if self.fail_with is not None:
            raise self.fail_with

    def _market(self, coin: str, exchange: str | None) -> str:
        if exchange not in (None, EXCHANGE):
            raise UnknownExchange(f"{exchange} is not enabled; {EXCHANGE} is")
        if coin not in self.markets:
            raise CoinNotAvailable(f"{coin} is not listed by {EXCHANGE}")
        return self.markets[coin]


@dataclass
class FakeHistory(IHistoricalDataManager):
    """Reads from ``entries``; a period of a range without one is a ``no_trades`` gap.

    ``calls`` holds each call as (method, arguments). ``fail_with`` is raised by every method while
    it is set. Streams wait before each chunk while ``gate`` is cleared; ``streaming`` counts those
    that run.
    """

    clock: IClock = field(default_factory=MarketClock)
    entries: dict[Series, list[Entry]] = field(default_factory=dict)
    forming: dict[Series, Candle] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fail_with: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    streaming: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def put(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.entries.setdefault(entry.series, []).append(entry)

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
        series = self._called(
            "get_historical_data",
            coin,
            interval,
            start=start,
            end=end,
            exchange=exchange,
            limit=limit,
        )
        found = self._range(series, start, end)
        page = found[:limit]
        more = found[limit].timestamp if len(found) > limit else None
        return History(
            series=series,
            market=f"{series.coin}/USD",
            range=TimeRange(start, end),
            candles=Candles.of(entry.candle for entry in page),
            gaps=self._gaps(series, start, end if more is None else more),
            from_storage=len(page),
            from_exchange=0,
            next_start=more,
        )

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
        series = self._called(
            "stream_historical_data",
            coin,
            interval,
            start=start,
            end=end,
            exchange=exchange,
            chunk_size=chunk_size,
            request_id=request_id,
        )
        found = self._range(series, start, end)
        answers = {} if request_id is None else {"request_id": request_id}
        chunks = [found[at : at + chunk_size] for at in range(0, len(found), chunk_size)]
        self.streaming += 1
        try:
            for index, chunk in enumerate(chunks):
                await self.gate.wait()
                await websocket.send_json(
                    {
                        "type": "historical_data_chunk",
                        **answers,
                        "index": index,
                        "exchange": series.exchange,
                        "coin": series.coin,
                        "market": f"{series.coin}/USD",
                        "interval": interval,
                        "columns": ["timestamp", "open", "high", "low", "close", "volume"],
                        "rows": [row(entry) for entry in chunk],
                    }
                )
            await self.gate.wait()
            await websocket.send_json(
                {
                    "type": "historical_data_complete",
                    **answers,
                    "count": len(found),
                    "chunks": len(chunks),
                    "gaps": [],
                    "sources": {"storage": len(found), "exchange": 0},
                }
            )
        finally:
            self.streaming -= 1

    async def get_most_current_data(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> CurrentData:
        series = self._called("get_most_current_data", coin, interval, exchange=exchange)
        if series in self.forming:
            return CurrentData(series, f"{series.coin}/USD", self.forming[series], None, 120)
        if not self.entries.get(series):
            raise NoData(f"nothing is known of {series} yet")
        newest = self.entries[series][-1]
        return CurrentData(series, newest.market, newest.candle, newest, 340)

    async def summarize_history(
        self,
        coin: str,
        start: int,
        end: int,
        *,
        exchange: str | None = None,
        interval: str = "5m",
    ) -> Summary:
        series = self._called(
            "summarize_history", coin, interval, start=start, end=end, exchange=exchange
        )
        candles = [entry.candle for entry in self._range(series, start, end)]
        if not candles:
            raise NoData(f"there is no candle of {series} in the range")
        return Summary(
            series=series,
            market=f"{series.coin}/USD",
            range=TimeRange(start, end),
            count=len(candles),
            first=candles[0],
            last=candles[-1],
            high=max(candle.high for candle in candles),
            low=min(candle.low for candle in candles),
            change_percent=(candles[-1].close / candles[0].open - 1) * 100,
            volume=sum(candle.volume for candle in candles),
            vwap=100.5,
            volatility=None,
            max_drawdown_percent=0.0,
            candles=Candles.of(candles[:50]),
            candle_periods=1,
            gaps=self._gaps(series, start, end),
        )

    async def get_coverage(
        self, coin: str, *, exchange: str | None = None, interval: str = "5m"
    ) -> Coverage:
        series = self._called("get_coverage", coin, interval, exchange=exchange)
        found = self.entries.get(series, [])
        step = series.interval.milliseconds
        stored = RangeSet(TimeRange(item.timestamp, item.end) for item in found)
        first = found[0].timestamp if found else None
        last = found[-1].timestamp if found else None
        gaps = self._gaps(series, first, last) if first is not None and last is not None else ()
        return Coverage(
            series=series,
            first=first,
            last=last,
            expected=0 if first is None or last is None else (last - first) // step + 1,
            stored=len(found),
            with_order_book=sum(item.order_book is not None for item in found),
            ranges=tuple(stored),
            gaps=gaps,
        )

    def called(self, method: str) -> list[dict[str, Any]]:
        """The arguments of every call of ``method``."""
        return [arguments for name, arguments in self.calls if name == method]

    def _called(self, method: str, coin: str, interval: str, **arguments: Any) -> Series:
        self.calls.append((method, {"coin": coin, "interval": interval, **arguments}))
        if self.fail_with is not None:
            raise self.fail_with
        return make_series(coin.upper(), interval)

    def _range(self, series: Series, start: int, end: int) -> list[Entry]:
        return [item for item in self.entries.get(series, []) if start <= item.timestamp < end]

    def _gaps(self, series: Series, start: int, end: int) -> tuple[Gap, ...]:
        stored = RangeSet(
            TimeRange(item.timestamp, item.end) for item in self.entries.get(series, [])
        )
        first = series.interval.ceil(start)
        return tuple(
            Gap(missing, GapReason.NO_TRADES) for missing in stored.missing(TimeRange(first, end))
        )


def row(entry: Entry) -> list[float]:
    candle = entry.candle
    return [
        candle.timestamp,
        candle.open,
        candle.high,
        candle.low,
        candle.close,
        candle.volume,
    ]


@dataclass
class FakeHealth:
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    async def readiness(self) -> Readiness:
        return Readiness(tuple(self.reasons), tuple(self.warnings))


@dataclass
class World:
    """An application on fakes."""

    app: FastAPI
    settings: Settings
    collection: FakeCollection
    history: FakeHistory
    health: FakeHealth


def make_services(
    collection: FakeCollection,
    history: FakeHistory,
    *,
    settings: Settings | None = None,
    health: FakeHealth | None = None,
    clock: IClock | None = None,
) -> Services:
    settings = settings or make_settings()
    clock = clock or MarketClock()
    return Services(
        settings=settings,
        clock=clock,
        auth=AuthenticationModuleImpl.from_settings(settings, clock),
        collection=collection,
        history=history,
        health=health or FakeHealth(),
    )


def make_world(settings: Settings | None = None) -> World:
    settings = settings or make_settings()
    collection, history, health = FakeCollection(), FakeHistory(), FakeHealth()
    services = make_services(collection, history, settings=settings, health=health)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = services
        app.state.auth = services.auth
        yield

    return World(build_app(settings, lifespan), settings, collection, history, health)


@asynccontextmanager
async def http_client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application itself, without sockets, within its lifespan."""
    async with world.app.router.lifespan_context(world.app):
        transport = httpx.ASGITransport(app=world.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield client


@dataclass
class Server:
    """The application on a real server."""

    world: World
    host: str
    uvicorn: uvicorn.Server
    ended: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def websocket(self, token: str | None = None, **options: Any) -> connect:
        """A connection to ``/ws/data``; without ``token``, one that may do everything."""
        headers = {"additional_headers": bearer(token), **options}
        return connect(f"ws://{self.host}/ws/data", proxy=None, **headers)

    async def stop(self) -> None:
        self.uvicorn.should_exit = True
        await asyncio.wait_for(asyncio.shield(self.ended), WAIT_S)


@asynccontextmanager
async def serving(world: World) -> AsyncIterator[Server]:
    """Run the application on a free port of loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Listening at once: clients need not wait for the server, their connections do.
        listener.listen()
        config = uvicorn.Config(
            world.app, log_config=None, lifespan="on", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        running = Server(world, f"127.0.0.1:{listener.getsockname()[1]}", server, task)
        try:
            yield running
        finally:
            await running.stop()


async def say(client: ClientConnection, message_type: str, **fields: Any) -> None:
    await client.send(json.dumps({"type": message_type, **fields}))


async def hear(client: ClientConnection) -> dict[str, Any]:
    """The next message."""
    message: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), WAIT_S))
    return message


async def hear_close(client: ClientConnection) -> int | None:
    """The close code, once the connection is closed; messages before it are dropped."""
    with suppress(ConnectionClosed):
        while True:
            await asyncio.wait_for(client.recv(), WAIT_S)
    return client.close_code


def forming(timestamp: int = START, close: float = 100.0) -> FormingCandle:
    return FormingCandle(make_candle(timestamp, close))


def closed(timestamp: int = START, *, late: bool = False, **changes: Any) -> ClosedCandle:
    return ClosedCandle(make_entry(timestamp, **changes), late)
