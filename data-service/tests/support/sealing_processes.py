"""Processes that seal and unseal days until they are killed. Run as a module it starts them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from random import Random
from typing import Any

from tests.support.entries import BTC
from tests.support.sealing import day, entries_of, table_at


def _say(value: Any) -> None:
    # One call of the system, so that lines of several processes do not mix.
    os.write(1, json.dumps(value).encode() + b"\n")


def _die_at(steps: int) -> None:
    """Be killed when something is made durable for the so many-th time."""
    fsync, left = os.fsync, steps

    def fsync_or_die(fd: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = fsync_or_die


def _seal_for_ever(path: str, seed: int, steps: int) -> None:
    """Seal, unseal and tidy, and say before each what it will be, and after it that it is done.

    What is said is what becomes of days: by number, the seed of their entries, or null.
    """
    random = Random(seed)
    table = table_at(Path(path))
    _die_at(steps)
    while True:
        kind = random.choice(["seal", "seal", "unseal", "tidy"])
        numbers = sorted(random.sample(range(-4, 5), random.randint(1, 3)))
        seeds = {number: random.randrange(1_000) if kind == "seal" else None for number in numbers}
        _say({} if kind == "tidy" else seeds)
        if kind == "seal":
            table.seal(
                BTC,
                {
                    day(number): entries_of(day(number), seed=made_by)
                    for number, made_by in seeds.items()
                    if made_by is not None
                },
            )
        elif kind == "unseal":
            table.unseal(BTC, [day(number) for number in numbers])
        else:
            table.tidy()
        _say("done")


def seal_until_killed() -> None:
    """For each line (path, seed, steps) start a process that seals until it is killed, by itself
    after so many steps if not by another.

    Says the number of each process, what it says, and how it ended.
    """
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _seal_for_ever(*json.loads(line))
            os._exit(0)
        _say({"started": pid})
        _, status = os.waitpid(pid, 0)
        _say({"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL})


if __name__ == "__main__":
    {"seal_until_killed": seal_until_killed}[sys.argv[1]]()
