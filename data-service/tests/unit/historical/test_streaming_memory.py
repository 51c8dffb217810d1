"""What streaming takes does not grow with the range."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from domain.time_range import TimeRange
from tests.support.streaming_processes import STEP, make_years

MONTH = 30 * 86_400_000
# The most memory (MB) that ten years may take beyond a month.
BOUND_MB = 20


def streamed(root: Path, wanted: TimeRange) -> dict[str, Any]:
    # A process of its own: the most memory of a process is told, and never less again.
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.streaming_processes",
         str(root), str(wanted.start), str(wanted.end)],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=50,
        check=True,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.timeout(120)
async def test_ten_years_take_no_more_memory_than_a_month_and_a_little(tmp_path: Path) -> None:
    decade = await make_years(tmp_path, 2015, 10)
    month = streamed(tmp_path, TimeRange(decade.end - MONTH, decade.end))
    all_of_it = streamed(tmp_path, decade)
    for said, part in ((month, MONTH), (all_of_it, decade.length)):
        assert said["asked"] == 0
        assert said["last"]["type"] == "historical_data_complete"
        assert said["last"]["count"] == part // STEP
        assert said["last"]["gaps"] == []
    assert all_of_it["peak_mb"] <= month["peak_mb"] + BOUND_MB, (month, all_of_it)
