"""How long to leave alone what has failed."""

from __future__ import annotations

import random
from typing import Final

# A pause that was asked for is kept up to this.
LONGEST_ASKED_FOR_S: Final = 3600.0
# Beyond so many doublings every pause is the longest.
_MOST_DOUBLINGS: Final = 32


def back_off_s(
    failures: int,
    *,
    first_s: float,
    longest_s: float,
    rng: random.Random,
    jitter: float = 0.25,
    asked_for_s: float | None = None,
) -> float:
    """Seconds to wait after ``failures`` earlier failures in a row: ``first_s``, doubling up to
    ``longest_s``, up to ``jitter`` (a share) longer or shorter so that many do not come at once.

    It is never less than ``asked_for_s``, such as a ``Retry-After``, of an hour at most.
    """
    pause = min(longest_s, first_s * 2.0 ** min(failures, _MOST_DOUBLINGS))
    jittered = pause * rng.uniform(1.0 - jitter, 1.0 + jitter)
    return max(jittered, min(asked_for_s or 0.0, LONGEST_ASKED_FOR_S))
