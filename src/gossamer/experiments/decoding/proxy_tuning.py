"""Proxy-tuning the nursery Llama by a small pair, against the base, the small expert and tuning the base itself.

Plan. M is the nursery Llama (8 layers, width 256, 7M parameters). M- has 3 layers of width 128 and the same tokenizer,
and is trained from scratch on the same prose and Python for some minutes. The task is a real one: the one-line
docstring of a Python function (corpus python_functions, whose splits are whole packages), loss on the line only. M+ is
M- tuned on it, and "direct" is M tuned on the same rows in the same order; each with the better of its learning rates
by validation loss on the first seed. Figures: loss per token of the line on test packages, chrF of greedy lines, and
loss per token on held-out English prose, the knowledge that narrow tuning may harm.

Arms: base, expert alone, direct tuning (the ceiling), proxy-tuning at alpha 0.5, 1, 1.5 and 2. Controls: alpha 0, and
M+ in the place of M-, must give the base's lines token for token. ``timing`` alternates base and proxy in one process.

Must be seen: proxy-tuned (alpha 1) better than base by a wide margin and at least as good as M+, closing at least half
of the gap to direct tuning; prose kept better than by direct tuning; an alpha inside the sweep better than both ends.

Smaller than the paper: a 7M base instead of 13B to 70B, one task. The second trio of the plan (Gemma-3-270M with a
distilled cut of itself) is left out: distilling and tuning it takes longer than the rest together.
"""

from __future__ import annotations

import copy
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "expert": {},
    "direct": {},
    "proxy_0.5": {"alpha": 0.5},
    "proxy_1": {"alpha": 1.0},
    "proxy_1.5": {"alpha": 1.5},
    "proxy_2": {"alpha": 2.0},
    "control_alpha_0": {"alpha": 0.0},
    "control_twins": {"alpha": 1.0, "twins": True},
    "timing": {"alpha": 1.0},
}
SWEEP = {0.0: "base", 0.5: "proxy_0.5", 1.0: "proxy_1", 1.5: "proxy_1.5", 2.0: "proxy_2"}
RATES = {"expert": (1e-3, 3e-3), "direct": (5e-4, 1.5e-3)}
_LENGTH, _BATCH, _WINDOW, _NEW = 96, 16, 128, 24


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Measure one arm; small and tuned models are trained on first use and kept in the lab's folder."""
    if arm == "timing":
        return _timing(lab)
    if arm.startswith("control"):
        return {"same_lines": _same_lines(arm, seed, lab)}
    base, tokenizer, data = _fixture(lab.quick)
    if arm in ("base", "expert", "direct"):
        model = base if arm == "base" else _tuned(arm, seed, lab)
        scored, options = model, dict[str, Any]()
    else:
        system = _proxy(seed, lab, trace=arm == "proxy_1", **ARMS[arm])
        scored, options = system.combined(base), {"custom_generate": system.custom_generate(tokenizer)}
        model = base
    figures = {
        "task_loss": _loss(scored, data["test"], tokenizer),
        "prose_loss": _loss(scored, data["prose"], tokenizer),
        "chrf": _chrf(_lines(model, tokenizer, data["prompts"], options), data["lines"]),
    }
    if arm == "proxy_1":
        figures |= _moved(system, base, tokenizer, data["prompts"])
    lab.log(f"{arm} seed {seed}: {figures}")
    return figures


