"""The whole service, end to end: real processes, a real socket, real files, real clients.

The sandbox exchange replays a recorded series on a fast market clock; what the service has stored
at the end is read from disk by this file alone and compared with the record.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import websockets

from config import BUILT_IN_EXCHANGES
from tests.support.azurite import Azurite, running_azurite
from tests.support.backends import AzureContainer, Backend, Document, LocalFolder
from tests.support.clients import Agent, Subscriber, agent, row_of, subscriber
from tests.support.listing_proxy import as_azure_lists
from tests.support.market import DAY, HOUR, MINUTE
from tests.support.processes import (
    SECRET,
    Feed,
    Stack,
    clean_environment,
    line_with,
    market_clock,
    run,
    stack,
    stop,
    until,
)
from tests.support.records import Record, from_sample, generated
from tests.support.sandbox_rest import Rows, candles

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

RECORDS: dict[str, Callable[[Path], Record]] = {"generated": generated}
if os.environ.get("CB_TRADE_SAMPLE_DATA"):
    RECORDS["ETH_BTC-5m"] = lambda _: from_sample("ETH_BTC-5m", days=14)
    RECORDS["UNITTEST_BTC-1m"] = lambda _: from_sample("UNITTEST_BTC-1m", days=9)
# Real seconds that one period of the record takes.
PERIOD_S = 1.5
NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
# A minute of the market takes a real second.
SPEED = 60
# Volumes of a forming candle are sums of its trades.
VOLUME_ROUNDING = 1e-9


def stored_rows(running: Stack, record: Record) -> dict[int, tuple[float, ...]]:
    """What lies on disk, by time; a period stored twice or under a wrong name fails."""
    rows: dict[int, tuple[float, ...]] = {}
    for document in running.documents(record.folder):
        at = document["timestamp"]
        assert at not in rows
        assert document["interval"] == record.interval
        assert document["market"] == record.coin
        rows[at] = tuple(document[name] for name in ("open", "high", "low", "close", "volume"))
    return rows


async def open_gaps(client: httpx.AsyncClient, record: Record) -> int:
    """How many wanted periods the service itself calls open."""
    answer = await client.get(
        "/api/v1/coverage", params={"coin": record.coin, "interval": record.interval}
    )
    answer.raise_for_status()
    return sum(
        gap["count"] for gap in answer.json()["gaps"] if gap["reason"] in ("pending", "unreachable")
    )


@asynccontextmanager
async def replaying(folder: Path, record: Record) -> AsyncIterator[Stack]:
    clock = market_clock(record.live_from(), record.step / 1000 / PERIOD_S)
    async with stack(
        folder,
        clock,
        sandbox_arguments=("--replay", str(record.path)),
        BACKFILL_DAYS=str(record.days),
    ) as running:
        yield running


@pytest.mark.parametrize("name", sorted(RECORDS))
async def test_a_recorded_series_flows_from_the_exchange_to_agents_clients_and_disk(
    name: str, tmp_path: Path
) -> None:
    record = RECORDS[name](tmp_path / "record")
    async with replaying(tmp_path, record) as running:
        _, (token,), _ = await run("token", "--subject", "bot", folder=tmp_path, **running.settings)
        async with agent(running, token) as bot:
            tools = {"add_coin", "list_coins", "get_historical_data", "get_current_data"}
            assert tools <= await bot.tools()
            # The market goes on while the coin is added.
            earliest = running.clock.now_ms()
            added = await bot.call("add_coin", coin=record.coin, interval=record.interval)
            latest = running.clock.now_ms()
        assert added["status"] == "added"
        since = added["target"]["since"]
        assert since % record.step == 0
        assert earliest - record.step < since + record.days * DAY <= latest

        async with running.websocket(token) as socket, running.http(token) as client:
            feed = Feed(socket)
            await feed.send(type="subscribe_realtime", coin=record.coin, interval=record.interval)
            subscribed = await feed.next("subscribed")
            next_open = subscribed["last_closed"] + record.step

            history = await feed.history(
                since, next_open, coin=record.coin, interval=record.interval
            )
            assert history.rows == record.between(since, next_open)
            assert history.chunks >= 1
            holes = set(range(since, next_open, record.step)) - set(record.rows)
            assert history.missing(record.step) == dict.fromkeys(holes, "no_trades")

            told = await follow(feed, record, next_open, periods=4)
            assert told == next_open + 4 * record.step

            # The service dies, and comes back two candles later.
            await running.kill_service()
            await running.clock.sleep_until(told + 2 * record.step + record.step // 2)
            await running.start_service()

        async with running.websocket(token) as socket, running.http(token) as client:
            feed = Feed(socket)
            await feed.send(
                type="subscribe_realtime",
                coin=record.coin,
                interval=record.interval,
                **{"from": told},
            )
            assert (await feed.next("subscribed"))["last_closed"] >= told - record.step
            told = await follow(feed, record, told, periods=4)

            async def nothing_open() -> bool:
                return await open_gaps(client, record) == 0

            await until(nothing_open)
        assert await running.stop_service() == 0

        stored = stored_rows(running, record)
        assert stored == record.between(since, max(stored) + record.step)
        assert max(stored) >= max(at for at in record.rows if at < told)
        books = [
            (document["order_book"]["timestamp"], document["timestamp"] + record.step)
            for document in running.documents(record.folder)
            if document["order_book"] is not None
        ]
        assert books != []
        assert [late for taken, late in books if abs(taken - late) > 10_000] == []
        await running.start_service()


async def follow(feed: Feed, record: Record, next_open: int, *, periods: int) -> int:
    """Read closed periods, each of which must be the next one and what the record says; late
    ones and corrections aside. Returns the first period not told yet."""
    last = next_open + periods * record.step
    while next_open < last:
        message = await feed.next_told()
        late = message.get("late", False)
        if message["type"] == "gap":
            start, end = message["start"], message["end"]
            assert message["reason"] != "no_trades" or not record.between(start, end)
        else:
            data = message["data"]
            start, end = data["timestamp"], data["timestamp"] + record.step
            row = tuple(data[key] for key in ("open", "high", "low", "close", "volume"))
            assert row == record.rows[start]
            late = late or data["revision"] > 1
        if late:
            assert start < next_open
        else:
            assert start == next_open
            next_open = end
    return next_open


@asynccontextmanager
async def invented(folder: Path, *, seconds_a_minute: float = 2.0) -> AsyncIterator[Stack]:
    """A service on the sandbox's own market, an hour of history collected."""
    noon = 1_763_985_600_000
    clock = market_clock(noon, 60 / seconds_a_minute)
    async with stack(folder, clock, BACKFILL_DAYS="0.04") as running:
        yield running


