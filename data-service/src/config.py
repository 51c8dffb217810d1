"""The settings, from the environment or a ``.env`` file; a wrong one stops the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from domain.clock import MarketClock
from errors import ConfigurationError

KNOWN_EXCHANGES: Final = ("crypto.com",)
MIN_SECRET_BYTES: Final = 32

NameList = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Every setting, validated. Secrets never show in ``repr``."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    # An empty host would listen on every interface.
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65_535)

    storage_type: Literal["local"] = "local"
    storage_root: str = Field(default="./data", min_length=1)
    state_dir: Path = Path("./data")

    target_storage_type: Literal["local", "azure"] | None = None
    target_table_path: str | None = Field(default=None, min_length=1)
    azure_storage_options: Annotated[dict[str, SecretStr], NoDecode] = {}

    exchanges: NameList = KNOWN_EXCHANGES
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
        unknown = [name for name in names if name not in KNOWN_EXCHANGES]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(
                f"takes a comma-separated list of {', '.join(KNOWN_EXCHANGES)}, each once"
            )
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
    def _together(self) -> Self:
        for setting, names in (
            ("EXCHANGE_ENDPOINTS", self.exchange_endpoints),
            ("EXCHANGE_CREDENTIALS", self.exchange_credentials),
            ("EXCHANGE_PREFERENCES", {n for v in self.exchange_preferences.values() for n in v}),
        ):
            unknown = sorted(set(names) - set(KNOWN_EXCHANGES))
            if unknown:
                # The names are not repeated: one of them may be a secret in the wrong place.
                raise ValueError(
                    f"{setting} names {len(unknown)} exchanges that do not exist; it takes "
                    f"{', '.join(KNOWN_EXCHANGES)}"
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
        return str(Path(self.storage_root) / "targets_delta")


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
