"""MoS against LoRA of several ranks, pure sharing and itself without each strategy, at the same trainable count.

Plan. The nursery Llama (8 layers, 7M parameters, trained from scratch on prose and some Python) learns to write the
one-line docstring of a Python function: corpus python_functions, whose splits are whole packages. Loss only on the
line. Every arm trains the same rows in the same order with AdamW, linear decay and warm-up, no dropout, alpha 16, and
its own best learning rate of three, chosen by the validation loss of the first seed. The figure is the mean loss per
token on test packages; ``trainable`` is the number of trained numbers.

Baselines: LoRA of rank 2 (the count of MoS), 8 and 16; pure sharing at the same count (one pair of rank-16 factors
for all layers of a type). Ablations: without subset selection (every layer takes all public shards, which makes rank
9), without pair dissociation, without vector sharding (l = 1), without shard privatization (p = 0).

Must be seen: MoS (budget 2, rank 8) below LoRA rank 2; pure sharing above MoS; MoS closes a good part of the gap from
LoRA rank 2 to rank 8; each ablation above MoS.

Smaller than the paper: one model of 7M instead of 3B to 13B, one task, 120 steps of 8 rows (the whole run is meant
for about 12 minutes on two cores). With 8 layers, budget 2 and one private rank there are 8 public vectors, so that
rank 9 is the most that MoS can have: the rank 16 of the paper's grid is left out, and rank 4 stands for the other
side (at rank 8 a layer takes 7 of the 8, at rank 4 it takes 3).
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "lora_r2": {"system": "lora", "rank": 2},
    "lora_r8": {"system": "lora", "rank": 8},
    "lora_r16": {"system": "lora", "rank": 16},
    "pure_sharing": {
        "system": "mos",
        "rank": 16,
        "budget": 2,
        "private": 0,
        "shards": 1,
        "pair_dissociation": False,
    },
    "mos": {"system": "mos", "rank": 8, "budget": 2, "private": 1, "shards": 4},
    "mos_r4": {"system": "mos", "rank": 4, "budget": 2, "private": 1, "shards": 4},
    "mos_without_subset_selection": {"system": "mos", "rank": 9, "budget": 2, "private": 1, "shards": 4},
    "mos_without_pair_dissociation": {
        "system": "mos",
        "rank": 8,
        "budget": 2,
        "private": 1,
        "shards": 4,
        "pair_dissociation": False,
    },
    "mos_without_vector_sharding": {"system": "mos", "rank": 8, "budget": 2, "private": 1, "shards": 1},
    "mos_without_shard_privatization": {"system": "mos", "rank": 8, "budget": 2, "private": 0, "shards": 4},
}
RATES = (1e-3, 3e-3, 1e-2)
_LENGTH = 96
_BATCH = 8


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Choose the learning rate on the first seed's validation loss, train, and measure on the test packages."""
    if arm == "untouched":
        return _train(arm, seed, 0.0, lab)
    tried: dict[float, dict[str, float]] = {}

    def choose() -> float:
        tried.update({rate: _train(arm, SEEDS[0], rate, lab) for rate in (RATES[1:] if lab.quick else RATES)})
        return min(tried, key=lambda rate: tried[rate]["validation_loss"])

    rate = lab.once(f"rate-{arm}", choose)
    figures = tried[rate] if seed == SEEDS[0] and rate in tried else _train(arm, seed, rate, lab)
    return figures | {"rate": rate}