@dataclass(frozen=True, slots=True)
class Kept:
    """A coin that a service keeps on a backend, and what its exchange says of it."""

    running: Stack
    backend: Backend
    exchange: str
    market: str
    since: int

    async def truth(self, start: int, end: int, *, market: str = "") -> Rows:
        return await candles(
            self.running.sandbox_url, self.exchange, market or self.market, start, end
        )

    async def stored(self, start: int, end: int) -> dict[int, Document]:
        """What the backend itself holds of a range."""
        documents = await self.backend.documents(self.exchange, "BTC")
        return {at: documents[at] for at in sorted(documents) if start <= at < end}

    async def check_stored(self, start: int, end: int) -> None:
        stored = await self.stored(start, end)
        assert {at: row_of(document) for at, document in stored.items()} == await self.truth(
            start, end
        )

    async def has_written_all(self) -> bool:
        """Whether the storage takes everything, and nothing waits for it."""
        return await self.running.readiness() == (
            200, {"status": "ready", "reasons": [], "warnings": []}
        )  # fmt: skip


@pytest.fixture(scope="module")
def lasting_azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """An emulator that may be stopped and started again."""
    with running_azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        yield azurite


@pytest.fixture
def backend(request: pytest.FixtureRequest, tmp_path: Path, container: str) -> Iterator[Backend]:
    if request.param == "local":
        yield LocalFolder(tmp_path)
        return
    azurite: Azurite = request.getfixturevalue("lasting_azurite")
    with as_azure_lists(azurite) as connection_string:
        yield AzureContainer(azurite, container, connection_string)


