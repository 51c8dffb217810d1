"""ccxt, of which only the exchanges that are used are loaded.

``ccxt``, ``ccxt.async_support`` and ``ccxt.pro`` import every exchange that they have, some 400
modules and 100 MB, before the first one can be used. Here the three are put in place without
running their code; what is asked of them is loaded at that moment:

* a module inside, above all an exchange's: that module, with what it needs itself. Where it
  defines a class of its own name, the package's attribute is that class, as in ccxt;
* an error, or ``ccxt.Exchange``: the module of ccxt's base that defines it;
* anything else, such as ``ccxt.exchanges``: the package's own code runs, and from then on the
  package is as if it had been imported plainly.

So whoever else uses ccxt in this process finds all that there is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any, Final, cast

# The packages, and the modules of ccxt's base from which each takes all that they export.
_PACKAGES: Final = {
    "ccxt": ("ccxt.base.errors", "ccxt.base.exchange"),
    "ccxt.async_support": ("ccxt.base.errors",),
    "ccxt.pro": ("ccxt.base.errors",),
}
# Of the names with underscores, those that the packages' code sets. The others are asked for by
# tools that look whether a module has them, which is no reason to load everything.
_SET_BY_CODE: Final = frozenset({"__all__", "__version__"})
# No module of ccxt asks, while it is imported itself, for anything that needs a package's code:
# nobody waits for this lock while holding the import system's lock of a module.
_running: Final = RLock()


class _LazyPackage(ModuleType):
    """A package whose code has not run; once it has, this is a plain module."""

    code_runs: bool

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            if find_spec(f"{self.__name__}.{name}") is not None:
                return _meant(import_module(f"{self.__name__}.{name}"), name)
            for base in map(import_module, _PACKAGES[self.__name__]):
                if name in base.__all__:
                    return getattr(base, name)
        elif name not in _SET_BY_CODE:
            raise self._lacks(name)
        self._run_code()
        if name not in self.__dict__:
            raise self._lacks(name)
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds each module that it has loaded to its package.
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            value = _meant(value, name)
        super().__setattr__(name, value)

    def _lacks(self, name: str) -> AttributeError:
        text = f"module {self.__name__!r} has no attribute {name!r}"
        return AttributeError(text, name=name, obj=self)

    def __dir__(self) -> list[str]:
        self._run_code()
        return sorted(self.__dict__)

    def _run_code(self) -> None:
        with _running:
            # Who waited for the lock finds it done, who asks from within finds it under way.
            if type(self) is not _LazyPackage or self.__dict__.get("code_runs"):
                return
            self.code_runs = True
            try:
                cast("Loader", self.__loader__).exec_module(self)
            finally:
                del self.code_runs
            self.__class__ = ModuleType  # type: ignore[assignment]


def _meant(module: ModuleType, name: str) -> Any:
    """The class that ``module`` is named after, or the module."""
    value = module.__dict__.get(name)
    return value if isinstance(value, type) else module


def load_ccxt_lazily() -> None:
    """Put the three packages in place; imports nothing.

    If ccxt was imported before, or is laid out in another way than expected, nothing happens, and
    importing it goes on as it always does.
    """
    with _running:
        specs = _specs()
        if "ccxt" in sys.modules or specs is None:
            return
        for name, spec in specs.items():
            module = module_from_spec(spec)
            module.__class__ = _LazyPackage
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)


def _specs() -> dict[str, ModuleSpec] | None:
    """Where each of the packages lies; None if one of them is no package of files."""
    specs: dict[str, ModuleSpec] = {}
    for name in _PACKAGES:
        parent = specs.get(name.rpartition(".")[0])
        where = None if parent is None else parent.submodule_search_locations
        spec = PathFinder.find_spec(name, where)
        if spec is None or spec.loader is None or spec.submodule_search_locations is None:
            return None
        specs[name] = spec
    return specs
