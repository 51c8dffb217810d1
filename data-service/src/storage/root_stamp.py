"""Which kind of market a root holds: that of the real exchanges, or another's.

A sandbox's prices among real ones would be wrong candles for ever, so a root is stamped when it is
first used and refuses the other kind from then on.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from storage.interfaces import IRawDataStorage, StorageConflict, StorageError
from storage.path_utility import SERVICE_FOLDER

STAMP_PATH: Final = f"{SERVICE_FOLDER}/root.json"
LAYOUT: Final = 1
REAL: Final = "real"
REDIRECTED: Final = "redirected"


async def check_stamp(storage: IRawDataStorage, *, redirected: bool) -> bool:
    """Whether the root is stamped; a root of the other kind, or of another layout, is refused.

    Raises:
        StorageConflict: it is no root for this service; the message says what to do.
        StorageError: the stamp cannot be read.
    """
    content = await storage.read_blob(STAMP_PATH)
    if content is None:
        return False
    where = f"{storage.address}: {STAMP_PATH}"
    stamp = _fields(content)
    kind, layout = stamp.get("exchanges"), stamp.get("layout")
    if kind not in (REAL, REDIRECTED) or not isinstance(layout, int):
        raise StorageConflict(
            f"{where} does not say what the root holds; write "
            f'{{"exchanges": "{REAL}", "layout": {LAYOUT}}} there if its candles are real ones'
        )
    if layout != LAYOUT:
        raise StorageConflict(
            f"{where} says layout {layout}, this service knows {LAYOUT}: upgrade the service, or "
            f"set STORAGE_ROOT to another place"
        )
    mine = REDIRECTED if redirected else REAL
    if kind != mine:
        raise StorageConflict(
            f"{storage.address} holds candles of {kind} exchanges and this service asks {mine} "
            f"ones: set STORAGE_ROOT to another place, or change EXCHANGE_ENDPOINTS"
        )
    return True


async def demand_stamp(storage: IRawDataStorage, *, redirected: bool | None) -> None:
    """Refuse a root that no service has collected into; with ``redirected`` also one of the other
    kind.

    Raises:
        StorageConflict: it holds candles of the other kind.
        StorageError: it has no stamp, or cannot be read.
    """
    if redirected is None:
        stamped = await storage.read_blob(STAMP_PATH) is not None
    else:
        stamped = await check_stamp(storage, redirected=redirected)
    if not stamped:
        raise StorageError(
            f"{storage.address}: no service has collected into it yet ({STAMP_PATH} is not there); "
            f"check STORAGE_ROOT"
        )


async def write_stamp(storage: IRawDataStorage, *, redirected: bool) -> None:
    """Stamp a root that has no stamp yet; only who holds its collector's lock may."""
    kind = REDIRECTED if redirected else REAL
    await storage.write_blob(STAMP_PATH, orjson.dumps({"exchanges": kind, "layout": LAYOUT}))


def _fields(content: bytes) -> dict[str, Any]:
    try:
        stamp = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    return stamp if isinstance(stamp, dict) else {}
