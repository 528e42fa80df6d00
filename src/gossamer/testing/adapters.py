"""Laws of adapters: identity at start, only their parameters train, detach bit for bit, merge, export.

The outcome of an adapter is what it makes of a model after two steps of training on a fixed target.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.kinds.adapters import TunerAdapter
from gossamer.parts.scheduled import penalties, tell_step
from gossamer.testing.bench import Bench, output
from gossamer.testing.comparison import differs, frozen
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

LAYERS = 8  # sharing between layers needs some
KEPT = ("inputs", "config")


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    model = fresh(system, bench)
    return {"model": model, "config": model.config, "inputs": _inputs(system, bench)}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    attached = system.attach(subject["model"])
    shapes = {name: tuple(p.shape) for name, p in attached.named_parameters() if p.requires_grad}
    train(attached, subject["inputs"], steps=2)
    return {"trained": shapes, "output": evaluated(attached, subject["inputs"])}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    attached = system.attach(fresh(system, bench))
    yield "attaching to a model that has an adapter", lambda: system.attach(attached)
    if any(spec.name == "target_modules" for spec in system.config.specs):
        options = system.config.as_dict() | {"target_modules": ("no_such_layer",)}
        other = type(system)(seed=0, companions=system.companions, **options)
        yield "target_modules without such a layer", lambda: other.attach(fresh(system, bench))


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    attached, inputs = filled(system, bench), bench.inputs()
    before = evaluated(attached, inputs)
    if isinstance(system, TunerAdapter):
        from peft import PeftModel

        attached.save_pretrained(str(folder))
        again: Any = PeftModel.from_pretrained(fresh(system, bench), str(folder))
    else:
        system.save(attached, folder)
        other = type(system)(system.config, seed=99, companions=system.companions)
        again = other.load(fresh(system, bench), folder)
    return before, evaluated(again, inputs)


@law(trait="identity_at_init")
def check_identity_at_start(entry: Entry, bench: Bench) -> None:
    """Attached and untrained, the model gives the outputs that it gave before."""
    system, inputs = build(entry, bench, base_options(entry, bench)), bench.inputs()
    model = fresh(system, bench)
    before = evaluated(model, inputs)
    attached = system.attach(model)
    difference = differs(before, evaluated(attached, inputs), atol=1e-6)
    assert not difference, f"the untrained adapter changes the output: {difference}"


@law()
def check_only_its_parameters_train(entry: Entry, bench: Bench) -> None:
    """The model's own weights neither require gradients nor move, and every parameter of the adapter gets some."""
    system, inputs = build(entry, bench, base_options(entry, bench)), bench.inputs()
    model = fresh(system, bench)
    own = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    attached = system.attach(model)
    training = [name for name, parameter in own.items() if parameter.requires_grad]
    assert not training, f"{len(training)} weights of the model require gradients, {training[:2]} among them"
    assert any(p.requires_grad for p in attached.parameters()), "the adapter has nothing to train"
    idle = train(attached, inputs, steps=4)
    assert not idle, f"{len(idle)} parameters get no gradient in four steps, {sorted(idle)[:2]} among them"
    moved = [name for name, parameter in own.items() if not torch.equal(parameter, before[name])]
    assert not moved, f"{len(moved)} weights of the model moved in training, {moved[:2]} among them"


@law()
def check_detach_is_bit_for_bit(entry: Entry, bench: Bench) -> None:
    """After detach: the same names, weights, outputs and ``requires_grad`` as before attach."""
    system, inputs = build(entry, bench, base_options(entry, bench)), bench.inputs()
    model = fresh(system, bench)
    next(model.parameters()).requires_grad_(False)
    before, logits = frozen(model), evaluated(model, inputs)
    known = set(map(id, model.parameters()))
    plain = system.detach(fill(system.attach(model), known))
    difference = differs(before, frozen(plain)) or differs(logits, evaluated(plain, inputs), where="output")
    assert not difference, f"detach leaves something behind: {difference}"


