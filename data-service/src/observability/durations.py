"""How long things took, counted so that a histogram can be made of it at any time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Durations:
    """Counts by upper bound. Adding costs a search of a few bounds and keeps nothing else.

    Args:
        bounds: upper bounds in seconds, ascending; what is longer than the last is counted too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """How many were at most the bound of the same place and longer than the one before it; the
        last is of those beyond every bound."""
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds
