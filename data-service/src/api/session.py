"""One WebSocket client, from the accepted handshake to the close.

Everything that a client asked for runs in one task group, which ends with the connection: nothing
outlives it. A failure of one request is told as an ``error`` message and ends that request alone.

What a slow client costs is bounded. Messages go out one at a time, each when the one before has
left for the network; meanwhile subscriptions wait in the bounded queues that their source keeps,
which merge what may be merged and end the subscription when the rest does not fit. A client that
takes nothing at all for ``send_timeout_s`` is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final, Protocol, assert_never

import orjson
import structlog
from pydantic import ValidationError
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from api.metrics import ApiMetrics
from api.middleware import is_loggable_id
from api.problems import (
    InvalidMessage,
    PayloadTooLarge,
    Problem,
    TooManyRequests,
    TooManySubscriptions,
    explain,
    problem_of,
    report,
    report_unexpected,
)
from api.services import Services
from api.wire import current_out, status_message
from auth.interfaces import READ_SCOPE, WRITE_SCOPE, Principal
from auth.module import demand_scope
from collection.interfaces import (
    Channel,
    SlowConsumer,
    StatusTold,
    StreamEvent,
    SubscriptionStarted,
)
from errors import CoinNotAvailable, DataServiceError, Forbidden, InvalidRequest
from models import (
    CLIENT_MESSAGES,
    MAX_REQUEST_ID,
    WRONG_VALUE,
    Cancel,
    ClientMessage,
    Ping,
    RequestCurrent,
    RequestHistorical,
    SubscribeRealtime,
    UnsubscribeRealtime,
    parse_client_message,
)
from observability.tracing import ISpan, span

CLOSE_ABNORMAL: Final = 1006
CLOSE_INTERNAL: Final = 1011
CLOSE_RESTART: Final = 1012
CLOSE_SLOW: Final = 1013
CLOSE_EXPIRED: Final = 4401

# A wait for the token's end at most, so that a suspended machine notices what it slept through.
_EXPIRY_CHECK_S: Final = 60.0
# Findings about a value that has the right shape.
_VALUE_ERRORS: Final = frozenset(
    {
        WRONG_VALUE,
        "greater_than_equal",
        "less_than_equal",
        "string_too_long",
        "string_too_short",
    }
)

log = structlog.get_logger(__name__)


class IWebSocket(Protocol):
    """What a session needs of an accepted WebSocket; raises ``WebSocketDisconnect`` when it is
    gone. ``send_text`` returns when the message has left for the network."""

    async def receive(self) -> Message: ...

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one connection may hold; times in real seconds."""

    message_bytes: int = 64 * 1024
    subscriptions: int = 256
    histories: int = 4
    currents: int = 8
    send_timeout_s: float = 20.0
    close_timeout_s: float = 5.0


class _SessionOver(Exception):  # an ending, not a failure
    """Ends the session from whichever of its tasks raises it; ``code`` None: the client left."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class _History:
    """A running ``request_historical``, and what of it has been sent."""

    task: asyncio.Task[None]
    sink: _HistorySink


class _HistorySink:
    """The WebSocket as the streaming of history sees it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.chunks = 0
        self.count = 0
        self.completed = False

    async def send_json(self, data: Any) -> None:
        await self._session.send(data)
        if data["type"] == "historical_data_chunk":
            self.chunks += 1
            self.count += len(data["rows"])
        else:
            self.completed = True


