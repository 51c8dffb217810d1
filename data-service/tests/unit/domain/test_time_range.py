"""Ranges of time, against plain sets of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from domain.time_range import RangeSet, TimeRange

# Small enough that ranges meet, touch and nest often; some are empty or turned round.
ranges = st.builds(TimeRange, st.integers(0, 40), st.integers(0, 40))
steps = st.lists(st.tuples(st.booleans(), ranges), max_size=30)


def instants(item: TimeRange) -> set[int]:
    return set(range(item.start, item.end))


def build(changes: list[tuple[bool, TimeRange]]) -> tuple[RangeSet, set[int]]:
    """A range set and the plain set that went through the same additions and removals."""
    found, model = RangeSet(), set[int]()
    for adds, item in changes:
        if adds:
            found.add(item)
            model |= instants(item)
        else:
            found.remove(item)
            model -= instants(item)
    return found, model


def covered(items: list[TimeRange]) -> set[int]:
    return {instant for item in items for instant in instants(item)}


@given(steps)
def test_a_range_set_holds_what_a_plain_set_holds(changes: list[tuple[bool, TimeRange]]) -> None:
    found, model = build(changes)
    assert covered(list(found)) == model
    assert {instant for instant in range(-1, 42) if instant in found} == model
    assert bool(found) == bool(model)
    assert found.first == (min(model) if model else None)
    assert found.end == (max(model) + 1 if model else None)


@given(steps)
def test_its_ranges_are_sorted_not_empty_and_never_touch(
    changes: list[tuple[bool, TimeRange]],
) -> None:
    found, _ = build(changes)
    items = list(found)
    assert all(items)
    assert len(found) == len(items)
    assert all(left.end < right.start for left, right in itertools.pairwise(items))


@given(steps, ranges)
def test_within_and_missing_split_a_range_in_two(
    changes: list[tuple[bool, TimeRange]], item: TimeRange
) -> None:
    found, model = build(changes)
    inside, missing = found.within(item), found.missing(item)
    assert covered(inside) == instants(item) & model
    assert covered(missing) == instants(item) - model
    assert inside == sorted(inside)
    assert missing == sorted(missing)
    assert all(inside)
    assert all(missing)


@given(steps)
def test_equal_sets_are_equal_however_they_came_to_be(
    changes: list[tuple[bool, TimeRange]],
) -> None:
    found, model = build(changes)
    assert found == RangeSet(TimeRange(instant, instant + 1) for instant in model)
    assert found != RangeSet([TimeRange(100, 101), *found])
    assert found != model


@given(steps, ranges)
def test_a_copy_goes_its_own_way(changes: list[tuple[bool, TimeRange]], item: TimeRange) -> None:
    found, model = build(changes)
    twin = found.copy()
    twin.remove(item)
    twin.add(TimeRange(50, 51))
    assert covered(list(found)) == model


@given(ranges, ranges)
def test_ranges_intersect_like_sets(left: TimeRange, right: TimeRange) -> None:
    both = left.intersect(right)
    assert instants(both) == instants(left) & instants(right)
    assert both.length == len(instants(both))
    assert bool(both) == bool(instants(both))


def test_a_range_holds_its_start_and_not_its_end() -> None:
    item = TimeRange(10, 20)
    assert [at for at in (9, 10, 19, 20) if at in item] == [10, 19]


def test_a_range_set_shows_its_ranges() -> None:
    assert repr(RangeSet([TimeRange(1, 2)])) == "RangeSet([TimeRange(start=1, end=2)])"
