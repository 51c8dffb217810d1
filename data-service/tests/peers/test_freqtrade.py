"""freqtrade's downloader reads the sandbox as it would the exchange, and gets what the service has.

It knows nothing of the service, nor of the sandbox: by its configuration alone it asks another
address.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from domain.clock import MarketClock
from tests.peers.running import run_peer
from tests.support.market import DAY, MINUTE
from tests.support.processes import Stack, stack

PATIENCE_S = 240.0
# Its name there, and which of its addresses are replaced by which path of another.
API = {
    "crypto.com": ("cryptocom", {"v1": "/exchange/v1"}),
    "binance": ("binance", {"public": "/api/v3"}),
}
VALUES = ("open", "high", "low", "close", "volume")
Rows = dict[int, tuple[float, ...]]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


async def downloaded(folder: Path, exchange: str, url: str, timeframe: str, days: int) -> Rows:
    """What freqtrade has of BTC/USDT after ``download-data``."""
    name, addresses = API[exchange]
    settings = {
        "stake_currency": "USDT",
        "dry_run": True,
        "trading_mode": "spot",
        "exchange": {
            "name": name,
            "pair_whitelist": ["BTC/USDT"],
            "only_from_ccxt": True,
            "ccxt_config": {
                "options": {"fetchMarkets": {"types": ["spot"]}},
                "urls": {"api": {key: url + path for key, path in addresses.items()}},
            },
        },
        "pairlists": [{"method": "StaticPairList"}],
    }
    home = folder / f"freqtrade-{name}-{timeframe}"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(settings))
    await run_peer(
        "freqtrade", "download-data",
        "--config", str(home / "config.json"), "--userdir", str(home),
        "--datadir", str(home / "data"), "--timeframes", timeframe, "--days", str(days),
        "--data-format-ohlcv", "feather",
        folder=home, within_s=PATIENCE_S,
    )  # fmt: skip
    frame = pd.read_feather(home / f"data/BTC_USDT-{timeframe}.feather")
    times = frame["date"].dt.as_unit("ms").astype("int64").tolist()
    values = frame[list(VALUES)].to_numpy().tolist()
    return {time: tuple(row) for time, row in zip(times, values, strict=True)}


async def served(running: Stack, exchange: str, interval: str, start: int, end: int) -> Rows:
    """What the service tells of the same market, page by page."""
    rows: Rows = {}
    at: int | None = start
    async with running.http(running.token()) as client:
        while at is not None:
            answer = await client.get(
                "/api/v1/history",
                params={
                    "coin": "BTC/USDT", "exchange": exchange, "interval": interval,
                    "start": at, "end": end, "limit": 5_000,
                },
                timeout=120,
            )  # fmt: skip
            page = answer.raise_for_status().json()
            assert page["gaps"] == []
            rows |= {row[0]: tuple(row[1:]) for row in page["rows"]}
            at = page["next_start"]
    return rows


def stored(running: Stack, exchange: str, start: int, end: int) -> Rows:
    """What the service has kept of it, read from disk: the history that was asked for is kept."""
    return {
        document["timestamp"]: tuple(document[name] for name in VALUES)
        for document in running.documents("BTC-USDT", exchange)
        if start <= document["timestamp"] < end
    }


@pytest.mark.parametrize("exchange", list(API))
@pytest.mark.parametrize(("timeframe", "days"), [("5m", 14), ("1m", 1)])
async def test_it_downloads_the_same_candles_as_the_service(
    tmp_path: Path, exchange: str, timeframe: str, days: int
) -> None:
    settings = {"EXCHANGES": exchange, "EXCHANGE_QUOTES": "USDT"}
    step = (5 if timeframe == "5m" else 1) * MINUTE
    # Real time: freqtrade asks up to its own clock's now.
    async with stack(tmp_path, MarketClock(), **settings) as running:
        theirs = await downloaded(tmp_path, exchange, running.sandbox_url, timeframe, days)
        # Its last candle may not have been over when it asked.
        first, last = min(theirs), max(theirs)
        del theirs[last]
        ours = await served(running, exchange, timeframe, first, last)
    assert list(theirs) == list(range(first, last, step))
    assert last - first >= days * DAY - 2 * step
    assert ours == theirs
    assert stored(running, exchange, first, last) == theirs
