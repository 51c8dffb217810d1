"""Exchange plugins. ccxt is made ready here, before any of them imports it."""

from exchange_source.plugins.ccxt_lazily import load_ccxt_lazily

load_ccxt_lazily()
