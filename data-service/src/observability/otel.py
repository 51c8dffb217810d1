"""Spans by OpenTelemetry's SDK, sent over OTLP in protobuf. Imported where they are wanted only.

The provider is not made the global one of OpenTelemetry's API: FastAPI and other libraries add
spans of their own to that, one a function that is called and one a socket, with what callers sent
among their attributes.

What ends goes into a bounded queue that a thread empties; where the endpoint is away the oldest are
dropped, which is logged once, as is its end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from importlib.metadata import version
from typing import Final, Self, cast

import structlog
from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode

from observability.tracing import FLUSH_S, Kind, Origin, Value

SERVICE: Final = "cb-trade-data-service"
_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
}
_NAMELESS: Final = "unknown_service"
# They tell of each try and each span that is lost.
_TELLTALES: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")

log = structlog.get_logger(__name__)


class OpenTelemetryTracer:
    """Makes spans and sends them where the environment says.

    Raises:
        ValueError: a variable is wrong.
    """

    def __init__(self) -> None:
        for name in _TELLTALES:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._exporter = _TellingExporter(OTLPSpanExporter())
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(SERVICE)

    def span(
        self,
        name: str,
        *,
        kind: Kind,
        headers: Mapping[str, str] | None,
        links: Sequence[Origin],
        attributes: Mapping[str, Value],
    ) -> _Span:
        parent: Context | None = None
        if headers is not None and "traceparent" in headers:
            parent = propagate.extract(headers)
        begun = self._tracer.start_span(
            name,
            parent,
            kind=_KINDS[kind],
            attributes=attributes,
            links=[Link(cast("SpanContext", other)) for other in links],
        )
        return _Span(begun)

    def origin(self) -> Origin | None:
        here = trace.get_current_span().get_span_context()
        return here if here.is_valid else None

    @contextmanager
    def within(self, origin: Origin) -> Iterator[None]:
        asked_in = NonRecordingSpan(cast("SpanContext", origin))
        token = context.attach(trace.set_span_in_context(asked_in))
        try:
            yield
        finally:
            context.detach(token)

    def ids(self) -> Mapping[str, str]:
        here = trace.get_current_span().get_span_context()
        if not here.is_valid:
            return {}
        return {
            "trace_id": trace.format_trace_id(here.trace_id),
            "span_id": trace.format_span_id(here.span_id),
        }

    def close(self) -> None:
        """Send what waits, for ``FLUSH_S`` at most."""
        self._exporter.quiet = True
        # The SDK waits for an answer for as long as the exporter does, and takes no other limit.
        flushing = threading.Thread(
            target=self._provider.shutdown, name="flush traces", daemon=True
        )
        flushing.start()
        flushing.join(FLUSH_S)


class _Span:
    """See ``ISpan``."""

    __slots__ = ("_begun", "_token")

    def __init__(self, begun: Span) -> None:
        self._begun = begun
        self._token: Token[Context] | None = None

    def set(self, **attributes: Value) -> None:
        self._begun.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._begun.update_name(name)

    def fail(self, error: str) -> None:
        self._begun.set_attribute("error.type", error)
        self._begun.set_status(StatusCode.ERROR)

    def __enter__(self) -> Self:
        self._token = context.attach(trace.set_span_in_context(self._begun))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._token is not None:
            context.detach(self._token)
        error = exc_info[1]
        if isinstance(error, asyncio.CancelledError):
            # Who asked has left, or the service stops: nothing went wrong.
            self._begun.set_attribute("cancelled", value=True)
        elif error is not None:
            self.fail(type(error).__qualname__)
        self._begun.end()


class _TellingExporter(SpanExporter):
    """Another exporter, whose failures are an outage: its begin is logged, and its end."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0
        self.quiet = False
        """Whether nothing is logged any more: the process ends."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._lost and not self.quiet:
                log.info("traces_are_exported_again", lost=self._lost)
            self._lost = 0
        else:
            if not self._lost and not self.quiet:
                log.warning("traces_cannot_be_exported")
            self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _resource() -> Resource:
    """Who traces: what the environment says of it, else the name of this service."""
    told = Resource.create({"service.version": version(SERVICE)})
    if str(told.attributes["service.name"]).startswith(_NAMELESS):
        told = told.merge(Resource({"service.name": SERVICE}))
    return told
