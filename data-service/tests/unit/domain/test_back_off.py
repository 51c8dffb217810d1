"""How long to leave alone what has failed."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from domain.back_off import LONGEST_ASKED_FOR_S, back_off_s


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_pauses_double_up_to_the_longest_and_are_spread(failures: int, seed: int) -> None:
    pause = back_off_s(failures, first_s=0.5, longest_s=30.0, rng=random.Random(seed))
    middle = min(30.0, 0.5 * 2.0 ** min(failures, 10))
    assert 0.75 * middle <= pause <= 1.25 * middle


@given(st.floats(0, 1e9))
def test_what_was_asked_for_is_kept_up_to_an_hour(asked_for_s: float) -> None:
    pause = back_off_s(
        0, first_s=0.5, longest_s=30.0, rng=random.Random(1), asked_for_s=asked_for_s
    )
    assert pause >= min(asked_for_s, LONGEST_ASKED_FOR_S)
    assert pause <= max(0.625, min(asked_for_s, LONGEST_ASKED_FOR_S))
