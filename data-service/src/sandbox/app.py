"""The sandbox as one web application: protocols, control page, and the faults between."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from domain.clock import IClock, MarketClock, http_date
from sandbox.binance import BinanceProtocol
from sandbox.coinbase import CoinbaseProtocol
from sandbox.coinbase_streams import CoinbaseTimes
from sandbox.control import PREFIX as CONTROL
from sandbox.control import Control, RequestLog, answer
from sandbox.cryptocom import MESSAGE_LIMIT, CryptocomProtocol
from sandbox.faults import Fault, FaultBoard, plain_name
from sandbox.flat_candles import FlatCandles
from sandbox.prices import DEFAULT_HISTORY_START_MS, GeneratedPrices, IPriceSource
from sandbox.protocol import IProtocol
from sandbox.replay import load_replay
from sandbox.sockets import Hub
from sandbox.venue import ExchangeClock, Venue

HOST: Final = "127.0.0.1"
_HTML: Final = "<html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>"
_VENUE: Final = web.AppKey("venue", Venue)
_HUB: Final = web.AppKey("hub", Hub)
_LOG: Final = web.AppKey("log", RequestLog)


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """How the sandbox runs.

    ``replay`` is a recording to play in place of invented prices, which are told from
    ``history_start_ms`` on; ``prices`` goes before both. ``skew_ms`` is how far the exchange's
    clock is ahead of the market's.
    Every answer is held back for ``answer_delay_ms`` of real time. Above ``rate_limit`` requests
    in a second it answers 429; None is no limit. ``heartbeat_s`` is in real seconds, and so is how
    patient Coinbase's sockets are.
    """

    seed: int = 1
    replay: Path | None = None
    prices: IPriceSource | None = None
    history_start_ms: int = DEFAULT_HISTORY_START_MS
    market_clock: IClock = field(default_factory=MarketClock)
    skew_ms: int = 0
    answer_delay_ms: int = 0
    rate_limit: int | None = None
    heartbeat_s: float = 30.0
    coinbase_times: CoinbaseTimes = field(default_factory=CoinbaseTimes)


@dataclass(frozen=True, slots=True)
class RunningSandbox:
    """A sandbox that listens, and the parts of it that a test in the same process may use."""

    url: str
    port: int
    venue: Venue
    hub: Hub
    log: RequestLog

    @property
    def ws_url(self) -> str:
        """The base URL of its sockets."""
        return self.url.replace("http://", "ws://", 1)


def create_sandbox(config: SandboxConfig) -> web.Application:
    """The application; nothing runs before it is served.

    Raises:
        sandbox.replay.ReplayError: the recording cannot be played.
    """
    prices: IPriceSource
    if config.prices is not None:
        prices = config.prices
    elif config.replay is None:
        prices = GeneratedPrices(config.seed, history_start_ms=config.history_start_ms)
    else:
        prices = load_replay(config.replay, config.seed)
    clock = ExchangeClock(config.market_clock, config.skew_ms)
    faults = FaultBoard(clock)
    venue = Venue(prices, clock, faults)
    hub = Hub(venue)
    log = RequestLog()
    # Binance has a flat candle where nobody traded; holes of a recording are outages there too.
    invented = isinstance(prices, GeneratedPrices)
    flat = Venue(FlatCandles(prices), clock, faults) if invented else venue
    protocols: list[IProtocol] = [
        CryptocomProtocol(venue, hub, heartbeat_s=config.heartbeat_s),
        BinanceProtocol(flat, hub, heartbeat_s=config.heartbeat_s),
        CoinbaseProtocol(venue, hub, times=config.coinbase_times),
    ]
    app = web.Application(
        middlewares=[
            _counted(log, venue, protocols),
            _connections(faults),
            _paced(config, protocols),
            _faulty(faults, protocols),
        ],
        client_max_size=MESSAGE_LIMIT,
    )
    app[_VENUE], app[_HUB], app[_LOG] = venue, hub, log
    for protocol in protocols:
        protocol.add_routes(app.router)
    source = "generated" if invented else "recorded"
    Control(venue, hub, log, source=source).add_routes(app.router)

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Date"] = http_date(clock.now_ms())
        protocol = _protocol_of(request, protocols)
        if protocol is None or _is_socket(request):
            return
        for name, value in protocol.on_answer(request, response.status).items():
            response.headers.setdefault(name, value)

    async def stop(_: web.Application) -> None:
        # Clearing lets go of every request that a fault keeps waiting.
        faults.clear()
        await hub.close()

    app.on_response_prepare.append(prepare)
    app.on_shutdown.append(stop)
    return app


@contextlib.asynccontextmanager
async def running_sandbox(
    config: SandboxConfig = SandboxConfig(), *, port: int = 0
) -> AsyncIterator[RunningSandbox]:
    """Serve a sandbox on loopback for as long as the context lasts; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
        sandbox.replay.ReplayError: the recording cannot be played.
    """
    app = await asyncio.to_thread(create_sandbox, config)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
        taken = int(runner.addresses[0][1])
        yield RunningSandbox(f"http://{HOST}:{taken}", taken, app[_VENUE], app[_HUB], app[_LOG])
    finally:
        await runner.cleanup()


def _is_control(request: web.Request) -> bool:
    return request.path == CONTROL or request.path.startswith(f"{CONTROL}/")


def _is_socket(request: web.Request) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


def _counted(log: RequestLog, venue: Venue, protocols: Sequence[IProtocol]) -> Middleware:
    markets = {plain_name(item.symbol): item.symbol for item in venue.instruments()}

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _is_control(request):
            return await handler(request)
        # Paths that do not exist share a name, as do those of one pattern, and markets that do
        # not exist are left out, so that the log cannot grow without bound.
        resource = request.match_info.route.resource
        log.add(resource.canonical if resource else "(unknown)", venue.clock.real_ms())
        protocol = _protocol_of(request, protocols)
        instrument = protocol.asked_for(request)[0] if protocol is not None else None
        market = markets.get(plain_name(instrument or ""))
        if market is not None:
            log.by_market[market] += 1
        try:
            response = await handler(request)
        except web.HTTPException as exc:
            log.by_status[exc.status] += 1
            raise
        log.by_status[response.status] += 1
        return response

    return middleware


def _connections(faults: FaultBoard) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _is_control(request):
            return await handler(request)
        if faults.take("refuse_connections") is not None:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=503)
        if _is_socket(request):
            refused = faults.take("ws_refuse")
            if refused is not None:
                return web.Response(status=refused.fields.get("status", 503))
        return await handler(request)

    return middleware


def _paced(config: SandboxConfig, protocols: Sequence[IProtocol]) -> Middleware:
    recent: deque[float] = deque()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        protocol = _protocol_of(request, protocols)
        if protocol is None or _is_socket(request):
            return await handler(request)
        if config.answer_delay_ms:
            await asyncio.sleep(config.answer_delay_ms / 1000)
        if config.rate_limit is not None:
            now = asyncio.get_running_loop().time()
            while recent and recent[0] <= now - 1:
                recent.popleft()
            if len(recent) >= config.rate_limit:
                return answer(protocol.failure(request, 429), status=429)
            recent.append(now)
        return await handler(request)

    return middleware


def _faulty(faults: FaultBoard, protocols: Sequence[IProtocol]) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        protocol = _protocol_of(request, protocols)
        if protocol is None or _is_socket(request):
            return await handler(request)
        instrument, timeframe = protocol.asked_for(request)
        what = {"path": request.path, "instrument": instrument, "timeframe": timeframe}
        delayed = faults.take("rest_delay", **what)
        if delayed is not None:
            await asyncio.sleep(delayed.fields["delay"])
        hanging = faults.take("rest_hang", **what)
        if hanging is not None:
            await hanging.cleared.wait()
        failing = faults.take("rest_status", **what)
        if failing is not None:
            return _failed(protocol, request, failing)
        if faults.take("rest_empty", **what) is not None:
            return web.Response(status=200)
        garbage = faults.take("rest_garbage", **what)
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = answer(protocol.failure(request, 404), status=404)
        return response if garbage is None else _garbled(response, garbage)

    return middleware


def _garbled(response: web.StreamResponse, fault: Fault) -> web.Response:
    """Nonsense in place of ``response``, with a status that says all is well."""
    if fault.fields.get("body") == "html":
        return web.Response(text=_HTML.format("Welcome"), content_type="text/html")
    whole = response.body if isinstance(response, web.Response) else None
    text = whole if isinstance(whole, bytes) else b""
    return web.Response(body=text[: len(text) * 2 // 3], content_type="application/json")


def _failed(protocol: IProtocol, request: web.Request, fault: Fault) -> web.Response:
    status = fault.fields["status"]
    if fault.fields.get("body", "json") == "html":
        response = web.Response(
            text=_HTML.format(f"{status} Error"), status=status, content_type="text/html"
        )
    else:
        response = answer(protocol.failure(request, status), status=status)
    retry_after = fault.fields.get("retry_after")
    if retry_after is not None:
        response.headers["Retry-After"] = f"{retry_after:g}"
    return response


def _protocol_of(request: web.Request, protocols: Sequence[IProtocol]) -> IProtocol | None:
    return next((item for item in protocols if item.serves(request.path)), None)
