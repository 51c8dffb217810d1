"""Tokens: issued for configured users, validated for everybody, asked for by FastAPI dependencies.

The dependencies take the ``IAuthenticationModule`` from ``app.state.auth``, where the lifespan of
the application puts it. They raise domain errors; what those look like outside is not decided here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, cast

import bcrypt
from fastapi import Depends, WebSocket
from fastapi.requests import HTTPConnection
from fastapi.security import OAuth2PasswordBearer
from fastapi.security.utils import get_authorization_scheme_param
from jose import JWTError, jwk, jwt
from jose.backends.base import Key
from jose.exceptions import JWKError, JWTClaimsError

from auth.interfaces import READ_SCOPE, WRITE_SCOPE, IAuthenticationModule, Principal
from config import MIN_SECRET_BYTES, Settings
from domain.clock import IClock
from errors import ConfigurationError, Forbidden, InvalidRequest, Unauthorized

ALGORITHM: Final = "HS256"
MAX_TOKEN_CHARS: Final = 8 * 1024
LOGIN_TTL_S: Final = 3600
FULL_SCOPE: Final = f"{READ_SCOPE} {WRITE_SCOPE}"
WEBSOCKET_PROTOCOL: Final = "cb-trade.v1"
WEBSOCKET_TOKEN_PREFIX: Final = "bearer."  # noqa: S105  a prefix, no secret

# bcrypt reads no more of a password than this, and refuses longer ones.
_MAX_PASSWORD_BYTES: Final = 72
_BCRYPT_HASH: Final = re.compile(r"\$2[aby]\$(?:0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
# A password check costs a core for a quarter of a second; more at once would starve the threads
# that storage works in.
_LOGINS_AT_ONCE: Final = 2
_LAST_DATE_S: Final = 253_402_300_799  # the end of the year 9999
# Expiry and "not before" are checked here, by the injected clock; everything else by the library,
# which accepts a token without the claim unless it is required.
_JOSE_OPTIONS: Final = {
    "require_aud": True,
    "require_iss": True,
    "require_sub": True,
    "verify_exp": False,
    "verify_nbf": False,
}


class TokenValidator:
    """Decides whether a token was signed with this key, for this service, and is valid now.

    Raises:
        ConfigurationError: the secret is shorter than 32 bytes or looks like a public key.
    """

    def __init__(self, secret: str, *, issuer: str, audience: str, clock: IClock) -> None:
        self._key = _key(secret)
        self._issuer = issuer
        self._audience = audience
        self._clock = clock

    def validate(self, token: str) -> Principal:
        """Whom the token speaks for.

        Raises:
            Unauthorized: the token is not valid; the message says why, without the token.
        """
        if not token or len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized(f"the token needs 1 to {MAX_TOKEN_CHARS} characters")
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[ALGORITHM],
                audience=self._audience,
                issuer=self._issuer,
                options=_JOSE_OPTIONS,
            )
        except JWTClaimsError as exc:
            raise Unauthorized("the token is not meant for this service") from exc
        except (
            JWTError,
            # The library lets these escape: infinities and nulls where numbers belong, broken
            # UTF-8, and JSON that is nested deeper than Python recurses.
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as exc:
            raise Unauthorized("the token is malformed or not signed by this service") from exc
        return self._principal(claims)

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        subject = claims["sub"]
        if not subject:
            raise Unauthorized("the token's sub names nobody")
        now = self._clock.real_ms() / 1000
        if _numeric_date(claims, "nbf", default=0.0) > now:
            raise Unauthorized("the token is not valid yet")
        expires_at = _numeric_date(claims, "exp")
        if expires_at <= now:
            raise Unauthorized("the token has expired")
        scope = claims.get("scope", "")
        if not isinstance(scope, str):
            raise Unauthorized("the token's scope is no text of space-separated scopes")
        return Principal(subject, frozenset(scope.split()), expires_at)


class AuthenticationModuleImpl(IAuthenticationModule):
    """Validates tokens with a ``TokenValidator`` and issues them to configured users.

    ``users`` maps a user's name to the bcrypt hash of the password; ``issue`` makes a token for a
    user's name.

    Raises:
        ConfigurationError: a hash is no bcrypt hash.
    """

    def __init__(
        self,
        validator: TokenValidator,
        *,
        users: Mapping[str, str] | None = None,
        issue: Callable[[str], str],
    ) -> None:
        self._validator = validator
        self._issue = issue
        self._users = dict(users or {})
        self._logins = asyncio.Semaphore(_LOGINS_AT_ONCE)
        for user, password_hash in self._users.items():
            if not _BCRYPT_HASH.fullmatch(password_hash):
                raise ConfigurationError(
                    f"AUTH_USERS: takes a JSON object of user to bcrypt hash; that of {user!r} "
                    f"is none"
                )

    @classmethod
    def from_settings(cls, settings: Settings, clock: IClock) -> AuthenticationModuleImpl:
        """The module that the settings describe.

        Raises:
            ConfigurationError: ``AUTH_SECRET`` is missing, or a hash is no bcrypt hash.
        """
        validator = TokenValidator(
            _secret(settings),
            issuer=settings.auth_issuer,
            audience=settings.auth_audience,
            clock=clock,
        )
        return cls(
            validator,
            users={user: value.get_secret_value() for user, value in settings.auth_users.items()},
            issue=lambda user: issue_token(settings, subject=user, clock=clock),
        )

    async def validate_token(self, token: str) -> str | None:
        try:
            return self._validator.validate(token).subject
        except Unauthorized:
            return None

    async def authenticate(self, token: str) -> Principal:
        return self._validator.validate(token)

    async def login(self, username: str, password: str) -> str:
        known = self._users.get(username)
        # A user who does not exist costs the same time as one who does.
        password_hash = known or next(iter(self._users.values()), None)
        fits = False
        if password_hash is not None:
            secret = password.encode(errors="replace")
            async with self._logins:
                fits = await asyncio.to_thread(
                    bcrypt.checkpw, secret[:_MAX_PASSWORD_BYTES], password_hash.encode()
                )
            fits = fits and len(secret) <= _MAX_PASSWORD_BYTES
        if known is None or not fits:
            raise Unauthorized("user and password do not fit")
        return self._issue(username)


def issue_token(
    settings: Settings,
    *,
    subject: str,
    scope: str = FULL_SCOPE,
    ttl_s: int = LOGIN_TTL_S,
    clock: IClock | None = None,
) -> str:
    """A token signed with ``AUTH_SECRET`` for ``subject``, valid for ``ttl_s`` real seconds.

    ``scope`` is a space-separated list of scopes. Without ``clock``, the settings' own.

    Raises:
        ConfigurationError: ``AUTH_SECRET`` is missing or cannot be used.
        InvalidRequest: the subject is empty, a scope does not exist, or the time is not positive.
    """
    scopes = scope.split()
    unknown = sorted(set(scopes) - {READ_SCOPE, WRITE_SCOPE})
    if not subject:
        raise InvalidRequest("the subject takes the name of whom the token speaks for")
    if unknown or not scopes:
        raise InvalidRequest(f"the scope takes some of: {FULL_SCOPE}")
    if ttl_s <= 0:
        raise InvalidRequest("the time to live takes a positive number of seconds")
    now = (clock or settings.market_clock).real_ms() // 1000
    claims = {
        "iss": settings.auth_issuer,
        "aud": settings.auth_audience,
        "sub": subject,
        "scope": " ".join(scopes),
        "iat": now,
        "exp": now + ttl_s,
    }
    # types-python-jose leaves out that a prepared key is taken as well.
    return jwt.encode(claims, cast("Any", _key(_secret(settings))), algorithm=ALGORITHM)


_bearer: Final = OAuth2PasswordBearer(
    tokenUrl="/auth/token",
    auto_error=False,
    description="A token from `cb-trade-data token`, or from /auth/token where users are set up.",
    scopes={READ_SCOPE: "read data and targets", WRITE_SCOPE: "add and remove coins"},
)


def get_auth(connection: HTTPConnection) -> IAuthenticationModule:
    """The module that the application's lifespan put into ``app.state.auth``."""
    return cast("IAuthenticationModule", connection.app.state.auth)


