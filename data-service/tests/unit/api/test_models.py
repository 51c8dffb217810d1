"""What requests mean, and what they cannot mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from models import (
    AddCoinRequest,
    CheckAvailabilityRequest,
    HistoricalDataRequest,
    RemoveCoinRequest,
    RequestHistorical,
    SubscribeRealtime,
    parse_client_message,
    parse_time,
)

NOON = 1_795_348_800_000  # 2026-11-22T12:00:00Z


class TestTimes:
    @pytest.mark.parametrize(
        "written",
        [
            NOON,
            str(NOON),
            f" {NOON} ",
            "2026-11-22T12:00:00Z",
            "2026-11-22T12:00:00",
            "2026-11-22 12:00",
            "2026-11-22T12:00:00.000Z",
            "20261122T120000Z",
            "2026-11-22T14:00:00+02:00",
            "2026-11-22T14:00:00 02:00",  # a plus that a query turned into a space
            "2026-11-22T03:00:00-0900",
        ],
    )
    def test_one_moment_may_be_written_in_many_ways(self, written: object) -> None:
        assert parse_time(written) == NOON

    def test_a_date_is_its_first_moment(self) -> None:
        assert parse_time("2026-11-22") == NOON - 12 * 3_600_000

    @pytest.mark.parametrize("written", [0, "0", 1, "1970-01-01"])
    def test_the_beginning_of_time_may_be_asked_for(self, written: object) -> None:
        assert parse_time(written) in (0, 1)

    @pytest.mark.parametrize(
        "written",
        [
            1_795_348_800_000.0,
            1.5,
            float("nan"),
            float("inf"),
            "1795348800000.0",
            "",
            "noon",
            "2026-13-01",
            "2026-11-22T25:00",
            "20261122",  # a date or milliseconds: nobody can tell
            -1,
            "-1",
            "1969-12-31",
            1_795_348_800,  # seconds
            "1795348800",
            1_795_348_800_000_000,  # microseconds
            10**30,
            "9" * 30,
            "9" * 5000,
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
        ],
    )
    def test_what_is_no_such_time_is_refused_with_what_is_right(self, written: object) -> None:
        with pytest.raises(PydanticCustomError, match="takes integer milliseconds") as refused:
            parse_time(written)
        assert refused.value.type == "wrong_value"
        assert len(refused.value.message()) < 300

    @pytest.mark.parametrize("written", [None, True, [NOON], {"ms": NOON}])
    def test_what_is_neither_number_nor_text_has_the_wrong_type(self, written: object) -> None:
        with pytest.raises(PydanticCustomError) as refused:
            parse_time(written)
        assert refused.value.type == "wrong_type"

    @given(
        st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),  # noqa: DTZ001
        st.integers(-14 * 60, 14 * 60),
    )
    def test_every_iso_time_means_its_moment(self, naive: datetime, offset_min: int) -> None:
        moment = naive.replace(tzinfo=timezone(timedelta(minutes=offset_min)))
        expected = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
        assert parse_time(moment.isoformat()) == expected

    @given(st.text(max_size=40) | st.integers() | st.floats())
    def test_nothing_but_a_refusal_comes_of_nonsense(self, written: object) -> None:
        try:
            milliseconds = parse_time(written)
        except PydanticCustomError:
            return
        assert isinstance(milliseconds, int)
        assert 0 <= milliseconds < 253_402_300_800_000


class TestRequests:
    def test_a_coin_is_upper_cased_and_the_interval_is_five_minutes(self) -> None:
        request = AddCoinRequest.model_validate({"coin": " btc/eur "})
        assert (request.coin, request.exchange, request.interval, request.since) == (
            "BTC/EUR",
            None,
            "5m",
            None,
        )

    @pytest.mark.parametrize("left_out", [None, "", "  "])
    def test_what_is_blank_is_left_out(self, left_out: str | None) -> None:
        request = AddCoinRequest.model_validate(
            {"coin": "BTC", "exchange": left_out, "since": left_out}
        )
        assert (request.exchange, request.since) == (None, None)
        removal = RemoveCoinRequest.model_validate({"coin": "BTC", "interval": left_out})
        assert removal.interval is None

    def test_an_exchange_is_lower_cased(self) -> None:
        request = CheckAvailabilityRequest.model_validate({"coin": "BTC", "exchange": "Crypto.com"})
        assert request.exchange == "crypto.com"

    @pytest.mark.parametrize(
        "coin", ["", " ", "B TC", "B\nTC", "B\u2028TC", "\u0000", "x" * 65, None, 7, ["BTC"]]
    )
    def test_a_coin_that_is_no_name_is_refused(self, coin: object) -> None:
        with pytest.raises(ValidationError):
            AddCoinRequest.model_validate({"coin": coin})

    @pytest.mark.parametrize("interval", ["7m", "5M", "5", "", 5, "1M"])
    def test_an_interval_that_does_not_exist_is_refused(self, interval: object) -> None:
        with pytest.raises(ValidationError):
            AddCoinRequest.model_validate({"coin": "BTC", "interval": interval})

    def test_a_page_has_500_rows_and_at_most_5000(self) -> None:
        fields: dict[str, Any] = {"coin": "BTC", "start": 0}
        assert HistoricalDataRequest.model_validate(fields).limit == 500
        assert HistoricalDataRequest.model_validate({**fields, "limit": 5000}).limit == 5000
        for limit in (0, -1, 5001):
            with pytest.raises(ValidationError):
                HistoricalDataRequest.model_validate({**fields, "limit": limit})

    def test_times_are_told_to_agents_as_number_or_text(self) -> None:
        schema = HistoricalDataRequest.model_json_schema()
        assert schema["properties"]["start"]["type"] == ["integer", "string"]
        assert schema["properties"]["end"]["type"] == ["integer", "string", "null"]
        assert schema["required"] == ["coin", "start"]


class TestClientMessages:
    def test_the_type_decides_the_fields(self) -> None:
        message = parse_client_message(
            {"type": "subscribe_realtime", "coin": "btc", "from": "2026-11-22T12:00:00Z"}
        )
        assert isinstance(message, SubscribeRealtime)
        assert (message.coin, message.channel, message.from_) == ("BTC", "candles", NOON)

    def test_chunks_have_1000_rows_and_at_most_5000(self) -> None:
        fields: dict[str, Any] = {"type": "request_historical", "coin": "B", "start": 0, "end": 1}
        message = parse_client_message(fields)
        assert isinstance(message, RequestHistorical)
        assert message.chunk_size == 1000
        parse_client_message({**fields, "chunk_size": 5000})
        for chunk_size in (0, 5001, "1000", 1000.0, None, True):
            with pytest.raises(ValidationError):
                parse_client_message({**fields, "chunk_size": chunk_size})

    @pytest.mark.parametrize(
        "message",
        [
            {"type": "ping", "request_id": "x" * 65},
            {"type": "ping", "request_id": 7},
            {"type": "ping", "coin": "BTC"},
            {"type": "pong"},
            {"type": None},
            {},
            {"type": "cancel"},
            {"type": "subscribe_realtime", "coin": "BTC", "from_": 0},
            {"type": "unsubscribe_realtime", "subscription_id": 1},
            {"type": "request_historical", "coin": "BTC", "start": 0},
        ],
    )
    def test_another_shape_is_refused(self, message: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            parse_client_message(message)
