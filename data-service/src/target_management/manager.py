"""Targets in a Delta table, on a local disk or in Azure Blob Storage."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, TypeVar

from config import Settings
from domain.clock import IClock
from errors import ConfigurationError
from target_management.changes import check_changes
from target_management.delta_table import DeltaEngine, TargetTable, WriteConflict
from target_management.file_lock import file_lock
from target_management.interfaces import SERVICE, ITargetManager, Target, TargetStoreUnavailable

_T = TypeVar("_T")
_THREADS: Final = 4
_TRIES: Final = 20
_FIRST_BACK_OFF_S: Final = 0.02
_LONGEST_BACK_OFF_S: Final = 1.0
_AZURE_SCHEMES: Final = ("az://", "abfs://", "abfss://", "azure://", "adl://")
# Azure's own patience is three minutes; whoever waits here has given up long before.
_AZURE_PATIENCE: Final = {"max_retries": "2", "retry_timeout": "15s", "timeout": "10s"}


class TargetManager(ITargetManager):
    """The table of targets; ``open`` before use, ``close`` afterwards.

    Several processes may write at once: every write looks at the newest version and is tried again,
    after a growing and jittered pause, when another writer was faster. On a local disk a lock file
    beside the table (``{table_path}.lock``) keeps writers apart in the first place.

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
        options = _check(storage_type, table_path, storage_options)
        self._table = TargetTable(engine or DeltaEngine(), table_path, options)
        self._table_path = table_path
        self._lock_path = Path(f"{table_path}.lock") if storage_type == "local" else None
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
        """Make the table if it is missing, and check that it is one of targets.

        Raises:
            TargetSchemaMismatch: the table has other columns; the message names the difference.
            TargetStoreUnavailable: it cannot be reached.
        """
        await self._write(self._table.prepare)

    async def close(self) -> None:
        """Take no more work. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def add_target(self, target: Target, *, by: str = SERVICE) -> bool:
        return await self._write(lambda: self._table.add(target))

    async def update_target(
        self, target_id: str, *, by: str = SERVICE, **changes: Any
    ) -> Target | None:
        check_changes(changes)
        now_ms = self._clock.now_ms()
        return await self._write(lambda: self._table.update(target_id, changes, now_ms))

    async def delete_target(self, target_id: str, *, by: str = SERVICE) -> bool:
        return await self._write(lambda: self._table.delete(target_id))

    async def get_target(self, target_id: str) -> Target | None:
        rows = await self._run(lambda: self._table.rows(target_id))
        return rows[0] if rows else None

    async def list_targets(
        self,
        *,
        enabled: bool | None = None,
        coin: str | None = None,
        exchange: str | None = None,
    ) -> list[Target]:
        return [
            row
            for row in await self._run(self._table.rows)
            if enabled in (None, row.enabled)
            and coin in (None, row.coin)
            and exchange in (None, row.exchange)
        ]

    async def _write(self, change: Callable[[], _T]) -> _T:
        """Apply a change, again and again while other writers are faster."""

        def apart() -> _T:
            with self._apart():
                return change()

        async with self._writing:
            for attempt in range(_TRIES):
                try:
                    return await self._run(apart)
                except WriteConflict:
                    await self._sleep(self._back_off_s(attempt))
        raise TargetStoreUnavailable(
            f"{self._table_path}: other processes wrote first {_TRIES} times in a row; try again"
        )

    def _apart(self) -> AbstractContextManager[None]:
        """What keeps writers of this machine apart where the table is local."""
        return file_lock(self._lock_path, self._timeout_s) if self._lock_path else nullcontext()

    def _back_off_s(self, attempt: int) -> float:
        pause = min(_FIRST_BACK_OFF_S * 2.0**attempt, _LONGEST_BACK_OFF_S)
        return pause * self._jitter.uniform(0.5, 1.5)

    async def _run(self, work: Callable[[], _T]) -> _T:
        """Do blocking ``work`` in a thread, and wait for it no longer than the time-out."""
        try:
            job = self._threads.submit(work)
        except RuntimeError as exc:
            raise TargetStoreUnavailable(f"{self._table_path}: the table is closed") from exc
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(job)
        except TimeoutError as exc:
            raise TargetStoreUnavailable(
                f"{self._table_path}: no answer within {self._timeout_s:g} s; check that nothing "
                f"holds the table and that its storage answers"
            ) from exc
        except OSError as exc:
            raise TargetStoreUnavailable(
                f"{self._table_path}: {exc.strerror or exc}; check the path and its permissions"
            ) from exc


def _check(
    storage_type: str, table_path: str, storage_options: Mapping[str, str] | None
) -> dict[str, str]:
    """The options to open the table with, once everything fits together."""
    if storage_type == "local":
        if "://" in table_path:
            raise ConfigurationError(
                "TARGET_TABLE_PATH: takes a local path when TARGET_STORAGE_TYPE is local"
            )
        return {}
    if storage_type != "azure":
        raise ConfigurationError("TARGET_STORAGE_TYPE: takes local or azure")
    if not table_path.startswith(_AZURE_SCHEMES):
        raise ConfigurationError(
            "TARGET_TABLE_PATH: takes an address such as az://container/targets_delta when "
            "TARGET_STORAGE_TYPE is azure"
        )
    if not storage_options:
        raise ConfigurationError(
            "AZURE_STORAGE_OPTIONS: takes a JSON object with the credentials, such as "
            '{"account_name": "...", "account_key": "..."}, when TARGET_STORAGE_TYPE is azure'
        )
    return _AZURE_PATIENCE | dict(storage_options)
