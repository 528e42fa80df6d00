"""FineQuant against one group size for all matrices at equal bits per weight, on Gemma-3-270M.

Plan. The body of the model (all linear layers; embeddings and head stay in bfloat16, the vocabulary is cut to the
texts) is quantised with weights only; perplexity and agreement of the likeliest token with the float model on
held-out English prose. Quantisation draws nothing at random: the seeds are disjoint sets of test texts, and
differences are paired over them. Bits per weight count the scales.

Baselines: float; int8 per channel; int4 per tensor, per channel and in groups of 128, 64 and 32. The paper's rule runs
with its default alpha and with the smallest alpha that stays at the bits of groups of 128 (``finequant_alpha``): the
claim is decided on that arm. The rule under ``target_bpw``, ours, is given the bits of each fixed size, down to
groups of 16, and once more bits than 4 (5.5, against 5 bits in groups of 32, which cost the same).

Outliers with exact truth: in the down projection of every third layer one column is multiplied by 32, so that every
row has one large weight, and the row of the up projection that feeds it is divided by 32. Powers of two are exact in
bfloat16, so the float function is the same to the bit, and any loss is the quantiser's.

Experts: a Mixtral (4 experts, 2 of them a token) and a Llama with as many active weights learn bytes of prose; only
their FFN matrices are rounded per channel to 4 and 3 bits. Speed: greedy decoding at batch 1, all contenders in turns
in one process.

How the rule under a target was found: on 6 validation texts (2,354 tokens), at 4.125 bits, seven rules ran once each.
One size of 128 gave perplexity 28.4; bisecting alpha 31.7 and 33.2 (quantile; ratio per group, ratio of means) and 39.4
and 41.1 (mean); falls of the predicted error per bit 27.8, the same with each matrix counted alike 28.7, falls of the
logarithm of the ranges per bit 27.6. The first of the last three was kept, since it weighs bits and groups alike; its
lead on one size is small and had no interval. With its default alpha of 1.25 the paper's rule gave 31.4 at 4.160 bits:
it is the arm ``finequant``, with a line of its own. At 5.5 bits 15.71, as 5 bits in groups of 32 (15.70).
The texts of this experiment had no part in it.

Must be seen: per-tensor int4 fails; FineQuant at most at the perplexity of each fixed size at equal bits; int8 within
1 %; exactly the matrices with planted outliers change their group size, per-channel int4 collapses on them and
FineQuant does not; experts lose less than dense FFNs.

Smaller than the paper: 270M instead of 175B, and weights that were 4 to 8 bits before (they come from a Q4_K_M file);
toy MoE models trained for about a minute; CPU kernels instead of the paper's GPU kernels.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1, 2, 3, 4)
ARMS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8_channel": {"system": "rounding", "bits": 8},
    "int4_tensor": {"system": "rounding", "bits": 4, "group": -1},
    "int4_channel": {"system": "rounding", "bits": 4},
    "int4_g128": {"system": "rounding", "bits": 4, "group": 128},
    "int4_g64": {"system": "rounding", "bits": 4, "group": 64},
    "int4_g32": {"system": "rounding", "bits": 4, "group": 32},
    "int5_g32": {"system": "rounding", "bits": 5, "group": 32},
    "finequant": {"system": "finequant"},
    "finequant_alpha": {"system": "finequant", "min_group": 16, "average": 4.125},
    "finequant_g128": {"system": "finequant", "target_bpw": 4.125, "min_group": 16},
    "finequant_g64": {"system": "finequant", "target_bpw": 4.25, "min_group": 16},
    "finequant_g32": {"system": "finequant", "target_bpw": 4.5, "min_group": 16},
    "finequant_5.5": {"system": "finequant", "target_bpw": 5.5},
    "outliers_float": {"planted": True},
    "outliers_channel": {"planted": True, "system": "rounding", "bits": 4},
    "outliers_g64": {"planted": True, "system": "rounding", "bits": 4, "group": 64},
    "outliers_finequant": {"planted": True, "system": "finequant"},
    "experts": {"bytes": "mixtral"},
    "dense_ffn": {"bytes": "llama"},
    "speed": {},
}
PAIRS = (("finequant_g128", "int4_g128"), ("finequant_g64", "int4_g64"), ("finequant_g32", "int4_g32"))
_EVERY = 3  # layers with planted outliers


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Figures of one arm on the texts of one seed; the arm itself is built once a process."""
    if arm == "speed":
        return _speed(lab.quick)
    made = _bytes_arm(ARMS[arm]["bytes"], lab.quick) if "bytes" in ARMS[arm] else _arm(arm, lab.quick)
    return made[seed]


