"""Bundles on disk: what is written after each step so that a run can go on, and what a finished run holds.

FOLDER/model/     the plain model and tokenizer, by save_pretrained (absent where it is still the original)
FOLDER/adapter/   the attached PEFT adapter
FOLDER/parts/     fitted systems by name, the one that accelerates the model among them
FOLDER/bundle.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.core.paths import atomic_dir, write_json
from gossamer.kinds.acceleration import Acceleration
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.kinds.base import FittedSystem
from gossamer.pipeline.job import Job

WHOLE = "whole"  # folder of a run with the model that a small copy stands for
Companions = Callable[[], Mapping[str, Any]]


def is_adapted(model: Any) -> bool:
    """Whether an adapter is attached: PEFT's, or one of hooks and own modules."""
    from peft import PeftModel

    return isinstance(model, PeftModel) or hasattr(model, ModuleAdapter.slot)


def adapted_processor(adapter: Any, processor: Any) -> Any:
    """The processor of the model with the adapter: an adapter that brings images or the like has one of its own."""
    return adapter.processor(processor) if hasattr(adapter, "processor") else processor


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
            _save_processor(bundle.processor, path / "model")
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


def load_bundle(folder: Path, companions: Companions = dict) -> Bundle:
    """Read what :func:`save_bundle` wrote; ``companions`` gives the further models that its systems name."""
    from gossamer.hub.models import load_model

    head = folder / "bundle.json"
    if not head.exists():
        raise InputError(str(folder), must="hold bundle.json", do="give the folder of a run")
    record = json.loads(head.read_text(encoding="utf-8"))
    model: Any
    model, processor = load_model(record["base"] or str(folder / "model"))
    adapters = [_system(call, companions) for call in record["adapters"]]
    if (folder / "adapter").exists():
        model = _load_adapter(model, folder / "adapter", adapters[-1])
        processor = adapted_processor(adapters[-1], processor)
    bundle = Bundle(model, processor, adapters=adapters, lineage=record["lineage"])
    for name, call in record["parts"].items():
        stored = folder / "parts" / name
        if stored.exists():
            bundle.parts[name] = registry.find(name).load().load(stored, bundle, _named(call, companions))
        else:
            bundle.parts[name] = _system(call, companions)
    if record["acceleration"]:
        bundle.model, bundle.processor = bundle.parts[record["acceleration"]].accelerate(bundle.model, processor)
    return bundle


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


def _load_adapter(model: Any, folder: Path, system: Any) -> Any:
    if isinstance(system, ModuleAdapter):
        return system.load(model, folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def _save_processor(processor: Any, folder: Path) -> None:
    """Without the marks of where it was loaded from, so that a reloaded one is written as the same bytes."""
    for mark in ("is_local", "local_files_only"):
        getattr(processor, "init_kwargs", {}).pop(mark, None)
    processor.save_pretrained(folder)


def _call(system: Any) -> dict[str, Any]:
    return {"name": system.name, "options": system.config.as_dict(), "seed": system.seed}


def _system(call: dict[str, Any], companions: Companions) -> Any:
    named = _named(call, companions)
    return registry.find(call["name"]).load()(seed=call["seed"], companions=named, **call["options"])


def _named(call: dict[str, Any], companions: Companions) -> Mapping[str, Any]:
    """The companions, loaded only where the system has an option that names one."""
    return companions() if any(spec.companion for spec in registry.find(call["name"]).options) else {}