# Processes that share the tests get as many of each backend, of which one takes longer.
@pytest.mark.parametrize("backend", ["local", "azure"], indirect=True)
@pytest.mark.parametrize("exchange", BUILT_IN_EXCHANGES)
async def test_a_coin_is_kept_and_told_whatever_its_exchange_and_its_storage_do(
    exchange: str, backend: Backend, tmp_path: Path
) -> None:
    settings = {
        "EXCHANGES": exchange,
        "BACKFILL_DAYS": "0.02",
        "STATE_DIR": str(tmp_path / "state"),
    }
    async with (
        stack(tmp_path, market_clock(NOON, SPEED), **settings, **backend.settings) as running,
        agent(running, running.token()) as bot,
    ):
        market = await check_that_one_exchange_is_active(running, bot, exchange)
        coin = await add(running, backend, bot, market)
        async with AsyncExitStack() as clients:

            async def join(**resume: int) -> Subscriber:
                return await clients.enter_async_context(
                    subscriber(running, running.token(), "BTC", **resume)
                )

            first, second = await join(), await join()
            await check_that_what_closes_is_told_and_stored(coin, first, second)
            await check_that_the_newest_is_told(coin, bot, first)
            await lose_rest(coin, first)
            third = await join(**{"from": first.first})
            async with mute_sockets(coin, first):
                await check_where_history_comes_from(coin, bot)
                await lose_storage(coin, second)

            # After all of it every client was told the same, and that is what is stored.
            end = max(client.next_open for client in (first, second, third))
            told = await coin.truth(coin.since, end)
            for client in (first, second, third):
                await client.until_told(end)
                await client.until_closed({at for at in told if at >= client.first})
                assert client.closed == {at: row for at, row in told.items() if at >= client.first}
            await coin.check_stored(coin.since, end)
        assert await running.stop_service() == 0
        check_that_each_outage_was_logged_once(running.logs())


async def check_that_one_exchange_is_active(running: Stack, bot: Agent, exchange: str) -> str:
    """Only what is enabled is asked and can be asked for; the market that a coin means there."""
    available = await bot.call("check_availability", coin="BTC")
    (market,) = available["markets"]
    assert (market["exchange"], market["collecting"]) == (exchange, False)
    assert (available["available"], available["unreachable"]) == (True, [])
    async with running.http(running.token("data:read")) as client:
        for other in {*BUILT_IN_EXCHANGES} - {exchange}:
            answer = await client.get(
                "/api/v1/availability", params={"coin": "BTC", "exchange": other}
            )
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_exchange")
    return str(market["market"])


async def add(running: Stack, backend: Backend, bot: Agent, market: str) -> Kept:
    """An agent adds the coin, which is filled at once."""
    added = await bot.call("add_coin", coin="BTC", interval="1m")
    assert added["status"] == "added"
    target = added["target"]
    assert target["market"] == market

    async def is_live() -> bool:
        (listed,) = (await bot.call("list_coins"))["targets"]
        return bool(listed["state"] == "live")

    await until(is_live)
    return Kept(running, backend, target["exchange"], market, target["since"])


async def check_that_what_closes_is_told_and_stored(coin: Kept, *clients: Subscriber) -> None:
    """What closes reaches every client and the storage, as the exchange's REST has it."""
    end = max(client.first for client in clients) + 2 * MINUTE
    for client in clients:
        await client.until_told(end)
        told = {at: row for at, row in client.closed.items() if at < end}
        assert told == await coin.truth(client.first, end) != {}
    live = await coin.stored(clients[0].first, end)
    assert {document["source"] for document in live.values()} == {"stream"}
    await coin.check_stored(coin.since, end)


async def check_that_the_newest_is_told(coin: Kept, bot: Agent, client: Subscriber) -> None:
    """The most current data is the forming candle, or the one that has just closed."""
    newest = client.next_open - MINUTE
    told = (await bot.call("get_current_data", coin="BTC", interval="1m"))["data"]
    at = told["timestamp"]
    assert at >= newest
    await client.until_told(at + MINUTE)
    opened, high, low, close, volume = row_of(told)
    rows = await coin.truth(at - MINUTE, at + MINUTE)
    if told["closed"]:
        assert row_of(told) == rows[at]
    elif volume:
        final = rows[at]
        assert opened == final[0]
        assert final[2] <= low <= close <= high <= final[1]
        assert volume <= final[4] + VOLUME_ROUNDING
    else:
        # Nobody had traded yet: it stands where the one before it closed.
        assert {opened, high, low, close} == {rows[at - MINUTE][3]}


