"""Laws of decoding: a row does not depend on its company, requests come and go, lossless is lossless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.core.card import Entry
from gossamer.testing.bench import Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("model", "tokenizer", "prompts")
NEW = 14  # tokens; with the prompts longer than the sliding window of the tiny Gemma


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    return {"model": bench.model(), "tokenizer": bench.tokenizer(), "prompts": bench.prompts()}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    model, tokenizer, prompts = subject["model"], subject["tokenizer"], subject["prompts"]
    greedy = system.generate(model, tokenizer, prompts, max_new_tokens=NEW)
    sampled = system.generate(model, tokenizer, prompts, max_new_tokens=NEW, do_sample=True, temperature=1.5)
    return {"greedy": greedy.tokens, "sampled": sampled.tokens, "texts": greedy.texts}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    encoder, model, tokenizer = Bench("bert").model(), bench.model(), bench.tokenizer()
    yield "a model that does not generate", lambda: system.open(encoder, [1, 2, 3], tokenizer)
    yield "an empty prompt", lambda: system.open(model, [], tokenizer)
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    yield "prompts padded on the right", lambda: system.generate(model, tokenizer, right, max_new_tokens=2)


@law()
def check_batch_equals_single(entry: Entry, bench: Bench) -> None:
    """Greedily decoded, a prompt gets the same tokens alone and in a padded batch."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    model, tokenizer = given["model"], given["tokenizer"]
    together = system.generate(model, tokenizer, given["prompts"], max_new_tokens=NEW).tokens
    for row, ids in enumerate(_rows(given["prompts"])):
        alone = system.generate(model, tokenizer, {"input_ids": torch.tensor([ids])}, max_new_tokens=NEW).tokens[0]
        assert alone == together[row], f"prompt {row} gives {alone} alone and {together[row]} in a batch"


@law()
def check_requests_join_and_leave(entry: Entry, bench: Bench) -> None:
    """Requests stepped in changing company, order and number get the tokens that they get alone."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    model, tokenizer, prompts = given["model"], given["tokenizer"], _rows(given["prompts"])
    alone = []
    for ids in prompts:
        state = system.open(model, ids, tokenizer)
        while len(state.tokens) < NEW:
            system.step(model, [state])
        alone.append(state.tokens[:NEW])
        state.close()
    states = [system.open(model, prompts[0], tokenizer)]
    system.step(model, states)
    states.append(system.open(model, prompts[1], tokenizer))
    system.step(model, states)
    states.append(system.open(model, prompts[2], tokenizer))
    turn = 0
    while any(len(state.tokens) < NEW for state in states):
        live = [state for state in states if len(state.tokens) < NEW]
        live = live[::-1] if turn % 2 else live
        system.step(model, live[: max(1, len(live) - turn % 3)])
        turn += 1
    found = [state.tokens[:NEW] for state in states]
    for state in states:
        state.close()
    assert found == alone, f"in company {differs(found, alone, where='request')}"


@law(trait="lossless")
def check_greedy_tokens_are_the_models_own(entry: Entry, bench: Bench) -> None:
    """Lossless: exactly the tokens that the model's own greedy search gives."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    model, tokenizer, prompts = given["model"], given["tokenizer"], given["prompts"]
    found = system.generate(model, tokenizer, prompts, max_new_tokens=NEW).tokens
    for row, ids in enumerate(_rows(prompts)):
        plain = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=NEW, do_sample=False
        )
        own = plain[0, len(ids) :].tolist()
        assert found[row] == own, f"prompt {row} gives {found[row]}, plain greedy decoding {own}"


def _rows(prompts: dict[str, Tensor]) -> list[list[int]]:
    """Ids of each prompt without padding."""
    pairs = zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]
