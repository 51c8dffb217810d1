"""History as it goes over the wire, in HTTP answers and WebSocket messages alike."""

from __future__ import annotations

from typing import Any

from domain.gap import Gap
from domain.interval import Interval


def gap_out(gap: Gap, interval: Interval) -> dict[str, Any]:
    """A gap with the number of periods that it is long."""
    return {
        "start": gap.range.start,
        "end": gap.range.end,
        "count": gap.count(interval),
        "reason": gap.reason.value,
    }