def conclude(results: Results) -> Conclusion:
    """Alpha 1 against the base decides, if it is also at least as good as the expert and closes half of the gap."""
    task = {arm: results.mean(arm, "task_loss") for arm in ("base", "expert", "direct", *SWEEP.values())}
    prose = {arm: results.mean(arm, "prose_loss") for arm in task}
    chrf = {arm: results.mean(arm, "chrf") for arm in task}
    effect, low, high = results.paired("proxy_1", "base", "task_loss")
    expert, _, expert_high = results.paired("proxy_1", "expert", "task_loss")
    kept, _, kept_high = results.paired("proxy_1", "direct", "prose_loss")
    gap = task["base"] - task["direct"]
    closed = (task["base"] - task["proxy_1"]) / gap if gap > 0 else float("nan")
    best = min(SWEEP, key=lambda alpha: task[SWEEP[alpha]])
    same = min(min(results.values(arm, "same_lines")) for arm in ARMS if arm.startswith("control"))
    base_ms, proxy_ms = results.mean("timing", "base_ms"), results.mean("timing", "proxy_ms")
    lines = (
        MustSee("alpha 0 and twin experts give the base's lines", f"{same:.0%} of the lines", same == 1),
        MustSee(
            "proxy-tuned is better than the base by a wide margin",
            f"task loss {task['proxy_1']:.3f} against {task['base']:.3f}, difference {effect:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]; chrF {chrf['proxy_1']:.1f} against {chrf['base']:.1f}",
            high < 0,
        ),
        MustSee(
            "proxy-tuned is at least as good as the small expert alone",
            f"task loss {task['proxy_1']:.3f} against {task['expert']:.3f}, difference {expert:+.3f}; "
            f"chrF {chrf['proxy_1']:.1f} against {chrf['expert']:.1f}",
            expert_high <= 0,
        ),
        MustSee("at least half of the gap to direct tuning is closed", f"{closed:.0%} of the task loss", closed >= 0.5),
        MustSee(
            "prose is kept better than by direct tuning",
            f"prose loss {prose['proxy_1']:.3f} against {prose['direct']:.3f} (base {prose['base']:.3f}), "
            f"difference {kept:+.3f}",
            kept_high < 0,
        ),
        MustSee(
            "an alpha inside the sweep is best",
            ", ".join(f"{alpha:g}: {task[arm]:.3f}" for alpha, arm in SWEEP.items()),
            best not in (min(SWEEP), max(SWEEP)),
        ),
    )
    return Conclusion(
        shown=all(line.shown for line in lines[:4]),
        baseline=f"base: task loss {task['base']:.3f}, expert alone {task['expert']:.3f}",
        result=f"proxy-tuned, alpha 1: task loss {task['proxy_1']:.3f}, direct tuning {task['direct']:.3f}",
        effect=effect,
        low=low,
        high=high,
        unit="nats per token",
        must_see=lines,
        notes=(
            f"a token takes {proxy_ms:.1f} ms instead of {base_ms:.1f} ms at batch 1",
            f"the shift changed the best token in {results.mean('proxy_1', 'changed'):.0%} of the steps; "
            f"KL(base || proxy-tuned) {results.mean('proxy_1', 'kl'):.2f} nats, "
            f"KL(base || M-) {results.mean('proxy_1', 'kl_anti'):.2f} nats a token",
            "70B figures and the Gemma trio are not shown",
        ),
    )


def _proxy(seed: int, lab: Lab, *, twins: bool = False, **options: Any) -> Any:
    from gossamer.decoding.proxy_tuning import ProxyTuning

    expert = _tuned("expert", seed, lab)
    anti = copy.deepcopy(expert) if twins else _small(lab)
    return ProxyTuning(anti_expert="anti", companions={"expert": expert, "anti": anti}, seed=seed, **options)


