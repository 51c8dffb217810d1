"""What a trade costs on its way in: 20 markets of one exchange, four readers in the same run

(a) bare ``websockets`` and ``orjson``, which read and decode;
(b) ``ccxt.pro`` alone: ``watch_trades`` of each market;
(c) our plugin, up to the callback that hands trades to their subscribers;
(d) ``cryptofeed``, where its environment is set up (``make peers``).

A server that speaks Binance's protocol waits until all markets are subscribed, and then sends
messages made beforehand by the sandbox, in two ways: as fast as its client takes them, which then
wakes for many at once, and evenly in time, so that it wakes for each, as it does on an ordinary
day. Each reader is a process of its own and takes the same trades, cryptofeed in the messages of
combined streams, which are 44% longer; rounds are interleaved, medians are told. Processor time is
what the reader's process used from its first trade to its last. Exit code 1 when ours costs more
than 1.15 times (b) either way, 3 when (d) could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from domain.time_range import TimeRange
from sandbox import binance_messages as messages
from sandbox.prices import DAY_MS, GeneratedPrices, Instrument, Listing

BAR = 1.15
ROUNDS = 5
PEERS = Path(__file__).parents[2] / ".venv-peers/bin/python"
CRYPTOFEED = Path(__file__).parent / "stream_cryptofeed.py"
READERS = ("websockets + orjson", "ccxt.pro", "ours", "cryptofeed")
COINS = ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "CRO")
QUOTES = ("USDT", "USD", "EUR")
MARKETS = [
    Instrument(coin, quote, price_decimals=5, quantity_decimals=5)
    for quote in QUOTES
    for coin in COINS
][:20]
DAY = 20_000
RATE = 500.0
_CHUNK = 256
_MOST_BUFFERED = 1 << 20
# Real seconds that a reader gets for everything.
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """So many trades, ``rate`` of them a second; None, as fast as they are taken."""

    trades: int
    rate: float | None = None

    def __str__(self) -> str:
        pace = "as fast as they are taken" if self.rate is None else f"at {self.rate:.0f}/s"
        return f"{self.trades} trades of {len(MARKETS)} markets {pace}"


# -- the exchange -------------------------------------------------------------------------------


def frames(count: int, *, combined: bool) -> list[bytes]:
    """``count`` trades of all markets in turn, as WebSocket frames; ``combined`` ones are as the
    combined streams tell aggregated trades, which is what cryptofeed reads."""
    prices = GeneratedPrices(listings=[Listing(item, 12.0) for item in MARKETS])
    part = TimeRange(DAY * DAY_MS, (DAY + 1) * DAY_MS)
    trades = [prices.trades(item, part) for item in MARKETS]
    found = []
    for number in range(count):
        instrument = MARKETS[number % len(MARKETS)]
        told = trades[number % len(MARKETS)]
        trade = told[number // len(MARKETS) % len(told)]
        trade = replace(trade, id=number + 1)
        if combined:
            stream = f"{messages.symbol_of(instrument).lower()}@aggTrade"
            event = messages.aggregate_event(instrument, trade, trade.timestamp)
            message: dict[str, Any] = {"stream": stream, "data": event}
        else:
            message = messages.trade_event(instrument, trade, trade.timestamp)
        found.append(frame(orjson.dumps(message)))
    return found


def frame(payload: bytes) -> bytes:
    """An unmasked text frame, as servers send them (RFC 6455, 5.2)."""
    if len(payload) < 126:
        return bytes((0x81, len(payload))) + payload
    return bytes((0x81, 126)) + len(payload).to_bytes(2, "big") + payload


class Firehose:
    """Tells every client the same trades once it has subscribed to all markets."""

    def __init__(self, load: Load) -> None:
        self._rate = load.rate
        self._frames = {
            combined: frames(load.trades, combined=combined) for combined in (False, True)
        }

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v3/exchangeInfo", self._exchange_info)
        app.router.add_get("/ws/{number}", self._single)
        app.router.add_get("/stream", self._combined)
        return app

    async def _exchange_info(self, _: web.Request) -> web.Response:
        info = messages.exchange_info(MARKETS, DAY * DAY_MS)
        return web.Response(body=orjson.dumps(info), content_type="application/json")

    async def _single(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        subscribed: set[str] = set()
        async for message in ws:
            asked = message.json()
            subscribed.update(asked["params"])
            await ws.send_json({"result": None, "id": asked["id"]})
            if len(subscribed) == len(MARKETS):
                await self._pour(request, combined=False)
                subscribed.clear()
        return ws

    async def _combined(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        await self._pour(request, combined=True)
        async for _ in ws:
            pass
        return ws

    async def _pour(self, request: web.Request, *, combined: bool) -> None:
        """Write the frames straight to the transport: what is measured is who reads them."""
        transport = request.transport
        told = self._frames[combined]
        step = _CHUNK if self._rate is None else 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        for start in range(0, len(told), step):
            if transport is None or transport.is_closing():
                return
            transport.write(b"".join(told[start : start + step]))
            while transport.get_write_buffer_size() > _MOST_BUFFERED:  # noqa: ASYNC110  it tells nobody
                await asyncio.sleep(0.0005)
            due = began if self._rate is None else began + (start + step) / self._rate
            await asyncio.sleep(due - loop.time())


async def serve(load: Load) -> None:
    """Serve until killed; prints its address."""
    runner = web.AppRunner(Firehose(load).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


# -- the readers --------------------------------------------------------------------------------


class Meter:
    """Counts trades; what passed from the first to the last."""

    def __init__(self, count: int) -> None:
        self.done = asyncio.Event()
        self._count = count
        self._seen = 0
        self._began = self._ended = (0.0, 0.0)

    def add(self, trades: int) -> None:
        if not self._seen:
            self._began = time.perf_counter(), processor_s()
        self._seen += trades
        if self._seen >= self._count:
            self._ended = time.perf_counter(), processor_s()
            self.done.set()

    def report(self) -> str:
        (began, used), (ended, used_then) = self._began, self._ended
        figures = {"seconds": ended - began, "processor": used_then - used}
        return json.dumps({"trades": self._seen, **figures})


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def read_bare(url: str, meter: Meter) -> None:
    import websockets  # noqa: PLC0415  each reader loads what it needs, and no more

    address = url.replace("http", "ws", 1)
    async with websockets.connect(f"{address}/ws/0", compression=None) as socket:
        streams = [f"{messages.symbol_of(item).lower()}@trade" for item in MARKETS]
        await socket.send(json.dumps({"method": "SUBSCRIBE", "params": streams, "id": 1}))
        while not meter.done.is_set():
            if orjson.loads(await socket.recv()).get("e") == "trade":
                meter.add(1)


async def read_ccxt(url: str, meter: Meter) -> None:
    import ccxt.pro  # noqa: PLC0415

    from exchange_source.plugins.ccxt_guards import redirect_urls  # noqa: PLC0415

    class Binance(ccxt.pro.binance):  # type: ignore[misc]  # an untyped library
        def is_spot_url(self, _: Any) -> bool:
            return True

    options = {"fetchMarkets": {"types": ["spot"]}, "streamLimits": {"spot": 1}}
    exchange = Binance({"options": options, "enableRateLimit": False})
    exchange.has["fetchCurrencies"] = False
    exchange.urls = redirect_urls(exchange.urls, url)
    await exchange.load_markets()

    async def watch(symbol: str) -> None:
        while True:
            meter.add(len(await exchange.watch_trades(symbol)))

    tasks = [asyncio.create_task(watch(item.symbol)) for item in MARKETS]
    await meter.done.wait()
    print(meter.report(), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await exchange.close()


async def read_ours(url: str, meter: Meter) -> None:
    from domain.clock import MarketClock  # noqa: PLC0415
    from domain.trade import Trade  # noqa: PLC0415
    from exchange_source.plugins.binance_exchange import BinanceExchange  # noqa: PLC0415

    async def take(trades: Sequence[Trade]) -> None:
        meter.add(len(trades))

    exchange = BinanceExchange(clock=MarketClock(), endpoint=url)
    for item in MARKETS:
        await exchange.start_trade_stream(item.symbol, take)
    await meter.done.wait()
    print(meter.report(), flush=True)
    await exchange.close()


async def read(reader: str, url: str, count: int) -> None:
    """Be one of the readers, and print what it took."""
    meter = Meter(count)
    async with asyncio.timeout(_PATIENCE_S):
        if reader == READERS[0]:
            await read_bare(url, meter)
            print(meter.report(), flush=True)
        elif reader == READERS[1]:
            await read_ccxt(url, meter)
        else:
            await read_ours(url, meter)


# -- the comparison -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round: trades a second, and microseconds of the processor a trade."""

    rate: float
    processor_us: float


