"""The routes. Descriptions are written for an agent that reads them as a tool's description.

Coin names travel in the query or the body, never in the path: ``BTC/EUR`` is one.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Depends, Query, Request, Response, WebSocket
from fastapi.security import OAuth2PasswordRequestForm
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api.metrics import ApiMetrics
from api.services import Services, WithServices
from api.session import Session
from api.wire import (
    VWAP_METHOD,
    availability_out,
    coverage_out,
    current_out,
    history_out,
    summary_out,
    target_out,
)
from auth.interfaces import READ_SCOPE, WRITE_SCOPE, Principal
from auth.module import (
    FULL_SCOPE,
    LOGIN_TTL_S,
    WEBSOCKET_PROTOCOL,
    get_websocket_user,
    require_scope,
)
from config import Settings
from models import (
    AddCoinRequest,
    AddCoinResponse,
    CheckAvailabilityRequest,
    CheckAvailabilityResponse,
    CoverageRequest,
    CoverageResponse,
    CurrentDataRequest,
    CurrentDataResponse,
    HistoricalDataRequest,
    HistoricalDataResponse,
    ListCoinsResponse,
    LiveResponse,
    ProblemModel,
    ReadyResponse,
    RemoveCoinRequest,
    RemoveCoinResponse,
    SummaryRequest,
    SummaryResponse,
    TokenResponse,
)

OPERATIONS: Final = (
    "add_coin",
    "remove_coin",
    "list_coins",
    "check_availability",
    "get_current_data",
    "get_historical_data",
    "summarize_history",
    "get_coverage",
)

_TARGET: Final = {
    "target_id": "crypto.com:BTC:5m",
    "coin": "BTC",
    "exchange": "crypto.com",
    "exchange_id": "cryptocom",
    "market": "BTC/USD",
    "interval": "5m",
    "enabled": True,
    "since": 1794129000000,
    "created_at": 1795338612345,
    "last_updated": 1795338612345,
    "state": "live",
    "last_entry": 1795338300000,
    "lag_ms": 12345,
}
_SERIES: Final = {
    "exchange": "crypto.com",
    "coin": "BTC",
    "market": "BTC/USD",
    "interval": "5m",
}
_CANDLE: Final = {
    "timestamp": 1795338600000,
    "open": 93059.9,
    "high": 93059.9,
    "low": 92781.8,
    "close": 92781.8,
    "volume": 0.8837,
}
_COLUMNS: Final = list(_CANDLE)
_ROW: Final = list(_CANDLE.values())
_GAP: Final = {"start": 1795338900000, "end": 1795339200000, "count": 1, "reason": "no_trades"}


def _ok(example: dict[str, Any], description: str = "Done") -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


def _problems(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The failures of a route, for its documentation."""
    known = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY)
    return {
        status.value: {"model": ProblemModel, "description": status.phrase}
        for status in (*known, *statuses)
    }


_READ: Final = Depends(require_scope(READ_SCOPE))
Writer = Annotated[Principal, Depends(require_scope(WRITE_SCOPE))]
_NOT_FOUND: Final = HTTPStatus.NOT_FOUND
_UNAVAILABLE: Final = HTTPStatus.SERVICE_UNAVAILABLE

operations: Final = APIRouter(prefix="/api/v1", tags=["market data"])


