"""LaVIN on Gemma-3-270M and DINOv2-S: mixed questions with and without pictures, text ability before and after.

Both models are frozen and in bfloat16; the vocabulary is cut to the texts at hand. A picture (112 px, a scene of one
to three things) is the class token after blocks 2, 4, ... 12, computed once. Rows: three fifths with a picture (the
picture answers, the text answers, or both are needed), two fifths without (sums in words, copying, reversing, who has
what). An answer counts where every token of it and its end is the likeliest after the ones before, as in greedy
decoding.

Arms, same rows, steps and batches: ``projector_only``; ``single`` (one adapter for all, its bottleneck widened to the
size of two experts); ``mma`` (LaVIN, its tower without adapters so that features stay as computed); ``mma_unmasked``
(the modality token stands in the sequence and all may attend to it); ``lora`` on queries and values, of equal size,
with the same projector; ``untouched`` for the text ability: loss on held-out English prose and well-known
continuations, none of which training shows. The learning rate comes from one grid for all, by the validation loss of
short runs with the first seed: for each kind of arm once, and for the adapters with ``single``, the baseline.

Must be seen: MMA at least as right as the single adapter on the mixed set (intervals: paired bootstrap over test
rows), with prose loss and continuations not falling, where the single one loses some; router weights that differ by
modality in some layers; under 1 % of the numbers trained; merged = adapter to 1e-4.

Smaller than the paper: 0.27B parameters, 80 steps of 16 rows, two seeds for ``single`` and ``mma`` and one for the
rest; drawn scenes in place of ScienceQA. What falls is measured on tasks that a base model of this size can do.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapters.lavin import SEEN, TEXT, LaVIN
from gossamer.adapters.lavin.modules import Modules, SelfRouted, before, text_blocks
from gossamer.experiments.adapters import _lavin_data as data
from gossamer.experiments.adapters import _lavin_scores as scores
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
ARMS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "projector_only": {"kind": "projector"},
    "single": {"kind": "adapter", "router": False, "dim": 12},
    "mma": {"kind": "adapter"},
    "mma_unmasked": {"kind": "adapter"},
    "lora": {"kind": "lora", "rank": 5},
}
MAIN = ("single", "mma")
RATES = (5e-4, 2e-3, 8e-3)
TUNED = {"projector": "projector_only", "adapter": "single", "lora": "lora"}
FULL: dict[str, int] = {
    "train": 1280, "validation": 60, "test": 240, "steps": 80, "short": 20, "prose": 30, "layers": 18
}  # fmt: skip
QUICK: dict[str, int] = {"train": 40, "validation": 20, "test": 40, "steps": 3, "short": 2, "prose": 4, "layers": 4}
BATCH = 16
MARGIN = 0.05  # nats a token that the loss on prose may rise, and the share of rows that counts as a tie


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """One arm trained and judged; arms with one seed give the first seed's figures again."""
    if arm not in MAIN and seed != SEEDS[0]:
        return dict(lab.once(f"figures-{arm}", lambda: run(arm, SEEDS[0], lab)))
    if arm == "untouched":
        model, tokenizer = _language_model(lab.quick)
        return _judged(model, LaVIN().processor(tokenizer), lab, plain=True)
    kind = ARMS[arm]["kind"]
    short = _sizes(lab.quick)["short"]

    def choose() -> float:
        losses = {rate: _trained(TUNED[kind], SEEDS[0], rate, short, lab)[3] for rate in RATES}
        lab.log(f"{kind}: validation losses {losses}")
        return min(losses, key=losses.__getitem__)

    rate = lab.once(f"rate-{kind}", choose)
    model, processor, system, loss, seconds = _trained(arm, seed, rate, _sizes(lab.quick)["steps"], lab)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    figures = _judged(model, processor, lab) | {
        "rate": rate, "validation_loss": loss, "training_seconds": seconds, "trained": float(trained),
        "trained_share": trained / whole,
    }  # fmt: skip
    if arm == "mma":
        fresh = _system(arm, seed)
        start = fresh.routes(fresh.attach(_language_model(lab.quick)[0]))
        for when, found in (("routes", system.routes(model)), ("start", start)):
            figures[f"{when}_text"] = found[:, TEXT, 0].tolist()
            figures[f"{when}_image"] = found[:, SEEN, 0].tolist()
        if seed == SEEDS[0]:
            figures["merge_error"] = _merge_error(model, lab)
    return figures


