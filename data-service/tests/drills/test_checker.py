"""The checker of the drills finds what it is there to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.drills.checker import (
    Connection,
    Revision,
    Row,
    Series,
    Truth,
    check_subscriber,
    compare,
    read_stored,
)
from tests.drills.schedule import LONG, MINUTE, SHORT, Form, make_schedule

BTC = Series("BTC", "BTC/USD", "1m", MINUTE)
T0 = 1_510_056_000_000  # 2017-11-07T12:00:00Z
NAMES = ("open", "high", "low", "close", "volume")


def row(number: int) -> Row:
    return (100.0 + number, 103.0 + number, 99.0 + number, 101.0 + number, 1.0)


# Ten periods, of which the third and the seventh had no trades.
ROWS = {T0 + at * MINUTE: row(at) for at in range(10) if at not in (3, 7)}
END = T0 + 10 * MINUTE
REVISED = Revision(T0 + 5 * MINUTE, T0 + 9 * MINUTE, (105.0, 108.0, 104.0, 104.0, 2.0))
TRUTH = Truth.of(ROWS, [REVISED])


def document(at: int, values: Row, **changes: Any) -> dict[str, Any]:
    book = {"timestamp": at + MINUTE - 50, "bids": [[99.0, 1.0]], "asks": [[101.0, 1.0]]}
    return {
        "exchange": "crypto.com",
        "coin": "BTC",
        "market": "BTC/USD",
        "interval": "1m",
        "timestamp": at,
        **dict(zip(NAMES, values, strict=True)),
        "order_book": book,
        "source": "stream",
        "revision": 1,
        "schema": 1,
        **changes,
    }


def path_of(root: Path, at: int) -> Path:
    minute = (at - T0) // MINUTE
    folder = root / "raw_data/crypto.com/BTC/2017/11/07"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"2017110712{minute:02}00_1m.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What is stored when all is well."""
    for at, values in TRUTH.final(T0, END).items():
        path_of(tmp_path, at).write_text(json.dumps(document(at, values)))
    return tmp_path


def test_what_is_right_has_no_fault(root: Path) -> None:
    stored = read_stored(root, BTC)
    assert stored.problems == []
    assert compare(stored, TRUTH, T0, END).told(BTC) == []
    assert stored.with_book == set(ROWS)


def test_a_deletion_a_wrong_value_and_an_invention_are_found(root: Path) -> None:
    path_of(root, T0 + MINUTE).unlink()
    # The value before the revision.
    path_of(root, T0 + 5 * MINUTE).write_text(json.dumps(document(T0 + 5 * MINUTE, row(5))))
    path_of(root, T0 + 7 * MINUTE).write_text(json.dumps(document(T0 + 7 * MINUTE, row(7))))
    found = compare(read_stored(root, BTC), TRUTH, T0, END)
    assert found.missing == [T0 + MINUTE]
    assert found.different == [T0 + 5 * MINUTE]
    assert found.extra == [T0 + 7 * MINUTE]
    assert len(found.told(BTC)) == 3


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"market": "BTC/USDT"}, "market"),
        ({"timestamp": T0 + MINUTE}, "timestamp"),
        ({"revision": 0}, "revision"),
        ({"source": "guess"}, "source"),
        ({"order_book": {"timestamp": T0, "bids": [[1, 1]], "asks": [[2, 1]]}}, "from its close"),
        (
            {"order_book": {"timestamp": T0 + MINUTE, "bids": [[3, 1]], "asks": [[2, 1]]}},
            "crosses",
        ),
    ],
)
def test_a_document_that_breaks_its_own_rules_is_found(
    root: Path, changes: dict[str, Any], what: str
) -> None:
    path_of(root, T0).write_text(json.dumps(document(T0, row(0), **changes)))
    (problem,) = read_stored(root, BTC).problems
    assert what in problem


def test_what_is_no_document_is_found(root: Path) -> None:
    path_of(root, T0).write_text('{"exchange": "cry')
    (root / "raw_data/crypto.com/BTC/2017/11/07/20171107120000.json").write_text("{}")
    assert len(read_stored(root, BTC).problems) == 2


