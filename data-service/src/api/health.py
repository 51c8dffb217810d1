"""Whether the service can do its work now, put together from its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from api.services import Readiness
from collection.role import CollectorRole
from errors import DataServiceError
from exchange_source.interfaces import IExchangeAPIClient
from storage.interfaces import IStorageManager

READY_TIMEOUT_S: Final = 3.0
# An exchange's clock that is further off than this is worth a word: it says which candles are
# closed, to a second at best.
SKEW_MS: Final = 5_000


class ITroubled(Protocol):
    """What costs speed and no data while it does not work."""

    @property
    def trouble(self) -> str | None:
        """Why it does not work for now, or None."""


class Health:
    """Why the service is not ready: while it starts or drains, when storage refuses, and when
    nobody can say who collects. What is merely worth knowing is a warning."""

    def __init__(
        self,
        storage: IStorageManager,
        role: CollectorRole,
        exchanges: Sequence[IExchangeAPIClient] = (),
        *,
        sealing: ITroubled | None = None,
    ) -> None:
        self._storage = storage
        self._role = role
        self._exchanges = exchanges
        self._sealing = sealing
        self.phase = "starting"

    async def readiness(self) -> Readiness:
        if self.phase != "running":
            return Readiness((f"the service is {self.phase}",))
        reasons, warnings = [], []
        if self._role.other is not None:
            warnings.append(
                f"standing by: {self._role.other} collects into this root; this service serves "
                f"what is stored, and takes over when the other is gone"
            )
        elif not self._role.collecting:
            reasons.append(f"not collecting yet: {self._role.trouble or 'the root was not asked'}")
        elif self._role.trouble is not None:
            reasons.append(f"cannot say whether this service still collects: {self._role.trouble}")
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._storage.check_health()
                warnings += await self._storage.warnings()
        except TimeoutError:
            reasons.append(f"storage did not answer within {READY_TIMEOUT_S:g} s")
        except DataServiceError as exc:
            reasons.append(f"storage: {exc.message}")
        status = self._storage.status
        reasons += [f"storage: {why}" for why in status.stuck]
        if status.spool_full:
            reasons.append("the spool is full: what is collected now is refused")
        if status.spooled:
            warnings.append(
                f"{status.spooled} entries ({status.spooled_bytes} bytes) wait in the spool for "
                f"the storage"
            )
        if self._sealing is not None and self._sealing.trouble is not None:
            warnings.append(
                f"closed days are not sealed, their documents are read: {self._sealing.trouble}"
            )
        warnings += self._wrong_clocks()
        return Readiness(tuple(reasons), tuple(warnings))

    def _wrong_clocks(self) -> list[str]:
        found = []
        for exchange in self._exchanges:
            skew = exchange.clock_skew_ms
            if skew is not None and abs(skew) > SKEW_MS:
                side = "ahead of" if skew > 0 else "behind"
                found.append(
                    f"the clock of {exchange.get_exchange_name()} is {abs(skew) / 1000:.0f} s "
                    f"{side} this machine's; candles close by the exchange's, check this machine's"
                )
        return found