async def lose_rest(coin: Kept, client: Subscriber) -> None:
    """REST answers 503: forming candles go on, what is stored is served, and what closes
    meanwhile is told later."""
    running = coin.running
    (fault,) = await running.fault({"kind": "rest_status", "status": 503})
    lost = client.next_open
    await client.until_forming(lost + 3 * MINUTE)
    assert (await running.hits())[fault] > 0
    async with running.websocket(running.token("data:read")) as socket:
        served = await Feed(socket).history(coin.since, client.first, coin="BTC", interval="1m")
    assert served.sources == {"storage": len(served.rows), "exchange": 0}
    assert (await running.readiness())[0] == 200
    await running.clear_faults()
    assert served.rows == await coin.truth(coin.since, client.first)
    swallowed = await coin.truth(lost, lost + 3 * MINUTE)
    async with running.http(running.token("data:read")) as http:

        async def answers() -> bool:
            page = await http.get(
                "/api/v1/history",
                params={"coin": "BTC", "interval": "1m", "start": lost, "end": lost + 3 * MINUTE},
            )
            return {at: tuple(values) for at, *values in page.json()["rows"]} == swallowed

        # Asking is what finds out that the exchange answers again.
        await until(answers)
    await client.until_closed(set(swallowed))
    assert {at: client.closed[at] for at in swallowed} == swallowed


@asynccontextmanager
async def mute_sockets(coin: Kept, client: Subscriber) -> AsyncIterator[None]:
    """The socket stands and says nothing: what closes is told all the same, and in time it is
    noticed and connected anew."""
    (fault,) = await coin.running.fault({"kind": "mute_sockets"})
    start = client.next_open
    await client.until_told(start + 3 * MINUTE)
    yield
    await client.until_status("feed", "reconnecting")
    assert (await coin.running.hits())[fault] > 0
    await coin.running.clear_faults()
    await client.until_status("feed", "connected")
    end = client.next_open
    await client.until_forming(end)
    told = await coin.truth(start, end)
    await client.until_closed(set(told))
    assert {at: client.closed[at] for at in told} == told


async def check_where_history_comes_from(coin: Kept, bot: Agent) -> None:
    """From storage what is stored, from the exchange what is not, which is kept from then on."""
    span = 20 * MINUTE
    wanted = {"coin": "BTC", "interval": "1m", "start": coin.since - span, "end": coin.since + span}
    truth = await coin.truth(coin.since - span, coin.since + span)
    older = [at for at in truth if at < coin.since]
    assert 0 < len(older) < len(truth)
    assert await coin.stored(coin.since - span, coin.since) == {}
    for sources in (
        {"storage": len(truth) - len(older), "exchange": len(older)},
        {"storage": len(truth), "exchange": 0},
    ):
        page = await bot.call("get_historical_data", **wanted)
        assert {at: tuple(values) for at, *values in page["rows"]} == truth
        assert page["sources"] == sources
        await coin.check_stored(coin.since - span, coin.since + span)

    # Of a market that nobody collects the exchange alone knows; quiet minutes of it are told.
    market, start = f"CRO/{coin.market.split('/')[1]}", coin.since - DAY
    truth = await coin.truth(start, start + 2 * HOUR, market=market)
    async with coin.running.websocket(coin.running.token("data:read")) as socket:
        history = await Feed(socket).history(
            start, start + 2 * HOUR, chunk_size=50, coin="CRO", interval="1m"
        )
    assert history.rows == truth
    assert history.sources == {"storage": 0, "exchange": len(truth)}
    holes = set(range(start, start + 2 * HOUR, MINUTE)) - set(truth)
    assert history.missing(MINUTE) == dict.fromkeys(holes, "no_trades")
    # Binance alone has a flat candle where nobody traded.
    assert (holes == set()) == (coin.exchange == "binance")


async def lose_storage(coin: Kept, client: Subscriber) -> None:
    """The storage is away: the service says so, refuses what needs it, goes on telling what
    closes, and has lost nothing when it is back."""
    running = coin.running
    lost = running.clock.now_ms() // MINUTE * MINUTE
    await coin.backend.go_away()

    async def says_why() -> bool:
        status, said = await running.readiness()
        return status == 503 and any(why.startswith("storage") for why in said["reasons"])

    await until(says_why, within_s=5)
    await client.until_status("storage", "degraded")
    await client.until_told(lost + 3 * MINUTE)
    async with running.http(running.token()) as http:
        refused = await http.get(
            "/api/v1/history",
            params={"coin": "BTC", "interval": "1m", "start": coin.since, "end": lost},
        )
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
    await coin.backend.come_back()
    await client.until_status("storage", "connected")
    await until(coin.has_written_all)


