"""Ranges of time, against plain sets of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from domain.time_range import RangeMap, RangeSet, TimeRange

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


@given(steps, steps, steps, ranges)
def test_what_several_sets_do_not_cover_is_what_none_of_them_does(
    first: list[tuple[bool, TimeRange]],
    second: list[tuple[bool, TimeRange]],
    third: list[tuple[bool, TimeRange]],
    item: TimeRange,
) -> None:
    sets, models = zip(*(build(changes) for changes in (first, second, third)), strict=True)
    missing = sets[0].missing(item, *sets[1:])
    assert covered(missing) == instants(item) - models[0] - models[1] - models[2]
    assert missing == sorted(missing)
    assert all(left.end < right.start for left, right in itertools.pairwise(missing))


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


# None removes; few values, so that equal ones touch often.
settings_of_runs = st.lists(st.tuples(ranges, st.one_of(st.none(), st.integers(1, 3))), max_size=30)


def build_map(changes: list[tuple[TimeRange, int | None]]) -> tuple[RangeMap[int], dict[int, int]]:
    """A range map and the plain dict that went through the same changes."""
    found, model = RangeMap[int](), dict[int, int]()
    for item, value in changes:
        if value is None:
            found.remove(item)
            for instant in instants(item):
                model.pop(instant, None)
        else:
            found.set(item, value)
            model |= dict.fromkeys(instants(item), value)
    return found, model


@given(settings_of_runs, ranges)
def test_a_range_map_holds_what_a_plain_dict_holds(
    changes: list[tuple[TimeRange, int | None]], item: TimeRange
) -> None:
    found, model = build_map(changes)
    inside = {instant: value for run, value in found.within(item) for instant in instants(run)}
    assert inside == {at: value for at, value in model.items() if at in item}
    assert covered(found.missing(item)) == instants(item) - set(model)
    assert {at: value for run, value in found for at in instants(run)} == model
    assert found.values() == [value for _, value in found]


@given(settings_of_runs)
def test_runs_of_a_range_map_are_sorted_and_touch_only_where_values_differ(
    changes: list[tuple[TimeRange, int | None]],
) -> None:
    found, model = build_map(changes)
    runs = list(found)
    assert len(found) == len(runs)
    assert bool(found) == bool(model)
    for (left, low), (right, high) in itertools.pairwise(runs):
        assert left.end < right.start or (left.end == right.start and low != high)
    assert found == RangeMap((TimeRange(at, at + 1), value) for at, value in model.items())
