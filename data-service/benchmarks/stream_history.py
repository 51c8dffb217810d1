"""A year of candles to a WebSocket client over loopback: the service, and a bare server.

``rates`` runs both as processes of their own, and one client against them in turn. The bare server
is of the library ``websockets``; it sends the very messages that the service sent, already encoded.
Run as a program, this is that server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

# The processes are started as tests start them.
sys.path.insert(0, str(Path(__file__).parents[1]))
import orjson
import websockets

from domain.time_range import RangeSet, TimeRange
from reconciliation.ledger import Ledger
from storage.implementations.local_file_storage import LocalFileStorage
from storage.path_utility import StoragePathUtility
from storage.root_stamp import write_stamp
from tests.support.processes import SECRET, clean_environment, program, run

COMPLETE = "historical_data_complete"


async def make_ready(root: Path, exchange: str, coin: str, year: TimeRange) -> None:
    """Make a root of documents one that the service takes as it is: of an exchange that is not
    asked, every candle verified."""
    storage = LocalFileStorage(root)
    await storage.open()
    await write_stamp(storage, redirected=True)
    ledger = Ledger(verified=RangeSet([year]), bookless=RangeSet([year]))
    await storage.write_blob(StoragePathUtility.get_ledger_path(exchange, coin), ledger.to_bytes())
    await storage.close()


async def rates(
    root: Path, coin: str, year: TimeRange, *, repeats: int, compression: str | None
) -> tuple[list[float], list[float]]:
    """Rows a second of the service, and of the bare server, by turns."""
    settings = {
        "HOST": "127.0.0.1",
        "PORT": "0",
        "STORAGE_ROOT": str(root),
        "STATE_DIR": str(root / "state"),
        "EXCHANGES": "crypto.com",
        "EXCHANGE_ENDPOINTS": json.dumps({"crypto.com": "http://127.0.0.1:9"}),
        "AUTH_SECRET": SECRET,
        "LOG_LEVEL": "ERROR",
    }
    _, lines, _ = await run("token", "--subject", "bench", folder=root, **settings)
    headers = {"Authorization": f"Bearer {lines[0]}"}
    request = json.dumps(
        {"type": "request_historical", "coin": coin, "start": year.start, "end": year.end}
    )
    environment = clean_environment(**settings)
    messages = root / "messages.json"
    async with program("cli", "serve", environment=environment, folder=root) as (_, line):
        ours = line.rsplit(" ", 1)[-1].replace("http", "ws", 1) + "/ws/data"
        sent = await received(ours, headers, request, compression)
        messages.write_text(json.dumps(sent))
        served = {**environment, "PYTHONPATH": str(Path(__file__).parent)}
        async with program("stream_history", str(messages), environment=served, folder=root) as (
            _,
            said,
        ):
            bare = said.rsplit(" ", 1)[-1].replace("http", "ws", 1)
            figures: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats):
                for url, found in zip((ours, bare), figures, strict=True):
                    found.append(await rate(url, headers, request, compression))
    return figures


async def rate(url: str, headers: dict[str, str], request: str, compression: str | None) -> float:
    """Rows a second, as a client has them that reads every message."""
    async with websockets.connect(
        url, additional_headers=headers, compression=compression, max_size=None
    ) as socket:
        began, count = time.perf_counter(), 0
        await socket.send(request)
        while (message := orjson.loads(await socket.recv()))["type"] != COMPLETE:
            count += len(message["rows"])
        took = time.perf_counter() - began
    if count != message["count"]:
        raise SystemExit(f"{url} sent {count} rows of {message['count']}")
    return count / took


async def received(
    url: str, headers: dict[str, str], request: str, compression: str | None
) -> list[str]:
    """Every message of one answer."""
    async with websockets.connect(
        url, additional_headers=headers, compression=compression, max_size=None
    ) as socket:
        await socket.send(request)
        found: list[str] = []
        async for text in socket:
            found.append(str(text))
            if COMPLETE in found[-1][:60]:
                return found
    raise SystemExit(f"{url} closed before it was done")


async def serve(messages: list[str]) -> None:
    """The bare server."""

    async def answer(socket: websockets.ServerConnection) -> None:
        await socket.recv()
        for message in messages:
            await socket.send(message)

    async with websockets.serve(answer, "127.0.0.1", 0) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        print(f"serving on http://{host}:{port}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