class Session:
    """Answers one client's messages until it leaves, its token expires, or it must go.

    Args:
        websocket: accepted; nobody else reads or writes it.
        principal: whom the connection's token speaks for.
    """

    def __init__(
        self,
        websocket: IWebSocket,
        principal: Principal,
        services: Services,
        metrics: ApiMetrics,
        *,
        limits: SessionLimits | None = None,
    ) -> None:
        self._websocket = websocket
        self._principal = principal
        self._collection = services.collection
        self._history = services.history
        self._clock = services.clock
        self._events = services.events
        self._metrics = metrics
        self._limits = limits or SessionLimits()
        self._tasks = asyncio.TaskGroup()
        self._sending = asyncio.Lock()
        self._gone = False
        self._currents = asyncio.Semaphore(self._limits.currents)
        self._subscription_numbers = count(1)
        # Every subscription that holds a place, its id to its task.
        self._subscriptions: dict[str, asyncio.Task[None]] = {}
        # Those of them that were told to the client and not taken back since.
        self._subscribed: set[str] = set()
        self._histories: dict[object, _History] = {}
        self._status: dict[tuple[str, str | None], tuple[str, int]] = {}

    async def run(self) -> None:
        """Serve the client. Returns when the connection is closed and every task has ended.

        Cancelling it closes the connection with 1012.
        """
        self._metrics.connections.inc()
        try:
            await self._close(await self._serve())
        except asyncio.CancelledError:
            await self._close(_SessionOver(CLOSE_RESTART, "the service restarts"))
            raise
        finally:
            self._metrics.connections.dec()

    async def _serve(self) -> _SessionOver:
        """Run every task until one of them ends the session; how it ended."""
        ending: _SessionOver | None = None
        try:
            async with self._tasks as tasks:
                tasks.create_task(self._listen(), name="listen")
                tasks.create_task(self._expire(), name="expire")
        except* WebSocketDisconnect:
            ending = _SessionOver(None)
        except* _SessionOver as over:
            # When the client left, there is nobody to be told why else it should go.
            ending = ending or min(_leaves(over), key=lambda item: item.code or 0)
        except* Exception as crash:  # noqa: BLE001  the outermost handler of a session
            report_unexpected(crash)
            ending = ending or _SessionOver(CLOSE_INTERNAL, "the service failed")
        return ending or _SessionOver(None)

    async def send(self, message: dict[str, Any]) -> None:
        """Send one message after those that wait already.

        Raises:
            WebSocketDisconnect: the client is gone.
        """
        await self._send_text(orjson.dumps(message).decode(), kind=message["type"])

    async def _send_text(self, text: str, *, kind: str) -> None:
        async with self._sending:
            if self._gone:
                raise WebSocketDisconnect(CLOSE_ABNORMAL)
            try:
                async with asyncio.timeout(self._limits.send_timeout_s):
                    await self._websocket.send_text(text)
            except TimeoutError:
                self._metrics.slow_consumers.inc()
                raise _SessionOver(CLOSE_SLOW, "nothing was read for too long") from None
            except WebSocketDisconnect:
                self._gone = True
                raise
        self._metrics.messages.labels(kind).inc()

    async def _close(self, ending: _SessionOver) -> None:
        if ending.code is None or self._gone:
            return
        self._gone = True
        log.info("session_closed", code=ending.code, reason=ending.reason)
        try:
            async with asyncio.timeout(self._limits.close_timeout_s):
                await self._websocket.close(ending.code, ending.reason)
        except (TimeoutError, WebSocketDisconnect):
            # A client that does not even take the close: the server drops the connection.
            log.info("session_close_not_taken")

    async def _expire(self) -> None:
        """End the session when its token ends, by real time."""
        while (left := self._principal.expires_at - self._clock.real_ms() / 1000) > 0:
            await self._clock.sleep_real(min(left, _EXPIRY_CHECK_S))
        raise _SessionOver(CLOSE_EXPIRED, "the token has expired")

    async def _listen(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise _SessionOver(None)
            await self._take(message.get("text"))

    async def _take(self, text: str | None) -> None:
        """Answer one message, or start what answers it later."""
        request_id: str | None = None
        try:
            document = self._decode(text)
            request_id = _request_id(document)
            # What is begun here keeps it; ``request_id`` is the connection's own.
            with structlog.contextvars.bound_contextvars(**_log_id(request_id)):
                await self._dispatch(_parsed(document))
        except DataServiceError as exc:
            await self._tell(report(exc), request_id)

    def _decode(self, text: str | None) -> dict[str, Any]:
        if text is None:
            raise InvalidMessage("this service takes JSON text messages, no binary ones")
        # A character takes at most four bytes; only in between does it pay to encode.
        limit = self._limits.message_bytes
        if len(text) > limit or (len(text) * 4 > limit and len(text.encode()) > limit):
            raise PayloadTooLarge(f"a message takes at most {limit} bytes")
        try:
            document = orjson.loads(text)
        except orjson.JSONDecodeError as exc:
            raise InvalidMessage(f"a message takes a JSON object; this is no JSON: {exc}") from exc
        if not isinstance(document, dict):
            raise InvalidMessage("a message takes a JSON object with a type")
        return document

    async def _dispatch(self, message: ClientMessage) -> None:
        match message:
            case Ping():
                await self.send({"type": "pong", **_answers(message.request_id)})
            case SubscribeRealtime():
                self._start_subscription(message)
            case UnsubscribeRealtime():
                self._start_unsubscribing(message)
            case RequestHistorical():
                self._start_history(message)
            case Cancel():
                self._start_cancelling(message)
            case RequestCurrent():
                demand_scope(self._principal, READ_SCOPE)
                # A client that asks for more than these waits, and with it its next messages.
                await self._currents.acquire()
                self._tasks.create_task(
                    self._answer(message.request_id, partial(self._current, message))
                )
            case _:
                assert_never(message)

    async def _answer(
        self,
        request_id: str | None,
        work: Callable[[], Awaitable[None]],
        *,
        subscription_id: str | None = None,
    ) -> None:
        """Do ``work``; tell the client when it fails. The outermost handler of a request."""
        try:
            await work()
        except SlowConsumer as exc:
            self._metrics.slow_consumers.inc()
            await self._tell(problem_of(exc), request_id, subscription_id)
            raise _SessionOver(CLOSE_SLOW, "the client reads too slowly") from exc
        except DataServiceError as exc:
            await self._tell(report(exc), request_id, subscription_id)
        except (_SessionOver, WebSocketDisconnect):
            raise
        except Exception as exc:  # noqa: BLE001  the outermost handler of a request
            await self._tell(report_unexpected(exc), request_id, subscription_id)

    async def _tell(
        self, problem: Problem, request_id: str | None, subscription_id: str | None = None
    ) -> None:
        message: dict[str, Any] = {
            "type": "error",
            "request_id": request_id,
            "code": problem.code,
            "message": problem.detail,
        }
        if subscription_id is not None:
            message["subscription_id"] = subscription_id
        await self.send(message)

    # --- subscriptions ---------------------------------------------------------------------------

    def _start_subscription(self, message: SubscribeRealtime) -> None:
        demand_scope(self._principal, READ_SCOPE)
        if message.channel not in list(Channel):
            raise InvalidRequest(
                f"channel takes one of {', '.join(Channel)}; got {message.channel!r}"
            )
        if len(self._subscriptions) >= self._limits.subscriptions:
            raise TooManySubscriptions(
                f"a connection takes at most {self._limits.subscriptions} subscriptions; "
                f"unsubscribe from some, or open another connection"
            )
        subscription_id = f"sub-{next(self._subscription_numbers)}"
        self._subscriptions[subscription_id] = self._tasks.create_task(
            self._hold_subscription(subscription_id, message), name=subscription_id
        )

    async def _hold_subscription(self, subscription_id: str, message: SubscribeRealtime) -> None:
        structlog.contextvars.bind_contextvars(subscription_id=subscription_id)
        try:
            await self._answer(
                message.request_id,
                partial(self._subscribe, subscription_id, message),
                subscription_id=subscription_id,
            )
        finally:
            self._subscribed.discard(subscription_id)
            del self._subscriptions[subscription_id]

    async def _subscribe(self, subscription_id: str, message: SubscribeRealtime) -> None:
        async with AsyncExitStack() as held:
            with _traced(message):
                started, stream = await self._begin_subscription(message, held)
            self._metrics.subscriptions.inc()
            try:
                await self._relay(subscription_id, message.request_id, started, stream)
            finally:
                self._metrics.subscriptions.dec()

    async def _begin_subscription(
        self, message: SubscribeRealtime, held: AsyncExitStack
    ) -> tuple[SubscriptionStarted, AsyncIterator[StreamEvent]]:
        """What it starts with, and the rest, which ``held`` closes."""
        coin, exchange = message.coin, message.exchange
        may_add = WRITE_SCOPE in self._principal.scopes
        if may_add:
            added = await self._collection.add_coin(
                coin,
                exchange=exchange,
                interval=message.interval,
                by=self._principal.subject,
            )
            coin, exchange = added.target.target.coin, added.target.target.exchange
        stream = self._collection.stream_realtime_data(
            coin,
            exchange=exchange,
            interval=message.interval,
            channel=Channel(message.channel),
            from_ms=message.from_,
        )
        await held.enter_async_context(aclosing(stream))
        try:
            started = await anext(stream)
        except CoinNotAvailable as exc:
            if may_add:
                raise
            raise Forbidden(
                f"{exc.message}; adding it needs a token with the scope {WRITE_SCOPE}"
            ) from exc
        if not isinstance(started, SubscriptionStarted):
            raise TypeError(f"a stream began with {type(started).__name__}")
        return started, stream

    async def _relay(
        self,
        subscription_id: str,
        request_id: str | None,
        started: SubscriptionStarted,
        stream: AsyncIterator[StreamEvent],
    ) -> None:
        """Send what the stream tells, numbered."""
        series = started.series
        await self.send(
            {
                "type": "subscribed",
                **_answers(request_id),
                "subscription_id": subscription_id,
                "exchange": series.exchange,
                "coin": series.coin,
                "market": started.market,
                "interval": series.interval.name,
                "channel": started.channel.value,
                "last_closed": started.last_closed,
            }
        )
        self._subscribed.add(subscription_id)
        sequence = 0
        async for event in stream:
            if isinstance(event, StatusTold):
                await self._relay_status(event)
                continue
            if isinstance(event, SubscriptionStarted):
                raise TypeError("a stream began a second time")
            sequence += 1
            kind, text = self._events.message(
                event, series, started.market, subscription_id=subscription_id, sequence=sequence
            )
            await self._send_text(text, kind=kind)

    async def _relay_status(self, event: StatusTold) -> None:
        """Tell a change once, however many subscriptions stand on what changed."""
        key, news = (event.component, event.exchange), (event.state, event.since)
        if self._status.get(key) != news:
            self._status[key] = news
            await self.send(status_message(event))

    def _start_unsubscribing(self, message: UnsubscribeRealtime) -> None:
        if message.subscription_id not in self._subscribed:
            raise InvalidRequest(f"there is no subscription {message.subscription_id!r} here")
        self._subscribed.discard(message.subscription_id)
        self._tasks.create_task(
            self._unsubscribe(message, self._subscriptions[message.subscription_id])
        )

    async def _unsubscribe(self, message: UnsubscribeRealtime, task: asyncio.Task[None]) -> None:
        await _end(task)
        await self.send(
            {
                "type": "unsubscribed",
                **_answers(message.request_id),
                "subscription_id": message.subscription_id,
            }
        )

    # --- histories and the newest candle ---------------------------------------------------------

    def _start_history(self, message: RequestHistorical) -> None:
        demand_scope(self._principal, READ_SCOPE)
        if len(self._histories) >= self._limits.histories:
            raise TooManyRequests(
                f"a connection takes at most {self._limits.histories} running histories; wait for "
                f"one to complete, or cancel it"
            )
        if message.request_id in self._histories:
            raise InvalidRequest(f"a history with the request_id {message.request_id!r} is running")
        # One without an id of the client's own cannot be cancelled by it, and still counts.
        key: object = object() if message.request_id is None else message.request_id
        sink = _HistorySink(self)
        task = self._tasks.create_task(self._hold_history(key, sink, message))
        self._histories[key] = _History(task, sink)

    async def _hold_history(
        self, key: object, sink: _HistorySink, message: RequestHistorical
    ) -> None:
        try:
            await self._answer(message.request_id, partial(self._stream_history, sink, message))
        finally:
            del self._histories[key]

    async def _stream_history(self, sink: _HistorySink, message: RequestHistorical) -> None:
        with _traced(message):
            await self._answer_history(sink, message)

    async def _answer_history(self, sink: _HistorySink, message: RequestHistorical) -> None:
        if WRITE_SCOPE in self._principal.scopes:
            try:
                await self._collection.add_coin(
                    message.coin,
                    exchange=message.exchange,
                    interval=message.interval,
                    by=self._principal.subject,
                )
            except DataServiceError as exc:
                # What was asked for is history, which may be had where collecting cannot begin:
                # of a delisted coin, of a resampled interval, or while an exchange is away.
                log.info("coin_not_added", coin=message.coin, code=problem_of(exc).code)
        await self._history.stream_historical_data(
            sink,
            message.coin,
            message.start,
            message.end,
            exchange=message.exchange,
            interval=message.interval,
            chunk_size=message.chunk_size,
            request_id=message.request_id,
        )

    def _start_cancelling(self, message: Cancel) -> None:
        running = self._histories.get(message.request_id)
        if running is None:
            raise InvalidRequest(
                f"no history with the request_id {message.request_id!r} is running"
            )
        self._tasks.create_task(self._cancel(message.request_id, running))

    async def _cancel(self, request_id: str, running: _History) -> None:
        await _end(running.task)
        # One that completed, or failed, meanwhile has had its last message.
        if not running.task.cancelled() or running.sink.completed:
            return
        running.sink.completed = True
        await self.send(
            {
                "type": "historical_data_complete",
                "request_id": request_id,
                "count": running.sink.count,
                "chunks": running.sink.chunks,
                # Nobody looked further than the last chunk.
                "gaps": None,
                "sources": None,
                "cancelled": True,
            }
        )

    async def _current(self, message: RequestCurrent) -> None:
        try:
            with _traced(message):
                current = await self._history.get_most_current_data(
                    message.coin, exchange=message.exchange, interval=message.interval
                )
                await self.send(
                    {
                        "type": "current_data_response",
                        **_answers(message.request_id),
                        **current_out(current),
                    }
                )
        finally:
            self._currents.release()


def _traced(message: SubscribeRealtime | RequestHistorical | RequestCurrent) -> ISpan:
    """The span of one request over the connection; of a subscription it is until it has begun."""
    return span(f"ws {message.type}", kind="server", coin=message.coin, interval=message.interval)


def _answers(request_id: str | None) -> dict[str, str]:
    return {} if request_id is None else {"request_id": request_id}


def _request_id(document: dict[str, Any]) -> str | None:
    """The id to answer with, also where the rest of the message makes no sense."""
    request_id = document.get("request_id")
    if isinstance(request_id, str) and len(request_id) <= MAX_REQUEST_ID:
        return request_id
    return None


def _log_id(request_id: str | None) -> dict[str, str]:
    if request_id is None or not is_loggable_id(request_id):
        return {}
    return {"message_request_id": request_id}


def _parsed(document: dict[str, Any]) -> ClientMessage:
    kind = document.get("type")
    model = CLIENT_MESSAGES.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise InvalidMessage(f"type takes one of {', '.join(CLIENT_MESSAGES)}")
    try:
        return parse_client_message(document)
    except ValidationError as exc:
        findings = exc.errors(include_url=False)
        takes = [field.alias or name for name, field in model.model_fields.items()]
        text = f"{kind}: {explain(findings, takes=takes)}"
        meant = all(
            finding["type"] in _VALUE_ERRORS and "request_id" not in finding["loc"]
            for finding in findings
        )
        raise (InvalidRequest if meant else InvalidMessage)(text) from exc


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel ``task`` and wait until it has ended; its failure is its own task group's."""
    task.cancel()
    await asyncio.wait([task])


def _leaves(group: BaseExceptionGroup[_SessionOver]) -> list[_SessionOver]:
    found: list[_SessionOver] = []
    for item in group.exceptions:
        found += _leaves(item) if isinstance(item, BaseExceptionGroup) else [item]
    return found
