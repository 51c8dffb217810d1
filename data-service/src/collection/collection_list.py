"""What this process collects now: filled from, and written through, the table of targets."""

from __future__ import annotations

from domain.series import Series
from target_management.interfaces import SERVICE, ITargetManager, Target


class CoinCollectionList:
    """The enabled targets, in memory for look-ups and in the table for good."""

    def __init__(self, targets: ITargetManager) -> None:
        self._table = targets
        self._targets: dict[Series, Target] = {}

    async def load(self) -> list[Target]:
        """Fill the list with every enabled target of the table, by id."""
        targets = await self._table.list_targets(enabled=True)
        self._targets = {target.series: target for target in targets}
        return targets

    def get(self, series: Series) -> Target | None:
        """The target of a series, or None."""
        return self._targets.get(series)

    def find(
        self, coin: str, *, exchange: str | None = None, interval: str | None = None
    ) -> list[Target]:
        """The targets that fit every filter given, by id."""
        return sorted(
            (
                target
                for target in self._targets.values()
                if target.coin == coin
                and exchange in (None, target.exchange)
                and interval in (None, target.interval)
            ),
            key=lambda target: target.target_id,
        )

    def all(self) -> list[Target]:
        """Every target, by id."""
        return sorted(self._targets.values(), key=lambda target: target.target_id)

    async def add(self, target: Target, *, by: str = SERVICE) -> Target:
        """Write a target through; one that the table has already, disabled ones included, is
        enabled and kept as it is. ``by`` is who asked for it, for the table's history.

        Returns:
            The target as the table has it.
        """
        if not await self._table.add_target(target, by=by):
            kept = await self._table.get_target(target.target_id)
            if kept is not None and not kept.enabled:
                kept = await self._table.update_target(target.target_id, by=by, enabled=True)
            target = kept if kept is not None else target
        self._targets[target.series] = target
        return target

    async def set_enabled(self, target: Target, *, enabled: bool, by: str = SERVICE) -> None:
        """Write through whether a target is resumed at the next start."""
        await self._table.update_target(target.target_id, by=by, enabled=enabled)

    async def remove(self, target: Target, *, by: str = SERVICE) -> None:
        """Take a target from the table and the list."""
        await self._table.delete_target(target.target_id, by=by)
        self._targets.pop(target.series, None)