@functools.cache
def _fixture(quick: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The base, its tokenizer, and the data: task rows by split, prose windows, prompts with their lines."""
    from gossamer.hub.corpora import load_corpus
    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.data import tokenise

    base, tokenizer = load_nursery("llama-7m")
    sizes = {"train": 96, "validation": 24, "test": 32} if quick else {"train": 3000, "validation": 300, "test": 500}
    data: dict[str, Any] = {}
    for split, size in sizes.items():
        rows = load_corpus("python_functions", split=split, limit=size).rows
        pairs: list[tuple[Any, Any]] = [(row, tokenise(_row(row), tokenizer, max_length=_LENGTH)) for row in rows]
        # a prompt without its beginning has no signature to describe
        pairs = [(row, example) for row, example in pairs if example.cut == (0, 0)]
        data[split] = [example for _, example in pairs]
    shown = pairs[: 8 if quick else 96]
    data["prompts"], data["lines"] = [row["prompt"] for row, _ in shown], [row["completion"] for row, _ in shown]
    prose = load_corpus("english_prose", split="test", limit=24 if quick else 300).rows
    data["prose"] = [tokenise({"text": row["text"]}, tokenizer, max_length=_WINDOW) for row in prose]
    return base, tokenizer, data


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _small(lab: Lab) -> Any:
    """M-: trained once from scratch on packed windows of the base's own corpora."""

    def train() -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from gossamer.hub.corpora import load_corpus
        from gossamer.parts.data import pack, tokenise

        base, tokenizer, _ = _fixture(lab.quick)
        steps = 8 if lab.quick else 320
        config = LlamaConfig(
            vocab_size=base.config.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=base.config.bos_token_id, eos_token_id=base.config.eos_token_id,
            pad_token_id=base.config.pad_token_id,
        )  # fmt: skip
        texts = [
            row["text"]
            for name, share in (("english_prose", 0.8), ("python_source", 0.2))
            for row in load_corpus(name, limit=int(share * steps * 60)).rows
        ]
        pieces: list[Any] = [tokenise({"text": text}, tokenizer, max_length=256) for text in texts]
        examples = pack(pieces, 256)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        _train(model, examples, tokenizer, steps, 3e-3, seed=0, packed=True)
        return model

    return _kept(lab.folder("small") / "model", train)


def _tuned(which: str, seed: int, lab: Lab) -> Any:
    """M+ ("expert") or the tuned base ("direct") of a seed; the rate is chosen on the first seed."""
    _, tokenizer, data = _fixture(lab.quick)

    def tune(rate: float, on: int) -> Any:
        model = copy.deepcopy(_fixture(lab.quick)[0] if which == "direct" else _small(lab))
        _train(model, data["train"], tokenizer, 8 if lab.quick else 150, rate, seed=on)
        return model

    def choose() -> float:
        models = {rate: tune(rate, SEEDS[0]) for rate in RATES[which]}
        rate = min(models, key=lambda rate: _loss(models[rate], data["validation"], tokenizer))
        _kept(lab.folder(which) / f"seed-{SEEDS[0]}", lambda: models[rate])
        return rate

    rate = lab.once(f"rate-{which}", choose)
    return _kept(lab.folder(which) / f"seed-{seed}", lambda: tune(rate, seed))


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """The model at ``path``, made first where it is not there, in float32 and evaluation mode."""
    from transformers import LlamaForCausalLM

    from gossamer.core.paths import atomic_dir

    if not path.exists():
        with atomic_dir(path) as temporary:
            make().save_pretrained(temporary)
    return LlamaForCausalLM.from_pretrained(path).float().eval()


def _train(
    model: Any, examples: list[Any], tokenizer: Any, steps: int, rate: float, *, seed: int, packed: bool = False
) -> None:
    """AdamW, warm-up and linear decay, bfloat16 autocast, batches of 16."""
    import torch

    from gossamer.parts.data import Collator, weighted_loss

    collate = Collator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1 if packed else 0.0, fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for rows in _batches(examples, steps, seed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, collate(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _batches(examples: list[Any], steps: int, seed: int) -> Iterator[list[Any]]:
    order: list[int] = []
    shuffle = random.Random(seed)
    for _ in range(steps):
        if len(order) < _BATCH:
            order = shuffle.sample(range(len(examples)), len(examples))
        yield [examples[order.pop()] for _ in range(_BATCH)]


def _loss(model: Any, examples: Sequence[Any], tokenizer: Any) -> float:
    """Mean negative log-likelihood per supervised token."""
    import torch

    from gossamer.parts.data import Collator, weight_sum, weighted_loss

    collate, total, tokens = Collator(tokenizer), 0.0, 0.0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    with torch.no_grad():
        for place in range(0, len(ordered), 16):
            batch = collate(ordered[place : place + 16])
            count = float(weight_sum(batch))
            total += float(weighted_loss(model, batch)) * count
            tokens += count
    return total / tokens


def _lines(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any]) -> list[str]:
    from gossamer.parts.generation import generate_texts

    return generate_texts(model, tokenizer, prompts, max_new_tokens=_NEW, batch_size=32, **options)


def _chrf(lines: list[str], truth: list[str]) -> float:
    from gossamer.parts.metrics import score_texts

    return float(score_texts(lines, truth)["chrf"].mean())


def _same_lines(arm: str, seed: int, lab: Lab) -> float:
    """Share of the greedy lines that are the base's own."""
    import warnings

    base, tokenizer, data = _fixture(lab.quick)
    prompts = data["prompts"][:32]
    system = _proxy(seed, lab, **ARMS[arm])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that twins have no effect is the point
        found = _lines(base, tokenizer, prompts, {"custom_generate": system.custom_generate(tokenizer)})
    return statistics.fmean(a == b for a, b in zip(found, _lines(base, tokenizer, prompts, {}), strict=True))


def _moved(system: Any, base: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """How often the shift changed the best token, and how far M+ and M- move and stand from the base."""
    import torch

    done = system.generate(base, tokenizer, prompts[:16], max_new_tokens=_NEW)
    steps = [entry for report in done.reports for entry in report["tokens"]]
    anti, distance = system.companion("anti"), list[float]()
    for prompt in prompts[:16]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (base, anti))
        distance.append(float((ours.exp() * (ours - theirs)).sum(-1).mean()))
    return {
        "changed": statistics.fmean(entry["changed"] for entry in steps),
        "kl": statistics.fmean(entry["kl"] for entry in steps),
        "kl_anti": statistics.fmean(distance),
    }


def _timing(lab: Lab) -> dict[str, float]:
    """Median milliseconds a token at batch 1, base and proxy in turn."""
    base, tokenizer, data = _fixture(lab.quick)
    system = _proxy(SEEDS[0], lab, alpha=1.0)
    ids = tokenizer(data["prompts"][0], return_tensors="pt")["input_ids"]
    taken: dict[str, list[float]] = {"base_ms": [], "proxy_ms": []}
    for _ in range(3 if lab.quick else 9):
        for name, times in taken.items():
            own = {"custom_generate": system.custom_generate(tokenizer)} if name == "proxy_ms" else {}
            start = time.perf_counter()
            base.generate(ids, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, **own)
            times.append(1000 * (time.perf_counter() - start) / _NEW)
    return {name: statistics.median(times) for name, times in taken.items()}
