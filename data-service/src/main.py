"""The composition root: the only place that knows every class."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final

import structlog
from fastapi import FastAPI

from api.app import build_app
from api.services import Services
from auth.module import AuthenticationModuleImpl
from collection.collection_list import CoinCollectionList
from collection.hub import Hub
from collection.manager import DataCollectionManagerImpl
from collection.processor import RealTimeProcessor
from config import Settings
from errors import ConfigurationError, DataServiceError
from exchange_source.microkernel import DataSourceConnectorImpl
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher
from historical.manager import HistoricalDataManagerImpl
from reconciliation.reconciler import Reconciler
from storage.factory import create_storage
from storage.interfaces import IStorageManager
from storage.manager import StorageManagerImpl
from target_management.manager import TargetManager

READY_TIMEOUT_S: Final = 3.0

log = structlog.get_logger(__name__)


class Health:
    """Why the service is not ready: while it starts or drains, and when storage refuses."""

    def __init__(self, storage: IStorageManager) -> None:
        self._storage = storage
        self.phase = "starting"

    async def readiness(self) -> list[str]:
        """The reasons why the service is not ready, none when it is."""
        if self.phase != "running":
            return [f"the service is {self.phase}"]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._storage.check_health()
        except TimeoutError:
            return [f"storage did not answer within {READY_TIMEOUT_S:g} s"]
        except DataServiceError as exc:
            return [f"storage: {exc.message}"]
        return []


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; everything it holds lives in its lifespan.

    Raises:
        ConfigurationError: a setting that serving needs is missing.
    """
    if settings.auth_secret is None:
        raise ConfigurationError(
            "AUTH_SECRET: takes the secret that tokens are signed with, at least 32 bytes; make "
            "one with: openssl rand -hex 32"
        )
    return build_app(settings, _lifespan(settings))


def _lifespan(settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                health = await stack.enter_async_context(_assembled(settings, app))
            except DataServiceError as exc:
                app.state.why_not_started = exc.message
                raise
            try:
                yield
            finally:
                health.phase = "stopping"

    return lifespan


@asynccontextmanager
async def _assembled(settings: Settings, app: FastAPI) -> AsyncIterator[Health]:
    clock = settings.market_clock
    rng = random.Random()  # noqa: S311  jitter is no secret
    async with AsyncExitStack() as stack:
        raw_storage = create_storage(settings)
        stack.push_async_callback(raw_storage.close)
        storage = StorageManagerImpl(raw_storage)
        targets = TargetManager.from_settings(settings, clock)
        stack.push_async_callback(targets.close)
        await targets.open()
        connector = DataSourceConnectorImpl.from_settings(settings, clock)
        stack.push_async_callback(connector.close)

        hub = Hub(clock, storage)
        reconciler = Reconciler(
            {name: connector.get_client(name) for name in connector.exchange_names},
            storage,
            clock,
            rng=rng,
        )
        reconciler.listen(hub.advance)
        collection = DataCollectionManagerImpl(
            connector=connector,
            collection=CoinCollectionList(targets),
            storage=storage,
            reconciler=reconciler,
            processor=RealTimeProcessor(storage, hub, clock),
            hub=hub,
            clock=clock,
            preferences=settings.exchange_preferences,
            backfill_days=settings.backfill_days,
            rng=rng,
        )
        history = HistoricalDataManagerImpl(
            directory=collection,
            fetcher=HistoricalFetcher(storage, reconciler, clock),
            current=CurrentDataFetcher(storage),
            reconciler=reconciler,
            forming=hub.forming,
            clock=clock,
        )
        health = Health(storage)
        auth = AuthenticationModuleImpl.from_settings(settings, clock)
        app.state.auth = auth
        app.state.services = Services(
            settings=settings,
            clock=clock,
            auth=auth,
            collection=collection,
            history=history,
            health=health,
        )
        # Stopped in the reverse order: intake, then settling; clients are gone by then.
        await stack.enter_async_context(_running(reconciler.run(), "settling", health))
        await stack.enter_async_context(_running(collection.run(), "collection", health))
        await collection.resume()
        health.phase = "running"
        yield health


@asynccontextmanager
async def _running(
    work: Coroutine[Any, Any, None], name: str, health: Health
) -> AsyncIterator[None]:
    """Run ``work`` beside the body; cancel and join it at the end.

    Work of the lifespan never ends by itself: should it fail, the service says so in its health.
    """

    def note_end(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            log.critical("part_failed", part=name, exc_info=error)
            health.phase = f"broken: {name} has failed"

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(note_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
