"""The FastAPI application: routes, errors, middleware and tools put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from api.endpoints import OPERATIONS, open_routes, operations, socket_routes, token_routes
from api.mcp import mount_mcp
from api.metrics import ApiMetrics
from api.middleware import (
    AccessMiddleware,
    BodyLimitMiddleware,
    CrashMiddleware,
    RequestIdMiddleware,
)
from api.problems import install_error_handlers
from config import Settings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

TITLE: Final = "cb-trade data service"
DISTRIBUTION: Final = "cb-trade-data-service"


def build_app(
    settings: Settings, lifespan: Lifespan, *, registry: CollectorRegistry | None = None
) -> FastAPI:
    """The application.

    ``lifespan`` puts ``app.state.services`` (``Services``) and ``app.state.auth``
    (``IAuthenticationModule``) in place before it yields; MCP is served within it, so that its
    calls have ended when what they stand on is taken down. ``registry`` is what ``/metrics``
    shows, a new one by default.
    """

    @asynccontextmanager
    async def with_mcp(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app), mcp.running():
            yield

    release = version(DISTRIBUTION)
    app = FastAPI(
        title=TITLE,
        version=release,
        summary="Crypto market data without gaps, for trading bots and LLM agents",
        lifespan=with_mcp,
    )
    metrics = ApiMetrics(
        CollectorRegistry() if registry is None else registry,
        version=release,
        revision=settings.revision or "",
    )
    app.state.metrics = metrics
    for router in (operations, open_routes, token_routes(settings), socket_routes):
        app.include_router(router)
    mcp = mount_mcp(app, OPERATIONS, metrics.mcp_seconds)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(CrashMiddleware)
    app.add_middleware(AccessMiddleware, metrics=metrics)
    app.add_middleware(RequestIdMiddleware)
    return app
