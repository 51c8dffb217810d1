"""cryptofeed reads Binance's trades from another address; runs in the peers' own environment.

Prints what ``--count`` trades took as one JSON document, as ``bench_stream.py`` reads it; with
``--out`` it writes each trade as a line of JSON too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

from cryptofeed import FeedHandler, connection, feed
from cryptofeed.defines import TRADES
from cryptofeed.exchanges import Binance


class LoopbackConnection(connection.WSAsyncConn):
    """It takes addresses without TLS too."""

    def __init__(self, address: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(address.replace("ws://", "wss://", 1), *args, **kwargs)
        self.address = address


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--symbols", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    Binance.websocket_endpoints = [
        connection.WebsocketEndpoint(options.url.replace("http", "ws", 1))
    ]
    for endpoint in Binance.rest_endpoints:
        endpoint.address = options.url
    feed.WSAsyncConn = LoopbackConnection  # where it is made

    seen, began, used = 0, 0.0, 0.0
    lines: list[str] = []

    async def take(trade: Any, _: float) -> None:
        nonlocal seen, began, used
        if not seen:
            began, used = time.perf_counter(), processor_s()
        seen += 1
        if options.out is not None:
            lines.append(
                json.dumps(
                    {
                        "symbol": trade.symbol,
                        "id": trade.id,
                        "timestamp": round(trade.timestamp * 1000),
                        "price": float(trade.price),
                        "amount": float(trade.amount),
                        "side": trade.side,
                    }
                )
            )
        if seen == options.count:
            took, cost = time.perf_counter() - began, processor_s() - used
            print(json.dumps({"trades": seen, "seconds": took, "processor": cost}), flush=True)
            asyncio.get_running_loop().stop()

    handler = FeedHandler(config={"uvloop": False, "log": {"disabled": True}})
    symbols = [symbol.replace("/", "-") for symbol in options.symbols.split(",")]
    handler.add_feed(Binance(symbols=symbols, channels=[TRADES], callbacks={TRADES: take}))
    handler.run(install_signal_handlers=False)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
