"""What the routes stand on; the lifespan of the application puts it into ``app.state.services``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Protocol, cast

from fastapi import Depends
from fastapi.requests import HTTPConnection

from api.wire import EventEncoder
from auth.interfaces import IAuthenticationModule
from collection.interfaces import IDataCollectionManager
from config import Settings
from domain.clock import IClock
from historical.interfaces import IHistoricalDataManager


@dataclass(frozen=True, slots=True)
class Readiness:
    """Sentences for an operator: ``reasons`` why the service cannot do its work now, none when it
    can, and ``warnings`` of what it does in spite of."""

    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class IHealth(Protocol):
    """Whether the service can do its work now."""

    async def readiness(self) -> Readiness:
        """Answers within a few seconds and never raises."""


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    clock: IClock
    auth: IAuthenticationModule
    collection: IDataCollectionManager
    history: IHistoricalDataManager
    health: IHealth
    events: EventEncoder = field(default_factory=EventEncoder)


def get_services(connection: HTTPConnection) -> Services:
    """The services of the running application."""
    return cast("Services", connection.app.state.services)


WithServices = Annotated[Services, Depends(get_services)]
