"""What a log line looks like, whoever writes it and whatever went wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import RUN_TIMEOUT_S, clean_environment, completed

PREPARED = """
import asyncio, gc, logging, sys, threading, warnings
import structlog
from observability.logging import configure_logging
configure_logging("DEBUG", "json")
log = structlog.get_logger("ours")
def fail():
    raise ValueError("first line\\nsecond line")
"""


async def lines_of(script: str, folder: Path, *, code: int = 0) -> list[str]:
    """What a script writes; the standard output stays empty."""
    returned, output, errors = await completed(
        sys.executable, "-c", PREPARED + script,
        environment=clean_environment(PYTHONPATH=":".join(sys.path)),
        folder=folder, within_s=RUN_TIMEOUT_S,
    )  # fmt: skip
    assert (returned, output) == (code, ""), errors
    return errors.splitlines()


async def one_event(script: str, folder: Path, *, code: int = 0) -> dict[str, Any]:
    (line,) = await lines_of(script, folder, code=code)
    event: dict[str, Any] = json.loads(line)
    return event


async def test_a_traceback_is_part_of_its_line(tmp_path: Path) -> None:
    event = await one_event(
        "try:\n    fail()\nexcept ValueError:\n    log.exception('failed', at=1)", tmp_path
    )
    assert (event["event"], event["level"], event["logger"]) == ("failed", "error", "ours")
    assert event["at"] == 1
    assert "second line" in event["exception"]
    assert event["timestamp"].endswith("Z")


async def test_an_exception_that_nobody_caught_is_the_last_event(tmp_path: Path) -> None:
    event = await one_event("fail()", tmp_path, code=1)
    assert (event["event"], event["level"]) == ("process_crashed", "critical")
    assert "ValueError" in event["exception"]


async def test_a_thread_that_crashes_is_an_event(tmp_path: Path) -> None:
    event = await one_event("threading.Thread(target=fail, name='mine').start()", tmp_path)
    assert (event["event"], event["thread"]) == ("thread_crashed", "mine")
    assert "ValueError" in event["exception"]


async def test_what_python_can_only_ignore_is_an_event(tmp_path: Path) -> None:
    script = "class Mean:\n    def __del__(self):\n        fail()\nMean()"
    event = await one_event(script, tmp_path)
    assert event["event"] == "exception_ignored"
    assert "ValueError" in event["exception"]


async def test_a_task_whose_failure_nobody_asked_for_is_an_event(tmp_path: Path) -> None:
    script = """
async def work():
    fail()
async def main():
    task = asyncio.create_task(work())
    await asyncio.wait([task])
    del task
    gc.collect()
asyncio.run(main())
"""
    event = await one_event(script, tmp_path)
    assert (event["logger"], event["level"]) == ("asyncio", "error")
    assert "ValueError" in event["exception"]


async def test_a_warning_of_python_is_an_event(tmp_path: Path) -> None:
    event = await one_event("warnings.warn('too old', UserWarning)", tmp_path)
    assert (event["logger"], event["level"]) == ("py.warnings", "warning")
    assert "too old" in event["event"]


async def test_a_line_that_cannot_be_rendered_is_told_by_its_place(tmp_path: Path) -> None:
    script = "log.info('odd', value={(1, 2): 3})\nlogging.getLogger('lib').error('%d', 'x')"
    events = [json.loads(line) for line in await lines_of(script, tmp_path)]
    assert [event["event"] for event in events] == ["log_line_lost", "log_line_lost"]
    assert [event["logger"] for event in events] == ["ours", "lib"]
    assert events[1]["where"].startswith("<string>:")


async def test_libraries_are_heard_from_a_warning_on_and_this_program_always(
    tmp_path: Path,
) -> None:
    script = (
        "logging.getLogger('websockets').debug('> authorization: Bearer secret')\n"
        "logging.getLogger('httpx').info('GET ...')\n"
        "logging.getLogger('lib').warning('grave %s', 'thing')\n"
        "log.debug('ours')"
    )
    events = [json.loads(line) for line in await lines_of(script, tmp_path)]
    assert [event["event"] for event in events] == ["grave thing", "ours"]
