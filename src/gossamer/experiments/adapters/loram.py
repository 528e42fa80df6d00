"""LoRAM on a scratch Llama and Gemma-3-270M: LoRA of the whole model, of a copy, and of a copy recovered to the whole.

Task: the one-line docstring of a Python function (corpus python_functions, whose splits are whole packages), loss on
the line alone. All arms train rank 8 on all linear layers, without dropout, on the same rows with AdamW.

llama (the nursery Llama: 8 layers, 7M, prose and some code; first and last block protected). Copies have half or a
quarter of the neurons of six blocks and one of their two key-value heads, or half of their weights in place (4:8, any
place). Alignment: 60 steps on 8 texts of prose and code, all weights but the tied head. Learning rates by the first
seed's validation loss, of two for training and two for alignment: for LoRA on the whole, for LoRAM at 0.5 recovered,
and for the copy at 0.5 in use; they hold for the other arms of their sort. The sister has five of the eight layers, the
size of the copy at 0.5, and is trained from scratch for 100 steps on the alignment's texts: far less than it had.

gemma (18 layers, vocabulary cut to the texts, blocks 0, 1 and 17 protected): half of the neurons, its one key-value
head stays; 16 steps each of alignment and of training, one training seed, one rate of each; the seeds there are
disjoint thirds of the test rows.

Arms: untuned; LoRA on the whole (upper bound); ``loram_*`` recovered onto the whole; ``small_*`` the same training used
on the copy; ``unaligned``; ``rand`` against Taylor scores; ``semi``, ``unst`` and ``unst_free`` (update not confined);
``sister``. ``memory`` trains two steps on saved Gemma copies in fresh processes and reads their peak.

Must be seen: aligned LoRAM beats untuned and beats train-small-infer-small; alignment helps, more at the higher ratio;
Taylor beats random; memory falls with the ratio.

Smaller than the paper: 7M and 270M instead of 13B and 70B, alignment of 45,000 tokens instead of 105M, no 4-bit arm.
Meant for about 20 minutes on one thread.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gossamer.core.paths import atomic_dir
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "llama_untuned": {},
    "llama_lora": {},
    "llama_loram_0.5": {"method": "stru", "ratio": 0.5, "aligned": True},
    "llama_small_0.5": {"method": "stru", "ratio": 0.5, "aligned": True, "used": "copy"},
    "llama_loram_0.5_unaligned": {"method": "stru", "ratio": 0.5, "aligned": False},
    "llama_loram_0.5_rand": {"method": "rand", "ratio": 0.5, "aligned": True},
    "llama_loram_0.75": {"method": "stru", "ratio": 0.75, "aligned": True},
    "llama_small_0.75": {"method": "stru", "ratio": 0.75, "aligned": True, "used": "copy"},
    "llama_loram_0.75_unaligned": {"method": "stru", "ratio": 0.75, "aligned": False},
    "llama_loram_semi": {"method": "semi", "ratio": 0.5, "aligned": True},
    "llama_loram_unst": {"method": "unst", "ratio": 0.5, "aligned": True},
    "llama_loram_unst_free": {"method": "unst", "ratio": 0.5, "aligned": True, "confined": False},
    "llama_sister": {},
    "gemma_untuned": {},
    "gemma_lora": {},
    "gemma_loram_0.5": {"method": "stru", "ratio": 0.5, "aligned": True},
    "gemma_small_0.5": {"method": "stru", "ratio": 0.5, "aligned": True, "used": "copy"},
    "gemma_loram_0.5_unaligned": {"method": "stru", "ratio": 0.5, "aligned": False},
    "memory": {},
}
RATES = (1e-3, 3e-3)
ALIGN_RATES = (1e-4, 1e-3)
PLAN = {
    "llama": {"steps": 60, "align": 60, "batch": 8, "align_batch": 8, "test": 300},
    "gemma": {"steps": 16, "align": 16, "batch": 4, "align_batch": 4, "test": 90},
}
GEMMA_RATES = (1e-3, 5e-5)  # of training and of alignment, as the paper has it
SISTER = {"layers": 5, "steps": 100}
MEMORY_RATIOS = (0.0, 0.5, 0.75)
LENGTH = 96


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Test loss per token of one arm, and the numbers that were held and trained; ``memory``: bytes by ratio."""
    if arm == "memory":
        return _memory(lab)
    base, _, how = arm.partition("_")
    fold = seed if base == "gemma" else 0
    if how == "untuned":
        return {"test_loss": _losses(_fixture(base, lab)[0], base, "test", lab)[fold]}
    options = dict(ARMS[arm])
    used = options.pop("used", "whole")
    rates = _rates(base, ("small" if used == "copy" else "loram") if options else "lora", lab)
    train_seed = seed if base == "llama" else SEEDS[0]
    figures = _figures(base, "" if options else how, tuple(sorted(options.items())), train_seed, rates, lab)
    found = {"held": figures["held"], "trained": figures["trained"], "rate": rates[0], "align_rate": rates[1]}
    return {"test_loss": figures[used][fold], **found}