@operations.post(
    "/coins",
    operation_id="add_coin",
    summary="Start collecting a coin",
    status_code=HTTPStatus.CREATED,
    response_model=AddCoinResponse,
    response_model_exclude_unset=True,
    responses={
        201: _ok({"status": "added", "target": {**_TARGET, "state": "starting"}}),
        200: _ok(
            {"status": "already_collecting", "target": _TARGET}, "It is being collected already"
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def add_coin(
    request: AddCoinRequest, services: WithServices, user: Writer, response: Response
) -> dict[str, Any]:
    """Collect the candles of a coin from now on, and fill its recent history in the background.

    Calling it again for the same coin changes nothing and answers `already_collecting`. Fails
    with `coin_not_available` when no exchange lists the coin; `check_availability` tells
    beforehand. `unreachable` names the exchanges that would have been chosen first and could not
    be asked. History can be read without adding a coin.
    """
    result = await services.collection.add_coin(
        request.coin,
        exchange=request.exchange,
        interval=request.interval,
        since=request.since,
        by=user.subject,
    )
    if result.status == "already_collecting":
        response.status_code = HTTPStatus.OK
    answer = {"status": result.status, "target": target_out(result.target)}
    return answer | ({"unreachable": list(result.unreachable)} if result.unreachable else {})


@operations.delete(
    "/coins",
    operation_id="remove_coin",
    summary="Stop collecting a coin",
    response_model=RemoveCoinResponse,
    responses={
        200: _ok({"status": "removed", "target": {**_TARGET, "enabled": False}}),
        **_problems(_UNAVAILABLE),
    },
)
async def remove_coin(
    query: Annotated[RemoveCoinRequest, Query()], services: WithServices, user: Writer
) -> dict[str, Any]:
    """Stop collecting a coin. What is stored stays and can still be read.

    When the coin is collected in several intervals or on several exchanges, say which one: the
    error names them.
    """
    removed = await services.collection.remove_coin(
        query.coin, exchange=query.exchange, interval=query.interval, by=user.subject
    )
    return {"status": "removed", "target": target_out(removed)}


@operations.get(
    "/coins",
    operation_id="list_coins",
    summary="List what is collected",
    dependencies=[_READ],
    response_model=ListCoinsResponse,
    responses={200: _ok({"targets": [_TARGET]}), **_problems(_UNAVAILABLE)},
)
async def list_coins(services: WithServices) -> dict[str, Any]:
    """Everything that this service keeps complete, and how it does.

    `since` is from when on a series is wanted, `last_entry` the open of its newest stored candle,
    `lag_ms` how far the market is past that candle. `state` is one of `starting`, `live`,
    `backfilling`, `degraded`, `removing`, `delisted`.
    """
    targets = await services.collection.list_targets()
    return {"targets": [target_out(target) for target in targets]}


@operations.get(
    "/availability",
    operation_id="check_availability",
    summary="Find out where a coin is traded",
    dependencies=[_READ],
    response_model=CheckAvailabilityResponse,
    responses={
        200: _ok(
            {
                "coin": "BTC",
                "available": True,
                "markets": [{"exchange": "crypto.com", "market": "BTC/USD", "collecting": True}],
                "unreachable": [],
            }
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def check_availability(
    query: Annotated[CheckAvailabilityRequest, Query()], services: WithServices
) -> dict[str, Any]:
    """Which of the enabled exchanges list a coin, as which market, and whether it is collected.

    `unreachable` names exchanges that could not be asked: they may list the coin too. A coin that
    nobody lists is no error, but `available: false`.
    """
    found = await services.collection.check_availability(query.coin, exchange=query.exchange)
    return availability_out(found)


@operations.get(
    "/current",
    operation_id="get_current_data",
    summary="Get the newest candle of a coin",
    dependencies=[_READ],
    response_model=CurrentDataResponse,
    responses={
        200: _ok(
            {
                "data": {
                    **_SERIES,
                    **_CANDLE,
                    "order_book": None,
                    "source": "stream",
                    "revision": 1,
                    "schema": 1,
                    "closed": True,
                },
                "age_ms": 1200,
            }
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def get_current_data(
    query: Annotated[CurrentDataRequest, Query()], services: WithServices
) -> dict[str, Any]:
    """The newest candle, and how old what it says is.

    `close` is the last price known. With `closed: false` the candle's period is not over and its
    values still change. `timestamp` is the open of the period in ms, UTC.
    """
    current = await services.history.get_most_current_data(
        query.coin, exchange=query.exchange, interval=query.interval
    )
    return current_out(current)


@operations.get(
    "/history",
    operation_id="get_historical_data",
    summary="Get the candles of a range",
    dependencies=[_READ],
    response_model=HistoricalDataResponse,
    responses={
        200: _ok(
            {
                **_SERIES,
                "start": 1795338600000,
                "end": 1795425000000,
                "columns": _COLUMNS,
                "rows": [_ROW],
                "count": 1,
                "next_start": 1795339200000,
                "gaps": [_GAP],
                "sources": {"storage": 1, "exchange": 0},
            }
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def get_historical_data(
    query: Annotated[HistoricalDataRequest, Query()], services: WithServices
) -> dict[str, Any]:
    """Closed candles that open in `[start, end)`, ascending, one page at a time.

    Each of `rows` is a list in the order of `columns`. When `next_start` is not null, ask again
    with it as `start` and the same `end`. `gaps` are periods without a candle: `no_trades` nobody
    traded; `not_offered` older than the exchange gives; `pending` and `unreachable` may be had
    later. For a long range, `summarize_history` says more in fewer words.
    """
    history = await services.history.get_historical_data(
        query.coin,
        query.start,
        _end(query, services),
        exchange=query.exchange,
        interval=query.interval,
        limit=query.limit,
    )
    return history_out(history)


@operations.get(
    "/summary",
    operation_id="summarize_history",
    summary="Summarize a range in a few numbers",
    dependencies=[_READ],
    response_model=SummaryResponse,
    responses={
        200: _ok(
            {
                **_SERIES,
                "start": 1795338600000,
                "end": 1795339200000,
                "count": 1,
                "first": _CANDLE,
                "last": _CANDLE,
                "high": 93059.9,
                "low": 92781.8,
                "change_percent": -0.2988,
                "volume": 0.8837,
                "vwap": 92874.5,
                "vwap_method": VWAP_METHOD,
                "volatility": None,
                "max_drawdown_percent": 0.0,
                "columns": _COLUMNS,
                "rows": [_ROW],
                "periods_per_row": 1,
                "gaps": [_GAP],
            }
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def summarize_history(
    query: Annotated[SummaryRequest, Query()], services: WithServices
) -> dict[str, Any]:
    """How a coin did between `start` and `end`: first, last, highest and lowest candle values,
    change, volume, approximate volume-weighted average price, volatility and deepest drawdown,
    with at most 50 evenly resampled candles to see the shape.

    `change_percent` is from the first open to the last close. `volatility` is the standard
    deviation of the logarithmic returns per candle, not annualised. Look at `gaps` before
    concluding anything from a range that is not complete.
    """
    summary = await services.history.summarize_history(
        query.coin,
        query.start,
        _end(query, services),
        exchange=query.exchange,
        interval=query.interval,
    )
    return summary_out(summary)


@operations.get(
    "/coverage",
    operation_id="get_coverage",
    summary="See how complete the stored history is",
    dependencies=[_READ],
    response_model=CoverageResponse,
    responses={
        200: _ok(
            {
                "first": 1795338300000,
                "last": 1795338600000,
                "expected": 3,
                "stored": 2,
                "with_order_book": 1,
                "ranges": [{"start": 1795338300000, "end": 1795338900000, "count": 2}],
                "gaps": [_GAP],
            }
        ),
        **_problems(_NOT_FOUND, _UNAVAILABLE),
    },
)
async def get_coverage(
    query: Annotated[CoverageRequest, Query()], services: WithServices
) -> dict[str, Any]:
    """Which candles are stored and which are missing, and why, since the coin was wanted.

    Counts are numbers of candles: `expected` from the target's `since`, or the first stored
    candle, to now; `with_order_book` those that have an order book from their close.
    """
    coverage = await services.history.get_coverage(
        query.coin, exchange=query.exchange, interval=query.interval
    )
    return coverage_out(coverage)


def _end(query: SummaryRequest, services: Services) -> int:
    """Where the range ends; now is the market's."""
    return services.clock.now_ms() if query.end is None else query.end


open_routes: Final = APIRouter(tags=["operations"])


@open_routes.get(
    "/health/live",
    operation_id="health_live",
    response_model=LiveResponse,
    response_model_exclude_none=True,
)
async def health_live(services: WithServices) -> dict[str, Any]:
    """Whether the process answers."""
    return {"status": "alive", "revision": services.settings.revision}


@open_routes.get(
    "/health/ready",
    operation_id="health_ready",
    response_model=ReadyResponse,
    response_model_exclude_none=True,
    responses={503: {"model": ReadyResponse, "description": "Not now, and why"}},
)
async def health_ready(services: WithServices, response: Response) -> dict[str, Any]:
    """Whether the service can do its work now."""
    readiness = await services.health.readiness()
    if readiness.reasons:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return {
        "status": "not_ready" if readiness.reasons else "ready",
        "reasons": readiness.reasons,
        "warnings": readiness.warnings,
        "revision": services.settings.revision,
    }


@open_routes.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    registry = cast("ApiMetrics", request.app.state.metrics).registry
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _issue(
    form: Annotated[OAuth2PasswordRequestForm, Depends()],
    services: WithServices,
    response: Response,
) -> dict[str, Any]:
    """A token for one of the configured users."""
    token = await services.auth.login(form.username, form.password)
    response.headers["Cache-Control"] = "no-store"
    return {
        "access_token": token,
        "token_type": "bearer",
        "expires_in": LOGIN_TTL_S,
        "scope": FULL_SCOPE,
    }


def token_routes(settings: Settings) -> APIRouter:
    """``POST /auth/token``, where ``AUTH_USERS`` is set; no route at all otherwise."""
    router = APIRouter(tags=["operations"])
    if settings.auth_users:
        router.add_api_route(
            "/auth/token",
            _issue,
            methods=["POST"],
            operation_id="issue_token",
            response_model=TokenResponse,
            responses={401: {"model": ProblemModel, "description": "User and password do not fit"}},
        )
    return router


socket_routes: Final = APIRouter()


@socket_routes.websocket("/ws/data")
async def websocket_data(
    websocket: WebSocket,
    user: Annotated[Principal, Depends(get_websocket_user)],
    services: WithServices,
) -> None:
    """Live candles, streamed history and the newest candle over one connection."""
    offered = websocket.scope.get("subprotocols", [])
    await websocket.accept(WEBSOCKET_PROTOCOL if WEBSOCKET_PROTOCOL in offered else None)
    await Session(websocket, user, services, websocket.app.state.metrics).run()
