"""Drafters beside plain decoding, for ``bench decode``: on bfloat16, 8 bits and 4 bits, on code, prose and questions.

All trained drafters get one budget: beginnings of training texts of the three kinds, continued by the base, labels its
own distribution on integer weights, the same steps. The 4-bit model is a base of its own and has its own drafters, as
a drafter fits one model; only those whose drafts are cheap beside its step. Beside all of them goes what prompt look-up
finds.

Prompts come from test packages. Plain decoding and all drafters of a base take turns on each prompt, the prompt's own
pass not counted; guessing may switch itself off. A row says how many tokens a guessing step emitted, and whether all
texts were those of plain decoding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.paths import cache_dir, write_json

KINDS = {"code": "python_source", "prose": "english_prose", "questions": "python_functions"}
BASES = {"runner_bf16": "bfloat16", "quality_arm": "int8", "small_arm": "stored"}
BUDGET: dict[str, Any] = {"steps": 400, "batch_size": 4, "length": 160, "draft_vocab": 8192, "rate": 1e-3}
LOOK_UP = 8  # tokens at most that are looked for in what came before
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"ngram": LOOK_UP},
    "medusa": {"heads": 5, "tree": "beam", "top_k": 4, "total_tokens": 12},
    "clover": {"heads": 5, "tree": "clover", "budget": 12},
    "chimera": {"heads": 5, "depth": 5, "tree": "beam", "top_k": 4, "total_tokens": 12},
    "fspad": {"depth": 5, "top_k": 4, "total_tokens": 12},
}
CHEAP = ("prompt_lookup", "medusa")
ROWS, PROMPT, OWN, MAX_LENGTH = 400, 48, 64, 1024
COMPANY = 16  # texts that are continued together


def compare(model: Any, small: Any, tokenizer: Any, quick: bool, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each base, drafter and kind of text; ``model`` in bfloat16, ``small`` packed in 4 bits."""
    budget = BUDGET | ({"steps": 2, "batch_size": 2, "length": 16} if quick else {})
    prompts = {kind: _prompts(tokenizer, name, 1 if quick else 8, "test") for kind, name in KINDS.items()}
    rows = []
    for base, weights in BASES.items():
        own = small if base == "small_arm" else model
        bundle = Bundle(own, tokenizer)
        systems = {
            name: _fitted(name, options | (budget if name != "prompt_lookup" else {}), bundle, weights, quick, log)
            for name, options in DRAFTERS.items()
            if base != "small_arm" or name in CHEAP
        }
        for system in systems.values():
            system.bind(own, weights=weights, max_length=MAX_LENGTH, look_up=LOOK_UP)
        for kind, texts in prompts.items():
            rows += _turns(systems, own, texts, 8 if quick else 64, {"base": base, "text": kind})
        log(f"drafters on {base}: {[(r['drafter'], r['text'], r['ratio']) for r in rows if r['base'] == base]}")
    return rows


def targets(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str, float]]:
    """(text, value, sign, bound): the best drafter on each kind of text, and the worst that any drafter does."""
    lines = []
    for base, code, other in (("runner_bf16", 2.0, 1.5), ("quality_arm", 1.25, 1.0), ("small_arm", 1.25, 1.0)):
        for kind in KINDS:
            best = max(row["ratio"] for row in rows if row["base"] == base and row["text"] == kind)
            lines.append((f"best drafter over {base}, {kind}", best, ">=", code if kind == "code" else other))
    lines.append(("the slowest drafter over none", min(row["ratio"] for row in rows), ">=", 0.97))
    lines.append(("texts equal to plain decoding", min(row["equal"] for row in rows), ">=", 1.0))
    return lines


