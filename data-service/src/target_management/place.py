"""Where the table of targets lies, checked before anything is asked."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from errors import ConfigurationError

_SCHEMES: Final = ("az", "abfs", "abfss", "azure", "adl")
# The library ignores an option that it does not know, and goes on without it. These it knows, with
# or without one of the prefixes before them.
_PREFIXES: Final = ("azure_storage_", "azure_")
_SAME: Final = {
    "access_key": "account_key",
    "master_key": "account_key",
    "sas_key": "sas_token",
    "token": "bearer_token",
    "authority_id": "tenant_id",
    "identity_endpoint": "msi_endpoint",
}
_OPTIONS: Final = frozenset(
    {
        "account_name", "account_key", "sas_token", "bearer_token", "client_id", "client_secret",
        "tenant_id", "authority_host", "federated_token_file", "msi_endpoint", "msi_resource_id",
        "object_id", "use_azure_cli", "use_fabric_endpoint", "skip_signature", "endpoint",
        "allow_http", "allow_invalid_certificates", "connect_timeout", "timeout", "proxy_url",
        "proxy_ca_certificate", "proxy_excludes", "pool_idle_timeout", "pool_max_idle_per_host",
        "user_agent", "max_retries", "retry_timeout",
    }
)  # fmt: skip
# Azure's own patience is three minutes; whoever waits here has given up long before.
_PATIENCE: Final = {"max_retries": "2", "retry_timeout": "15s", "timeout": "10s"}


def check_place(
    storage_type: str, table_path: str, storage_options: Mapping[str, str] | None
) -> tuple[str, dict[str, str] | None]:
    """The address of the table, and the options to open it with; none for a local one.

    Raises:
        ConfigurationError: the storage type, the path and the options do not fit each other, or
            the options would not do what they say. No value of an option is repeated.
    """
    if storage_type == "local":
        if "://" in table_path:
            raise ConfigurationError(
                "TARGET_TABLE_PATH: takes a local path when TARGET_STORAGE_TYPE is local"
            )
        return table_path, None
    if storage_type != "azure":
        raise ConfigurationError("TARGET_STORAGE_TYPE: takes local or azure")
    address = urlsplit(table_path)
    if address.scheme not in _SCHEMES or not address.netloc or not address.path.strip("/"):
        raise ConfigurationError(
            "TARGET_TABLE_PATH: takes an address such as az://container/targets_delta when "
            "TARGET_STORAGE_TYPE is azure"
        )
    if not storage_options:
        raise ConfigurationError(
            "AZURE_STORAGE_OPTIONS: takes a JSON object with the credentials, such as "
            '{"account_name": "...", "account_key": "..."}, when TARGET_STORAGE_TYPE is azure'
        )
    return table_path.rstrip("/"), patient(_checked(storage_options, address.netloc))


def patient(storage_options: Mapping[str, str]) -> dict[str, str]:
    """Options with a patience that fits the service's, where they name none of their own."""
    return {**_PATIENCE, **storage_options}


def _checked(storage_options: Mapping[str, str], netloc: str) -> dict[str, str]:
    options: dict[str, str] = {}
    unknown = []
    for given, value in storage_options.items():
        name = _canonical(given)
        if name not in _OPTIONS:
            unknown.append(given)
        elif name in options:
            raise _refused(f"takes {name} once")
        else:
            options[name] = value.strip()
    if unknown:
        raise _refused(
            f"does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(_OPTIONS))}"
        )
    if empty := sorted(name for name, value in options.items() if not value):
        raise _refused(f"takes a text for {', '.join(empty)}, which is empty")
    # An address such as abfss://container@account.dfs.core.windows.net/table names it itself.
    if "account_name" not in options and "@" not in netloc:
        raise _refused("takes account_name, the name of the storage account")
    if "account_key" in options:
        _check_key(options["account_key"])
    if "client_secret" in options and not {"client_id", "tenant_id"} <= options.keys():
        raise _refused("takes client_id and tenant_id beside client_secret")
    _check_endpoint(options)
    return options


def _canonical(given: str) -> str:
    name = given.strip().lower()
    for prefix in _PREFIXES:
        if name.startswith(prefix) and name not in _OPTIONS:
            name = name.removeprefix(prefix)
            break
    return _SAME.get(name, name)


def _check_key(key: str) -> None:
    try:
        base64.b64decode(key, validate=True)
    except ValueError:
        # Not chained: the text of the error may show the key.
        raise _refused("takes an account_key in base64, as the portal shows it") from None


def _check_endpoint(options: Mapping[str, str]) -> None:
    endpoint = options.get("endpoint")
    if endpoint is None:
        return
    scheme = urlsplit(endpoint).scheme
    if scheme not in ("http", "https"):
        raise _refused("takes an endpoint that begins with https:// or http://")
    if scheme == "http" and options.get("allow_http", "").lower() != "true":
        raise _refused('takes "allow_http": "true" beside an endpoint of http://')


def _refused(why: str) -> ConfigurationError:
    return ConfigurationError(f"AZURE_STORAGE_OPTIONS: {why}")
