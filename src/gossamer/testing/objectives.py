"""Laws of objectives: indifferent to padding and order, gradients to the policy alone, accumulation exact.

The policy is a model with a LoRA that has moved since :meth:`prepare`, so that every kind of reference differs from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.core.card import Entry
from gossamer.kinds.objectives import select_rows
from gossamer.testing.bench import ROWS, Bench, repad
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("model", "batch", "rows", "tokenizer")


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    tokenizer, rows = bench.tokenizer(), bench.rows(system.rows)
    start, examples = prepared(system, bench, rows, tokenizer)
    batch = system.collate(examples, tokenizer)
    return {"model": moved(start), "examples": examples, "batch": batch, "rows": rows, "tokenizer": tokenizer}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    model = copy.deepcopy(subject["model"])
    value, gradients, parts = evaluated(system, model, subject["batch"])
    # the rest of the subject is what made the batch
    return {"loss": value, "gradients": gradients, "parts": parts}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    given = subject(system, bench)
    empty = select_rows(given["batch"], torch.arange(0))
    yield "an empty batch", lambda: system.loss(given["model"], empty)
    other = next((shape for shape in ROWS if shape not in system.rows), None)
    if other is not None:
        rows = list(ROWS[other])
        yield f"rows of the shape {other}", lambda: system.examples(rows, given["tokenizer"], max_length=64)


@law()
def check_padding_does_not_matter(entry: Entry, bench: Bench) -> None:
    """Loss and gradients are the same for more padding, on either side."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    pad = given["tokenizer"].pad_token_id
    first = evaluated(system, given["model"], given["batch"])
    for side, extra in (("right", 5), ("left", 0), ("left", 3)):
        batch = repad(given["batch"], side=side, extra=extra, pad=pad)
        difference = differs(first, evaluated(system, given["model"], batch), atol=1e-5)
        assert not difference, f"{extra} more places of padding on the {side} change the loss: {difference}"


@law()
def check_batch_order_does_not_matter(entry: Entry, bench: Bench) -> None:
    """Loss and gradients are the same for the examples in another order."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    turned = system.collate(given["examples"][::-1], given["tokenizer"])
    found = [evaluated(system, given["model"], batch) for batch in (given["batch"], turned)]
    difference = differs(*found, atol=1e-5)
    assert not difference, f"the order of the examples changes the loss: {difference}"


@law()
def check_gradients_flow_to_the_policy_alone(entry: Entry, bench: Bench) -> None:
    """Every trainable parameter of the policy gets a gradient; companions and frozen weights get none."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    _, gradients, _ = evaluated(system, given["model"], given["batch"])
    assert any(bool(gradient.any()) for gradient in gradients.values()), "no parameter of the policy gets a gradient"
    for name, companion in system.companions.items():
        parameters = companion.parameters() if hasattr(companion, "parameters") else ()
        assert all(parameter.grad is None for parameter in parameters), f"the companion {name} gets gradients"


@law()
def check_accumulation_equals_one_batch(entry: Entry, bench: Bench) -> None:
    """Micro-batches with the step's normaliser add up to the loss and gradients of one batch."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    whole = evaluated(system, given["model"], given["batch"])
    width = int(given["batch"]["attention_mask"].shape[1])
    micro = []
    for example in given["examples"]:
        batch = system.collate([example], given["tokenizer"])
        extra = width - int(batch["attention_mask"].sum(1).max())
        micro.append(repad(batch, side="right", extra=extra, pad=given["tokenizer"].pad_token_id))
    total = sum(system.amount(batch) for batch in micro)
    parts = [evaluated(system, given["model"], {**batch, "normaliser": total}) for batch in micro]
    value = torch.stack([part[0] for part in parts]).sum()
    gradients = {name: sum(part[1][name] for part in parts) for name in whole[1]}
    difference = differs(whole[:2], (value, gradients), atol=1e-5)
    assert not difference, f"single rows under one normaliser are not the whole batch: {difference}"


@law()
def check_the_loss_is_a_finite_scalar(entry: Entry, bench: Bench) -> None:
    """A 0-dimensional float with a graph; logged parts are finite numbers."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    loss = system.loss(given["model"], given["batch"])
    assert loss.value.shape == (), f"the loss is of shape {tuple(loss.value.shape)}"
    assert loss.value.requires_grad, "the loss has no graph"
    assert math.isfinite(float(loss.value)), f"the loss is {float(loss.value)}"
    wrong = {name: part for name, part in loss.parts.items() if not math.isfinite(float(part))}
    assert not wrong, f"parts are not finite: {wrong}"


def prepared(system: Any, bench: Bench, rows: list[Any], tokenizer: Any) -> tuple[Any, list[Any]]:
    """The policy at the start of training, and its examples."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        start = get_peft_model(bench.model(), LoraConfig(r=2, target_modules=r".*layers\.\d+\..*v_proj|.*c_attn"))
    start = moved(start.eval())
    return start, system.prepare(start, system.examples(rows, tokenizer, max_length=64), tokenizer)


@torch.no_grad()
def moved(policy: Any) -> Any:
    """A copy whose adapter has gone on."""
    policy = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(6)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def evaluated(system: Any, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients of the trainable parameters (cleared again), and parts."""
    loss = system.loss(model, batch)
    loss.value.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, f"the frozen {name} gets a gradient"
        if parameter.requires_grad:
            gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return loss.value.detach(), gradients, dict(loss.parts)
