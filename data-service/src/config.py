"""The settings, from the environment or a ``.env`` file; a wrong one stops the start."""

from __future__ import annotations

import base64
import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from domain.clock import MarketClock
from errors import ConfigurationError

BUILT_IN_EXCHANGES: Final = ("crypto.com", "binance", "coinbase")
EXCHANGE_PLUGINS: Final = "cb_trade.exchanges"
"""The group of entry points by which installed packages offer more exchanges."""
MIN_SECRET_BYTES: Final = 32

# A container's name: letters, digits and single hyphens, as Azure takes it.
_CONTAINER: Final = re.compile(r"(?=.{3,63}\Z)[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_AZURE_HOST: Final = ".blob.core.windows.net"

NameList = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Every setting, validated. Secrets never show in ``repr``."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    # An empty host would listen on every interface.
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65_535)

    storage_type: Literal["local", "azure"] = "local"
    storage_root: str = Field(default="./data", min_length=1)
    azure_storage_connection_string: SecretStr | None = None
    azure_storage_account_url: str | None = None
    state_dir: Path = Path("./data")

    target_storage_type: Literal["local", "azure"] | None = None
    target_table_path: str | None = Field(default=None, min_length=1)
    azure_storage_options: Annotated[dict[str, SecretStr], NoDecode] = {}

    exchanges: NameList = BUILT_IN_EXCHANGES
    exchange_preferences: Annotated[dict[str, tuple[str, ...]], NoDecode] = {}
    exchange_quotes: NameList = ("USD", "USDT", "USDC", "EUR")
    exchange_endpoints: Annotated[dict[str, str], NoDecode] = {}
    exchange_credentials: Annotated[dict[str, dict[str, SecretStr]], NoDecode] = {}
    backfill_days: float = Field(default=14, gt=0, le=3650)

    auth_algorithm: Literal["HS256"] = "HS256"
    auth_secret: SecretStr | None = None
    auth_issuer: str = Field(default="cb-trade", min_length=1)
    auth_audience: str = Field(default="cb-trade-data", min_length=1)
    auth_users: Annotated[dict[str, SecretStr], NoDecode] = {}

    revision: str | None = None

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = "console"
    market_clock: Annotated[MarketClock, NoDecode] = MarketClock()

    @field_validator("exchanges", "exchange_quotes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(item.strip() for item in value.split(",") if item.strip())

    @field_validator("exchanges")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.lower() for name in value)
        known = known_exchanges()
        if not names or not set(names) <= set(known) or len(set(names)) != len(names):
            raise ValueError(f"takes a comma-separated list of {', '.join(known)}, each once")
        return names

    @field_validator("exchange_quotes")
    @classmethod
    def _quotes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("takes a comma-separated list of quote currencies, such as USD,USDT")
        return tuple(quote.upper() for quote in value)

    @field_validator(
        "azure_storage_options",
        "exchange_preferences",
        "exchange_endpoints",
        "exchange_credentials",
        "auth_users",
        mode="before",
    )
    @classmethod
    def _json_object(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            # Not chained: the text may hold a secret.
            raise ValueError("takes a JSON object")  # noqa: TRY004  pydantic reports ValueError
        return parsed

    @field_validator("exchange_preferences")
    @classmethod
    def _preferences(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {
            coin.upper(): tuple(name.lower() for name in names) for coin, names in value.items()
        }

    @field_validator("exchange_endpoints")
    @classmethod
    def _endpoints(cls, value: dict[str, str]) -> dict[str, str]:
        for name, url in value.items():
            if not _is_base_url(url):
                raise ValueError(
                    f"takes a JSON object of exchange to base URL; {name} needs one such as "
                    f"http://127.0.0.1:9400"
                )
        return {name.lower(): url for name, url in value.items()}

    @field_validator("exchange_credentials")
    @classmethod
    def _by_exchange(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {name.lower(): secrets for name, secrets in value.items()}

    @field_validator("azure_storage_connection_string")
    @classmethod
    def _connection_string(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value().strip():
            return None
        try:
            _azure_options(value.get_secret_value())
        except ValueError:
            # Not chained: the text holds a secret.
            raise ValueError(
                "takes the connection string of a storage account, such as DefaultEndpoints"
                "Protocol=https;AccountName=...;AccountKey=...;EndpointSuffix=core.windows.net, "
                "with the key as the portal shows it"
            ) from None
        return value

    @field_validator("azure_storage_account_url")
    @classmethod
    def _account_url(cls, value: str | None) -> str | None:
        if not value:
            return None
        # Whoever signs in with an identity does so over TLS only.
        secure = value.lower().startswith("https://") and _is_base_url(value)
        if not secure or "?" in value or "@" in value:
            raise ValueError(
                f"takes the https address of a storage account without a signature, such as "
                f"https://account{_AZURE_HOST}"
            )
        return value.rstrip("/")

    @field_validator("auth_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"takes at least {MIN_SECRET_BYTES} bytes")
        return value

    @field_validator("state_dir", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("takes a folder, such as ./data")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("market_clock", mode="before")
    @classmethod
    def _clock(cls, value: Any) -> Any:
        return MarketClock.parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _azure_complete(self) -> Self:
        if self.storage_type != "azure":
            return self
        given = [
            setting is not None
            for setting in (self.azure_storage_connection_string, self.azure_storage_account_url)
        ]
        if sum(given) != 1:
            raise ValueError(
                "AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_URL: STORAGE_TYPE azure "
                f"takes exactly one of them, {'both are' if all(given) else 'none is'} set"
            )
        if not _CONTAINER.fullmatch(self.storage_root):
            raise ValueError(
                f"STORAGE_ROOT: takes the name of a container when STORAGE_TYPE is azure: 3 to 63 "
                f"lower-case letters, digits and single hyphens, got {self.storage_root!r}"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        known = known_exchanges()
        for setting, names in (
            ("EXCHANGE_ENDPOINTS", self.exchange_endpoints),
            ("EXCHANGE_CREDENTIALS", self.exchange_credentials),
            ("EXCHANGE_PREFERENCES", {n for v in self.exchange_preferences.values() for n in v}),
        ):
            if unknown := set(names).difference(known):
                # The names are not repeated: one of them may be a secret in the wrong place.
                raise ValueError(
                    f"{setting} names {len(unknown)} exchanges that do not exist; it takes "
                    f"{', '.join(known)}"
                )
        return self

    @property
    def targets_on(self) -> Literal["local", "azure"]:
        """Where the table of targets lies."""
        return self.target_storage_type or self.storage_type

    @property
    def targets_path(self) -> str:
        """The path or URI of the table of targets."""
        if self.target_table_path is not None:
            return self.target_table_path
        if self.targets_on == "azure":
            return f"az://{self.storage_root}/targets_delta"
        # A container is no folder: beside documents on Azure, a local table lies in STATE_DIR.
        folder = Path(self.storage_root) if self.storage_type == "local" else self.state_dir
        return str(folder / "targets_delta")

    @property
    def targets_options(self) -> dict[str, str]:
        """What the table's Azure client takes: ``AZURE_STORAGE_OPTIONS``, else what the storage's
        own settings say. Secrets are among it."""
        if self.azure_storage_options or self.targets_on == "local":
            return {
                name: value.get_secret_value() for name, value in self.azure_storage_options.items()
            }
        if self.azure_storage_connection_string is not None:
            return _azure_options(self.azure_storage_connection_string.get_secret_value())
        if self.azure_storage_account_url is not None:
            return _account_options(self.azure_storage_account_url)
        return {}

    @property
    def candles_path(self) -> str:
        """The path or URI of the table of sealed candles, beside the documents."""
        if self.storage_type == "azure":
            return f"az://{self.storage_root}/candles_delta"
        return str(Path(self.storage_root) / "candles_delta")

    @property
    def candles_options(self) -> dict[str, str] | None:
        """What the table's Azure client takes, by what the storage's own settings say; None for a
        local table. Secrets are among it."""
        if self.storage_type == "local":
            return None
        if self.azure_storage_connection_string is not None:
            return _azure_options(self.azure_storage_connection_string.get_secret_value())
        # How to sign in may be told for the table of targets alone.
        told = {
            name: value.get_secret_value() for name, value in self.azure_storage_options.items()
        }
        return told | _account_options(self.azure_storage_account_url or "")

    @property
    def redirected(self) -> bool:
        """Whether an enabled exchange is another than the real one."""
        return any(name in self.exchange_endpoints for name in self.exchanges)


def known_exchanges() -> tuple[str, ...]:
    """The names of all exchanges that can be enabled, those of installed packages last.

    Nothing of a package is imported: whether its plugin works shows when it is enabled.
    """
    installed = {entry.name.lower() for entry in entry_points(group=EXCHANGE_PLUGINS)}
    return (*BUILT_IN_EXCHANGES, *sorted(installed.difference(BUILT_IN_EXCHANGES)))


def connection_fields(connection_string: str) -> dict[str, str]:
    """What a connection string of Azure says, by lower-case name. Secrets are among it."""
    parts = (part.partition("=") for part in connection_string.split(";"))
    return {name.strip().lower(): value.strip() for name, _, value in parts if name.strip()}


def _azure_options(connection_string: str) -> dict[str, str]:
    """The options of the table's client that say the same as a connection string.

    Raises:
        ValueError: it names no account, or nothing to sign with, or the key is no base64.
    """
    fields = connection_fields(connection_string)
    endpoint = fields.get("blobendpoint", "").rstrip("/")
    options = _account_options(endpoint) if endpoint else {}
    if fields.get("accountname"):
        options["account_name"] = fields["accountname"]
    if fields.get("accountkey"):
        # Checked only: the key is used as it is written.
        base64.b64decode(fields["accountkey"], validate=True)
        options["account_key"] = fields["accountkey"]
    elif fields.get("sharedaccesssignature"):
        options["sas_token"] = fields["sharedaccesssignature"]
    else:
        raise ValueError("nothing to sign with")
    if not options.get("account_name"):
        raise ValueError("no account")
    return options


def _account_options(account_url: str) -> dict[str, str]:
    parts = urlsplit(account_url)
    if not _is_base_url(account_url):
        raise ValueError("no address of an account")
    host = parts.hostname or ""
    if host.endswith(_AZURE_HOST):
        return {"account_name": host.removesuffix(_AZURE_HOST)}
    # Beside the real service, an emulator names the account in the path.
    account = parts.path.strip("/") or host.split(".")[0]
    options = {"account_name": account, "endpoint": account_url}
    return options | ({"allow_http": "true"} if parts.scheme == "http" else {})


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        # Reading the port is what checks it.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def load_settings(**overrides: Any) -> Settings:
    """Read and check the settings; ``overrides`` win over the environment.

    Raises:
        ConfigurationError: one line that names the setting and what it takes.
    """
    try:
        return Settings(**overrides)
    except UnicodeDecodeError:
        # Not chained: the text may hold a secret.
        raise ConfigurationError(".env: takes a text file in UTF-8") from None
    except ValidationError as exc:
        # Only the first finding, and never the value: it may be a secret.
        finding = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(finding["loc"][0]).upper() if finding["loc"] else ""
        message = finding["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{name}: {message}" if name else message) from None
