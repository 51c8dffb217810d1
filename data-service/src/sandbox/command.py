"""The command ``sandbox``: its options, and running it until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from domain.clock import MarketClock
from errors import DataServiceError

if TYPE_CHECKING:
    from sandbox.app import RunningSandbox


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to ``parser``."""
    parser.add_argument(
        "--port", type=_port, default=9400, help="where it listens; 0 takes a free port"
    )
    parser.add_argument("--seed", type=int, default=1, help="which market is invented")
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="PATH",
        help="play recorded candles (feather, CSV or stored entries): a file or a folder",
    )
    parser.add_argument(
        "--history-start",
        type=_moment,
        metavar="TIME",
        help="where invented history begins: ms or ISO 8601 (2024-01-01)",
    )
    parser.add_argument(
        "--market-clock",
        type=_clock,
        metavar="CLOCK",
        help="as the setting MARKET_CLOCK, which it overrides: 'real' or a JSON object",
    )
    parser.add_argument(
        "--skew-ms", type=int, default=0, help="how far its clock is ahead of the market's"
    )
    parser.add_argument(
        "--answer-delay-ms", type=_natural, default=0, help="hold every REST answer back so long"
    )
    parser.add_argument(
        "--rate-limit",
        type=_natural,
        default=None,
        metavar="N",
        help="answer 429 above N REST requests a second",
    )


def run(args: argparse.Namespace) -> int:
    """Run the sandbox until SIGINT or SIGTERM.

    Returns 0, 2 when a setting or the recording is wrong, 1 when the port is taken.
    """
    # Imported here: who only parses the command line should not pay for the sandbox.
    from sandbox.app import SandboxConfig, running_sandbox  # noqa: PLC0415
    from sandbox.prices import DEFAULT_HISTORY_START_MS  # noqa: PLC0415

    try:
        clock = args.market_clock or MarketClock.parse(os.environ.get("MARKET_CLOCK", "real"))
    except ValueError as exc:
        sys.stderr.write(f"MARKET_CLOCK {exc}\n")
        return 2
    config = SandboxConfig(
        seed=args.seed,
        replay=args.replay,
        history_start_ms=(
            DEFAULT_HISTORY_START_MS if args.history_start is None else args.history_start
        ),
        market_clock=clock,
        skew_ms=args.skew_ms,
        answer_delay_ms=args.answer_delay_ms,
        rate_limit=args.rate_limit,
    )
    try:
        asyncio.run(_serve(running_sandbox(config, port=args.port)))
    except DataServiceError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return 2
    except OSError as exc:
        sys.stderr.write(f"cannot listen on port {args.port}: {exc.strerror or exc}\n")
        return 1
    return 0


async def _serve(running: AbstractAsyncContextManager[RunningSandbox]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with running as sandbox:
        sys.stdout.write(f"sandbox listening on {sandbox.url}\n")
        sys.stdout.flush()
        await stopped.wait()


def _port(text: str) -> int:
    number = _natural(text)
    if number > 65_535:
        raise argparse.ArgumentTypeError("takes a port from 0 to 65535")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError("takes a whole number from 0")
    return int(text)


def _moment(text: str) -> int:
    if text.isascii() and text.isdecimal():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError("takes ms or an ISO 8601 time") from exc
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def _clock(text: str) -> MarketClock:
    try:
        return MarketClock.parse(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