def check_that_each_outage_was_logged_once(logs: str) -> None:
    events = (
        "exchange_cannot_be_asked", "exchange_answers_again",
        "feed_lost", "feed_restored",
        "storage_is_away", "storage_is_back",
    )  # fmt: skip
    assert {event: logs.count(event) for event in events} == dict.fromkeys(events, 1)
    # A short outage may fall between two looks at the lock.
    assert logs.count("collector_role_unsure") == logs.count("collector_role_sure") <= 1
    assert "Traceback" not in logs


async def test_bad_input_is_answered_as_documented_and_adds_nothing(tmp_path: Path) -> None:
    async with invented(tmp_path) as running:
        token, reader = running.token(), running.token("data:read")
        now = running.clock.now_ms()
        async with running.http(token) as client:
            for status, code, answer in (
                (404, "coin_not_available", await client.post(
                    "/api/v1/coins", json={"coin": "NOSUCHCOIN"})),
                (404, "unknown_exchange", await client.post(
                    "/api/v1/coins", json={"coin": "BTC", "exchange": "kraken"})),
                (422, "invalid_request", await client.post(
                    "/api/v1/coins", json={"coin": "BTC", "interval": "7m"})),
                (422, "invalid_request", await client.post("/api/v1/coins", json={})),
                (422, "invalid_request", await client.post("/api/v1/coins", content=b"{")),
                (422, "invalid_request", await client.get(
                    "/api/v1/history", params={"coin": "BTC", "start": now, "end": now - 1})),
                (404, "coin_not_available", await client.get(
                    "/api/v1/current", params={"coin": "NOSUCHCOIN"})),
            ):  # fmt: skip
                assert answer.status_code == status, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["code"] == code
            assert (await client.get("/api/v1/coins")).json() == {"targets": []}
        for wrong in (None, "nonsense", token[:-4] + "AAAA"):
            async with running.http(wrong) as client:
                answer = await client.get("/api/v1/coins")
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
                assert "www-authenticate" in answer.headers
        async with running.http(reader) as client:
            answer = await client.post("/api/v1/coins", json={"coin": "BTC"})
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        with pytest.raises(websockets.InvalidStatus) as refused:
            await running.websocket("nonsense")
        assert refused.value.response.status_code == 401
        async with running.websocket(token) as socket:
            feed = Feed(socket)
            await socket.send("{broken")
            assert (await feed.next("error"))["code"] == "invalid_message"
            for code, message in (
                ("invalid_message", {"type": "no_such_type"}),
                ("coin_not_available", {"type": "subscribe_realtime", "coin": "NOSUCHCOIN"}),
                ("unknown_exchange",
                 {"type": "request_current", "coin": "BTC", "exchange": "kraken"}),
                ("invalid_request",
                 {"type": "request_historical", "coin": "BTC", "start": now, "end": now - 1}),
                ("invalid_request",
                 {"type": "subscribe_realtime", "coin": "BTC", "interval": "7m"}),
            ):  # fmt: skip
                await feed.send(request_id=code, **message)
                error = await feed.next("error")
                assert (error["code"], error["request_id"]) == (code, code)
            await feed.send(type="ping")
            await feed.next("pong")
        async with running.http(token) as client:
            assert (await client.get("/api/v1/coins")).json() == {"targets": []}
            assert (await client.get("/health/ready")).status_code == 200
        assert "Traceback" not in running.logs()


async def test_two_runs_side_by_side_print_live_candles_and_stop_clean(tmp_path: Path) -> None:
    async def run(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "errors.log").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "demo",
                env=clean_environment(PORT="0", AUTH_SECRET=SECRET),
                cwd=folder,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        try:
            assert "SIMULATED" in await line_with(process, "cb-trade data service")
            assert "TOKEN=" in await line_with(process, "TOKEN=")
            await line_with(process, "BTC/USD   forming")
        finally:
            assert await stop(process, signal.SIGINT) == 0
        assert (folder / "data-sandbox" / "raw_data" / "crypto.com" / "BTC").is_dir()
        # Nothing is left running in what was its session.
        assert [line for line in processes() if str(folder) in line] == []

    await asyncio.gather(run("one"), run("two"))


def processes() -> list[str]:
    """The working folder of every process that still runs."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    return found