def _fitted(
    name: str, options: dict[str, Any], bundle: Bundle, weights: str, quick: bool, log: Callable[[str], None]
) -> Any:
    """The drafter, from the cache where it was fitted before; that of a float base learns beside its 8-bit form."""
    from gossamer.kinds.drafting import FittedDrafter
    from gossamer.pipeline.single import system

    made = system(name, **options)
    if not isinstance(made, FittedDrafter):
        return made
    count = 4 if quick else ROWS
    kept = "stored" if weights == "stored" else "int8"
    key = hashlib.sha256(json.dumps([options, count, KINDS], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir("bench", "drafters") / f"{name}-{kept}-{key}"
    if folder.exists():
        return type(made).load(folder, bundle)
    log(f"fitting {name} beside {kept} weights, once")
    made.bind(bundle.model, weights=kept, max_length=MAX_LENGTH)
    made.fit(bundle, _own_texts(made.speculator(bundle.model).runner, bundle.processor, count, log))
    made.save(folder)
    return made


def _own_texts(runner: Any, tokenizer: Any, count: int, log: Callable[[str], None]) -> list[dict[str, str]]:
    """Beginnings of texts of the training splits, each continued greedily by the first base that asks."""
    path = cache_dir("bench", "drafters") / f"texts-{count}-{PROMPT}-{OWN}.json"
    if not path.exists():
        log(f"{OWN} tokens of the base's own after {count} beginnings of each kind, once")
        rows = []
        for corpus in KINDS.values():
            begun = _prompts(tokenizer, corpus, count, "train")
            for at in range(0, len(begun), COMPANY):
                part = begun[at : at + COMPANY]
                made = runner.generate_many(part, max_new_tokens=OWN)
                # the tokenizer puts its own bos first
                rows += [{"text": tokenizer.decode(ids[1:] + new)} for ids, new in zip(part, made, strict=True)]
        write_json(path, rows)
    found: list[dict[str, str]] = json.loads(path.read_text())
    return found


def _prompts(tokenizer: Any, corpus: str, count: int, split: str) -> list[list[int]]:
    """Beginnings of texts; of functions the whole question."""
    from gossamer.hub.corpora import load_corpus

    found = []
    for row in load_corpus(corpus, split=split, limit=20 * count).rows:
        ids = tokenizer(row.get("text") or row["prompt"])["input_ids"]
        if len(ids) >= PROMPT and (len(ids) < 4 * PROMPT or "text" in row):
            found.append(ids[:PROMPT] if "text" in row else ids)
        if len(found) == count:
            break
    return found


def _turns(
    systems: Mapping[str, Any], model: Any, prompts: Sequence[list[int]], count: int, head: dict[str, Any]
) -> list[dict[str, Any]]:
    seconds = dict.fromkeys(("plain", *systems), 0.0)
    equal, emitted, guesses = dict.fromkeys(systems, 0), dict.fromkeys(systems, 0), dict.fromkeys(systems, 0)
    for number, ids in enumerate([prompts[0], *prompts]):  # the first one warms up
        runner = next(iter(systems.values())).speculator(model).runner
        spent, plain = _plain(runner, ids, count)
        seconds["plain"] += spent if number else 0.0
        for name, system in systems.items():
            spent, state = _guessed(system, model, ids, count)
            if number:
                seconds[name] += spent
                equal[name] += state.tokens == plain
                emitted[name] += state.record.emitted_guessing
                guesses[name] += state.record.guesses
    return [
        {
            **head,
            "drafter": name,
            "plain_per_s": round(count * len(prompts) / seconds["plain"], 1),
            "tokens_per_s": round(count * len(prompts) / seconds[name], 1),
            "ratio": round(seconds["plain"] / seconds[name], 3),
            "accepted_length": round(emitted[name] / max(1, guesses[name]), 2),
            "guessing_steps": guesses[name],
            "equal": equal[name] / len(prompts),
        }
        for name in systems
    ]


def _plain(runner: Any, ids: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds for ``count`` greedy tokens after the prompt was read, and the tokens."""
    state, token, made = runner.open(), ids[-1], list[int]()
    runner.prefill(state, ids[:-1])
    start = time.perf_counter()
    for _ in range(count):
        token = int(runner.step(state, token).argmax())
        made.append(token)
    return time.perf_counter() - start, made


def _guessed(system: Any, model: Any, ids: list[int], count: int) -> tuple[float, Any]:
    """As :func:`_plain`, with the drafter; the state that holds the tokens and what was accepted."""
    state = system.open(model, ids)
    state.room = count
    system.speculator(model).read_prompt([state], system.observe)
    start = time.perf_counter()
    while state.room:
        system.step(model, [state])
    return time.perf_counter() - start, state
