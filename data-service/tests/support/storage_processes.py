"""Processes that use a local root beside the tests: writers, holders of locks, other users.

Run as a module it is such a process; imported it starts them.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

from domain.entry import Entry
from storage.implementations.disk import Disk
from storage.implementations.local_file_storage import LocalFileStorage
from storage.interfaces import StaleVersion, StorageDenied
from storage.manager import StorageManagerImpl
from tests.support.entries import FIVE_MINUTES, NOON, make_entry

_PATIENCE_S: Final = 30.0
_NOBODY: Final = 65534
_PATHS: Final = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[2])]


class StorageProcess:
    """A process of this module; everything it says is one JSON value a line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._unread = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, value: Any) -> None:
        """Give it a line to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, within_s: float = _PATIENCE_S) -> Any | None:
        """What it says next, or None when it says nothing for so long; it must not have ended."""
        assert self._process.stdout is not None
        until = time.monotonic() + within_s
        while b"\n" not in self._unread:
            left = max(0.0, until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                return None
            more = os.read(self._process.stdout.fileno(), 65536)
            assert more, "the process ended"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """End it as nothing can prevent, and wait for that."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_PATIENCE_S)


@contextmanager
def storage_process(
    what: str, *arguments: Any, module: str = "tests.support.storage_processes"
) -> Iterator[StorageProcess]:
    """A process that does one of the things of this module, or another, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, what, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS)},
    )
    running = StorageProcess(process)
    try:
        yield running
    finally:
        running.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _say(value: Any) -> None:
    # One call of the system, so that lines of several processes do not mix.
    os.write(1, json.dumps(value).encode() + b"\n")


def _wait_to_be_killed() -> None:
    sys.stdin.read()


def leave_unfinished(root: str) -> None:
    """Write files that are never put in place, and say where they are."""
    disk = Disk(Path(root))
    _say([disk.stage("never", b'{"half', durable=True) for _ in range(3)])
    _wait_to_be_killed()


async def save(root: str, writer: int, count: int) -> None:
    """Save entries of a coin, some at once, and say so."""
    storage = LocalFileStorage(Path(root))
    await storage.open()
    documents = [(NOON + step * FIVE_MINUTES, {"writer": writer}) for step in range(count)]
    for document in documents[: count // 2]:
        await storage.save_entry("crypto.com", "BTC", *document)
    await storage.save_entries("crypto.com", "BTC", documents[count // 2 :])
    await storage.close()
    _say("saved")


async def count_up(root: str, times: int) -> None:
    """Add to a number that others add to as well, and say when it is done."""
    storage = LocalFileStorage(Path(root))
    await storage.open()
    done = 0
    while done < times:
        held = (await storage.get_entries("crypto.com", "BTC", [NOON])).get(NOON)
        number = 0 if held is None or held.content is None else held.content["number"]
        try:
            await storage.save_entries(
                "crypto.com",
                "BTC",
                [(NOON, {"number": number + 1})],
                expected={} if held is None else {NOON: held.version},
            )
        except StaleVersion:
            continue
        done += 1
    await storage.close()
    _say("counted")


async def hold(root: str) -> None:
    """Take the collector's lock, say whether that went well, and keep it."""
    lock = LocalFileStorage(Path(root)).collector_lock()
    _say(await lock.acquire())
    _wait_to_be_killed()


async def try_without_rights(root: str) -> None:
    """Do as a user who may do nothing, and say which error each thing gave."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    storage = LocalFileStorage(Path(root))
    elsewhere = LocalFileStorage(Path(root) / "locked" / "new")
    series = ("crypto.com", "BTC")
    things: dict[str, Callable[[], Awaitable[Any]]] = {
        "open": elsewhere.open,
        "read": lambda: storage.get_entry(*series, NOON),
        "range": lambda: storage.get_range("crypto.com", "LOCKED", NOON, NOON + 1),
        "save": lambda: storage.save_entry(*series, NOON, {}),
        "check": elsewhere.check_writable,
        "lock": elsewhere.collector_lock().acquire,
        "blob": lambda: storage.write_blob("locked/5m.json", b""),
    }
    said: dict[str, str | None] = {}
    for name, thing in things.items():
        try:
            await thing()
        except StorageDenied as exc:
            said[name] = exc.message
        else:
            said[name] = None
    _say(said)


async def _store_for_ever(root: str, seed: int) -> None:
    """Store entries in every way there is, and say each time what is stored now."""
    random = Random(seed)
    storage = LocalFileStorage(Path(root))
    await storage.open()
    manager = StorageManagerImpl(storage)
    latest = await manager.get_latest_entry("crypto.com", "BTC")
    following = NOON if latest is None else latest.timestamp + FIVE_MINUTES

    def entry(timestamp: int, *, book: bool) -> Entry:
        return make_entry(timestamp, close=round(random.uniform(60, 190), 6), book=book)

    while True:
        kind = random.choice(["single", "with a book", "correction", "bulk"])
        if kind == "correction" and following > NOON:
            periods = (following - NOON) // FIVE_MINUTES
            at = NOON + random.randrange(max(0, periods - 50), periods) * FIVE_MINUTES
            stored = [await manager.store_raw_data(entry(at, book=random.random() < 0.5))]
        elif kind == "bulk":
            count = random.randint(16, 60)
            times = [following + step * FIVE_MINUTES for step in range(count)]
            stored = await manager.store_batch([entry(at, book=False) for at in times])
        else:
            stored = [await manager.store_raw_data(entry(following, book=kind == "with a book"))]
        following = max(following, stored[-1].entry.timestamp + FIVE_MINUTES)
        for at in range(0, len(stored), 20):
            _say(
                [
                    [one.entry.timestamp, one.entry.revision, one.entry.order_book is not None]
                    for one in stored[at : at + 20]
                ]
            )


def store_until_killed() -> None:
    """For each line (root, seed) start a process that stores until it is killed.

    Says the number of each process, what it stored, and how it ended.
    """
    for line in sys.stdin:
        root, seed = json.loads(line)
        pid = os.fork()
        if pid == 0:
            asyncio.run(_store_for_ever(root, seed))
            os._exit(0)
        _say({"started": pid})
        _, status = os.waitpid(pid, 0)
        _say({"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL})


def main() -> None:
    """Do what the command line says."""
    does = {
        function.__name__: function
        for function in (
            leave_unfinished, save, count_up, hold, try_without_rights, store_until_killed,
        )
    }  # fmt: skip
    result = does[sys.argv[1]](*json.loads(sys.argv[2]))
    if asyncio.iscoroutine(result):
        asyncio.run(result)


if __name__ == "__main__":
    main()
