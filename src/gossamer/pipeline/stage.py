"""Bundles on disk: what is written after each step so that a run can go on, and what a finished run holds.

FOLDER/model/     the plain model and tokenizer, by save_pretrained (absent where it is still the original)
FOLDER/adapter/   the attached PEFT adapter
FOLDER/parts/     fitted systems by name, the one that accelerates the model among them
FOLDER/bundle.json
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.paths import atomic_dir, write_json
from gossamer.hub.bundles import adapted_processor, load_bundle
from gossamer.kinds.acceleration import Acceleration
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.kinds.base import FittedSystem
from gossamer.pipeline.job import Job

__all__ = ["WHOLE", "adapted_processor", "is_adapted", "keep_whole", "load_bundle", "save_bundle", "save_processor",
           "whole_path"]  # fmt: skip

WHOLE = "whole"  # folder of a run with the model that a small copy stands for


def is_adapted(model: Any) -> bool:
    """Whether an adapter is attached: PEFT's, or one of hooks and own modules."""
    from peft import PeftModel

    return isinstance(model, PeftModel) or hasattr(model, ModuleAdapter.slot)


def save_bundle(bundle: Bundle, folder: Path, *, base: str, keep_base: bool = False) -> None:
    """Write ``bundle`` to ``folder`` as a whole or not at all.

    ``base`` is where the plain model can be loaded from where an adapter is attached; with ``keep_base`` it is copied
    in, so that the folder stands alone.
    """
    with atomic_dir(folder) as path:
        adapted = is_adapted(bundle.model)
        if adapted:
            _save_adapter(bundle, path / "adapter")
            if keep_base and Path(base).is_dir():
                shutil.copytree(base, path / "model")
        else:
            bundle.model.save_pretrained(path / "model")
            save_processor(bundle.processor, path / "model")
        for name, part in bundle.parts.items():
            if isinstance(part, FittedSystem):
                part.save(path / "parts" / name)
        record = {
            "base": None if not adapted or (path / "model").exists() else base,
            "adapters": [_call(system) for system in bundle.adapters],
            "parts": {name: _call(part) for name, part in bundle.parts.items()},
            "acceleration": getattr(bundle.model, Acceleration.slot, None),
            "lineage": bundle.lineage,
        }
        write_json(path / "bundle.json", record)


def keep_whole(job: Job) -> None:
    """Copy the model before this step to the run folder, unless it is the recipe's own, which stays where it is."""
    from gossamer.hub.models import resolve

    if job.base != str(resolve(job.recipe.model).path):
        with atomic_dir(job.folder / WHOLE) as path:
            shutil.copytree(job.base, path, dirs_exist_ok=True)


def whole_path(job: Job) -> Path:
    """Where the model lies that a small copy in this run stands for."""
    from gossamer.hub.models import resolve

    kept = job.folder / WHOLE
    return kept if kept.exists() else Path(resolve(job.recipe.model).path)


def _save_adapter(bundle: Bundle, folder: Path) -> None:
    if hasattr(bundle.model, ModuleAdapter.slot):
        bundle.adapters[-1].save(bundle.model, folder)
    else:
        # the base, whatever was done to its vocabulary, is kept apart
        bundle.model.save_pretrained(folder, save_embedding_layers=False)


def save_processor(processor: Any, folder: Path) -> None:
    """Without the marks of where it was loaded from, so that a reloaded one is written as the same bytes."""
    for mark in ("is_local", "local_files_only"):
        getattr(processor, "init_kwargs", {}).pop(mark, None)
    processor.save_pretrained(folder)


def _call(system: Any) -> dict[str, Any]:
    return {"name": system.name, "options": system.config.as_dict(), "seed": system.seed}
