"""24 hours of a market at a hundred times its speed: does the service's memory stay flat?

Three exchanges of the sandbox, three coins each, every channel of each subscribed by one client
that reads all, candles of 5m and of 1m. Memory is what the process holds (resident set, Linux),
every five market minutes. ccxt's own caches fill up in the first hours; from the 18th to the 24th
the line through it (least squares) may rise by 1 % of its mean an hour. At the end `verify`
compares what was stored with the exchange. Exit code 1 when the bar is missed or something differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

# The processes are started as tests start them.
sys.path.insert(0, str(Path(__file__).parents[1]))
from config import BUILT_IN_EXCHANGES
from tests.support.processes import Feed, Stack, market_clock, run, stack

HOUR_MS = 3_600_000
SAMPLE_MS = 300_000
NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
COINS = ("BTC", "ETH", "SOL")
CHANNELS = ("candles", "trades", "ticker", "order_book")
BAR = 0.01


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def subscribe(feed: Feed) -> None:
    """Every channel of every coin, and candles of 1m of the first."""
    wanted = [
        {"coin": coin, "exchange": exchange, "channel": channel}
        for exchange in BUILT_IN_EXCHANGES
        for coin in COINS
        for channel in CHANNELS
    ]
    wanted += [
        {"coin": COINS[0], "exchange": exchange, "interval": "1m"}
        for exchange in BUILT_IN_EXCHANGES
    ]
    for subscription in wanted:
        await feed.send(type="subscribe_realtime", **subscription)
    for _ in wanted:
        await feed.next("subscribed")


async def sample(running: Stack, hours: float) -> list[tuple[float, float]]:
    """Memory (MB) by the market hours that have passed."""
    assert running.service is not None
    began = running.clock.now_ms()
    found: list[tuple[float, float]] = []
    while (passed := running.clock.now_ms() - began) < hours * HOUR_MS:
        found.append((passed / HOUR_MS, resident_mb(running.service.pid)))
        if len(found) % 12 == 1:
            print(f"  hour {found[-1][0]:5.1f}: {found[-1][1]:6.1f} MB", flush=True)
        await running.clock.sleep_until(began + len(found) * SAMPLE_MS)
    return found


async def soak(folder: Path, hours: float, speed: float) -> int:
    """Run, print, judge."""
    settings = {
        "EXCHANGES": ",".join(BUILT_IN_EXCHANGES),
        "BACKFILL_DAYS": "1",
        "LOG_LEVEL": "WARNING",
    }
    async with (
        stack(folder, market_clock(NOON, speed), **settings) as running,
        running.websocket(running.token()) as socket,
    ):
        feed = Feed(socket)
        await subscribe(feed)
        heard: Counter[str] = Counter()

        async def listen() -> None:
            async for text in socket:
                message = json.loads(text)
                heard[f"{message['type']} {message.get('channel', '')}".strip()] += 1

        listening = asyncio.create_task(listen())
        found = await sample(running, hours)
        listening.cancel()
        await asyncio.wait([listening])
        code, lines, _ = await run("verify", "--days", "0.5", folder=folder, **running.settings)
    print("heard: " + ", ".join(f"{count} {kind}" for kind, count in heard.most_common()))
    print(f"verify: {lines[-1] if lines else code}")
    late = [(at, held) for at, held in found if at >= hours * 0.75]
    slope, _ = statistics.linear_regression(*zip(*late, strict=True))
    rise = slope / statistics.mean(held for _, held in late)
    met = rise < BAR
    verdict = "met" if met else "MISSED"
    print(
        f"from hour {late[0][0]:.1f} to {late[-1][0]:.1f} memory changes by {rise:+.2%} an hour "
        f"({slope:+.2f} MB of {late[-1][1]:.0f}); the bar is {BAR:.0%}: {verdict}"
    )
    return 0 if met and code == 0 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0, help="of the market")
    parser.add_argument("--speed", type=float, default=100.0, help="of the market's clock")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return asyncio.run(soak(Path(folder), options.hours, options.speed))


if __name__ == "__main__":
    sys.exit(main())
