"""Gossamer makes language models and vision-language models light.

Systems are found by name::

    model, tokenizer = gossamer.load("gemma-3-270m")
    model = gossamer.system("mos", rank=8).attach(model)
    gossamer.run("recipe.yaml")

Importing this package is cheap: torch is loaded by what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gossamer.core import hook

if TYPE_CHECKING:
    from gossamer.core.registry import systems
    from gossamer.hub.models import load_model as load
    from gossamer.pipeline.engine import run
    from gossamer.pipeline.single import attach, compress, measure, saved, system

__version__ = "0.1.0"
__all__ = ["attach", "compress", "load", "measure", "run", "saved", "system", "systems"]

_LAZY = {
    "load": ("gossamer.hub.models", "load_model"),
    "run": ("gossamer.pipeline.engine", "run"),
    "systems": ("gossamer.core.registry", "systems"),
    "system": ("gossamer.pipeline.single", "system"),
    "measure": ("gossamer.pipeline.single", "measure"),
    "saved": ("gossamer.pipeline.single", "saved"),
    "attach": ("gossamer.pipeline.single", "attach"),
    "compress": ("gossamer.pipeline.single", "compress"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hook.install()
