"""``cb-trade-data verify`` on what a real service collected from a real sandbox."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from azure.storage.blob import ContainerClient

from tests.support.azurite import Azurite
from tests.support.processes import Stack, clean_environment, market_clock, run, stack, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

FIVE = 300_000
# In the middle of a period, so that none closes while a test looks.
START = 1_763_985_600_000 + FIVE // 3
COUNTS = re.compile(
    r"crypto\.com:(?P<coin>\w+):5m from (?P<start>\S+) to (?P<end>\S+): (?P<checked>\d+) checked, "
    r"(?P<missing>\d+) missing, (?P<different>\d+) different, (?P<extra>\d+) extra, "
    r"(?P<not_checkable>\d+) not checkable(?P<stopped>; stopped: .*)?"
)


@asynccontextmanager
async def collected(folder: Path, *coins: str, **settings: str) -> AsyncIterator[Stack]:
    """A service that has collected an hour of some coins, and runs on."""
    clock = market_clock(START, 1)
    async with stack(folder, clock, BACKFILL_DAYS="0.0417", **settings) as running:
        async with running.http(running.token()) as client:
            for coin in coins:
                (await client.post("/api/v1/coins", json={"coin": coin})).raise_for_status()

            async def live() -> bool:
                targets = (await client.get("/api/v1/coins")).json()["targets"]
                return all(target["state"] == "live" for target in targets)

            await until(live)
        yield running


async def verify(running: Stack, *arguments: str) -> tuple[int | None, list[str], list[str]]:
    return await run("verify", *arguments, folder=running.folder, **running.settings)


def counts(line: str) -> dict[str, str]:
    match = COUNTS.fullmatch(line)
    assert match is not None, line
    return match.groupdict()


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every path below a folder, when it was changed, and its size."""
    return sorted(
        (str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")
    )


def etags(client: ContainerClient) -> dict[str, str]:
    """Every blob of a container, and which version of it lies there."""
    return {blob.name: blob.etag for blob in client.list_blobs()}


def paths(running: Stack, coin: str = "BTC") -> list[Path]:
    folder = running.storage_root / "raw_data/crypto.com" / coin
    return sorted(folder.rglob("*.json"))


def said(path: Path) -> str:
    """The period of a document as verify writes it."""
    opened = json.loads(path.read_bytes())["timestamp"] // 1000
    return datetime.fromtimestamp(opened, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def move_to_spool(running: Stack, path: Path) -> None:
    """What a service does that finds its storage away."""
    (spool,) = (running.storage_root / "spool").iterdir()
    there = spool / path.relative_to(running.storage_root)
    there.parent.mkdir(parents=True)
    path.rename(there)


async def test_what_was_collected_is_equal_beside_the_service_and_without_it(
    tmp_path: Path,
) -> None:
    async with collected(tmp_path, "BTC", "ETH") as running:
        code, lines, errors = await verify(running)
        assert (code, len(lines), errors) == (0, 3, [])
        bitcoin, ether = counts(lines[0]), counts(lines[1])
        assert (bitcoin["coin"], ether["coin"]) == ("BTC", "ETH")
        assert int(bitcoin["checked"]) == int(ether["checked"]) == len(paths(running)) == 12
        assert (bitcoin["start"], bitcoin["end"]) == (
            "2025-11-24T11:00:00Z", "2025-11-24T12:00:00Z",
        )  # fmt: skip
        assert lines[2].startswith("2 targets: 24 checked, 0 missing, 0 different, 0 extra")
        assert lines[2].endswith("all that could be checked is equal")
        await running.kill_service()

        move_to_spool(running, paths(running)[3])
        before = listing(tmp_path)
        code, lines, errors = await verify(running, "--coin", "btc", "--exchange", "Crypto.com")
        assert (code, len(lines), errors) == (0, 2, [])
        assert counts(lines[0])["checked"] == "12"
        assert listing(tmp_path) == before


async def test_each_difference_is_found_and_told(tmp_path: Path) -> None:
    async with collected(tmp_path, "BTC", "ETH") as running:
        await running.kill_service()
        deleted, changed, extra, broken = paths(running)[2:6]
        told = [said(path) for path in (deleted, changed, extra, broken)]
        deleted.unlink()
        document = json.loads(changed.read_bytes())
        volume, document["volume"] = document["volume"], document["volume"] + 1
        changed.write_text(json.dumps(document))
        broken.write_text(broken.read_text()[:-5])
        await running.fault(
            {
                "kind": "rest_missing_rows",
                "instrument": "BTC_USD",
                "timestamps": [json.loads(extra.read_bytes())["timestamp"]],
            }
        )
        before = listing(tmp_path)

        code, lines, errors = await verify(running)
        assert (code, len(lines), errors) == (1, 7, [])
        bitcoin = counts(lines[0])
        assert [bitcoin[kind] for kind in ("checked", "missing", "different", "extra")] == [
            "12", "1", "2", "1",
        ]  # fmt: skip
        assert lines[1].startswith(f"  {told[3]} different: the document is broken: ")
        assert lines[2].startswith(f"  {told[2]} extra: stored is open ")
        assert lines[3] == (
            f"  {told[1]} different: volume is {volume + 1} and {volume} on the exchange"
        )
        assert lines[4].startswith(f"  {told[0]} missing: the exchange has open ")
        assert counts(lines[5])["coin"] == "ETH"
        assert lines[6].endswith("there are differences")
        assert listing(tmp_path) == before

        # A range without them is equal; the target begins an hour ago.
        code, lines, _ = await verify(running, "--days", str(25 / 60 / 24))
        assert (code, counts(lines[0])["checked"]) == (0, "4")


async def test_what_cannot_be_checked_is_told_with_its_reason(tmp_path: Path) -> None:
    async with collected(tmp_path, "BTC", "ETH") as running:
        await running.kill_service()
        before = listing(tmp_path)
        code, lines, errors = await verify(running, "--coin", "DOGE")
        assert (code, lines, len(errors)) == (2, [], 1)
        assert "no target fits DOGE; collected are crypto.com:BTC:5m, crypto.com:ETH" in errors[0]

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        running.settings["EXCHANGE_ENDPOINTS"] = f'{{"crypto.com": "http://127.0.0.1:{port}"}}'
        code, lines, _ = await verify(running)
        assert (code, len(lines)) == (2, 3)
        for line in lines[:2]:
            assert "crypto.com: " in (counts(line)["stopped"] or "")
            assert counts(line)["not_checkable"] == "12"
        assert lines[2].endswith("nothing could be checked; 2 could not be checked to the end")

        running.settings["EXCHANGE_ENDPOINTS"] = "{}"
        code, lines, errors = await verify(running)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert "holds candles of redirected exchanges and this service asks real ones" in errors[0]

        running.settings["TARGET_TABLE_PATH"] = str(tmp_path / "elsewhere")
        running.settings["EXCHANGE_ENDPOINTS"] = f'{{"crypto.com": "{running.sandbox_url}"}}'
        code, lines, errors = await verify(running)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert "elsewhere: there is no table of targets" in errors[0]
        assert listing(tmp_path) == before


async def test_documents_on_azure_are_compared_where_they_lie_and_in_the_spool(
    tmp_path: Path, azurite: Azurite, container: str
) -> None:
    async with collected(
        tmp_path,
        "BTC",
        STORAGE_TYPE="azure",
        STORAGE_ROOT=container,
        AZURE_STORAGE_CONNECTION_STRING=azurite.connection_string,
        TARGET_STORAGE_TYPE="local",
    ) as running:
        code, lines, errors = await verify(running)
        assert (code, len(lines), errors) == (0, 2, [])
        assert counts(lines[0])["checked"] == "12"
        await running.kill_service()

        client = ContainerClient.from_connection_string(azurite.connection_string, container)
        with client:
            documents = sorted(client.list_blob_names(name_starts_with="raw_data/"))
            (spool,) = (running.storage_root / "spool").iterdir()
            waiting = spool / documents[4]
            waiting.parent.mkdir(parents=True)
            waiting.write_bytes(client.download_blob(documents[4]).readall())
            client.delete_blob(documents[4])
            client.delete_blob(documents[7])
            blobs, files = etags(client), listing(tmp_path)

            code, lines, errors = await verify(running)
            assert (code, len(lines), errors) == (1, 3, [])
            assert (counts(lines[0])["checked"], counts(lines[0])["missing"]) == ("12", "1")
            assert (etags(client), listing(tmp_path)) == (blobs, files)

        running.settings["STORAGE_ROOT"] = f"{container}-missing"
        code, lines, errors = await verify(running)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert f"{container}-missing: there is no such storage root" in errors[0]
        assert listing(tmp_path) == files


async def test_it_can_be_interrupted_without_a_traceback(tmp_path: Path) -> None:
    async with collected(tmp_path, "BTC") as running:
        await running.kill_service()
        await running.fault({"kind": "rest_hang", "path": "get-candlestick"})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cli",
            "verify",
            env=clean_environment(**running.settings),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

        async def asks() -> bool:
            return sum((await running.hits()).values()) > 0

        await until(asks)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            output, errors = await process.communicate()
        assert (process.returncode, output, errors) == (128 + signal.SIGINT, b"", b"")
