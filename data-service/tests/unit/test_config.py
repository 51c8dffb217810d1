"""Settings: what is right, and the one line that names what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config import Settings, load_settings
from domain.clock import MarketClock
from errors import ConfigurationError

EXAMPLE = Path(__file__).parents[3] / ".env.example"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_any_setting_it_is_a_local_service_on_loopback() -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.storage_type, settings.storage_root) == ("local", "./data")
    assert settings.targets_on == "local"
    assert settings.targets_path == "data/targets_delta"
    assert settings.market_clock == MarketClock()


def test_settings_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXCHANGE_QUOTES", "eur, usd ,")
    monkeypatch.setenv("EXCHANGE_PREFERENCES", '{"btc": ["Crypto.com"]}')
    monkeypatch.setenv("EXCHANGE_ENDPOINTS", '{"Crypto.com": "http://127.0.0.1:9400"}')
    monkeypatch.setenv("EXCHANGE_CREDENTIALS", '{"Crypto.com": {"apiKey": "k"}}')
    monkeypatch.setenv("MARKET_CLOCK", '{"origin": 1, "market": 2, "speed": 60}')
    monkeypatch.setenv("LOG_LEVEL", "warning")
    settings = load_settings()
    assert settings.exchange_quotes == ("EUR", "USD")
    assert settings.exchange_preferences == {"BTC": ("crypto.com",)}
    assert settings.exchange_endpoints == {"crypto.com": "http://127.0.0.1:9400"}
    assert set(settings.exchange_credentials) == {"crypto.com"}
    assert settings.market_clock == MarketClock(1, 2, 60)
    assert settings.log_level == "WARNING"


def test_a_file_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("PORT=8001\nHOST=::1\n")
    monkeypatch.setenv("PORT", "8002")
    settings = load_settings()
    assert (settings.host, settings.port) == ("::1", 8002)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("HOST", "", "at least 1"),
        ("PORT", "seventy", "integer"),
        ("PORT", "70000", "65535"),
        ("STORAGE_TYPE", "floppy", "'local' or 'azure'"),
        ("STORAGE_TYPE", "azure", "exactly one of them, none is set"),
        ("AZURE_STORAGE_CONNECTION_STRING", "hunter2-is-secret", "AccountName=...;AccountKey=..."),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a", "AccountName=...;AccountKey=..."),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=hunter2", "AccountName=...;AccountKey="),
        (
            "AZURE_STORAGE_CONNECTION_STRING",
            "AccountName=a;AccountKey=hunter2!",
            "with the key as the portal shows it",
        ),
        ("AZURE_STORAGE_ACCOUNT_URL", "account", "https://account.blob.core.windows.net"),
        ("AZURE_STORAGE_ACCOUNT_URL", "http://account.blob.core.windows.net", "the https address"),
        ("AZURE_STORAGE_ACCOUNT_URL", "https://a.net?sig=hunter2", "without a signature"),
        ("STORAGE_ROOT", "", "at least 1"),
        ("STATE_DIR", "", "a folder"),
        ("TARGET_TABLE_PATH", "", "at least 1"),
        ("EXCHANGES", "kraken", "crypto.com"),
        ("EXCHANGES", "", "crypto.com"),
        ("EXCHANGES", "crypto.com,crypto.com", "each once"),
        ("EXCHANGE_QUOTES", ",", "quote currencies"),
        ("EXCHANGE_PREFERENCES", "[]", "a JSON object"),
        ("EXCHANGE_PREFERENCES", '{"BTC": ["kraken"]}', "crypto.com"),
        ("EXCHANGE_ENDPOINTS", "{", "a JSON object"),
        ("EXCHANGE_ENDPOINTS", '{"crypto.com": "127.0.0.1"}', "http://127.0.0.1:9400"),
        ("EXCHANGE_ENDPOINTS", '{"crypto.com": "http://[::1"}', "http://127.0.0.1:9400"),
        ("EXCHANGE_ENDPOINTS", '{"crypto.com": "http://localhost:x"}', "http://127.0.0.1:9400"),
        ("EXCHANGE_ENDPOINTS", '{"crypto.com": "http://localhost:99999"}', "http://127.0.0.1:9400"),
        ("EXCHANGE_ENDPOINTS", '{"kraken": "http://127.0.0.1"}', "crypto.com"),
        ("EXCHANGE_CREDENTIALS", "hunter2-is-secret", "a JSON object"),
        ("EXCHANGE_CREDENTIALS", '{"kraken": {"secret": "hunter2-is-secret"}}', "crypto.com"),
        ("BACKFILL_DAYS", "0", "greater than 0"),
        ("AUTH_ALGORITHM", "none", "HS256"),
        ("AUTH_SECRET", "hunter2-is-secret", "at least 32 bytes"),
        ("AUTH_USERS", "hunter2-is-secret", "a JSON object"),
        ("LOG_FORMAT", "xml", "'console' or 'json'"),
        ("MARKET_CLOCK", "fast", "speed"),
        ("MARKET_CLOCK", '{"origin": 1e400, "market": 0, "speed": 1}', "speed"),
        ("EXCHANGE_CREDENTIALS", '{"hunter2-is-secret": {"secret": "x"}}', "crypto.com"),
        ("MARKET_CLOCK", '{"origin": 0, "market": 0, "speed": 0}', "above 0"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, takes: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as wrong:
        load_settings()
    assert name in wrong.value.message
    assert takes in wrong.value.message
    assert "\n" not in wrong.value.message
    assert "hunter2" not in wrong.value.message


CONNECTION = (
    "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5PT0=;"
    "EndpointSuffix=core.windows.net"
)


@pytest.mark.parametrize(
    ("settings", "takes"),
    [
        ({"azure_storage_connection_string": CONNECTION}, "STORAGE_ROOT: takes the name of a con"),
        ({"azure_storage_connection_string": CONNECTION, "storage_root": "Data"}, "lower-case"),
        ({"azure_storage_connection_string": CONNECTION, "storage_root": "a--b"}, "single hyphens"),
        ({"azure_storage_connection_string": CONNECTION, "storage_root": "ab"}, "3 to 63"),
        (
            {
                "azure_storage_connection_string": CONNECTION,
                "azure_storage_account_url": "https://acc.blob.core.windows.net",
                "storage_root": "data",
            },
            "both are set",
        ),
    ],
)
def test_settings_of_azure_that_do_not_fit_each_other_are_one_line(
    settings: dict[str, str], takes: str
) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load_settings(storage_type="azure", **settings)
    assert takes in wrong.value.message
    assert "\n" not in wrong.value.message
    assert "a2V5" not in wrong.value.message


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (
            {"azure_storage_connection_string": CONNECTION},
            {"account_name": "acc", "account_key": "a2V5PT0="},
        ),
        (
            {
                "azure_storage_connection_string": "AccountName=devstoreaccount1;AccountKey=a2V5;"
                "BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;"
            },
            {
                "account_name": "devstoreaccount1",
                "account_key": "a2V5",
                "endpoint": "http://127.0.0.1:10000/devstoreaccount1",
                "allow_http": "true",
            },
        ),
        (
            {
                "azure_storage_connection_string": "BlobEndpoint=https://acc.blob.core.windows.net"
                "/;SharedAccessSignature=sv=2024&sig=a%3D"
            },
            {"account_name": "acc", "sas_token": "sv=2024&sig=a%3D"},
        ),
        (
            {"azure_storage_account_url": "https://acc.blob.core.windows.net/"},
            {"account_name": "acc"},
        ),
        (
            {"azure_storage_account_url": "https://acc.blob.example.org"},
            {"account_name": "acc", "endpoint": "https://acc.blob.example.org"},
        ),
        (
            {
                "azure_storage_connection_string": CONNECTION,
                "azure_storage_options": '{"account_name": "other"}',
            },
            {"account_name": "other"},
        ),
    ],
)
def test_the_table_of_targets_is_reached_as_the_storage_is_unless_told_otherwise(
    settings: dict[str, str], options: dict[str, str]
) -> None:
    loaded = load_settings(storage_type="azure", storage_root="candles", **settings)
    assert (loaded.targets_on, loaded.targets_path) == ("azure", "az://candles/targets_delta")
    assert loaded.targets_options == options


def test_a_local_table_beside_azure_storage_lies_in_the_state_folder() -> None:
    loaded = load_settings(
        storage_type="azure",
        storage_root="candles",
        azure_storage_connection_string=CONNECTION,
        target_storage_type="local",
        state_dir="/state",
    )
    assert loaded.targets_path == "/state/targets_delta"
    assert loaded.targets_options == {}


def test_a_root_is_redirected_when_an_enabled_exchange_is() -> None:
    assert not load_settings().redirected
    assert load_settings(exchange_endpoints={"crypto.com": "http://127.0.0.1:9400"}).redirected


def test_a_file_that_is_no_text_is_one_line_without_its_content(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"AUTH_SECRET=hunter2-\xff\n")
    with pytest.raises(ConfigurationError) as wrong:
        load_settings()
    assert wrong.value.message == ".env: takes a text file in UTF-8"


def test_secrets_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_SECRET", "hunter2-" * 5)
    monkeypatch.setenv("EXCHANGE_CREDENTIALS", '{"crypto.com": {"secret": "hunter2"}}')
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=hunter21")
    assert "hunter2" not in repr(load_settings())


def test_the_example_names_every_setting_and_can_be_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = EXAMPLE.read_text()
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", text, re.MULTILINE))
    assert named == {name.upper() for name in Settings.model_fields}
    for name, value in re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE):
        monkeypatch.setenv(name, value)
    from_example = load_settings()
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    assert from_example == load_settings()
