"""Laws of decoding: a row does not depend on its company, requests come and go, lossless is lossless."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.bundle import Bundle
from gossamer.core.card import Entry
from gossamer.core.errors import UsageError
from gossamer.kinds.base import FittedSystem
from gossamer.kinds.decoding import Choice, DrafterDecoding
from gossamer.testing.bench import VOCABULARY, Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("model", "tokenizer", "prompts", "rows")
QUICK = {"steps": 3, "batch_size": 2, "switch_off": False, "total_tokens": 12, "top_k": 3}
NEW = 14  # tokens; with the prompts longer than the sliding window of the tiny Gemma
SAMPLES = 250  # of the distribution test: two tokens each


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    rows = bench.rows(("text",))
    return {"model": bench.model(), "tokenizer": bench.tokenizer(), "prompts": bench.prompts(), "rows": rows}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    """Texts, and of a drafter what it guesses and what it learned: its options do not change the text."""
    model, tokenizer, prompts = subject["model"], subject["tokenizer"], subject["prompts"]
    _fitted(system, subject)
    greedy = system.generate(model, tokenizer, prompts, max_new_tokens=NEW)
    sampled = system.generate(model, tokenizer, prompts, max_new_tokens=NEW, do_sample=True, temperature=1.5)
    found = {"greedy": greedy.tokens, "sampled": sampled.tokens, "texts": greedy.texts}
    if isinstance(system, FittedSystem) and system.state is not None:
        found |= {"learned": system.state.tensors, "drafts": _drafts(system, subject)}
    return found


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    encoder, model, tokenizer = Bench("bert").model(), bench.model(), bench.tokenizer()
    yield "a model that does not generate", lambda: system.open(encoder, [1, 2, 3], tokenizer)
    yield "an empty prompt", lambda: system.open(model, [], tokenizer)
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    needs_fit = isinstance(system, FittedSystem)
    if needs_fit:
        yield "decoding before it is fitted", lambda: system.open(model, [1, 2, 3], tokenizer)
        yield "fitting on nothing", lambda: system.fit(Bundle(model, tokenizer), [])
        yield "fitting on rows of a token", lambda: system.fit(Bundle(model, tokenizer), [{"text": "a"}])
        rows = bench.rows(("text",))
        yield "fitting on a model that does not generate", lambda: system.fit(Bundle(encoder, tokenizer), rows)
        system.fit(Bundle(model, tokenizer), rows)
        yield "decoding with another model", lambda: system.open(bench.model(seed=1), [1, 2, 3], tokenizer)
    yield "prompts padded on the right", lambda: system.generate(model, tokenizer, right, max_new_tokens=2)


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    """What a fitted drafter guesses; of a system without state there is nothing to save."""
    if not isinstance(system, FittedSystem):
        return None, None
    given = subject(system, bench)
    _fitted(system, given)
    system.save(folder)
    again = type(system).load(folder, Bundle(given["model"], given["tokenizer"]))
    return _drafts(system, given), _drafts(again, given)


@law()
def check_batch_equals_single(entry: Entry, bench: Bench) -> None:
    """Greedily decoded, a prompt gets the same tokens alone and in a padded batch."""
    system, given = _ready(entry, bench)
    model, tokenizer = given["model"], given["tokenizer"]
    together = system.generate(model, tokenizer, given["prompts"], max_new_tokens=NEW).tokens
    for row, ids in enumerate(_rows(given["prompts"])):
        alone = system.generate(model, tokenizer, {"input_ids": torch.tensor([ids])}, max_new_tokens=NEW).tokens[0]
        assert alone == together[row], f"prompt {row} gives {alone} alone and {together[row]} in a batch"


@law()
def check_requests_join_and_leave(entry: Entry, bench: Bench) -> None:
    """Requests stepped in changing company, order and number get the tokens that they get alone."""
    system, given = _ready(entry, bench)
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
    """Lossless: exactly the tokens of the model's own greedy search, after three texts and 200 random prompts."""
    system, given = _ready(entry, bench)
    model, tokenizer, prompts = given["model"], given["tokenizer"], given["prompts"]
    found = system.generate(model, tokenizer, prompts, max_new_tokens=NEW).tokens
    for row, ids in enumerate(_rows(prompts)):
        own = _own(model, torch.tensor([ids]))[0]
        assert found[row] == own, f"prompt {row} gives {found[row]}, plain greedy decoding {own}"
    generator = torch.Generator().manual_seed(3)
    for length in range(3, 11):
        table = torch.randint(4, VOCABULARY, (25, length), generator=generator)
        many = system.generate(model, tokenizer, {"input_ids": table}, max_new_tokens=NEW).tokens
        wrong = [row for row, pair in enumerate(zip(many, _own(model, table), strict=True)) if pair[0] != pair[1]]
        assert not wrong, f"{len(wrong)} of {len(table)} random prompts of {length} tokens, such as {table[wrong[0]]}"


