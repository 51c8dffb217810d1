"""A receiver of traces on loopback, as a collector of OpenTelemetry is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.processes import until


def attributes(span: Span) -> dict[str, str | int | float | bool]:
    """What a span says of itself."""
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value") or "string_value")
        for item in span.attributes
    }


@dataclass
class Receiver:
    """``spans`` are those that have come, by their ids; ``services`` whose they are. While it is
    ``out_of_order``, it refuses what comes, and counts it in ``refused``."""

    port: int = 0
    spans: dict[bytes, Span] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)
    out_of_order: bool = False
    refused: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str, *, within: bytes | None = None) -> list[Span]:
        """The spans of a name, those of one trace alone where it is given."""
        return [
            span
            for span in self.spans.values()
            if span.name == name and within in (None, span.trace_id)
        ]

    async def until_named(self, name: str, *, within: bytes | None = None) -> Span:
        """The first span of a name, as soon as it has come."""

        async def has_come() -> bool:
            return bool(self.named(name, within=within))

        await until(has_come, within_s=20)
        return self.named(name, within=within)[0]

    def above(self, span: Span) -> Sequence[str]:
        """The names of the spans that one is part of, from it upward."""
        names = [span.name]
        while (parent := self.spans.get(span.parent_span_id)) is not None:
            names.append(parent.name)
            span = parent
        return names

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/x-protobuf"
        if self.out_of_order:
            self.refused += 1
            return web.Response(status=400)
        told = ExportTraceServiceRequest.FromString(await request.read())
        for resource in told.resource_spans:
            self.services |= {
                item.value.string_value
                for item in resource.resource.attributes
                if item.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans.update({span.span_id: span for span in scope.spans})
        return web.Response(content_type="application/x-protobuf")


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver for as long as the context lasts."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.port = runner.addresses[0][1]
        yield receiver
    finally:
        await runner.cleanup()
