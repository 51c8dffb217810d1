"""How Azure is asked: every request is bounded and repeated here, and every error translated."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final, TypeVar

import aiohttp
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.core.pipeline.transport import AioHttpTransport

from storage.interfaces import StorageDenied, StorageError, StorageThrottled, StorageUnavailable

_T = TypeVar("_T")
_Item = TypeVar("_Item")

_DENIED: Final = (401, 403)
_THROTTLED: Final = (429, 503)
_PASSING: Final = (408, *_THROTTLED, 500, 502, 504)

# What the service puts into every answer.
_REQUEST_ID: Final = "x-ms-request-id"
_BLOB_NOT_FOUND: Final = "BlobNotFound"
# What the service answers where a condition of a write does not hold.
_CONDITION_CODES: Final = ("BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet")
_HELD_CODES: Final = ("LeaseAlreadyPresent", "LeaseIsBreakingAndCannotBeAcquired")


class NotAzureError(AzureError):
    """What answers is not Azure Blob Storage."""


class WholeBodyTransport(AioHttpTransport):  # type: ignore[misc]  # exported without a type
    """Reads the body of every answer at once, and believes only answers of the service.

    Otherwise a proxy's page could pass for an empty listing, and the SDK reads the body of a blob
    when the request is over for its own machinery, and on an incomplete one asks again by itself,
    seconds apart, whatever its retries are set to.
    """

    async def send(self, request: Any, **options: Any) -> Any:
        try:
            response = await super().send(request, **options)
            if not response.is_stream_consumed:
                await response.read()
        except IncompleteReadError as exc:
            # Of a kind that the SDK lets through.
            raise ServiceResponseError(exc, error=exc) from exc
        if response.status_code < 400 and _REQUEST_ID not in response.headers:
            raise NotAzureError(f"answered {response.status_code} without {_REQUEST_ID}")
        return response


class AzureCalls:
    """Sends requests, so many reads and so many writes at once.

    A request that fails in a way that passes is sent again after each of ``pauses_s``, or after
    what the service asks for where that is longer. Waiting for its turn, every try and every pause
    together take ``request_timeout_s`` at most, one try ``attempt_timeout_s``.

    ``address`` stands at the front of every message.
    """

    def __init__(
        self,
        address: str,
        *,
        request_timeout_s: float,
        attempt_timeout_s: float,
        pauses_s: tuple[float, ...],
        reads_at_once: int,
        writes_at_once: int,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._address = address
        self._request_timeout_s = request_timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._pauses_s = pauses_s
        self._reading = asyncio.Semaphore(reads_at_once)
        self._writing = asyncio.Semaphore(writes_at_once)
        self._sleep = sleep

    async def read(self, path: str, send: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to a request that reads; ``path`` is what a message names.

        Raises:
            StorageError: it failed, of the kind that fits.
        """
        return await self._bounded(path, send, self._reading)

    async def write(self, path: str, send: Callable[[], Awaitable[_T]]) -> _T:
        """The same for a request that writes."""
        return await self._bounded(path, send, self._writing)

    async def at_once(self, path: str, send: Callable[[], Awaitable[_T]]) -> _T:
        """The same for a request that waits for no turn."""
        return await self._bounded(path, send, nullcontext())

    async def _bounded(
        self,
        path: str,
        send: Callable[[], Awaitable[_T]],
        turn: AbstractAsyncContextManager[None],
    ) -> _T:
        where = f"{self._address}: {path}" if path else self._address
        try:
            async with asyncio.timeout(self._request_timeout_s) as bound, turn:
                return await self._repeated(send, bound)
        except TimeoutError as exc:
            raise StorageUnavailable(
                f"{where}: Azure has not answered in time; check the network"
            ) from exc
        except (AzureError, ValueError) as exc:
            # The SDK has plain errors for headers that make no sense.
            raise _translated(where, exc) from exc

    async def _repeated(self, send: Callable[[], Awaitable[_T]], bound: asyncio.Timeout) -> _T:
        for pause_s in self._pauses_s:
            try:
                async with asyncio.timeout(self._attempt_timeout_s):
                    return await send()
            except TimeoutError:
                wait_s = pause_s
            except AzureError as exc:
                wait_s = max(pause_s, _retry_after(exc) or 0)
                end = bound.when()
                left_s = 0 if end is None else end - asyncio.get_running_loop().time()
                if not _passes(exc) or wait_s >= left_s:
                    raise
            await self._sleep(wait_s)
        async with asyncio.timeout(self._attempt_timeout_s):
            return await send()


