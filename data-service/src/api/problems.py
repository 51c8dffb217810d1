"""What a failure looks like outside: one table for HTTP, MCP and WebSocket.

HTTP answers are RFC 9457 problem details with a ``code``; a WebSocket gets the same code and
message. Only failures of the service itself (5xx) are logged as errors, and only an unexpected one
with its traceback; nothing of that one is told outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from collection.interfaces import SlowConsumer
from errors import (
    CoinNotAvailable,
    DataServiceError,
    Forbidden,
    InvalidRequest,
    NoData,
    Unauthorized,
    UnknownExchange,
)
from exchange_source.interfaces import ExchangeRefused, ExchangeUnavailable
from historical.interfaces import CandleTableUnavailable
from models import WRONG_VALUE
from storage.interfaces import StorageUnavailable
from target_management.interfaces import TargetStoreUnavailable

MEDIA_TYPE: Final = "application/problem+json"
# How long a client should wait when nobody knows better, in seconds.
DEFAULT_RETRY_AFTER_S: Final = 5
_SHOWN_ERRORS: Final = 5

log = structlog.get_logger(__name__)


class PayloadTooLarge(DataServiceError):
    """A body or message is larger than this service reads."""


class InvalidMessage(DataServiceError):
    """A WebSocket message is no JSON object of a known type with its fields."""


class TooManySubscriptions(DataServiceError):
    """A connection has as many subscriptions as it may."""


class TooManyRequests(DataServiceError):
    """A connection has as many running histories as it may."""


class NotFound(DataServiceError):
    """There is nothing at this path."""


class MethodNotAllowed(DataServiceError):
    """The path takes other methods."""


@dataclass(frozen=True, slots=True)
class Problem:
    """``retry_after`` is in whole seconds, None where asking again changes nothing."""

    code: str
    status: int
    detail: str
    retry_after: int | None = None

    @property
    def type(self) -> str:
        return f"urn:cb-trade:problem:{self.code}"

    @property
    def title(self) -> str:
        return self.code.replace("_", " ").capitalize()


# The first line that fits decides, so a kind stands above the kind it belongs to.
_TABLE: Final[tuple[tuple[type[DataServiceError], str, HTTPStatus], ...]] = (
    (InvalidRequest, "invalid_request", HTTPStatus.UNPROCESSABLE_ENTITY),
    (ExchangeRefused, "invalid_request", HTTPStatus.UNPROCESSABLE_ENTITY),
    (InvalidMessage, "invalid_message", HTTPStatus.UNPROCESSABLE_ENTITY),
    (Unauthorized, "unauthorized", HTTPStatus.UNAUTHORIZED),
    (Forbidden, "forbidden", HTTPStatus.FORBIDDEN),
    (NotFound, "not_found", HTTPStatus.NOT_FOUND),
    (MethodNotAllowed, "method_not_allowed", HTTPStatus.METHOD_NOT_ALLOWED),
    (UnknownExchange, "unknown_exchange", HTTPStatus.NOT_FOUND),
    (CoinNotAvailable, "coin_not_available", HTTPStatus.NOT_FOUND),
    (NoData, "no_data", HTTPStatus.NOT_FOUND),
    (PayloadTooLarge, "payload_too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (TooManySubscriptions, "too_many_subscriptions", HTTPStatus.TOO_MANY_REQUESTS),
    (TooManyRequests, "too_many_requests", HTTPStatus.TOO_MANY_REQUESTS),
    (SlowConsumer, "slow_consumer", HTTPStatus.TOO_MANY_REQUESTS),
    (ExchangeUnavailable, "exchange_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
    (StorageUnavailable, "storage_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
    (TargetStoreUnavailable, "storage_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
    (CandleTableUnavailable, "storage_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
)
INTERNAL: Final = Problem(
    "internal", HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed; its log says why"
)


def problem_of(error: DataServiceError) -> Problem:
    """The outside of a domain error; one without a line of its own is ``internal``."""
    for kind, code, status in _TABLE:
        if isinstance(error, kind):
            return Problem(code, status, error.message, _retry_after(status, error.retry_after))
    return INTERNAL


def _retry_after(status: int, seconds: float | None) -> int | None:
    if status not in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        return None
    if seconds is None or not math.isfinite(seconds):
        return DEFAULT_RETRY_AFTER_S
    return max(1, math.ceil(seconds))


def not_serving(doing: str) -> Problem:
    """What whoever asks is told while the service is ``doing`` something else than to serve."""
    return Problem(
        "storage_unavailable",
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"the service is {doing}",
        DEFAULT_RETRY_AFTER_S,
    )


def problem_document(problem: Problem) -> dict[str, Any]:
    """What the body of an answer says of ``problem`` (RFC 9457)."""
    return {
        "type": problem.type,
        "title": problem.title,
        "status": int(problem.status),
        "detail": problem.detail,
        "code": problem.code,
    }


def problem_response(problem: Problem, *, allow: str | None = None) -> Response:
    """The answer that carries ``problem``; ``allow`` are the methods that the path takes."""
    headers: dict[str, str] = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if allow is not None:
        headers["Allow"] = allow
    return JSONResponse(
        problem_document(problem),
        status_code=problem.status,
        headers=headers,
        media_type=MEDIA_TYPE,
    )


def report(error: DataServiceError) -> Problem:
    """The outside of a domain error, after logging what is the service's own failure."""
    problem = problem_of(error)
    if problem is INTERNAL:
        log.error("request_failed", code=problem.code, exc_info=error)
    elif problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request_failed", code=problem.code, detail=problem.detail)
    return problem


