"""PAT against pruning channels first and tuning the rest with LoRA, at a quarter and 40 % of the channels dropped.

Plan. The nursery Llama (8 layers, width 256, 7M parameters) learns to write the one-line docstring of a Python function
(corpus python_functions, whose splits are whole packages; loss on the line alone). All arms train the same rows in the
same order with AdamW, warm-up, cosine decay and clipping at 0.3, low-rank updates of rank 20 on all linear layers
without dropout. The learning rate is chosen of two by the validation loss of the first seed, once for LoRA, once for
pruning first, once for PAT at 25 %; the other arms take the rate of their group. The figure is the mean loss per token
on test packages, of PAT with the rounded mask.

Arms: LoRA unpruned; pruning first by the norm of what the writers write to a channel, or by the Taylor score
(|sum of weight times gradient| of the writers' rows, on training rows), then LoRA; PAT with the fixed mask; PAT without
the identity term; PAT. ``speed`` times the merged models against the untouched one in turns in one process. ``gemma``,
once for all seeds: Gemma-3-270M with its vocabulary cut to the rows, PAT and pruning first, a few steps: whether the
merge is exact on a real model with norms behind the writers and a tied head.

Must be seen: PAT below pruning first at 25 % and at 40 %; near LoRA unpruned at 25 % (at most half of what pruning
first loses); as many channels as asked for; the merged model gives the masked model's logits (1e-4), loads with a
stock class and is faster.

Smaller than the paper: 7M parameters instead of 7B, 200 steps of 4 rows instead of some 10,000 of 128, one task, 3
seeds (about 16 minutes on one thread). Width 256 with n_e = 16, the paper's share. At 40 % the width is 152, the
nearest multiple of 8. alpha is 20 instead of 4, since 200 steps are few. For the same reason logits are hardened where
they stop: a first run without that tuned a soft mask to 4.02 at 25 %, which rounding took to 4.13.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from pathlib import Path
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "lora": {"rates": "lora"},
    "norm_25": {"rates": "pruned", "score": "norm", "keep": 0.75},
    "taylor_25": {"rates": "pruned", "score": "taylor", "keep": 0.75},
    "taylor_40": {"rates": "pruned", "score": "taylor", "keep": 0.6},
    "pat_25": {"rates": "pat", "keep": 0.75, "pat": {}},
    "pat_40": {"rates": "pat", "keep": 0.6, "pat": {}},
    "fixed_mask_25": {"rates": "pat", "keep": 0.75, "pat": {"trainable_mask": False}},
    "without_identity_25": {"rates": "pat", "keep": 0.75, "pat": {"identity_weight": 0.0}},
    "speed": {},
    "gemma": {},
}
CHOOSERS = {"lora": "lora", "pruned": "taylor_25", "pat": "pat_25"}  # the arm that a group's rate is chosen on
RATES = (3e-3, 1e-2)
_LENGTH, _BATCH, _RANK = 96, 4, 20


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Figures of one arm at one seed; its group's learning rate is chosen on first use."""
    if arm == "speed":
        return _speed(seed, lab)
    if arm == "gemma":
        return _gemma(lab)
    if arm == "untouched":
        model, tokenizer, rows = _fixture(lab.quick)
        return {"test_loss": _loss(model, tokenizer, rows["test"]), "parameters": float(_count(model))}
    return _train(arm, seed, _rate(ARMS[arm]["rates"], lab), lab)


