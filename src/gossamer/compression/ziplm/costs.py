"""What blocks cost at each width: seconds measured on this machine, or counts of parameters or bytes.

A variant of a block has its attention cut to ``k`` heads and no FFN, or its FFN cut to ``w`` neurons and no attention;
its cost is that of the variant less that of the block with neither, norms and residual included:

    cost of the model  =  rest  +  sum over blocks of (cost of k heads + cost of w neurons)

with the whole model measured and the rest what is left over. All variants are timed in turns, the median over the
rounds counts, and the costs of neighbours are averaged where noise made the smaller the slower (isotonic regression).
A table that was measured is kept in the cache under everything that it depends on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.paths import cache_dir, write_json
from gossamer.parts.calibration import Batch, at_rest, block_calls, device_of, without_cache
from gossamer.parts.surgery import Block, find_blocks, resize_block

ROUNDS = 9
_LEAST_SECONDS = 1e-3  # a measurement repeats its call for at least this long
Heads = tuple[int, int]  # query heads, key-value heads


@dataclasses.dataclass(frozen=True)
class Costs:
    """``whole`` of the model, and by heads ``{(query, key-value): cost}`` and neurons; all in one unit."""

    whole: float
    heads: dict[Heads, float]
    neurons: dict[int, float]

    def prunable(self, blocks: Sequence[Block]) -> float:
        """What all heads and neurons of ``blocks`` cost together."""
        return sum(self.heads[block.heads, block.kv_heads] + self.neurons[block.neurons] for block in blocks)

    def save(self, path: Path) -> None:
        heads = {f"{q}/{kv}": cost for (q, kv), cost in self.heads.items()}
        write_json(path, {"whole": self.whole, "heads": heads, "neurons": self.neurons})

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what :meth:`save` wrote; InputError for anything else."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            heads = {tuple(map(int, key.split("/"))): float(cost) for key, cost in table["heads"].items()}
            neurons = {int(key): float(cost) for key, cost in table["neurons"].items()}
            return cls(float(table["whole"]), heads, neurons)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            do = "give a file that was measured before, or none to measure"
            raise InputError(f"latency table {path}", must="be a table of costs", got=error, do=do) from error


def head_counts(block: Block) -> list[Heads]:
    """(query, key-value) heads of a block with all, ..., 1, 0 of its head groups left."""
    per_group = block.heads // max(1, block.head_groups)
    shared = block.kv_heads == 1
    counts = [(groups * per_group, 1 if shared else groups) for groups in range(block.head_groups, 0, -1)]
    return [*counts, (0, 0)]


def measured(model: nn.Module, shape: tuple[int, int], heads: Iterable[Heads], neurons: Iterable[int]) -> Costs:
    """Seconds at ``shape`` (rows, tokens), read from the cache where this very table was measured before."""
    heads, neurons = sorted(set(heads)), sorted(set(neurons))
    path = cache_dir("latency") / f"{_key(model, shape, heads, neurons)}.json"
    if not path.exists():
        _measure(model, shape, heads, neurons).save(path)
    return Costs.load(path)


def counted(
    model: Any, shape: tuple[int, int], heads: Iterable[Heads], neurons: Iterable[int], *, memory: bool
) -> Costs:
    """Parameters; or bytes, with those of the keys and values of a decoder at ``shape``."""
    blocks = find_blocks(model)
    caches = memory and model.can_generate()
    a_head = 2 * shape[0] * shape[1] * blocks[0].head_width * next(model.parameters()).element_size()

    def size(module: nn.Module) -> int:
        own = {id(p): p for p in module.parameters()}.values()
        return sum(p.numel() * (p.element_size() if memory else 1) for p in own)

    sized = {key: size(variant.module) for key, variant in _variants(blocks, heads, neurons)}
    empty = sized[0, 0, 0]
    cached = sum(block.kv_heads for block in blocks) * a_head if caches else 0
    return Costs(
        size(model) + cached,
        {(q, kv): sized[q, kv, 0] - empty + caches * kv * a_head for q, kv, width in sized if not width},
        {width: sized[q, kv, width] - empty for q, kv, width in sized if not q},
    )


def seconds(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each call, all taken in turns after a warm-up."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, round(_LEAST_SECONDS / max(1e-7, time.perf_counter() - start))))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats[place]):
                call()
            taken[place].append((time.perf_counter() - start) / repeats[place])
    return [statistics.median(times) for times in taken]


def timing_batch(model: Any, shape: tuple[int, int]) -> Batch:
    """Tokens of no meaning, ``shape`` (rows, tokens)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and shape[1] > limit:
        raise InputError("ziplm.shape", must=f"have at most the {limit} tokens that the model takes", got=shape[1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], shape, generator=generator)
    return {"input_ids": ids.to(device_of(model)), "attention_mask": torch.ones_like(ids).to(device_of(model))}


