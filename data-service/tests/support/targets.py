"""A table of targets without Delta, for tests of what stands above it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from domain.clock import IClock
from target_management.changes import check_changes
from target_management.interfaces import SERVICE, ITargetManager, Target, TargetError
from tests.support.clock import ManualClock


def make_target(coin: str, *, since: int, now: int) -> Target:
    """A target of 5m on Crypto.com that was added at ``now`` (ms)."""
    return Target(
        coin=coin,
        exchange="crypto.com",
        exchange_id="cryptocom",
        market=f"{coin}/USD",
        interval="5m",
        enabled=True,
        since=since,
        created_at=now,
        last_updated=now,
    )


class InMemoryTargets(ITargetManager):
    """Rows in a dictionary.

    ``rows`` is everything held, by ``target_id``; ``history`` tells each change: what was done, the
    target's id, and who did it. ``fail_with`` is raised by every method while it is set.
    """

    def __init__(self, *targets: Target, clock: IClock | None = None) -> None:
        self.rows: dict[str, Target] = {target.target_id: target for target in targets}
        self.history: list[tuple[str, str, str]] = []
        self.fail_with: TargetError | None = None
        self._clock = clock or ManualClock()

    async def add_target(self, target: Target, *, by: str = SERVICE) -> bool:
        self._fail()
        if target.target_id in self.rows:
            return False
        self.rows[target.target_id] = target
        self.history.append(("add_target", target.target_id, by))
        return True

    async def update_target(
        self, target_id: str, *, by: str = SERVICE, **changes: Any
    ) -> Target | None:
        check_changes(changes)
        self._fail()
        held = self.rows.get(target_id)
        if held is None:
            return None
        if any(getattr(held, field) != new for field, new in changes.items()):
            self.rows[target_id] = replace(held, **changes, last_updated=self._clock.now_ms())
            self.history.append(("update_target", target_id, by))
        return self.rows[target_id]

    async def delete_target(self, target_id: str, *, by: str = SERVICE) -> bool:
        self._fail()
        if self.rows.pop(target_id, None) is None:
            return False
        self.history.append(("delete_target", target_id, by))
        return True

    async def get_target(self, target_id: str) -> Target | None:
        self._fail()
        return self.rows.get(target_id)

    async def list_targets(
        self,
        *,
        enabled: bool | None = None,
        coin: str | None = None,
        exchange: str | None = None,
    ) -> list[Target]:
        self._fail()
        return [
            self.rows[target_id]
            for target_id in sorted(self.rows)
            if enabled in (None, self.rows[target_id].enabled)
            and coin in (None, self.rows[target_id].coin)
            and exchange in (None, self.rows[target_id].exchange)
        ]

    def _fail(self) -> None:
        if self.fail_with is not None:
            raise self.fail_with
