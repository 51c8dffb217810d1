"""Other engines have an environment of their own, which `make engines` makes and names."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("CB_TRADE_ENGINES") else ["test_*.py"]
