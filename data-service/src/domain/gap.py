"""Gaps: runs of missing entries, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from domain.interval import Interval
from domain.time_range import TimeRange


class GapReason(StrEnum):
    """Why a period has no entry."""

    PENDING = "pending"
    """Known, will be fetched."""
    UNREACHABLE = "unreachable"
    """The exchange could not be asked, or refused."""
    NO_TRADES = "no_trades"
    """Asked after the period: rows on both sides of it, none in it."""
    NOT_OFFERED = "not_offered"
    """Older than the exchange gives."""

    @property
    def is_open(self) -> bool:
        """Whether an entry may still come."""
        return self in (GapReason.PENDING, GapReason.UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of periods without an entry, for one reason."""

    range: TimeRange
    reason: GapReason

    def count(self, interval: Interval) -> int:
        """How many periods are missing."""
        return self.range.length // interval.milliseconds


def joined(gaps: Iterable[Gap]) -> tuple[Gap, ...]:
    """Ascending gaps with those that touch and have one reason made one."""
    result: list[Gap] = []
    for gap in gaps:
        last = result[-1] if result else None
        if last is not None and last.reason is gap.reason and last.range.end == gap.range.start:
            result[-1] = Gap(TimeRange(last.range.start, gap.range.end), gap.reason)
        else:
            result.append(gap)
    return tuple(result)