def conclude(results: Results) -> Conclusion:
    """Shown: on both models, LoRAM aligned at ratio 0.5 is below untuned and below its own copy in test loss, beyond
    doubt. (The intervals were asked for after the arms had run; their figures are the same.)"""
    deciding, lines = list[tuple[str, str]](), list[MustSee]()
    for base, ratio in (("llama", "0.5"), ("llama", "0.75"), ("gemma", "0.5")):
        arm = f"{base}_loram_{ratio}"
        lines.append(_below(results, arm, f"{base}_untuned", "aligned LoRAM beats the untuned model"))
        lines.append(_below(results, arm, f"{base}_small_{ratio}", "aligned LoRAM beats train small, infer small"))
        deciding += [(arm, f"{base}_untuned"), (arm, f"{base}_small_0.5")] if ratio == "0.5" else []
        lines.append(_below(results, arm, f"{arm}_unaligned", "alignment helps"))
    gains = {
        ratio: results.paired(f"llama_loram_{ratio}_unaligned", f"llama_loram_{ratio}", "test_loss")[0]
        for ratio in ("0.5", "0.75")
    }
    text = f"{gains['0.75']:+.4f} at 0.75, {gains['0.5']:+.4f} at 0.5"
    lines.append(MustSee("alignment helps more at the higher ratio", text, gains["0.75"] > gains["0.5"]))
    lines.append(_below(results, "llama_loram_0.5", "llama_loram_0.5_rand", "Taylor scores beat random units"))
    lines.append(_below(results, "llama_loram_0.5", "llama_sister", "LoRAM beats LoRA on a model of the copy's size"))
    lines.append(_memory_line(results))
    effect, low, high = results.paired("llama_loram_0.5", "llama_small_0.5", "test_loss")
    loss = {arm: results.mean(arm, "test_loss") for arm in ARMS if arm != "memory"}
    held = {arm: results.mean(arm, "held") for arm in loss if "untuned" not in arm}
    free = results.paired("llama_loram_unst", "llama_loram_unst_free", "test_loss")
    return Conclusion(
        shown=all(results.paired(*pair, "test_loss")[2] < 0 for pair in deciding),
        baseline=f"llama, trained and used small at 0.5: test loss {loss['llama_small_0.5']:.4f}",
        result=f"llama, LoRAM at 0.5: test loss {loss['llama_loram_0.5']:.4f}",
        effect=effect,
        low=low,
        high=high,
        unit="nats per token",
        must_see=tuple(lines),
        notes=(
            "test loss: " + ", ".join(f"{arm} {value:.4f}" for arm, value in loss.items()),
            "frozen numbers held in training: " + ", ".join(f"{arm} {count / 1e6:.2f}M" for arm, count in held.items()),
            f"confined to the mask against free, any place: {free[0]:+.4f} [{free[1]:+.4f}, {free[2]:+.4f}]",
            "learning rates of training and alignment: " + ", ".join(
                f"{arm} {results.mean(arm, 'rate'):g} and {results.mean(arm, 'align_rate'):g}"
                for arm in ("llama_lora", "llama_loram_0.5", "llama_small_0.5")
            ),
        ),
    )  # fmt: skip


def _below(results: Results, arm: str, other: str, what: str) -> MustSee:
    gap, low, high = results.paired(arm, other, "test_loss")
    pair = f"{results.mean(arm, 'test_loss'):.4f} against {results.mean(other, 'test_loss'):.4f}"
    return MustSee(f"{what} ({arm})", f"{pair}, {gap:+.4f} [{low:+.4f}, {high:+.4f}]", gap < 0)


