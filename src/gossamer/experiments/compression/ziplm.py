"""ZipLM against magnitude pruning and its own ablations at equal measured latency, on MiniLM and Gemma-3-270M.

MiniLM. all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads) learns for about two minutes which of ten packages a paragraph of
English prose comes from (train and test apart by source). Calibration: its 1600 training paragraphs. Targets 1.5, 2
and 3 times the speed at 1 row of 128 tokens on this machine. Gemma. Gemma-3-270M (18 layers, 4 query heads on one
key-value head), vocabulary cut to the texts, next-token loss on prose, calibration 256 texts of 128 tokens, targets 1.5
and 2. Hessians are of all calibration texts, the search looks at the loss on the first of them.

Arms at each target, all with the same latency table and the same search by real loss: ``ziplm``; ``no_update`` (the
removal scores of the first inverse Hessian, weights as they were); ``magnitude`` (size of the unit's columns, no
Hessian, prior the share of the squared weights that went); ``uniform`` (ZipLM's levels, one density for all layers,
the largest that meets the budget). ``minilm_tuned_2`` distils ZipLM's model of 2x for one pass over the calibration
texts (hidden states and logits of the dense model). ``speed`` times the saved models, loaded by ``from_pretrained``, in
turns with the dense ones. Nothing is drawn at random but the search, in the same way for all arms; seeds are disjoint
sets of test texts (96 paragraphs; 8 texts of 128 tokens), differences are paired over them.

Must be seen: loss(ziplm) < no_update < magnitude at each target, and ziplm below uniform; measured speed-up within 10 %
of what was predicted, and of the target; tuning recovers loss.

Smaller than the paper: 22M and 270M parameters, 32 (MiniLM) and 16 (Gemma) looks of the search, after 24 and 72 for its
slopes, instead of about 1000, a fine-tuning of two minutes, no gradual run over many targets. Latencies on GPUs are not
shown.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gossamer.core.paths import atomic_dir
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
ARMS: dict[str, dict[str, Any]] = {
    "minilm_dense": {},
    "minilm_ziplm_1.5": {"target": 1.5},
    "minilm_ziplm_2": {"target": 2.0},
    "minilm_ziplm_3": {"target": 3.0},
    "minilm_uniform_1.5": {"target": 1.5},
    "minilm_uniform_2": {"target": 2.0},
    "minilm_uniform_3": {"target": 3.0},
    "minilm_no_update_1.5": {"target": 1.5},
    "minilm_no_update_2": {"target": 2.0},
    "minilm_no_update_3": {"target": 3.0},
    "minilm_magnitude_1.5": {"target": 1.5},
    "minilm_magnitude_2": {"target": 2.0},
    "minilm_magnitude_3": {"target": 3.0},
    "minilm_tuned_2": {"target": 2.0},
    "gemma_dense": {},
    "gemma_ziplm_1.5": {"target": 1.5},
    "gemma_ziplm_2": {"target": 2.0},
    "gemma_uniform_1.5": {"target": 1.5},
    "gemma_uniform_2": {"target": 2.0},
    "gemma_no_update_1.5": {"target": 1.5},
    "gemma_no_update_2": {"target": 2.0},
    "gemma_magnitude_1.5": {"target": 1.5},
    "gemma_magnitude_2": {"target": 2.0},
    "speed": {},
}
TARGETS = {"minilm": ("1.5", "2", "3"), "gemma": ("1.5", "2")}
PACKAGES = (
    "torch", "transformers", "sympy", "pandas", "matplotlib", "nltk", "numpy", "huggingface_hub", "fontTools", "peft",
)  # fmt: skip
LOOKS = {"minilm": (8, 24), "gemma": (4, 12)}  # starts and steps of the search
SEARCH_TOKENS = {"minilm": 8192, "gemma": 2048}
SHAPE = (1, 128)  # rows and tokens that are timed
LENGTH = {"minilm": 64, "gemma": 128}


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Loss (and accuracy) on the test texts of ``seed``; ``speed``: seconds of dense and cut models in turns."""
    if arm == "speed":
        return _speed(lab)
    return _arm(arm, lab)[seed]


