"""The registry of plugins, and the connector that delegates to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import exchange_source
from config import BUILT_IN_EXCHANGES, Settings, load_settings
from domain.candle import Candle, CandleUpdate
from domain.clock import IClock, MarketClock
from domain.time_range import TimeRange
from errors import ConfigurationError, UnknownExchange
from exchange_source.interfaces import IDataSourceConnector, IExchangeAPIClient, Priority
from exchange_source.microkernel import BUILT_IN, DataSourceConnectorImpl, PluginRegistry
from sandbox.app import SandboxConfig, running_sandbox
from tests.support.clock import ManualClock
from tests.support.exchange import Asked, FakeExchange
from tests.support.packages import EXAMPLE, install, write_package

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
        assert set(BUILT_IN) == set(BUILT_IN_EXCHANGES)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


FAKE = """
from tests.support.exchange import FakeExchange

class Plugin(FakeExchange):
    name = "{0}"

    @classmethod
    def from_settings(cls, settings, clock):
        return cls(clock, name=cls.name)
"""

MADE = """
from exchange_source.interfaces import IExchangeAPIClient

class Plugin{0}:
    @classmethod
    def from_settings(cls, settings, clock):
        {1}
"""


def loaded(clock: IClock, *names: str) -> tuple[tuple[str, ...], list[tuple[str, str, str]]]:
    """The exchanges of a connector with ``names`` enabled and a built-in one called ``built.in``;
    and who was left out of it, with the reason."""
    with capture_logs() as logs:
        connector = DataSourceConnectorImpl.from_settings(
            settings_of(*names),
            clock,
            factories={"built.in": lambda _s, c: FakeExchange(c, name="built.in")},
        )
    told = [log for log in logs if log["event"] == "exchange_plugin_left_out"]
    assert {log["log_level"] for log in told} <= {"error"}
    return connector.exchange_names, [
        (log["exchange"], log["package"], log["reason"]) for log in told
    ]


class TestInstalledPackages:
    def test_a_package_offers_an_exchange_beside_the_built_in_ones(
        self, packages: Path, clock: ManualClock
    ) -> None:
        write_package(packages, "kraken-plugin", FAKE.format("kraken"), kraken="Plugin")
        assert load_settings(_env_file=None, exchanges="Kraken").exchanges == ("kraken",)
        assert loaded(clock, "kraken", "built.in") == (("kraken", "built.in"), [])
        with pytest.raises(
            ConfigurationError,
            match=r"EXCHANGES: takes .* crypto\.com, binance, coinbase, kraken, each once",
        ):
            load_settings(_env_file=None, exchanges="krakken")

    def test_what_is_not_enabled_is_not_imported(self, packages: Path, clock: ManualClock) -> None:
        write_package(packages, "bad-plugin", "raise ImportError", bad="Plugin")
        write_package(packages, "worse-plugin", "raise ImportError", bad="Plugin")
        load_settings(_env_file=None, exchanges="crypto.com")
        assert loaded(clock, "built.in") == (("built.in",), [])
        assert {"bad_plugin", "worse_plugin"} & sys.modules.keys() == set()

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
            ("Plugin = 1 +", "invalid syntax"),
            ("", "has no attribute 'Plugin'"),
            ("class Plugin: pass", "has no attribute 'from_settings'"),
            (MADE.format("", "raise RuntimeError('two\\nlines')"), "RuntimeError: two lines"),
            (MADE.format("", "return cls()"), "Plugin is no IExchangeAPIClient"),
            (
                MADE.format("(IExchangeAPIClient)", "return cls()"),
                "abstract methods check_coin_availability, clock_skew_ms, close",
            ),
            (FAKE.format("binance"), "its plugin calls itself 'binance'"),
        ],
    )
    def test_a_broken_plugin_is_one_line_that_names_package_and_reason(
        self, packages: Path, clock: ManualClock, code: str, reason: str
    ) -> None:
        write_package(packages, "kraken-plugin", code, kraken="Plugin")
        names, left_out = loaded(clock, "kraken", "built.in")
        assert names == ("built.in",)
        ((exchange, package, why),) = left_out
        assert (exchange, package) == ("kraken", "kraken-plugin 1.0")
        assert reason in why
        assert "\n" not in why

    def test_the_built_in_plugin_of_a_name_is_taken(
        self, packages: Path, clock: ManualClock
    ) -> None:
        write_package(
            packages, "other-plugin", "raise ImportError", **{"built.in": "Plugin", "other": "P"}
        )
        assert loaded(clock, "built.in") == (
            ("built.in",),
            [("built.in", "other-plugin 1.0",
              "the service itself offers that exchange already")],
        )  # fmt: skip

    def test_of_two_packages_the_first_by_name_is_taken(
        self, packages: Path, clock: ManualClock
    ) -> None:
        write_package(packages, "plugin-b", "raise ImportError", kraken="Plugin")
        write_package(packages, "plugin-a", FAKE.format("kraken"), kraken="Plugin")
        assert loaded(clock, "kraken") == (
            ("kraken",),
            [("kraken", "plugin-b 1.0", "plugin-a 1.0 offers that exchange already")],
        )

    def test_a_package_that_imports_ccxt_first_loads_no_more_of_it_than_the_others(
        self, packages: Path
    ) -> None:
        write_package(packages, "early-plugin", "import ccxt.pro", early="Plugin")
        source = Path(exchange_source.__file__).parent.parent
        code = (
            "import sys\n"
            "from config import Settings\n"
            "from domain.clock import MarketClock\n"
            "from errors import ConfigurationError\n"
            "from exchange_source.microkernel import DataSourceConnectorImpl\n"
            "settings = Settings.model_construct(exchanges=('early',))\n"
            "try: DataSourceConnectorImpl.from_settings(settings, MarketClock())\n"
            "except ConfigurationError: pass\n"
            "assert 'early_plugin' in sys.modules and 'ccxt.binance' not in sys.modules\n"
        )
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            timeout=30,
            env={"PYTHONPATH": f"{packages}:{source}"},
            stdout=subprocess.DEVNULL,
        )

    async def test_the_example_package_answers_through_the_connector(self, packages: Path) -> None:
        install(EXAMPLE, packages)
        async with running_sandbox(SandboxConfig()) as sandbox:
            settings = load_settings(
                _env_file=None, exchanges="example", exchange_endpoints={"example": sandbox.url}
            )
            clock = MarketClock()
            connector = DataSourceConnectorImpl.from_settings(settings, clock)
            assert connector.exchange_names == ("example",)
            now = clock.now_ms()
            try:
                market = await connector.check_coin_availability("example", "btc")
                assert market == "BTC/USD"
                data = await connector.fetch_historical_data(
                    "example", market, "5m", now - 900 * MINUTE, now
                )
            finally:
                await connector.close()
        assert len(data.candles) > 150
