"""Who is let in, and who is not, whatever a token says."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import bcrypt
import pytest
from jose import jwt

from auth.interfaces import Principal
from auth.module import (
    MAX_TOKEN_CHARS,
    AuthenticationModuleImpl,
    TokenValidator,
    demand_scope,
    issue_token,
)
from config import Settings
from errors import ConfigurationError, Forbidden, InvalidRequest, Unauthorized
from tests.support.clock import ManualClock

SECRET = "a secret of the tests that is long enough"
NOW_S = 1_700_000_000
PASSWORD = "correct horse"
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


def settings(**changes: Any) -> Settings:
    return Settings(_env_file=None, **{"auth_secret": SECRET, **changes})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW_S * 1000)


@pytest.fixture
def auth(clock: ManualClock) -> AuthenticationModuleImpl:
    return AuthenticationModuleImpl.from_settings(settings(auth_users={"ada": HASH}), clock)


def claims(**changes: Any) -> dict[str, Any]:
    full = {
        "iss": "cb-trade",
        "aud": "cb-trade-data",
        "sub": "ada",
        "scope": "data:read",
        "exp": NOW_S + 60,
        **changes,
    }
    return {name: value for name, value in full.items() if value is not ...}


def signed(payload: Any, *, secret: str = SECRET, header: Any = None) -> str:
    """A token as an attacker writes it: any payload, any header, a true signature."""

    def part(value: Any) -> bytes:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    signing_input = (
        part({"alg": "HS256", "typ": "JWT"} if header is None else header) + b"." + part(payload)
    )
    signature = hmac.new(secret.encode(), signing_input, hashlib.sha256).digest()
    return (signing_input + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


class TestValidateToken:
    async def test_a_valid_token_gives_its_user(self, auth: AuthenticationModuleImpl) -> None:
        assert await auth.validate_token(signed(claims())) == "ada"

    async def test_an_invalid_token_gives_none(self, auth: AuthenticationModuleImpl) -> None:
        assert await auth.validate_token("not a token") is None

    async def test_an_expired_token_gives_none(
        self, auth: AuthenticationModuleImpl, clock: ManualClock
    ) -> None:
        token = signed(claims(exp=NOW_S + 60))
        await clock.advance(59_999)
        assert await auth.validate_token(token) == "ada"
        await clock.advance(1)
        assert await auth.validate_token(token) is None

    @pytest.mark.parametrize("claim", ["iss", "aud", "sub", "exp"])
    async def test_a_token_without_a_required_claim_gives_none(
        self, auth: AuthenticationModuleImpl, claim: str
    ) -> None:
        assert await auth.validate_token(signed(claims(**{claim: ...}))) is None

    @pytest.mark.parametrize(
        ("claim", "value"),
        [
            ("iss", "somebody else"),
            ("iss", ["cb-trade"]),
            ("iss", None),
            ("aud", "another service"),
            ("aud", []),
            ("aud", 7),
            ("aud", None),
            ("sub", ""),
            ("sub", 7),
            ("sub", None),
            ("exp", NOW_S),
            ("exp", None),
            ("exp", True),
            ("exp", str(NOW_S + 60)),
            ("exp", float("inf")),
            ("exp", float("nan")),
            ("exp", 10**400),
            ("exp", [NOW_S + 60]),
            ("nbf", NOW_S + 30),
            ("nbf", "soon"),
            ("nbf", None),
            ("iat", None),
            ("iat", float("inf")),
            ("jti", 7),
            ("at_hash", "x"),
            ("scope", None),
            ("scope", ["data:read"]),
            ("scope", 7),
        ],
    )
    async def test_a_token_with_an_odd_claim_gives_none(
        self, auth: AuthenticationModuleImpl, claim: str, value: Any
    ) -> None:
        assert await auth.validate_token(signed(claims(**{claim: value}))) is None

    @pytest.mark.parametrize(
        "token",
        [
            "",
            ".",
            "..",
            "a.b.c",
            "é.é.é",
            "\ud800.\ud800.\ud800",
            "\x00",
            "x" * (MAX_TOKEN_CHARS + 1),
            signed(claims(), secret="another secret of the same length, or so"),
            signed(claims(), header={"alg": "none"}),
            signed(claims(), header={"alg": "HS512"}),
            signed(claims(), header={"alg": ["HS256"]}),
            signed(claims(), header={"typ": "JWT"}),
            signed(claims(), header=[]),
            signed(claims(), header=b"[" * 3000),
            signed([]),
            signed(b"{"),
            signed(b"\xff"),
            signed(b"[" * 3000),
            signed(claims()).rsplit(".", 1)[0] + ".",
        ],
    )
    async def test_what_is_no_token_of_this_service_gives_none(
        self, auth: AuthenticationModuleImpl, token: str
    ) -> None:
        assert await auth.validate_token(token) is None

    async def test_a_secret_that_is_json_signs_as_the_text_that_it_is(
        self, clock: ManualClock
    ) -> None:
        secret = '["a key set that must not be taken for one", "weak"]'
        strange = settings(auth_secret=secret)
        auth = AuthenticationModuleImpl.from_settings(strange, clock)
        token = issue_token(strange, subject="ada", clock=clock)
        assert await auth.validate_token(token) == "ada"
        assert await auth.validate_token(signed(claims(), secret="weak")) is None


class TestAuthenticate:
    async def test_a_valid_token_gives_subject_scopes_and_expiry(
        self, auth: AuthenticationModuleImpl
    ) -> None:
        principal = await auth.authenticate(signed(claims(scope="data:read  other data:write")))
        assert principal == Principal(
            "ada", frozenset({"data:read", "other", "data:write"}), NOW_S + 60
        )

    async def test_a_token_without_scope_may_do_nothing(
        self, auth: AuthenticationModuleImpl
    ) -> None:
        principal = await auth.authenticate(signed(claims(scope=...)))
        assert principal.scopes == frozenset()

    @pytest.mark.parametrize(
        ("token", "reason"),
        [
            (signed(claims(exp=NOW_S - 1)), "expired"),
            (signed(claims(nbf=NOW_S + 1)), "not valid yet"),
            (signed(claims(aud="another service")), "not meant for this service"),
            ("nonsense", "malformed"),
            ("", "characters"),
        ],
    )
    async def test_the_refusal_says_why_without_the_token(
        self, auth: AuthenticationModuleImpl, token: str, reason: str
    ) -> None:
        with pytest.raises(Unauthorized, match=reason) as caught:
            await auth.authenticate(token)
        assert not token or token not in caught.value.message


class TestTokenValidator:
    @pytest.mark.parametrize("secret", ["", "short"])
    def test_a_key_that_is_empty_or_short_is_refused(self, secret: str) -> None:
        with pytest.raises(ConfigurationError, match="AUTH_SECRET: takes at least 32 bytes"):
            TokenValidator(secret, issuer="i", audience="a", clock=ManualClock())

    def test_a_public_key_is_refused_as_a_secret(self) -> None:
        pem = "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n"
        with pytest.raises(ConfigurationError, match="AUTH_SECRET"):
            TokenValidator(pem, issuer="i", audience="a", clock=ManualClock())


class TestIssueToken:
    def test_it_says_who_what_and_how_long(self, clock: ManualClock) -> None:
        token = issue_token(settings(), subject="bot", scope="data:read", ttl_s=90, clock=clock)
        assert jwt.get_unverified_claims(token) == {
            "iss": "cb-trade",
            "aud": "cb-trade-data",
            "sub": "bot",
            "scope": "data:read",
            "iat": NOW_S,
            "exp": NOW_S + 90,
        }

    @pytest.mark.parametrize(
        "wrong",
        [{"subject": ""}, {"scope": "data:red"}, {"scope": " "}, {"ttl_s": 0}, {"ttl_s": -1}],
    )
    def test_what_cannot_be_meant_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest):
            issue_token(settings(), **{"subject": "bot", **wrong})

    def test_without_a_secret_there_is_no_token(self) -> None:
        with pytest.raises(ConfigurationError, match="AUTH_SECRET"):
            issue_token(settings(auth_secret=None), subject="bot")


class TestLogin:
    async def test_the_right_password_gives_a_valid_token(
        self, auth: AuthenticationModuleImpl
    ) -> None:
        principal = await auth.authenticate(await auth.login("ada", PASSWORD))
        assert principal == Principal("ada", frozenset({"data:read", "data:write"}), NOW_S + 3600)

    @pytest.mark.parametrize(
        ("user", "password"),
        [
            ("ada", "wrong"),
            ("ada", ""),
            ("eve", PASSWORD),
            ("ada", PASSWORD + "\0"),
            ("ada", "\ud800"),
            ("ada", "x" * 100),
        ],
    )
    async def test_user_and_password_that_do_not_fit_are_refused_alike(
        self, auth: AuthenticationModuleImpl, user: str, password: str
    ) -> None:
        with pytest.raises(Unauthorized, match=r"^user and password do not fit$"):
            await auth.login(user, password)

    async def test_a_longer_password_with_the_same_beginning_is_refused(
        self, clock: ManualClock
    ) -> None:
        password_hash = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
        auth = AuthenticationModuleImpl.from_settings(
            settings(auth_users={"ada": password_hash}), clock
        )
        assert await auth.login("ada", "x" * 72)
        with pytest.raises(Unauthorized):
            await auth.login("ada", "x" * 73)

    async def test_without_users_nobody_logs_in(self, clock: ManualClock) -> None:
        auth = AuthenticationModuleImpl.from_settings(settings(), clock)
        with pytest.raises(Unauthorized):
            await auth.login("ada", PASSWORD)

    def test_what_is_no_bcrypt_hash_stops_the_start(self, clock: ManualClock) -> None:
        plain = settings(auth_users={"ada": "hunter2"})
        with pytest.raises(ConfigurationError, match=r"AUTH_USERS: .*'ada'") as caught:
            AuthenticationModuleImpl.from_settings(plain, clock)
        assert "hunter2" not in caught.value.message


def test_a_scope_that_the_token_lacks_is_named() -> None:
    with pytest.raises(Forbidden, match="data:write"):
        demand_scope(Principal("ada", frozenset({"data:read"}), 0), "data:write")
