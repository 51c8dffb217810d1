"""Every fault does what it says, to what it was asked for, and counts it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest

from domain.interval import Interval
from domain.time_range import TimeRange
from sandbox.app import RunningSandbox, SandboxConfig, running_sandbox
from tests.unit.sandbox.helpers import (
    MINUTE,
    NOON_MS,
    Http,
    clock_at,
    connected,
    eventually,
    http_to,
    listening,
    row_values,
    values_of,
)

CANDLES = "/exchange/v1/public/get-candlestick"
BOOK = "/exchange/v1/public/get-book"
M1, M5 = Interval.parse("1m"), Interval.parse("5m")


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """A market half a minute past noon, at its real speed."""
    async with running_sandbox(
        SandboxConfig(market_clock=clock_at(NOON_MS + 30_000), heartbeat_s=0.05)
    ) as running:
        yield running


@pytest.fixture
async def http(sandbox: RunningSandbox) -> AsyncIterator[Http]:
    async with http_to(sandbox) as asking:
        yield asking


async def beat(http: Http) -> tuple[int, object]:
    return await http.get(BOOK, instrument_name="BTC_USD")


@pytest.mark.parametrize("status", [418, 429, 500, 503])
async def test_a_status_is_answered_as_often_as_asked_with_its_retry_after(
    sandbox: RunningSandbox, http: Http, status: int
) -> None:
    number = await http.fault(kind="rest_status", status=status, retry_after=7, count=2)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{sandbox.url}{BOOK}?instrument_name=BTC_USD") as response,
    ):
        assert (response.status, response.headers["Retry-After"]) == (status, "7")
        assert (await response.json())["code"] != 0
    assert (await beat(http))[0] == status
    assert (await beat(http))[0] == 200
    assert await http.hits(number) == 2


async def test_a_status_may_come_as_html(http: Http) -> None:
    await http.fault(kind="rest_status", status=503, body="html")
    status, text = await beat(http)
    assert status == 503
    assert str(text).startswith("<html>")


async def test_a_fault_hits_only_what_its_filters_name(http: Http) -> None:
    number = await http.fault(
        kind="rest_status", status=500, path="get-candlestick", instrument="BTC/USD", timeframe="1m"
    )
    for name, timeframe, expected in (
        ("BTC_USD", "1m", 500),
        ("BTC_USD", "5m", 200),
        ("ETH_USD", "1m", 200),
    ):
        status, _ = await http.get(CANDLES, instrument_name=name, timeframe=timeframe)
        assert status == expected
    assert (await beat(http))[0] == 200
    assert await http.hits(number) == 1


async def test_a_delay_holds_the_answer_back(http: Http) -> None:
    number = await http.fault(kind="rest_delay", delay=0.2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert (await beat(http))[0] == 200
    assert loop.time() - began >= 0.19
    assert await http.hits(number) == 1


async def test_garbage_is_half_an_answer_or_a_page(http: Http) -> None:
    number = await http.fault(kind="rest_garbage", count=1)
    status, text = await beat(http)
    assert status == 200
    assert isinstance(text, str)
    assert text.startswith('{"id":-1')
    page = await http.fault(kind="rest_garbage", body="html", count=1)
    status, text = await beat(http)
    assert (status, str(text)[:6]) == (200, "<html>")
    assert [await http.hits(number), await http.hits(page)] == [1, 1]


async def test_an_empty_answer_has_no_body(http: Http) -> None:
    number = await http.fault(kind="rest_empty", count=1)
    assert await beat(http) == (200, "")
    assert (await beat(http))[1] != ""
    assert await http.hits(number) == 1


async def test_missing_rows_leave_a_valid_answer(http: Http) -> None:
    whole = await http.candles("BTC_USD", "5m", count=10, end_ts=NOON_MS)
    number = await http.fault(kind="rest_missing_rows", rows=3, count=1)
    assert await http.candles("BTC_USD", "5m", count=10, end_ts=NOON_MS) == whole[:3] + whole[6:]
    named = await http.fault(kind="rest_missing_rows", timestamps=[whole[4]["t"]], timeframe="5m")
    kept = [row for row in whole if row != whole[4]]
    assert await http.candles("BTC_USD", "5m", start_ts=whole[0]["t"], end_ts=NOON_MS) == kept
    assert [await http.hits(number), await http.hits(named)] == [1, 1]


async def test_a_hanging_request_is_answered_only_when_the_fault_is_cleared(http: Http) -> None:
    number = await http.fault(kind="rest_hang")
    asking = asyncio.create_task(beat(http))
    while await http.hits(number) == 0:
        assert not asking.done()
    assert not asking.done()
    assert (await http.send("DELETE", "/_control/faults"))[1] == {"cleared": 1}
    assert (await asking)[0] == 200


async def test_a_hanging_request_does_not_hold_up_the_shutdown() -> None:
    async with contextlib.AsyncExitStack() as serving:
        sandbox = await serving.enter_async_context(running_sandbox())
        async with http_to(sandbox) as http:
            number = await http.fault(kind="rest_hang")
            asking = asyncio.create_task(beat(http))
            while await http.hits(number) == 0:
                assert not asking.done()
            async with asyncio.timeout(1.5):
                await serving.aclose()
                await asyncio.gather(asking, return_exceptions=True)


async def test_dropped_sockets_end_at_once_and_new_ones_may_come(
    sandbox: RunningSandbox, http: Http
) -> None:
    async with listening(sandbox, "ticker.BTC_USD") as listener:
        await listener.data()
        number = await http.fault(kind="drop_sockets")
        await listener.ended()
        assert await http.hits(number) == 1
    await eventually(lambda: sandbox.hub.open_sockets == 0)
    async with listening(sandbox, "ticker.BTC_USD") as listener:
        assert (await listener.data())["channel"] == "ticker"


async def test_muted_sockets_send_no_data_and_no_heartbeat_and_answer_pings(http: Http) -> None:
    # A client that takes a while to answer a heartbeat must not be dropped for it.
    fast = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100), heartbeat_s=0.25)
    async with running_sandbox(fast) as sandbox, http_to(sandbox) as control:
        number = await control.fault(kind="mute_sockets")
        async with listening(sandbox, "ticker.BTC_USD", "book.BTC_USD.10") as listener:
            while await control.hits(number) < 8:
                await listener.ws.ping()
            assert (await listener.message())["method"] == "subscribe"
            assert sandbox.hub.frames_sent == 0
            await control.send("DELETE", "/_control/faults")
            assert "result" in await listener.message() or await listener.data()


async def test_one_channel_may_be_mute_while_others_go_on() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        number = await http.fault(kind="mute_sockets", channel="book", instrument="BTC_USD")
        async with listening(
            sandbox, "book.BTC_USD.10", "book.ETH_USD.10", "ticker.BTC_USD"
        ) as listener:
            seen = {(await listener.data())["subscription"] for _ in range(12)}
        assert seen == {"book.ETH_USD.10", "ticker.BTC_USD"}
        assert await http.hits(number) > 0


async def test_a_fault_of_some_seconds_ends_by_itself(http: Http) -> None:
    await http.fault(kind="rest_status", status=503, seconds=0.2)
    assert (await beat(http))[0] == 503
    async with asyncio.timeout(10):
        while (await beat(http))[0] != 200:
            pass


async def test_a_broken_frame_is_no_json_and_the_next_one_is_whole(
    sandbox: RunningSandbox, http: Http
) -> None:
    number = await http.fault(kind="ws_broken_frame", channel="ticker")
    async with listening(sandbox, "ticker.BTC_USD", "ticker.ETH_USD") as listener:
        assert (await listener.message())["code"] == 0
        broken = await listener.ws.receive_str(timeout=5)
        assert broken.startswith('{"id":-1')
        assert not broken.endswith("}")
        assert (await listener.data())["subscription"] == "ticker.ETH_USD"
    assert await http.hits(number) == 1


async def test_a_sequence_gap_leaves_out_an_update_that_the_next_one_is_chained_to() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    async with (
        running_sandbox(config) as sandbox,
        http_to(sandbox) as http,
        listening(
            sandbox, "book.BTC_USD.10", book_subscription_type="SNAPSHOT_AND_UPDATE"
        ) as listener,
    ):
        told = (await listener.data())["data"][0]["u"]
        number = await http.fault(kind="ws_sequence_gap", channel="book", instrument="BTC/USD")
        breaks = 0
        for _ in range(12):
            update = (await listener.data())["data"][0]
            breaks += update["pu"] != told
            told = update["u"]
        assert breaks == 1
        assert await http.hits(number) == 1


async def test_a_sequence_gap_breaks_the_chain_of_binance_s_changes_too() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=20))
    async with (
        running_sandbox(config) as sandbox,
        http_to(sandbox) as http,
        connected(sandbox, "/ws/btcusdt@depth@100ms") as listener,
    ):
        told = (await listener.message())["u"]
        number = await http.fault(kind="ws_sequence_gap", channel="book", instrument="BTC/USDT")
        breaks = 0
        for _ in range(12):
            update = await listener.message()
            breaks += update["U"] != told + 1
            told = update["u"]
        assert breaks == 1
        assert await http.hits(number) == 1


async def test_a_sequence_gap_spares_frames_that_nothing_numbers() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        number = await http.fault(kind="ws_sequence_gap")
        async with listening(
            sandbox, "ticker.BTC_USD", "book.BTC_USD.10", "trade.BTC_USD"
        ) as listener:
            seen = {(await listener.data())["channel"] for _ in range(12)}
        assert seen == {"ticker", "book", "trade"}
        assert await http.hits(number) == 0
        # Nor is the whole book left out that updates start from.
        async with listening(
            sandbox, "book.ETH_USD.10", book_subscription_type="SNAPSHOT_AND_UPDATE"
        ) as listener:
            assert (await listener.data())["channel"] == "book"


async def test_a_late_candle_is_listed_some_time_after_its_end(http: Http) -> None:
    number = await http.fault(kind="candle_late", after_close=600, timeframe="1m")
    rows = await http.candles("BTC_USD", "1m", count=3)
    assert rows[-1]["t"] == NOON_MS - 11 * MINUTE
    await http.send("POST", "/_control/clock", {"skew_ms": MINUTE})
    rows = await http.candles("BTC_USD", "1m", count=3)
    assert rows[-1]["t"] == NOON_MS - 10 * MINUTE
    assert (await http.candles("BTC_USD", "5m", count=1))[0]["t"] == NOON_MS
    assert await http.hits(number) > 0


async def test_a_provisional_candle_changes_when_its_time_is_over(
    sandbox: RunningSandbox, http: Http
) -> None:
    number = await http.fault(kind="candle_provisional", after_close=60, instrument="BTC_USD")
    closed = NOON_MS - MINUTE
    final = sandbox.venue.prices.candle(sandbox.venue.instruments()[0], M1, closed)
    assert final is not None
    asked = {"start_ts": closed, "end_ts": NOON_MS}
    (row,) = await http.candles("BTC_USD", "1m", **asked)
    opened, high, low, close, volume = row_values(row)
    assert low <= min(opened, close) <= max(opened, close) <= high
    assert (close != final.close, volume < final.volume) == (True, True)
    assert await http.hits(number) == 1
    await http.send("POST", "/_control/clock", {"skew_ms": MINUTE})
    (row,) = await http.candles("BTC_USD", "1m", **asked)
    assert row_values(row) == values_of(final)


async def test_a_revised_candle_changes_at_its_time_alone(
    sandbox: RunningSandbox, http: Http
) -> None:
    market = sandbox.venue.instruments()[0]
    period = NOON_MS - 50 * MINUTE
    part = TimeRange(period - 5 * MINUTE, period + 10 * MINUTE)
    before = [values_of(item) for item in sandbox.venue.prices.candles(market, M5, part)]
    asked = {"start_ts": part.start, "end_ts": part.end}
    number = await http.fault(
        kind="candle_revised",
        instrument="BTC_USD",
        timeframe="5m",
        timestamp=period,
        at=NOON_MS + MINUTE,
        values={"close": 1.5, "volume": 42},
    )
    assert [row_values(row) for row in await http.candles("BTC_USD", "5m", **asked)] == before
    await http.send("POST", "/_control/clock", {"skew_ms": MINUTE})
    rows = [row_values(row) for row in await http.candles("BTC_USD", "5m", **asked)]
    opened, high, _, _, _ = before[1]
    assert rows == [before[0], (opened, high, 1.5, 1.5, 42.0), before[2]]
    assert await http.hits(number) == 1


async def test_a_revision_without_values_changes_the_volume(
    sandbox: RunningSandbox, http: Http
) -> None:
    period = NOON_MS - 5 * MINUTE
    final = sandbox.venue.prices.candle(sandbox.venue.instruments()[0], M5, period)
    assert final is not None
    await http.fault(kind="candle_revised", timestamp=period)
    (row,) = await http.candles("BTC_USD", "5m", start_ts=period, end_ts=NOON_MS)
    assert row_values(row)[:4] == values_of(final)[:4]
    assert row_values(row)[4] > final.volume


async def test_a_withheld_final_update_is_never_sent_and_the_next_candle_is() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    told: dict[int, tuple[float, ...]] = {}
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        number = await http.fault(kind="final_update_withheld", timeframe="1m")
        async with listening(sandbox, "candlestick.1m.BTC_USD") as listener:
            while len(told) < 4:
                for row in (await listener.data())["data"]:
                    told[row["t"]] = row_values(row)
        market = sandbox.venue.instruments()[0]
        newest = max(told)
        candles = sandbox.venue.prices.candles(market, M1, TimeRange(min(told), newest))
        assert await http.hits(number) >= 3
    assert any(told[item.timestamp] != values_of(item) for item in candles)


async def test_refused_connections_break_and_the_control_page_stays(http: Http) -> None:
    number = await http.fault(kind="refuse_connections")
    with pytest.raises(aiohttp.ClientError):
        await beat(http)
    assert await http.hits(number) > 0


async def test_refused_sockets_get_a_status_while_rest_goes_on(
    sandbox: RunningSandbox, http: Http
) -> None:
    number = await http.fault(kind="ws_refuse", status=403, count=1)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with listening(sandbox):
            pass
    assert refused.value.status == 403
    assert (await beat(http))[0] == 200
    async with listening(sandbox, "ticker.BTC_USD") as listener:
        await listener.data()
    assert await http.hits(number) == 1


async def listed(http: Http) -> set[str]:
    _, answer = await http.get("/exchange/v1/public/get-instruments")
    return {item["symbol"] for item in answer["result"]["data"]}


async def test_a_delisted_instrument_is_as_unknown_as_one_that_never_was(http: Http) -> None:
    before = await listed(http)
    number = await http.fault(kind="delisted", instrument="BTC/USD")
    assert await listed(http) == before - {"BTC_USD"}
    for path, query in ((CANDLES, {"timeframe": "1m"}), (BOOK, {})):
        gone = await http.get(path, instrument_name="BTC_USD", **query)
        never = await http.get(path, instrument_name="NO_SUCH", **query)
        assert gone[0] == never[0] == 400
        assert gone[1]["code"] == never[1]["code"] == 30003
        assert (await http.get(path, instrument_name="ETH_USD", **query))[0] == 200
    assert await http.hits(number) == 3
    await http.send("DELETE", f"/_control/faults?id={number}")
    assert await listed(http) == before
    assert (await beat(http))[0] == 200


async def test_feeds_of_a_delisted_instrument_fall_silent_and_new_ones_are_refused() -> None:
    config = SandboxConfig(market_clock=clock_at(NOON_MS, speed=100))
    async with (
        running_sandbox(config) as sandbox,
        http_to(sandbox) as http,
        listening(sandbox, "candlestick.1m.BTC_USD", "ticker.BTC_USD", "ticker.ETH_USD") as old,
    ):
        assert {(await old.data())["subscription"] for _ in range(6)} > {"ticker.BTC_USD"}
        number = await http.fault(kind="delisted", instrument="BTC_USD")
        # What had been sent before the fault acted may still arrive.
        while await http.hits(number) < 4:
            await old.data()
        assert {(await old.data())["subscription"] for _ in range(6)} == {"ticker.ETH_USD"}
        async with listening(sandbox, "book.BTC_USD.10") as new:
            assert (await new.message())["code"] == 0
            refused = await new.message()
            assert refused["code"] == 30003
            assert "book.BTC_USD.10" in refused["original"]
        await http.send("DELETE", "/_control/faults")
        while (await old.data())["subscription"] != "ticker.BTC_USD":
            pass


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"kind": "earthquake"}, "earthquake"),
        ({"kind": "delisted"}, "needs instrument"),
        ({}, "does not exist"),
        ([{"kind": "rest_empty"}, 5], "JSON object"),
        ({"kind": "rest_status"}, "needs status"),
        ({"kind": "rest_status", "status": 200}, "from 400 to 599"),
        ({"kind": "rest_delay", "delay": "long"}, "real seconds"),
        ({"kind": "rest_delay", "delay": 1, "status": 500}, "no field 'status'"),
        ({"kind": "rest_empty", "count": True}, "whole number"),
        ({"kind": "candle_revised", "timestamp": 1, "values": {"colour": 1}}, "some of open"),
        ({"kind": "rest_missing_rows", "timestamps": []}, "list of period opens"),
        ({"kind": "mute_sockets", "seconds": -1}, "real seconds"),
    ],
)
async def test_a_wrong_fault_is_refused_with_what_is_right(
    http: Http, fault: object, complaint: str
) -> None:
    status, answer = await http.send("POST", "/_control/faults", fault)
    assert status == 422
    assert complaint in answer["error"]
    assert (await http.get("/_control/faults"))[1] == {"faults": []}


@pytest.mark.parametrize("skew", [{}, {"skew_ms": "1"}, {"skew_ms": 10**15}, {"skew": 1}, []])
async def test_a_wrong_skew_is_refused(http: Http, skew: object) -> None:
    assert (await http.send("POST", "/_control/clock", skew))[0] == 422


async def test_a_body_that_is_no_json_or_too_large_is_refused(sandbox: RunningSandbox) -> None:
    async with aiohttp.ClientSession() as session:
        url = f"{sandbox.url}/_control/faults"
        async with session.post(url, data=b"{") as response:
            assert response.status == 422
        async with session.post(url, data=b"[" + b" " * 70_000 + b"]") as response:
            assert response.status == 413


async def test_one_fault_of_several_can_be_cleared(http: Http) -> None:
    _, answer = await http.send(
        "POST",
        "/_control/faults",
        [{"kind": "rest_empty"}, {"kind": "rest_hang", "path": "get-trades"}],
    )
    first, second = (item["id"] for item in answer["faults"])
    assert (await http.send("DELETE", f"/_control/faults?id={first}"))[1] == {"cleared": 1}
    _, answer = await http.get("/_control/faults")
    assert [item["id"] for item in answer["faults"]] == [second]
    assert (await beat(http))[0] == 200


async def test_requests_are_counted_by_path_second_market_and_status_and_sockets_too(
    sandbox: RunningSandbox, http: Http
) -> None:
    for _ in range(3):
        await beat(http)
    await http.get("/no/such/path")
    async with listening(sandbox, "ticker.BTC_USD") as listener:
        await listener.data()
        _, stats = await http.get("/_control/stats")
    assert stats["requests"] == {BOOK: 3, "(unknown)": 1, "/exchange/v1/market": 1}
    assert sum(second["requests"] for second in stats["per_second"]) == 5
    assert stats["markets"] == {"BTC/USD": 3}
    assert stats["statuses"] == {"200": 3, "404": 1}
    assert (stats["open_sockets"], stats["sockets_opened"]) == (1, 1)
    assert stats["feeds"] == {"ticker.BTC_USD": 1}


async def test_the_control_page_is_html_for_people_and_json_for_programs(
    sandbox: RunningSandbox, http: Http
) -> None:
    await http.fault(kind="rest_empty", instrument="<b>")
    status, state = await http.get("/_control")
    assert (status, state["source"]) == (200, "generated")
    async with (
        aiohttp.ClientSession(headers={"Accept": "text/html"}) as session,
        session.get(f"{sandbox.url}/_control") as response,
    ):
        page = await response.text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


async def test_above_the_rate_limit_requests_are_refused() -> None:
    config = SandboxConfig(rate_limit=3, answer_delay_ms=1)
    async with running_sandbox(config) as sandbox, http_to(sandbox) as http:
        statuses = [(await beat(http))[0] for _ in range(5)]
        _, refused = await http.get(BOOK, instrument_name="BTC_USD")
    assert statuses == [200, 200, 200, 429, 429]
    assert refused["code"] == 42901


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"instrument_name": "NO_SUCH", "timeframe": "5m"}, 30003),
        ({"timeframe": "5m"}, 40004),
        ({"instrument_name": "BTC_USD", "timeframe": "7m"}, 40004),
        ({"instrument_name": "BTC_USD", "timeframe": "5m", "count": "301"}, 40004),
        ({"instrument_name": "BTC_USD", "timeframe": "5m", "count": "-1"}, 40004),
        ({"instrument_name": "BTC_USD", "timeframe": "5m", "start_ts": "yesterday"}, 40004),
    ],
)
async def test_a_wrong_request_is_answered_as_the_exchange_would(
    http: Http, query: dict[str, str], code: int
) -> None:
    status, answer = await http.get(CANDLES, **query)
    assert (status, answer["code"]) == (400, code)
    assert answer["method"] == "public/get-candlestick"


async def test_a_path_that_the_exchange_has_not_is_answered_in_its_shape(http: Http) -> None:
    status, answer = await http.get("/exchange/v1/public/get-nothing")
    assert (status, answer["method"]) == (404, "public/get-nothing")
    assert answer["code"] != 0
