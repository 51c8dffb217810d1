"""The command as a user runs it: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from auth.module import AuthenticationModuleImpl
from config import load_settings
from domain.clock import MarketClock
from tests.support.processes import SECRET, clean_environment, program, run, stop

pytestmark = pytest.mark.e2e


async def test_a_token_speaks_for_its_subject_with_its_scope(tmp_path: Path) -> None:
    code, lines, _ = await run(
        "token", "--subject", "bot", "--scope", "data:read", folder=tmp_path, AUTH_SECRET=SECRET
    )
    assert code == 0
    settings = load_settings(_env_file=None, auth_secret=SECRET)
    module = AuthenticationModuleImpl.from_settings(settings, MarketClock())
    principal = await module.authenticate(lines[0])
    assert (principal.subject, principal.scopes) == ("bot", frozenset({"data:read"}))


@pytest.mark.parametrize(
    ("arguments", "settings", "complaint"),
    [
        (("serve",), {}, "AUTH_SECRET"),
        (("serve",), {"AUTH_SECRET": "short"}, "AUTH_SECRET"),
        (("serve",), {"AUTH_SECRET": SECRET, "EXCHANGES": "kraken"}, "EXCHANGES"),
        (("token", "--subject", "bot"), {}, "AUTH_SECRET"),
        (("sandbox", "--replay", "nowhere"), {}, "nowhere"),
        (("verify",), {"EXCHANGES": "kraken"}, "EXCHANGES"),
        (("verify", "--interval", "7m"), {}, "interval '7m' does not exist"),
        (("verify",), {"STORAGE_ROOT": "nowhere"}, "nowhere: there is no such storage root"),
        (("verify",), {"STORAGE_ROOT": "."}, "no service has collected into it yet"),
    ],
)
async def test_what_is_wrong_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, str], complaint: str
) -> None:
    code, lines, errors = await run(*arguments, folder=tmp_path, **settings)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert complaint in errors[0]


@pytest.mark.parametrize("days", ["0", "-1", "many", "nan", "40000"])
async def test_days_that_are_none_are_refused(tmp_path: Path, days: str) -> None:
    code, lines, errors = await run("verify", f"--days={days}", folder=tmp_path)
    assert (code, lines) == (2, [])
    assert "takes a number of days above 0 and up to 36500" in errors[-1]


async def test_a_reader_that_leaves_ends_the_command_without_a_word(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli", "token", "--subject", "bot",
            env=clean_environment(AUTH_SECRET=SECRET), cwd=tmp_path,
            stdout=writer, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(writer)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, b"")


async def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, errors = await run(
            "serve", folder=tmp_path, AUTH_SECRET=SECRET, PORT=port, EXCHANGES="crypto.com"
        )
    assert (code, len(errors)) == (2, 1)
    assert f"127.0.0.1:{port}" in errors[0]


async def test_storage_that_cannot_be_used_stops_the_start_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("no folder")
    code, lines, errors = await run(
        "serve", folder=tmp_path, AUTH_SECRET=SECRET, PORT="0", STORAGE_ROOT="file/data"
    )
    assert code not in (0, None)
    assert lines == []
    assert [line for line in errors if "Traceback" in line] == []
    assert [line for line in errors if "file lies where a folder belongs" in line] != []


async def test_the_service_starts_without_its_exchange_and_ends_with_0(tmp_path: Path) -> None:
    environment = clean_environment(
        AUTH_SECRET=SECRET, PORT="0", EXCHANGE_ENDPOINTS='{"crypto.com": "http://127.0.0.1:9"}'
    )
    async with program("cli", "serve", environment=environment, folder=tmp_path) as (service, line):
        assert line.startswith("cb-trade-data serving on http://127.0.0.1:")
        assert await stop(service) == 0
