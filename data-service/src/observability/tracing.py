"""Traces: what a request waited for, layer by layer.

``span`` is for what takes a request to another machine or to a disk, never for what is done once a
trade or a forming candle. Until ``tracing`` finds an endpoint in OpenTelemetry's own environment
variables, and the extra ``otel`` installed, a span is an object that does nothing, and no module of
OpenTelemetry is loaded on its behalf.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Literal, Protocol, Self

import structlog

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL: Final = "http/protobuf"
FLUSH_S: Final = 0.5
"""Real seconds that the end of tracing takes at most; spans that are not sent by then are lost."""

Kind = Literal["internal", "server", "client"]
Value = str | int | float | bool
Origin = object
"""Which span something was asked in, for who does it in another task."""

log = structlog.get_logger(__name__)


class ISpan(Protocol):
    """A part of a trace, from entering it to leaving it. Left with an exception it is an error;
    what an exception says is not told, only its class."""

    def set(self, **attributes: Value) -> None:
        """Say more of it; of a bounded number of values, and no secret."""

    def rename(self, name: str) -> None:
        """Name it, by what was not known when it began."""

    def fail(self, error: str) -> None:
        """Call it an error, of this kind, though no exception leaves it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class ITracer(Protocol):
    """What makes spans; see the functions of this module."""

    def span(
        self,
        name: str,
        *,
        kind: Kind,
        headers: Mapping[str, str] | None,
        links: Sequence[Origin],
        attributes: Mapping[str, Value],
    ) -> ISpan: ...

    def origin(self) -> Origin | None: ...

    def within(self, origin: Origin) -> AbstractContextManager[None]: ...

    def ids(self) -> Mapping[str, str]: ...

    def close(self) -> None: ...


class _NoSpan:
    """A span that nobody is told of."""

    __slots__ = ()

    def set(self, **attributes: Value) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def fail(self, error: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


_NO_SPAN: Final = _NoSpan()
_NO_IDS: Final[Mapping[str, str]] = {}


class _Process:
    """What this process traces with: one for all of it, as logging is. A context variable would not
    do, because servers handle requests in contexts of their own."""

    tracer: ITracer | None = None


def span(
    name: str,
    *,
    kind: Kind = "internal",
    headers: Mapping[str, str] | None = None,
    links: Sequence[Origin] = (),
    **attributes: Value,
) -> ISpan:
    """A span to be entered: a child of the one that is entered here already, or of what ``headers``
    tell of a caller in another process.

    ``links`` are others that wait for it too. Names and attributes take few different values.
    """
    tracer = _Process.tracer
    if tracer is None:
        return _NO_SPAN
    return tracer.span(name, kind=kind, headers=headers, links=links, attributes=attributes)


def origin() -> Origin | None:
    """The span that is entered here, if any."""
    return None if _Process.tracer is None else _Process.tracer.origin()


def within(asked_in: Origin | None) -> AbstractContextManager[None]:
    """Make spans children of ``asked_in`` meanwhile, and of nothing where it is None."""
    if _Process.tracer is None or asked_in is None:
        return nullcontext()
    return _Process.tracer.within(asked_in)


def trace_ids() -> Mapping[str, str]:
    """``trace_id`` and ``span_id`` for a log line; nothing where no span is entered."""
    return _NO_IDS if _Process.tracer is None else _Process.tracer.ids()


@contextmanager
def tracing(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Trace meanwhile, where the environment says so; whatever is wrong with that is logged once
    and stops nothing. The end takes ``FLUSH_S`` at most."""
    tracer = _tracer(environment)
    if tracer is None:
        yield
        return
    _Process.tracer = tracer
    try:
        yield
    finally:
        _Process.tracer = None
        tracer.close()


def _tracer(environment: Mapping[str, str]) -> ITracer | None:
    told = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_")}
    endpoint = _first(told, ENDPOINTS)
    if (
        not endpoint
        or told.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or told.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    ):
        return None
    if _first(told, PROTOCOLS) not in ("", PROTOCOL):
        log.warning("not_tracing", reason=f"{PROTOCOLS[1]} takes {PROTOCOL}, and nothing else here")
        return None
    try:
        # Imported here: a service that does not trace needs none of it.
        from observability.otel import OpenTelemetryTracer  # noqa: PLC0415
    except ImportError as exc:
        log.warning(
            "not_tracing",
            reason="an endpoint is set, and the extra is missing: pip install '.[otel]'",
            error=str(exc),
        )
        return None
    try:
        return OpenTelemetryTracer()
    except Exception as exc:  # noqa: BLE001  what is wrong with telemetry never stops the service
        log.warning(
            "not_tracing", reason="it cannot begin: look at the variables OTEL_...", error=str(exc)
        )
        return None


def _first(told: Mapping[str, str], names: Sequence[str]) -> str:
    return next((told[name] for name in names if told.get(name)), "")
