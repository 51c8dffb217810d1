"""Gaps: runs of missing entries, and why."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of periods without an entry, for one reason."""

    range: TimeRange
    reason: GapReason

    def count(self, interval: Interval) -> int:
        """How many periods are missing."""
        return self.range.length // interval.milliseconds