def conclude(results: Results) -> Conclusion:
    """Shown: on both models, at every target, ZipLM's loss is below its ablations' and magnitude pruning's, the
    intervals of the differences below 0."""
    lines = [line for base in TARGETS for target in TARGETS[base] for line in _order(results, base, target)]
    lines += _speed_lines(results)
    pruned, tuned = results.mean("minilm_ziplm_2", "loss"), results.mean("minilm_tuned_2", "loss")
    lines.append(MustSee("a pass of distillation recovers loss at 2x", f"{pruned:.4f} to {tuned:.4f}", tuned < pruned))
    effect, low, high = results.paired("minilm_ziplm_2", "minilm_magnitude_2", "loss")
    text = "{}: loss {:.4f}, accuracy {:.1%}"
    shown = {
        name: (name, results.mean(name, "loss"), results.mean(name, "accuracy")) for name in ARMS if "minilm" in name
    }
    perplexities = [f"{name} {math.exp(results.mean(name, 'loss')):.2f}" for name in ARMS if name.startswith("gemma")]
    return Conclusion(
        shown=all(line.shown for line in lines if "below" in line.text),
        baseline="MiniLM at 2x, " + text.format(*shown["minilm_magnitude_2"]),
        result="MiniLM at 2x, " + text.format(*shown["minilm_ziplm_2"]),
        effect=effect,
        low=low,
        high=high,
        unit="nats per text",
        must_see=tuple(lines),
        notes=("; ".join(text.format(*row) for row in shown.values()), "perplexity: " + "; ".join(perplexities)),
    )


def _order(results: Results, base: str, target: str) -> list[MustSee]:
    arms = {how: f"{base}_{how}_{target}" for how in ("ziplm", "no_update", "magnitude", "uniform")}
    loss = {how: results.mean(arm, "loss") for how, arm in arms.items()}
    lines = []
    for low, high in (("ziplm", "no_update"), ("no_update", "magnitude"), ("ziplm", "magnitude"), ("ziplm", "uniform")):
        gap = results.paired(arms[low], arms[high], "loss")
        figures = f"{loss[low]:.4f} against {loss[high]:.4f}, {gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]"
        # whether one ablation beats the other is reported, the claim is about ZipLM
        word = "below" if low == "ziplm" else "lower than"
        lines.append(MustSee(f"{base} at {target}x: loss of {low} {word} {high}", figures, gap[2] < 0))
    return lines


def _speed_lines(results: Results) -> list[MustSee]:
    lines = []
    for base, targets in TARGETS.items():
        for target in targets:
            name = f"{base}_{target}"
            found, said = results.mean("speed", name), results.mean(f"{base}_ziplm_{target}", "predicted")
            near = abs(found / said - 1) <= 0.1, abs(found / float(target) - 1) <= 0.1
            text = f"{base}: measured speed-up within 10 % of prediction and of the target {target}"
            lines.append(MustSee(text, f"measured {found:.2f}, predicted {said:.2f}", all(near)))
    return lines


@functools.cache
def _arm(arm: str, lab: Lab) -> list[dict[str, float]]:
    """Build once, score on the texts of every seed."""
    base, _, rest = arm.partition("_")
    how, _, target = rest.rpartition("_")
    dense, _, folds = _fixture(base, lab)
    model = dense
    figures: dict[str, float] = {}
    if how:
        model, figures = _tuned(lab) if how == "tuned" else _pruned(base, how, target, lab)
    return [figures | _score(model, fold) for fold in folds]


