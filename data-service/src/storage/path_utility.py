"""Where a document lies: names of folders and files, and back from them.

Pure functions. Every path is relative to the storage root, ``/`` between names, on every system.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from domain.interval import DEFAULT_INTERVAL, KNOWN_INTERVALS, Interval
from domain.time_range import TimeRange
from errors import InvalidRequest
from storage.interfaces import Timestamp

RAW_DATA: Final = "raw_data"
LEDGER: Final = "ledger"
# What the service keeps in a root for itself.
SERVICE_FOLDER: Final = ".cb-trade"
# What a name may take once encoded: file systems allow 255 bytes, temporary names need a few.
MAX_NAME_BYTES: Final = 200
# How the names of files begin that are still being written.
TEMPORARY_PREFIX: Final = ".tmp-"

_DAY_MS: Final = 86_400_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Times that four digits of a year can name.
_NAMEABLE: Final = TimeRange(0, 253_402_300_800_000)
_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._")
_DIGITS: Final = 14
_FILE_NAME: Final = re.compile(r"([0-9]{14})(?:_([0-9]+[a-z]))?\.json", re.ASCII)
_ENDING: Final = ".json"


@dataclass(frozen=True, slots=True)
class RawDataPath:
    """What the path of a document says. ``timestamp`` is the open of its period in ms."""

    exchange: str
    coin: str
    interval: str
    timestamp: int


class StoragePathUtility:
    """Paths of raw data: ``raw_data/{exchange}/{coin}/{YYYY}/{MM}/{DD}/{YYYYMMDDHHMMSS}.json``.

    Entries of another interval than 5m have ``_{interval}`` before the ending. Times are UTC.
    Every function raises ``InvalidRequest`` for what can stand in no path and says what can.
    """

    @staticmethod
    def get_raw_data_path(
        exchange_name: str,
        coin_symbol: str,
        timestamp: Timestamp,
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> str:
        """The path of the document of one entry.

        ``timestamp`` is the open of the period: ms since the epoch, or an aware datetime, on a
        whole second, since names carry nothing finer.
        """
        return StoragePathUtility.get_raw_data_paths(
            exchange_name, coin_symbol, [timestamp], interval=interval
        )[0]

    @staticmethod
    def get_raw_data_paths(
        exchange_name: str,
        coin_symbol: str,
        timestamps: Iterable[Timestamp],
        *,
        interval: str = DEFAULT_INTERVAL,
    ) -> list[str]:
        """The paths of documents of one series, in the order of ``timestamps``, for less than half
        of what they cost one by one."""
        coin_path = StoragePathUtility.coin_path(exchange_name, coin_symbol)
        ending = StoragePathUtility.file_ending(interval)
        return [
            f"{coin_path}/{_whole_second(timestamp):%Y/%m/%d/%Y%m%d%H%M%S}{ending}"
            for timestamp in timestamps
        ]

    @staticmethod
    def parse_raw_data_path(path: str) -> RawDataPath | None:
        """What a path says, or None when ``get_raw_data_path`` never gives such a path."""
        parts = path.split("/")
        if len(parts) != 7 or parts[0] != RAW_DATA:
            return None
        exchange = StoragePathUtility.decode_name(parts[1])
        coin = StoragePathUtility.decode_name(parts[2])
        match = _FILE_NAME.fullmatch(parts[6])
        if exchange is None or coin is None or match is None:
            return None
        interval = match[2] or DEFAULT_INTERVAL
        try:
            moment = datetime.strptime(match[1], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
            timestamp = to_milliseconds(moment)
            canonical = StoragePathUtility.get_raw_data_path(
                exchange, coin, timestamp, interval=interval
            )
        except (ValueError, InvalidRequest):
            return None
        return RawDataPath(exchange, coin, interval, timestamp) if canonical == path else None

    @staticmethod
    def exchange_path(exchange_name: str) -> str:
        """The folder of an exchange."""
        return f"{RAW_DATA}/{StoragePathUtility.encode_name(exchange_name, 'exchange')}"

    @staticmethod
    def coin_path(exchange_name: str, coin_symbol: str) -> str:
        """The folder of a coin on an exchange."""
        exchange_path = StoragePathUtility.exchange_path(exchange_name)
        return f"{exchange_path}/{StoragePathUtility.encode_name(coin_symbol, 'coin')}"

    @staticmethod
    def day_path(exchange_name: str, coin_symbol: str, day: date) -> str:
        """The folder of one UTC day of a coin; every interval lies in it."""
        return f"{StoragePathUtility.coin_path(exchange_name, coin_symbol)}/{day:%Y/%m/%d}"

    @staticmethod
    def file_ending(interval: str) -> str:
        """How the file names of an interval end, after the 14 digits of the time."""
        name = Interval.parse(interval).name
        return _ENDING if name == DEFAULT_INTERVAL else f"_{name}{_ENDING}"

    @staticmethod
    def timestamp_of(file_name: str, day: date, ending: str) -> int | None:
        """The time (ms) that a file name in the folder of ``day`` says, or None.

        None stands for everything that is no document of the series: other intervals, other
        days, temporary files, foreign files.
        """
        found = StoragePathUtility.times_of([file_name], day, ending)
        return found[0][0] if found else None

    @staticmethod
    def times_of(file_names: Iterable[str], day: date, ending: str) -> list[tuple[int, str]]:
        """The times (ms) that names in the folder of ``day`` say, each with its name, ascending.

        What is no document of the series is left out, as ``timestamp_of`` says.
        """
        start = day_start(day)
        digits = f"{day:%Y%m%d}"
        # Names of one day and one ending are in the order of their times.
        return [
            (start + of_day, name)
            for name in sorted(file_names)
            if name[_DIGITS:] == ending
            and name[:8] == digits
            and (of_day := _time_of_day(name[8:_DIGITS])) is not None
        ]

    @staticmethod
    def counts_of(file_names: Iterable[str], day: date) -> dict[str, int]:
        """How many documents of each interval are among names in the folder of ``day``."""
        by_ending: dict[str, list[str]] = {}
        for name in file_names:
            by_ending.setdefault(name[_DIGITS:], []).append(name)
        counts = {}
        for interval in KNOWN_INTERVALS:
            ending = StoragePathUtility.file_ending(interval)
            if count := len(StoragePathUtility.times_of(by_ending.get(ending, ()), day, ending)):
                counts[interval] = count
        return counts

    @staticmethod
    def numbers_of(
        names: Iterable[str], digits: int, low: int, high: int, *, newest_first: bool
    ) -> list[int]:
        """The names of folders that are years, months or days: numbers of so many digits, from
        ``low`` to ``high``, in order."""
        numbers = (
            int(name) for name in names if len(name) == digits and name.isascii() and name.isdigit()
        )
        return sorted((n for n in numbers if low <= n <= high), reverse=newest_first)

    @staticmethod
    def get_ledger_path(
        exchange_name: str, coin_symbol: str, *, interval: str = DEFAULT_INTERVAL
    ) -> str:
        """Where the proofs about one series lie, beside its documents."""
        exchange = StoragePathUtility.encode_name(exchange_name, "exchange")
        coin = StoragePathUtility.encode_name(coin_symbol, "coin")
        return f"{LEDGER}/{exchange}/{coin}/{Interval.parse(interval).name}.json"

    @staticmethod
    def encode_name(name: str, what: str = "coin") -> str:
        """The name of a folder for ``name``: reversible, and safe in paths and blob names.

        ``/`` becomes ``-``; every byte of its UTF-8 outside ``A-Za-z0-9._`` is percent-encoded.
        """
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"{what} needs a name such as BTC or BTC/EUR, got {name!r}")
        if name in (".", ".."):
            raise InvalidRequest(f"{what} {name!r} is no name; use one such as BTC or BTC/EUR")
        try:
            raw = name.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"{what} {name!r} is no valid Unicode text") from exc
        encoded = "".join(
            chr(byte) if byte in _SAFE else "-" if byte == 0x2F else f"%{byte:02X}" for byte in raw
        )
        if len(encoded) > MAX_NAME_BYTES:
            raise InvalidRequest(
                f"{what} {name[:20]!r}... takes {len(encoded)} bytes in a path, "
                f"{MAX_NAME_BYTES} at most are possible"
            )
        return encoded

    @staticmethod
    def check_blob_path(path: str) -> None:
        """Refuse a path of a record that is not plainly inside the root.

        Names may hold anything but ``/``, a backslash and NUL; ``.``, ``..``, empty names and
        names that temporary files use are refused.
        """
        names = path.split("/")
        if (
            any(name in ("", ".", "..") for name in names)
            or any(character in path for character in ("\\", "\0"))
            or names[-1].startswith(TEMPORARY_PREFIX)
        ):
            raise InvalidRequest(
                f"path {path!r} does not name a file inside the storage root; "
                f"use a relative one such as ledger/crypto.com/BTC/5m.json"
            )

    @staticmethod
    def decode_name(encoded: str) -> str | None:
        """The name that ``encode_name`` made ``encoded`` of, or None when it never makes that."""
        try:
            name = unquote_to_bytes(encoded.replace("-", "/")).decode()
            return name if StoragePathUtility.encode_name(name) == encoded else None
        except (UnicodeError, InvalidRequest):
            return None


def to_milliseconds(timestamp: Timestamp) -> int:
    """``timestamp`` in ms since the epoch, rounded up to a whole one.

    Raises:
        InvalidRequest: it is neither an integer nor an aware datetime.
    """
    # The signature does not stop callers that pass on what they got from outside.
    value: Any = timestamp
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            raise InvalidRequest(
                f"datetime {value.isoformat()} has no time zone; "
                f"use an aware one, such as datetime(2026, 1, 1, tzinfo=UTC)"
            )
        return -((_EPOCH - value) // timedelta(milliseconds=1))
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(
            f"timestamp {value!r} is neither an integer of milliseconds since the epoch "
            f"nor an aware datetime"
        )
    return value


def to_range(start_time: Timestamp, end_time: Timestamp) -> TimeRange:
    """``[start_time, end_time)``, cut to the times that names can carry."""
    asked = TimeRange(to_milliseconds(start_time), to_milliseconds(end_time))
    return asked.intersect(_NAMEABLE)


def day_of(timestamp: int) -> date:
    """The UTC day that contains ``timestamp`` (ms)."""
    return (_EPOCH + timedelta(milliseconds=timestamp)).date()


def day_start(day: date) -> int:
    """The first ms of a UTC day."""
    return (day.toordinal() - _EPOCH.toordinal()) * _DAY_MS


# As many as there are seconds in a day; a year of 5m entries asks for the same 288 again and again.
@lru_cache(maxsize=86_400)
def _time_of_day(digits: str) -> int | None:
    """What six digits of a name say in ms since midnight, or None when they are no time."""
    if len(digits) != 6 or not (digits.isascii() and digits.isdigit()):
        return None
    hour, minute, second = int(digits[:2]), int(digits[2:4]), int(digits[4:])
    if hour > 23 or minute > 59 or second > 59:
        return None
    return (hour * 3600 + minute * 60 + second) * 1000


def _whole_second(timestamp: Timestamp) -> datetime:
    milliseconds = to_milliseconds(timestamp)
    finer = isinstance(timestamp, datetime) and timestamp.microsecond != 0
    if finer or milliseconds % 1000:
        raise InvalidRequest(
            f"timestamp {timestamp} is not on a whole second; entries are named by the open of "
            f"their period"
        )
    if milliseconds not in _NAMEABLE:
        raise InvalidRequest(
            f"timestamp {timestamp} is outside 1970 to 9999; use milliseconds since the epoch"
        )
    return _EPOCH + timedelta(milliseconds=milliseconds)
