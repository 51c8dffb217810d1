"""The table of targets in Azure Blob Storage: the emulator, behind a proxy that lists as Azure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from azure.storage.blob import BlobServiceClient

from domain.clock import MarketClock
from errors import ConfigurationError
from target_management.interfaces import TargetError, TargetStoreDenied, TargetStoreUnavailable
from target_management.manager import TargetManager
from tests.support.azurite import ACCOUNT, KEY, Azurite
from tests.support.listing_proxy import listing_proxy
from tests.support.target_processes import add_at_once, target

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

BTC, ETH = target("BTC"), target("ETH")


@pytest.fixture(scope="module")
def port(azurite: Azurite) -> Iterator[int]:
    with listing_proxy(azurite.port) as port:
        yield port


@pytest.fixture
def options(port: int) -> dict[str, str]:
    return {
        "account_name": ACCOUNT,
        "account_key": KEY,
        "allow_http": "true",
        "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}",
    }


@pytest.fixture
def path(azurite: Azurite, container: str) -> str:
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        service.create_container(container).close()
    return f"az://{container}/targets_delta"


def manager_of(path: str, options: dict[str, str]) -> TargetManager:
    return TargetManager("azure", path, options, MarketClock())


@pytest.fixture
async def manager(path: str, options: dict[str, str]) -> AsyncIterator[TargetManager]:
    manager = manager_of(path, options)
    await manager.open()
    yield manager
    await manager.close()


async def test_targets_are_added_changed_listed_and_deleted(manager: TargetManager) -> None:
    assert await manager.list_targets() == []
    assert await manager.add_target(BTC)
    assert not await manager.add_target(replace(BTC, market="BTC/EUR"))
    assert await manager.add_target(ETH)
    assert await manager.get_target(BTC.target_id) == BTC
    changed = await manager.update_target(ETH.target_id, enabled=False)
    assert changed is not None
    assert not changed.enabled
    assert await manager.list_targets(enabled=True) == [BTC]
    assert await manager.delete_target(ETH.target_id)
    assert not await manager.delete_target(ETH.target_id)
    assert await manager.list_targets() == [BTC]


async def test_what_one_manager_writes_another_one_reads(
    manager: TargetManager, path: str, options: dict[str, str]
) -> None:
    other = manager_of(path, options)
    await other.open()
    await manager.add_target(BTC)
    assert await other.list_targets() == [BTC]
    await other.add_target(ETH)
    assert await manager.list_targets() == [BTC, ETH]
    await other.close()


async def test_a_wrong_key_is_told_as_denied_and_never_shown(
    path: str, options: dict[str, str]
) -> None:
    secret = "d3Jvbmcga2V5IHdyb25nIGtleQ=="
    manager = manager_of(path, options | {"account_key": secret})
    with pytest.raises(TargetStoreDenied, match="AZURE_STORAGE_OPTIONS") as told:
        await manager.open()
    assert secret not in str(told.value)
    await manager.close()


async def test_an_address_where_nobody_answers_is_unavailable(
    path: str, options: dict[str, str], unused_tcp_port: int
) -> None:
    endpoint = f"http://127.0.0.1:{unused_tcp_port}/{ACCOUNT}"
    manager = TargetManager(
        "azure", path, options | {"endpoint": endpoint, "max_retries": "0"}, MarketClock()
    )
    with pytest.raises(TargetStoreUnavailable):
        await manager.open()
    await manager.close()


async def test_a_container_that_does_not_exist_is_told(options: dict[str, str]) -> None:
    manager = manager_of("az://nowhere-to-be-found/targets_delta", options)
    with pytest.raises(TargetError, match="nowhere-to-be-found"):
        await manager.open()
    await manager.close()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "takes a JSON object with the credentials"),
        ({"account_key": KEY}, "account_name"),
        ({"account_name": ACCOUNT, "acount_key": KEY}, "acount_key"),
        ({"account_name": ACCOUNT, "account_key": "not base64!"}, "base64"),
        (
            {"account_name": ACCOUNT, "account_key": KEY, "endpoint": "http://127.0.0.1:1/x"},
            "allow_http",
        ),
    ],
    ids=["missing", "no account", "unknown", "no key", "plain http"],
)
def test_options_that_cannot_work_stop_the_start(given: dict[str, str], what: str) -> None:
    with pytest.raises(ConfigurationError, match="AZURE_STORAGE_OPTIONS") as told:
        manager_of("az://targets/targets_delta", given)
    assert what in told.value.message


async def test_eight_processes_lose_nothing_and_add_nothing_twice(
    path: str, options: dict[str, str]
) -> None:
    mine = [[f"C{process}X{number}" for number in range(3)] for process in range(8)]
    # All begin at once with the one that they share.
    told = await add_at_once(path, [["SAME", *coins] for coins in mine], options)
    print(f"longest wait {max(item['wait'] for item in told):.1f} s")  # noqa: T201
    assert sorted(item["added"] for item in told) == [3] * 7 + [4]
    reader = manager_of(path, options)
    rows = [item.coin for item in await reader.list_targets()]
    assert rows == sorted(["SAME", *(coin for coins in mine for coin in coins)])
    await reader.close()
