"""A blob service in a dictionary, that fails and delays as it is told; no signature is checked."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Final
from xml.sax.saxutils import escape

from aiohttp import web

from tests.support.azurite import ACCOUNT, connection_string

PAGE: Final = 5000
START_TIMEOUT_S: Final = 30.0
_MODIFIED: Final = "Sun, 22 Nov 2026 12:00:00 GMT"
_HEADERS: Final = {"Last-Modified": _MODIFIED, "x-ms-request-id": "stub"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A failure to answer with: a status, with the service's name of the error and headers."""

    status: int
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reset:
    """Break the connection; ``after`` says that the request is carried out before."""

    after: bool = False


@dataclass(frozen=True, slots=True)
class Hang:
    """Never answer."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """Answer, and break the connection in the middle of the body, or before it where none is."""


Fault = Answer | Reset | Hang | Truncate


class BlobStub:
    """One container that always exists.

    ``blobs`` is what it holds, by name. ``faults`` come first, one a request, then ``always``
    where it is set. ``delay_s`` passes before each answer. ``requests`` lists what was asked:
    method, name (empty for the container) and query. ``most_at_once`` is how many requests it was
    ever asked at a time.
    """

    def __init__(self, blobs: Mapping[str, bytes] | None = None, *, delay_s: float = 0.0) -> None:
        self.blobs = dict(blobs or {})
        self.delay_s = delay_s
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.requests: list[tuple[str, str, Mapping[str, str]]] = []
        self.most_at_once = 0
        self.asked = asyncio.Event()
        self._at_once = 0
        self._versions: dict[str, int] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._names: list[str] = []
        self._port = 0
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """The address of its account."""
        return f"http://127.0.0.1:{self._port}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        """What ``AZURE_STORAGE_CONNECTION_STRING`` takes."""
        return connection_string(self.url)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[BlobStub]:
        """Serve on a free loopback port."""
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", "/{account}/{container}", self._handle)
        application.router.add_route("*", "/{account}/{container}/{name:.+}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            yield self
        finally:
            self._stopping.set()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "")
        self.requests.append((request.method, name, dict(request.query)))
        self.asked.set()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return await self._answer(request, name)
        finally:
            self._at_once -= 1

    async def _answer(self, request: web.Request, name: str) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else self.always
        match fault:
            case Answer(status, code, headers, body):
                given = {"x-ms-error-code": code} if code is not None else {}
                return web.Response(status=status, headers={**given, **headers}, body=body)
            case Hang():
                await self._stopping.wait()
                return web.Response(status=500)
            case Reset(after):
                if after:
                    await self._serve(request, name)
                return _broken(request)
            case Truncate():
                whole = await self._serve(request, name)
                if not isinstance(whole.body, bytes):
                    return _broken(request)
                return await _truncated(request, whole, whole.body)
            case None:
                return await self._serve(request, name)

    async def _serve(self, request: web.Request, name: str) -> web.Response:
        if not name:
            if request.method == "GET":
                return self._listing(request.query)
            return web.Response(status=201, headers=_HEADERS)
        if request.method == "PUT":
            return self._put(name, await request.read(), request.headers)
        return self._get(name, request.headers)

    def _get(self, name: str, asked: Mapping[str, str]) -> web.Response:
        content = self.blobs.get(name)
        if content is None:
            return web.Response(status=404, headers={"x-ms-error-code": "BlobNotFound"})
        headers = {**_HEADERS, "ETag": self._etag(name), "x-ms-blob-type": "BlockBlob"}
        headers |= self._metadata.get(name, {})
        if "x-ms-range" not in asked:
            return web.Response(body=content, headers=headers)
        if not content:
            return web.Response(status=416, headers={"x-ms-error-code": "InvalidRange"})
        headers["Content-Range"] = f"bytes 0-{len(content) - 1}/{len(content)}"
        return web.Response(status=206, body=content, headers=headers)

    def _put(self, name: str, content: bytes, headers: Mapping[str, str]) -> web.Response:
        if headers.get("If-None-Match") == "*" and name in self.blobs:
            return web.Response(status=409, headers={"x-ms-error-code": "BlobAlreadyExists"})
        wanted = headers.get("If-Match")
        if wanted is not None and (name not in self.blobs or wanted != self._etag(name)):
            return web.Response(status=412, headers={"x-ms-error-code": "ConditionNotMet"})
        self.blobs[name] = content
        self._versions[name] = self._versions.get(name, 0) + 1
        self._metadata[name] = {
            header: value for header, value in headers.items() if header.startswith("x-ms-meta-")
        }
        return web.Response(status=201, headers={**_HEADERS, "ETag": self._etag(name)})

    def _etag(self, name: str) -> str:
        return f'"0x{self._versions.get(name, 0):X}"'

    def _listing(self, query: Mapping[str, str]) -> web.Response:
        if len(self._names) != len(self.blobs):
            self._names = sorted(self.blobs)
        names, prefix, marker = self._names, query.get("prefix", ""), query.get("marker", "")
        delimiter = query.get("delimiter")
        most = int(query.get("maxresults", PAGE))
        position = bisect_left(names, max(prefix, marker))
        blobs: list[str] = []
        folders: list[str] = []
        while (
            position < len(names)
            and names[position].startswith(prefix)
            and len(blobs) + len(folders) < most
        ):
            name = names[position]
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            if end < 0:
                blobs.append(name)
                position += 1
            else:
                folders.append(name[: end + 1])
                # Behind everything in the folder.
                position = bisect_left(names, name[:end] + "0")
        more = position < len(names) and names[position].startswith(prefix)
        text = (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults '
            f'ServiceEndpoint="{self.url}" ContainerName="stub"><Prefix>{escape(prefix)}</Prefix>'
            f"<Marker>{escape(marker)}</Marker><MaxResults>{most}</MaxResults>"
            f"<Delimiter>{delimiter or ''}</Delimiter><Blobs>"
            + "".join(map(_blob_xml, blobs))
            + "".join(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in folders)
            + f"</Blobs><NextMarker>{escape(names[position]) if more else ''}</NextMarker>"
            "</EnumerationResults>"
        )
        return web.Response(body=text.encode(), headers={**_HEADERS, "Content-Type": "text/xml"})


def _blob_xml(name: str) -> str:
    return (
        f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{_MODIFIED}</Last-Modified>"
        "<Etag>0x0</Etag><Content-Length>1</Content-Length>"
        "<BlobType>BlockBlob</BlobType></Properties></Blob>"
    )


def _broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _truncated(request: web.Request, whole: web.Response, body: bytes) -> web.StreamResponse:
    answer = web.StreamResponse(status=whole.status, headers=whole.headers)
    answer.content_length = len(body)
    await answer.prepare(request)
    await answer.write(body[: len(body) // 2])
    assert request.transport is not None
    request.transport.abort()
    return answer


@contextmanager
def blob_stub_process(blobs: Mapping[str, bytes], *, delay_s: float) -> Iterator[str]:
    """The stub in a process of its own, for measuring; yields its connection string."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_process, args=(theirs, dict(blobs), delay_s))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError("the stub of the blob service did not start")
        yield ours.recv()
    finally:
        process.terminate()
        process.join(START_TIMEOUT_S)
        ours.close()
        process.close()


def _serve_process(pipe: Connection, blobs: Mapping[str, bytes], delay_s: float) -> None:
    asyncio.run(_serve_until_stopped(pipe.send, blobs, delay_s))


async def _serve_until_stopped(
    tell: Callable[[str], None], blobs: Mapping[str, bytes], delay_s: float
) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with BlobStub(blobs, delay_s=delay_s).running() as stub:
        tell(stub.connection_string)
        await stop.wait()
