"""The composition root: the only place that knows every class."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.health import Health
from api.metrics import CollectionCollector, ExchangeCollector, StorageCollector, watch_loop
from api.services import Services
from auth.module import AuthenticationModuleImpl
from collection.collection_list import CoinCollectionList
from collection.hub import Hub
from collection.manager import DataCollectionManagerImpl
from collection.processor import RealTimeProcessor
from collection.role import CollectorRole
from config import Settings
from domain.clock import IClock
from errors import ConfigurationError, DataServiceError
from exchange_source.microkernel import DataSourceConnectorImpl
from historical.candle_columns import use_returning_memory
from historical.candle_table import CandleTable
from historical.current_fetcher import CurrentDataFetcher
from historical.fetcher import HistoricalFetcher
from historical.interfaces import CandleTableDenied, CandleTableUnavailable
from historical.manager import HistoricalDataManagerImpl
from historical.sealed_store import SealedCandleStore
from historical.sealer import CandleSealer
from reconciliation.reconciler import Reconciler
from storage.collector_identity import CollectorIdentity
from storage.factory import create_storage, spool_folder
from storage.interfaces import (
    ICollectorLock,
    IRawDataStorage,
    StorageDenied,
    StorageUnavailable,
)
from storage.manager import StorageManagerImpl
from storage.root_stamp import check_stamp, write_stamp
from storage.spool import Spool
from target_management.interfaces import TargetStoreDenied, TargetStoreUnavailable
from target_management.manager import TargetManager

log = structlog.get_logger(__name__)


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
    registry = CollectorRegistry()
    return build_app(settings, _lifespan(settings, registry), registry=registry)


def _lifespan(
    settings: Settings, registry: CollectorRegistry
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                health = await stack.enter_async_context(_assembled(settings, app, registry))
            except DataServiceError as exc:
                app.state.why_not_started = exc.message
                raise
            try:
                yield
            finally:
                health.phase = "stopping"

    return lifespan


@asynccontextmanager
async def _assembled(
    settings: Settings, app: FastAPI, registry: CollectorRegistry
) -> AsyncIterator[Health]:
    clock = settings.market_clock
    use_returning_memory()
    rng = random.Random()  # noqa: S311  jitter is no secret
    async with AsyncExitStack() as stack:
        raw_storage = create_storage(settings)
        stack.push_async_callback(raw_storage.close)
        spool = Spool(spool_folder(settings, raw_storage))
        stack.push_async_callback(spool.close)
        await spool.open()
        identity = CollectorIdentity(spool_folder(settings, raw_storage))
        stack.callback(identity.release)
        lock = raw_storage.collector_lock(identity=await identity.claim())
        stack.push_async_callback(lock.release)
        sealed = SealedCandleStore(CandleTable.from_settings(settings), clock)
        stack.push_async_callback(sealed.close)
        sealer = CandleSealer(
            sealed, raw_storage, settings.exchanges, clock, may_write=lambda: lock.is_held
        )
        storage = StorageManagerImpl(
            raw_storage, spool=spool, lock=lock, sealed=sealer, clock=clock
        )
        targets = TargetManager.from_settings(settings, clock)
        stack.push_async_callback(targets.close)
        connector = DataSourceConnectorImpl.from_settings(settings, clock)
        stack.push_async_callback(connector.close)

        hub = Hub(clock, storage)
        clients = {name: connector.get_client(name) for name in connector.exchange_names}
        reconciler = Reconciler(
            clients,
            storage,
            clock,
            rng=rng,
        )
        reconciler.listen(hub.advance)
        processor = RealTimeProcessor(storage, hub, clock)
        storage.listen(processor)
        collection = DataCollectionManagerImpl(
            connector=connector,
            collection=CoinCollectionList(targets),
            storage=storage,
            reconciler=reconciler,
            processor=processor,
            hub=hub,
            clock=clock,
            preferences=settings.exchange_preferences,
            backfill_days=settings.backfill_days,
            rng=rng,
        )
        history = HistoricalDataManagerImpl(
            directory=collection,
            fetcher=HistoricalFetcher(storage, reconciler, clock, sealed=sealed),
            current=CurrentDataFetcher(storage),
            reconciler=reconciler,
            forming=hub.forming,
            clock=clock,
        )

        role = _role(
            settings,
            clock,
            raw_storage=raw_storage,
            lock=lock,
            spool=spool,
            targets=targets,
            storage=storage,
            sealer=sealer,
            reconciler=reconciler,
            collection=collection,
        )
        registry.register(StorageCollector(storage, lambda: role.collecting))
        registry.register(CollectionCollector(collection))
        registry.register(ExchangeCollector(list(clients.values())))
        health = Health(
            storage,
            role,
            list(clients.values()),
            collection=collection,
            targets=targets,
            sealing=sealer,
        )
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
        await stack.enter_async_context(
            _running(watch_loop(clock, app.state.metrics.loop_lag), "watching the loop", health)
        )
        # Stopped in the reverse order: intake, then settling; clients are gone by then.
        await stack.enter_async_context(_running(storage.run(), "storage", health))
        await stack.enter_async_context(_running(reconciler.run(), "settling", health))
        await stack.enter_async_context(_running(collection.run(), "collection", health))
        await stack.enter_async_context(_running(sealer.run(), "sealing", health))
        await _start(role, patient=settings.storage_type == "azure")
        await stack.enter_async_context(_running(role.run(), "the collector's role", health))
        health.phase = "running"
        yield health


def _role(
    settings: Settings,
    clock: IClock,
    *,
    raw_storage: IRawDataStorage,
    lock: ICollectorLock,
    spool: Spool,
    targets: TargetManager,
    storage: StorageManagerImpl,
    sealer: CandleSealer,
    reconciler: Reconciler,
    collection: DataCollectionManagerImpl,
) -> CollectorRole:
    """What begins and ends with the root's lock; until it is held, everything stands by."""

    async def prepare() -> None:
        await end()
        await raw_storage.open()
        await check_stamp(raw_storage, redirected=settings.redirected)

    async def begin() -> None:
        try:
            await collect()
        except DataServiceError:
            await end()
            raise

    async def collect() -> None:
        if not await check_stamp(raw_storage, redirected=settings.redirected):
            await write_stamp(raw_storage, redirected=settings.redirected)
        await targets.open()
        # Before the first document is written: whoever collected before may be sealing still.
        await sealer.take_over()
        # Who collected before may have left entries there.
        await spool.open()
        storage.collect()
        reconciler.collect()
        await collection.resume()

    async def end() -> None:
        storage.stand_by()
        sealer.stand_by()
        await collection.stand_by()
        reconciler.stand_by()

    return CollectorRole(lock, clock, prepare=prepare, begin=begin, end=end)


async def _start(role: CollectorRole, *, patient: bool) -> None:
    """The first try to collect. What is wrong with the settings stops the start; a cloud that is
    away for now does not, since it may come back without anybody's doing."""
    try:
        await role.start()
    except (StorageDenied, TargetStoreDenied, CandleTableDenied):
        raise
    except (StorageUnavailable, TargetStoreUnavailable, CandleTableUnavailable) as exc:
        if not patient:
            raise
        log.warning("started_without_storage", error=exc.message)


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
