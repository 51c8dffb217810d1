"""DataCollectionManagerImpl: adding, removing, selecting, resuming and telling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

import pytest

from collection.interfaces import (
    ClosedCandle,
    FormingCandle,
    GapTold,
    StatusTold,
    StreamEvent,
    SubscriptionStarted,
    TargetState,
)
from domain.gap import GapReason
from domain.time_range import TimeRange
from errors import CoinNotAvailable, InvalidRequest, UnknownExchange
from exchange_source.interfaces import ExchangeUnavailable, Priority
from storage.interfaces import NotTheCollector, StorageUnavailable
from storage.path_utility import StoragePathUtility
from target_management.interfaces import SERVICE, TargetStoreUnavailable
from tests.support.clock import settle_loop
from tests.support.collecting import Collecting
from tests.support.market import BTC_5M, FIVE, HOUR, MINUTE, T0, book, candle, entry

Event = TypeVar("Event", bound=StreamEvent)


async def first_of(kind: type[Event], events: AsyncIterator[StreamEvent]) -> Event:
    """The next event of a kind; those of other kinds are passed over."""
    while True:
        event = await anext(events)
        if isinstance(event, kind):
            return event


async def test_adding_a_new_coin_asks_selects_streams_and_lists_it() -> None:
    world = Collecting()
    async with world.running():
        result = await world.manager.add_coin("btc")
        await settle_loop(100)
        assert result.status == "added"
        assert world.exchange.requests["check_coin_availability"] == 1
        assert [stream.market for stream in world.exchange.running_streams] == ["BTC/USD"]
        target = world.collection.get(BTC_5M)
        assert target == result.target.target
        assert await world.targets.get_target("crypto.com:BTC:5m") == target


async def test_a_coin_that_is_not_available_starts_nothing_and_is_not_listed() -> None:
    world = Collecting()
    async with world.running():
        with pytest.raises(CoinNotAvailable, match=r"DOGE on crypto\.com"):
            await world.manager.add_coin("DOGE")
        assert world.exchange.requests["check_coin_availability"] == 1
        assert world.exchange.requests["start_realtime_stream"] == 0
        assert await world.manager.list_targets() == []


async def test_a_coin_already_collected_is_success_without_another_stream() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await settle_loop(100)
        again = await world.manager.add_coin("BTC")
        await settle_loop(100)
        assert again.status == "already_collecting"
        assert world.exchange.requests["start_realtime_stream"] == 1


async def test_fifty_simultaneous_adds_start_one_stream_and_one_backfill() -> None:
    world = Collecting()
    async with world.running():
        results = await asyncio.gather(*(world.manager.add_coin("BTC") for _ in range(50)))
        await world.pass_time(10_000)
        assert [result.status for result in results].count("added") == 1
        assert world.exchange.requests["start_realtime_stream"] == 1
        assert await world.stored() == world.wanted()


async def test_the_exchange_is_selected_by_the_general_order() -> None:
    world = Collecting("crypto.com", "binance")
    async with world.running():
        result = await world.manager.add_coin("BTC")
        assert result.target.target.exchange == "crypto.com"


async def test_the_exchange_is_selected_by_the_preferences_of_the_coin() -> None:
    world = Collecting("crypto.com", "binance", preferences={"BTC": ("binance",)})
    async with world.running():
        result = await world.manager.add_coin("BTC")
        assert result.target.target.exchange == "binance"


async def test_a_preferred_exchange_that_cannot_be_asked_is_passed_over_and_named() -> None:
    world = Collecting("crypto.com", "binance")
    world.exchange.fail_with = ExchangeUnavailable("503")
    async with world.running():
        result = await world.manager.add_coin("BTC")
        assert result.target.target.exchange == "binance"
        assert result.unreachable == ("crypto.com",)


async def test_a_preferred_exchange_without_the_coin_gives_way_to_the_general_order() -> None:
    world = Collecting("crypto.com", "binance", preferences={"BTC": ("binance",)})
    world.exchanges["binance"].markets = ("ETH/USD",)
    async with world.running():
        result = await world.manager.add_coin("BTC")
        assert result.target.target.exchange == "crypto.com"
        assert result.unreachable == ()


async def test_an_explicit_exchange_is_the_only_one_that_is_asked() -> None:
    world = Collecting("crypto.com", "binance")
    world.exchange.fail_with = ExchangeUnavailable("503")
    async with world.running():
        with pytest.raises(ExchangeUnavailable):
            await world.manager.add_coin("BTC", exchange="crypto.com")
        assert world.exchanges["binance"].requests.total() == 0


async def test_a_coin_that_those_who_answer_do_not_list_is_not_available() -> None:
    world = Collecting("crypto.com", "binance")
    world.exchange.fail_with = ExchangeUnavailable("503")
    async with world.running():
        with pytest.raises(CoinNotAvailable, match=r"on binance; crypto\.com could not be asked"):
            await world.manager.add_coin("DOGE")


async def test_when_no_exchange_can_be_asked_that_is_the_error_and_says_when_to_come_back() -> None:
    world = Collecting("crypto.com", "binance")
    world.exchange.fail_with = ExchangeUnavailable("crypto.com: 503", retry_after=9)
    world.exchanges["binance"].fail_with = ExchangeUnavailable("binance: 418", retry_after=4)
    async with world.running():
        for asking in (world.manager.add_coin, world.manager.check_availability):
            with pytest.raises(
                ExchangeUnavailable, match=r"crypto\.com: 503; binance: 418"
            ) as told:
                await asking("BTC")
            assert told.value.retry_after == 4
        assert await world.manager.list_targets() == []


async def test_the_streams_callback_is_the_processors_method() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await settle_loop(100)
        (stream,) = world.exchange.running_streams
        assert stream._callback == world.processor.process_realtime_entry


async def test_bad_input_says_what_would_be_right_and_adds_nothing() -> None:
    world = Collecting()
    async with world.running():
        with pytest.raises(InvalidRequest, match="interval '7m' does not exist"):
            await world.manager.add_coin("BTC", interval="7m")
        with pytest.raises(InvalidRequest, match="offers 1m, 5m"):
            await world.manager.add_coin("BTC", interval="2h")
        with pytest.raises(InvalidRequest, match="coin"):
            await world.manager.add_coin("..")
        with pytest.raises(InvalidRequest, match="future"):
            await world.manager.add_coin("BTC", since=world.clock.now_ms() + HOUR)
        with pytest.raises(UnknownExchange, match="kraken"):
            await world.manager.add_coin("BTC", exchange="kraken")
        assert await world.manager.list_targets() == []


async def test_a_new_target_is_filled_and_becomes_live() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
        (status,) = await world.manager.list_targets()
        assert await world.stored() == world.wanted()
        assert status.state is TargetState.LIVE
        assert status.last_entry == T0 + 24 * HOUR - FIVE
        assert status.lag_ms == world.clock.now_ms() - (T0 + 24 * HOUR)


async def test_a_candle_closes_by_the_clock_when_the_stream_is_mute() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(FIVE)
        assert await world.stored() == world.wanted()


async def test_forming_candles_still_arrive_when_rest_does_not_answer() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        world.exchange.fail_with = ExchangeUnavailable("503")
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            await world.update(T0 + 24 * HOUR)
            assert await first_of(FormingCandle, events) is not None


async def test_a_subscriber_gets_each_closed_candle_after_last_closed_once() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            started = await anext(events)
            assert started == SubscriptionStarted(BTC_5M, "BTC/USD", T0 + 24 * HOUR - FIVE)
            seen = []
            for _ in range(3):
                await world.pass_time(FIVE)
                seen.append((await first_of(ClosedCandle, events)).entry.timestamp)
            assert seen == [T0 + 24 * HOUR + at * FIVE for at in range(3)]


async def test_a_subscriber_from_a_time_gets_the_past_then_the_live_without_a_seam() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        start = T0 + 24 * HOUR - 4 * FIVE
        async with aclosing(world.manager.stream_realtime_data("BTC", from_ms=start - 1)) as events:
            await anext(events)
            seen = [(await first_of(ClosedCandle, events)).entry.timestamp]
            # A candle closes while the replay is being read.
            await world.pass_time(FIVE)
            seen += [(await first_of(ClosedCandle, events)).entry.timestamp for _ in range(4)]
        assert seen == [start + at * FIVE for at in range(5)]


async def test_a_replay_tells_the_gaps_of_the_past_in_their_place() -> None:
    world = Collecting()
    hole = T0 + 24 * HOUR - 3 * FIVE
    del world.exchange.candles["BTC/USD", "5m"][hole]
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with aclosing(
            world.manager.stream_realtime_data("BTC", from_ms=hole - FIVE)
        ) as events:
            await anext(events)
            told = [await anext(events) for _ in range(3)]
        assert isinstance(told[1], GapTold)
        assert told[1].gap.reason is GapReason.NO_TRADES
        assert told[1].gap.range.start == hole


async def test_who_resumes_beyond_the_mark_is_told_late_what_was_open_and_nothing_twice() -> None:
    world = Collecting()
    start = T0 + 24 * HOUR
    lost, resumed = start + FIVE, start + 4 * FIVE
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(4 * FIVE)
    # This reader was told everything before; one of it is not there any more.
    del world.raw.blobs[StoragePathUtility.get_raw_data_path("crypto.com", "BTC", lost)]
    world.exchange.fail_with = ExchangeUnavailable("503")
    world.assemble()
    async with world.running():
        stream = world.manager.stream_realtime_data("BTC", from_ms=resumed)
        async with aclosing(stream) as events:
            started = await first_of(SubscriptionStarted, events)
            assert started.last_closed == lost - FIVE
            world.exchange.fail_with = None
            await world.pass_time(2 * FIVE)
            told = [await first_of(ClosedCandle, events) for _ in range(2)]
        assert [(event.entry.timestamp, event.late) for event in told] == [
            (lost, True),
            (resumed, False),
        ]


async def test_a_restart_fills_what_was_missed_and_tells_it_in_order() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
    await world.clock.advance(3 * FIVE)
    world.assemble()
    async with world.running():
        await world.pass_time(10_000)
        assert await world.stored() == world.wanted()
        (status,) = await world.manager.list_targets()
        assert status.state is TargetState.LIVE
        assert len(world.exchange.running_streams) == 1


async def test_after_an_outage_everything_that_it_swallowed_is_fetched() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
        world.exchange.fail_with = ExchangeUnavailable("503")
        world.exchange.end_streams(world.exchange.fail_with)
        await world.pass_time(3 * HOUR)
        (status,) = await world.manager.list_targets()
        assert status.state is TargetState.DEGRADED
        world.exchange.fail_with = None
        await world.pass_time(MINUTE)
        await world.update(world.clock.now_ms() // FIVE * FIVE)
        assert await world.stored() == world.wanted()
        assert len(world.exchange.running_streams) == 1


async def test_an_outage_of_storage_is_caught_up_when_it_is_over() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
        world.raw.fail_with = StorageUnavailable("disk full")
        await world.pass_time(2 * FIVE)
        world.raw.fail_with = None
        await world.pass_time(2 * MINUTE)
        assert await world.stored() == world.wanted()


async def test_a_lost_feed_and_its_return_are_told_to_subscribers() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        await world.update(T0 + 24 * HOUR)
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            world.exchange.end_streams(ExchangeUnavailable("connection lost"))
            await world.pass_time(5_000)
            await world.update(T0 + 24 * HOUR)
            states = [(await first_of(StatusTold, events)).state for _ in range(2)]
        assert states == ["reconnecting", "connected"]


async def test_a_feed_gone_mute_has_its_connections_closed_and_starts_anew() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(3 * MINUTE)
        assert world.exchange.requests["reset_connections"] >= 1
        assert len(world.exchange.running_streams) == 1


async def test_the_book_at_the_close_comes_from_the_live_book() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(FIVE - 15_000)
        close = T0 + 24 * HOUR + FIVE
        world.exchange.book = book(close - 100)
        await world.pass_time(30_000)
        newest = await world.storage.get_latest_entry("crypto.com", "BTC")
        assert newest is not None
        assert newest.order_book == book(close - 100)
        assert world.exchange.requests["fetch_order_book"] == 0


async def test_a_book_of_another_moment_is_never_stored() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        world.exchange.book = book(T0 + 24 * HOUR + 20_000)
        await world.pass_time(FIVE + 30_000)
        newest = await world.storage.get_latest_entry("crypto.com", "BTC")
        assert newest is not None
        assert newest.order_book is None
        assert world.exchange.requests["fetch_order_book"] >= 1


async def test_removing_a_coin_stops_its_streams_and_keeps_its_data() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        status = await world.manager.remove_coin("BTC")
        assert status.target.coin == "BTC"
        assert world.exchange.running_streams == []
        assert await world.manager.list_targets() == []
        assert await world.targets.list_targets() == []
        assert await world.stored() == world.wanted()


async def test_adding_and_removing_wait_for_the_page_that_is_being_settled() -> None:
    world = Collecting()
    async with world.running():
        view = world.reconciler.view(BTC_5M, "BTC/USD")
        async with view.exclusive():
            adding = asyncio.create_task(world.manager.add_coin("BTC"))
            await settle_loop(100)
            assert not adding.done()
            assert await world.targets.list_targets() == []
        await adding
        await world.pass_time(10_000)
        async with view.exclusive():
            removing = asyncio.create_task(world.manager.remove_coin("BTC"))
            await settle_loop(100)
            assert not removing.done()
            assert len(await world.targets.list_targets()) == 1
        await removing
        assert await world.targets.list_targets() == []
        assert world.exchange.running_streams == []


async def test_a_removal_that_cannot_wait_any_longer_says_so_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("collection.manager.APART_TIMEOUT_S", 0.01)
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with world.reconciler.view(BTC_5M, "BTC/USD").exclusive():
            with pytest.raises(ExchangeUnavailable, match="is being settled"):
                await world.manager.remove_coin("BTC")
        (status,) = await world.manager.list_targets()
        assert status.state is not TargetState.REMOVING
        assert len(world.exchange.running_streams) == 1
        await world.manager.remove_coin("BTC")
        assert await world.manager.list_targets() == []


async def test_a_removed_target_with_subscribers_stays_until_the_last_one_leaves() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            status = await world.manager.remove_coin("BTC")
            assert status.state is TargetState.REMOVING
            assert len(await world.manager.list_targets()) == 1
        assert await world.manager.list_targets() == []


async def test_an_add_cancels_a_removal_that_waits() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            await world.manager.remove_coin("BTC")
            again = await world.manager.add_coin("BTC")
            assert again.status == "already_collecting"
        (status,) = await world.manager.list_targets()
        assert status.state is not TargetState.REMOVING


async def test_a_removal_that_fits_several_targets_names_them() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.manager.add_coin("BTC", interval="1m")
        with pytest.raises(InvalidRequest, match=r"crypto\.com:BTC:1m, crypto\.com:BTC:5m"):
            await world.manager.remove_coin("BTC")
        with pytest.raises(InvalidRequest, match="no target fits"):
            await world.manager.remove_coin("ETH")


async def test_a_stream_of_a_coin_that_is_not_collected_is_refused() -> None:
    world = Collecting()
    async with world.running():
        with pytest.raises(CoinNotAvailable, match="add it first"):
            await anext(aiter(world.manager.stream_realtime_data("BTC")))


async def test_availability_names_markets_and_who_could_not_be_asked() -> None:
    world = Collecting("crypto.com", "binance")
    world.exchanges["binance"].fail_with = ExchangeUnavailable("503")
    async with world.running():
        await world.manager.add_coin("BTC")
        found = await world.manager.check_availability("btc")
        assert found.available
        assert [(item.exchange, item.market, item.collecting) for item in found.markets] == [
            ("crypto.com", "BTC/USD", True)
        ]
        assert found.unreachable == ("binance",)


async def test_a_read_means_the_collected_series_then_the_stored_then_the_selected() -> None:
    world = Collecting("crypto.com", "binance")
    async with world.running():
        selected = await world.manager.resolve("BTC", exchange=None, interval="5m")
        assert (selected.series.exchange, selected.since) == ("crypto.com", None)
        await world.manager.add_coin("BTC", exchange="binance")
        await world.pass_time(10_000)
        collected = await world.manager.resolve("BTC", exchange=None, interval="5m")
        assert collected.series.exchange == "binance"
        await world.manager.remove_coin("BTC")
        stored = await world.manager.resolve("BTC", exchange=None, interval="5m")
        assert (stored.series.exchange, stored.since) == ("binance", None)


async def test_a_target_of_a_disabled_exchange_is_listed_degraded_and_can_be_removed() -> None:
    world = Collecting("crypto.com", "binance")
    async with world.running():
        await world.manager.add_coin("BTC", exchange="binance")
    del world.exchanges["binance"]
    world.assemble()
    async with world.running():
        (status,) = await world.manager.list_targets()
        assert (status.state, status.last_entry) == (TargetState.DEGRADED, None)
        await world.manager.remove_coin("BTC")
        assert await world.targets.list_targets() == []


async def test_second_looks_are_taken_before_since_too_and_end() -> None:
    world = Collecting()
    hole = T0 + 20 * HOUR
    del world.exchange.candles["BTC/USD", "5m"][hole]
    async with world.running():
        await world.manager.add_coin("BTC", since=world.clock.now_ms())
        await world.reconciler.settle(
            BTC_5M, "BTC/USD", TimeRange(hole - HOUR, hole + HOUR), priority=Priority.REQUEST
        )
        await world.pass_time(2 * MINUTE)
        asked = len(world.exchange.asked)
        assert world.reconciler.view(BTC_5M, "BTC/USD").looks_due() is None
        await world.pass_time(2 * MINUTE)
        assert len(world.exchange.asked) == asked


async def test_a_market_that_falls_silent_is_asked_at_most_twice_a_minute() -> None:
    world = Collecting()
    recorded = world.exchange.candles["BTC/USD", "5m"]
    for period in [period for period in recorded if period >= T0 + 24 * HOUR]:
        del recorded[period]
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(2 * MINUTE)
        asked = len(world.exchange.asked)
        await world.pass_time(3 * HOUR)
        assert len(world.exchange.asked) - asked < 2 * 3 * 60


async def test_a_period_that_settles_while_a_replay_reads_hides_none_of_its_neighbours() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        world.exchange.fail_with = ExchangeUnavailable("503")
        await world.pass_time(25 * MINUTE)
        end = world.clock.now_ms() // FIVE * FIVE
        read = world.raw.get_range

        async def settle_one_then_read(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            world.raw.get_range = read  # type: ignore[method-assign]
            await world.processor.process_settled([entry(end - 3 * FIVE)])
            return await read(*args, **kwargs)

        world.raw.get_range = settle_one_then_read  # type: ignore[method-assign]
        async with aclosing(
            world.manager.stream_realtime_data("BTC", from_ms=end - 6 * FIVE)
        ) as events:
            await anext(events)
            covered: list[int] = []
            while len(covered) < 6:
                event = await anext(events)
                if isinstance(event, ClosedCandle):
                    covered.append(event.entry.timestamp)
                elif isinstance(event, GapTold):
                    covered += range(event.gap.range.start, event.gap.range.end, FIVE)
        assert covered == [end - at * FIVE for at in (6, 5, 4, 3, 2, 1)]


async def test_an_open_gap_of_a_replay_is_told_again_when_it_is_proven_to_have_no_trades() -> None:
    world = Collecting()
    hole = T0 + 19 * HOUR
    del world.exchange.candles["BTC/USD", "5m"][hole]
    async with world.running():
        await world.manager.add_coin("BTC")
        world.exchange.fail_with = ExchangeUnavailable("503")
        await world.pass_time(5_000)
        async with aclosing(world.manager.stream_realtime_data("BTC", from_ms=hole)) as events:
            assert (await first_of(GapTold, events)).gap.reason is GapReason.UNREACHABLE
            world.exchange.fail_with = None
            await world.pass_time(4 * MINUTE)
            late = await first_of(GapTold, events)
        assert (late.gap.range.start, late.gap.reason, late.late) == (
            hole,
            GapReason.NO_TRADES,
            True,
        )


async def test_whoever_subscribes_while_a_coin_is_removed_is_told_so() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        deleting, delete = asyncio.Event(), world.targets.delete_target

        async def slowly(target_id: str, *, by: str = SERVICE) -> bool:
            await deleting.wait()
            return await delete(target_id, by=by)

        world.targets.delete_target = slowly  # type: ignore[method-assign]
        removal = asyncio.create_task(world.manager.remove_coin("BTC"))
        await settle_loop()
        with pytest.raises(CoinNotAvailable):
            await anext(world.manager.stream_realtime_data("BTC"))
        deleting.set()
        await removal


async def test_a_removal_that_waits_for_subscribers_survives_the_process() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            await world.manager.remove_coin("BTC")
            assert await world.targets.list_targets(enabled=True) == []
            await world.manager.add_coin("BTC")
            assert len(await world.targets.list_targets(enabled=True)) == 1


async def test_a_removal_that_the_table_refuses_leaves_the_coin_collected() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(10_000)
        world.targets.fail_with = TargetStoreUnavailable("away")
        with pytest.raises(TargetStoreUnavailable):
            await world.manager.remove_coin("BTC")
        world.targets.fail_with = None
        await world.pass_time(FIVE)
        assert await world.stored() == world.wanted()


async def test_a_document_found_broken_is_fetched_again_within_an_hour_or_so() -> None:
    world = Collecting()
    broken = T0 + 20 * HOUR
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
        await world.raw.save_entry("crypto.com", "BTC", broken, {"torn": True})
        assert broken not in await world.stored()
        await world.pass_time(HOUR + 2 * MINUTE)
        assert await world.stored() == world.wanted()


async def test_a_correction_is_told_also_when_its_batch_failed_after_writing_it() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(FIVE + 10_000)
        period = T0 + 24 * HOUR
        async with aclosing(world.manager.stream_realtime_data("BTC")) as events:
            await anext(events)
            world.exchange.put("BTC/USD", "5m", [candle(period, close=77.0)])
            save = world.raw.save_entries

            async def write_then_fail(*args: Any, **kwargs: Any) -> int:
                world.raw.save_entries = save  # type: ignore[method-assign]
                await save(*args, **kwargs)
                raise StorageUnavailable("half way")

            world.raw.save_entries = write_then_fail  # type: ignore[method-assign]
            await world.pass_time(10 * MINUTE)
            corrected = await first_of(ClosedCandle, events)
        assert (corrected.entry.timestamp, corrected.entry.revision) == (period, 2)


async def test_a_book_that_two_targets_share_outlives_one_of_them() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.manager.add_coin("BTC/USD")
        await world.pass_time(5_000)
        await world.manager.remove_coin("BTC/USD")
        close = T0 + 24 * HOUR + FIVE
        world.exchange.book = book(close)
        await world.pass_time(FIVE + 10_000)
        newest = await world.storage.get_latest_entry("crypto.com", "BTC")
        assert newest is not None
        assert newest.order_book == book(close)
        assert world.exchange.requests["fetch_order_book"] == 0


async def test_a_replay_from_before_everything_tells_what_is_not_offered_as_one_gap() -> None:
    world = Collecting()
    world.exchange.history_ms = 2 * 24 * HOUR
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(30_000)
        async with aclosing(world.manager.stream_realtime_data("BTC", from_ms=0)) as events:
            told = [
                await first_of(GapTold, events),
                await first_of(GapTold, events),
                await first_of(ClosedCandle, events),
            ]
        assert isinstance(told[2], ClosedCandle)
        assert told[2].entry.timestamp == T0


async def test_one_that_stands_by_serves_what_another_stores_and_changes_nothing() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
        other = await world.beside()

        for refused in (
            other.manager.add_coin("ETH"),
            other.manager.remove_coin("BTC"),
            anext(other.manager.stream_realtime_data("BTC")),
        ):
            with pytest.raises(NotTheCollector, match="another service collects"):
                await refused
        assert (await other.manager.resolve("BTC", exchange=None, interval="5m")).since is not None
        assert (await other.manager.check_availability("BTC")).markets[0].collecting

        world.raw.fail_with = StorageUnavailable("away")
        with pytest.raises(StorageUnavailable, match="away"):
            await other.manager.list_targets()
        world.raw.fail_with = None

        asked = len(world.exchange.asked)
        end = world.clock.now_ms() // FIVE * FIVE
        wanted = TimeRange(T0, end + FIVE)
        (before,) = await other.manager.list_targets()
        assert (before.state, before.last_entry) == (TargetState.DEGRADED, end - FIVE)
        report = await other.reconciler.settle(BTC_5M, "BTC/USD", wanted, priority=Priority.REQUEST)
        assert [gap.reason for gap in report.gaps] == [GapReason.PENDING]
        assert len(world.exchange.asked) == asked

        await world.pass_time(FIVE)
        (after,) = await other.manager.list_targets()
        assert after.last_entry == end
        view = other.reconciler.view(BTC_5M, "BTC/USD")
        await view.load(TimeRange(end, end + FIVE))
        assert view.stored_ranges(TimeRange(end, end + FIVE)) == [TimeRange(end, end + FIVE)]


async def test_one_that_takes_over_resumes_every_target_from_what_is_stored() -> None:
    world = Collecting()
    async with world.running():
        await world.manager.add_coin("BTC")
        await world.pass_time(MINUTE)
    other = await world.beside()
    await world.pass_time(3 * FIVE)
    other.storage.collect()
    other.reconciler.collect()
    async with other.running():
        await other.pass_time(MINUTE)
        assert await other.stored() == world.wanted(other.clock.now_ms() // FIVE * FIVE)
        await other.manager.stand_by()
        assert other.exchange.running_streams == []