def model_call(model: Any, shape: tuple[int, int]) -> Callable[[], Any]:
    """One forward pass at ``shape``, to be timed inside of ``at_rest``."""
    batch = timing_batch(model, shape)
    return lambda: model(**batch, **without_cache(model))


def compare(models: Sequence[Any], shape: tuple[int, int], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of a forward pass of each model, taken in turns."""
    for model in models:
        model.eval()
    with torch.no_grad():
        return seconds([model_call(model, shape) for model in models], rounds)


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest rising sequence in least squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # mean, count
    for value in values:
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            low, many = pools.pop()
            pools.append([(low * many + mean * count) / (many + count), many + count])
    return [mean for mean, count in pools for _ in range(int(count))]


def _measure(model: nn.Module, shape: tuple[int, int], heads: Sequence[Heads], neurons: Sequence[int]) -> Costs:
    blocks = find_blocks(model)
    calls = block_calls(model, [block.module for block in blocks], timing_batch(model, shape))
    hidden = calls[0].hidden
    variants = _variants(blocks, heads, neurons)
    runs = [model_call(model, shape)]
    runs += [functools.partial(calls[block.index].run, block.module.eval(), hidden) for _, block in variants]
    with at_rest(model):
        whole, *times = seconds(runs)
    taken = {key: time for (key, _), time in zip(variants, times, strict=True)}
    empty = taken[0, 0, 0]
    costs = {key: max(0.0, time - empty) for key, time in taken.items()}
    by_heads = sorted((q, kv) for q, kv, width in costs if not width)
    by_width = sorted(width for q, _, width in costs if not q)
    return Costs(
        whole,
        dict(zip(by_heads, isotonic([costs[q, kv, 0] for q, kv in by_heads]), strict=True)),
        dict(zip(by_width, isotonic([costs[0, 0, width] for width in by_width]), strict=True)),
    )


def _variants(
    blocks: Sequence[Block], heads: Iterable[Heads], neurons: Iterable[int]
) -> list[tuple[tuple[int, int, int], Block]]:
    """((query heads, key-value heads, neurons), a copy of a block cut to them), one of both kinds 0."""
    most = (max(blocks, key=lambda block: (block.heads, block.kv_heads)), max(blocks, key=lambda block: block.neurons))
    shapes = {(q, kv, 0) for q, kv in heads} | {(0, 0, width) for width in neurons} | {(0, 0, 0)}
    found = []
    for shape in sorted(shapes):
        template = most[shape[2] > 0]
        variant = dataclasses.replace(template, module=copy.deepcopy(template.module))
        resize_block(variant, *shape)
        found.append((shape, variant))
    return found


def _key(model: Any, shape: tuple[int, int], heads: Sequence[Heads], neurons: Sequence[int]) -> str:
    from gossamer.parts.measure import environment

    known = environment()
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    where = {k: known[k] for k in ("device", "threads", "system", "versions")}
    first = next(model.parameters())
    facts = [where, type(model).__name__, config, str(first.dtype), str(first.device), shape, heads, neurons]
    facts.append(str(model.config._attn_implementation))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
