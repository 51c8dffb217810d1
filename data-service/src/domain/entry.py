"""An entry: one closed candle with the order book at its close, and its JSON document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NoReturn

import msgspec

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import Level, OrderBook
from domain.series import Series
from errors import InvalidEntry, InvalidRequest, UnknownSchema

SCHEMA: Final = 1
# A book belongs to a period when it was taken this close to the period's end, in ms.
BOOK_TOLERANCE_MS: Final = 10_000
Source = Literal["stream", "rest"]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One closed candle of one market.

    ``source`` is ``stream`` when the candle was settled as it closed, live, and ``rest`` when it
    was filled in later. ``revision`` starts at 1 and grows with each correction by the exchange.

    Raises:
        InvalidEntry: the candle's timestamp opens no period of the interval, the revision is
            below 1, or the book is further than 10 s from the period's end.
    """

    series: Series
    market: str
    candle: Candle
    order_book: OrderBook | None = None
    source: Source = "rest"
    revision: int = 1

    def __post_init__(self) -> None:
        interval = self.series.interval
        if not interval.is_aligned(self.candle.timestamp):
            raise InvalidEntry(
                f"timestamp {self.candle.timestamp} opens no {self.series.interval} period; "
                f"use {self.series.interval.floor(self.candle.timestamp)}"
            )
        if self.revision < 1:
            raise InvalidEntry(f"revision {self.revision} is below 1")
        if (
            self.order_book is not None
            and abs(self.order_book.timestamp - self.end) > BOOK_TOLERANCE_MS
        ):
            raise InvalidEntry(
                f"order book of {self.order_book.timestamp} is more than 10 s from the period's "
                f"end at {self.end}"
            )

    @property
    def timestamp(self) -> int:
        """The open of the period in ms."""
        return self.candle.timestamp

    @property
    def end(self) -> int:
        """The end of the period in ms: the open of the next one."""
        return self.candle.timestamp + self.series.interval.milliseconds

    def with_revision(self, revision: int) -> Entry:
        return msgspec.structs.replace(self, revision=revision)

    def with_order_book(self, order_book: OrderBook | None) -> Entry:
        return msgspec.structs.replace(self, order_book=order_book)

    def to_document(self) -> dict[str, Any]:
        """The JSON document that is stored, keys in their published order."""
        book = self.order_book
        return {
            "exchange": self.series.exchange,
            "coin": self.series.coin,
            "market": self.market,
            "interval": self.series.interval.name,
            "timestamp": self.candle.timestamp,
            "open": self.candle.open,
            "high": self.candle.high,
            "low": self.candle.low,
            "close": self.candle.close,
            "volume": self.candle.volume,
            "order_book": None
            if book is None
            else {
                "timestamp": book.timestamp,
                "bids": [list(level) for level in book.bids],
                "asks": [list(level) for level in book.asks],
            },
            "source": self.source,
            "revision": self.revision,
            "schema": SCHEMA,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Entry:
        """Read a stored document.

        Raises:
            InvalidEntry: a field is missing or wrong.
            UnknownSchema: the document's schema is not this one.
        """
        _check_schema(document)
        try:
            fields = msgspec.convert(document, _Document)
        except msgspec.ValidationError as exc:
            raise InvalidEntry(str(exc)) from exc
        try:
            series = Series(fields.exchange, fields.coin, Interval.parse(fields.interval))
        except InvalidRequest as exc:
            raise InvalidEntry(exc.message) from exc
        return _entry(fields, series)

    @classmethod
    def from_json(cls, content: bytes, series: Series) -> Entry:
        """Read the bytes of a stored document of ``series``; see ``entry_reader``."""
        return entry_reader(series)(content)


def entry_reader(series: Series) -> Callable[[bytes], Entry]:
    """Reads bytes of stored documents of ``series``, many times as fast as ``from_document``.

    What it gives raises:
        InvalidEntry: they are no JSON object, a field is missing or wrong, or the entry is of
            another series.
        UnknownSchema: the document's schema is not this one.
    """
    # A year is read by a hundred thousand calls: what is the same in all is looked up once.
    exchange, coin, interval = series.exchange, series.coin, series.interval.name
    decode: Callable[[bytes], _Document] = _decode

    def read(content: bytes) -> Entry:
        try:
            fields = decode(content)
        except msgspec.DecodeError as exc:
            _refuse(content, exc)
        if fields.schema != SCHEMA:
            raise _unknown_schema(fields.schema)
        if fields.coin != coin or fields.exchange != exchange or fields.interval != interval:
            raise InvalidEntry(
                f"document of {fields.exchange} {fields.coin} {fields.interval} is none of {series}"
            )
        if fields.order_book is not None:
            return _entry(fields, series)
        candle = Candle(
            fields.timestamp, fields.open, fields.high, fields.low, fields.close, fields.volume
        )
        return Entry(series, fields.market, candle, None, fields.source, fields.revision)

    return read


_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _BookFields(msgspec.Struct, gc=False):
    timestamp: int
    bids: tuple[Level, ...]
    asks: tuple[Level, ...]


class _Document(msgspec.Struct, gc=False):
    """The fields of a document and their types, as the decoder checks them."""

    exchange: _Text
    coin: _Text
    market: _Text
    interval: _Text
    timestamp: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    order_book: _BookFields | None
    source: Source
    revision: int
    schema: int


_decode: Final = msgspec.json.Decoder(_Document).decode


def _entry(fields: _Document, series: Series) -> Entry:
    book = fields.order_book
    return Entry(
        series,
        fields.market,
        Candle(fields.timestamp, fields.open, fields.high, fields.low, fields.close, fields.volume),
        None if book is None else OrderBook(book.timestamp, book.bids, book.asks),
        fields.source,
        fields.revision,
    )


def _refuse(content: bytes, error: msgspec.DecodeError) -> NoReturn:
    """Raise what is wrong with bytes that did not decode: a newer schema may have other fields."""
    try:
        document = msgspec.json.decode(content)
    except msgspec.DecodeError as exc:
        raise InvalidEntry(f"document is no JSON: {exc}") from exc
    if isinstance(document, dict):
        _check_schema(document)
    raise InvalidEntry(str(error)) from error


def _check_schema(document: Mapping[str, Any]) -> None:
    """Refuse a document of another schema; what has none at all is no document of ours."""
    schema = document.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != SCHEMA:
        raise _unknown_schema(schema)


def _unknown_schema(schema: int) -> UnknownSchema:
    return UnknownSchema(
        f"document of schema {schema} cannot be read, this service knows schema {SCHEMA}: "
        f"upgrade the service, or move the document out of the storage root"
    )
