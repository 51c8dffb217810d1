"""The composition root: the only place that knows every class."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from typing import Any, Final

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

# How long (real seconds) storage in the cloud is waited for before serving without it.
CLOUD_S: Final = 40.0
# At a stop, how long what has closed may take to be settled, and what is stored to be told; and how
# long all parts together may take to end.
FINISH_S: Final = 3.0
TELL_S: Final = 0.5
END_S: Final = 2.0

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
        async with _assembled(settings, app, registry) as health:
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
    end = _Endings(END_S)

    def note_wait(what: str) -> None:
        app.state.waits_for = what

    async with AsyncExitStack() as stack:
        raw_storage = create_storage(settings)
        stack.push_async_callback(end, "the storage", raw_storage.close)
        spool = Spool(spool_folder(settings, raw_storage))
        stack.push_async_callback(end, "the spool", spool.close)
        note_wait(f"the spool below {settings.state_dir}")
        await spool.open()
        identity = CollectorIdentity(spool_folder(settings, raw_storage))

        async def release_identity() -> None:
            identity.release()

        stack.push_async_callback(end.if_all_ended, "the collector's identity", release_identity)
        lock = raw_storage.collector_lock(identity=await identity.claim())
        stack.push_async_callback(end.if_all_ended, "the collector's lock", lock.release)
        sealed = SealedCandleStore(CandleTable.from_settings(settings), clock)
        stack.push_async_callback(end, "the table of candles", sealed.close)
        sealer = CandleSealer(
            sealed, raw_storage, settings.exchanges, clock, may_write=lambda: lock.is_held
        )
        storage = StorageManagerImpl(
            raw_storage, spool=spool, lock=lock, sealed=sealer, clock=clock
        )
        targets = TargetManager.from_settings(settings, clock)
        stack.push_async_callback(end, "the table of targets", targets.close)
        connector = DataSourceConnectorImpl.from_settings(settings, clock)
        stack.push_async_callback(end, "the exchanges", connector.close)

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
            note_wait=note_wait,
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
        app.state.finish = lambda: _finish(health, sealer, collection, hub)
        # Stopped in the reverse order: intake, then settling; clients are gone by then.
        for name, work in (
            ("watching the loop", watch_loop(clock, app.state.metrics.loop_lag)),
            ("storage", storage.run()),
            ("settling", reconciler.run()),
            ("collection", collection.run()),
            ("sealing", sealer.run()),
        ):
            await stack.enter_async_context(_running(work, name, health, end))
        await _start(role, patient=settings.storage_type == "azure")
        await stack.enter_async_context(_running(role.run(), "the collector's role", health, end))
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
    note_wait: Callable[[str], None],
) -> CollectorRole:
    """What begins and ends with the root's lock; until it is held, everything stands by."""

    async def prepare() -> None:
        await end()
        note_wait(f"the storage root {raw_storage.address}")
        await raw_storage.open()
        await check_stamp(raw_storage, redirected=settings.redirected)

    async def begin() -> None:
        try:
            await collect()
        except (DataServiceError, asyncio.CancelledError):
            # Cancelled by a first try that took too long, too: it is begun again from the start.
            await end()
            raise

    async def collect() -> None:
        if not await check_stamp(raw_storage, redirected=settings.redirected):
            await write_stamp(raw_storage, redirected=settings.redirected)
        note_wait(f"the table of targets at {settings.targets_path}")
        await targets.open()
        note_wait("the table of candles")
        # Before the first document is written: whoever collected before may be sealing still.
        await sealer.take_over()
        note_wait(f"the spool below {settings.state_dir}")
        # Who collected before may have left entries there.
        await spool.open()
        storage.collect()
        reconciler.collect()
        note_wait(f"the table of targets at {settings.targets_path}")
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
        await role.start(within_s=CLOUD_S if patient else None)
    except (StorageDenied, TargetStoreDenied, CandleTableDenied):
        raise
    except (StorageUnavailable, TargetStoreUnavailable, CandleTableUnavailable) as exc:
        if not patient:
            raise
        log.warning("started_without_storage", error=exc.message)


async def _finish(
    health: Health, sealer: CandleSealer, collection: DataCollectionManagerImpl, hub: Hub
) -> None:
    """End intake, and bring to an end what is under way, in bounded time; what is told is read by
    then, so that clients can be closed."""
    health.phase = "stopping"
    sealer.stand_by()
    try:
        async with asyncio.timeout(FINISH_S):
            await collection.finish()
    except TimeoutError:
        log.warning("stopped_before_all_was_settled")
    except Exception:
        # The outermost handler of a stop: whatever it is, the rest is to be closed.
        log.exception("finishing_failed")
    with suppress(TimeoutError):  # who reads too slowly resumes with ``from``
        async with asyncio.timeout(TELL_S):
            await hub.until_read()


class _Endings:
    """Ends parts, one after the other, with one bound (real seconds) over all of them; it begins
    with the first. What takes longer is left behind: it has what a killed process has."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self._left_behind = False

    async def __call__(self, name: str, end: Callable[[], Awaitable[object]]) -> None:
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._seconds
        try:
            # One whose time is over still gets as far as it can without waiting.
            async with asyncio.timeout_at(self._until):
                await end()
        except TimeoutError:
            self._left_behind = True
            log.warning("part_left_behind", part=name)

    async def if_all_ended(self, name: str, end: Callable[[], Awaitable[object]]) -> None:
        """End what must outlive every other part: a write that still hangs in a thread must not
        land when another process collects already. The end of this process ends it all the same."""
        if self._left_behind:
            log.warning("part_left_behind", part=name)
        else:
            await self(name, end)


@asynccontextmanager
async def _running(
    work: Coroutine[Any, Any, None], name: str, health: Health, end: _Endings
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
        await end(name, lambda: asyncio.wait([task]))