def conclude(results: Results) -> Conclusion:
    """MMA against the single adapter over test rows and seeds; the other lines of the plan beside it."""
    from gossamer.parts.metrics import paired_bootstrap

    def items(arm: str, name: str) -> list[float]:
        """Figures by item, averaged over seeds."""
        return [sum(values) / len(values) for values in zip(*results.values(arm, name), strict=True)]

    def compared(arm: str, other: str, name: str = "right") -> tuple[float, float, float]:
        found = paired_bootstrap(items(arm, name), items(other, name))
        return found.difference, found.low, found.high

    def told(arm: str, other: str, name: str = "right") -> str:
        value, low, high = compared(arm, other, name)
        return f"{arm} - {other} {value:+.3f} [{low:+.3f}, {high:+.3f}]"

    effect, low, high = compared("mma", "single")
    prose = {arm: compared(arm, "untouched", "prose") for arm in MAIN}
    cloze = {arm: compared(arm, "untouched", "cloze") for arm in MAIN}
    lost = compared("single", "mma", "prose")
    kept = prose["mma"][0] <= MARGIN and cloze["mma"][2] >= 0
    learned = compared("mma", "projector_only")[1] > 0
    first = results["mma"][SEEDS[0]]
    apart = [abs(a - b) for a, b in zip(first["routes_text"], first["routes_image"], strict=True)]
    lines = (
        MustSee(
            "MMA is at least as right as the single adapter on the mixed set",
            f"{results.mean('mma', 'accuracy'):.3f} against {results.mean('single', 'accuracy'):.3f}, "
            f"{told('mma', 'single')}",
            effect >= 0 and low > -MARGIN,
        ),
        MustSee(
            f"MMA keeps the text ability: prose loss up by {MARGIN} nats at most, continuations not fewer",
            f"{told('mma', 'untouched', 'prose')} nats a token; {told('mma', 'untouched', 'cloze')}",
            kept,
        ),
        MustSee(
            "the single adapter loses some of it",
            f"{told('single', 'mma', 'prose')} nats a token; {told('single', 'untouched', 'cloze')}",
            lost[1] > 0 or cloze["single"][2] < 0,
        ),
        MustSee(
            "router weights differ by modality (by 0.01 and more) in some layers",
            f"{sum(gap >= 0.01 for gap in apart)} of {len(apart)} layers, {max(apart):.3f} at most",
            max(apart) >= 0.01,
        ),
        MustSee(
            "under 1 % of the numbers are trained",
            f"{results.mean('mma', 'trained'):.0f}, {results.mean('mma', 'trained_share'):.2%} with the cut vocabulary",
            results.mean("mma", "trained_share") < 0.01,
        ),
        MustSee(
            "merged = adapter to 1e-4 of the largest logit, for text and for images",
            f"{first['merge_error']:.1e}",
            first["merge_error"] < 1e-4,
        ),
        *_beside(compared, told),
    )
    return Conclusion(
        shown=lines[0].shown and kept and learned,  # two that learn nothing would tie
        baseline=f"one shared adapter of equal size: {results.mean('single', 'accuracy'):.3f} right",
        result=f"two experts and a router: {results.mean('mma', 'accuracy'):.3f} right",
        effect=effect,
        low=low,
        high=high,
        unit="share of mixed test rows answered exactly",
        must_see=lines,
        notes=(*_tables(results), f"prose against the untouched model: single {prose['single'][0]:+.3f} nats a token"),
    )


def _beside(compared: Callable[..., tuple[float, float, float]], told: Callable[..., str]) -> list[MustSee]:
    """The other arms of the plan."""
    harmless, better, even = (compared("mma", arm) for arm in ("mma_unmasked", "projector_only", "lora"))
    return [
        MustSee("the mask on the modality token does no harm", told("mma", "mma_unmasked"), harmless[2] >= 0),
        MustSee("MMA is better than the projector alone", told("mma", "projector_only"), better[1] > 0),
        MustSee("MMA is not behind LoRA of equal size", told("mma", "lora"), even[2] >= 0),
    ]


