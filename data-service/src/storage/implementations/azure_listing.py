"""What lies in a container, by names alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from datetime import date
from typing import Any, Final

from azure.storage.blob.aio import BlobPrefix, ContainerClient

from domain.time_range import TimeRange
from storage.implementations.azure_calls import AzureCalls, in_parallel
from storage.path_utility import StoragePathUtility, day_of

# How many names the service lists in one answer.
PAGE: Final = 5000
# How many days are listed before their documents are read.
MOST_DAYS_AHEAD: Final = 64
# Ranges of more days are walked by years and months: most of their days may hold nothing.
_MOST_DAYS_UNWALKED: Final = 62
_DECEMBER: Final = 12
_LAST_YEAR: Final = 9999

Named = list[tuple[int, str]]
"""Times (ms) and paths of documents, in an order."""


class AzureListing:
    """Lists the container that ``container`` gives, ``at_once`` days at a time.

    Every method raises what ``AzureCalls`` raises.
    """

    def __init__(
        self, calls: AzureCalls, container: Callable[[], ContainerClient], *, at_once: int
    ) -> None:
        self._calls = calls
        self._container = container
        self._at_once = at_once

    async def documents(
        self,
        coin_path: str,
        ending: str,
        wanted: TimeRange,
        *,
        ahead: int,
        newest_first: bool = False,
    ) -> AsyncGenerator[Named, None]:
        """The documents of a range in order, some days at a time: ``ahead`` first, then more."""

        async def read(day: date) -> Named:
            named = await self.day(coin_path, ending, day)
            return named[::-1] if newest_first else named

        async def listed(days: list[date]) -> Named:
            found = await in_parallel(read, days, self._at_once)
            return [one for named in found for one in named if one[0] in wanted]

        most = min(max(ahead, 1), MOST_DAYS_AHEAD)
        waiting: list[date] = []
        async with aclosing(self._days(coin_path, wanted, newest_first=newest_first)) as days:
            async for day in days:
                waiting.append(day)
                if len(waiting) == most:
                    yield await listed(waiting)
                    waiting = []
                    most = min(2 * most, MOST_DAYS_AHEAD)
        yield await listed(waiting)

    async def _days(
        self, coin_path: str, wanted: TimeRange, *, newest_first: bool
    ) -> AsyncGenerator[date, None]:
        """The days of a range that may hold documents.

        Those of a long one are looked up first: only folders of its years and months are listed.
        """
        if not wanted:
            return
        first, last = day_of(wanted.start), day_of(wanted.end - 1)
        if (last - first).days < _MOST_DAYS_UNWALKED:
            ordinals = range(first.toordinal(), last.toordinal() + 1)
            for ordinal in reversed(ordinals) if newest_first else ordinals:
                yield date.fromordinal(ordinal)
            return
        for year in await self._numbers(
            coin_path, 4, first.year, last.year, newest_first=newest_first
        ):
            low = first.month if year == first.year else 1
            high = last.month if year == last.year else _DECEMBER
            year_path = f"{coin_path}/{year:04d}"
            for month in await self._numbers(year_path, 2, low, high, newest_first=newest_first):
                month_path = f"{year_path}/{month:02d}"
                for number in await self._numbers(month_path, 2, 1, 31, newest_first=newest_first):
                    try:
                        day = date(year, month, number)
                    except ValueError:
                        continue
                    if first <= day <= last:
                        yield day

    async def day_folders(self, coin_path: str) -> AsyncGenerator[tuple[date, list[str]], None]:
        """The days that have blobs, with the names of theirs, a month at a time, ascending."""
        for year in await self._numbers(coin_path, 4, 1, _LAST_YEAR, newest_first=False):
            year_path = f"{coin_path}/{year:04d}"
            for month in await self._numbers(year_path, 2, 1, _DECEMBER, newest_first=False):
                prefix = f"{year_path}/{month:02d}/"
                folders: dict[str, list[str]] = {}
                for path in await self.names(prefix):
                    folder, slash, name = path[len(prefix) :].partition("/")
                    if slash:
                        folders.setdefault(folder, []).append(name)
                for number in StoragePathUtility.numbers_of(folders, 2, 1, 31, newest_first=False):
                    with suppress(ValueError):
                        yield date(year, month, number), folders[f"{number:02d}"]

    async def _numbers(
        self, folder: str, digits: int, low: int, high: int, *, newest_first: bool
    ) -> list[int]:
        """The folders in a folder that are numbers of so many digits, from ``low`` to ``high``."""
        return StoragePathUtility.numbers_of(
            await self.folders(folder), digits, low, high, newest_first=newest_first
        )

    async def day(self, coin_path: str, ending: str, day: date) -> Named:
        """The documents of one day, ascending."""
        prefix = f"{coin_path}/{day:%Y/%m/%d}/"
        names = (path[len(prefix) :] for path in await self.names(prefix))
        found = StoragePathUtility.times_of(names, day, ending)
        return [(timestamp, f"{prefix}{name}") for timestamp, name in found]

    async def names(self, prefix: str, *, most: int | None = None) -> list[str]:
        """The blobs that begin with ``prefix``; the first ``most`` where it is given."""
        found: list[str] = []
        marker: str | None = None

        async def page() -> tuple[list[str], str | None]:
            pages: Any = (
                self._container()
                .list_blob_names(name_starts_with=prefix, results_per_page=most)
                .by_page(marker)
            )
            return [name async for name in await anext(pages)], pages.continuation_token

        while True:
            names, marker = await self._calls.read(prefix, page)
            found += names
            if marker is None or (most is not None and len(found) >= most):
                return found

    async def folders(self, folder: str) -> list[str]:
        """The names of the folders right below a folder."""
        prefix = f"{folder}/"
        found: list[str] = []
        marker: str | None = None

        async def page() -> tuple[list[str], str | None]:
            pages: Any = self._container().walk_blobs(name_starts_with=prefix).by_page(marker)
            names = [item.name async for item in await anext(pages) if isinstance(item, BlobPrefix)]
            return names, pages.continuation_token

        while True:
            names, marker = await self._calls.read(prefix, page)
            found += [name[len(prefix) :].rstrip("/") for name in names]
            if marker is None:
                return found