def _memory_line(results: Results) -> MustSee:
    peaks = [results.mean("memory", f"peak_{ratio:g}") for ratio in MEMORY_RATIOS]
    weights = [results.mean("memory", f"weights_{ratio:g}") for ratio in MEMORY_RATIOS]
    text = ", ".join(
        f"ratio {ratio:g}: {peak / 1e6:.0f} MB resident, {weight / 1e6:.0f} MB of weights"
        for ratio, peak, weight in zip(MEMORY_RATIOS, peaks, weights, strict=True)
    )
    falls = all(high > low for figures in (peaks, weights) for high, low in itertools.pairwise(figures))
    return MustSee("peak memory of training falls with the ratio", text, falls)


@functools.cache
def _rates(base: str, sort: str, lab: Lab) -> tuple[float, float]:
    """Learning rates of training and alignment, by the first seed's validation loss of LoRA on the whole, of LoRAM
    recovered, or of the copy in use."""
    if base == "gemma":
        return GEMMA_RATES
    how, options = ("lora", {}) if sort == "lora" else ("", ARMS["llama_loram_0.5"])
    aligning = ALIGN_RATES if options else ALIGN_RATES[:1]
    grid = [(rate, align) for align in aligning for rate in RATES][: 1 if lab.quick else None]
    metric = "validation_copy" if sort == "small" else "validation"

    def choose() -> tuple[float, float]:
        items = tuple(sorted(options.items()))
        return min(grid, key=lambda rates: _figures(base, how, items, SEEDS[0], rates, lab)[metric])

    rate, align = lab.once(f"rates-{sort}", choose)
    return float(rate), float(align)


