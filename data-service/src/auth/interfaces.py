"""Who is calling, and may they."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

READ_SCOPE: Final = "data:read"
WRITE_SCOPE: Final = "data:write"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a valid token speaks for. ``expires_at`` is real seconds since the epoch."""

    subject: str
    scopes: frozenset[str]
    expires_at: float


class IAuthenticationModule(ABC):
    """The one place that decides whether a token is valid, for HTTP, MCP and WebSocket alike."""

    @abstractmethod
    async def validate_token(self, token: str) -> str | None:
        """The user that the token speaks for, or None when it is not valid. Never raises."""

    @abstractmethod
    async def authenticate(self, token: str) -> Principal:
        """Whom the token speaks for, with scopes and expiry.

        Raises:
            Unauthorized: the token is malformed, badly signed, expired, or not meant for this
                service; the message says which without repeating the token.
        """

    @abstractmethod
    async def login(self, username: str, password: str) -> str:
        """A new token for one of the configured users.

        Raises:
            Unauthorized: user and password do not fit, told alike for both.
        """