@functools.cache
def _fixture(base: str, lab: Lab) -> tuple[Any, list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """(dense model, calibration batches, test batches of each seed)."""
    return _minilm(lab) if base == "minilm" else _gemma(lab)


@functools.lru_cache(maxsize=1)
def _run(base: str, lab: Lab) -> Any:
    from gossamer.compression.ziplm import Run, ZipLM

    model, calibration, _ = _fixture(base, lab)
    starts, steps = (2, 1) if lab.quick else LOOKS[base]
    factor = 0.5 if lab.quick else 0.9
    system = ZipLM(
        search_starts=starts, search_steps=steps, search_tokens=SEARCH_TOKENS[base], shape=SHAPE, levels_ffn=factor
    )
    return Run(system, copy.deepcopy(model), calibration)


# one method's levels at a time: its arms stand together
@functools.lru_cache(maxsize=1)
def _levels(base: str, how: str, lab: Lab) -> Any:
    removal = {"no_update": _without_update, "magnitude": _by_magnitude}.get(how)
    return _run(base, lab).levels(removal)


def _pruned(base: str, how: str, target: str, lab: Lab) -> tuple[Any, dict[str, float]]:
    """The model cut to ``target`` and its predicted speed-up; ZipLM's are saved for the arms that load them."""
    from gossamer.compression.ziplm.search import Found

    run = _run(base, lab)
    levels = _levels(base, "ziplm" if how == "uniform" else how, lab)
    goal = 1.0 + (float(target) - 1.0) * (0.2 if lab.quick else 1.0)
    other = run.copied()
    if how == "uniform":
        even = run.even(levels, goal)
        found = Found(even, other.stitched_loss(levels, even), 1)
    else:
        found = run.search(levels, goal)
    report = other.finish(levels, found, goal)
    if how == "ziplm":
        with atomic_dir(_folder(base, target, lab)) as path:
            other.model.save_pretrained(path)
    return other.model, {"predicted": report.values["predicted"], "calibration_loss": found.loss}


def _without_update(weight: Any, hessian: Any, width: int, counts: Collection[int]) -> Any:
    """Units ranked once by ``rho`` under the whole inverse Hessian, weights as they were."""
    from gossamer.compression.ziplm.removal import unit_scores
    from gossamer.parts.calibration import invert

    scores = unit_scores(weight.double(), invert(hessian).matrix, width)
    return _ranked(weight, hessian, width, counts, scores)


def _by_magnitude(weight: Any, hessian: Any, width: int, counts: Collection[int]) -> Any:
    """Units ranked by the norm of their columns; the prior is the share of the squared weights that went."""
    import dataclasses

    power = weight.double().square().view(len(weight), -1, width).sum((0, 2))
    levels = _ranked(weight, hessian, width, counts, power)
    shares = {count: 1 - float(power[level.keep].sum() / power.sum()) for count, level in levels.items()}
    return {count: dataclasses.replace(level, error=shares[count]) for count, level in levels.items()}


def _ranked(weight: Any, hessian: Any, width: int, counts: Collection[int], scores: Any) -> Any:
    from gossamer.compression.ziplm.removal import level_of

    order = scores.argsort(descending=True)
    return {count: level_of(weight, hessian, width, order[:count].sort().values) for count in counts}


def _tuned(lab: Lab) -> tuple[Any, dict[str, float]]:
    from gossamer.compression.ziplm.tuning import tune

    dense, calibration, _ = _fixture("minilm", lab)
    model = _loaded("minilm", "2", lab)
    steps = 2 if lab.quick else 100
    curve = tune(model, copy.deepcopy(dense), calibration, steps=steps, rate=1e-4, weights=(0.0, 1.0, 0.5), seed=0)
    return model, {"first": curve[0][1], "last": curve[-1][1]}


@functools.cache
def _speed(lab: Lab) -> dict[str, float]:
    """Measured speed-up of each saved model, timed in turns with the dense one."""
    from gossamer.compression.ziplm.costs import compare

    figures: dict[str, float] = {}
    for base, targets in TARGETS.items():
        models = [_fixture(base, lab)[0], *(_loaded(base, target, lab) for target in targets)]
        dense, *cut = compare(models, SHAPE, 3 if lab.quick else 15)
        figures |= {f"{base}_dense_ms": 1000 * dense}
        figures |= {f"{base}_{target}": dense / taken for target, taken in zip(targets, cut, strict=True)}
    return figures


def _folder(base: str, target: str, lab: Lab) -> Path:
    return lab.folder() / f"{base}_{target}"


def _loaded(base: str, target: str, lab: Lab) -> Any:
    import transformers

    if not _folder(base, target, lab).exists():
        _pruned(base, "ziplm", target, lab)
    auto = transformers.AutoModelForSequenceClassification if base == "minilm" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(_folder(base, target, lab)).eval()


def _score(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Mean loss over texts (MiniLM) or tokens (Gemma), and accuracy of the likeliest label."""
    import torch
    import torch.nn.functional as F

    losses, right = [], []
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            labels = batch.get("labels")
            if labels is None:
                logits, labels = logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            right.append((logits.argmax(-1) == labels).float())
    return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).mean())}


def _minilm(lab: Lab) -> tuple[Any, list[dict[str, Any]], list[list[dict[str, Any]]]]:
    import torch
    import transformers

    from gossamer.hub.models import resolve

    source = resolve("all-minilm-l6-v2").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rows = _paragraphs(lab.quick)
    train, test = ([_batch(tokenizer, part[i : i + 16]) for i in range(0, len(part), 16)] for part in rows)
    folder = lab.folder() / "minilm_dense"
    auto = transformers.AutoModelForSequenceClassification
    if not folder.exists():
        shape = {"num_hidden_layers": 2} if lab.quick else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_pretrained(source, num_labels=len(PACKAGES), **shape)
        if lab.quick:
            _narrow(model)
        _fine_tune(model, train, 4 if lab.quick else 100)
        with atomic_dir(folder) as path:
            model.save_pretrained(path)
    each = len(test) // len(SEEDS)
    folds = [test[seed * each : (seed + 1) * each] for seed in range(len(SEEDS))]
    return auto.from_pretrained(folder).eval(), train[:3] if lab.quick else train, folds


def _paragraphs(quick: bool) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(text, number of its package), training and test, alike many of each package and apart by source."""
    from gossamer.hub.corpora import load_corpus

    by: dict[str, dict[str, list[str]]] = {name: {} for name in PACKAGES}
    for row in load_corpus("english_prose", split="train").rows:
        if row["package"] in by and len(row["text"]) > 60:
            by[row["package"]].setdefault(row["source"], []).append(row["text"])
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    shuffle = random.Random(0)
    for label, name in enumerate(PACKAGES):
        sources = sorted(by[name])
        shuffle.shuffle(sources)
        wanted = (16, 16) if quick else (160, 96)
        ordered = iter(sources)
        for part, count in zip(parts, wanted, strict=True):
            texts: list[str] = []
            while len(texts) < count:
                texts += by[name][next(ordered)][:4]
            part.extend((text, label) for text in texts[:count])
    for part in parts:
        shuffle.shuffle(part)
    return parts


def _batch(tokenizer: Any, rows: list[tuple[str, int]]) -> dict[str, Any]:
    import torch

    texts = [text for text, _ in rows]
    length = LENGTH["minilm"]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {**batch, "labels": torch.tensor([label for _, label in rows])}


def _fine_tune(model: Any, batches: list[dict[str, Any]], steps: int) -> None:
    """One pass of AdamW over batches of 16 texts, rate 2e-4 falling to 0, all weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        model.train()
        for step in range(steps):
            model(**batches[step % len(batches)]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def _gemma(lab: Lab) -> tuple[Any, list[dict[str, Any]], list[list[dict[str, Any]]]]:

    from gossamer.hub.models import load_model
    from gossamer.parts.vocabulary import trim_vocabulary

    calibration, each = (4, 1) if lab.quick else (256, 8)
    texts = [*_documents("train", calibration), *_documents("test", each * len(SEEDS))]
    model, tokenizer = load_model("gemma-3-270m", dtype="float32")
    if lab.quick:
        del model.model.layers[2:]
        model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
        _narrow(model)
    trimmed = trim_vocabulary(model, tokenizer, texts)
    rows = [trimmed.tokenizer(text, add_special_tokens=False)["input_ids"][: LENGTH["gemma"] - 1] for text in texts]
    train, test = (
        [_causal_batch(trimmed.tokenizer, part[place : place + each]) for place in range(0, len(part), each)]
        for part in (rows[:calibration], rows[calibration:])
    )
    return trimmed.model.eval(), train, [[batch] for batch in test]


def _causal_batch(tokenizer: Any, rows: list[list[int]]) -> dict[str, Any]:
    import torch

    ids = torch.tensor([[tokenizer.bos_token_id, *row] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _narrow(model: Any) -> None:
    """FFNs of 256 neurons, for a quick pass."""
    from gossamer.parts.surgery import Keep, cut, find_blocks

    cut(model, {block.index: Keep(None, range(256)) for block in find_blocks(model)})


def _documents(split: str, count: int) -> list[str]:
    """``count`` texts of neighbouring paragraphs of one source, long enough for all tokens of a row."""
    from gossamer.hub.corpora import load_corpus

    joined: dict[str, list[str]] = {}
    for row in load_corpus("english_prose", split=split).rows:
        joined.setdefault(row["source"], []).append(row["text"])
    texts = ["\n".join(parts)[:1200] for parts in joined.values()]
    texts = [text for text in texts if len(text) >= 900]
    random.Random(0).shuffle(texts)
    return texts[:count]
