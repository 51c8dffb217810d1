"""Targets in a Delta table, on a local disk or in Azure Blob Storage."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from config import Settings
from domain.back_off import back_off_s
from domain.clock import IClock
from target_management.audit import NAME, AuditFile, AuditObjects, IAudit
from target_management.changes import check_changes
from target_management.delta_engine import DeltaEngine, WriteConflict
from target_management.delta_table import Origin, TargetTable
from target_management.file_lock import file_lock
from target_management.interfaces import (
    SERVICE,
    ITargetManager,
    Target,
    TargetError,
    TargetStoreUnavailable,
)
from target_management.place import check_place
from target_management.upkeep import Upkeep

_T = TypeVar("_T")
_THREADS: Final = 4
_TRIES: Final = 20
_FIRST_BACK_OFF_S: Final = 0.02
_LONGEST_BACK_OFF_S: Final = 1.0

log = structlog.get_logger(__name__)


class TargetManager(ITargetManager):
    """The table of targets; ``open`` before use, ``close`` afterwards.

    Several processes may write at once: every write looks at the newest version and is tried again,
    after a growing and jittered pause, when another writer was faster. On a local disk a lock file
    beside the table (``{table_path}.lock``) keeps writers apart in the first place.

    Every method returns or raises within ``timeout_s``. A write that ran out of time may still
    come to be: look before it is repeated.

    Some writes keep the table small after they are done (``upkeep``): what goes wrong there is
    logged, once, and not the write's affair.

    Raises:
        ConfigurationError: the storage type, the path and the options do not fit each other.
    """

    def __init__(
        self,
        storage_type: str,
        table_path: str,
        storage_options: Mapping[str, str] | None,
        clock: IClock,
        *,
        timeout_s: float = 30.0,
        engine: DeltaEngine | None = None,
        jitter: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        uri, options = check_place(storage_type, table_path, storage_options)
        engine = engine or DeltaEngine()
        self._table = TargetTable(engine, uri, options, timeout_s=timeout_s)
        self._upkeep = Upkeep(engine, uri, options, _audit(engine, uri, options, timeout_s))
        self._upkeep_fails = False
        self._uri = uri
        self._lock_path = Path(f"{uri}.lock") if options is None else None
        self._clock = clock
        self._timeout_s = timeout_s
        self._jitter = jitter or random.Random()  # noqa: S311  spreads retries, hides nothing
        self._sleep = sleep
        self._writing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="targets")

    @classmethod
    def from_settings(cls, settings: Settings, clock: IClock) -> TargetManager:
        """The manager that ``TARGET_STORAGE_TYPE`` and its companions ask for.

        Raises:
            ConfigurationError: they do not fit each other.
        """
        return cls(settings.targets_on, settings.targets_path, settings.targets_options, clock)

    async def open(self) -> None:
        """Make the table if it is missing, check that it is one of targets, and tidy it.

        Raises:
            TargetSchemaMismatch: the table has other columns; the message names the difference.
            TargetStoreUnavailable: it cannot be reached.
        """

        def prepare() -> tuple[None, None]:
            self._table.prepare()
            return None, None

        await self._write(prepare, then=self._upkeep.at_start)

    async def close(self) -> None:
        """Take no more work. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def add_target(self, target: Target, *, by: str = SERVICE) -> bool:
        origin = Origin(by, self._clock.now_ms())
        return await self._write(lambda: self._table.add(target, origin))

    async def update_target(
        self, target_id: str, *, by: str = SERVICE, **changes: Any
    ) -> Target | None:
        check_changes(changes)
        origin = Origin(by, self._clock.now_ms())
        return await self._write(lambda: self._table.update(target_id, changes, origin))

    async def delete_target(self, target_id: str, *, by: str = SERVICE) -> bool:
        origin = Origin(by, self._clock.now_ms())
        return await self._write(lambda: self._table.delete(target_id, origin))

    async def get_target(self, target_id: str) -> Target | None:
        return (await self._rows()).get(target_id)

    async def list_targets(
        self,
        *,
        enabled: bool | None = None,
        coin: str | None = None,
        exchange: str | None = None,
    ) -> list[Target]:
        return [
            row
            for row in (await self._rows()).values()
            if enabled in (None, row.enabled)
            and coin in (None, row.coin)
            and exchange in (None, row.exchange)
        ]

    async def _rows(self) -> dict[str, Target]:
        async with self._in_time(self._deadline()):
            return await self._run(self._table.rows)

    async def _write(
        self,
        change: Callable[[], tuple[_T, int | None]],
        *,
        then: Callable[[], None] | None = None,
    ) -> _T:
        """Apply a change that answers with the version it made, and do the upkeep due then, or
        ``then``."""
        deadline = self._deadline()
        async with self._in_time(deadline):
            await self._writing.acquire()
        try:
            async with self._in_time(deadline):
                answer, version = await self._tried(change)
            if version is not None and self._upkeep.due(version):
                made = version
                then = then or (lambda: self._upkeep.after(made))
            if then is not None:
                await self._keep_up(then, deadline)
            return answer
        finally:
            self._writing.release()

    async def _tried(self, change: Callable[[], _T]) -> _T:
        """Apply a change, again and again while other writers are faster."""
        for attempt in range(_TRIES):
            try:
                return await self._run(lambda: self._apart(change))
            except WriteConflict:
                await self._sleep(self._back_off_s(attempt))
        raise TargetStoreUnavailable(
            f"{self._uri}: other processes wrote first {_TRIES} times in a row; try again"
        )

    async def _keep_up(self, work: Callable[[], None], deadline: float) -> None:
        """Do upkeep in what is left of the write's time; what was not done is done another time."""
        try:
            async with self._in_time(deadline):
                await self._run(lambda: self._apart(work))
        except WriteConflict:
            return
        except TargetError as exc:
            if not self._upkeep_fails:
                log.warning("targets_upkeep_failed", error=exc.message)
            self._upkeep_fails = True
            return
        if self._upkeep_fails:
            log.info("targets_upkeep_recovered")
        self._upkeep_fails = False

    def _apart(self, work: Callable[[], _T]) -> _T:
        """Work while no other writer of this machine does, where the table is local; blocks."""
        lock: AbstractContextManager[None] = (
            file_lock(self._lock_path, self._timeout_s) if self._lock_path else nullcontext()
        )
        with lock:
            return work()

    def _back_off_s(self, attempt: int) -> float:
        return back_off_s(
            attempt,
            first_s=_FIRST_BACK_OFF_S,
            longest_s=_LONGEST_BACK_OFF_S,
            rng=self._jitter,
            jitter=0.5,
        )

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s

    @asynccontextmanager
    async def _in_time(self, deadline: float) -> AsyncIterator[None]:
        """Wait no longer than until ``deadline``, by the loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as exc:
            raise TargetStoreUnavailable(
                f"{self._uri}: no answer within {self._timeout_s:g} s; check that nothing holds "
                f"the table and that its storage answers"
            ) from exc

    async def _run(self, work: Callable[[], _T]) -> _T:
        """Do blocking ``work`` in a thread."""
        try:
            job = self._threads.submit(work)
        except RuntimeError as exc:
            raise TargetStoreUnavailable(f"{self._uri}: the table is closed") from exc
        try:
            return await asyncio.wrap_future(job)
        except TimeoutError:
            raise
        except OSError as exc:
            raise TargetStoreUnavailable(
                f"{self._uri}: {exc.strerror or exc}; check the path and its permissions"
            ) from exc


def _audit(
    engine: DeltaEngine, uri: str, options: dict[str, str] | None, timeout_s: float
) -> IAudit:
    """The audit beside a table."""
    if options is None:
        return AuditFile(Path(uri).parent / NAME, timeout_s)
    folder = uri.rpartition("/")[0]
    return AuditObjects(lambda: engine.files(folder, options))
