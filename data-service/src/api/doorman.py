"""Who answers at the door while the application does not serve: before it does, and after.

The server listens only once everything has started, and not any more when it stops. Without
somebody at the door an orchestrator sees refused connections in both cases, and cannot tell a
service that starts from one that is dead. The doorman listens on the same socket beside the
server: neither turns a connection away that the other could take.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

from api.problems import DEFAULT_RETRY_AFTER_S, MEDIA_TYPE, not_serving, problem_document

# What one client may take (real seconds), and so what the doorman may take to leave.
PATIENCE_S: Final = 1.0
MOST_HEADER_BYTES: Final = 8 * 1024
# Whoever comes beyond these waits outside, in the system's queue.
MOST_AT_ONCE: Final = 64
# How often a door that cannot be opened, for want of file descriptors, is tried again.
_PAUSE_S: Final = 0.1


class Doorman:
    """Answers every request at ``listener`` for as long as the context lasts: it is alive, and not
    ready for the reason ``doing``: ``starting``, ``stopping``.

    ``/health/live`` and ``/health/ready`` look as the application's own, anything else is a problem
    that says when to come again. One request a connection, in bounded time and memory. ``listener``
    listens, and stays open.
    """

    def __init__(self, listener: socket.socket, doing: str, *, revision: str | None) -> None:
        self._listener = listener
        self._problem = not_serving(doing)
        self._revision = {} if revision is None else {"revision": revision}
        self._door: socket.socket | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # One of its own: an event loop watches each for one reader only. Where no descriptor is
        # left for it nobody answers, which is no reason to leave out what is done meanwhile.
        with suppress(OSError):
            self._door = self._listener.dup()
            self._door.settimeout(0)
            self._watch()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        door, self._door = self._door, None
        if door is not None:
            asyncio.get_running_loop().remove_reader(door)
            door.close()
        # Nobody is sent away who was let in; each has its patience.
        if self._answering:
            await asyncio.wait(self._answering)

    def _watch(self) -> None:
        if self._door is not None:
            asyncio.get_running_loop().add_reader(self._door, self._let_in)

    def _let_in(self) -> None:
        """Take one connection, and with it, in the same breath, the duty to answer it."""
        loop = asyncio.get_running_loop()
        if self._door is None:
            return
        try:
            connection, _ = self._door.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the server was faster, or the client has left
        except OSError:
            loop.remove_reader(self._door)
            loop.call_later(_PAUSE_S, self._watch)
            return
        task = loop.create_task(self._answer(connection), name="doorman")
        self._answering.add(task)
        task.add_done_callback(self._see_off)
        if len(self._answering) >= MOST_AT_ONCE:
            loop.remove_reader(self._door)

    def _see_off(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._watch()

    async def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        # Who is too slow, sends no request, or too long a one, gets no answer.
        with suppress(OSError, EOFError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection(
                    sock=connection, limit=MOST_HEADER_BYTES
                )
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head))
                    writer.write_eof()
                    # A connection that is closed with something unread takes the answer with it.
                    while await reader.read(MOST_HEADER_BYTES):
                        pass
                finally:
                    writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        media_type = "application/json"
        status = HTTPStatus.SERVICE_UNAVAILABLE
        document: dict[str, Any]
        if path == b"/health/live":
            status = HTTPStatus.OK
            document = {"status": "alive", **self._revision}
        elif path == b"/health/ready":
            document = {
                "status": "not_ready",
                "reasons": [self._problem.detail],
                "warnings": [],
                **self._revision,
            }
        else:
            document = problem_document(self._problem)
            media_type = MEDIA_TYPE
        body = json.dumps(document, separators=(",", ":")).encode()
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if status != HTTPStatus.OK:
            lines.append(f"Retry-After: {DEFAULT_RETRY_AFTER_S}")
        header = "\r\n".join([*lines, "", ""]).encode("ascii")
        return header if method == b"HEAD" else header + body
