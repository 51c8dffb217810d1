"""What goes wrong at an exchange, as our errors: by HTTP status, by shape, by ccxt's types.

Everything vendor about failures ends here. A delay that the exchange names (``Retry-After``) is
read from the headers of the very answer, never from what a shared instance saw last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
from ccxt.base import errors as ccxt_errors

from exchange_source.interfaces import (
    BadExchangeAnswer,
    ExchangeError,
    ExchangeRateLimited,
    ExchangeRefused,
    ExchangeUnavailable,
)

Headers = Mapping[str, str]
"""HTTP headers, names in lower case."""

# How much of an answer goes into a message.
_WORDS: Final = 300

# In this order: the first kind that fits decides, a bare ExchangeError comes last.
_KINDS: Final[tuple[tuple[type[BaseException], type[ExchangeError]], ...]] = (
    (ccxt_errors.RateLimitExceeded, ExchangeRateLimited),
    (ccxt_errors.DDoSProtection, ExchangeRateLimited),
    (ccxt_errors.ChecksumError, BadExchangeAnswer),
    (ccxt_errors.BadResponse, BadExchangeAnswer),
    (ccxt_errors.OperationFailed, ExchangeUnavailable),
    (ccxt_errors.UnsubscribeError, ExchangeUnavailable),
    (ccxt_errors.ExchangeClosedByUser, ExchangeUnavailable),
    (ccxt_errors.AuthenticationError, ExchangeRefused),
    (ccxt_errors.ArgumentsRequired, ExchangeRefused),
    (ccxt_errors.BadRequest, ExchangeRefused),
    (ccxt_errors.OperationRejected, ExchangeRefused),
    (ccxt_errors.InvalidOrder, ExchangeRefused),
    (ccxt_errors.NotSupported, ExchangeRefused),
    (ccxt_errors.ExchangeError, ExchangeUnavailable),
    (aiohttp.ClientPayloadError, BadExchangeAnswer),
    (aiohttp.ClientError, ExchangeUnavailable),
    (TimeoutError, ExchangeUnavailable),
    (OSError, ExchangeUnavailable),
    # What ccxt stumbles with over an answer of another shape than it expects.
    (LookupError, BadExchangeAnswer),
    (TypeError, BadExchangeAnswer),
    (ValueError, BadExchangeAnswer),
    (AttributeError, BadExchangeAnswer),
    (ArithmeticError, BadExchangeAnswer),
)

TRANSLATED: Final[tuple[type[BaseException], ...]] = tuple({vendor for vendor, _ in _KINDS})
"""Every kind of failure that means something here; whatever else comes is a defect of ours."""
FAILURES: Final[tuple[type[BaseException], ...]] = (ExchangeError, *TRANSLATED)
"""Those, and what was translated already."""


def translate(
    exc: BaseException, exchange: str, *, retry_after: float | None = None
) -> ExchangeError:
    """The error of ours that ``exc``, one of ``TRANSLATED``, means."""
    # ccxt reports a body that broke off as a bare ExchangeError; the cause tells.
    told = exc.__cause__ if isinstance(exc.__cause__, aiohttp.ClientPayloadError) else exc
    ours = next(ours for vendor, ours in _KINDS if isinstance(told, vendor))
    words = str(exc)[:_WORDS] or type(exc).__name__
    if isinstance(exc.__cause__, OSError):
        # ccxt names only the address of what could not be reached.
        words += f" ({exc.__cause__})"
    return ours(f"{exchange}: {words}", retry_after=retry_after)


def status_error(
    exchange: str, status: int, reason: str, body: str, headers: Headers, *, real_ms: int
) -> ExchangeError | None:
    """The error that an HTTP status alone means, or None when the body decides.

    ``real_ms`` is the time that a ``Retry-After`` date counts from where the answer has no Date.
    """
    kind: type[ExchangeError]
    if status in (418, 429):
        kind = ExchangeRateLimited
    elif status in (403, 451) or status >= 500:
        kind = ExchangeUnavailable
    else:
        return None
    return kind(
        f"{exchange}: HTTP {status} {reason}: {body[:_WORDS]}",
        retry_after=parse_retry_after(headers, real_ms=real_ms),
    )


def parse_retry_after(headers: Headers, *, real_ms: int) -> float | None:
    """Seconds to wait as ``Retry-After`` says (seconds or an HTTP date), or None."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        until = parse_http_date(text)
        if until is None:
            return None
        sent = parse_http_date(headers.get("date", ""))
        seconds = (until - (real_ms if sent is None else sent)) / 1000
    return max(0.0, seconds) if math.isfinite(seconds) else None


def parse_http_date(text: str) -> int | None:
    """An HTTP date in ms since the epoch, or None for anything else."""
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int((moment - datetime.fromtimestamp(0, UTC)).total_seconds() * 1000)