async def get_current_user(
    auth: Annotated[IAuthenticationModule, Depends(get_auth)],
    token: Annotated[str | None, Depends(_bearer)],
) -> Principal:
    """Who is calling, by the ``Authorization: Bearer`` header.

    Raises:
        Unauthorized: there is no valid token.
    """
    if token is None:
        raise Unauthorized("send a token as 'Authorization: Bearer <token>'")
    return await auth.authenticate(token)


async def get_websocket_user(
    websocket: WebSocket, auth: Annotated[IAuthenticationModule, Depends(get_auth)]
) -> Principal:
    """Who is connecting: by the header, or, for browsers, by the offered subprotocols.

    Raises:
        Unauthorized: there is no valid token.
    """
    scheme, token = get_authorization_scheme_param(websocket.headers.get("Authorization"))
    if scheme.lower() == "bearer":
        return await auth.authenticate(token)
    offered: list[str] = websocket.scope.get("subprotocols", [])
    carried = [name for name in offered if name.startswith(WEBSOCKET_TOKEN_PREFIX)]
    if WEBSOCKET_PROTOCOL not in offered or len(carried) != 1:
        raise Unauthorized(
            f"send a token as 'Authorization: Bearer <token>', or offer the subprotocols "
            f"'{WEBSOCKET_PROTOCOL}, {WEBSOCKET_TOKEN_PREFIX}<token>'"
        )
    return await auth.authenticate(carried[0].removeprefix(WEBSOCKET_TOKEN_PREFIX))


def demand_scope(principal: Principal, scope: str) -> None:
    """Return when the token grants ``scope``.

    Raises:
        Forbidden: it does not; the message names the scope.
    """
    if scope not in principal.scopes:
        raise Forbidden(f"this needs a token with the scope {scope}")


def require_scope(scope: str) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that lets only tokens with ``scope`` through."""

    async def current_user_with_scope(
        user: Annotated[Principal, Depends(get_current_user)],
    ) -> Principal:
        demand_scope(user, scope)
        return user

    return current_user_with_scope


def _secret(settings: Settings) -> str:
    if settings.auth_secret is None:
        raise ConfigurationError(
            f"AUTH_SECRET: takes the secret that tokens are signed with, at least "
            f"{MIN_SECRET_BYTES} bytes"
        )
    return settings.auth_secret.get_secret_value()


def _key(secret: str) -> Key:
    """A prepared key: the library would take a secret that happens to be JSON for a key set."""
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"AUTH_SECRET: takes at least {MIN_SECRET_BYTES} bytes")
    try:
        return jwk.construct(secret, ALGORITHM)
    except JWKError as exc:
        raise ConfigurationError("AUTH_SECRET: takes a secret, not a public key") from exc


def _numeric_date(claims: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    value = claims.get(name, default)
    # The bounds also refuse what JSON should not hold: not a number, infinity, integers of
    # hundreds of digits.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= _LAST_DATE_S
    ):
        raise Unauthorized(f"the token's {name} is no number of seconds since the epoch")
    return float(value)