@law(trait="mergeable")
def check_merged_equals_unmerged(entry: Entry, bench: Bench) -> None:
    """Folded into the weights, the adapter does what it did beside them, to 1e-5 of the largest output."""
    system, inputs = build(entry, bench, base_options(entry, bench)), bench.inputs()
    attached = filled(system, bench)
    before = evaluated(attached, inputs)
    assert differs(before, evaluated(fresh(system, bench), inputs), atol=1e-3), "the adapter has no effect"
    merged = system.merge(attached)
    difference = differs(before, evaluated(merged, inputs), atol=1e-5)
    assert not difference, f"merged and unmerged differ: {difference}"
    names = set(fresh(system, bench).state_dict())
    assert set(merged.state_dict()) == names, f"merging leaves {sorted(set(merged.state_dict()) ^ names)[:3]}"


@law(trait="lora_exportable")
def check_exported_lora_gives_the_same(entry: Entry, bench: Bench) -> None:
    """The exported checkpoint is plain LoRA: PEFT's own layers give the adapter's outputs, to 1e-5."""
    from peft import PeftModel

    system, inputs = build(entry, bench, base_options(entry, bench)), bench.inputs()
    attached = filled(system, bench)
    with tempfile.TemporaryDirectory() as folder:
        system.export_lora(attached, Path(folder) / "lora")
        kind = json.loads((Path(folder) / "lora" / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        assert kind == "LORA", f"the exported checkpoint is of type {kind}"
        again: Any = PeftModel.from_pretrained(fresh(system, bench), str(Path(folder) / "lora"))
    foreign = {type(m).__module__ for m in again.modules()} - {type(m).__module__ for m in bench.model().modules()}
    foreign = {name for name in foreign if not name.startswith(("peft.", "torch."))}
    assert not foreign, f"loading it brings modules of {sorted(foreign)}"
    difference = differs(evaluated(attached, inputs), evaluated(again, inputs), atol=1e-5)
    assert not difference, f"the exported LoRA differs: {difference}"


def fresh(system: Any, bench: Bench) -> Any:
    """The bench's model; a sparse small copy of it where the system's card requires one."""
    model = bench.model(layers=LAYERS)
    if "small_copy" not in sys.modules[type(system).__module__].CARD.requires:
        return model
    maker = registry.find("small_copy", kind="compression").load()
    return maker(method="unst", compensate=False).compress(model).model


def _inputs(system: Any, bench: Bench) -> dict[str, Tensor]:
    """Token rows; where the system sees (its ``visual_length`` is not 0), the first row has an image after a token."""
    inputs, seen = bench.inputs(), getattr(system, "visual_length", 0)
    if seen:
        ids = inputs["input_ids"]
        inputs["visual"] = torch.zeros_like(ids, dtype=torch.bool)
        inputs["visual"][0, 1 : 1 + seen] = True
        inputs["modality"] = inputs["visual"].any(1).long()
        inputs["pixel_values"] = Bench("vit").inputs(rows=1)["pixel_values"]
    return inputs


def filled(system: Any, bench: Bench) -> Any:
    """A model with the adapter, its parameters moved off their start as training would, in evaluation mode."""
    model = fresh(system, bench)
    known = set(map(id, model.parameters()))
    return fill(system.attach(model), known)


@torch.no_grad()
def fill(attached: nn.Module, known: set[int]) -> Any:
    """Add noise to every parameter that is not ``known`` (by id) from before."""
    generator = torch.Generator().manual_seed(1)
    for parameter in attached.parameters():
        if id(parameter) not in known and parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return attached.eval()


def train(model: nn.Module, inputs: dict[str, Tensor], *, steps: int) -> set[str]:
    """Steps of Adam towards a fixed random output, dropout on; names of parameters that never got a gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    idle = set(trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tell_step(model, 0, steps)
        for step in range(1, steps + 1):
            found = output(model, inputs)
            target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
            loss: Any = (found - target).square().mean() + sum(penalties(model).values())
            loss.backward()
            idle -= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
            optimizer.step()
            optimizer.zero_grad()
            tell_step(model, step, steps)
    model.eval()
    return idle


@torch.no_grad()
def evaluated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output(model.eval(), inputs)