@asynccontextmanager
async def exchange(load: Load) -> AsyncIterator[str]:
    """The server as a process of its own; its address."""
    command = [sys.executable, __file__, "serve", "--count", str(load.trades)]
    command += [] if load.rate is None else ["--rate", str(load.rate)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            address = (await process.stdout.readline()).decode().strip()
        yield address
    finally:
        process.kill()
        await process.wait()


async def measure(reader: str, url: str, count: int) -> Cost:
    """One round of one reader."""
    command = [sys.executable, __file__, "read", "--reader", reader]
    if reader == "cryptofeed":
        command = [str(PEERS), str(CRYPTOFEED)]
        command += ["--symbols", ",".join(item.symbol for item in MARKETS)]
    process = await asyncio.create_subprocess_exec(
        *command, "--url", url, "--count", str(count), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = output.decode().splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"{reader} failed with {process.returncode}")
    found = json.loads(lines[-1])
    if found["trades"] != count:
        raise RuntimeError(f"{reader} saw {found['trades']} trades of {count}")
    return Cost(count / found["seconds"], found["processor"] / count * 1e6)


async def compare(load: Load, rounds: int) -> float:
    """Measure every reader under one load and print; what ours costs of what ccxt.pro does."""
    readers = [name for name in READERS if name != "cryptofeed" or PEERS.exists()]
    costs: dict[str, list[Cost]] = {name: [] for name in readers}
    async with exchange(load) as url:
        for _ in range(rounds):
            for name in readers:
                costs[name].append(await measure(name, url, load.trades))
    middle = {
        name: statistics.median(cost.processor_us for cost in found)
        for name, found in costs.items()
    }
    print(f"{load}, medians of {rounds} interleaved rounds")
    for name, found in costs.items():
        rate = statistics.median(cost.rate for cost in found)
        print(f"  {name:20} {rate:9.0f} trades/s  {middle[name]:7.1f} us of the processor a trade")
    ratio = middle["ours"] / middle["ccxt.pro"]
    verdict = "met" if ratio <= BAR else "MISSED"
    print(f"ours costs {ratio:.2f} of ccxt.pro; the bar is {BAR}: {verdict}")
    if "cryptofeed" in middle:
        print(
            f"ccxt.pro costs {middle['ccxt.pro'] / middle['cryptofeed']:.2f} of cryptofeed, "
            f"ours {middle['ours'] / middle['cryptofeed']:.2f}"
        )
    return ratio


async def compare_all(count: int, rounds: int) -> int:
    """Under both loads; the exit code."""
    loads = (Load(count), Load(max(1, count // 50), RATE))
    ratios = [await compare(load, rounds) for load in loads]
    if not PEERS.exists():
        print("cryptofeed was not measured: its environment is not set up (make peers)")
    if max(ratios) > BAR:
        return 1
    return 0 if PEERS.exists() else 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("compare", "serve", "read"), nargs="?", default="compare")
    parser.add_argument("--count", type=int, default=100_000, help="trades a round at full speed")
    parser.add_argument("--rate", type=float, help="trades a second that are served")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.what == "serve":
        asyncio.run(serve(Load(options.count, options.rate)))
    elif options.what == "read":
        asyncio.run(read(options.reader, options.url, options.count))
    else:
        return asyncio.run(compare_all(options.count, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
