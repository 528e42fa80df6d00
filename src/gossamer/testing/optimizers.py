"""Laws of optimizers: resume exactly, lower a convex loss, respect groups without decay."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.parts.training import parameter_groups
from gossamer.testing.bench import Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("batch", "config")
STEPS = 4


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    objective = registry.find("sft", kind="objectives").load()()
    # attention that can be differentiated twice, for second-order methods
    model, tokenizer = bench.model(layers=1, attention="eager"), bench.tokenizer()
    examples = objective.examples(bench.rows(objective.rows), tokenizer, max_length=32)
    batch = objective.collate(examples, tokenizer)
    return {"model": model, "config": model.config, "objective": objective, "batch": batch}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    model = subject["model"]
    optimizer = system.build(parameter_groups(model))
    figures = _train(system, subject, optimizer, range(STEPS))
    return {"weights": {name: p.detach().clone() for name, p in model.named_parameters()}, "figures": figures}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "no parameters", lambda: system.build([])


@law()
def check_it_resumes_exactly(entry: Entry, bench: Bench) -> None:
    """Half the steps, state_dict into a fresh optimizer, the other half: bit for bit the unbroken run; also in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        weights = []
        for parts in ([range(STEPS)], [range(STEPS // 2), range(STEPS // 2, STEPS)]):
            system = build(entry, bench, base_options(entry, bench))
            given = subject(system, bench)
            given["model"].to(dtype)
            state: Any = None
            for steps in parts:
                optimizer = system.build(parameter_groups(given["model"]))
                if state is not None:
                    optimizer.load_state_dict(state)
                _train(system, given, optimizer, steps)
                state = copy.deepcopy(optimizer.state_dict())
            weights.append({name: p.detach() for name, p in given["model"].named_parameters()})
        difference = differs(*weights)
        assert not difference, f"{dtype}: a resumed run ends elsewhere: {difference}"


@law(once=True)
def check_it_lowers_a_convex_loss(entry: Entry, bench: Bench) -> None:
    """A quadratic with curvatures from 0.1 to 10 is at most half of its start after 300 steps."""
    curvature = torch.logspace(-1, 1, 8)
    point = nn.Parameter(torch.full((8,), 0.05))
    optimizer = build(entry, bench, base_options(entry, bench)).build([point])
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (curvature * point.square()).sum()
        loss.backward()
        optimizer.step()
        values.append(float(loss))
    assert values[-1] <= values[0] / 2, f"the loss goes from {values[0]:.4g} to {values[-1]:.4g}"


@law(once=True)
def check_groups_keep_their_own_decay(entry: Entry, bench: Bench) -> None:
    """A group with ``weight_decay`` 0 does not decay where the option says that the others do."""
    if all(spec.name != "weight_decay" for spec in entry.options):
        return
    options = base_options(entry, bench) | {"weight_decay": 0.5}
    decayed, spared = (nn.Parameter(torch.full((4, 4), 1.0)) for _ in range(2))
    optimizer = build(entry, bench, options).build([{"params": [decayed]}, {"params": [spared], "weight_decay": 0.0}])
    for parameter in (decayed, spared):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(spared, torch.ones(4, 4)), "a group with weight_decay 0 decays"
    assert bool((decayed < 1).all()), "the option weight_decay does not reach a group without its own"


def _train(system: Any, given: dict[str, Any], optimizer: Any, steps: range) -> list[dict[str, float]]:
    """Steps on the same batch, with the optimizer's hooks around each as the trainer calls them."""
    model, objective = given["model"], given["objective"]
    batch: dict[str, Tensor] = dict(given["batch"])
    hooks = [hook for hook in system.callbacks(model, objective) if hasattr(hook, "before_step")]
    figures = []
    for step in steps:
        optimizer.zero_grad()
        for hook in hooks:
            hook.before_step(step, optimizer, [batch], contextlib.nullcontext)
        objective.loss(model, batch).value.backward()
        optimizer.step()
        figures += [hook.after_step(step, optimizer) for hook in hooks]
    optimizer.zero_grad()
    return figures
