"""The sandbox as a process."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest

from sandbox.command import add_arguments, run

_PROGRAM = """
import argparse, sys
from sandbox.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""
_SOURCES = Path(__file__).parents[3] / "src"


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(texts)


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_where_it_listens_and_ends_well_on_a_signal(number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        "--port",
        "0",
        env={**os.environ, "PYTHONPATH": str(_SOURCES)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        line = (await process.stdout.readline()).decode()
        said, _, url = line.strip().rpartition(" ")
        assert said == "sandbox listening on"
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{url}/exchange/v1/public/get-tickers") as response,
        ):
            assert response.status == 200
        process.send_signal(number)
        assert await process.wait() == 0
        assert await process.stdout.read() == b""


def test_a_wrong_market_clock_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARKET_CLOCK", "yesterday")
    assert run(arguments("--port", "0")) == 2
    assert capsys.readouterr().err.startswith("MARKET_CLOCK takes 'real' or")


def test_a_recording_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("--port", "0", "--replay", str(tmp_path / "none"))) == 2
    assert "no candles are recorded there" in capsys.readouterr().err


def test_a_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(arguments("--port", str(port))) == 1
    assert f"cannot listen on port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [("--port", "65536"), ("--rate-limit", "x"), ("--market-clock", "x"), ("--history-start", "x")],
)
def test_a_wrong_option_is_refused(wrong: tuple[str, str]) -> None:
    with pytest.raises(argparse.ArgumentError, match=wrong[0]):
        arguments(*wrong)


def test_times_are_read_as_ms_or_iso() -> None:
    assert arguments("--history-start", "2024-01-01").history_start == 1_704_067_200_000
    assert arguments("--history-start", "1704067200000").history_start == 1_704_067_200_000
