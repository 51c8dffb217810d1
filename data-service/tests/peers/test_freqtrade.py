"""freqtrade's downloader reads the sandbox as it would the exchange, and gets what the service has.

It knows nothing of the service, nor of the sandbox: by its configuration alone it asks another
address.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from domain.clock import MarketClock
from tests.support.market import DAY, MINUTE
from tests.support.processes import Stack, stack

PEERS = Path(os.environ["CB_TRADE_PEERS"])
PATIENCE_S = 240.0
# Its name there, and which of its addresses are replaced by which path of another.
API = {
    "crypto.com": ("cryptocom", {"v1": "/exchange/v1"}),
    "binance": ("binance", {"public": "/api/v3"}),
}
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
    process = await asyncio.create_subprocess_exec(
        str(PEERS / "bin/freqtrade"), "download-data",
        "--config", str(home / "config.json"), "--userdir", str(home),
        "--datadir", str(home / "data"), "--timeframes", timeframe, "--days", str(days),
        "--data-format-ohlcv", "feather",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-3_000:]
    frame = pd.read_feather(home / f"data/BTC_USDT-{timeframe}.feather")
    times = (frame["date"].astype("int64") // 1_000_000).tolist()
    unit = 1 if times[0] > 10**12 else 1_000
    columns = frame[["open", "high", "low", "close", "volume"]].to_numpy().tolist()
    return {time * unit: tuple(row) for time, row in zip(times, columns, strict=True)}


async def served(running: Stack, exchange: str, interval: str, start: int, end: int) -> Rows:
    """What the service tells of the same market, page by page."""
    rows: Rows = {}
    at: int | None = start
    async with running.http(await running.token()) as client:
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
            assert all(gap["reason"] in ("no_trades", "pending") for gap in page["gaps"])
            rows |= {row[0]: tuple(row[1:]) for row in page["rows"]}
            at = page["next_start"]
    return rows


@pytest.mark.parametrize("exchange", list(API))
@pytest.mark.parametrize(("timeframe", "days"), [("5m", 14), ("1m", 1)])
async def test_it_downloads_the_same_candles_as_the_service(
    tmp_path: Path, exchange: str, timeframe: str, days: int
) -> None:
    settings = {"EXCHANGES": exchange, "EXCHANGE_QUOTES": "USDT"}
    # Real time: freqtrade asks up to its own clock's now.
    async with stack(tmp_path, MarketClock(), **settings) as running:
        theirs = await downloaded(tmp_path, exchange, running.sandbox_url, timeframe, days)
        first, last = min(theirs), max(theirs)
        step = (5 if timeframe == "5m" else 1) * MINUTE
        assert last - first >= days * DAY - 2 * step
        ours = await served(running, exchange, timeframe, first, last)
    # Its last candle may not have been over when it asked.
    del theirs[last]
    assert len(theirs) >= days * DAY // step - 1
    assert ours == theirs
