"""Registration after import: PEFT tuners, quantisers and Auto classes exist as soon as their library does.

``import gossamer`` installs a finder that waits for the libraries named in :data:`TRIGGERS`. When one has been imported
(or already is), the systems whose card ``registers`` something there are imported; importing them registers them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# what a card's `registers` begins with -> the module after whose import it is registered
TRIGGERS = {
    "peft": "peft",
    "quantizer": "transformers.modeling_utils",
    "auto": "transformers.models.auto.modeling_auto",
}


def install() -> None:
    """Register now for libraries that are loaded, later for the rest. Safe to call twice."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for trigger in TRIGGERS.values():
        module = sys.modules.get(trigger)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            register(trigger)


def register(trigger: str) -> None:
    """Import every system that registers something with the library behind ``trigger``."""
    from gossamer.core.registry import systems

    prefixes = tuple(f"{name}:" for name, module in TRIGGERS.items() if module == trigger)
    for entry in systems().values():
        if any(item.startswith(prefixes) for item in entry.card.registers):
            importlib.import_module(entry.module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the trigger modules as usual, with a loader that registers after execution."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TRIGGERS.values() or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, trigger: str) -> None:
        self._loader, self._trigger = loader, trigger

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(self._trigger)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # resource readers, get_source ...