@law(trait="lossless")
def check_sampled_tokens_have_the_models_own_law(entry: Entry, bench: Bench) -> None:
    """Lossless: over a few likely tokens, the second sampled token (a drafted one, where it is accepted) has the
    distribution that the model's own probabilities give, by a chi-square test at the 0.002 % point."""
    system, given = _ready(entry, bench)
    model, tokenizer, ids = given["model"], given["tokenizer"], _rows(given["prompts"])[1]
    few, sharpened = _few(model, ids), Choice()
    allowed = torch.full((model.get_output_embeddings().weight.shape[0],), -torch.inf)
    allowed[few] = 0.0
    sharpened.processors = (lambda _, table: table / 8 + allowed,)
    expected = _two_tokens(model, ids, few, sharpened)
    counts = torch.zeros(len(few), len(few))
    generator = torch.Generator().manual_seed(11)
    for _ in range(SAMPLES):
        state = system.open(model, ids, tokenizer)
        state.choice = Choice(sharpened.processors, True, generator)
        state.room = 2
        while len(state.tokens) < 2:
            system.step(model, [state])
        counts[few.index(state.tokens[0]), few.index(state.tokens[1])] += 1
        state.close()
    wanted = SAMPLES * expected
    chi2 = float(((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    assert chi2 < 36.0, f"chi-square {chi2:.1f} over {counts.numel()} pairs of tokens: {counts.tolist()}, not {wanted}"


@law(trait="needs_fit")
def check_a_drafter_of_another_base_is_refused(entry: Entry, bench: Bench) -> None:
    """A saved state says which base it fits; another one does not load it."""
    system, given = _ready(entry, bench)
    with tempfile.TemporaryDirectory() as folder:
        system.save(Path(folder) / "saved")
        try:
            type(system).load(Path(folder) / "saved", Bundle(bench.model(seed=1), given["tokenizer"]))
        except UsageError:
            return
    raise AssertionError("a state loads for a base that it was not fitted on")


def _own(model: Any, ids: Tensor) -> list[list[int]]:
    """Greedy tokens of transformers after prompts [n, t], up to the end token."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _ready(entry: Entry, bench: Bench) -> tuple[Any, dict[str, Any]]:
    """The system, fitted where it needs it, and its inputs."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    _fitted(system, given)
    return system, given


def _fitted(system: Any, given: dict[str, Any]) -> None:
    if isinstance(system, FittedSystem) and system.state is None:
        system.fit(Bundle(given["model"], given["tokenizer"]), given["rows"])


def _drafts(system: Any, given: dict[str, Any]) -> Any:
    """Tokens and parents that a drafter guesses after a few tokens of each prompt."""
    if not isinstance(system, DrafterDecoding):
        return None
    found = []
    for ids in _rows(given["prompts"]):
        state = system.open(given["model"], ids, given["tokenizer"])
        system.step(given["model"], [state])
        draft = system.draft([state], system.draft_tokens)[0]
        found.append([list(draft.tokens), draft.tree])
        state.close()
    return found


@torch.no_grad()
def _few(model: Any, ids: list[int]) -> list[int]:
    best: list[int] = model(torch.tensor([ids])).logits[0, -1].topk(3).indices.tolist()
    return sorted(best)


@torch.no_grad()
def _two_tokens(model: Any, ids: list[int], few: list[int], choice: Choice) -> Tensor:
    """Joint probabilities [few, few] of the next two tokens."""
    rows = []
    for prefix in ([], *([token] for token in few)):
        scores = model(torch.tensor([ids + prefix])).logits[0, -1].float()
        rows.append(choice.scores(ids + prefix, scores).softmax(-1)[few])
    return rows[0][:, None] * torch.stack(rows[1:])


def _rows(prompts: dict[str, Tensor]) -> list[list[int]]:
    """Ids of each prompt without padding."""
    pairs = zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]
