"""The errors of the service.

    DataServiceError
    |-- InvalidRequest            what was asked cannot be done, and what would be right
    |-- InvalidEntry              a candle, book or document breaks the rules of its shape
    |   `-- UnknownSchema         a document of a schema that this version does not know
    |-- UnknownExchange           no such exchange is enabled
    |-- CoinNotAvailable          no exchange asked lists the coin
    |-- NoData                    nothing stored, nothing to fetch
    |-- Unauthorized, Forbidden   who is calling is not known, or may not
    |-- ConfigurationError        a setting stops the start
    |-- ExchangeError             exchange_source: an exchange did not do what was asked
    |   |-- ExchangeUnavailable   retryable: away, overloaded, refusing for now, or not answering
    |   |-- ExchangeRateLimited   retryable after a delay that the exchange named
    |   |-- BadExchangeAnswer     retryable: answered with something that cannot be believed
    |   `-- ExchangeRefused       terminal: the request itself is wrong for this exchange
    |-- StorageError              storage: the backend did not do what was asked
    |   |-- StorageUnavailable    retryable: away, full or read-only for now
    |   |   |-- StorageDenied     credentials, roles or permissions are wrong
    |   |   |-- StorageThrottled  asked too much, retryable after a delay that it named
    |   |   |-- NotTheCollector   another service collects into this root
    |   |   `-- SpoolFull         the backend is away and the spool takes no more
    |   |-- StaleVersion          terminal: somebody else wrote there first; read it again
    |   `-- StorageConflict       terminal: an entry of another market, a root of another kind
    |-- CandleTableError          historical: the table of sealed candles did not do what was asked
    |   |-- CandleTableUnavailable  retryable: the table cannot be reached
    |   |   `-- CandleTableDenied   credentials or permissions are wrong
    |   `-- CandleTableMismatch   terminal: the table has other columns
    `-- TargetError               target_management: the table did not do what was asked
        |-- TargetStoreUnavailable  retryable: the table cannot be reached
        |   `-- TargetStoreDenied   credentials or permissions are wrong
        `-- TargetSchemaMismatch    terminal: the table has other columns

The branches of exchange_source, storage, historical and target_management stand in the
``interfaces.py`` of those packages, beside the methods that raise them.

``retryable`` is the class's, the delay is data: ``retry_after`` in real seconds, or None.
"""

from __future__ import annotations

from typing import ClassVar


class DataServiceError(Exception):
    """Root of every error that this service raises on purpose."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidRequest(DataServiceError):
    """What was asked cannot be done; the message says what would be right."""


class InvalidEntry(DataServiceError):
    """A candle, book or document breaks the rules of its shape."""


class UnknownSchema(InvalidEntry):
    """A document is of a schema that this version does not know: it may be a newer one's."""


class UnknownExchange(DataServiceError):
    """No exchange of that name is enabled."""


class CoinNotAvailable(DataServiceError):
    """No exchange that could be asked lists an active spot market for the coin."""


class NoData(DataServiceError):
    """Nothing is stored and nothing could be fetched."""


class Unauthorized(DataServiceError):
    """No valid token came with the request."""


class Forbidden(DataServiceError):
    """The token is valid and lacks the scope."""


class ConfigurationError(DataServiceError):
    """A setting is wrong or missing; the message is the one line that a user sees."""