def _tables(results: Results) -> tuple[str, ...]:
    """Accuracy by group, sizes and rates, and the router's weights by layer and modality."""
    tuned = [arm for arm in ARMS if arm != "untouched"]
    groups = [
        f"{group}: " + ", ".join(f"{arm} {results.mean(arm, f'right_{group}'):.3f}" for arm in tuned)
        for group in data.GROUPS
    ]
    sizes = ", ".join(f"{arm} {results.mean(arm, 'trained'):.0f}" for arm in tuned)
    rates = ", ".join(f"{arm} {results.mean(arm, 'rate'):g}" for arm in tuned)
    first = results["mma"][SEEDS[0]]
    tables = []
    for when in ("routes", "start"):
        pairs = zip(first[f"{when}_text"], first[f"{when}_image"], strict=True)
        tables.append("; ".join(f"{layer}: {text:.3f} {image:.3f}" for layer, (text, image) in enumerate(pairs)))
    prose = ", ".join(f"{arm} {math.exp(results.mean(arm, 'prose_loss')):.2f}" for arm in ARMS)
    untouched = f"untouched, groups without a picture: {results.mean('untouched', 'right_text'):.3f}"
    return (
        *groups, untouched, f"perplexity of prose: {prose}", f"trained numbers: {sizes}", f"rates of {RATES}: {rates}",
        f"w_0 by layer, for text and for images: {tables[0]}", f"the same before training: {tables[1]}",
    )  # fmt: skip


class Prefix(LaVIN):
    """The projector alone: visual tokens for a model without adapters in its blocks."""

    def modules(self, model: nn.Module) -> Modules:
        made = super().modules(model)
        made.attn = nn.ModuleList()
        return made

    def _text_hooks(self, model: nn.Module, modules: Any) -> list[Any]:
        return []


