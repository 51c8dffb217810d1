"""Targets: which series the service keeps complete."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

from domain.interval import Interval
from domain.series import Series
from errors import DataServiceError

SERVICE: Final = "service"
"""Who changes a target where nobody asked for it."""


class TargetError(DataServiceError):
    """The table of targets did not do what was asked."""


class TargetStoreUnavailable(TargetError):
    """The table cannot be reached or written for now."""

    retryable = True


class TargetStoreDenied(TargetStoreUnavailable):
    """Credentials or permissions are wrong; asking again does not mend that."""

    retryable = False


class TargetSchemaMismatch(TargetError):
    """The table has other columns than this service writes; the message names the difference."""


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the table. Times are ms since the epoch, UTC.

    ``target_id`` is ``{exchange}:{coin}:{interval}``. ``since`` is the open of the first period
    that is wanted; ``last_updated`` changes with the row, not with its data.
    """

    coin: str
    exchange: str
    exchange_id: str
    market: str
    interval: str
    enabled: bool
    since: int
    created_at: int
    last_updated: int

    @property
    def target_id(self) -> str:
        return f"{self.exchange}:{self.coin}:{self.interval}"

    @property
    def series(self) -> Series:
        return Series(self.exchange, self.coin, Interval.parse(self.interval))


class ITargetManager(ABC):
    """The table of targets; several processes may write it at once.

    Who makes a change (``by``: a user, a client, the service itself) is kept in the table's history
    with what was changed and when. A change that changes nothing leaves no trace.

    Every method raises ``TargetStoreUnavailable`` when the table cannot be reached and
    ``TargetSchemaMismatch`` when it is not this service's.
    """

    @abstractmethod
    async def add_target(self, target: Target, *, by: str = SERVICE) -> bool:
        """Add a row; True when it was added, False when one of its id exists (nothing changes)."""

    @abstractmethod
    async def update_target(
        self, target_id: str, *, by: str = SERVICE, **changes: Any
    ) -> Target | None:
        """Change ``enabled``, ``since`` or ``market`` of a row; None when there is no such row.

        Raises:
            InvalidRequest: a field may not be changed or does not exist.
        """

    @abstractmethod
    async def delete_target(self, target_id: str, *, by: str = SERVICE) -> bool:
        """Remove a row; whether it was there."""

    @abstractmethod
    async def get_target(self, target_id: str) -> Target | None:
        """The row of that id, or None."""

    @abstractmethod
    async def list_targets(
        self,
        *,
        enabled: bool | None = None,
        coin: str | None = None,
        exchange: str | None = None,
    ) -> list[Target]:
        """The rows that fit every filter given, by ``target_id``."""
