"""Programs of the peers' environment, run to their end."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.processes import clean_environment, completed


async def run_peer(program: str, *arguments: str, folder: Path, within_s: float) -> str:
    """What a program of the peers' environment printed; ``folder`` is its home too.

    Raises:
        AssertionError: it failed; with the end of what it said.
        TimeoutError: it had not ended after ``within_s``; it is killed.
    """
    environment = clean_environment(HOME=str(folder))
    # Our own modules are not for them, nor is our environment.
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    code, output, errors = await completed(
        str(Path(os.environ["CB_TRADE_PEERS"]) / "bin" / program), *arguments,
        environment=environment, folder=folder, within_s=within_s,
    )  # fmt: skip
    assert code == 0, (output + errors)[-3_000:]
    return output