def conclude(results: Results) -> Conclusion:
    """The claim: PAT below pruning first, at a quarter and at 40 %, with intervals over the seeds."""
    loss = {arm: results.mean(arm, "test_loss") for arm in ARMS if arm not in ("speed", "gemma")}
    quarter, more = (results.paired(f"pat_{share}", f"taylor_{share}", "test_loss") for share in (25, 40))
    norm = results.paired("pat_25", "norm_25", "test_loss")
    near = loss["pat_25"] - loss["lora"], loss["taylor_25"] - loss["lora"]
    ours = [arm for arm in ARMS if "pat" in ARMS[arm]]
    exact = max(max(results.values(arm, "merge_difference")) for arm in ours)
    stock = max(max(results.values(arm, "reload_difference")) for arm in ours)
    counts = all(results.values(arm, "kept") == results.values(arm, "target") for arm in ours)
    gemma, speed = next(iter(results["gemma"].values())), results["speed"]
    faster = {name: [row[name] for row in speed.values()] for name in ("prefill_25", "decode_25", "prefill_40")}
    lines = [
        MustSee("a quarter dropped: PAT below pruning first (Taylor)", _against(loss, 25, quarter), quarter[2] < 0),
        MustSee("40 % dropped: PAT below pruning first (Taylor)", _against(loss, 40, more), more[2] < 0),
        MustSee(
            "a quarter dropped: PAT below pruning first (norm)",
            f"{loss['pat_25']:.4f} against {loss['norm_25']:.4f}, difference {_interval(norm)}",
            norm[2] < 0,
        ),
        MustSee(
            "a quarter dropped: PAT loses at most half of what pruning first loses against LoRA unpruned",
            f"{near[0]:+.4f} against {near[1]:+.4f} from {loss['lora']:.4f}",
            near[0] <= 0.5 * near[1],
        ),
        MustSee(
            "as many channels are kept as were asked for",
            ", ".join(f"{arm} {results.mean(arm, 'kept'):.0f} of 256" for arm in ours)
            + f", Gemma {gemma['kept']:.0f} of {gemma['width']:.0f}",
            counts and gemma["kept"] == gemma["target"],
        ),
        MustSee(
            "the merged model gives the masked model's logits (1e-4 in float32) and loads with a stock class",
            f"largest difference {exact:.1e}, after loading {stock:.1e}; Gemma {gemma['merge_difference']:.1e}, "
            f"after loading {gemma['reload_difference']:.1e}",
            exact < 1e-4 and stock == 0 and gemma["merge_difference"] < 1e-3 and gemma["reload_difference"] == 0,
        ),
        MustSee(
            "the merged model is faster than the untouched one",
            ", ".join(f"{name} x{sum(values) / len(values):.2f}" for name, values in faster.items())
            + f"; Gemma prefill x{gemma['prefill']:.2f}, decode x{gemma['decode']:.2f}",
            min(faster["prefill_25"]) > 1 and gemma["prefill"] > 1,
        ),
    ]
    for arm in ("fixed_mask_25", "without_identity_25"):
        worse = results.paired(arm, "pat_25", "test_loss")
        lines.append(MustSee(f"{arm.removesuffix('_25')} is worse than PAT", _interval(worse), worse[1] > 0))
    rates = {name: results.mean(arm, "rate") for name, arm in CHOOSERS.items()}
    return Conclusion(
        shown=lines[0].shown and lines[1].shown,
        baseline=f"pruning a quarter by Taylor score, then LoRA: test loss {loss['taylor_25']:.4f}",
        result=f"PAT: test loss {loss['pat_25']:.4f}",
        effect=quarter[0],
        low=quarter[1],
        high=quarter[2],
        unit="nats per token",
        must_see=tuple(lines),
        notes=(
            "test loss: " + ", ".join(f"{arm} {value:.4f}" for arm, value in loss.items()),
            "with the soft mask: " + ", ".join(f"{arm} {results.mean(arm, 'soft_loss'):.4f}" for arm in ours),
            f"learning rates of {RATES}: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()),
            f"parameters: untouched {results.mean('untouched', 'parameters'):,.0f}, PAT at 25 % "
            f"{results.mean('pat_25', 'parameters'):,.0f} with its head untied, pruned first "
            f"{results.mean('taylor_25', 'parameters'):,.0f}",
            f"Gemma-3-270M after {gemma['steps']:.0f} steps: untouched {gemma['untouched_loss']:.3f}, PAT "
            f"{gemma['pat_loss']:.3f}, pruning first {gemma['pruned_loss']:.3f}; too few steps to compare",
        ),
    )


def _against(loss: dict[str, float], share: int, difference: tuple[float, float, float]) -> str:
    ours, theirs = loss[f"pat_{share}"], loss[f"taylor_{share}"]
    return f"{ours:.4f} against {theirs:.4f}, difference {_interval(difference)}"


def _interval(difference: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference)


def _rate(group: str, lab: Lab) -> float:
    def choose() -> float:
        tried = {
            rate: _train(CHOOSERS[group], SEEDS[0], rate, lab)["validation_loss"]
            for rate in (RATES[1:] if lab.quick else RATES)
        }
        return min(tried, key=lambda rate: tried[rate])

    return float(lab.once(f"rate-{group}", choose))


@functools.cache
def _train(arm: str, seed: int, rate: float, lab: Lab) -> dict[str, float]:
    """One training run from the nursery model; the choice of a rate makes some that are wanted again."""
    base, tokenizer, rows = _fixture(lab.quick)
    options, model = ARMS[arm], copy.deepcopy(base)
    if "score" in options:
        model = _prune(model, tokenizer, rows["train"], options["score"], options["keep"])
    system = _system(options, seed)
    attached = system.attach(model)
    _fit(attached, tokenizer, rows["train"], rate, seed, steps=6 if lab.quick else 200)
    found = {split: _loss(attached, tokenizer, rows[split]) for split in ("validation", "test")}
    figures = {"validation_loss": found["validation"], "test_loss": found["test"], "rate": rate}
    if "pat" in options:
        figures["soft_loss"] = _loss(attached, tokenizer, rows["test"], soft=True)
        figures |= _merged(system, attached, tokenizer, rows["test"], _folder(lab, arm, seed))
    else:
        figures["parameters"] = float(_count(system.merge(attached)))
    lab.log(f"{arm} seed {seed} rate {rate:g}: {figures}")
    return figures