def report_unexpected(error: Exception) -> Problem:
    """``internal``, after logging the traceback of something that nobody foresaw."""
    log.error("request_crashed", code=INTERNAL.code, exc_info=error)
    return INTERNAL


def explain(errors: Sequence[Any], *, skip: int = 1, takes: Sequence[str] = ()) -> str:
    """One line for a person from pydantic's findings: each field, and what is right.

    ``skip`` is how many parts of a location are no field: ``body``, ``query``, a message's type.
    ``takes`` names the fields that exist, for those that do not.
    """
    told = [_explain_one(error, skip, takes) for error in errors[:_SHOWN_ERRORS]]
    left = len(errors) - len(told)
    return "; ".join(told) + (f"; and {left} more" if left else "")


def _explain_one(error: Any, skip: int, takes: Sequence[str]) -> str:
    field = ".".join(str(part) for part in error["loc"][skip:])
    match error["type"]:
        case "missing":
            text = "is missing"
        case "extra_forbidden":
            text = (
                f"does not exist here; use {', '.join(takes)}" if takes else "does not exist here"
            )
        case "json_invalid":
            return "the body takes valid JSON"
        case _ as kind if kind == WRONG_VALUE:
            # These already read as a sentence; a field's name in front would say it twice.
            text = str(error["msg"])
            return text if text.startswith(field) else f"{field} {text}"
        case _:
            text = str(error["msg"]).replace("Input should", "should").replace("String", "text")
            text = text[:1].lower() + text[1:]
    return f"{field or 'the body'} {text}"


async def _on_domain_error(
    connection: Request | WebSocket, error: DataServiceError
) -> Response | None:
    response = problem_response(report(error))
    if isinstance(connection, WebSocket):
        # Only the handshake raises; from then on the session answers with messages.
        await connection.send_denial_response(response)
        return None
    return response


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    return problem_response(problem_of(InvalidRequest(explain(error.errors()))))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What the framework itself refuses."""
    path = request.url.path
    failure: DataServiceError
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            failure = NotFound(f"there is nothing at {path}; /openapi.json lists what there is")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            failure = MethodNotAllowed(f"{path} does not take {request.method}")
        case _:
            failure = InvalidRequest(str(error.detail))
    return problem_response(problem_of(failure), allow=(error.headers or {}).get("Allow"))


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure that reaches the application its outside."""
    # A handler gets only what it is registered for, which the framework's types cannot say.
    handlers: dict[type[Exception], Any] = {
        DataServiceError: _on_domain_error,
        RequestValidationError: _on_validation_error,
        HTTPException: _on_http_exception,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
