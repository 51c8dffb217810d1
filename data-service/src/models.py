"""What goes over the wire: requests and answers of HTTP and MCP, and a WebSocket client's messages.

Times are read as integer milliseconds since the epoch or as ISO 8601 and are always integer
milliseconds afterwards; what is sent is always the latter. Requests refuse fields that they do not
know, so that a typing error never passes for a default.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from domain.interval import DEFAULT_INTERVAL, KNOWN_INTERVALS, Interval
from errors import InvalidRequest

HISTORY_COLUMNS: Final = ("timestamp", "open", "high", "low", "close", "volume")
DEFAULT_LIMIT: Final = 500
MAX_LIMIT: Final = 5_000
DEFAULT_CHUNK: Final = 1_000
MAX_REQUEST_ID: Final = 64
# Errors of this type are values that cannot be meant; every other error is one of shape.
WRONG_VALUE: Final = "wrong_value"

_TAKES_TIME: Final = (
    "takes integer milliseconds since the epoch, such as 1795338600000, or ISO 8601, such as "
    "2026-11-22T09:10:00Z (UTC where no offset is given)"
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS: Final = 253_402_300_799_999  # the end of the year 9999
# Between these, a number is a time of our days in seconds, and nobody's in milliseconds.
_SECONDS_FROM, _SECONDS_TO = 1_000_000_000, 100_000_000_000
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}")
_COMPACT_DATE: Final = re.compile(r"(?:19|20)[0-9]{6}")
# In a query, a plus that was not percent-encoded arrives as a space.
_LOST_PLUS: Final = re.compile(r"(.+T[0-9:.,]+) ([0-9]{2}:?[0-9]{2})")


def parse_time(value: object) -> int:
    """Milliseconds since the epoch from an integer, its digits, or ISO 8601.

    Raises:
        PydanticCustomError: of type ``wrong_value`` for text and numbers that are no such time,
            ``wrong_type`` for anything else; the message says what is right.
    """
    if isinstance(value, str):
        text = value.strip()
        if _INTEGER.fullmatch(text) and not _COMPACT_DATE.fullmatch(text):
            return _in_reach(int(text))
        return _in_reach(_from_iso(text))
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_reach(value)
    if isinstance(value, float):
        raise _wrong(f"{_TAKES_TIME}; got {value!r}, which is no integer")
    raise PydanticCustomError("wrong_type", "{problem}", {"problem": _TAKES_TIME})


def _from_iso(text: str) -> int:
    lost = _LOST_PLUS.fullmatch(text)
    try:
        if _COMPACT_DATE.fullmatch(text):
            raise ValueError("neither milliseconds nor a date that is meant beyond doubt")
        moment = datetime.fromisoformat(f"{lost[1]}+{lost[2]}" if lost else text)
    except ValueError:
        raise _wrong(f"{_TAKES_TIME}; got {text[:40]!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _in_reach(milliseconds: int) -> int:
    if _SECONDS_FROM <= milliseconds < _SECONDS_TO:
        raise _wrong(f"{_TAKES_TIME}; got {milliseconds}, which looks like seconds")
    if not 0 <= milliseconds <= _LAST_MS:
        raise _wrong(f"{_TAKES_TIME}, of the years 1970 to 9999; got {milliseconds}")
    return milliseconds


def _wrong(problem: str) -> PydanticCustomError:
    return PydanticCustomError(WRONG_VALUE, "{problem}", {"problem": problem})


def _none_when_blank(value: object) -> object:
    """Agents and forms send an empty text, or null, for what they leave out."""
    return None if isinstance(value, str) and not value.strip() else value


def _optional_time(value: object) -> int | None:
    value = _none_when_blank(value)
    return None if value is None else parse_time(value)


def _printable(value: str) -> str:
    if not value.isprintable() or any(character.isspace() for character in value):
        raise _wrong("takes a name without spaces and control characters")
    return value


def _existing_interval(value: str) -> str:
    try:
        return Interval.parse(value).name
    except InvalidRequest as exc:
        raise _wrong(exc.message) from None


# The schemas are written out: a union's first type would be all that an MCP client is told.
Coin = Annotated[
    str,
    StringConstraints(strip_whitespace=True, to_upper=True, min_length=1, max_length=64),
    AfterValidator(_printable),
    Field(
        description="A base currency such as BTC, or an exact spot symbol such as BTC/EUR when "
        "the quote currency matters. Upper and lower case mean the same.",
        examples=["BTC"],
    ),
]
Exchange = Annotated[
    Annotated[
        str,
        StringConstraints(strip_whitespace=True, to_lower=True, max_length=64),
        AfterValidator(_printable),
    ]
    | None,
    BeforeValidator(_none_when_blank),
    WithJsonSchema({"type": ["string", "null"]}),
    Field(
        description="The exchange's public name, such as crypto.com. Leave it out unless a "
        "certain exchange is wanted: the service then takes the one that collects the coin, or "
        "the most preferred one that lists it.",
        examples=["crypto.com"],
    ),
]
IntervalName = Annotated[
    str,
    AfterValidator(_existing_interval),
    WithJsonSchema({"type": "string", "enum": list(KNOWN_INTERVALS)}),
    Field(description="The length of a candle, such as 1m, 5m, 1h or 1d.", examples=["5m"]),
]
OptionalInterval = Annotated[
    Annotated[str, AfterValidator(_existing_interval)] | None,
    BeforeValidator(_none_when_blank),
    WithJsonSchema({"type": ["string", "null"], "enum": [*KNOWN_INTERVALS, None]}),
    Field(description="The length of a candle, such as 5m.", examples=["5m"]),
]
_TIME_FORMATS: Final = (
    "Integer milliseconds since the epoch, or ISO 8601; UTC where no offset is given."
)
Time = Annotated[
    int,
    BeforeValidator(parse_time),
    WithJsonSchema({"type": ["integer", "string"]}),
]
OptionalTime = Annotated[
    int | None,
    BeforeValidator(_optional_time),
    WithJsonSchema({"type": ["integer", "string", "null"]}),
]
RequestId = Annotated[str, StringConstraints(max_length=MAX_REQUEST_ID)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_range(start: int, end: int | None) -> None:
    if end is not None and end <= start:
        raise _wrong(f"end takes a time after start; got start {start} and end {end}")


# --- requests ------------------------------------------------------------------------------------


class AddCoinRequest(_Request):
    """Collect a coin from now on, and back to ``since`` (ms)."""

    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL
    since: Annotated[
        OptionalTime,
        Field(
            description="From when on the series is wanted complete. By default about two weeks "
            f"back. {_TIME_FORMATS}",
            examples=["2026-11-22T09:10:00Z"],
        ),
    ] = None


class RemoveCoinRequest(_Request):
    coin: Coin
    exchange: Exchange = None
    interval: OptionalInterval = None


class CheckAvailabilityRequest(_Request):
    coin: Coin
    exchange: Exchange = None


class CurrentDataRequest(_Request):
    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL


class CoverageRequest(_Request):
    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL


class SummaryRequest(_Request):
    """``[start, end)`` in ms; without ``end``, up to now."""

    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL
    start: Annotated[
        Time,
        Field(
            description=f"The range begins here, inclusive. {_TIME_FORMATS}",
            examples=["2026-11-22T09:10:00Z"],
        ),
    ]
    end: Annotated[
        OptionalTime,
        Field(
            description=f"The range ends here, exclusive; now when left out. {_TIME_FORMATS}",
            examples=["2026-11-22T12:00:00Z"],
        ),
    ] = None

    @model_validator(mode="after")
    def _end_after_start(self) -> Self:
        _check_range(self.start, self.end)
        return self


class HistoricalDataRequest(SummaryRequest):
    """One page of ``[start, end)`` in ms; without ``end``, up to now."""

    limit: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_LIMIT,
            description="The most rows to return. When there are more, next_start in the answer "
            "is the start of the next page.",
            examples=[DEFAULT_LIMIT],
        ),
    ] = DEFAULT_LIMIT


# --- answers -------------------------------------------------------------------------------------


class TargetModel(BaseModel):
    """A series that the service keeps complete, and how it does. Times in ms."""

    target_id: str
    coin: str
    exchange: str
    exchange_id: str
    market: str
    interval: str
    enabled: bool
    since: int
    created_at: int
    last_updated: int
    state: str
    last_entry: int | None
    lag_ms: int | None


class AddCoinResponse(BaseModel):
    status: Literal["added", "already_collecting"]
    target: TargetModel
    unreachable: Annotated[
        list[str],
        Field(
            description="Exchanges that would have been chosen first and could not be asked; "
            "left out where there are none."
        ),
    ] = []


class RemoveCoinResponse(BaseModel):
    status: Literal["removed"]
    target: TargetModel


class ListCoinsResponse(BaseModel):
    targets: list[TargetModel]


class MarketModel(BaseModel):
    exchange: str
    market: str
    collecting: bool


class CheckAvailabilityResponse(BaseModel):
    coin: str
    available: bool
    markets: list[MarketModel]
    unreachable: list[str]


class OrderBookModel(BaseModel):
    """The top of the book at ``timestamp`` (ms); levels are ``[price, amount]``."""

    timestamp: int
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]


class CurrentEntryModel(BaseModel):
    """The newest candle. While ``closed`` is false it is still forming: nothing of it is stored
    yet, its ``revision`` is 0 and it has no order book."""

    exchange: str
    coin: str
    market: str
    interval: str
    timestamp: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    order_book: OrderBookModel | None
    source: Literal["stream", "rest"]
    revision: int
    # The published name of the document's version; pydantic's own ``schema`` is long deprecated.
    schema_version: Annotated[int, Field(alias="schema")]
    closed: bool


class CurrentDataResponse(BaseModel):
    data: CurrentEntryModel
    age_ms: int


class GapModel(BaseModel):
    """``count`` missing candles in ``[start, end)`` (ms), and why."""

    start: int
    end: int
    count: int
    reason: Literal["pending", "unreachable", "no_trades", "not_offered"]


class SourcesModel(BaseModel):
    """How many rows came from where."""

    storage: int
    exchange: int


Row = tuple[int, float, float, float, float, float]


class HistoricalDataResponse(BaseModel):
    exchange: str
    coin: str
    market: str | None
    interval: str
    start: int
    end: int
    columns: list[str]
    rows: list[Row]
    count: int
    next_start: int | None
    gaps: list[GapModel]
    sources: SourcesModel


class CandleModel(BaseModel):
    timestamp: int
    open: float
    high: float
    low: float
    close: float
    volume: float


class SummaryResponse(BaseModel):
    exchange: str
    coin: str
    market: str | None
    interval: str
    start: int
    end: int
    count: int
    first: CandleModel
    last: CandleModel
    high: float
    low: float
    change_percent: Annotated[
        float, Field(description="From the first candle's open to the last candle's close.")
    ]
    volume: float
    vwap: Annotated[
        float | None,
        Field(
            description="Approximate volume-weighted average price: typical prices "
            "(high + low + close) / 3 weighted by volume. Null without volume."
        ),
    ]
    vwap_method: str
    volatility: Annotated[
        float | None,
        Field(
            description="Sample standard deviation of the logarithmic returns between closes, per "
            "candle, not annualised. Null with fewer than three candles."
        ),
    ]
    max_drawdown_percent: Annotated[
        float, Field(description="The deepest fall of a close below an earlier close.")
    ]
    columns: list[str]
    rows: Annotated[list[Row], Field(description="At most 50 candles, evenly resampled.")]
    periods_per_row: Annotated[
        int, Field(description="How many candles of the interval each row stands for.")
    ]
    gaps: list[GapModel]


class RangeModel(BaseModel):
    start: int
    end: int
    count: int


class CoverageResponse(BaseModel):
    first: int | None
    last: int | None
    expected: int
    stored: int
    with_order_book: int
    ranges: list[RangeModel]
    gaps: list[GapModel]


class ProblemModel(BaseModel):
    """RFC 9457 problem details; ``code`` is what programs should look at."""

    type: str
    title: str
    status: int
    detail: str
    code: str


class TokenResponse(BaseModel):
    access_token: str
    token_type: Literal["bearer"]
    expires_in: int
    scope: str


_Revision = Annotated[
    str | None, Field(description="Of the sources that the image was built of, where it says so.")
]


class LiveResponse(BaseModel):
    status: Literal["alive"]
    revision: _Revision = None


class ReadyResponse(BaseModel):
    status: Literal["ready", "not_ready"]
    reasons: list[str]
    warnings: list[str]
    revision: _Revision = None


# --- a WebSocket client's messages ---------------------------------------------------------------


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    request_id: RequestId | None = None


class SubscribeRealtime(_Message):
    """``from`` (ms) asks for every closed candle from that time on before the live ones."""

    type: Literal["subscribe_realtime"]
    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL
    channel: str = "candles"
    from_: Annotated[OptionalTime, Field(alias="from")] = None


class UnsubscribeRealtime(_Message):
    type: Literal["unsubscribe_realtime"]
    subscription_id: str


class RequestHistorical(_Message):
    type: Literal["request_historical"]
    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL
    start: Time
    end: Time
    chunk_size: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_CHUNK

    @model_validator(mode="after")
    def _end_after_start(self) -> Self:
        _check_range(self.start, self.end)
        return self


class Cancel(_Message):
    """``request_id`` is that of a running ``request_historical``."""

    type: Literal["cancel"]
    request_id: RequestId


class RequestCurrent(_Message):
    type: Literal["request_current"]
    coin: Coin
    exchange: Exchange = None
    interval: IntervalName = DEFAULT_INTERVAL


class Ping(_Message):
    type: Literal["ping"]


ClientMessage = (
    SubscribeRealtime | UnsubscribeRealtime | RequestHistorical | Cancel | RequestCurrent | Ping
)
CLIENT_MESSAGES: Final[dict[str, type[BaseModel]]] = {
    "subscribe_realtime": SubscribeRealtime,
    "unsubscribe_realtime": UnsubscribeRealtime,
    "request_historical": RequestHistorical,
    "cancel": Cancel,
    "request_current": RequestCurrent,
    "ping": Ping,
}
_client_message: Final[TypeAdapter[ClientMessage]] = TypeAdapter(
    Annotated[ClientMessage, Field(discriminator="type")]
)


def parse_client_message(document: dict[str, Any]) -> ClientMessage:
    """One message of a WebSocket client, by its ``type``.

    Raises:
        pydantic.ValidationError: the message has another shape, or a value that cannot be meant.
    """
    return _client_message.validate_python(document)