def _merged(system: Any, attached: Any, tokenizer: Any, rows: list[Any], folder: Path) -> dict[str, float]:
    """Merge, save, load with the stock class; largest differences of logits on the first rows."""
    import torch

    channels = system.channels(attached)
    masked = _logits(attached, tokenizer, rows)
    small = system.merge(attached)
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = type(small).from_pretrained(folder, dtype=torch.float32).eval()
    merged, loaded = (_logits(model, tokenizer, rows) for model in (small, again))
    return {
        **{name: float(value) for name, value in channels.items()},
        "parameters": float(_count(small)),
        "merge_difference": float((merged - masked).abs().max()),
        "reload_difference": float((loaded - merged).abs().max()),
    }


def _folder(lab: Lab, arm: str, seed: int) -> Path:
    return lab.folder() / "merged" / f"{arm}-{seed}"


def _system(options: dict[str, Any], seed: int) -> Any:
    from gossamer.pipeline.single import system

    if "pat" not in options:
        return system("lora", seed=seed, rank=_RANK, alpha=float(_RANK))
    low_rank: dict[str, Any] = {"lora_rank": _RANK, "lora_alpha": float(_RANK), "lora_dropout": 0.0}
    return system("pat", seed=seed, keep_ratio=options["keep"], inner=16, **low_rank, **options["pat"])


def _prune(model: Any, tokenizer: Any, rows: list[Any], score: str, keep: float) -> Any:
    """The model with the channels of the largest scores alone, as many as PAT keeps."""
    import torch

    from gossamer.parts.data import Collator, weighted_loss
    from gossamer.parts.residual_stream import narrow, residual_stream
    from gossamer.pipeline.single import system

    stream = residual_stream(model, "pruning first")
    kept = system("pat", keep_ratio=keep).kept_channels(model)
    weights = [model.get_submodule(path).weight for path in (stream.embedding, *stream.writers)]
    model.requires_grad_(True)
    factors: Any = weights  # channel by channel, the weight times itself (norm) or times its gradient (Taylor)
    if score == "taylor":
        loss = weighted_loss(model, Collator(tokenizer)([example for _, example in rows[:64]]))
        factors = torch.autograd.grad(loss, weights)
    products = [(weight * factor).detach() for weight, factor in zip(weights, factors, strict=True)]
    products[0] = products[0].T
    if score == "norm":
        products = [product / product.sum() for product in products]
    scores = torch.stack([product.sum(1).abs() for product in products]).sum(0)
    chosen = scores.topk(kept).indices.sort().values
    return narrow(model, chosen, "pruning first", gain=math.sqrt(kept / stream.width))


def _fit(model: Any, tokenizer: Any, rows: list[Any], rate: float, seed: int, steps: int) -> None:
    from gossamer.parts.training import TrainSettings, train
    from gossamer.pipeline.single import system

    settings = TrainSettings(
        steps=steps, batch_size=_BATCH, max_length=_LENGTH, warmup=0.03, clip=0.3, seed=seed, save_every=0
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, tokenizer, [row for row, _ in rows], objective=system("sft"),
            optimizer=system("adamw", lr=rate), settings=settings, folder=Path(folder),
        )  # fmt: skip


def _speed(seed: int, lab: Lab) -> dict[str, float]:
    """How many times faster than the untouched model: prefill of some 500 tokens, decoding behind it."""
    from transformers import AutoModelForCausalLM

    base, tokenizer, rows = _fixture(lab.quick)
    models = {"untouched": base}
    for arm in ("pat_25", "pat_40"):
        folder = _folder(lab, arm, seed)
        if not folder.exists():
            _train(arm, seed, _rate("pat", lab), lab)
        models[arm] = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
    found = _timed(models, tokenizer, rows["test"], 64 if lab.quick else 500, rounds=2 if lab.quick else 9)
    return {f"{what}_{arm.removeprefix('pat_')}": found[what][arm] for arm in ("pat_25", "pat_40") for what in found}


