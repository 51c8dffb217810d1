"""A loopback proxy before Azurite that makes its listings obey ``startFrom``, as Azure's do.

Delta's client asks for the log entries from a version on; Azurite ignores that and answers all of
them, whereupon the second commit fails. Everything but such a listing passes through as it is: the
path too, since the signature covers it.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from xml.sax.saxutils import unescape

from aiohttp import (
    ClientConnectionError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    web,
)
from yarl import URL

from tests.support.azurite import ACCOUNT, Azurite, connection_string

_STOP_TIMEOUT_S: Final = 10.0
_PATHS: Final = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[2])]
# What belongs to one hop, and not to the message.
_HOP: Final = {"connection", "host", "keep-alive", "transfer-encoding"}
_BLOB: Final = re.compile(rb"<Blob>.*?</Blob>", re.DOTALL)
_NAME: Final = re.compile(rb"<Name>(.*?)</Name>", re.DOTALL)


def listing_from(listing: bytes, start_from: str) -> bytes:
    """A listing without the blobs whose names come before ``start_from``."""

    def kept(blob: re.Match[bytes]) -> bytes:
        name = _NAME.search(blob[0])
        assert name is not None
        return blob[0] if unescape(name[1].decode()) >= start_from else b""

    return _BLOB.sub(kept, listing)


async def _forward(target: str, session: ClientSession, request: web.BaseRequest) -> web.Response:
    asked = session.request(
        request.method,
        URL(target + request.raw_path, encoded=True),
        headers=[
            (name, value) for name, value in request.headers.items() if name.lower() not in _HOP
        ],
        data=await request.read(),
        skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
        allow_redirects=False,
    )
    async with AsyncExitStack() as stack:
        try:
            answer = await stack.enter_async_context(asked)
        except ClientConnectionError:
            # As who is not there: no answer.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=503)
        body = await answer.read()
        start_from = request.query.get("startFrom")
        if start_from is not None and answer.status == 200:
            body = listing_from(body, start_from)
        headers = [
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in _HOP | {"content-length"}
        ]
        passed_on = web.Response(status=answer.status, body=body, headers=headers)
        if request.method == "HEAD" and "Content-Length" in answer.headers:
            passed_on.headers["Content-Length"] = answer.headers["Content-Length"]
        return passed_on


async def _serve(target: str) -> None:
    """Listen on a free port, say which, and forward to ``target`` until standard input ends."""
    async with ClientSession(
        connector=TCPConnector(limit=0),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        timeout=ClientTimeout(total=60),
    ) as session:
        runner = web.ServerRunner(web.Server(partial(_forward, target, session)))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        await runner.cleanup()


@contextmanager
def listing_proxy(port: int) -> Iterator[int]:
    """A proxy before the Azurite on ``port``; yields the port it listens on.

    It is a process of its own: Delta's client may hold the interpreter while it waits.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.listing_proxy", f"http://127.0.0.1:{port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)
        process.stdout.close()


@contextmanager
def as_azure_lists(azurite: Azurite) -> Iterator[str]:
    """What ``AZURE_STORAGE_CONNECTION_STRING`` takes of a service that keeps tables there, too."""
    with listing_proxy(azurite.port) as port:
        yield connection_string(f"http://127.0.0.1:{port}/{ACCOUNT}")


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
