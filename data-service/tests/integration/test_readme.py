"""What the README says is true: its example runs as pasted, its tables name what there is."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from api.endpoints import OPERATIONS
from config import Settings
from tests.support.processes import clean_environment, line_with, program, stop

README = Path(__file__).parents[3] / "README.md"


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.e2e
async def test_the_websocket_example_works_when_pasted(tmp_path: Path) -> None:
    (example,) = [block for block in blocks("python") if "/ws/data" in block]
    environment = clean_environment(PORT="0")
    async with program(
        "demo", environment=environment, folder=tmp_path, ready="cb-trade data service"
    ) as (demo, _):
        url = (await line_with(demo, "WebSocket")).split()[-1]
        token = (await line_with(demo, "TOKEN=")).split("=", 1)[-1]
        pasted = tmp_path / "example.py"
        pasted.write_text(example.replace("ws://127.0.0.1:8000/ws/data", url))
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",
            str(pasted),
            env={**environment, "TOKEN": token},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            first = json.loads(await line_with(client, "{"))
            assert (first["type"], first["market"]) == ("subscribed", "BTC/USD")
            candle = json.loads(await line_with(client, "realtime_data"))
            assert candle["data"]["closed"] is False
        finally:
            client.kill()
            await client.wait()
        assert await stop(demo) == 0


def test_the_agents_configuration_is_json_and_names_every_tool() -> None:
    (configuration,) = [json.loads(block) for block in blocks("json") if "mcpServers" in block]
    (server,) = configuration["mcpServers"].values()
    assert server["url"].endswith("/mcp")
    assert server["headers"]["Authorization"].startswith("Bearer ")
    text = README.read_text()
    assert [tool for tool in OPERATIONS if f"`{tool}`" not in text] == []


def test_the_settings_are_those_that_exist() -> None:
    table = README.read_text().split("| setting | default | meaning |")[1].split("\n\n")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`([A-Z][A-Z_]+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == {name.upper() for name in Settings.model_fields}
