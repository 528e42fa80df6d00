"""What the experiments of drafters share: base and data, training on one budget, and figures of decoding.

The base is the nursery Llama (8 layers, width 256, vocabulary 8192, float32). Drafters are trained on the same windows
in the same order: prose and Python that the base was trained on, labels the base's own distribution. They are measured
on test packages: prompts of prose and of code (a text's first tokens), and questions what a function does. All draft
from the same 4096 tokens; guessing is never left off, so that figures are of all steps. Intervals are paired bootstraps
over all prompts; the drafters of both seeds are in them, two being too few for an interval of their own.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.experiments.lab import Lab, Results

KINDS = ("code", "prose", "qa")
RATES = (1e-3, 3e-3)
NEW = 24  # tokens of an answer
_PROMPT = 32
_SAMPLES = 1000


@functools.cache
def fixture(quick: bool) -> tuple[Any, dict[str, list[dict[str, Any]]], dict[str, dict[str, list[list[int]]]]]:
    """The base as a Bundle, training rows, and prompts (token ids) by split and kind."""
    from gossamer.core.bundle import Bundle
    from gossamer.hub.corpora import load_corpus
    from gossamer.hub.nursery import load_nursery

    model, tokenizer = load_nursery("llama-7m")
    count = 6 if quick else 240
    rows = {
        "train": [
            {"text": row["text"]}
            for name in ("english_prose", "python_source")
            for row in load_corpus(name, limit=count).rows
        ]
    }
    prompts: dict[str, dict[str, list[list[int]]]] = {}
    for split, size in (("validation", 1 if quick else 8), ("test", 2 if quick else 68)):
        prompts[split] = {}
        for kind, name in zip(KINDS, ("python_source", "english_prose", "python_functions"), strict=True):
            found = load_corpus(name, split=split, limit=4 * size).rows
            texts = [row["prompt"] if kind == "qa" else row["text"] for row in found]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            fit = [i if kind == "qa" else i[:_PROMPT] for i in ids if len(i) >= 16 and (kind != "qa" or len(i) < 200)]
            prompts[split][kind] = fit[:size]
    return Bundle(model, tokenizer), rows, prompts


def budget(quick: bool) -> dict[str, Any]:
    """Options of training that all drafters share."""
    return {"steps": 4 if quick else 120, "batch_size": 2 if quick else 4, "length": 96, "draft_vocab": 4096,
            "labels": "base_soft", "switch_off": False}  # fmt: skip


def trained(
    arm: str,
    system: Any,
    options: Mapping[str, Any],
    seed: int,
    lab: Lab,
    rate_of: tuple[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The fitted system of an arm and seed; its rate (or that of the arm ``rate_of``, given with its options) is chosen
    on the first seed by tokens a step on validation prompts."""
    bundle, rows, prompts = fixture(lab.quick)

    def fit(arm: str, options: Mapping[str, Any], rate: float, on: int) -> Any:
        folder = lab.folder("drafters") / f"{arm}-{rate:g}-{on}"
        if folder.exists():
            return system.load(folder, bundle)
        made = system(seed=on, rate=rate, **{**budget(lab.quick), **options})
        made.fit(bundle, rows["train"])
        made.save(Path(folder))
        return made

    first = rate_of or (arm, options)

    def choose() -> float:
        lengths = {
            rate: decode(fit(*first, rate, 0), bundle.model, prompts["validation"])["tau"]
            for rate in RATES[: 1 if lab.quick else None]
        }
        return max(lengths, key=lambda rate: lengths[rate])

    return fit(arm, options, lab.once(f"rate-{first[0]}", choose), seed)


def half(prompts: Mapping[str, Sequence[list[int]]], seed: int) -> dict[str, list[list[int]]]:
    """Every second prompt of each kind, so that two seeds see all of them."""
    return {kind: list(texts[seed % 2 :: 2]) for kind, texts in prompts.items()}


def against(results: Results, arm: str, other: str) -> tuple[float, float, float]:
    """Tau of ``arm`` less that of ``other``, with its 95 % interval."""

    def table(name: str, figure: str) -> Any:
        return np.concatenate([np.asarray(one, float) for one in results.values(name, figure)])

    def tau(name: str, draws: Any) -> Any:
        return table(name, "emitted")[draws].sum(-1) / table(name, "guesses")[draws].sum(-1)

    count = len(table(arm, "guesses"))
    draws = np.random.default_rng(0).integers(0, count, (4000, count))
    low, high = np.quantile(tau(arm, draws) - tau(other, draws), [0.025, 0.975])
    whole = np.arange(count)
    return float(tau(arm, whole) - tau(other, whole)), float(low), float(high)


