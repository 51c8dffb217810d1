"""A service loads what it serves with, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import RUN_TIMEOUT_S, SECRET, clean_environment

pytestmark = pytest.mark.e2e

SERVE = """
import asyncio, json, sys
import cli
from config import load_settings
from domain.clock import MarketClock
from main import create_app
from target_management.manager import TargetManager
from tests.support.targets import make_target

async def serve():
    settings = load_settings()
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        targets = TargetManager.from_settings(settings, MarketClock())
        await targets.add_target(make_target("BTC", since=0, now=1))
        await targets.update_target("crypto.com:BTC:5m", enabled=False)
        assert len(await targets.list_targets()) == 1
        await targets.delete_target("crypto.com:BTC:5m")
        await targets.close()
    print(json.dumps(list(sys.modules)))

asyncio.run(serve())
"""


async def test_a_local_service_loads_no_library_that_it_does_not_serve_with(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVE,
        env=clean_environment(
            AUTH_SECRET=SECRET, EXCHANGES="crypto.com,binance", PYTHONPATH=":".join(sys.path)
        ),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(RUN_TIMEOUT_S):
        output, _ = await process.communicate()
    assert process.returncode == 0
    loaded: set[str] = set(json.loads(output.splitlines()[-1]))
    assert {"main", "deltalake", "ccxt.pro.binance", "ccxt.pro.cryptocom"} <= loaded
    exchanges = {name for name in loaded if name.startswith("ccxt.pro.")}
    assert exchanges == {"ccxt.pro.binance", "ccxt.pro.cryptocom"}
    needless = {"pandas", "azure", "hypothesis", "pytest", "sandbox.app", "sandbox.prices"}
    needless |= {"google.protobuf", "observability.otel", "opentelemetry.sdk"}
    assert needless & loaded == set()
