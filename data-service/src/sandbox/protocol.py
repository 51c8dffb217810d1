"""What one exchange's public protocol is to the sandbox that serves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from aiohttp import web


class IProtocol(ABC):
    """One exchange's REST and WebSocket protocol over the venue it was made with.

    Every path that it ``serves`` is its own; faults, delays and limits are put round it. Paths are
    the exchange's, so that all protocols share one port.
    """

    @abstractmethod
    def serves(self, path: str) -> bool:
        """Whether a request of ``path`` is for this exchange, also where the path leads nowhere."""

    @abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve the protocol's paths."""

    @abstractmethod
    def asked_for(self, request: web.Request) -> tuple[str | None, str | None]:
        """The instrument and the timeframe that ``request`` names, as it writes them."""

    @abstractmethod
    def failure(self, request: web.Request, status: int) -> dict[str, Any]:
        """The JSON body with which this exchange answers HTTP ``status``."""

    def on_answer(self, request: web.Request, status: int) -> Mapping[str, str]:  # noqa: ARG002
        """Take note of an answer to REST, once for each; the headers that this exchange gives it.

        Headers that the answer has already are left as they are.
        """
        return {}


def plain(value: float) -> str:
    """The shortest text that reads back as ``value``, without an exponent."""
    text = repr(value)
    return text if "e" not in text else format(Decimal(text), "f")