def conclude(results: Results) -> Conclusion:
    """Shown: at the bits of groups of 128 the paper's rule is not worse beyond doubt, and per-tensor int4 fails."""
    ppl = {arm: math.exp(results.mean(arm, "nll")) for arm in ARMS if "nll" in next(iter(results[arm].values()))}
    bpw = {arm: results.mean(arm, "bpw") for arm in ppl}
    pairs = {ours: results.paired(ours, fixed, "nll") for ours, fixed in PAIRS}
    effect, low, high = results.paired("finequant_alpha", "int4_g128", "nll")
    lines = [
        MustSee(
            f"{ours}: perplexity at most that of {fixed} at equal or fewer bits per weight",
            f"{ppl[ours]:.2f} at {bpw[ours]:.3f} bits against {ppl[fixed]:.2f} at {bpw[fixed]:.3f}, "
            f"difference {pairs[ours][0]:+.4f} [{pairs[ours][1]:+.4f}, {pairs[ours][2]:+.4f}] nats; "
            f"{results.mean(ours, 'other_size'):.0%} of the matrices have another size",
            pairs[ours][0] <= 0 and bpw[ours] <= bpw[fixed] + 1e-6,
        )
        for ours, fixed in PAIRS
    ]
    alpha = MustSee(
        "the paper's rule: perplexity at most that of int4_g128 at equal or fewer bits per weight",
        f"{ppl['finequant_alpha']:.2f} at {bpw['finequant_alpha']:.3f} bits against {ppl['int4_g128']:.2f} at "
        f"{bpw['int4_g128']:.3f}, difference {effect:+.4f} [{low:+.4f}, {high:+.4f}] nats "
        f"(default alpha: {ppl['finequant']:.2f} at {bpw['finequant']:.3f} bits)",
        effect <= 0 and bpw["finequant_alpha"] <= bpw["int4_g128"] + 1e-6,
    )
    tensor = ppl["int4_tensor"] / ppl["float"]
    fails = MustSee("int4 with one scale per tensor fails", f"perplexity times {tensor:.3g}", tensor > 10)
    int8 = ppl["int8_channel"] / ppl["float"] - 1
    lines.append(MustSee("int8 per channel within 1 %", f"{int8:+.2%}", abs(int8) < 0.01))
    more = results.paired("finequant_5.5", "int5_g32", "nll")
    lines.append(
        MustSee(
            "with bits to spend beyond 4, at most the perplexity of 5 bits in groups of 32",
            f"{ppl['finequant_5.5']:.2f} at {bpw['finequant_5.5']:.3f} against {ppl['int5_g32']:.2f} at "
            f"{bpw['int5_g32']:.3f}, difference {more[0]:+.4f} [{more[1]:+.4f}, {more[2]:+.4f}] nats",
            more[0] <= 0,
        )
    )
    lines = [alpha, fails, *lines, *_outlier_lines(results, ppl, bpw), _expert_line(results)]
    speed = next(iter(results["speed"].values()))
    return Conclusion(
        shown=alpha.shown and fails.shown,
        baseline=f"int4 in groups of 128: perplexity {ppl['int4_g128']:.2f} at {bpw['int4_g128']:.3f} bits",
        result=f"FineQuant: perplexity {ppl['finequant_alpha']:.2f} at {bpw['finequant_alpha']:.3f} bits",
        effect=effect,
        low=low,
        high=high,
        unit="nats per token",
        must_see=tuple(lines),
        notes=(
            "the sizes under a target are chosen by a rule of ours; the paper's are finequant and finequant_alpha",
            "perplexity (bits, agreement with float): "
            + "; ".join(f"{a} {ppl[a]:.4g} ({bpw[a]:.3f}, {results.mean(a, 'agreement'):.1%})" for a in ppl),
            "decoding tokens/s: " + ", ".join(f"{k} {v:.1f}" for k, v in speed.items() if k != "seconds"),
        ),
    )


def _outlier_lines(results: Results, ppl: dict[str, float], bpw: dict[str, float]) -> list[MustSee]:
    same = results.paired("outliers_float", "float", "nll")[0]
    right, wrong = results.mean("outliers_finequant", "refined"), results.mean("outliers_finequant", "others_changed")
    channel = results.paired("outliers_channel", "int4_channel", "nll")[0]
    ours = results.paired("outliers_finequant", "finequant", "nll")[0]
    return [
        MustSee("planted outliers leave the float function as it is", f"{same:+.2e} nats", same == 0),
        MustSee(
            "exactly the matrices with planted outliers get smaller groups",
            f"{right:.0%} of them, {wrong:.0f} others changed",
            right == 1 and wrong == 0,
        ),
        MustSee(
            "planted outliers cost per-channel int4 much and FineQuant little (a tenth)",
            f"{channel:+.3f} nats (perplexity {ppl['outliers_channel']:.4g}) against "
            f"{ours:+.3f} ({ppl['outliers_finequant']:.4g} at {bpw['outliers_finequant']:.3f} bits; "
            f"groups of 64: {ppl['outliers_g64']:.4g})",
            ours < 0.1 * channel,
        ),
    ]