class Unmasked(LaVIN):
    """The modality token at the front of the sequence and open to all; each block's router reads it there."""

    def _text_hooks(self, model: nn.Module, modules: Any) -> list[Any]:
        pairs = zip(text_blocks(model), modules.attn, strict=True)
        return [before(block.self_attn, SelfRouted(adapter)) for block, adapter in pairs]

    def _begin(self, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        embeds = self._embedded(model, kwargs)
        modality = kwargs.get("modality", torch.zeros(len(embeds), dtype=torch.long))
        token = getattr(model, self.slot).modality(modality)[:, None].to(embeds.dtype)
        given = {"inputs_embeds": torch.cat([token, embeds], 1)}
        for name, fill in (("attention_mask", 1), ("labels", -100)):
            if name in kwargs:
                given[name] = nn.functional.pad(kwargs[name], (1, 0), value=fill)
        return (), given

    def _end(self, model: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits[:, 1:]
        return output


def _trained(arm: str, seed: int, rate: float, steps: int, lab: Lab) -> tuple[Any, Any, Any, float, float]:
    """Model, processor and system after training, with the loss on validation rows and the seconds of training."""
    from gossamer.objectives.own_loss import OwnLoss
    from gossamer.optimizers.adamw import AdamW
    from gossamer.parts.fingerprint import fingerprint
    from gossamer.parts.training import TrainSettings, train

    model, tokenizer = _language_model(lab.quick)
    system = _system(arm, seed)
    model = system.attach(model)
    if arm == "lora":
        _add_lora(model, ARMS[arm]["rank"], seed)
    processor = system.processor(tokenizer)
    settings = TrainSettings(steps=steps, batch_size=BATCH, warmup=0.1, seed=seed, save_every=50)
    name = f"{arm}-{seed}-{rate:g}-{steps}-{fingerprint(model)}"
    done = train(
        model, processor, _rows("train", lab.quick), objective=OwnLoss(),
        optimizer=AdamW(lr=rate, beta2=0.95, weight_decay=0.02), settings=settings,
        folder=lab.folder("training", name),
    )  # fmt: skip
    loss = (
        sum(scores.answered(model.eval(), processor, _rows("validation", lab.quick))[1])
        / _sizes(lab.quick)["validation"]
    )
    lab.log(f"{name}: {done.curve[0][1]:.2f} to {done.curve[-1][1]:.2f} in {done.seconds:.0f} s, validation {loss:.3f}")
    return model, processor, system, loss, done.seconds


def _system(arm: str, seed: int) -> LaVIN:
    options = {key: value for key, value in ARMS[arm].items() if key in ("router", "dim")}
    maker: type[LaVIN] = {"mma_unmasked": Unmasked, "projector_only": Prefix, "lora": Prefix}.get(arm, LaVIN)
    if maker is Prefix:
        options["router"] = False
    return maker(
        vision="eyes", visual_every=2, visual_adapter="none", companions={"eyes": _eyes()}, seed=seed, **options
    )


def _add_lora(model: Any, rank: int, seed: int) -> None:
    """LoRA on queries and values in place, in float32, beside the projector."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), model
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(LaVIN.slot))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _judged(model: Any, processor: Any, lab: Lab, *, plain: bool = False) -> dict[str, Any]:
    """Right or not for each test row, and the text ability; ``plain`` models see no pictures."""
    rows = _rows("test", lab.quick)
    if plain:
        rows = [{**row, "features": None} for row in rows]
    right, _ = scores.answered(model, processor, rows)
    figures: dict[str, Any] = {"right": right, "accuracy": sum(right) / len(right)}
    for group in data.GROUPS:
        chosen = [mark for mark, row in zip(right, rows, strict=True) if row["group"] == group]
        figures[f"right_{group}"] = sum(chosen) / len(chosen)
    paragraphs = [("", text) for text in data.prose(_sizes(lab.quick)["prose"])]
    figures["prose"] = scores.continued(model, processor, paragraphs)[1]
    figures["cloze"] = scores.continued(model, processor, data.CLOZE)[0]
    figures["prose_loss"] = sum(figures["prose"]) / len(figures["prose"])
    figures["cloze_accuracy"] = sum(figures["cloze"]) / len(figures["cloze"])
    return figures


@torch.no_grad()
def _merge_error(model: Any, lab: Lab) -> float:
    """Largest difference of logits, of the largest one, between merged and adapter in float32, over both modalities."""
    learned = getattr(model, LaVIN.slot).state_dict()
    worst = 0.0
    for modality in ("text", "image"):
        base, tokenizer = _language_model(lab.quick)
        other = _system("mma", SEEDS[0])
        attached = other.attach(base.float())
        getattr(attached, LaVIN.slot).load_state_dict(learned)
        ids = tokenizer([text for text, _ in data.CLOZE[:4]], return_tensors="pt", padding=True)["input_ids"]
        kind = torch.full((len(ids),), SEEN if modality == "image" else TEXT)
        expected = attached.eval()(input_ids=ids, modality=kind).logits
        merged = other.merge(attached, modality)(input_ids=ids).logits
        worst = max(worst, float((merged - expected).abs().max() / expected.abs().max()))
    return worst


def _sizes(quick: bool) -> dict[str, int]:
    return QUICK if quick else FULL


@functools.cache
def _rows(split: str, quick: bool) -> list[data.Row]:
    from gossamer.core.paths import cache_dir

    return data.rows(split, _sizes(quick)[split], cache_dir("experiments", "lavin", "features"), _class_tokens)


@functools.cache
def _eyes() -> Any:
    from gossamer.hub.models import load_model

    return load_model("dinov2-small", dtype="bfloat16", task="image-encoder")[0].requires_grad_(False)


def _class_tokens(images: Sequence[Any]) -> Tensor:
    """[images, 6, 384], as the attached model would compute them."""
    system = _system("mma", 0)
    processor = system.processor(None, data.SIZE)
    found = []
    for start in range(0, len(images), 32):
        pixels = torch.stack([processor.pixels(image) for image in images[start : start + 32]])
        found.append(system.visual_features(pixels).float())
    return torch.cat(found)


def _language_model(quick: bool) -> tuple[Any, Any]:
    """A fresh Gemma-3-270M in bfloat16 with the vocabulary of all texts here; its first layers on a quick pass."""
    from gossamer.hub.models import load_model

    model, tokenizer = load_model(_trimmed(quick), dtype="bfloat16", task="causal-lm")
    return model, tokenizer


@functools.cache
def _trimmed(quick: bool) -> Any:
    """Folder of the cut model."""
    from gossamer.core.paths import atomic_dir, cache_dir
    from gossamer.hub.models import load_model
    from gossamer.parts.vocabulary import trim_vocabulary

    texts = sorted(_texts(quick))
    layers = _sizes(quick)["layers"]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    folder = cache_dir("experiments", "lavin", "models") / f"{layers}-{key}"
    if not folder.exists():
        model, tokenizer = load_model("gemma-3-270m", dtype="bfloat16")
        inner: Any = model.get_decoder()
        inner.layers = inner.layers[:layers]
        model.config.num_hidden_layers, model.config.layer_types = layers, model.config.layer_types[:layers]
        cut = trim_vocabulary(model, tokenizer, texts)
        with atomic_dir(folder) as path:
            cut.model.save_pretrained(str(path))
            cut.tokenizer.save_pretrained(str(path))
    return folder


def _texts(quick: bool) -> set[str]:
    """Every text as it will be tokenised."""
    texts = {"Image: ", "Image: N/A", *data.prose(_sizes(quick)["prose"])}
    texts |= {text for pair in data.CLOZE for text in pair}
    for split in ("train", "validation", "test"):
        for row in _rows(split, quick):
            texts |= {f"\n{row['instruction']}\n", row["answer"]}
    return texts
