"""What ``make run`` and ``make run-live`` start: the service, ready to look at.

Starts the sandbox exchange (unless ``--live``) and the service as processes of their own, adds BTC
and ETH, prints addresses and a token, and then a line a candle, read from the service's own
WebSocket. Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import websockets

from auth.module import issue_token
from config import BUILT_IN_EXCHANGES, Settings, load_settings
from errors import DataServiceError

COINS: Final = ("BTC", "ETH")
SCOPE: Final = "data:read data:write"
TOKEN_TTL_S: Final = 30 * 86_400
READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0


class ChildDied(DataServiceError):
    """A program that should go on has ended."""


async def _run(live: bool) -> int:  # noqa: FBT001  the one switch of this program
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.create_task(_demonstrate(live))
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        print("\nStopping ...", flush=True)
    asked.cancel()
    work.cancel()
    await asyncio.wait({work})
    if work.cancelled():
        return 0
    if (error := work.exception()) is not None:
        print(f"make run: {error}", file=sys.stderr)
    return 1


async def _demonstrate(live: bool) -> None:  # noqa: FBT001
    folder = "./data-live" if live else "./data-sandbox"
    environment = dict(os.environ)
    environment.setdefault("STORAGE_ROOT", folder)
    environment.setdefault("STATE_DIR", environment["STORAGE_ROOT"])
    environment.setdefault("AUTH_SECRET", _kept_secret(Path(environment["STATE_DIR"])))
    environment.setdefault("LOG_LEVEL", "WARNING")
    # A person looks on, and the address is taken from what the service prints.
    environment["LOG_FORMAT"] = "console"
    if live:
        await _serve_and_show(environment, live=True)
        return
    port = environment.get("SANDBOX_PORT", "0")
    async with _program(["sandbox", "--port", port], environment) as (sandbox, url):
        environment["EXCHANGE_ENDPOINTS"] = json.dumps(dict.fromkeys(BUILT_IN_EXCHANGES, url))
        environment["EXCHANGES"] = ",".join(BUILT_IN_EXCHANGES)
        await _while_alive(sandbox, "the sandbox", _serve_and_show(environment, live=False))


async def _serve_and_show(environment: dict[str, str], *, live: bool) -> None:
    os.environ.update(environment)
    settings = load_settings()
    token = issue_token(settings, subject="demo", scope=SCOPE, ttl_s=TOKEN_TTL_S)
    async with _program(["serve"], environment) as (service, url):
        await _while_alive(service, "the service", _use(settings, url, token, live=live))


async def _use(settings: Settings, url: str, token: str, *, live: bool) -> None:
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=READY_TIMEOUT_S
    ) as client:
        for coin in COINS:
            answer = await client.post("/api/v1/coins", json={"coin": coin})
            if answer.is_error:
                raise DataServiceError(f"{coin} cannot be added: {answer.json()['detail']}")
    _introduce(settings, url, token, live=live)
    await _show(url.replace("http", "ws", 1) + "/ws/data", token)


def _introduce(settings: Settings, url: str, token: str, *, live: bool) -> None:
    market = (
        "the real exchanges"
        if live
        else "a SIMULATED market: prices are made up (make run-live collects the real ones)"
    )
    agent = {
        "type": "http",
        "url": f"{url}/mcp",
        "headers": {"Authorization": f"Bearer {token}"},
    }
    print(
        f"""
cb-trade data service, on {market}

  HTTP       {url}/docs
  WebSocket  {url.replace("http", "ws", 1)}/ws/data
  MCP        {url}/mcp
  stored in  {Path(settings.storage_root).resolve()}

  TOKEN={token}

An agent's configuration:
  {json.dumps({"mcpServers": {"cb-trade-data": agent}})}

Live candles of {" and ".join(COINS)}, from the WebSocket (Ctrl-C stops everything):
""",
        flush=True,
    )


async def _show(address: str, token: str) -> None:
    """Print a line a candle until cancelled."""
    headers = {"Authorization": f"Bearer {token}"}
    async for socket in websockets.connect(address, additional_headers=headers):
        for coin in COINS:
            await socket.send(json.dumps({"type": "subscribe_realtime", "coin": coin}))
        try:
            async for message in socket:
                line = _line(json.loads(message))
                if line is not None:
                    print(line, flush=True)
        except websockets.ConnectionClosed:
            continue


def _line(message: dict[str, Any]) -> str | None:
    if message["type"] == "error":
        return f"error: {message['message']}"
    if message["type"] == "gap":
        return f"gap ({message['reason']}) from {_clock(message['start'])}"
    if message["type"] != "realtime_data":
        return None
    data = message["data"]
    state = "closed " if data["closed"] else "forming"
    return (
        f"{_clock(data['timestamp'])}  {message['market']:<9} {state}  "
        f"open {data['open']:<10g} high {data['high']:<10g} low {data['low']:<10g} "
        f"close {data['close']:<10g} volume {data['volume']:g}"
    )


def _clock(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _kept_secret(folder: Path) -> str:
    """One secret a folder, so that a pasted configuration goes on working."""
    path = folder / "auth-secret"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip()


@asynccontextmanager
async def _program(
    arguments: Sequence[str], environment: dict[str, str]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A command of ours as a process of its own, once it has said where it listens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cli",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C reaches this program alone, which stops the others in order.
        start_new_session=True,
    )
    try:
        yield process, await _address(process, arguments[0])
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _address(process: asyncio.subprocess.Process, name: str) -> str:
    if process.stdout is None:  # cannot be: it was asked for
        raise ChildDied(f"{name} has no output")
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while line := (await process.stdout.readline()).decode():
                if " on http" in line:
                    return line.rsplit(" ", 1)[-1].strip()
    except TimeoutError:
        raise ChildDied(f"{name} was not ready after {READY_TIMEOUT_S:g} s") from None
    raise ChildDied(f"{name} ended while starting; see above")


async def _while_alive(
    process: asyncio.subprocess.Process, name: str, work: Coroutine[Any, Any, None]
) -> None:
    """Do ``work`` as long as the process runs."""
    working = asyncio.create_task(work)
    ending = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            raise ChildDied(f"{name} has ended by itself with exit code {process.returncode}")
        await working
    finally:
        ending.cancel()
        working.cancel()
        await asyncio.wait({working, ending})


def main() -> int:
    """Run until Ctrl-C; 0 when stopped so."""
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--live", action="store_true", help="collect from the real exchanges")
    try:
        return asyncio.run(_run(parser.parse_args().live))
    except DataServiceError as exc:
        print(f"make run: {exc.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
