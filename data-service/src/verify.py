"""The command ``verify``: what is stored against what the exchanges say now.

A composition root of its own, since nothing of a service may start here: no lock is taken, and
nothing is made or written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Final

from config import Settings
from domain.clock import IClock
from domain.interval import Interval
from errors import InvalidRequest
from exchange_source.microkernel import DataSourceConnectorImpl
from reconciliation.verifier import Kind, Verdict, Verifier
from storage.factory import create_storage, spool_folder
from storage.reader import StoredDocuments
from target_management.interfaces import ITargetManager, Target
from target_management.manager import TargetManager

EQUAL: Final = 0
DIFFERENT: Final = 1
NOT_CHECKED: Final = 2
DAY_MS: Final = 86_400_000
_MOST_NAMED: Final = 10


def run(
    settings: Settings,
    *,
    coin: str | None = None,
    exchange: str | None = None,
    interval: str | None = None,
    days: float | None = None,
) -> int:
    """Verify the enabled targets that fit, print what differs, and say it by the exit code.

    Raises:
        DataServiceError: nothing can be checked; the message says why.
    """
    if interval is not None:
        Interval.parse(interval)
    return asyncio.run(
        _verify(
            settings,
            coin=None if coin is None else coin.strip().upper(),
            exchange=None if exchange is None else exchange.strip().lower(),
            interval=interval,
            days=days,
        )
    )


async def _verify(
    settings: Settings,
    *,
    coin: str | None,
    exchange: str | None,
    interval: str | None,
    days: float | None,
) -> int:
    clock = settings.market_clock
    not_before = 0 if days is None else clock.now_ms() - round(days * DAY_MS)
    async with _assembled(settings, clock) as (targets, verifier):
        fitting = await _fitting(targets, coin=coin, exchange=exchange, interval=interval)
        verdicts = []
        for target in fitting:
            verdicts.append(verdict := await verifier.verify(target, not_before=not_before))
            for line in _lines(verdict):
                print(line, flush=True)
    print(_sum(verdicts), flush=True)
    if any(verdict.differences for verdict in verdicts):
        return DIFFERENT
    return NOT_CHECKED if any(verdict.stopped for verdict in verdicts) else EQUAL


@asynccontextmanager
async def _assembled(
    settings: Settings, clock: IClock
) -> AsyncIterator[tuple[ITargetManager, Verifier]]:
    async with AsyncExitStack() as stack:
        raw_storage = create_storage(settings)
        documents = StoredDocuments(raw_storage, spool_folder(settings, raw_storage))
        stack.push_async_callback(documents.close)
        await documents.open(redirected=settings.redirected)
        # Not opened: that would make the table.
        targets = TargetManager.from_settings(settings, clock)
        stack.push_async_callback(targets.close)
        connector = DataSourceConnectorImpl.from_settings(settings, clock)
        stack.push_async_callback(connector.close)
        clients = {name: connector.get_client(name) for name in connector.exchange_names}
        yield targets, Verifier(documents, clients, clock)


async def _fitting(
    targets: ITargetManager, *, coin: str | None, exchange: str | None, interval: str | None
) -> list[Target]:
    enabled = await targets.list_targets(enabled=True)
    found = [
        target
        for target in enabled
        if coin in (None, target.coin)
        and exchange in (None, target.exchange)
        and interval in (None, target.interval)
    ]
    if not found:
        named = ", ".join(target.target_id for target in enabled[:_MOST_NAMED])
        more = f" and {len(enabled) - _MOST_NAMED} more" if len(enabled) > _MOST_NAMED else ""
        asked = " ".join(name for name in (exchange, coin, interval) if name is not None)
        raise InvalidRequest(
            f"no target fits {asked}; collected are {named}{more}"
            if enabled
            else "nothing is collected here: the table has no enabled target"
        )
    return found


def _lines(verdict: Verdict) -> list[str]:
    start, end = _time(verdict.range.start), _time(verdict.range.end)
    stopped = "" if verdict.stopped is None else f"; stopped: {verdict.stopped.message}"
    more = verdict.differences - len(verdict.told)
    return [
        f"{verdict.target.target_id} from {start} to {end}: {_counts([verdict])}{stopped}",
        *(f"  {_time(item.timestamp)} {item.kind}: {item.detail}" for item in verdict.told),
        *([f"  and {more} more"] if more else []),
    ]


def _sum(verdicts: Sequence[Verdict]) -> str:
    stopped = sum(verdict.stopped is not None for verdict in verdicts)
    count = len(verdicts)
    if any(verdict.differences for verdict in verdicts):
        conclusion = "there are differences"
    elif any(verdict.checked for verdict in verdicts):
        conclusion = "all that could be checked is equal"
    else:
        conclusion = "nothing could be checked"
    return (
        f"{count} {'target' if count == 1 else 'targets'}: {_counts(verdicts)}; {conclusion}"
        f"{f'; {stopped} could not be checked to the end' if stopped else ''}"
    )


def _counts(verdicts: Sequence[Verdict]) -> str:
    kinds = ", ".join(
        f"{sum(verdict.counts[kind] for verdict in verdicts)} {kind}" for kind in Kind
    )
    return (
        f"{sum(verdict.checked for verdict in verdicts)} checked, {kinds}, "
        f"{sum(verdict.not_checkable for verdict in verdicts)} not checkable"
    )


def _time(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