def is_missing(exc: HttpResponseError) -> bool:
    """Whether the service says that there is no such blob; a 404 of anybody else is no word."""
    return exc.status_code == 404 and error_code(exc) == _BLOB_NOT_FOUND


def is_unmet(exc: HttpResponseError) -> bool:
    """Whether the condition of a write does not hold."""
    return error_code(exc) in _CONDITION_CODES or is_missing(exc)


def is_leased(exc: HttpResponseError) -> bool:
    """Whether somebody else holds the lease."""
    return error_code(exc) in _HELD_CODES


def error_code(exc: HttpResponseError) -> str | None:
    """The service's own name of an error."""
    return _headers(exc).get("x-ms-error-code")


async def in_parallel(
    work: Callable[[_Item], Awaitable[_T]], items: Iterable[_Item], at_once: int
) -> list[_T]:
    """The results of ``work`` for each item, in their order; so many run at once.

    The first failure is raised; whatever runs is cancelled and has ended then.
    """
    waiting = list(enumerate(items))
    results: dict[int, _T] = {}
    queue = iter(waiting)

    async def worker() -> None:
        for index, item in queue:
            results[index] = await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(min(at_once, len(waiting)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [results[index] for index, _ in waiting]


def _passes(exc: AzureError) -> bool:
    if isinstance(exc, HttpResponseError) and exc.status_code is not None:
        return exc.status_code in _PASSING
    return isinstance(exc, ServiceRequestError | ServiceResponseError)


def _retry_after(exc: AzureError) -> float | None:
    said = _headers(exc).get("Retry-After", "") if isinstance(exc, HttpResponseError) else ""
    return float(said) if said.isascii() and said.isdigit() else None


def _headers(exc: HttpResponseError) -> Mapping[str, str]:
    # Its type promises less than each of its kinds has.
    response: Any = exc.response
    return {} if response is None else response.headers


def _translated(where: str, exc: Exception) -> StorageError:
    if isinstance(exc, HttpResponseError) and exc.status_code is not None:
        return _of_status(where, exc, exc.status_code)
    if isinstance(exc, ClientAuthenticationError):
        return StorageDenied(
            f"{where}: there is nothing to sign in with; check AZURE_STORAGE_CONNECTION_STRING, or "
            f"the identity of this machine for AZURE_STORAGE_ACCOUNT_URL"
        )
    if isinstance(exc, ServiceRequestError | ServiceResponseError):
        if isinstance(exc.inner_exception, aiohttp.ClientConnectorDNSError):
            return StorageUnavailable(
                f"{where}: there is no such account, or its name cannot be looked up; check the "
                f"name of the account and the network"
            )
        return StorageUnavailable(
            f"{where}: no connection to Azure, or it broke; check the network and its firewall"
        )
    return _not_azure(where, type(exc).__name__)


def _of_status(where: str, exc: HttpResponseError, status: int) -> StorageError:
    code = error_code(exc)
    said = f"{status} {code or exc.reason or ''}".strip()
    if status in _DENIED:
        return StorageDenied(
            f"{where}: Azure denies access ({said}); check the account's key or signature and this "
            f"machine's clock, the role (Storage Blob Data Contributor), and the firewall of the "
            f"account"
        )
    if status in _THROTTLED:
        return StorageThrottled(
            f"{where}: Azure is asked too much ({said})", retry_after=_retry_after(exc)
        )
    if code in ("ContainerNotFound", "ContainerBeingDeleted"):
        return StorageUnavailable(
            f"{where}: the container is not there ({said}); create it, or restart the service, "
            f"which creates it where it may"
        )
    if status in _PASSING:
        return StorageUnavailable(f"{where}: Azure fails for now ({said})")
    if code is None:
        return _not_azure(where, said)
    return StorageError(f"{where}: Azure refuses ({said}); check what lies there")


def _not_azure(where: str, said: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{where}: what answers is not Azure Blob Storage ({said}); check the address of the "
        f"account, and proxies on the way"
    )
