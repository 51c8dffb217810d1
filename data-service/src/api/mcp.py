"""The operations as tools for LLM agents: streamable HTTP at ``/mcp``, behind the same tokens.

``fastapi-mcp`` turns the routes' OpenAPI into tools and a tool's call into a request to this
application, with the caller's own ``Authorization``; so a tool decides nothing that its route does
not. The transport is the MCP SDK's own, without sessions: no state to lose at a restart or to
share between processes. It follows that nothing is pushed, and GET and DELETE are refused, as the
protocol provides for servers without streams and sessions.

All of it stays behind this module, because the library is young and pins nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final

import httpx
import structlog
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.types import CallToolRequest, CallToolResult, ServerResult, TextContent
from prometheus_client import Histogram
from starlette.types import Receive, Scope, Send

from api.middleware import MAX_BODY_BYTES, REQUEST_ID_HEADER
from auth.interfaces import Principal
from auth.module import get_current_user
from observability.tracing import span

with warnings.catch_warnings():
    # Its OAuth models, which are not used here, stand on a method that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from fastapi_mcp import FastApiMCP

MCP_PATH: Final = "/mcp"
# Longer than the longest that a route takes, exchanges' time limits and retries included.
CALL_TIMEOUT_S: Final = 60.0
_ABOUT: Final = (
    "Crypto market data: candles with order books at their close, collected without gaps. Times "
    "are integer milliseconds since the epoch, UTC; inputs also take ISO 8601. Look at list_coins "
    "for what is collected; summarize_history answers questions about a long range in few words."
)

_Handler = Callable[[Any], Awaitable[ServerResult]]


class McpEndpoint:
    """The tools of one application. ``router`` serves while ``running`` is entered.

    Args:
        app: has every route that is to be a tool by the time ``running`` is entered.
        operations: the operation ids that become tools.
        seconds: told how long each call took, by tool and outcome.
    """

    def __init__(self, app: FastAPI, operations: Sequence[str], seconds: Histogram) -> None:
        self._app = app
        self._seconds = seconds
        self._operations = list(operations)
        self._manager: StreamableHTTPSessionManager | None = None
        self.router = APIRouter()
        self.router.add_api_route(
            MCP_PATH,
            self._serve,
            methods=["POST"],
            operation_id="mcp",
            include_in_schema=False,
        )
        self.router.add_api_route(
            MCP_PATH,
            self._refuse,
            methods=["GET", "DELETE"],
            operation_id="mcp_without_streams",
            include_in_schema=False,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve tools meanwhile; calls that are running at the end are cancelled and joined."""
        # A failed call is a request to this application, which logs what there is to log; the
        # library would log a traceback for each 404.
        logging.getLogger("fastapi_mcp").setLevel(logging.CRITICAL)
        transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport,
            base_url="http://service",
            timeout=CALL_TIMEOUT_S,
            event_hooks={"request": [_pass_request_id_on]},
        ) as client:
            tools = _Tools(
                self._app,
                name=self._app.title,
                http_client=client,
                include_operations=self._operations,
                headers=["authorization"],
            )
            # The library hands its description over as the server's version.
            tools.server.version = self._app.version
            tools.server.instructions = _ABOUT
            handlers = tools.server.request_handlers
            handlers[CallToolRequest] = self._timed(handlers[CallToolRequest])
            manager = StreamableHTTPSessionManager(
                tools.server,
                json_response=True,
                stateless=True,
                max_request_body_size=MAX_BODY_BYTES,
            )
            serving = asyncio.Event()
            stopping = asyncio.Event()

            async def run() -> None:
                # A task of its own, because the SDK's task group must be left by the task that
                # entered it, and not every lifespan is run by one task from beginning to end.
                async with manager.run():
                    serving.set()
                    await stopping.wait()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(run(), name="mcp")
                await serving.wait()
                self._manager = manager
                try:
                    yield
                finally:
                    self._manager = None
                    stopping.set()

    def _timed(self, call: _Handler) -> _Handler:
        """The same, with its time told; the SDK's own refusals are calls that failed."""

        async def timed(request: Any) -> ServerResult:
            began = time.perf_counter()
            # A name that is no tool's is made up by the caller.
            tool = request.params.name if request.params.name in self._operations else "other"
            outcome = "cancelled"
            try:
                with (
                    structlog.contextvars.bound_contextvars(tool=tool),
                    span(f"mcp {tool}", tool=tool) as traced,
                ):
                    answer = await call(request)
                    failed = isinstance(answer.root, CallToolResult) and answer.root.isError
                    outcome = "error" if failed else "ok"
                    if failed:
                        traced.fail("tool_error")
            finally:
                self._seconds.labels(tool, outcome).observe(time.perf_counter() - began)
            return answer

        return timed

    async def _serve(self, _: Annotated[Principal, Depends(get_current_user)]) -> Response:
        if self._manager is None:
            raise RuntimeError("the MCP endpoint is not running")
        return _Handled(self._manager)

    async def _refuse(self, _: Annotated[Principal, Depends(get_current_user)]) -> Response:
        raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "POST"})


async def _pass_request_id_on(request: httpx.Request) -> None:
    """A tool's call is part of the agent's request, and its log lines name that one."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    if request_id is not None:
        request.headers[REQUEST_ID_HEADER] = request_id


class _Handled(Response):
    """The MCP transport's answer, written by itself."""

    def __init__(self, manager: StreamableHTTPSessionManager) -> None:
        super().__init__()
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._manager.handle_request(scope, receive, send)


class _Tools(FastApiMCP):  # type: ignore[misc]  # the library ships no types
    """Answers in compact JSON: indented, a row of six numbers takes eight lines of an agent's
    context."""

    async def _execute_api_tool(self, *args: Any, **kwargs: Any) -> list[TextContent]:
        answers = await super()._execute_api_tool(*args, **kwargs)
        return [TextContent(type="text", text=_compact(answer.text)) for answer in answers]


def _compact(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def mount_mcp(app: FastAPI, operations: Sequence[str], seconds: Histogram) -> McpEndpoint:
    """Add the MCP endpoint to ``app``; the caller enters its ``running`` for the lifespan."""
    endpoint = McpEndpoint(app, operations, seconds)
    app.include_router(endpoint.router)
    return endpoint
