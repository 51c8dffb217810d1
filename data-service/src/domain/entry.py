"""An entry: one closed candle with the order book at its close, and its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

from domain.candle import Candle
from domain.interval import Interval
from domain.order_book import OrderBook
from domain.series import Series
from errors import InvalidEntry, InvalidRequest

SCHEMA: Final = 1
# A book belongs to a period when it was taken this close to the period's end, in ms.
BOOK_TOLERANCE_MS: Final = 10_000
Source = Literal["stream", "rest"]


@dataclass(frozen=True, slots=True)
class Entry:
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
        if not self.series.interval.is_aligned(self.candle.timestamp):
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
        return replace(self, revision=revision)

    def with_order_book(self, order_book: OrderBook | None) -> Entry:
        return replace(self, order_book=order_book)

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
            InvalidEntry: a field is missing or wrong, or the document's schema is not this one.
        """
        schema = document.get("schema")
        if schema != SCHEMA:
            raise InvalidEntry(
                f"document of schema {schema!r} cannot be read, this service knows schema "
                f"{SCHEMA}: upgrade the service, or move the document out of the storage root"
            )
        try:
            source = document["source"]
            if source not in ("stream", "rest"):
                raise InvalidEntry(f"source {source!r} is neither 'stream' nor 'rest'")
            return cls(
                series=Series(
                    exchange=_text(document, "exchange"),
                    coin=_text(document, "coin"),
                    interval=Interval.parse(_text(document, "interval")),
                ),
                market=_text(document, "market"),
                candle=Candle(
                    timestamp=_integer(document, "timestamp"),
                    open=_number(document, "open"),
                    high=_number(document, "high"),
                    low=_number(document, "low"),
                    close=_number(document, "close"),
                    volume=_number(document, "volume"),
                ),
                order_book=_order_book(document["order_book"]),
                source=cast("Source", source),
                revision=_integer(document, "revision"),
            )
        except KeyError as exc:
            raise InvalidEntry(f"document has no field {exc.args[0]!r}") from exc
        except InvalidRequest as exc:
            raise InvalidEntry(exc.message) from exc


def _text(document: Mapping[str, Any], field: str) -> str:
    value = document[field]
    if not isinstance(value, str) or not value:
        raise InvalidEntry(f"{field} needs a text, got {value!r}")
    return value


def _integer(document: Mapping[str, Any], field: str) -> int:
    value = document[field]
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidEntry(f"{field} needs an integer, got {value!r}")
    return value


def _number(document: Mapping[str, Any], field: str) -> float:
    value = document[field]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidEntry(f"{field} needs a number, got {value!r}")
    return float(value)


def _order_book(value: Any) -> OrderBook | None:
    if value is None:
        return None
    try:
        return OrderBook(
            timestamp=_integer(value, "timestamp"),
            bids=tuple((float(price), float(amount)) for price, amount in value["bids"]),
            asks=tuple((float(price), float(amount)) for price, amount in value["asks"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise InvalidEntry(f"order_book is malformed: {exc!r}") from exc
