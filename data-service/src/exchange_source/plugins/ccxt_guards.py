"""What stands between ccxt and an exchange: checks that ccxt itself does not make.

* Every REST request is sent once; of its answer status and body are checked in one place, and its
  headers are kept for the call that asked, because calls run side by side on one instance.
* Every socket: a frame that cannot be read, or a handler that fails, would end ccxt's receive loop
  silently and leave every watcher waiting. Here it fails the watchers of the topic that the frame
  belongs to; where that cannot be told it fails all of them at once, and the socket is closed and
  forgotten, so that the next watch opens a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from ccxt.base.errors import BaseError

from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRefused,
    ExchangeUnavailable,
)
from exchange_source.plugins.ccxt_errors import (
    TRANSLATED,
    Headers,
    parse_retry_after,
    status_error,
    translate,
)

# ccxt ships no types: the base of what is mixed into its classes, and everything that comes
# through it.
_Vendor: Any = object

# Real seconds that a peer gets to answer a closing handshake; a mute one never does.
_CLOSE_TIMEOUT_S: Final = 1.0
# Real seconds that ccxt may put off dialling after failures; who starts a stream paces itself too.
_LONGEST_DIAL_DELAY_S: Final = 5.0
# Entries of ``exchange.urls`` that are for readers, not for requests.
_URLS_FOR_READERS: Final = frozenset({"logo", "www", "doc", "fees", "referral"})


@dataclass(slots=True)
class Answer:
    """What came with one REST answer beside its body, and how it was asked for."""

    headers: Headers = field(default_factory=dict)
    method: str = ""
    status: int = 0


@dataclass(slots=True)
class Subscriber:
    """Which socket a watch went through, and what is noted there as subscribed because of it."""

    socket: Any = None
    hashes: set[str] = field(default_factory=set)


ANSWER: ContextVar[Answer | None] = ContextVar("answer", default=None)
SUBSCRIBER: ContextVar[Subscriber | None] = ContextVar("subscriber", default=None)


class VendorGuards(_Vendor):  # type: ignore[misc]  # mixed into a class of an untyped library
    """The checks, mixed in front of a ccxt.pro class. Everything else is that class's."""

    public_name: str
    closing: set[asyncio.Task[None]]
    ask_for_book: Callable[[str, int | None], Awaitable[Any]]

    def document_problem(self, response: Any) -> str | None:  # noqa: ARG002  a hook
        """What a decoded document lacks to be one of this exchange's at all, or None."""
        return None

    def answer_problem(self, url: str, response: Any) -> str | None:  # noqa: ARG002  a hook
        """What a decoded answer of ``url`` that reports no error lacks to be believed, or None."""
        return None

    def refused_watches(self, message: Any) -> tuple[list[str], ExchangeError] | None:  # noqa: ARG002
        """The message hashes of watches that ``message`` refuses, and why; None otherwise.

        No hash means that it cannot be told which: then all of the socket's fail.
        """
        return None

    def topics_of(self, message: Any) -> list[str]:  # noqa: ARG002  a hook
        """The message hashes of the watches that ``message`` has news for; none if unknown."""
        return []

    def socket_address(self, url: str) -> str:
        """Where the socket is that a watch at ``url`` goes through."""
        return url

    def take(self, client: Any, message: Any) -> None:
        """Let ccxt take in a message; a subclass does in its place what ccxt leaves out of the
        protocol, or takes too long for."""
        super().handle_message(client, message)

    def handle_errors(
        self,
        code: int,
        reason: str,
        url: str,
        method: str,
        headers: dict[str, str],
        body: str,
        response: Any,
        request_headers: Any,
        request_body: Any,
    ) -> Any:
        received = {name.lower(): value for name, value in headers.items()}
        answer = ANSWER.get()
        if answer is not None:
            answer.headers = received
            answer.method, answer.status = method, code
        name = self.public_name
        now = self.milliseconds()
        if failed := status_error(name, code, reason, body, received, real_ms=now):
            raise failed
        if not isinstance(response, dict | list):
            what = f"no JSON document: {body[:200]!r}" if body else "an empty body"
            raise BadExchangeAnswer(f"{name}: HTTP {code} with {what}")
        if problem := self.document_problem(response):
            raise BadExchangeAnswer(f"{name}: HTTP {code} {problem}: {body[:200]}")
        try:
            result = super().handle_errors(
                code, reason, url, method, headers, body, response, request_headers, request_body
            )
        except BaseError as exc:
            delay = parse_retry_after(received, real_ms=now)
            error = translate(exc, name, retry_after=delay)
            if code == 404 and type(error) is ExchangeUnavailable:
                # What is asked for does not exist, where ccxt knows the words of it or not.
                error = ExchangeRefused(error.message)
            raise error from exc
        if code < 400 and (problem := self.answer_problem(url, response)):
            raise BadExchangeAnswer(f"{name}: answer {problem}: {body[:200]}")
        return result

    async def fetch_rest_order_book_safe(
        self,
        symbol: str,
        limit: int | None = None,
        params: Any = None,  # noqa: ARG002  ccxt passes what its caller gave it, and ours give none
    ) -> Any:
        # What a live book begins with is a request like any other: once, and within the limits.
        return await self.ask_for_book(symbol, limit)

    def safe_trade(self, trade: Any, market: Any = None) -> Any:  # noqa: ARG002  ccxt's signature
        # As it was parsed: what ccxt would add, cost and fees, is a third of what a trade takes.
        return trade

    def safe_ticker(self, ticker: Any, market: Any = None) -> Any:
        parsed = super().safe_ticker(ticker, market)
        if parsed["percentage"] is None:
            # ccxt takes a change of nothing for a change that was not told.
            parsed["percentage"] = self.safe_number(ticker, "percentage")
        return parsed

    def open(self, *args: Any, **kwargs: Any) -> None:
        super().open(*args, **kwargs)
        if self.session is not None:
            # aiohttp repeats a GET whose connection is cut, behind the back of the limiter: twice
            # what the exchange allows, just when it is in trouble. There is no public switch.
            self.session._retry_connection = False  # noqa: SLF001

    def client(self, url: str) -> Any:
        socket = super().client(url)
        if not hasattr(socket, "dialling"):
            socket.dialling = None
            socket.frames = 0
            self._guard(socket)
        return socket

    def watch(
        self,
        url: str,
        message_hash: str,
        message: Any = None,
        subscribe_hash: str | None = None,
        subscription: Any = None,
    ) -> Any:
        url = self.socket_address(url)
        self._forget_rejections(url, [message_hash])
        future = super().watch(url, message_hash, message, subscribe_hash, subscription)
        self._note(url, [subscribe_hash] if subscribe_hash else [])
        return future

    def watch_multiple(
        self,
        url: str,
        message_hashes: list[str],
        message: Any = None,
        subscribe_hashes: list[str] | None = None,
        subscription: Any = None,
    ) -> Any:
        url = self.socket_address(url)
        self._forget_rejections(url, message_hashes)
        future = super().watch_multiple(
            url, message_hashes, message, subscribe_hashes, subscription
        )
        self._note(url, subscribe_hashes or [])
        return future

    def ws_dial_delay(self, url: str) -> float:
        return min(float(super().ws_dial_delay(url)), _LONGEST_DIAL_DELAY_S)

    def handle_message(self, client: Any, message: Any) -> None:
        if not isinstance(message, dict | list):
            raise BadExchangeAnswer(f"{self.public_name}: frame is no JSON: {message!r:.200}")
        refused = self.refused_watches(message)
        if refused is None:
            try:
                self.take(client, message)
            except TRANSLATED as exc:
                # What one market sends must not cost the others their connection.
                hashes = self.topics_of(message)
                if not hashes:
                    raise
                error: ExchangeError = BadExchangeAnswer(
                    f"{self.public_name}: broken frame of {', '.join(hashes)}: {exc!r:.200}"
                )
                error.__cause__ = exc
            else:
                return
        else:
            hashes, error = refused
        if not hashes:
            self.fail_socket(client, error)
        for message_hash in hashes:
            client.subscriptions.pop(message_hash, None)
            client.reject(error, message_hash)

    def fail_socket(self, socket: Any, error: ExchangeError) -> None:
        """Fail every watcher of ``socket`` with ``error`` now, forget it, close it behind."""
        if self.clients.get(socket.url) is socket:
            del self.clients[socket.url]
        if socket.error is not None:
            return
        socket.error = error
        socket.reject(error)
        task = asyncio.get_running_loop().create_task(_close(socket))
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    def _forget_rejections(self, url: str, message_hashes: list[str]) -> None:
        """What failed while nobody watched is nothing to who begins to watch now."""
        subscriber, socket = SUBSCRIBER.get(), self.clients.get(url)
        if subscriber is not None and subscriber.socket is None and socket is not None:
            for message_hash in message_hashes:
                socket.rejections.pop(message_hash, None)

    def _note(self, url: str, subscribe_hashes: list[str]) -> None:
        subscriber = SUBSCRIBER.get()
        if subscriber is not None:
            subscriber.socket = self.clients.get(url)
            subscriber.hashes.update(subscribe_hashes)

    def _guard(self, socket: Any) -> None:
        receive, dial = socket.handle_message, socket.open

        def handle_message(frame: Any) -> None:
            if socket.error is not None:
                return
            socket.frames += 1
            try:
                receive(frame)
            except Exception as exc:  # noqa: BLE001  outermost: what passes here ends the receiving
                error = BadExchangeAnswer(f"{self.public_name}: broken frame: {exc!s:.200}")
                error.__cause__ = exc
                self.fail_socket(socket, error)

        async def open_(session: Any, backoff_delay: float = 0) -> None:
            if socket.error is not None:
                return
            socket.dialling = asyncio.current_task()
            try:
                await dial(session, backoff_delay)
            finally:
                socket.dialling = None

        socket.handle_message = handle_message
        socket.open = open_


