"""When the service calls itself ready, and what it warns of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import api.health
from api.health import SILENT_S, USELESS_S, Health
from api.metrics import ExchangeCollector
from collection.interfaces import FeedStatus
from collection.role import CollectorRole
from storage.interfaces import StorageUnavailable
from storage.manager import StorageManagerImpl
from storage.spool import Spool
from target_management.interfaces import TargetStoreUnavailable
from tests.support.clock import ManualClock
from tests.support.entries import make_entry
from tests.support.exchange import FakeExchange
from tests.support.storage import InMemoryStorage
from tests.support.targets import InMemoryTargets


async def nothing() -> None:
    """What beginning and ending do here."""


class World:
    def __init__(self, folder: Path) -> None:
        self.backend = InMemoryStorage()
        self.spool = Spool(folder, most_entries=1)
        self.storage = StorageManagerImpl(self.backend, spool=self.spool)
        self.role = CollectorRole(
            self.backend.collector_lock(),
            ManualClock(),
            prepare=nothing,
            begin=nothing,
            end=nothing,
        )
        self.exchange = FakeExchange(ManualClock())
        self.targets = InMemoryTargets()
        self.silent: dict[str, float | None] = {"crypto.com": 1.0, "binance": 2.0, "coinbase": None}
        self.health = Health(
            self.storage, self.role, [self.exchange], collection=self, targets=self.targets
        )

    def feeds(self) -> list[FeedStatus]:
        return [FeedStatus(name, "connected", lag_s=lag) for name, lag in self.silent.items()]

    async def start(self) -> None:
        await self.spool.open()
        await self.role.start()
        self.health.phase = "running"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_service_that_starts_or_stops_is_not_ready(world: World) -> None:
    await world.start()
    for phase in ("starting", "stopping"):
        world.health.phase = phase
        assert (await world.health.readiness()).reasons == (f"the service is {phase}",)


async def test_a_running_collector_is_ready_without_a_word(world: World) -> None:
    await world.start()
    readiness = await world.health.readiness()
    assert (readiness.reasons, readiness.warnings) == ((), ())


async def test_a_storage_that_refuses_is_the_reason_and_what_waits_a_warning(world: World) -> None:
    await world.start()
    world.backend.fail_with = StorageUnavailable("the line is cut")
    assert (await world.health.readiness()).reasons == ("storage: the line is cut",)
    await world.storage.store_raw_data(make_entry(source="stream"))
    readiness = await world.health.readiness()
    assert readiness.reasons == (
        "storage: the line is cut",
        "the spool is full: what is collected now is refused",
    )
    assert [warning[:9] for warning in readiness.warnings] == ["1 entries"]


async def test_a_storage_that_does_not_answer_is_a_reason_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.health, "READY_TIMEOUT_S", 0.01)
    await world.start()
    silent = asyncio.Event()
    monkeypatch.setattr(world.backend, "check_writable", silent.wait)
    (reason,) = (await world.health.readiness()).reasons
    assert reason == "storage did not answer within 0.01 s"


async def test_who_stands_by_is_ready_and_says_who_collects(world: World) -> None:
    world.backend.collector = "pid 7 on elsewhere"
    await world.start()
    readiness = await world.health.readiness()
    assert readiness.reasons == ()
    (warning,) = readiness.warnings
    assert "standing by: pid 7 on elsewhere collects" in warning


async def test_who_could_not_ask_for_the_root_is_not_ready(world: World) -> None:
    world.backend.fail_with = StorageUnavailable("the line is cut")
    with pytest.raises(StorageUnavailable):
        await world.start()
    world.health.phase = "running"
    reasons = (await world.health.readiness()).reasons
    assert reasons[0] == "not collecting yet: the line is cut"


async def test_who_cannot_renew_what_it_holds_is_not_ready(world: World) -> None:
    await world.start()
    world.backend.fail_with = StorageUnavailable("the line is cut")
    with pytest.raises(StorageUnavailable):
        await world.role.start()
    world.backend.fail_with = None
    (reason,) = (await world.health.readiness()).reasons
    assert reason == "cannot say whether this service still collects: the line is cut"


async def test_targets_that_cannot_be_read_are_a_reason(world: World) -> None:
    await world.start()
    world.targets.fail_with = TargetStoreUnavailable("no such table")
    assert (await world.health.readiness()).reasons == ("targets: no such table",)


async def test_who_stands_by_needs_no_targets(world: World) -> None:
    world.backend.collector = "pid 7 on elsewhere"
    world.targets.fail_with = TargetStoreUnavailable("no such table")
    await world.start()
    assert (await world.health.readiness()).reasons == ()


async def test_one_silent_exchange_of_several_is_a_warning_however_long_it_lasts(
    world: World,
) -> None:
    await world.start()
    world.silent["binance"] = SILENT_S - 1
    assert (await world.health.readiness()).warnings == ()
    world.silent["binance"] = 10 * USELESS_S
    readiness = await world.health.readiness()
    assert readiness.reasons == ()
    assert readiness.warnings == ("nothing was heard of binance for 3000 s",)


async def test_a_service_that_hears_nothing_at_all_for_long_is_not_ready(world: World) -> None:
    await world.start()
    world.silent = {"crypto.com": USELESS_S + 1, "binance": 400.0, "coinbase": None}
    readiness = await world.health.readiness()
    assert readiness.warnings == ()
    assert readiness.reasons == (
        "nothing was heard of crypto.com for 301 s",
        "nothing was heard of binance for 400 s",
    )


async def test_what_the_backend_warns_of_is_a_warning(world: World) -> None:
    await world.start()
    world.backend.warns = ["the disk is nearly full"]
    assert (await world.health.readiness()).warnings == ("the disk is nearly full",)


@pytest.mark.parametrize(
    ("skew_ms", "told"), [(12_300, "12 s ahead of"), (-61_000, "61 s behind"), (2_000, None)]
)
async def test_an_exchange_whose_clock_is_far_off_is_a_warning_and_a_figure(
    world: World, skew_ms: int, told: str | None
) -> None:
    await world.start()
    collector = ExchangeCollector([world.exchange])
    skew, *_ = collector.collect()
    assert list(skew.samples) == []
    world.exchange.time_offset_ms = skew_ms
    await world.exchange.check_coin_availability("BTC")
    warnings = (await world.health.readiness()).warnings
    assert len(warnings) == (told is not None)
    if told is not None:
        assert f"the clock of crypto.com is {told} this machine's" in warnings[0]
    skew, *_ = collector.collect()
    assert [(dict(sample.labels), sample.value) for sample in skew.samples] == [
        ({"exchange": "crypto.com"}, skew_ms / 1000)
    ]
