"""Who collects: taking the lock, keeping it, losing it, taking over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from collection.role import CollectorRole
from storage.interfaces import StorageConflict, StorageError, StorageUnavailable
from tests.support.clock import ManualClock, settle_loop
from tests.support.storage import InMemoryStorage


class World:
    def __init__(self) -> None:
        self.storage = InMemoryStorage()
        self.clock = ManualClock()
        self.steps: list[str] = []
        self.fail_begin: StorageError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.role = CollectorRole(
            self.storage.collector_lock(),
            self.clock,
            prepare=self.prepare,
            begin=self.begin,
            end=self.end,
        )

    async def prepare(self) -> None:
        self.storage.check()
        self.steps.append("prepare")

    async def begin(self) -> None:
        await self.answers.wait()
        if self.fail_begin is not None:
            raise self.fail_begin
        self.steps.append("begin")

    async def end(self) -> None:
        self.steps.append("end")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.role.run())
        await settle_loop()
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def later(self) -> None:
        await self.clock.advance(60_000)


@pytest.fixture
def world() -> World:
    return World()


async def test_the_first_try_prepares_takes_the_lock_and_begins(world: World) -> None:
    await world.role.start()
    assert world.steps == ["prepare", "begin"]
    assert world.role.collecting
    assert (world.role.other, world.role.trouble) == (None, None)
    async with world.running():
        await world.later()
    assert world.steps == ["prepare", "begin"]


async def test_while_another_holds_the_root_this_one_stands_by_and_takes_over_later(
    world: World,
) -> None:
    world.storage.collector = "pid 7 on elsewhere"
    with capture_logs() as logs:
        await world.role.start()
        assert world.role.other == "pid 7 on elsewhere"
        async with world.running():
            await world.later()
            assert world.steps == ["prepare"]
            assert not world.role.collecting
            world.storage.collector = None
            await world.later()
            assert world.steps == ["prepare", "begin"]
            assert world.role.collecting
            assert world.role.other is None
    assert [log["event"] for log in logs] == ["standing_by", "collecting"]


async def test_who_loses_the_root_to_another_stops_collecting(world: World) -> None:
    await world.role.start()
    async with world.running():
        world.storage.collector = "pid 7 on elsewhere"
        await world.later()
        assert world.steps == ["prepare", "begin", "end"]
        assert not world.role.collecting
        world.storage.collector = None
        await world.later()
        assert world.steps == ["prepare", "begin", "end", "begin"]


async def test_who_cannot_ask_for_the_lock_goes_on_and_its_beginning_and_end_are_told_once(
    world: World,
) -> None:
    await world.role.start()
    with capture_logs() as logs:
        async with world.running():
            world.storage.fail_with = StorageUnavailable("the line is cut")
            await world.later()
            await world.later()
            assert world.role.collecting
            assert world.role.trouble == "the line is cut"
            world.storage.fail_with = None
            await world.later()
            await world.later()
            assert world.role.trouble is None
    assert world.steps == ["prepare", "begin"]
    assert [log["event"] for log in logs] == ["collector_role_unsure", "collector_role_sure"]


async def test_a_first_try_that_fails_says_why_and_is_tried_again(world: World) -> None:
    world.storage.fail_with = StorageUnavailable("the line is cut")
    with pytest.raises(StorageUnavailable):
        await world.role.start()
    assert (world.role.collecting, world.role.trouble) == (False, "the line is cut")
    async with world.running():
        await world.later()
        assert world.steps == []
        world.storage.fail_with = None
        await world.later()
        assert world.steps == ["prepare", "begin"]
        assert world.role.trouble is None


async def test_beginning_is_tried_until_it_succeeds(world: World) -> None:
    world.fail_begin = StorageConflict("a root of the other kind")
    with pytest.raises(StorageConflict):
        await world.role.start()
    async with world.running():
        await world.later()
        assert not world.role.collecting
        # Another, which can, is not kept from it.
        assert world.storage.collector is None
        world.fail_begin = None
        await world.later()
        assert world.role.collecting
    assert world.steps == ["prepare", "begin"]


async def test_a_first_try_that_takes_too_long_is_given_up_and_tried_again(world: World) -> None:
    world.answers.clear()
    with pytest.raises(StorageUnavailable, match=r"took longer than 0\.01 s"):
        await world.role.start(within_s=0.01)
    assert not world.role.collecting
    assert world.role.trouble == "what collecting begins with took longer than 0.01 s"
    world.answers.set()
    async with world.running():
        await world.later()
        assert world.role.collecting
    assert world.steps == ["prepare", "begin"]
