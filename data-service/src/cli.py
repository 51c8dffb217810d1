"""The command ``cb-trade-data``: serve, verify, export, seal, sandbox, token."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from config import Settings, load_settings
from domain.interval import DEFAULT_INTERVAL
from domain.time_range import TimeRange
from errors import DataServiceError, InvalidRequest
from models import parse_time
from observability.logging import configure_logging
from sandbox import command as sandbox_command
from signals import Alarm, StopSignals

DEFAULT_SCOPE: Final = "data:read data:write"
DEFAULT_TTL_S: Final = 3600
MOST_DAYS: Final = 36_500
LATEST_MS: Final = 4_102_444_800_000  # 2100-01-01
EXPORT_FORMATS: Final = ("parquet", "csv", "arrow")
USER_ERROR: Final = 2
INTERRUPTED: Final = 128 + signal.SIGINT
BROKEN_PIPE: Final = 128 + signal.SIGPIPE

log = structlog.get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user's own are one line and exit code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        run: Any = options.run
        code: int = run(options)
        sys.stdout.flush()
    except DataServiceError as exc:
        print(f"cb-trade-data: {exc.message}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads has left, such as head; what is still to be flushed has nowhere else to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cb-trade-data",
        description="Collects crypto market data without gaps and serves it.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the service; settings come from the environment")
    serve.set_defaults(run=_serve)

    verify = commands.add_parser(
        "verify",
        help="compare what is stored with what the exchanges say now; changes nothing",
        description=(
            "Compares what is stored, in the storage or in its spool, with what the exchanges say "
            "now, from each target's since to the last period that ended 60 s ago (market time) "
            "and may so be expected to be settled. Changes nothing, and may run beside a service. "
            "Exit code: 0 all that could be checked is equal, 1 something differs, 2 something "
            "could not be checked at all."
        ),
    )
    _add_choice(verify)
    verify.add_argument("--days", type=_days, metavar="N", help="only the last N days")
    verify.set_defaults(run=_verify)

    export = commands.add_parser(
        "export",
        help="write a stored series into one file",
        description=(
            "Writes what is stored of a coin into one Parquet, CSV or Arrow file, ascending, "
            "without its order books. Changes nothing, and may run beside a service. Exit code: 0 "
            "all of it is there, 1 some documents could not be read."
        ),
    )
    export.add_argument("--coin", required=True, help="the coin (BTC) or market (BTC/EUR)")
    export.add_argument("--exchange", help="of this exchange; default: the one that has it stored")
    export.add_argument("--interval", default=DEFAULT_INTERVAL, help="default: %(default)s")
    export.add_argument("--start", type=_time, default=0, help="ms or ISO 8601; default: all")
    export.add_argument("--end", type=_time, default=LATEST_MS, help="ms or ISO 8601, not included")
    export.add_argument("--format", choices=EXPORT_FORMATS, default=EXPORT_FORMATS[0])
    export.add_argument("--out", type=Path, metavar="FILE", help="default: named by the series")
    export.set_defaults(run=_export)

    seal = commands.add_parser(
        "seal",
        help="copy closed days into the table of candles; a service does so by itself",
        description=(
            "Copies the closed UTC days of what is stored, without order books, into the Delta "
            "table candles_delta beside it, for fast reads and for other engines. The documents "
            "stay. A service that collects does so by itself: this is for a root that none "
            "collects into."
        ),
    )
    _add_choice(seal)
    seal.set_defaults(run=_seal)

    sandbox = commands.add_parser(
        "sandbox", help="run a simulated exchange on loopback, to try everything without a network"
    )
    sandbox_command.add_arguments(sandbox)
    sandbox.set_defaults(run=sandbox_command.run)

    token = commands.add_parser("token", help="print a token signed with AUTH_SECRET")
    token.add_argument("--subject", required=True, metavar="NAME", help="whom it speaks for")
    token.add_argument("--scope", default=DEFAULT_SCOPE, help=f"default: {DEFAULT_SCOPE}")
    token.add_argument(
        "--ttl",
        type=int,
        default=DEFAULT_TTL_S,
        metavar="SECONDS",
        help=f"how long it is valid; default: {DEFAULT_TTL_S}",
    )
    token.set_defaults(run=_token)
    return parser


def _add_choice(command: argparse.ArgumentParser) -> None:
    """Arguments that choose among what is stored; all of it without them."""
    command.add_argument("--coin", help="only of this coin")
    command.add_argument("--exchange", help="only of this exchange")
    command.add_argument("--interval", help="only of this interval")


def _serve(_: argparse.Namespace) -> int:
    # Before what takes long.
    signals = StopSignals()
    log_format = os.environ.get("LOG_FORMAT")
    if log_format == "json":
        # Whoever reads events reads also what stops the start, wrong settings among it.
        configure_logging("INFO", "json")
    try:
        settings = load_settings()
        log_format = settings.log_format
        configure_logging(settings.log_level, settings.log_format)
        return _run_service(settings, signals)
    except DataServiceError as exc:
        if log_format != "json":
            raise
        log.critical("not_started", error=exc.message)
        return USER_ERROR


def _run_service(settings: Settings, signals: StopSignals) -> int:
    # Imported here: the other commands should not pay for the exchanges' libraries.
    from main import create_app  # noqa: PLC0415
    from serving import Server, listen  # noqa: PLC0415

    app = create_app(settings)
    alarm = Alarm(as_json=settings.log_format == "json")
    server = Server(app, settings, listen(settings), alarm=alarm)
    signals.stop(server)
    return server.serve_and_end()


def _verify(options: argparse.Namespace) -> int:
    import verify  # noqa: PLC0415

    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    return verify.run(
        settings,
        coin=options.coin,
        exchange=options.exchange,
        interval=options.interval,
        days=options.days,
    )


def _export(options: argparse.Namespace) -> int:
    import export  # noqa: PLC0415

    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    if options.end <= options.start:
        raise InvalidRequest("--end takes a time after --start")
    return export.run(
        settings,
        export.Wanted(
            coin=options.coin.strip().upper(),
            exchange=None if options.exchange is None else options.exchange.strip().lower(),
            interval=options.interval,
            range=TimeRange(options.start, options.end),
            format=options.format,
            out=options.out,
        ),
    )


def _seal(options: argparse.Namespace) -> int:
    import seal  # noqa: PLC0415

    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    return seal.run(
        settings,
        seal.Wanted(
            coin=None if options.coin is None else options.coin.strip().upper(),
            exchange=None if options.exchange is None else options.exchange.strip().lower(),
            interval=options.interval,
        ),
    )


def _time(text: str) -> int:
    try:
        time = parse_time(int(text) if text.isascii() and text.isdecimal() else text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    if time > LATEST_MS:
        raise argparse.ArgumentTypeError("lies after the year 2099")
    return time


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"takes a number of days above 0 and up to {MOST_DAYS}")
    return days


def _token(options: argparse.Namespace) -> int:
    from auth.module import issue_token  # noqa: PLC0415

    settings = load_settings()
    print(issue_token(settings, subject=options.subject, scope=options.scope, ttl_s=options.ttl))
    return 0


if __name__ == "__main__":
    sys.exit(main())
