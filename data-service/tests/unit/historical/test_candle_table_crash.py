"""A process that seals is killed at any moment: a day is sealed as it was told, or as it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from tests.support.entries import BTC
from tests.support.sealing import ALL, day, entries_of, table_at
from tests.support.storage_processes import StorageProcess, storage_process

SEED: Final = 20_261_125
ROUNDS: Final = 40
LONGEST_LIFE_S: Final = 0.3
NEVER: Final = 10**9

Seeds = dict[int, int]
"""The sealed days by number, and what their entries are made by."""


@pytest.fixture(scope="module")
def sealers() -> Iterator[StorageProcess]:
    with storage_process("seal_until_killed", module="tests.support.sealing_processes") as process:
        yield process


class Told:
    """What processes said: what is surely done, and what may be."""

    def __init__(self) -> None:
        self.sealed: Seeds = {}
        self.doing: Mapping[str, int | None] | None = None
        self.done = 0

    def note(self, said: Any) -> None:
        if said == "done":
            self.sealed = self.after()
            self.doing = None
            self.done += 1
        else:
            self.doing = said

    def after(self) -> Seeds:
        """What is sealed once the last thing is done that was begun."""
        changed = {int(number): seed for number, seed in (self.doing or {}).items()}
        return {
            number: seed
            for number, seed in sorted({**self.sealed, **changed}.items())
            if seed is not None
        }


def run_and_kill(
    sealers: StorageProcess, path: Path, seed: int, told: Told, *, life_s: float, steps: int
) -> None:
    sealers.tell([str(path), seed, steps])
    started = sealers.hear()
    assert isinstance(started, dict)
    until = time.monotonic() + life_s
    while (said := sealers.hear(max(0.0, until - time.monotonic()))) is not None:
        if isinstance(said, dict) and "killed" in said:
            assert said == {"killed": True}
            return
        told.note(said)
    os.kill(started["started"], signal.SIGKILL)
    # What it had still said is in the pipe before its end is.
    while (said := sealers.hear()) != {"killed": True}:
        assert said is not None
        told.note(said)


def check(path: Path, told: Told) -> bool:
    """Whether what was begun last is done; the table has to be as it was before or after it."""
    _, found = table_at(path).read_entries(BTC, ALL)
    before, after = (
        [entry for number, seed in sorted(sealed.items())
         for entry in entries_of(day(number), seed=seed)]
        for sealed in (told.sealed, told.after())
    )  # fmt: skip
    assert found in (before, after)
    done = found == after
    if done:
        told.sealed = told.after()
    told.doing = None
    return done


def test_no_acknowledged_seal_or_unseal_is_lost_by_kills_at_any_moment(
    sealers: StorageProcess, tmp_path: Path
) -> None:
    random, told = Random(SEED), Told()
    for _ in range(ROUNDS):
        life_s = random.uniform(0, LONGEST_LIFE_S)
        run_and_kill(
            sealers, tmp_path / "t", random.randrange(2**32), told, life_s=life_s, steps=NEVER
        )
        check(tmp_path / "t", told)
    # The drill is worth something only if kills met processes at work.
    assert told.done > ROUNDS


def test_between_any_two_steps_a_kill_leaves_what_was_or_what_was_begun(
    sealers: StorageProcess, tmp_path: Path
) -> None:
    random, told = Random(SEED), Told()
    outcomes = set()
    for steps in range(1, ROUNDS):
        run_and_kill(sealers, tmp_path / "t", random.randrange(2**32), told, life_s=30, steps=steps)
        outcomes.add(check(tmp_path / "t", told))
    assert outcomes == {True, False}
