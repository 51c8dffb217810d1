"""What of a target may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from errors import InvalidRequest

_TAKES: Final = {"enabled": bool, "since": int, "market": str}


def check_changes(changes: Mapping[str, Any]) -> None:
    """Refuse changes that a target does not take.

    Raises:
        InvalidRequest: there are none, or one is of another field than ``enabled`` (true or
            false), ``since`` (ms since the epoch) and ``market`` (a symbol), or has another type.
    """
    fits = all(
        isinstance(value, _TAKES.get(field, ()))
        and isinstance(value, bool) == (field == "enabled")
        and value != ""
        for field, value in changes.items()
    )
    if not changes or not fits:
        told = ", ".join(f"{field}={value!r}" for field, value in sorted(changes.items()))
        raise InvalidRequest(
            f"a target takes changes of enabled (true or false), since (ms since the epoch) and "
            f"market (a symbol such as BTC/USD), got {told or 'none'}"
        )