def heard(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages as they arrive, numbered."""
    return [
        {"subscription_id": "s", "sequence": number, **message}
        for number, message in enumerate(messages, 1)
    ]


def closed(
    number: int, values: Row | None = None, *, revision: int = 1, **more: Any
) -> dict[str, Any]:
    data: dict[str, Any] = {"timestamp": T0 + number * MINUTE, "closed": True, "revision": revision}
    data |= dict(zip(NAMES, values or row(number), strict=True))
    return {"type": "realtime_data", "data": data, **more}


def gap(number: int, reason: str = "no_trades", **more: Any) -> dict[str, Any]:
    start = T0 + number * MINUTE
    return {"type": "gap", "start": start, "end": start + MINUTE, "reason": reason, **more}


RIGHT = [closed(0), closed(1), closed(2), gap(3), closed(4), closed(5), closed(6), gap(7)]
RIGHT += [closed(8), closed(9), closed(5, REVISED.row, revision=2)]


def judged(messages: list[dict[str, Any]]) -> list[str]:
    subscribed = {"subscription_id": "s", "last_closed": T0 - MINUTE}
    connection = Connection(BTC, None, subscribed, list(messages))
    return check_subscriber([connection], TRUTH, frozenset(), END)


def test_a_subscriber_that_was_told_everything_has_no_complaint() -> None:
    assert judged(heard(*RIGHT)) == []


def test_an_open_gap_that_is_told_late_is_right() -> None:
    told = [*RIGHT]
    told[1] = gap(1, "pending")
    assert judged(heard(*told, closed(1, late=True))) == []


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([*RIGHT[:2], RIGHT[1], *RIGHT[2:]], "told twice"),
        ([*RIGHT[:1], *RIGHT[2:]], "was due"),
        ([RIGHT[1], RIGHT[0], *RIGHT[2:]], "was due"),
        ([*RIGHT[:3], *RIGHT[4:]], "was due"),
        (RIGHT[:-1], "told in the end"),
        ([*RIGHT[:2], closed(2, row(4)), *RIGHT[3:]], "none that the exchange ever gave"),
        ([*RIGHT, closed(2, late=True)], "late"),
        ([*RIGHT[:3], gap(3, "pending"), *RIGHT[4:]], "was told as pending"),
        (RIGHT[:6], "nothing was told from"),
    ],
    ids=[
        "twice",
        "one left out",
        "out of order",
        "a hole left out",
        "a correction left out",
        "a value of nowhere",
        "late without a gap",
        "a gap left open",
        "it stops",
    ],
)
def test_a_subscriber_that_was_told_wrongly_complains(
    messages: list[dict[str, Any]], what: str
) -> None:
    assert any(what in problem for problem in judged(heard(*messages)))


def test_a_number_left_out_is_found() -> None:
    messages = heard(*RIGHT)
    del messages[0]
    assert any("sequence" in problem for problem in judged(messages))


@pytest.mark.parametrize("form", [SHORT, LONG], ids=["short", "long"])
def test_a_schedule_is_made_by_its_seed_alone_and_has_every_kind_of_fault(form: Form) -> None:
    rows = {T0 + at * MINUTE: row(at % 50) for at in range(1_000)}
    first, second = (make_schedule(7, form, {BTC: rows}, T0) for _ in range(2))
    assert first == second
    assert make_schedule(8, form, {BTC: rows}, T0) != first
    kinds = {timed.fault["kind"] for timed in first.faults}
    assert kinds == {
        "drop_sockets", "mute_sockets", "ws_broken_frame", "ws_refuse", "refuse_connections",
        "rest_status", "rest_garbage", "rest_empty", "rest_delay", "rest_hang",
        "rest_missing_rows", "final_update_withheld", "candle_late", "candle_revised",
    }  # fmt: skip
    assert len(first.kills) == form.kills + form.kills // 5
    moments = [moment for kill in first.kills for moment in (kill.at, kill.again)]
    assert moments == sorted(moments)
    assert all(first.since < timed.at < first.end for timed in first.faults)
    assert len({revision.at - revision.timestamp for revision in first.revisions[BTC]}) == 5
    ups = [at for at in range(first.start, first.over + 10 * MINUTE, MINUTE) if first.is_up(at)]
    assert first.live_from <= min(ups) < first.end
    assert max(ups) < first.over
    assert not any(kill.at <= at < kill.again for kill in first.kills for at in ups)
