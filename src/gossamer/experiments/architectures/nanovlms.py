"""NanoVLMs from scratch on described scenes, graded exactly; against the same model blind, and tiny GIT and BLIP.

Plan. Scenes of one to four things on a 3 x 3 board, drawn at 64 pixels, described by a grammar with a child's
vocabulary in short (20-25 words) and long (60-70 words) form. Every model learns from scratch for the same number of
steps and rows and then describes held-out scenes, given the first three words. The splits share no scene.

Grades, in place of GPT-4o's, from the parsed text: precision (stated facts that are true), recall (facts of the things
in the picture that are stated), both by kind of fact; grammar (sentences that the grammar accepts) and bits per byte
under the nursery language model, which never saw this world; novelty (descriptions that no training text equals) among
those without a false fact, and distinct pairs of words. The judge of the paper's rubric is run once with a local
language model to show that the path works; nothing is claimed from its marks.

Arms. ``mini`` (class token), ``mini_all`` (all patches), ``blind`` (the same model on grey pictures), ``git`` and
``blip`` (transformers' classes at about its size), all on short texts; ``mini_long``, ``base_long`` and ``large_long``
for the size curve. The control with shuffled pictures reads ``mini`` with the picture of another scene.

Must be seen: facts right well above 0.8 with the picture for colour, kind and count and near the prior without it;
mini < base < large on long texts; the blind model fluent and wrong; all patches at least as good as the class token for
places.

All encoders start with larger patches and positions than transformers gives them; a first run without that left the
class token blind after 1,200 steps of AdamW (precision 0.116, with another picture 0.112), and with it the class token
had just begun to see (0.209 and 0.101). Muon for the matrices, in all arms, stands for a longer run: with all patches,
after 200 steps, its held-out loss is 1.21 (with another picture 1.41), AdamW's 1.29 (1.35).

Smaller than the paper: 64 pixels in patches of 8 or 16, a vocabulary of about a thousand tokens (so the presets are
smaller than their names say), minutes of training on two cores, one seed; intervals are over scenes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results
from gossamer.parts.muon import muon

SEEDS = (0,)
ARMS: dict[str, dict[str, Any]] = {
    "mini": {"preset": "mini", "length": "short"},
    "mini_all": {"preset": "mini", "length": "short", "visual_tokens": "all"},
    "blind": {"preset": "mini", "length": "short", "blind": True},
    "git": {"model": "git", "length": "short"},
    "blip": {"model": "blip", "length": "short"},
    "mini_long": {"preset": "mini", "length": "long", "patch_size": 16},
    "base_long": {"preset": "base", "length": "long", "patch_size": 16},
    "large_long": {"preset": "large", "length": "long", "patch_size": 16},
}
SIZE, BATCH, RATE, VOCABULARY, GIVEN = 64, 32, 2e-3, 1200, 3
STEPS = {"short": 1600, "long": 500}
TRAIN, TEST = 8000, 240
QUICK: dict[str, Any] = {"steps": {"short": 6, "long": 3}, "train": 64, "test": 8}
ASPECTS = ("kind", "colour", "count", "place")
NEW_TOKENS = {"short": 60, "long": 140}


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    options = ARMS[arm]
    world = _world(options["length"], seed, lab.quick)
    model, processor, seconds = _trained(options, seed, lab, world)
    figures = {"parameters": float(sum(p.numel() for p in model.parameters())), "training_seconds": seconds}
    figures |= _graded(model, processor, world, options)
    if arm == "mini":
        shuffled = _graded(model, processor, world, options, shift=1)
        figures |= {f"shuffled_{name}": value for name, value in shuffled.items() if name in ("precision", "recall")}
        figures["judge_valid"] = _judged(world, _described(model, processor, world, options)[:6], lab.quick)
    return figures


def conclude(results: Results) -> Conclusion:
    at = lambda arm, name: results[arm][0][name]  # noqa: E731
    facts = [at("mini_all", f"right_{aspect}") for aspect in ("kind", "colour", "count")]
    blind = [at("blind", f"right_{aspect}") for aspect in ("kind", "colour", "count")]
    curve = [at(f"{size}_long", "precision") for size in ("mini", "base", "large")]
    low, high = at("mini_all", "precision_low"), at("mini_all", "precision_high")
    places = at("mini_all", "right_place"), at("mini", "right_place")
    fluent = at("blind", "grammar"), at("mini", "grammar")
    must = (
        MustSee(
            "stated kind, colour and count are right above 0.8 with the picture, near the prior without it",
            f"with all patches {_row(facts)}, class token {_row([at('mini', f'right_{a}') for a in ASPECTS[:3]])}, "
            f"blind {_row(blind)}",
            min(facts) > 0.8 and max(blind) < min(facts) - 0.2,
        ),
        MustSee(
            "a shuffled picture takes the grounding away",
            f"precision {at('mini', 'precision'):.3f}, with another picture {at('mini', 'shuffled_precision'):.3f}",
            at("mini", "shuffled_precision") < at("mini", "precision") - 0.1,
        ),
        MustSee("long texts: mini < base < large", f"precision {_row(curve)}", curve[0] < curve[1] < curve[2]),
        MustSee(
            "the model without eyes is fluent and wrong",
            f"grammar {fluent[0]:.3f} (with the picture {fluent[1]:.3f}), precision {at('blind', 'precision'):.3f}",
            fluent[0] > 0.9 * fluent[1] and at("blind", "precision") < at("mini", "precision"),
        ),
        MustSee(
            "for places all patches are at least as good as the class token",
            f"{places[0]:.3f} against {places[1]:.3f}",
            places[0] >= places[1],
        ),
        MustSee(
            "at equal size and steps at least as true as tiny GIT and BLIP",
            f"precision {at('mini_all', 'precision'):.3f}, GIT {at('git', 'precision'):.3f}, "
            f"BLIP {at('blip', 'precision'):.3f}",
            at("mini_all", "precision") >= max(at("git", "precision"), at("blip", "precision")),
        ),
    )
    gap = at("mini_all", "precision") - at("blind", "precision")
    half = max(high - at("mini_all", "precision"), at("mini_all", "precision") - low)
    blind_half = (at("blind", "precision_high") - at("blind", "precision_low")) / 2
    reach = (half**2 + blind_half**2) ** 0.5
    return Conclusion(
        shown=must[0].shown and must[1].shown and gap - reach > 0,
        baseline="the same decoder on grey pictures",
        result="nanovlms mini, all patches",
        effect=gap,
        low=gap - reach,
        high=gap + reach,
        unit="share of stated facts that are true",
        must_see=must,
        notes=(
            f"a local judge (Gemma-3-270M) gave valid marks for {at('mini', 'judge_valid'):.0%} of 6 texts",
            "parameters: " + ", ".join(f"{arm} {at(arm, 'parameters') / 1e6:.1f}M" for arm in results.table),
        ),
    )


@functools.cache
def _world(length: str, seed: int, quick: bool) -> dict[str, Any]:
    """Pictures, scenes and texts of the training and the test split."""
    from gossamer.hub.worlds.stills import still_scenes

    rng = random.Random(f"nanovlms {length} {seed}")
    made: dict[str, Any] = {"length": length}
    for split, count in (("train", QUICK["train"] if quick else TRAIN), ("test", QUICK["test"] if quick else TEST)):
        stills = still_scenes(split, count, seed=seed)
        made[split] = [
            {"image": still.image(SIZE), "text": still.describe(length, rng), "scene": still.scene} for still in stills
        ]
    return made


def _trained(options: dict[str, Any], seed: int, lab: Lab, world: dict[str, Any]) -> tuple[Any, Any, float]:
    """A model after its steps, its processor, and the seconds that training took."""
    from gossamer.architectures.nanovlms import NanoVLMs
    from gossamer.architectures.nanovlms.processing import train_tokenizer
    from gossamer.objectives.own_loss import OwnLoss
    from gossamer.parts.fingerprint import fingerprint
    from gossamer.parts.training import TrainSettings, train

    length, patch = options["length"], options.get("patch_size", 8)
    tokenizer = train_tokenizer((row["text"] for row in world["train"]), VOCABULARY)
    system = NanoVLMs(
        preset=options.get("preset", "mini"), image_size=SIZE, patch_size=patch, vocabulary=len(tokenizer),
        visual_tokens=options.get("visual_tokens", "cls"), max_length=160, dropout=0.1, seed=seed,
    )  # fmt: skip
    processor, model = system.processor(tokenizer), system.build()
    if "model" in options:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _rival(options["model"], len(tokenizer), patch)
    rows = [{"image": _seen(row["image"], options), "text": row["text"]} for row in world["train"]]
    settings = TrainSettings(
        steps=(QUICK["steps"] if lab.quick else STEPS)[length], batch_size=BATCH, warmup=0.05, seed=seed, save_every=100
    )
    name = "-".join(str(value) for value in options.values())
    texts = hashlib.sha256("".join(row["text"] for row in rows).encode()).hexdigest()[:8]
    done = train(
        model, processor, rows, objective=OwnLoss(), optimizer=_Muon(model), settings=settings,
        folder=lab.folder("training", f"{name}-{seed}-{fingerprint(model)}-{texts}"),
    )  # fmt: skip
    lab.log(f"{name}: loss {done.curve[0][1]:.2f} to {done.curve[-1][1]:.2f} in {done.seconds:.0f} s")
    return model.eval(), processor, done.seconds


class _Muon:
    """What the trainer wants of an optimizer, for all of ``model``."""

    name = f"muon at {RATE}"

    def __init__(self, model: Any) -> None:
        self.model = model

    def build(self, params: Any) -> torch.optim.Optimizer:
        return muon(self.model, RATE, weight_decay=0.05)

    def callbacks(self, model: nn.Module, objective: Any) -> list[Any]:
        return []


def _rival(name: str, vocabulary: int, patch: int) -> Any:
    from gossamer.experiments.architectures._nanovlm_rivals import Rival

    return Rival(name, vocabulary, SIZE, patch)


def _seen(image: Any, options: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.new("RGB", image.size, (128, 128, 128)) if options.get("blind") else image


@torch.no_grad()
def _described(model: Any, processor: Any, world: dict[str, Any], options: dict[str, Any], shift: int = 0) -> list[str]:
    """What the model says of each test picture (of the ``shift``-th next one), its three given words included."""
    rows = world["test"]
    images = [_seen(rows[(place + shift) % len(rows)]["image"], options) for place in range(len(rows))]
    starts = [" ".join(row["text"].split()[:GIVEN]) for row in rows]
    lengths = [len(processor.tokenizer(start)["input_ids"]) for start in starts]
    texts = [""] * len(rows)
    for _, group in itertools.groupby(sorted(range(len(rows)), key=lengths.__getitem__), key=lengths.__getitem__):
        places = list(group)
        for at in range(0, len(places), BATCH):
            chosen = places[at : at + BATCH]
            inputs = processor([images[place] for place in chosen], [starts[place] for place in chosen])
            found = model.generate(**inputs, max_new_tokens=NEW_TOKENS[world["length"]], do_sample=False)
            for place, text in zip(
                chosen, processor.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True
            ):
                texts[place] = text.strip()
    return texts


def _graded(
    model: Any, processor: Any, world: dict[str, Any], options: dict[str, Any], shift: int = 0
) -> dict[str, float]:
    """All exact grades of one model."""
    from gossamer.hub.worlds.language import check_facts, parse

    texts = _described(model, processor, world, options, shift)
    read = [parse(text) for text in texts]
    checked = [check_facts(parsed, row["scene"]) for parsed, row in zip(read, world["test"], strict=True)]
    known = {row["text"] for row in world["train"]}
    true = [place for place, found in enumerate(checked) if not found.false]
    shares = [len(found.true) / max(1, len(found.true) + len(found.false)) for found in checked]
    low, high = _interval(shares)
    figures = {
        "precision": statistics.fmean(shares), "precision_low": low, "precision_high": high,
        "recall": statistics.fmean(found.recalled for found in checked),
        "grammar": _share([good for parsed in read for good in parsed.accepted]),
        "faultless": len(true) / len(texts),
        "novel_and_true": _share([texts[place] not in known for place in true]),
        "distinct_pairs": _distinct(texts),
        "bits_per_byte": _bits(texts),
    }  # fmt: skip
    for aspect in ASPECTS:
        right = [fact.aspect == aspect for found in checked for fact in found.true]
        wrong = [fact.aspect == aspect for found in checked for fact in found.false]
        figures[f"right_{aspect}"] = sum(right) / max(1, sum(right) + sum(wrong))
    return figures


def _interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def _share(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))


def _distinct(texts: Sequence[str]) -> float:
    pairs = [pair for text in texts for pair in itertools.pairwise(text.lower().split())]
    return len(set(pairs)) / max(1, len(pairs))


@torch.no_grad()
def _bits(texts: Sequence[str]) -> float:
    """Bits per byte of the texts under the nursery's language model."""
    from gossamer.hub.nursery import load_nursery

    model, tokenizer = load_nursery("llama-7m")
    nats, size = 0.0, 0
    for text in texts:
        ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            logits = model(input_ids=ids[:, :-1]).logits[0]
            nats += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            size += len(text.encode())
    return nats / (0.6931471805599453 * max(1, size))


def _judged(world: dict[str, Any], texts: Sequence[str], quick: bool) -> float:
    """Share of texts for which a small local model, as the judge, gives valid marks."""
    from gossamer.architectures.nanovlms.grading import grade
    from gossamer.core.errors import InputError
    from gossamer.hub.models import load_model
    from gossamer.hub.nursery import load_nursery
    from gossamer.parts.generation import generate_texts

    model, tokenizer = load_nursery("llama-7m") if quick else load_model("gemma-3-270m", dtype="bfloat16")
    valid = 0
    for row, text in zip(world["test"], texts, strict=False):
        start = " ".join(row["text"].split()[:GIVEN])
        try:
            grade(
                row["text"], start, text.removeprefix(start),
                lambda prompt: generate_texts(model, tokenizer, [prompt], max_new_tokens=60)[0], tries=1,
            )  # fmt: skip
        except InputError:
            continue
        valid += 1
    return valid / max(1, len(texts))


def _row(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
