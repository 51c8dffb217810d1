"""Which container of which account, and what signs in to it."""

from __future__ import annotations

import base64
import binascii
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from azure.storage.blob.aio import ContainerClient

from config import connection_fields
from errors import ConfigurationError
from storage.implementations.azure_calls import WholeBodyTransport

_CONNECTION_STRING: Final = "AZURE_STORAGE_CONNECTION_STRING"
_ACCOUNT_URL: Final = "AZURE_STORAGE_ACCOUNT_URL"
_HOST: Final = ".blob.core.windows.net"
_WHAT_IT_TAKES: Final = (
    "takes the connection string of a storage account, such as DefaultEndpointsProtocol=https;"
    "AccountName=...;AccountKey=...;EndpointSuffix=core.windows.net"
)


@dataclass(frozen=True, slots=True)
class AzureAccount:
    """A container and the way in: a connection string, or an account URL with the identity of the
    machine. Never shown: it holds the secret."""

    container: str
    connection_string: str | None
    account_url: str | None

    def __repr__(self) -> str:
        return f"AzureAccount({self.address!r})"

    def check(self) -> None:
        """Refuse what no client can be made of.

        Raises:
            ConfigurationError: one line that names the setting, without its value.
        """
        if (self.connection_string is None) == (self.account_url is None):
            raise ConfigurationError(f"{_CONNECTION_STRING}, {_ACCOUNT_URL}: takes exactly one")
        try:
            host = urlsplit(self._url).hostname
        except ValueError:
            host = None
        if self.account_url is not None and (
            not host or not self.account_url.startswith("https://") or "?" in self.account_url
        ):
            raise ConfigurationError(
                f"{_ACCOUNT_URL}: takes the https address of a storage account without a "
                f"signature, such as https://account{_HOST}"
            )
        if self.connection_string is not None:
            fields = self._fields
            key = fields.get("accountkey")
            if not host or not (key or fields.get("sharedaccesssignature")):
                raise ConfigurationError(f"{_CONNECTION_STRING}: {_WHAT_IT_TAKES}")
            try:
                base64.b64decode(key or "", validate=True)
            except (binascii.Error, ValueError):
                # Not chained: the value is a secret.
                raise ConfigurationError(
                    f"{_CONNECTION_STRING}: its AccountKey is no base64; copy the key as the "
                    f"portal shows it"
                ) from None

    @property
    def address(self) -> str:
        """``azure:`` and the account, or the host where that is not the service's own, and the
        container."""
        parts = urlsplit(self._url)
        host = (parts.hostname or "").lower()
        if host.endswith(_HOST):
            return f"azure:{host.removesuffix(_HOST)}/{self.container}"
        port = f":{parts.port}" if parts.port is not None else ""
        path = parts.path.rstrip("/")
        return f"azure:{host}{port}{path}/{self.container}"

    def client(self, held: AsyncExitStack) -> ContainerClient:
        """A client that ``held`` closes, and whose every try is one request."""
        # The SDK tells of each request, with its headers.
        silent = logging.getLogger(f"{__name__}.requests")
        silent.setLevel(logging.ERROR)
        options: dict[str, Any] = {
            "retry_total": 0,
            "permit_redirects": False,
            "transport": WholeBodyTransport(),
            "logger": silent,
            "base_user_agent": "cb-trade-data",
        }
        if self.connection_string is not None:
            try:
                client = ContainerClient.from_connection_string(
                    self.connection_string, self.container, **options
                )
            except ValueError:
                # Not chained: the text may hold a secret.
                raise ConfigurationError(f"{_CONNECTION_STRING}: {_WHAT_IT_TAKES}") from None
        else:
            # Imported here: a service that signs with a key needs none of it.
            from azure.identity.aio import DefaultAzureCredential  # noqa: PLC0415

            credential = DefaultAzureCredential()
            held.push_async_callback(credential.close)
            client = ContainerClient(
                self.account_url or "", self.container, credential=credential, **options
            )
        held.push_async_callback(client.close)
        return client

    @property
    def _url(self) -> str:
        if self.account_url is not None:
            return self.account_url
        fields = self._fields
        endpoint = fields.get("blobendpoint")
        if endpoint is not None:
            return endpoint
        account = fields.get("accountname")
        if not account:
            return ""
        suffix = fields.get("endpointsuffix", "core.windows.net")
        return f"{fields.get('defaultendpointsprotocol', 'https')}://{account}.blob.{suffix}"

    @property
    def _fields(self) -> dict[str, str]:
        return connection_fields(self.connection_string or "")
