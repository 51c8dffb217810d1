"""Whether the service can do its work now, put together from its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from api.services import Readiness
from collection.interfaces import FeedStatus
from collection.role import CollectorRole
from errors import DataServiceError
from exchange_source.interfaces import IExchangeAPIClient
from storage.interfaces import IStorageManager
from target_management.interfaces import ITargetManager

READY_TIMEOUT_S: Final = 3.0
# An exchange's clock that is further off than this is worth a word: it says which candles are
# closed, to a second at best.
SKEW_MS: Final = 5_000
# A feed that is silent this long (real seconds) is worth a word, and one that is silent so long is
# of no use to anybody.
SILENT_S: Final = 60.0
USELESS_S: Final = 300.0


class ITroubled(Protocol):
    """What costs speed and no data while it does not work."""

    @property
    def trouble(self) -> str | None:
        """Why it does not work for now, or None."""


class IFeeds(Protocol):
    """Whether the exchanges are heard."""

    def feeds(self) -> Sequence[FeedStatus]:
        """How the feed of each exchange does."""


class Health:
    """Why the service is not ready: while it starts or drains, when storage refuses, when the
    targets cannot be read, when nobody can say who collects, and when nothing was heard of any
    exchange for long. What is merely worth knowing is a warning: one exchange of several that is
    silent must not take the others from their clients."""

    def __init__(
        self,
        storage: IStorageManager,
        role: CollectorRole,
        exchanges: Sequence[IExchangeAPIClient] = (),
        *,
        collection: IFeeds | None = None,
        targets: ITargetManager | None = None,
        sealing: ITroubled | None = None,
    ) -> None:
        self._storage = storage
        self._role = role
        self._exchanges = exchanges
        self._collection = collection
        self._targets = targets
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
        why_not, cautions = await self._asked()
        reasons += why_not
        warnings += cautions
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
        useless, silent = self._silent_feeds()
        reasons += useless
        warnings += silent
        warnings += self._wrong_clocks()
        return Readiness(tuple(reasons), tuple(warnings))

    async def _asked(self) -> tuple[list[str], list[str]]:
        """Reasons and warnings of what has to be asked for, side by side."""
        reasons, warnings = [], []

        async def storage() -> None:
            await self._storage.check_health()
            warnings.extend(await self._storage.warnings())

        async def targets() -> None:
            # Who stands by, or has not begun, has no need of them.
            if self._targets is not None and self._role.collecting:
                await self._targets.list_targets(enabled=True)

        async def ask(name: str, question: Callable[[], Awaitable[None]]) -> None:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await question()
            except TimeoutError:
                reasons.append(f"{name} did not answer within {READY_TIMEOUT_S:g} s")
            except DataServiceError as exc:
                reasons.append(f"{name}: {exc.message}")

        await asyncio.gather(ask("storage", storage), ask("targets", targets))
        return sorted(reasons), warnings

    def _silent_feeds(self) -> tuple[list[str], list[str]]:
        """Reasons and warnings: whose silence leaves nothing live to tell, and whose does not."""
        feeds = self._collection.feeds() if self._collection is not None else ()
        lags = {feed.exchange: feed.lag_s for feed in feeds if feed.lag_s is not None}
        told = [
            f"nothing was heard of {exchange} for {lag:.0f} s"
            for exchange, lag in lags.items()
            if lag > SILENT_S
        ]
        if lags and min(lags.values()) > USELESS_S:
            return told, []
        return [], told

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