def _expert_line(results: Results) -> MustSee:
    rise = {
        (arm, bits): results.mean(arm, f"int{bits}") - results.mean(arm, "float")
        for arm in ("experts", "dense_ffn")
        for bits in (4, 3)
    }
    return MustSee(
        "experts lose less than dense FFNs at 4 and 3 bits",
        ", ".join(f"{arm} int{bits} {value:+.4f} nats per byte" for (arm, bits), value in rise.items()),
        all(rise["experts", bits] < rise["dense_ffn", bits] for bits in (4, 3)),
    )


@functools.cache
def _arm(arm: str, quick: bool) -> list[dict[str, float]]:
    """Quantise once, score on the texts of every seed."""
    from gossamer.pipeline.single import system

    options = dict(ARMS[arm])
    planted, name = options.pop("planted", False), options.pop("system", "")
    model = _planted(quick) if planted else copy.deepcopy(_base(quick)[0])
    figures: dict[str, float] = {"bpw": 16.0}
    if name:
        if "average" in options:
            options["alpha"] = _alpha_for(options.pop("average"), options, quick)
        report = system(name, **options).compress(model).report
        figures = {"bpw": report.values["bits_per_weight"]}
        figures |= {"collapsed": float(sum(row.collapsed for row in report.rows))}
        if "_g" in arm:
            size = int(arm.rpartition("_g")[2])
            figures["other_size"] = sum(row.group != size for row in report.rows) / len(report.rows)
        if planted and name == "finequant":
            figures |= _changes({row.name: row.group for row in report.rows}, quick)
    return [figures | scores for scores in _scores(model, quick)]


def _alpha_for(average: float, options: dict[str, Any], quick: bool) -> float:
    """The smallest alpha, to 0.01, whose groups cost at most ``average`` bits a weight."""
    from gossamer.pipeline.single import system

    low, high = 1.0, 4.0  # at 4 every matrix keeps one scale a channel
    while high - low > 0.01:
        middle = (low + high) / 2
        report = system(**options, name="finequant", alpha=middle).compress(copy.deepcopy(_base(quick)[0])).report
        low, high = (low, middle) if report.values["bits_per_weight"] <= average else (middle, high)
    return high


def _changes(groups: dict[str, int], quick: bool) -> dict[str, float]:
    """How many of the planted matrices have smaller groups than without outliers, and how many others changed."""
    from gossamer.pipeline.single import system

    rows = system("finequant").compress(copy.deepcopy(_base(quick)[0])).report.rows
    before = {row.name: row.group for row in rows}
    chosen = {f"model.layers.{layer}.mlp.down_proj" for layer in _layers(_base(quick)[0])}
    refined = sum(groups[name] < before[name] for name in chosen)
    others = sum(groups[name] != before[name] for name in groups if name not in chosen)
    return {"refined": refined / len(chosen), "others_changed": float(others)}


def _layers(model: Any) -> range:
    return range(0, len(model.model.layers), _EVERY)


def _planted(quick: bool) -> Any:
    """A copy of the model with one large weight a row in some down projections, computing the same function."""
    import torch

    model = copy.deepcopy(_base(quick)[0])
    with torch.no_grad():
        for layer in _layers(model):
            mlp = model.model.layers[layer].mlp
            # the channel with the largest typical weight, so that each row's outlier is one
            column = int(mlp.down_proj.weight.abs().median(0).values.argmax())
            mlp.down_proj.weight[:, column] *= 32
            mlp.up_proj.weight[column] /= 32
    return model


def _scores(model: Any, quick: bool) -> list[dict[str, float]]:
    """Nats per token, and share of positions whose likeliest token is the float model's, for each seed's texts."""
    figures = []
    for fold, reference in zip(_base(quick)[1], _float_tokens(quick), strict=True):
        scored = [_score(model, ids) for ids in fold]
        tokens = sum(len(best) for _, best in scored)
        same = sum(int((best == theirs).sum()) for (_, best), theirs in zip(scored, reference, strict=True))
        figures.append({"nll": sum(nll for nll, _ in scored) / tokens, "agreement": same / tokens})
    return figures


@functools.cache
def _float_tokens(quick: bool) -> list[list[Any]]:
    model, folds, _ = _base(quick)
    return [[_score(model, ids)[1] for ids in fold] for fold in folds]


