"""Every error of the service has one outside."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

import errors
from api.problems import (
    InvalidMessage,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    TooManyRequests,
    TooManySubscriptions,
    explain,
    problem_of,
    problem_response,
    report,
    report_unexpected,
)
from collection.interfaces import SlowConsumer
from errors import DataServiceError
from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
)
from historical.interfaces import (
    CandleTableDenied,
    CandleTableError,
    CandleTableMismatch,
    CandleTableUnavailable,
)
from models import parse_client_message
from storage.interfaces import StorageConflict, StorageError, StorageUnavailable
from target_management.interfaces import (
    TargetError,
    TargetSchemaMismatch,
    TargetStoreDenied,
    TargetStoreUnavailable,
)

OUTSIDE: dict[type[DataServiceError], tuple[str, int]] = {
    DataServiceError: ("internal", 500),
    errors.InvalidRequest: ("invalid_request", 422),
    errors.InvalidEntry: ("internal", 500),
    errors.UnknownExchange: ("unknown_exchange", 404),
    errors.CoinNotAvailable: ("coin_not_available", 404),
    errors.NoData: ("no_data", 404),
    errors.Unauthorized: ("unauthorized", 401),
    errors.Forbidden: ("forbidden", 403),
    errors.ConfigurationError: ("internal", 500),
    ExchangeError: ("internal", 500),
    ExchangeUnavailable: ("exchange_unavailable", 503),
    ExchangeRateLimited: ("exchange_unavailable", 503),
    BadExchangeAnswer: ("exchange_unavailable", 503),
    ExchangeRefused: ("invalid_request", 422),
    StorageError: ("internal", 500),
    StorageUnavailable: ("storage_unavailable", 503),
    StorageConflict: ("internal", 500),
    TargetError: ("internal", 500),
    TargetStoreUnavailable: ("storage_unavailable", 503),
    TargetStoreDenied: ("storage_unavailable", 503),
    TargetSchemaMismatch: ("internal", 500),
    CandleTableError: ("internal", 500),
    CandleTableUnavailable: ("storage_unavailable", 503),
    CandleTableDenied: ("storage_unavailable", 503),
    CandleTableMismatch: ("internal", 500),
    SlowConsumer: ("slow_consumer", 429),
    PayloadTooLarge: ("payload_too_large", 413),
    InvalidMessage: ("invalid_message", 422),
    TooManySubscriptions: ("too_many_subscriptions", 429),
    TooManyRequests: ("too_many_requests", 429),
    NotFound: ("not_found", 404),
    MethodNotAllowed: ("method_not_allowed", 405),
}


def every_kind(root: type[DataServiceError]) -> Iterator[type[DataServiceError]]:
    yield root
    for kind in root.__subclasses__():
        yield from every_kind(kind)


@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_error_has_its_code_and_status(kind: type[DataServiceError]) -> None:
    problem = problem_of(kind("what happened"))
    assert (problem.code, problem.status) == OUTSIDE[kind]
    assert (problem.detail == "what happened") == (problem.status != 500)


def test_whatever_may_be_tried_again_says_when() -> None:
    for kind in every_kind(DataServiceError):
        problem = problem_of(kind("what happened"))
        if kind.retryable:
            assert problem.status == 503, kind
        assert (problem.retry_after is not None) == (problem.status in (429, 503)), kind


@pytest.mark.parametrize(
    ("delay", "told"),
    [(None, 5), (0.0, 1), (0.2, 1), (7.0, 7), (7.01, 8), (float("inf"), 5), (float("nan"), 5)],
)
def test_the_delay_is_told_in_whole_seconds(delay: float | None, told: int) -> None:
    assert problem_of(ExchangeUnavailable("away", retry_after=delay)).retry_after == told


def test_the_answer_is_a_problem_document() -> None:
    response = problem_response(problem_of(StorageUnavailable("the disk is full", retry_after=3)))
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "3"
    assert json.loads(bytes(response.body)) == {
        "type": "urn:cb-trade:problem:storage_unavailable",
        "title": "Storage unavailable",
        "status": 503,
        "detail": "the disk is full",
        "code": "storage_unavailable",
    }


def test_only_failures_of_the_service_are_logged_and_only_the_unforeseen_with_traceback() -> None:
    crash, conflict = RuntimeError("a bug"), StorageConflict("another market")
    with capture_logs() as logs:
        report(errors.NoData("nothing is known"))
        report(StorageUnavailable("the disk is full"))
        report(conflict)
        report_unexpected(crash)
    assert [(line["log_level"], line["code"], line.get("exc_info")) for line in logs] == [
        ("error", "storage_unavailable", None),
        ("error", "internal", conflict),
        ("error", "internal", crash),
    ]


def test_findings_name_the_field_and_what_is_right() -> None:
    with pytest.raises(ValidationError) as refused:
        parse_client_message(
            {
                "type": "request_historical",
                "start": 1.5,
                "end": 2,
                "chunk_size": 0,
                "colour": "red",
            }
        )
    text = explain(refused.value.errors(), takes=("coin", "start"))
    assert text.split("; ")[0] == "coin is missing"
    assert "start takes integer milliseconds since the epoch" in text
    assert "chunk_size should be greater than or equal to 1" in text
    assert text.endswith("colour does not exist here; use coin, start")


def test_a_long_list_of_findings_is_cut_short() -> None:
    with pytest.raises(ValidationError) as refused:
        parse_client_message({"type": "ping", **{f"extra{n}": n for n in range(8)}})
    assert explain(refused.value.errors()).endswith("; and 3 more")