def conclude(results: Results) -> Conclusion:
    """MoS against LoRA of rank 2 decides the claim; the other lines of the plan are listed beside it."""
    loss = {arm: results.mean(arm, "test_loss") for arm in ARMS}
    effect, low, high = results.paired("mos", "lora_r2", "test_loss")
    sharing, sharing_low, _ = results.paired("pure_sharing", "mos", "test_loss")
    rates = {arm: results.mean(arm, "rate") for arm in ARMS if arm != "untouched"}
    won = loss["lora_r2"] - loss["mos"]
    closed = {arm: _share(won, loss["lora_r2"] - loss[arm]) for arm in ("lora_r8", "lora_r16")}
    other = ("untouched", "lora_r8", "lora_r16")
    equal = len({results.mean(arm, "trainable") for arm in ARMS if arm not in other}) == 1
    lines = [
        MustSee(
            "at the same trainable count MoS has a lower held-out loss than LoRA rank 2",
            f"{loss['mos']:.4f} against {loss['lora_r2']:.4f}, difference {effect:+.4f} [{low:+.4f}, {high:+.4f}]",
            equal and high < 0,
        ),
        MustSee(
            "pure sharing is worse than MoS at the same budget",
            f"{loss['pure_sharing']:.4f} against {loss['mos']:.4f}, difference {sharing:+.4f}",
            sharing_low > 0,
        ),
        MustSee(
            "MoS closes a good part (at least a third) of the gap to LoRA rank 8 at a quarter of its numbers",
            f"{closed['lora_r8']:.0%} of the gap to rank 8, {closed['lora_r16']:.0%} of the gap to rank 16",
            closed["lora_r8"] >= 1 / 3,
        ),
    ]
    for arm in (name for name in ARMS if name.startswith("mos_without")):
        worse, worse_low, worse_high = results.paired(arm, "mos", "test_loss")
        lines.append(
            MustSee(
                f"{arm.removeprefix('mos_').replace('_', ' ')} MoS is worse",
                f"difference {worse:+.4f} [{worse_low:+.4f}, {worse_high:+.4f}]",
                worse_low > 0,
            )
        )
    return Conclusion(
        shown=lines[0].shown,
        baseline=f"LoRA rank 2: test loss {loss['lora_r2']:.4f}",
        result=f"MoS budget 2, rank 8: test loss {loss['mos']:.4f}",
        effect=effect,
        low=low,
        high=high,
        unit="nats per token",
        must_see=tuple(lines),
        notes=(
            f"untouched model: {loss['untouched']:.4f}; MoS rank 4: {loss['mos_r4']:.4f}; "
            f"LoRA rank 8: {loss['lora_r8']:.4f}, rank 16: {loss['lora_r16']:.4f}",
            f"learning rates of {RATES}, by arm: " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()),
            "rank 16 needs more layers than 8 at this budget; 7B scores and memory with many adapters are not measured",
        ),
    )


def _share(won: float, gap: float) -> float:
    return won / gap if gap > 0 else float("nan")


def _train(arm: str, seed: int, rate: float, lab: Lab) -> dict[str, float]:
    """One training run from the nursery model; losses per token in nats."""
    import torch

    from gossamer.parts.data import Collator, weighted_loss

    untouched, tokenizer, examples = _fixture(lab.quick)
    model = copy.deepcopy(untouched)
    collate = Collator(tokenizer)
    if arm == "untouched":
        return {"test_loss": _loss(model, examples["test"], collate), "trainable": 0.0}
    attached = _system(arm, seed).attach(model)
    parameters = [parameter for parameter in attached.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = 8 if lab.quick else 120
    warm = max(1, steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    attached.train()
    for rows in _batches(examples["train"], steps, seed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(attached, collate(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    figures = {
        "validation_loss": _loss(attached, examples["validation"], collate),
        "test_loss": _loss(attached, examples["test"], collate),
        "trainable": float(sum(parameter.numel() for parameter in parameters)),
    }
    lab.log(f"{arm} seed {seed} rate {rate:g}: {figures}")
    return figures


def _system(arm: str, seed: int) -> Any:
    from gossamer.pipeline.single import system

    options = {key: value for key, value in ARMS[arm].items() if key != "system"}
    return system(ARMS[arm]["system"], seed=seed, dropout=0.0, **options)


@functools.cache
def _fixture(quick: bool) -> tuple[Any, Any, dict[str, list[Any]]]:
    """The nursery model, its tokenizer, and the tokenised rows of each split."""
    from gossamer.hub.corpora import load_corpus
    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.data import tokenise

    model, tokenizer = load_nursery("llama-7m")
    limits = {"train": 3000, "validation": 600, "test": 900}
    if quick:
        limits = {"train": 200, "validation": 60, "test": 60}
    examples = {}
    for split, limit in limits.items():
        rows = load_corpus("python_functions", split=split, limit=limit).rows
        tokenised = [tokenise(_row(row), tokenizer, max_length=_LENGTH) for row in rows]
        # a prompt without its beginning has no signature to describe
        examples[split] = [example for example in tokenised if getattr(example, "cut", None) == (0, 0)]
    return model, tokenizer, examples


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _batches(examples: list[Any], steps: int, seed: int) -> Iterator[list[Any]]:
    order: list[int] = []
    shuffle = random.Random(seed)
    for _ in range(steps):
        if len(order) < _BATCH:
            order = shuffle.sample(range(len(examples)), len(examples))
        yield [examples[order.pop()] for _ in range(_BATCH)]


def _loss(model: Any, examples: list[Any], collate: Any) -> float:
    """Mean negative log-likelihood per supervised token, in float32."""
    import torch

    from gossamer.parts.data import weight_sum, weighted_loss

    model.eval()
    total, tokens = 0.0, 0.0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    with torch.no_grad():
        for place in range(0, len(ordered), 32):
            batch = collate(ordered[place : place + 32])
            count = float(weight_sum(batch))
            total += float(weighted_loss(model, batch)) * count
            tokens += count
    return total / tokens
