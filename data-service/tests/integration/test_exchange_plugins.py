"""Exchanges of installed packages in a service that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.packages import EXAMPLE, install, write_package
from tests.support.processes import market_clock, stack_to_start, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[3]


async def test_an_installed_exchange_serves_beside_the_built_in_one_and_a_broken_one_is_told(
    tmp_path: Path,
) -> None:
    packages = tmp_path / "packages"
    install(EXAMPLE, packages)
    write_package(packages, "broken-exchange", "import nowhere_to_be_found", broken="Plugin")
    path = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    async with stack_to_start(
        tmp_path,
        market_clock(1_763_985_600_000, 30),
        EXCHANGES="broken,example,crypto.com",
        PYTHONPATH=os.pathsep.join(path),
    ) as running:
        running.settings["EXCHANGE_ENDPOINTS"] = json.dumps(
            {"example": running.sandbox_url, "crypto.com": running.sandbox_url}
        )
        await running.start_service()
        (left_out,) = [line for line in running.logs().splitlines() if "left_out" in line]
        assert "exchange=broken" in left_out
        assert "package='broken-exchange 1.0'" in left_out
        assert "No module named 'nowhere_to_be_found'" in left_out
        async with running.http(running.token()) as client:
            available = await client.get("/api/v1/availability", params={"coin": "BTC"})
            assert [market["exchange"] for market in available.json()["markets"]] == [
                "example", "crypto.com",
            ]  # fmt: skip
            added = await client.post("/api/v1/coins", json={"coin": "BTC", "interval": "1m"})
            assert added.json()["target"]["exchange"] == "example"

            async def is_live() -> bool:
                (target,) = (await client.get("/api/v1/coins")).json()["targets"]
                return bool(target["last_entry"])

            await until(is_live)
        assert list((running.storage_root / "raw_data" / "example" / "BTC").rglob("*.json"))


def test_the_plugin_on_the_page_about_plugins_is_the_one_that_is_tried() -> None:
    page = (ROOT / "docs/exchanges/README.md").read_text()
    for file in ("example_exchange.py", "pyproject.toml"):
        assert (EXAMPLE / file).read_text() in page
