"""ccxt is loaded by the exchange, and nobody can tell by what it holds.

What is imported belongs to a process, so each test takes one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import exchange_source

SOURCE = Path(exchange_source.__file__).parent.parent

LOADED = "print(json.dumps([name for name in sys.modules if name.split('.')[0] == 'ccxt']))"
CONTENT = """
import types, ccxt.async_support, ccxt.pro

def told(value):
    kind = "module" if isinstance(value, types.ModuleType) else type(value).__name__
    where = "" if kind == "module" else getattr(value, "__module__", "")
    return [kind, where, getattr(value, "__name__", "")]

packages = [ccxt, ccxt.async_support, ccxt.pro]
print(json.dumps([
    {name: told(getattr(package, name)) for name in dir(package) if name[0] != "_"}
    for package in packages
]))
"""


def run(code: str, *, first: Path | None = None) -> Any:
    """What ``code`` prints in a new process, read as JSON; ``first`` is searched for modules."""
    path = ":".join(map(str, filter(None, (first, SOURCE))))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import json, sys\n{code}"],
        check=True,
        timeout=50,
        env={"PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    loaded = run(f"import exchange_source.plugins\n{LOADED}")
    assert loaded == ["ccxt", "ccxt.async_support", "ccxt.pro"]


def test_a_plugin_loads_its_own_exchange_and_no_other() -> None:
    loaded = run(f"import exchange_source.plugins.cryptocom_exchange, ccxt.pro\n"
                 f"ccxt.pro.cryptocom\n{LOADED}")  # fmt: skip
    assert {"ccxt.pro.cryptocom", "ccxt.async_support.cryptocom"} <= set(loaded)
    assert [name for name in loaded if "kraken" in name or "binance" in name] == []


def test_every_exchange_resolves_to_its_class_in_each_package() -> None:
    wrong = run("""
import exchange_source.plugins, importlib, pathlib
import ccxt, ccxt.async_support, ccxt.pro
wrong = []
for package in (ccxt.pro, ccxt.async_support):
    names = [path.stem for path in pathlib.Path(package.__path__[0]).glob("*.py")]
    for name in names:
        if name == "__init__":
            continue
        module = importlib.import_module(f"{package.__name__}.{name}")
        if getattr(package, name) is not getattr(module, name):
            wrong.append(module.__name__)
assert issubclass(ccxt.pro.binance, ccxt.async_support.binance)
assert set(dir(ccxt.pro)) >= set(names := ccxt.pro.exchanges) and len(names) > 70
print(json.dumps(wrong))
""")
    assert wrong == []


def test_everything_that_ccxt_holds_is_found_as_if_it_had_been_imported_plainly() -> None:
    plain = run(CONTENT)
    lazy = run("import exchange_source.plugins, ccxt.pro\nccxt.pro.coinbase\n" + CONTENT)
    assert lazy == plain


def test_errors_and_the_base_class_load_no_exchange() -> None:
    found, loaded = run("""
import exchange_source.plugins
from ccxt import Exchange, NetworkError
import ccxt.base.errors, ccxt.pro
found = NetworkError is ccxt.base.errors.NetworkError is ccxt.pro.NetworkError
print(json.dumps([found, "ccxt.binance" in sys.modules]))
""")
    assert found
    assert not loaded


def test_what_does_not_exist_is_missing_and_looking_for_marks_loads_nothing() -> None:
    answers = run("""
import exchange_source.plugins, ccxt
marked = hasattr(ccxt, "__wrapped__"), "ccxt.binance" in sys.modules
missing = hasattr(ccxt, "no_such_thing"), hasattr(ccxt, "no_such_thing")
print(json.dumps([*marked, *missing, type(ccxt).__name__, ccxt.__version__ > "4"]))
""")
    assert answers == [False, False, False, False, "module", True]


def test_two_threads_that_need_a_whole_package_both_get_it() -> None:
    counts = run("""
import exchange_source.plugins, ccxt, threading
from concurrent.futures import ThreadPoolExecutor
together = threading.Barrier(4, timeout=30)
def ask(_):
    together.wait()
    return len(ccxt.exchanges)
with ThreadPoolExecutor(4) as pool:
    print(json.dumps(list(pool.map(ask, range(4)))))
""")
    assert len(set(counts)) == 1
    assert counts[0] > 100


def test_a_ccxt_that_was_imported_before_stays_as_it_is() -> None:
    before, after = run("""
import ccxt.pro
before = id(ccxt.pro), id(ccxt.pro.cryptocom)
import exchange_source.plugins.cryptocom_exchange
print(json.dumps([before, [id(sys.modules["ccxt.pro"]), id(ccxt.pro.cryptocom)]]))
""")
    assert before == after


def test_a_ccxt_of_another_layout_is_imported_plainly(tmp_path: Path) -> None:
    package = tmp_path / "ccxt"
    package.mkdir()
    (package / "__init__.py").write_text("pro = 'its own way'\n")
    found = run("import exchange_source.plugins, ccxt\nprint(json.dumps(ccxt.pro))", first=tmp_path)
    assert found == "its own way"


def test_code_of_a_package_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    for name in ("ccxt", "ccxt/async_support", "ccxt/pro", "ccxt/base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "ccxt/base/errors.py").write_text("__all__ = []\n")
    (tmp_path / "ccxt/base/exchange.py").write_text("__all__ = []\n")
    (tmp_path / "ccxt/__init__.py").write_text("import helper\nexchanges = ['one']\n")
    answers = run(
        """
import exchange_source.plugins, ccxt, pathlib, importlib
try:
    ccxt.exchanges
except ImportError as exc:
    first = str(exc)
pathlib.Path(ccxt.__path__[0], "..", "helper.py").write_text("")
importlib.invalidate_caches()
print(json.dumps([first, ccxt.exchanges]))
""",
        first=tmp_path,
    )
    assert answers == ["No module named 'helper'", ["one"]]
