"""The Python API of single calls: ``system(name, **options)`` and what is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import OptionError
from gossamer.core.manifest import is_package


def system(name: str, *, seed: int = 0, companions: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The system ``name`` with these options: ``system("mos", rank=8).attach(model)``.

    Unknown names and options raise :class:`~gossamer.core.errors.OptionError` with the nearest one.
    """
    return registry.find(name).load()(seed=seed, companions=companions, **options)


def attach(model: Any, name: str, **options: Any) -> Any:
    """``model`` with the adapter ``name`` attached."""
    return system(name, **options).attach(model)


def compress(model: Any, name: str, data: Any = None, **options: Any) -> Any:
    """``Compressed(model, report)`` by the compression ``name``."""
    return system(name, **options).compress(model, data)


def measure(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Parameters, bytes held and perplexity of a loaded model on ``texts``."""
    from gossamer.parts.measure import parameters
    from gossamer.parts.scorer import perplexity

    found = perplexity(model, tokenizer, texts)
    return {**parameters(model), "perplexity": found.ppl, "bits_per_byte": found.bits_per_byte}


def saved(folder: str | Path, without: Iterable[str] = ()) -> Bundle:
    """The bundle that a run left in ``folder``, or that a package holds.

    Adapters and parts of a package can be left out by name: ``saved(PACKAGE, without=("clover",))``.
    """
    from gossamer.hub.bundles import load_bundle
    from gossamer.hub.packages import open_package

    path, without = Path(folder).expanduser(), (without,) if isinstance(without, str) else tuple(without)
    if is_package(path):
        return open_package(path, without)
    if without:
        raise OptionError(f"saved({str(folder)!r}): without", must="be given for a package alone", do="export one")
    inner = path / "result"
    return load_bundle(inner if (inner / "bundle.json").exists() else path)