async def _close(socket: Any) -> None:
    if socket.dialling is not None:
        socket.dialling.cancel()
        await asyncio.gather(socket.dialling, return_exceptions=True)
    with contextlib.suppress(TimeoutError, OSError, aiohttp.ClientError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await socket.aiohttp_close()


def guarded(vendor: Any, guards: type[VendorGuards]) -> Any:
    """The ccxt.pro class ``vendor`` with ``guards`` before it."""
    return type(f"Guarded{vendor.__name__}", (guards, vendor), {})


def redirect_urls(urls: Any, endpoint: str) -> Any:
    """``exchange.urls`` with scheme and host of every API URL replaced by those of ``endpoint``.

    Paths stay; sockets get ``ws`` for ``http`` and ``wss`` for ``https``; what is for readers
    (logo, www, doc, fees) stays as it is.
    """
    target = urlsplit(endpoint)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, str) or "://" not in value:
            return value
        scheme = target.scheme
        if value.startswith("ws"):
            scheme = "wss" if scheme == "https" else "ws"
        # The host part may hold placeholders such as {hostname}.
        return re.sub(r"^\w+://[^/]*", lambda _: f"{scheme}://{target.netloc}", value)

    return {key: value if key in _URLS_FOR_READERS else moved(value) for key, value in urls.items()}
