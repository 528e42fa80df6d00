"""A bundle read from its folder: the plain model, the adapter that is attached to it, and its parts.

Systems are found by name in the registry; which way an adapter was saved its files say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.hub.models import load_model
from gossamer.parts.injection import is_transposed, projections

Companions = Callable[[], Mapping[str, Any]]


def load_bundle(folder: Path, companions: Companions = dict) -> Bundle:
    """Read what :func:`gossamer.pipeline.stage.save_bundle` wrote.

    ``companions`` gives the further models that its systems name.
    """
    head = folder / "bundle.json"
    if not head.exists():
        raise InputError(str(folder), must="hold bundle.json", do="give the folder of a run")
    record = json.loads(head.read_text(encoding="utf-8"))
    bundle = Bundle(*load_model(record["base"] or str(folder / "model")), lineage=record["lineage"])
    return assemble(bundle, folder, record, companions)


def assemble(bundle: Bundle, folder: Path, record: Mapping[str, Any], companions: Companions) -> Bundle:
    """Put on the plain model in ``bundle`` what lies in ``folder`` and ``record`` names.

    ``record`` has ``adapters`` and ``parts``, each with name, options and seed, and the name of the ``acceleration``.
    """
    bundle.adapters = [_system(call, companions) for call in record["adapters"]]
    if bundle.adapters and (folder / "adapter").exists():
        bundle.model = _load_adapter(bundle.model, folder / "adapter", bundle.adapters[-1])
        bundle.processor = adapted_processor(bundle.adapters[-1], bundle.processor)
    for name, call in record["parts"].items():
        stored = folder / "parts" / name
        if stored.exists():
            bundle.parts[name] = registry.find(name).load().load(stored, bundle, _named(call, companions))
        else:
            bundle.parts[name] = _system(call, companions)
    if record.get("acceleration"):
        fast = bundle.parts[record["acceleration"]]
        bundle.model, bundle.processor = fast.accelerate(bundle.model, bundle.processor)
    return bundle


def adapted_processor(adapter: Any, processor: Any) -> Any:
    """The processor of the model with the adapter: an adapter that brings images or the like has one of its own."""
    return adapter.processor(processor) if hasattr(adapter, "processor") else processor


def _load_adapter(model: Any, folder: Path, system: Any) -> Any:
    if not (folder / "adapter_config.json").exists():  # of hooks and own modules, saved by the system itself
        return system.load(model, folder)
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type == "LORA":
        _accept_other_linears(config, model)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)


def _accept_other_linears(config: Any, model: Any) -> None:
    """PEFT refuses linear classes that it does not know, such as packed ones, unless it is told how to take them."""
    from peft.tuners.lora import Linear

    found = [projection.module for projection in projections(model)]
    foreign = {type(module) for module in found if not isinstance(module, nn.Linear) and not is_transposed(module)}
    if foreign:
        config._register_custom_module(dict.fromkeys(foreign, Linear))


def _system(call: Mapping[str, Any], companions: Companions) -> Any:
    named = _named(call, companions)
    return registry.find(call["name"]).load()(seed=call["seed"], companions=named, **call["options"])


def _named(call: Mapping[str, Any], companions: Companions) -> Mapping[str, Any]:
    """The companions, loaded only where the system has an option that names one."""
    return companions() if companion_names(call) else {}


def companion_names(call: Mapping[str, Any]) -> list[str]:
    """The further models that a system with these options wants."""
    specs = [spec for spec in registry.find(call["name"]).options if spec.companion]
    values = [call["options"].get(spec.name, spec.default) for spec in specs]
    return [str(value) for value in values if value]
