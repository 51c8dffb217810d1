"""Many requests in few messages: what goes out, in which order, and who hears of what became of
it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest

from exchange_source.plugins.ws_requests import GatheredRequests
from tests.support.clock import settle_loop

Message = dict[str, Any]


def kind_of(message: Any) -> str | None:
    """What a message does, if it is about names at all."""
    return message["method"] if "names" in message else None


class Socket:
    """A socket that keeps what it is to send, or fails with ``error``; it sends nothing while
    ``gate`` is cleared."""

    def __init__(self, most: int = 100) -> None:
        self.sent: list[Any] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.requests = GatheredRequests(
            self._send,
            names="names",
            kind=kind_of,
            tasks=self.tasks,
            pause_s=0,
            most=most,
        )

    async def _send(self, message: Any) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.sent.append(message)

    async def ask(self, *messages: Message) -> None:
        """Ask for all of them at once, in this order, and wait until they were sent."""
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            for message in messages:
                group.create_task(self.requests.send(message))

    async def until_idle(self) -> None:
        """Wait until nothing waits to be sent any more."""
        async with asyncio.timeout(5):
            while self.tasks:
                await asyncio.wait(self.tasks)

    def names_sent(self) -> list[list[str]]:
        return [message["names"] for message in self.sent]


def subscribe(number: int, *names: str) -> Message:
    return {"method": "SUBSCRIBE", "names": list(names), "id": number}


def unsubscribe(number: int, *names: str) -> Message:
    return {"method": "UNSUBSCRIBE", "names": list(names), "id": number}


async def test_what_is_asked_for_at_once_goes_out_in_one_message() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), subscribe(2, "b", "c"), subscribe(3, "d"))
    assert socket.sent == [subscribe(1, "a", "b", "c", "d")]


async def test_requests_are_not_changed_by_what_they_went_out_with() -> None:
    socket, first, second = Socket(), subscribe(1, "a"), subscribe(2, "b")
    await socket.ask(first, second)
    assert (first, second) == (subscribe(1, "a"), subscribe(2, "b"))


async def test_nobody_is_told_of_having_asked_before_it_was_sent() -> None:
    socket = Socket()
    socket.gate.clear()
    asking = asyncio.create_task(socket.requests.send(subscribe(1, "a")))
    await settle_loop()
    assert not asking.done()
    socket.gate.set()
    async with asyncio.timeout(5):
        await asking
    assert socket.sent == [subscribe(1, "a")]


async def test_what_is_asked_for_while_a_message_is_under_way_goes_out_with_the_next() -> None:
    socket = Socket()
    socket.gate.clear()
    first = asyncio.create_task(socket.requests.send(subscribe(1, "a")))
    await settle_loop()
    later = asyncio.create_task(socket.ask(subscribe(2, "b"), subscribe(3, "c")))
    await settle_loop()
    socket.gate.set()
    async with asyncio.timeout(5):
        await asyncio.gather(first, later)
    assert socket.sent == [subscribe(1, "a"), subscribe(2, "b", "c")]


async def test_what_differs_in_kind_goes_out_apart_however_it_is_mixed() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), unsubscribe(2, "b"), subscribe(3, "c"), unsubscribe(4, "d"))
    assert socket.sent == [subscribe(1, "a", "c"), unsubscribe(2, "b", "d")]


async def test_what_differs_in_kind_keeps_its_order_where_it_is_about_the_same() -> None:
    socket = Socket()
    await socket.ask(
        subscribe(1, "a"),
        subscribe(2, "b"),
        unsubscribe(3, "a", "x"),
        subscribe(4, "a", "y"),
        subscribe(5, "c"),
        subscribe(6, "y"),
    )
    assert socket.sent == [
        subscribe(1, "a", "b", "c"),
        unsubscribe(3, "a", "x"),
        subscribe(4, "a", "y", "y"),
    ]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (["a", "b", "c", "d"], ["abc", "d"]),
        (["ab", "cd", "e"], ["abe", "cd"]),
        (["abcde"], ["abcde"]),
        (["a", "bcde", "f"], ["af", "bcde"]),
    ],
    ids=["full", "does not fit", "one that is too long", "too long amid others"],
)
async def test_a_message_holds_no_more_names_than_it_may_unless_one_request_has_more(
    asked: Sequence[str], wanted: Sequence[str]
) -> None:
    socket = Socket(most=3)
    await socket.ask(*(subscribe(number, *names) for number, names in enumerate(asked)))
    assert ["".join(names) for names in socket.names_sent()] == wanted


async def test_an_answer_is_shared_out_to_all_that_it_is_for_and_only_once() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), unsubscribe(3, "c"), subscribe(2, "b"))
    assert socket.requests.answered(1) == [1, 2]
    assert socket.requests.answered("3") == [3]
    assert socket.requests.answered(1) == [1]


async def test_an_answer_to_what_was_never_gathered_is_for_itself_alone() -> None:
    assert Socket().requests.answered(7) == [7]


async def test_requests_without_an_id_have_no_answers_to_share_out() -> None:
    socket = Socket()
    without = [{"method": "SUBSCRIBE", "names": [name]} for name in "ab"]
    await socket.ask(*without)
    assert socket.sent == [{"method": "SUBSCRIBE", "names": ["a", "b"]}]
    assert socket.requests.answered(None) == [None]


async def test_of_a_refusal_of_many_each_is_asked_for_alone() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), subscribe(2, "bad", "b"), subscribe(3, "c"))
    assert socket.requests.refused(1)
    assert not socket.requests.refused(1)
    await socket.until_idle()
    assert socket.sent[1:] == [subscribe(1, "a"), subscribe(2, "bad", "b"), subscribe(3, "c")]
    assert socket.requests.answered(1) == [1]
    assert not socket.requests.refused(2)
    assert socket.requests.answered(3) == [3]


async def test_what_is_asked_for_again_alone_takes_nobody_along() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), subscribe(2, "b"))
    assert socket.requests.refused(1)
    await socket.ask(subscribe(4, "d"), subscribe(5, "e"))
    assert socket.names_sent() == [["a", "b"], ["a"], ["b"], ["d", "e"]]


async def test_what_waits_already_does_not_take_along_what_is_asked_for_again_alone() -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "a"), subscribe(2, "b"))
    waiting = asyncio.create_task(socket.requests.send(subscribe(3, "c")))
    await asyncio.sleep(0)
    assert socket.requests.refused(1)
    await waiting
    await socket.until_idle()
    assert socket.names_sent() == [["a", "b"], ["c"], ["a"], ["b"]]


@pytest.mark.parametrize("number", [1, 9])
async def test_a_refusal_of_one_is_final(number: int) -> None:
    socket = Socket()
    await socket.ask(subscribe(1, "bad"))
    assert not socket.requests.refused(number)
    await socket.until_idle()
    assert socket.sent == [subscribe(1, "bad")]


async def test_a_message_that_cannot_be_sent_fails_all_that_went_into_it() -> None:
    socket = Socket()
    socket.error = ConnectionResetError("gone")
    async with asyncio.timeout(5):
        failed = await asyncio.gather(
            *(socket.requests.send(subscribe(number, "a")) for number in range(3)),
            return_exceptions=True,
        )
    assert failed == [socket.error] * 3


async def test_what_follows_a_message_that_could_not_be_sent_is_sent() -> None:
    socket = Socket()
    socket.error = ConnectionResetError("gone")
    with pytest.raises(ConnectionResetError):
        await socket.requests.send(subscribe(1, "a"))
    socket.error = None
    await socket.ask(subscribe(2, "b"))
    assert socket.sent == [subscribe(2, "b")]


async def test_what_is_asked_for_alone_on_a_socket_that_broke_troubles_nobody() -> None:
    socket = Socket()
    troubles: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
    await socket.ask(subscribe(1, "a"), subscribe(2, "b"))
    socket.error = ConnectionResetError("gone")
    assert socket.requests.refused(1)
    await socket.until_idle()
    assert socket.names_sent() == [["a", "b"]]
    gc.collect()  # an error that nobody looked at is told of when it is thrown away
    assert not troubles


async def test_who_gives_up_waiting_does_not_keep_the_others_from_being_sent() -> None:
    socket = Socket()
    socket.gate.clear()
    asking = [
        asyncio.create_task(socket.requests.send(subscribe(number, name)))
        for number, name in enumerate("abc")
    ]
    await settle_loop()
    asking[0].cancel()
    await settle_loop()
    socket.gate.set()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [None, None]
    assert socket.sent == [subscribe(0, "a", "b", "c")]


@pytest.mark.parametrize("message", [{"method": "PING"}, {"method": "LIST", "id": 4}])
async def test_what_is_about_no_names_goes_out_at_once(message: Message) -> None:
    socket = Socket()
    waiting = asyncio.create_task(socket.ask(subscribe(1, "a")))
    await socket.requests.send(message)
    assert socket.sent == [message]
    await waiting
    assert socket.sent == [message, subscribe(1, "a")]


async def test_the_task_that_sends_is_kept_while_it_runs_and_no_longer() -> None:
    socket = Socket()
    socket.gate.clear()
    asking = asyncio.create_task(socket.requests.send(subscribe(1, "a")))
    await settle_loop()
    assert len(socket.tasks) == 1
    socket.gate.set()
    async with asyncio.timeout(5):
        await asking
    await socket.until_idle()
    assert not socket.tasks
