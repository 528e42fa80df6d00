"""Finding laws and running them: which there are, which apply to a system, and what they found."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.core import registry
from gossamer.core.card import Entry, read_entry
from gossamer.core.errors import InputError
from gossamer.core.kinds import KINDS
from gossamer.testing.bench import FAMILIES, Bench

Check = Callable[[Entry, Bench], None]


@dataclasses.dataclass(frozen=True)
class Law:
    """One law. ``kind`` and ``trait`` are empty where it holds for all; ``once``: the first family is enough."""

    name: str
    check: Check
    kind: str
    trait: str
    once: bool

    def applies(self, entry: Entry) -> bool:
        return self.kind in ("", entry.kind) and (not self.trait or self.trait in entry.card.traits)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A law that a system breaks, on the tiny model of ``family``."""

    law: str
    family: str
    message: str

    def __str__(self) -> str:
        return f"{self.law} [{self.family}]: {self.message}"


def law(*, trait: str = "", once: bool = False) -> Callable[[Check], Check]:
    """Mark ``check_*(entry, bench)`` as a law for systems with ``trait`` (all, where not given)."""

    def mark(check: Check) -> Check:
        vars(check)["law"] = (trait, once)
        return check

    return mark


@functools.cache
def laws() -> tuple[Law, ...]:
    """Every law, those for all systems first, then by kind, each file's in its order."""
    found = []
    package = importlib.import_module("gossamer.testing")
    modules = [
        importlib.import_module(f"gossamer.testing.{item.name}") for item in pkgutil.iter_modules(package.__path__)
    ]
    for module in modules:
        stem = module.__name__.rsplit(".", 1)[-1]
        for name, value in vars(module).items():
            if name.startswith("check_") and hasattr(value, "law") and value.__module__ == module.__name__:
                found.append(Law(name, value, stem if stem in KINDS else "", *value.law))
    return tuple(sorted(found, key=lambda one: one.kind))


def harness(entry: Entry) -> ModuleType | None:
    """The module that knows how a system of this kind is used; ``None`` for a kind without laws of its own."""
    name = f"gossamer.testing.{entry.kind}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def check_system(
    system: str | Path | type, *, families: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> list[Finding]:
    """Run every law that applies to ``system`` (a registered name, a class, or a file); an empty list: all hold.

    ``families`` replaces the card's; ``only`` names laws. Raises InputError for what holds no system.
    """
    entry = entry_of(system)
    chosen = [one for one in laws() if one.applies(entry) and (only is None or one.name in only)]
    return [finding for one in chosen for finding in check_law(one, entry, families)]


def check_law(one: Law, entry: Entry, families: Sequence[str] | None = None) -> list[Finding]:
    """Run one law on the families of the card; whatever it raises is a finding."""
    names = tuple(families or entry.card.families)
    known = [name for name in names if name in FAMILIES] or ["llama"]
    found = []
    for name in known[:1] if one.once else known:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                one.check(entry, Bench(name))
            except AssertionError as error:
                found.append(Finding(one.name, name, str(error) or _place(error)))
            except Exception as error:
                found.append(Finding(one.name, name, f"{type(error).__name__}: {error} ({_place(error)})"))
    return found


def entry_of(system: str | Path | type) -> Entry:
    """The registry's entry of a name; an entry read from the file of a class or a path."""
    if isinstance(system, type):
        return _read(Path(inspect.getfile(system)), system.__module__)
    text = str(system)
    if text.endswith(".py") or Path(text).exists():
        path = Path(text)
        path = path / "__init__.py" if path.is_dir() else path
        return _read(path, _import(path))
    return registry.find(text)


def _read(path: Path, module: str) -> Entry:
    """An entry outside the registry: its kind is that of its class."""
    name = module.rsplit(".", 1)[-1]
    entry = read_entry(path, name=name, kind="", module=module, origin=str(path.parent))
    if entry is None:
        raise InputError(
            str(path), must="hold a CARD and a system", got="none", do="see docs/guide for a system's file"
        )
    bases = {base.__name__ for base in entry.load().__mro__}
    kind = next((kind.folder for kind in KINDS.values() if bases & set(kind.bases)), "")
    return dataclasses.replace(entry, kind=kind)


def _import(path: Path) -> str:
    """Load a file as a module whose name ends in its stem, as a system's name does; returns the module's name."""
    stem = path.parent.name if path.stem == "__init__" else path.stem
    name = f"checked_{abs(hash(path.resolve())):x}.{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(str(path), must="be a Python file", got="one that cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def _place(error: BaseException) -> str:
    """File and line where it was raised."""
    last: Any = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"
