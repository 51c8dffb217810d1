"""Requests to a socket that takes few of them a second: many subscriptions in one message.

What is asked for within a moment goes out together, what is of another kind stays behind, and what
is about the same names keeps its order. The answer is shared out again by the ids of those who
asked. A refusal of many does not say which of them it means: each of them is then
asked for alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any

Request = dict[str, Any]
"""A message that asks for several things by a list of their names, with an id or without."""


@dataclass(frozen=True, eq=False, slots=True)
class _Waiting:
    request: Request
    sent: asyncio.Future[None]
    alone: bool


class GatheredRequests:
    """The requests of one socket.

    Args:
        send: sends one message.
        names: which field of a request holds the names that it asks for.
        kind: what the requests must have in common that go out together; None for what is no such
            request and goes out at once.
        tasks: where the task that sends is kept for as long as it runs.
        pause_s: real seconds before each message, in which more may come.
        most: names in one message.
    """

    def __init__(
        self,
        send: Callable[[Any], Awaitable[None]],
        *,
        names: str,
        kind: Callable[[Any], Hashable | None],
        tasks: set[asyncio.Task[None]],
        pause_s: float,
        most: int,
    ) -> None:
        self._send = send
        self._names = names
        self._kind = kind
        self._tasks = tasks
        self._pause_s = pause_s
        self._most = most
        self._waiting: deque[_Waiting] = deque()
        self._under_way: dict[str, list[Request]] = {}
        self._task: asyncio.Task[None] | None = None

    async def send(self, message: Any) -> None:
        """Send a message, alone or with others; returns when it was, or raises why it was not."""
        if self._kind(message) is None:
            await self._send(message)
        else:
            await self._queue(message, alone=False)

    def answered(self, message_id: Any) -> list[Any]:
        """The ids of all whose request an answer with this id is for."""
        requests = self._under_way.pop(str(message_id), None)
        return [message_id] if requests is None else [request["id"] for request in requests]

    def refused(self, message_id: Any) -> bool:
        """Whether a refusal with this id was of several requests, which are now made one by one."""
        requests = self._under_way.pop(str(message_id), [])
        if len(requests) < 2:
            return False
        for request in requests:
            # If it cannot be sent the socket is broken, and everybody hears of that elsewhere.
            self._queue(request, alone=True).add_done_callback(_look_at)
        return True

    def _queue(self, request: Request, *, alone: bool) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        sent: asyncio.Future[None] = loop.create_future()
        self._waiting.append(_Waiting(request, sent, alone))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._send_waiting())
            self._tasks.add(self._task)
            self._task.add_done_callback(self._tasks.discard)
        return sent

    async def _send_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._pause_s)
            group = self._next_group()
            requests = [waiting.request for waiting in group]
            asked = [name for request in requests for name in request[self._names]]
            merged = {**requests[0], self._names: asked}
            if "id" in merged:
                self._under_way[str(merged["id"])] = requests
            try:
                await self._send(merged)
            except Exception as exc:  # noqa: BLE001  whoever asked raises it
                failed: Exception | None = exc
            else:
                failed = None
            for waiting in group:
                if waiting.sent.done():
                    continue
                if failed is None:
                    waiting.sent.set_result(None)
                else:
                    waiting.sent.set_exception(failed)

    def _next_group(self) -> list[_Waiting]:
        """The first that waits, and of what follows all that may go out with it."""
        first = self._waiting.popleft()
        if first.alone:
            return [first]
        group, size = [first], len(first.request[self._names])
        passed: deque[_Waiting] = deque()
        names_passed: set[Any] = set()
        for following in self._waiting:
            names = following.request[self._names]
            if (
                following.alone
                or self._kind(following.request) != self._kind(first.request)
                or size + len(names) > self._most
                or not names_passed.isdisjoint(names)
            ):
                passed.append(following)
                names_passed.update(names)
            else:
                group.append(following)
                size += len(names)
        self._waiting = passed
        return group


def _look_at(sent: asyncio.Future[None]) -> None:
    if not sent.cancelled():
        sent.exception()
