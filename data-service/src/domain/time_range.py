"""Half-open ranges of time and sets of them: the arithmetic that gaps are found with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True, slots=True, order=True)
class TimeRange:
    """``[start, end)`` in milliseconds since the epoch, UTC. Empty when ``end <= start``."""

    start: int
    end: int

    def __bool__(self) -> bool:
        return self.start < self.end

    def __contains__(self, timestamp: int) -> bool:
        return self.start <= timestamp < self.end

    @property
    def length(self) -> int:
        return max(0, self.end - self.start)

    def intersect(self, other: TimeRange) -> TimeRange:
        """What both ranges cover; empty when they do not meet."""
        return TimeRange(max(self.start, other.start), min(self.end, other.end))


class RangeSet:
    """A mutable set of instants kept as sorted, disjoint, non-touching ``[start, end)`` ranges.

    Adding and removing cost O(log n + ranges touched), a look-up O(log n).
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[TimeRange] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for item in ranges:
            self.add(item)

    def __iter__(self) -> Iterator[TimeRange]:
        return (TimeRange(start, end) for start, end in zip(self._starts, self._ends, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({list(self)!r})"

    def __contains__(self, timestamp: int) -> bool:
        at = bisect_right(self._starts, timestamp) - 1
        return at >= 0 and timestamp < self._ends[at]

    def copy(self) -> RangeSet:
        twin = RangeSet()
        twin._starts = self._starts.copy()
        twin._ends = self._ends.copy()
        return twin

    def add(self, item: TimeRange) -> None:
        """Include ``item``; ranges that meet or touch become one."""
        if not item:
            return
        # Mostly what is added ascends.
        last = self._ends[-1] if self._ends else None
        if last == item.start:
            self._ends[-1] = item.end
            return
        if last is None or last < item.start:
            self._starts.append(item.start)
            self._ends.append(item.end)
            return
        left = bisect_left(self._ends, item.start)
        right = bisect_right(self._starts, item.end)
        start, end = item.start, item.end
        if left < right:
            start = min(start, self._starts[left])
            end = max(end, self._ends[right - 1])
        self._starts[left:right] = [start]
        self._ends[left:right] = [end]

    def remove(self, item: TimeRange) -> None:
        """Exclude ``item``; a range that it lies within is split."""
        if not item:
            return
        left = bisect_right(self._ends, item.start)
        right = bisect_left(self._starts, item.end)
        if left >= right:
            return
        kept = []
        if self._starts[left] < item.start:
            kept.append((self._starts[left], item.start))
        if self._ends[right - 1] > item.end:
            kept.append((item.end, self._ends[right - 1]))
        self._starts[left:right] = [start for start, _ in kept]
        self._ends[left:right] = [end for _, end in kept]

    def within(self, item: TimeRange) -> list[TimeRange]:
        """The parts of this set inside ``item``, ascending."""
        if not item:
            return []
        left = bisect_right(self._ends, item.start)
        right = bisect_left(self._starts, item.end)
        return [
            TimeRange(max(start, item.start), min(end, item.end))
            for start, end in zip(self._starts[left:right], self._ends[left:right], strict=True)
        ]

    def missing(self, item: TimeRange, *others: RangeSet) -> list[TimeRange]:
        """The parts of ``item`` that neither this set nor the others cover, ascending."""
        covered = self.spans(item)
        for other in others:
            covered += other.spans(item)
        if others:
            covered.sort()
        found = []
        at = item.start
        for start, end in covered:
            if start > at:
                found.append(TimeRange(at, start))
            at = max(at, end)
        if at < item.end:
            found.append(TimeRange(at, item.end))
        return found

    def spans(self, item: TimeRange) -> list[tuple[int, int]]:
        """The start and end of each range that meets ``item``."""
        if not item:
            return []
        left = bisect_right(self._ends, item.start)
        right = bisect_left(self._starts, item.end)
        return list(zip(self._starts[left:right], self._ends[left:right], strict=True))

    @property
    def first(self) -> int | None:
        """The first instant covered, or None when the set is empty."""
        return self._starts[0] if self._starts else None

    @property
    def end(self) -> int | None:
        """The end of the last range, or None when the set is empty."""
        return self._ends[-1] if self._ends else None


class RangeMap(Generic[V]):
    """A mutable map from instants to values, kept as sorted, disjoint runs of one value each.

    Runs that touch and have equal values are one. Setting and removing cost O(log n + runs
    touched), a look-up O(log n).
    """

    __slots__ = ("_ends", "_starts", "_values")

    def __init__(self, runs: Iterable[tuple[TimeRange, V]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []
        for item, value in runs:
            self.set(item, value)

    def __iter__(self) -> Iterator[tuple[TimeRange, V]]:
        return (
            (TimeRange(start, end), value)
            for start, end, value in zip(self._starts, self._ends, self._values, strict=True)
        )

    def __len__(self) -> int:
        return len(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeMap):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeMap({list(self)!r})"

    def set(self, item: TimeRange, value: V) -> None:
        """Give every instant of ``item`` the value, whatever it had."""
        if not item:
            return
        self.remove(item)
        left = right = bisect_left(self._starts, item.start)
        start, end = item.start, item.end
        if left > 0 and self._ends[left - 1] == start and self._values[left - 1] == value:
            left -= 1
            start = self._starts[left]
        touches = right < len(self._starts) and self._starts[right] == end
        if touches and self._values[right] == value:
            end = self._ends[right]
            right += 1
        self._starts[left:right] = [start]
        self._ends[left:right] = [end]
        self._values[left:right] = [value]

    def remove(self, item: TimeRange) -> None:
        """Forget the values of ``item``; a run that it lies within is split."""
        left, right = self._touched(item)
        if left >= right:
            return
        kept = []
        if self._starts[left] < item.start:
            kept.append((self._starts[left], item.start, self._values[left]))
        if self._ends[right - 1] > item.end:
            kept.append((item.end, self._ends[right - 1], self._values[right - 1]))
        self._starts[left:right] = [start for start, _, _ in kept]
        self._ends[left:right] = [end for _, end, _ in kept]
        self._values[left:right] = [value for _, _, value in kept]

    def within(self, item: TimeRange) -> list[tuple[TimeRange, V]]:
        """The runs inside ``item`` with their values, ascending."""
        left, right = self._touched(item)
        return [
            (TimeRange(max(self._starts[at], item.start), min(self._ends[at], item.end)),
             self._values[at])
            for at in range(left, right)
        ]  # fmt: skip

    def missing(self, item: TimeRange) -> list[TimeRange]:
        """The parts of ``item`` that have no value, ascending."""
        return RangeSet(part for part, _ in self.within(item)).missing(item)

    def values(self) -> list[V]:
        """The value of each run, ascending by time."""
        return self._values.copy()

    def _touched(self, item: TimeRange) -> tuple[int, int]:
        if not item:
            return 0, 0
        return bisect_right(self._ends, item.start), bisect_left(self._starts, item.end)
