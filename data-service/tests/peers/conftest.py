"""Other people's clients have an environment of their own, which `make peers` makes and names."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("CB_TRADE_PEERS") else ["test_*.py"]