def _timed(
    models: dict[str, Any], tokenizer: Any, rows: list[Any], length: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Ratios to the first model by arm, in turns: of the first token's time (prefill) and of tokens a second."""
    from gossamer.parts.measure import decode_speed, speed_ratio

    ids = [token for _, example in rows for token in example.input_ids][:length]
    arms = {name: (model, tokenizer) for name, model in models.items()}
    found = decode_speed(arms, tokenizer.decode(ids), new_tokens=16, rounds=rounds)
    first, *others = found
    return {
        "prefill": {name: found[first].first_token_ms / found[name].first_token_ms for name in others},
        "decode": {name: speed_ratio(found[name], found[first]).ratio for name in others},
    }


@functools.cache
def _gemma(lab: Lab) -> dict[str, float]:
    """PAT and pruning first on Gemma-3-270M at a quarter, a few steps, one seed; the merge, and its speed."""
    from transformers import AutoModelForCausalLM

    base, tokenizer, rows = _gemma_fixture(lab.quick)
    steps, figures = (2 if lab.quick else 8), {"untouched_loss": _loss(base, tokenizer, rows["test"])}
    pruned = _prune(copy.deepcopy(base), tokenizer, rows["train"], "taylor", 0.75)
    for name, options, model in (("pruned", {}, pruned), ("pat", {"pat": {}, "keep": 0.75}, copy.deepcopy(base))):
        system = _system(options, SEEDS[0])
        attached = system.attach(model)
        _fit(attached, tokenizer, rows["train"], RATES[0], SEEDS[0], steps)
        figures[f"{name}_loss"] = _loss(attached, tokenizer, rows["test"])
        lab.log(f"gemma {name}: {figures}")
    folder = _folder(lab, "gemma", SEEDS[0])
    figures |= _merged(system, attached, tokenizer, rows["test"], folder)
    models = {"untouched": base, "pat": AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)}
    speed = _timed(models, tokenizer, rows["test"], 64 if lab.quick else 256, rounds=1 if lab.quick else 3)
    return figures | {what: ratios["pat"] for what, ratios in speed.items()} | {"steps": float(steps)}


@functools.cache
def _fixture(quick: bool) -> tuple[Any, Any, dict[str, list[Any]]]:
    """The nursery model, its tokenizer, and (row, its tokens) of each split."""
    from gossamer.hub.nursery import load_nursery

    model, tokenizer = load_nursery("llama-7m")
    limits = {"train": 2400, "validation": 250, "test": 500}
    if quick:
        limits = {"train": 100, "validation": 16, "test": 24}
    return model, tokenizer, {split: _tokenised(_rows(split, limit), tokenizer) for split, limit in limits.items()}


def _gemma_fixture(quick: bool) -> tuple[Any, Any, dict[str, list[Any]]]:
    """Gemma in float32 with its vocabulary cut to the rows, and of a quick pass two of its layers."""
    from gossamer.hub.models import load_model
    from gossamer.parts.vocabulary import trim_vocabulary

    rows = {split: _rows(split, 40 if quick else 300) for split in ("train", "test")}
    model, tokenizer = load_model("gemma-3-270m", dtype="float32")
    if quick:
        del model.model.layers[2:]
        model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
    texts = [text for split in rows.values() for row in split for text in row.values()]
    trimmed = trim_vocabulary(model, tokenizer, texts)
    data = {split: _tokenised(found, trimmed.tokenizer) for split, found in rows.items()}
    data["test"] = data["test"][:24]
    return trimmed.model.eval(), trimmed.tokenizer, data


def _rows(split: str, limit: int) -> list[dict[str, str]]:
    from gossamer.hub.corpora import load_corpus

    found = load_corpus("python_functions", split=split, limit=limit).rows
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in found]


def _tokenised(rows: list[dict[str, str]], tokenizer: Any) -> list[Any]:
    """Rows that fit whole: a prompt without its beginning has no signature to describe."""
    from gossamer.parts.data import tokenise

    pairs: list[Any] = [(row, tokenise(row, tokenizer, max_length=_LENGTH)) for row in rows]
    return [pair for pair in pairs if pair[1].cut == (0, 0)]


def _loss(model: Any, tokenizer: Any, rows: list[Any], *, soft: bool = False) -> float:
    """Mean negative log-likelihood per supervised token, in float32; ``soft`` with the mask as in training."""
    import torch

    from gossamer.parts.data import Collator, weight_sum, weighted_loss

    model.train(soft)
    collate, total, tokens = Collator(tokenizer), 0.0, 0.0
    examples = sorted((example for _, example in rows), key=lambda example: len(example.input_ids))
    with torch.no_grad():
        for place in range(0, len(examples), 32):
            batch = collate(examples[place : place + 32])
            count = float(weight_sum(batch))
            total += float(weighted_loss(model, batch)) * count
            tokens += count
    model.eval()
    return total / tokens


def _logits(model: Any, tokenizer: Any, rows: list[Any]) -> Any:
    import torch

    from gossamer.parts.data import Collator

    batch = Collator(tokenizer)([example for _, example in rows[:8]])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
