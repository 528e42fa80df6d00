"""Registration after import: PEFT tuners, quantisers and Auto classes exist as soon as their library does.

``import gossamer`` installs a finder that waits for the libraries named in :data:`TRIGGERS`. When one has been imported
(or already is), the systems whose card ``registers`` something there are imported; importing them registers them.
Where a module of Gossamer or transformers is what imports the library, this waits until that module is whole: half of
transformers cannot be imported from.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

# what a card's `registers` begins with -> the module after whose import it is registered
TRIGGERS = {
    "peft": "peft",
    "quantizer": "transformers.modeling_utils",
    "widths": "transformers.modeling_utils",
    "auto": "transformers.models.auto.modeling_auto",
}
_WATCHED = ("gossamer.", "transformers.")


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
    """Finds the watched modules as usual and follows their execution."""

    def __init__(self) -> None:
        self._depth = 0  # watched modules under execution
        self._waiting: list[str] = []  # libraries that came meanwhile

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_WATCHED) and fullname not in TRIGGERS.values():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(self._execute, fullname, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, name: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        inside = name.startswith(_WATCHED)
        self._depth += inside
        try:
            execute(module)
        finally:
            self._depth -= inside
        if name in TRIGGERS.values():
            self._waiting.append(name)
        while self._waiting and not self._depth:
            register(self._waiting.pop())