def _score(model: Any, ids: Any) -> tuple[float, Any]:
    """Summed negative log-likelihood of ``ids [t]`` after the first, and the likeliest token at each place."""
    import torch

    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")), logits.argmax(-1)


@functools.cache
def _base(quick: bool) -> tuple[Any, list[list[Any]], Any]:
    """The float model with its vocabulary cut to the texts, token ids of the texts of each seed, the tokenizer."""
    import torch

    from gossamer.hub.models import load_model
    from gossamer.parts.vocabulary import trim_vocabulary

    texts = _documents("test", 1200, 2400)
    random.Random(0).shuffle(texts)
    each = 1 if quick else 4
    chosen = texts[: each * len(SEEDS)]
    model, tokenizer = load_model("gemma-3-270m", dtype="bfloat16")
    if quick:
        del model.model.layers[4:]
        model.config.num_hidden_layers, model.config.layer_types = 4, model.config.layer_types[:4]
    trimmed = trim_vocabulary(model, tokenizer, chosen)
    model, tokenizer = trimmed.model.eval(), trimmed.tokenizer
    length = 64 if quick else 512
    ids = [torch.tensor([tokenizer.bos_token_id, *_ids(tokenizer, text)][:length]) for text in chosen]
    return model, [ids[seed * each : (seed + 1) * each] for seed in range(len(SEEDS))], tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _documents(split: str, least: int, most: int, limit: int | None = None) -> list[str]:
    """Neighbouring paragraphs of one source, joined to texts of ``least`` to ``most`` characters."""
    from gossamer.hub.corpora import load_corpus

    joined: dict[str, list[str]] = {}
    for row in load_corpus("english_prose", split=split, limit=limit).rows:
        joined.setdefault(row["source"], []).append(row["text"])
    texts = ["\n".join(parts) for parts in joined.values()]
    return [text[:most] for text in texts if len(text) >= least]


@functools.cache
def _bytes_arm(family: str, quick: bool) -> list[dict[str, float]]:
    """Train on bytes, round the FFN to 4 and 3 bits, and score on the texts of every seed, in nats per byte."""
    import torch

    from gossamer.pipeline.single import system

    skip = ("self_attn", "lm_head", "embed")
    folds = [[torch.tensor(list(text.encode())) for text in fold] for fold in _byte_texts(quick)]
    models = {"float": _trained(family, quick)}
    for bits in (4, 3):
        rounding = system("rounding", bits=bits, skip=skip)
        models[f"int{bits}"] = rounding.compress(copy.deepcopy(models["float"])).model
    figures: list[dict[str, float]] = []
    for fold in folds:
        count = sum(len(ids) - 1 for ids in fold)
        figures.append({key: sum(_score(m, ids)[0] for ids in fold) / count for key, m in models.items()})
    return figures


def _byte_texts(quick: bool) -> list[list[str]]:
    texts = [text.encode("ascii", "ignore").decode()[:256] for text in _documents("test", 300, 300)]
    random.Random(1).shuffle(texts)
    each = 4 if quick else 40
    return [texts[seed * each : (seed + 1) * each] for seed in range(len(SEEDS))]


def _trained(family: str, quick: bool) -> Any:
    """A byte model of 4 layers and width 128, trained for about a minute."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shared: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=512, **shared))
        else:
            experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
            model = MixtralForCausalLM(MixtralConfig(intermediate_size=256, **experts, **shared))
        data = "\n".join(_documents("train", 300, 2000, limit=20000)).encode("ascii", "ignore")
        stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        steps = 5 if quick else 400
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            starts = torch.randint(len(stream) - 257, (16,))
            ids = torch.stack([stream[start : start + 256] for start in starts.tolist()]).long()
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.cache
def _speed(quick: bool) -> dict[str, float]:
    """Tokens per second of greedy decoding at batch 1, contenders in turns."""
    import torch

    from gossamer.parts.measure import decode_speed
    from gossamer.pipeline.single import system

    model, _, tokenizer = _base(quick)
    arms = {"bfloat16": model, "float32": copy.deepcopy(model).to(torch.float32)}
    for arm in ("int8_channel", "int4_g64", "finequant", "finequant_5.5"):
        options = dict(ARMS[arm])
        arms[arm] = system(options.pop("system"), **options).compress(copy.deepcopy(model)).model
    prompt = "The function returns a list of the names that"
    tokens, rounds = (4, 1) if quick else (32, 5)
    reports = decode_speed({name: (m, tokenizer) for name, m in arms.items()}, prompt, tokens, rounds)
    return {name: report.tokens_per_s for name, report in reports.items()}
