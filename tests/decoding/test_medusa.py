"""Medusa heads: their equation, their trees, and that the text stays the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gossamer.core.bundle import Bundle
from gossamer.decoding.medusa import Medusa
from gossamer.parts.drafter_training import Batch, Targets
from gossamer.parts.speculation import Speculator
from gossamer.testing.bench import Bench

IDS = [7, 30, 51, 98, 200, 11, 45, 12]


def fitted(family: str = "llama", **options: Any) -> tuple[Any, Medusa]:
    bench, settings = Bench(family), {"steps": 4, "batch_size": 2, "switch_off": False, **options}
    model, system = bench.model(), Medusa(**settings)
    system.fit(Bundle(model, bench.tokenizer()), bench.rows(("text",)))
    return model, system


def test_heads_and_loss_are_the_formulas() -> None:
    model, system = fitted(labels="base_soft")
    with torch.no_grad():
        h = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[-1]
        base = model.lm_head(h)[0]
    module: Any = system.module
    batch = Batch(torch.tensor([IDS]), torch.ones(1, len(IDS), dtype=torch.bool), h[None])
    total = torch.zeros(())
    for k, head in enumerate(module.heads, 1):
        places = range(len(IDS) - 1 - k)
        each = []
        for place in places:
            z = h[0, place] + F.silu(head.weight @ h[0, place] + head.bias)
            each.append(-(base[place + k].softmax(-1) * model.lm_head(z).log_softmax(-1)).sum())
        total = total + 0.8**k * torch.stack(each).mean()
    found = system.loss(module, batch, Targets(batch, h, "base_soft", system.reading))
    torch.testing.assert_close(found, total)


def test_children_of_all_places_of_a_level_are_alike() -> None:
    model, system = fitted()
    state = system.open(model, IDS)
    system.step(model, [state])
    draft = system.draft([state], 25)[0]
    below = draft.children()
    first = [draft.tokens[place] for place in below[below[-1][0]]]
    second = [draft.tokens[place] for place in below[below[-1][1]]]
    assert first[: len(second)] == second


@pytest.mark.parametrize("tree", ["static", "beam"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_text_is_the_models_own(family: str, tree: str) -> None:
    model, system = fitted(family, tree=tree)
    plain = model.generate(torch.tensor([IDS]), max_new_tokens=30, do_sample=False)[0, len(IDS) :].tolist()
    assert system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=30).tokens == [plain]


def test_switch_off_stops_guessing_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs is set here: on a busy machine measured seconds of so small a model say anything."""
    monkeypatch.setattr(Speculator, "cost", lambda *_: 10.0)
    model, system = fitted(switch_off=True)
    done = system.generate(model, None, {"input_ids": torch.tensor([IDS])}, max_new_tokens=60)
    assert 0 < done.reports[0]["guessing_steps"] < done.reports[0]["forwards"]
