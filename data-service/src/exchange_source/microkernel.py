"""The microkernel: which exchanges there are, and one door to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol, Self, cast

import structlog

from config import EXCHANGE_PLUGINS, Settings
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


def _installed(entry: EntryPoint) -> PluginFactory:
    """The factory of an installed package's plugin."""

    def make(settings: Settings, clock: IClock) -> IExchangeAPIClient:
        # What plugins have in common is made ready before any of their own imports.
        import_module("exchange_source.plugins")
        return cast("_PluginClass", entry.load()).from_settings(settings, clock)

    return make


BUILT_IN: Final[Mapping[str, PluginFactory]] = {
    "binance": _lazily("exchange_source.plugins.binance_exchange", "BinanceExchange"),
    "coinbase": _lazily("exchange_source.plugins.coinbase_exchange", "CoinbaseExchange"),
    "crypto.com": _lazily("exchange_source.plugins.cryptocom_exchange", "CryptocomExchange"),
}
"""The exchanges that come with the service, by their public names."""

_REASON_LENGTH: Final = 300


@dataclass(frozen=True, slots=True)
class _Offer:
    """Somebody's plugin for an exchange; ``package`` says whose."""

    package: str
    make: PluginFactory


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

        ``factories`` come first, then installed packages, which offer a plugin each by an entry
        point of the group ``cb_trade.exchanges``, in the order of their names. Nothing is imported
        of what is not enabled. A plugin that cannot be made, or that is the second of its name, is
        logged and left out, so that the others serve.

        Raises:
            ConfigurationError: none of them can be made.
        """
        registry = PluginRegistry()
        offers = _discover(settings.exchanges, factories)
        for name in settings.exchanges:
            if name in offers:
                _register(registry, name, offers[name], settings, clock)
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


def _discover(
    enabled: Collection[str], factories: Mapping[str, PluginFactory]
) -> dict[str, _Offer]:
    """Whose plugin is to be taken for each enabled exchange, of those that anybody offers."""
    offers = {
        name: _Offer("the service itself", make)
        for name, make in factories.items()
        if name in enabled
    }
    for entry in sorted(entry_points(group=EXCHANGE_PLUGINS), key=_package):
        name, package = entry.name.lower(), _package(entry)
        if name in offers:
            _leave_out(name, package, f"{offers[name].package} offers that exchange already")
        elif name in enabled:
            offers[name] = _Offer(package, _installed(entry))
    return offers


def _register(
    registry: PluginRegistry, name: str, offer: _Offer, settings: Settings, clock: IClock
) -> None:
    """Make the plugin that is offered for ``name`` and register it, or log why not."""
    try:
        plugin = offer.make(settings, clock)
        if not isinstance(plugin, IExchangeAPIClient):
            raise TypeError(f"{type(plugin).__name__} is no IExchangeAPIClient")
        if (own_name := plugin.get_exchange_name()) != name:
            raise ValueError(f"its plugin calls itself {own_name!r}")
        registry.add(plugin)
    except Exception as exc:  # noqa: BLE001  outermost frame of foreign code
        reason = f"{type(exc).__name__}: {' '.join(str(exc).split()):.{_REASON_LENGTH}}"
        _leave_out(name, offer.package, reason)
        _log.debug("exchange_plugin_failed", exchange=name, exc_info=exc)


def _leave_out(name: str, package: str, reason: str) -> None:
    _log.error("exchange_plugin_left_out", exchange=name, package=package, reason=reason)


def _package(entry: EntryPoint) -> str:
    return "?" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