@functools.cache
def _figures(
    base: str, how: str, options: tuple[Any, ...], seed: int, rates: tuple[float, float], lab: Lab
) -> dict[str, Any]:
    """Train, and measure on the copy and recovered: losses on the folds of test rows, validation loss, numbers."""
    from gossamer.pipeline.single import system

    whole, tokenizer, _ = _fixture(base, lab)
    choices = dict(options)
    confined = {"confined": choices.pop("confined")} if "confined" in choices else {}
    if how:
        start = _sister(lab) if how == "sister" else whole
        adapter = system("lora", seed=seed, rank=8)
    else:
        start = _copied(base, lab=lab, align_rate=rates[1] if choices["aligned"] else 0.0, **choices)
        adapter = system("loram", seed=seed, rank=8, dropout=0.0, **confined)
    model = adapter.attach(copy.deepcopy(start))
    rows = _rows(base, "train", lab)
    steps = 2 if lab.quick else PLAN[base]["steps"]
    _train(model, tokenizer, rows, int(steps), int(PLAN[base]["batch"]), rates[0], seed, lab)
    held = float(sum(parameter.numel() for parameter in start.parameters()))
    trained = float(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    on_copy, validation_copy = (_losses(model, base, split, lab) for split in ("test", "validation"))
    final = model if how else adapter.recover(model, copy.deepcopy(whole))
    figures = {
        "copy": on_copy,
        "whole": on_copy if how else _losses(final, base, "test", lab),
        "validation": validation_copy[0] if how else _losses(final, base, "validation", lab)[0],
        "validation_copy": validation_copy[0],
        "held": held,
        "trained": trained,
    }
    lab.log(f"{base} {how} {choices} {confined} seed {seed} rates {rates}: {figures}")
    return figures


# the arms of one copy stand together
@functools.lru_cache(maxsize=2)
def _copied(base: str, method: str, ratio: float, aligned: bool, align_rate: float, lab: Lab) -> Any:
    """A small copy, calibrated and aligned on prose and code."""
    from gossamer.parts.small_copies import zeros_kept
    from gossamer.pipeline.single import compress

    whole, tokenizer, texts = _fixture(base, lab)
    calibration = 10 if method == "stru" else 4 if lab.quick else 64
    batches = [
        dict(tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt"))
        for row in texts[:calibration]
    ]
    small = compress(
        copy.deepcopy(whole), "small_copy", batches, method=method, ratio=ratio, attention=base == "llama"
    ).model
    if aligned:
        small.requires_grad_(True)
        small.get_output_embeddings().requires_grad_(False)
        steps = 1 if lab.quick else PLAN[base]["align"]
        with zeros_kept(small):
            plan = PLAN[base]
            _train(small, tokenizer, texts, int(steps), int(plan["align_batch"]), align_rate, 0, lab)
    return small.requires_grad_(False)


@functools.cache
def _sister(lab: Lab) -> Any:
    """A Llama with fewer layers, from scratch on the alignment's texts."""
    import torch
    from transformers import LlamaForCausalLM

    whole, tokenizer, texts = _fixture("llama", lab)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = SISTER["layers"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    _train(model, tokenizer, texts, 2 if lab.quick else SISTER["steps"], 16, 2e-3, 0, lab)
    return model.eval().requires_grad_(False)


def _train(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int, batch: int, rate: float, seed: int, lab: Lab
) -> None:
    from gossamer.parts.training import TrainSettings, train
    from gossamer.pipeline.single import system

    settings = TrainSettings(steps=steps, batch_size=batch, max_length=LENGTH, seed=seed, save_every=0)
    objective, optimizer = system("sft"), system("adamw", lr=rate)
    folder = lab.folder("training")
    train(
        model, tokenizer, rows, objective=objective, optimizer=optimizer, settings=settings, folder=folder, resume=False
    )
    model.eval()


@functools.cache
def _fixture(base: str, lab: Lab) -> tuple[Any, Any, list[dict[str, Any]]]:
    """(whole model in float32, tokenizer, texts to align and calibrate on, prose and code in turns)."""
    from gossamer.hub.corpora import load_corpus
    from gossamer.hub.models import load_model
    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.vocabulary import trim_vocabulary

    count = 40 if lab.quick else 500
    corpora = [load_corpus(name, split="train", limit=count).rows for name in ("english_prose", "python_source")]
    texts = [{"text": row["text"]} for pair in zip(*corpora, strict=False) for row in pair]
    if base == "llama":
        model, tokenizer = load_nursery("llama-7m")
        return model.float().requires_grad_(False), tokenizer, texts
    model, tokenizer = load_model("gemma-3-270m", dtype="float32")
    rows = [row for split in ("train", "validation", "test") for row in _rows(base, split, lab)]
    used = [row["text"] for row in texts] + [row[part] for row in rows for part in ("prompt", "completion")]
    trimmed = trim_vocabulary(model, tokenizer, used)
    return trimmed.model.requires_grad_(False), trimmed.tokenizer, texts


@functools.cache
def _rows(base: str, split: str, lab: Lab) -> list[dict[str, Any]]:
    from gossamer.hub.corpora import load_corpus

    limits = {"train": 1000, "validation": 90, "test": int(PLAN[base]["test"])}
    limit = min(limits[split], 12) if lab.quick else limits[split]
    rows = load_corpus("python_functions", split=split, limit=limit).rows
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def _losses(model: Any, base: str, split: str, lab: Lab) -> list[float]:
    """Mean negative log-likelihood per answer token, float32; on a fold of the test rows a seed for gemma."""
    import torch

    from gossamer.parts.data import Collator, tokenise, weight_sum, weighted_loss

    _, tokenizer, _ = _fixture(base, lab)
    examples: list[Any] = [tokenise(row, tokenizer, max_length=LENGTH) for row in _rows(base, split, lab)]
    folds = len(SEEDS) if base == "gemma" and split == "test" else 1
    collate, losses = Collator(tokenizer), []
    model.eval()
    for fold in range(folds):
        ordered = sorted(examples[fold::folds], key=lambda example: len(example.input_ids))
        total = tokens = 0.0
        with torch.no_grad():
            for place in range(0, len(ordered), 16):
                batch = collate(ordered[place : place + 16])
                count = float(weight_sum(batch))
                total += float(weighted_loss(model, batch)) * count
                tokens += count
        losses.append(total / tokens)
    return losses


@functools.cache
def _memory(lab: Lab) -> dict[str, float]:
    """Peak resident bytes above the libraries', and bytes of the frozen weights, by ratio."""
    from gossamer.pipeline.single import compress

    figures: dict[str, float] = {}
    whole = _fixture("llama" if lab.quick else "gemma", lab)[0]
    for ratio in MEMORY_RATIOS:
        path = lab.folder() / f"memory-{ratio:g}"
        small = compress(copy.deepcopy(whole), "small_copy", method="rand", ratio=ratio, attention=False)
        with atomic_dir(path) as folder:
            small.model.save_pretrained(folder)
        del small
        found = _fresh_training(path)
        figures |= {f"peak_{ratio:g}": found["peak"], f"weights_{ratio:g}": found["weights"]}
    return figures


_CHILD = """
import json, sys, torch
import gossamer, peft
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
# not ru_maxrss: a child inherits its parent's
resident = lambda: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
model = gossamer.system("loram", rank=8).attach(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(2):
    ids = torch.arange(32)[None] + 5
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({"peak": resident() - before, "weights": weights}))
"""


def _fresh_training(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
