"""Laws of architectures: the Auto classes load what was saved, every weight learns, rows do not meet, no future leaks.

Everything runs on the batch that a model names in ``dummy_inputs``: at least two rows of different length and what
makes it return a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.card import Entry
from gossamer.testing.bench import Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("base",)
QUICK = {"image_size": 64}


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    return {"base": bench.model()}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    model = system.build(subject["base"])
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {"output": _evaluated(model, model.dummy_inputs), "trained": trained, "training loss": _training_loss(model)}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(bench.model(), LoraConfig(r=2, target_modules="all-linear"))
    yield "a model with an adapter", lambda: system.build(adapted)
    if system._converts:
        yield "no model to build on", lambda: system.build(None)


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    model = system.build(bench.model())
    model.save_pretrained(str(folder))
    again: Any = _auto_class(model).from_pretrained(str(folder))
    assert type(again) is type(model), f"{type(model).__name__} is loaded as {type(again).__name__}"
    inputs = model.dummy_inputs
    return _evaluated(model, inputs), _evaluated(again.eval(), inputs)


@law()
def check_every_trained_weight_learns(entry: Entry, bench: Bench) -> None:
    """The loss of ``dummy_inputs`` reaches every parameter that requires a gradient, and the loss is finite."""
    model = build(entry, bench, base_options(entry, bench)).build(bench.model())
    loss = model(**model.dummy_inputs).loss
    assert loss is not None, "dummy_inputs give no loss"
    assert loss.dim() == 0, f"the loss has shape {tuple(loss.shape)}"
    assert bool(torch.isfinite(loss)), "the loss is not finite"
    loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and _no_gradient(parameter)]
    assert not idle, f"no gradient reaches {idle[:4]}"


@law()
def check_batch_equals_single(entry: Entry, bench: Bench) -> None:
    """A row gives the same alone, without its padding, as in its batch, to 1e-5 of the largest value."""
    model = build(entry, bench, base_options(entry, bench)).build(bench.model())
    inputs = model.dummy_inputs
    mask = inputs["attention_mask"].bool()
    assert len({int(count) for count in mask.sum(1)}) > 1, "all rows of dummy_inputs are of one length"
    together = _evaluated(model, inputs)
    for row in range(len(mask)):
        alone = _evaluated(model, _row(inputs, row))
        for name, value in alone.items():
            full = together[name][row]
            if full.dim() > 1:
                count = value.shape[1]
                full = full[:count] if bool(mask[row, 0]) else full[-count:]
            difference = differs(full, value[0], atol=1e-5, where=name)
            assert not difference, f"row {row} differs alone and in its batch: {difference}"


@law(trait="causal")
def check_the_future_does_not_leak(entry: Entry, bench: Bench) -> None:
    """Logits up to a token do not change when later tokens do."""
    model = build(entry, bench, base_options(entry, bench)).build(bench.model())
    inputs = _row(model.dummy_inputs, 0)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed = 2
    other["input_ids"][:, -changed:] = (other["input_ids"][:, -changed:] + 1) % int(inputs["input_ids"].max())
    first, second = (_evaluated(model, item)["logits"][:, :-changed] for item in (inputs, other))
    difference = differs(first, second, atol=1e-5)
    assert not difference, f"later tokens change earlier logits: {difference}"


@law(trait="causal")
def check_cached_equals_uncached(entry: Entry, bench: Bench) -> None:
    """Greedy generation gives the same tokens with and without a cache."""
    model = build(entry, bench, base_options(entry, bench)).build(bench.model())
    inputs = {name: value for name, value in model.dummy_inputs.items() if name != "labels"}
    found = [
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found), f"with a cache {found[0].tolist()}, without {found[1].tolist()}"


def _no_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or not bool(parameter.grad.any())


@torch.no_grad()
def _evaluated(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output that has one entry a row: embeddings, logits."""
    rows = len(inputs["input_ids"])
    found = model(**inputs)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
    }


@torch.no_grad()
def _training_loss(model: Any) -> float:
    """The loss with dropout on, its draws fixed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return float(model.train()(**model.dummy_inputs).loss)


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row, without its padding among the tokens."""
    real = inputs["attention_mask"][row].bool()
    width = inputs["attention_mask"].shape
    return {
        name: value[row : row + 1, real] if value.shape[:2] == width else value[row : row + 1]
        for name, value in inputs.items()
    }


def _auto_class(model: Any) -> Any:
    import transformers

    autos = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM, transformers.AutoModel)
    known = [auto for auto in autos if type(model.config) in auto._model_mapping]
    assert known, f"no Auto class knows {type(model.config).__name__}"
    return known[0]