def decode(system: Any, model: Any, prompts: Mapping[str, Sequence[list[int]]]) -> dict[str, Any]:
    """Greedy text of all prompts: ``tau`` (tokens a guessing step) in all and by kind, ``emitted`` and ``guesses`` of
    each prompt, base forwards a token, hit rates by depth (``hit_k``: of steps that took k - 1 drafted tokens, those
    that took k), and ``same``, the share of prompts with the runner's own plain text."""
    runner = system.speculator(model).runner
    totals: dict[str, list[float]] = {}
    same, emitted, guesses = list[bool](), list[int](), list[int]()
    reached, offered = Counter[int](), Counter[int]()
    for kind, texts in prompts.items():
        counts = [0.0, 0.0, 0.0, 0.0]
        for ids in texts:
            state = system.open(model, ids)
            state.room = NEW
            while state.room:
                system.step(model, [state])
            record = state.record
            emitted.append(record.emitted_guessing)
            guesses.append(record.guesses)
            counts = [a + b for a, b in zip(counts, (record.emitted_guessing, record.guesses, record.steps,
                                                     record.emitted), strict=True)]  # fmt: skip
            for depth, (taken, of) in enumerate(zip(record.accepted, record.offered, strict=True), 1):
                reached[depth] += taken
                offered[depth] += of
            same.append(state.tokens == runner.generate(ids, max_new_tokens=NEW))
            state.close()
        totals[kind] = counts
    sums = [sum(column) for column in zip(*totals.values(), strict=True)]
    figures = {"tau": sums[0] / max(1.0, sums[1]), "forwards_per_token": sums[2] / sums[3]}
    figures |= {f"tau_{kind}": counts[0] / max(1.0, counts[1]) for kind, counts in totals.items()}
    # of those that took the token before, so that it is the head's own rate
    reached[0] = offered[1]
    figures |= {f"hit_{depth}": reached[depth] / max(1, reached[depth - 1]) for depth in range(1, 5)}
    return {**figures, "same": statistics.fmean(same), "prompts": len(same), "emitted": emitted, "guesses": guesses}


def sampling(system: Any, model: Any, ids: list[int], quick: bool) -> dict[str, float]:
    """Chi-square and total variation of the next two sampled tokens over four likely ones, against the base's own law;
    ``accepted`` is the share of first tokens that came from the draft."""
    import torch

    from gossamer.parts.requests import Choice

    with torch.no_grad():
        few = sorted(model(torch.tensor([ids])).logits[0, -1].topk(4).indices.tolist())
    allowed = torch.full((model.config.vocab_size,), -torch.inf)
    allowed[few] = 0.0
    generator = torch.Generator().manual_seed(7)
    choice = Choice((lambda _, scores: scores / 2 + allowed,), True, generator)
    with torch.no_grad():
        tables = [
            choice.scores(ids, model(torch.tensor([[*ids, *prefix]])).logits[0, -1]).softmax(-1)[few]
            for prefix in ([], *([token] for token in few))
        ]
    law = tables[0][:, None] * torch.stack(tables[1:])
    counts, count, taken = torch.zeros(4, 4), 20 if quick else _SAMPLES, 0
    for _ in range(count):
        state = system.open(model, ids)
        state.choice, state.room = choice, 2
        while state.room:
            system.step(model, [state])
        counts[few.index(state.tokens[0]), few.index(state.tokens[1])] += 1
        taken += state.record.steps == 1
        state.close()
    expected = count * law
    chi2 = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    distance = float((counts / count - law).abs().sum()) / 2
    # Wilson and Hilferty's normal form of a chi-square with 15 degrees of freedom
    z = ((chi2 / 15) ** (1 / 3) - (1 - 2 / 135)) / math.sqrt(2 / 135)
    return {"chi2": chi2, "p": 0.5 * math.erfc(z / math.sqrt(2)), "distance": distance, "accepted": taken / count}


def seconds(systems: Mapping[str, Any], model: Any, prompts: Sequence[list[int]], rounds: int) -> dict[str, float]:
    """Median milliseconds a token, the systems and plain decoding in turn, one thread as the process has it."""
    runner = next(iter(systems.values())).speculator(model).runner
    taken: dict[str, list[float]] = {name: [] for name in ("plain", *systems)}
    for turn in range(rounds):
        ids = prompts[turn % len(prompts)]
        for name, times in taken.items():
            start = time.perf_counter()
            if name == "plain":
                made = len(runner.generate(ids, max_new_tokens=NEW))
            else:
                state = systems[name].open(model, ids)
                state.room = NEW
                while state.room:
                    systems[name].step(model, [state])
                made = len(state.tokens)
            times.append(1000 * (time.perf_counter() - start) / made)
    return {f"{name}_ms": statistics.median(times) for name, times in taken.items()}
