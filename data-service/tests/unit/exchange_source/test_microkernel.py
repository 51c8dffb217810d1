"""The registry of plugins, and the connector that delegates to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import exchange_source
from config import Settings
from domain.candle import Candle, CandleUpdate
from domain.clock import IClock
from domain.time_range import TimeRange
from errors import ConfigurationError, UnknownExchange
from exchange_source.interfaces import IDataSourceConnector, IExchangeAPIClient, Priority
from exchange_source.microkernel import BUILT_IN, DataSourceConnectorImpl, PluginRegistry
from tests.support.clock import ManualClock
from tests.support.exchange import Asked, FakeExchange

MINUTE = 60_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_040_000)


@pytest.fixture
def plugin(clock: ManualClock) -> FakeExchange:
    return FakeExchange(clock)


@pytest.fixture
def connector(plugin: FakeExchange, clock: ManualClock) -> DataSourceConnectorImpl:
    registry = PluginRegistry()
    registry.add(plugin)
    registry.add(FakeExchange(clock, name="binance", exchange_id="binance"))
    return DataSourceConnectorImpl(registry)


def settings_of(*names: str) -> Settings:
    return Settings.model_construct(exchanges=names)


class TestPluginRegistry:
    def test_a_plugin_is_added_under_its_own_name(self, plugin: FakeExchange) -> None:
        registry = PluginRegistry()
        registry.add(plugin)
        assert registry.names == ("crypto.com",)

    def test_a_plugin_is_found_by_its_name(self, plugin: FakeExchange) -> None:
        registry = PluginRegistry()
        registry.add(plugin)
        assert registry.get("crypto.com") is plugin

    def test_an_unknown_name_is_an_error_that_names_those_that_exist(
        self, plugin: FakeExchange
    ) -> None:
        registry = PluginRegistry()
        registry.add(plugin)
        with pytest.raises(UnknownExchange, match=r"'kraken' is not enabled; enabled: crypto\.com"):
            registry.get("kraken")

    def test_an_empty_registry_says_that_there_is_none(self) -> None:
        with pytest.raises(UnknownExchange, match="enabled: none"):
            PluginRegistry().get("kraken")

    def test_plugins_of_different_names_live_side_by_side(
        self, plugin: FakeExchange, clock: ManualClock
    ) -> None:
        other = FakeExchange(clock, name="binance")
        registry = PluginRegistry()
        registry.add(plugin)
        registry.add(other)
        assert registry.names == ("crypto.com", "binance")
        assert registry.get("binance") is other

    def test_a_name_that_exists_already_is_an_error_and_changes_nothing(
        self, plugin: FakeExchange, clock: ManualClock
    ) -> None:
        registry = PluginRegistry()
        registry.add(plugin)
        with pytest.raises(ValueError, match=r"'crypto\.com' is registered already"):
            registry.add(FakeExchange(clock))
        assert registry.get("crypto.com") is plugin


class TestDataSourceConnector:
    def test_it_implements_its_interface(self, connector: DataSourceConnectorImpl) -> None:
        assert isinstance(connector, IDataSourceConnector)

    def test_get_client_gives_the_plugin_of_the_name(
        self, connector: DataSourceConnectorImpl, plugin: FakeExchange
    ) -> None:
        assert connector.get_client("crypto.com") is plugin

    def test_get_client_of_an_unknown_name_is_an_error(
        self, connector: DataSourceConnectorImpl
    ) -> None:
        with pytest.raises(UnknownExchange, match=r"crypto\.com, binance"):
            connector.get_client("kraken")

    async def test_availability_is_asked_of_the_plugin(
        self, connector: DataSourceConnectorImpl, plugin: FakeExchange
    ) -> None:
        market = await connector.check_coin_availability(
            "crypto.com", "btc", priority=Priority.LIVE
        )
        assert market == "BTC/USD"
        assert plugin.requests["check_coin_availability"] == 1

    async def test_history_is_asked_of_the_plugin(
        self, connector: DataSourceConnectorImpl, plugin: FakeExchange, clock: ManualClock
    ) -> None:
        now = clock.now_ms()
        candle = Candle(now - 2 * MINUTE, 1, 1, 1, 1, 1)
        plugin.put("BTC/USD", "1m", [candle])
        data = await connector.fetch_historical_data(
            "crypto.com", "BTC/USD", "1m", now - 3 * MINUTE, now, priority=Priority.BACKFILL
        )
        assert data.candles == (candle,)
        assert plugin.asked == [
            Asked("BTC/USD", "1m", TimeRange(now - 3 * MINUTE, now), Priority.BACKFILL)
        ]

    async def test_a_stream_is_started_at_the_plugin(
        self, connector: DataSourceConnectorImpl, plugin: FakeExchange
    ) -> None:
        got: list[CandleUpdate] = []

        async def take(update: CandleUpdate) -> None:
            got.append(update)

        handle = await connector.start_realtime_stream("crypto.com", "BTC/USD", "1m", take)
        update = CandleUpdate("crypto.com", "BTC/USD", "1m", Candle(0, 1, 1, 1, 1, 1))
        await plugin.push(update)
        assert got == [update]
        await handle.stop()
        assert plugin.running_streams == []

    async def test_closing_closes_every_plugin_twice_over(
        self, connector: DataSourceConnectorImpl, plugin: FakeExchange
    ) -> None:
        await connector.close()
        await connector.close()
        assert plugin.closed

    async def test_a_plugin_that_fails_to_close_does_not_keep_the_others_open(
        self, clock: ManualClock
    ) -> None:
        class Stuck(FakeExchange):
            async def close(self) -> None:
                raise RuntimeError("stuck")

        registry = PluginRegistry()
        other = FakeExchange(clock, name="binance")
        registry.add(Stuck(clock))
        registry.add(other)
        await DataSourceConnectorImpl(registry).close()
        assert other.closed


class TestDiscovery:
    async def test_the_built_in_plugins_register_as_the_settings_enable_them(
        self, clock: ManualClock
    ) -> None:
        connector = DataSourceConnectorImpl.from_settings(settings_of("crypto.com"), clock)
        assert connector.exchange_names == ("crypto.com",)
        assert connector.get_client("crypto.com").get_exchange_id() == "cryptocom"
        await connector.close()

    def test_only_what_is_enabled_is_made_in_the_order_of_the_settings(
        self, clock: ManualClock
    ) -> None:
        made: list[str] = []

        def factory(name: str) -> IExchangeAPIClient:
            made.append(name)
            return FakeExchange(clock, name=name)

        factories = {
            name: lambda _settings, _clock, name=name: factory(name) for name in ("a", "b", "c")
        }
        connector = DataSourceConnectorImpl.from_settings(
            settings_of("c", "a"), clock, factories=factories
        )
        assert connector.exchange_names == ("c", "a")
        assert made == ["c", "a"]

    def test_a_broken_plugin_is_left_out_and_the_rest_starts(self, clock: ManualClock) -> None:
        def broken(settings: Settings, clock: IClock) -> IExchangeAPIClient:
            raise ImportError("half installed")

        connector = DataSourceConnectorImpl.from_settings(
            settings_of("bad", "good"),
            clock,
            factories={"bad": broken, "good": lambda _s, c: FakeExchange(c, name="good")},
        )
        assert connector.exchange_names == ("good",)

    def test_no_plugin_at_all_stops_the_start_in_one_line(self, clock: ManualClock) -> None:
        with pytest.raises(ConfigurationError, match="EXCHANGES: none of bad could be loaded"):
            DataSourceConnectorImpl.from_settings(settings_of("bad"), clock, factories={})

    def test_the_microkernel_loads_no_plugin_before_one_is_enabled(self) -> None:
        source = Path(exchange_source.__file__).parent.parent
        code = (
            "import sys, exchange_source.microkernel as m; "
            "assert 'crypto.com' in m.BUILT_IN; assert 'ccxt' not in sys.modules"
        )
        subprocess.run(
            [sys.executable, "-c", code], check=True, timeout=30, env={"PYTHONPATH": str(source)}
        )
        assert set(BUILT_IN) >= {"crypto.com"}
