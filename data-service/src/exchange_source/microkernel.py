"""The microkernel: which exchanges there are, and one door to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final, Protocol, Self, cast

import structlog

from config import Settings
from domain.clock import IClock
from errors import ConfigurationError, UnknownExchange
from exchange_source.interfaces import (
    HistoricalData,
    IDataSourceConnector,
    IExchangeAPIClient,
    IStreamHandle,
    Priority,
    UpdateCallback,
)

_log: Final = structlog.get_logger(__name__)

PluginFactory = Callable[[Settings, IClock], IExchangeAPIClient]
"""Makes one exchange's plugin; imports what it needs when it is called, and connects nothing."""


class _PluginClass(Protocol):
    def from_settings(self, settings: Settings, clock: IClock) -> IExchangeAPIClient: ...


def _lazily(module: str, name: str) -> PluginFactory:
    """The factory of a plugin whose module is imported when it is enabled, not before."""

    def make(settings: Settings, clock: IClock) -> IExchangeAPIClient:
        plugin = cast("_PluginClass", getattr(import_module(module), name))
        return plugin.from_settings(settings, clock)

    return make


BUILT_IN: Final[Mapping[str, PluginFactory]] = {
    "binance": _lazily("exchange_source.plugins.binance_exchange", "BinanceExchange"),
    "coinbase": _lazily("exchange_source.plugins.coinbase_exchange", "CoinbaseExchange"),
    "crypto.com": _lazily("exchange_source.plugins.cryptocom_exchange", "CryptocomExchange"),
}
"""Every exchange that can be enabled, by its public name."""


class PluginRegistry:
    """The plugins by the names that they give themselves, in the order of registration."""

    def __init__(self) -> None:
        self._plugins: dict[str, IExchangeAPIClient] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._plugins)

    def add(self, plugin: IExchangeAPIClient) -> None:
        """Register ``plugin`` under its own name.

        Raises:
            ValueError: a plugin of that name is registered already.
        """
        name = plugin.get_exchange_name()
        if name in self._plugins:
            raise ValueError(f"exchange {name!r} is registered already")
        self._plugins[name] = plugin

    def get(self, exchange_name: str) -> IExchangeAPIClient:
        """The plugin of that name.

        Raises:
            UnknownExchange: there is none; the message names those that there are.
        """
        plugin = self._plugins.get(exchange_name)
        if plugin is None:
            known = ", ".join(self._plugins) or "none"
            raise UnknownExchange(f"exchange {exchange_name!r} is not enabled; enabled: {known}")
        return plugin


class DataSourceConnectorImpl(IDataSourceConnector):
    """Every enabled exchange, each behind its plugin."""

    def __init__(self, registry: PluginRegistry) -> None:
        self._registry = registry

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        clock: IClock,
        *,
        factories: Mapping[str, PluginFactory] = BUILT_IN,
    ) -> Self:
        """Discover and register the plugins that the settings enable, in their order.

        A plugin that cannot be made is logged and left out, so that the others serve.

        Raises:
            ConfigurationError: none of them can be made.
        """
        registry = PluginRegistry()
        for name in settings.exchanges:
            try:
                registry.add(factories[name](settings, clock))
            except Exception:  # noqa: BLE001  outermost frame of foreign code
                _log.exception("exchange_plugin_left_out", exchange=name)
        if not registry.names:
            raise ConfigurationError(
                f"EXCHANGES: none of {', '.join(settings.exchanges)} could be loaded, see the log"
            )
        return cls(registry)

    @property
    def exchange_names(self) -> tuple[str, ...]:
        return self._registry.names

    def get_client(self, exchange_name: str) -> IExchangeAPIClient:
        return self._registry.get(exchange_name)

    async def check_coin_availability(
        self, exchange_name: str, coin_symbol: str, *, priority: Priority = Priority.REQUEST
    ) -> str | None:
        client = self.get_client(exchange_name)
        return await client.check_coin_availability(coin_symbol, priority=priority)

    async def fetch_historical_data(
        self,
        exchange_name: str,
        market: str,
        interval: str,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.REQUEST,
    ) -> HistoricalData:
        client = self.get_client(exchange_name)
        return await client.fetch_historical_data(market, interval, start, end, priority=priority)

    async def start_realtime_stream(
        self, exchange_name: str, market: str, interval: str, callback: UpdateCallback
    ) -> IStreamHandle:
        client = self.get_client(exchange_name)
        return await client.start_realtime_stream(market, interval, callback)

    async def close(self) -> None:
        clients = [self.get_client(name) for name in self.exchange_names]
        results = await asyncio.gather(
            *(client.close() for client in clients), return_exceptions=True
        )
        for name, result in zip(self.exchange_names, results, strict=True):
            if isinstance(result, Exception):
                _log.error("exchange_close_failed", exchange=name, exc_info=result)
