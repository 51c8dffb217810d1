"""Structured logs: an event name and key-values a line, stdlib records rendered alike."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import structlog

from observability.tracing import trace_ids

if TYPE_CHECKING:
    # There when it is checked only: the class is made by the interpreter.
    from sys import UnraisableHookArgs

log = structlog.get_logger(__name__)


def configure_logging(level: str, fmt: Literal["console", "json"]) -> None:
    """Send every log line to standard error in one format, one line an event where it is JSON.

    Console lines are coloured on a terminal only. Libraries' own records go through the same
    renderer from ``WARNING`` on, whatever the level: below it they tell of each request, and
    ``DEBUG`` with its headers, tokens among them. Python's warnings, and exceptions that nobody
    caught, are events like any other.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        # Plain tracebacks: rich ones print local variables, secrets among them.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            # First: what is not wanted costs nothing more.
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    finish: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta
    ]
    if fmt == "json":
        finish.append(structlog.processors.format_exc_info)
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[*finish, renderer]
        )
    )
    handler.addFilter(_is_wanted)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_crash
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread_crash


def print_event(event: str, **values: str) -> None:
    """One event in JSON on standard output, whatever the level: for who started this process."""
    line: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stdout),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )
    line.info(event, **values)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in its stub alone
    """Writes to standard error; what cannot be rendered is told by its place, in one line, where
    the standard library would print a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        lost = {
            "event": "log_line_lost",
            "level": "error",
            "logger": record.name,
            "where": f"{record.filename}:{record.lineno}",
            "error": repr(sys.exc_info()[1]),
        }
        # Where nothing can be written there is nobody to be told.
        with suppress(OSError, ValueError):
            self.stream.write(json.dumps(lost) + self.terminator)
            self.flush()


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether a record is this program's own, which structlog hands over as a mapping, or grave."""
    return isinstance(record.msg, dict) or record.levelno >= logging.WARNING


def _add_trace_ids(
    _: structlog.typing.WrappedLogger, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    event.update(trace_ids())
    return event


def _log_crash(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    log.critical("process_crashed", exc_info=(kind, error, traceback))


def _log_unraisable(told: UnraisableHookArgs) -> None:
    log.error(
        "exception_ignored",
        where=told.err_msg or repr(told.object),
        exc_info=(told.exc_type, told.exc_value, told.exc_traceback),
    )


def _log_thread_crash(told: threading.ExceptHookArgs) -> None:
    if issubclass(told.exc_type, SystemExit):
        return
    log.error(
        "thread_crashed",
        thread=None if told.thread is None else told.thread.name,
        exc_info=(told.exc_type, told.exc_value, told.exc_traceback),
    )
