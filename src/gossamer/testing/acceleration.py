"""Laws of acceleration: less is computed and stored, what is generated is what the whole sequence gives, release.

The outcome is what an accelerated model makes of a left-padded batch (rows with an image of 4 tokens, one without): its
logits without and with labels, its loss and gradients in training mode, what it generates, and the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gossamer.core.bundle import Bundle
from gossamer.core.card import Entry
from gossamer.testing.bench import IMAGE_TOKEN, VOCABULARY, Bench
from gossamer.testing.comparison import differs, frozen
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

LAYERS = 8
PATCHES = 4
NEW = 6  # tokens
KEPT = ("batch", "labelled", "rows", "config")
QUICK = {"steps": 6, "batch_size": 4}


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    model = bench.model(layers=LAYERS)
    return {
        "model": model, "config": model.config, "processor": processor(bench), "batch": prompts(),
        "labelled": prompts(labels=True), "rows": rows(),
    }  # fmt: skip


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    model, batch, labelled = subject["model"], subject["batch"], subject["labelled"]
    learned = fitted(system, model, subject)
    model, _ = system.accelerate(model, subject["processor"])
    with torch.no_grad():
        logits, scored = model(**batch).logits, model(**labelled).logits
        report = system.report()
        tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    model.train()
    loss = model(**labelled).loss
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    model.eval()
    system.release(model)
    found = {"logits": logits, "scored": scored, "report": report, "tokens": tokens}
    return found | {"loss": loss.detach(), "gradients": torch.stack(norms), "learned": learned}


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    given = subject(system, bench)
    blind = Bench("llama").model()
    yield "a model that sees no images", lambda: system.accelerate(blind)
    yield "releasing a model that nothing accelerates", lambda: system.release(given["model"])
    yield "a report before any prefill", lambda: type(system)(system.config).report()
    if hasattr(system, "fit"):
        fresh = type(system)(system.config)
        yield "using it before it is fitted", lambda: fresh.accelerate(given["model"], given["processor"])
        bundle = Bundle(given["model"], given["processor"])
        yield "fitting on no rows", lambda: system.fit(bundle, [])
        yield "fitting on rows without an answer", lambda: system.fit(bundle, [{"image": picture(0), "question": "a"}])
    fitted(system, given["model"], given)
    model, _ = system.accelerate(given["model"], given["processor"])
    yield "accelerating twice", lambda: system.accelerate(model, given["processor"])
    lost = {**given["batch"], "input_ids": given["batch"]["input_ids"].clamp(max=VOCABULARY - 1)}
    yield "an image without a token for it", lambda: model(**lost)


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    given = subject(system, bench)
    fitted(system, given["model"], given)
    before = accelerated(system, given["model"], given["batch"])
    if not hasattr(system, "save"):
        return before, accelerated(type(system)(system.config, seed=system.seed), given["model"], given["batch"])
    system.save(folder)
    again = type(system).load(folder, Bundle(given["model"], given["processor"]))
    return before, accelerated(again, given["model"], given["batch"])


@law()
def check_release_is_bit_for_bit(entry: Entry, bench: Bench) -> None:
    """No weight differs while the model is accelerated, and after release nothing does, hooks and outputs included."""
    system, given, model = ready(entry, bench)
    with torch.no_grad():
        logits = model(**given["batch"]).logits
    before, attributes = frozen(model), set(vars(model))
    hooks = _hooks(model)
    system.accelerate(model, given["processor"])
    difference = differs(before, frozen(model))
    assert not difference, f"accelerating changes the model itself: {difference}"
    with torch.no_grad():
        model(**given["batch"])
        model.generate(**given["batch"], max_new_tokens=2)
    system.release(model)
    with torch.no_grad():
        again = model(**given["batch"]).logits
    difference = differs(before, frozen(model)) or differs(logits, again, where="output")
    assert not difference, f"release leaves something behind: {difference}"
    assert set(vars(model)) == attributes, f"release leaves {sorted(set(vars(model)) ^ attributes)}"
    assert _hooks(model) == hooks, "release leaves hooks behind"


@law()
def check_batch_equals_single(entry: Entry, bench: Bench) -> None:
    """A row gives the same logits and the same tokens alone as in a batch, padded on either side."""
    system, given, model = ready(entry, bench)
    system.accelerate(model, given["processor"])
    for side in ("left", "right"):
        batch = prompts(side=side)
        with torch.no_grad():
            together = model(**batch).logits
            for row in range(len(together)):
                alone = model(**single(batch, row)).logits[0]
                difference = differs(alone, together[row, batch["attention_mask"][row].bool()], atol=1e-5)
                assert not difference, f"row {row}, padded on the {side}, differs from itself alone: {difference}"
    together = model.generate(**given["batch"], max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    for row in range(len(together)):
        one = model.generate(**single(given["batch"], row), max_new_tokens=NEW, do_sample=False)[0, -NEW:]
        assert one.equal(together[row]), f"row {row} generates {one.tolist()}, in a batch {together[row].tolist()}"


@law()
def check_cached_equals_uncached(entry: Entry, bench: Bench) -> None:
    """Each logit of generation with a cache is that of one pass over prompt and answer, labels marking the answer."""
    system, given, model = ready(entry, bench)
    system.accelerate(model, given["processor"])
    batch = given["batch"]
    made = model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    width = batch["input_ids"].shape[1]
    labels = made.sequences.clone()
    labels[:, :width] = -100
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    with torch.no_grad():
        whole = model(**{**batch, "input_ids": made.sequences, "attention_mask": mask, "labels": labels}).logits
    difference = differs(torch.stack(made.logits, dim=1), whole[:, width - 1 : -1], atol=1e-5)
    assert not difference, f"cached and uncached differ: {difference}"


@law()
def check_the_report_is_what_is_stored(entry: Entry, bench: Bench) -> None:
    """Reported cache bytes are those of the cache, tokens a layer are the model's own lengths, and neither rises."""
    system, given, model = ready(entry, bench)
    system.accelerate(model, given["processor"])
    with torch.no_grad():
        cache = model(**given["batch"], use_cache=True).past_key_values
    report = system.report()
    stored = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    assert report["cache_bytes"] == stored, f"reports {report['cache_bytes']} bytes, the cache holds {stored}"
    assert report["cache_bytes"] <= report["cache_bytes_plain"], "it stores more than the plain model"
    widths = [layer.keys.shape[-2] for layer in cache.layers]
    longest = [max(row[layer] for row in report["tokens"]) for layer in range(len(widths))]
    assert longest == widths, f"reports at most {longest} tokens by layer, the cache holds {widths}"
    assert widths == sorted(widths, reverse=True), f"tokens come back: {widths}"


def ready(entry: Entry, bench: Bench) -> tuple[Any, dict[str, Any], Any]:
    """The system, fitted where it learns; its inputs; the plain model."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    fitted(system, given["model"], given)
    return system, given, given["model"]


def fitted(system: Any, model: Any, subject: dict[str, Any]) -> Any:
    """Fit a system that learns; what it learned."""
    if not hasattr(system, "fit"):
        return {}
    return dict(system.fit(Bundle(model, subject["processor"]), subject["rows"]).tensors)


@torch.no_grad()
def accelerated(system: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits under the system, which is taken off again."""
    system.accelerate(model)
    found: Tensor = model(**batch).logits
    system.release(model)
    return found


def processor(bench: Bench) -> Any:
    """A LlavaProcessor for the tiny LLaVA: 16 px images, 4 tokens each."""
    tokenizer = bench.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    side = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def rows() -> list[dict[str, Any]]:
    asked = ("what is it", "which colour has the ball", "how many", "name the place")
    said = (" red", " two dogs", " a house on the hill", " no")
    pairs = enumerate(zip(asked, said, strict=True))
    return [{"image": picture(number), "prompt": question, "answer": answer} for number, (question, answer) in pairs]


@functools.cache
def picture(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def prompts(*, labels: bool = False, side: str = "left") -> dict[str, Tensor]:
    """Three rows of different length: an image amid text, an image first, no image; labels at the last 2 or 3."""
    generator = torch.Generator().manual_seed(6)
    made = []
    for before, image, after in ((2, PATCHES, 7), (0, PATCHES, 5), (6, 0, 0)):
        ids = torch.randint(4, VOCABULARY, (before + image + after,), generator=generator)
        ids[before : before + image] = IMAGE_TOKEN
        made.append(ids)
    width = max(map(len, made))
    batch = {key: torch.zeros(len(made), width, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    said = torch.full((len(made), width), -100)
    for row, ids in enumerate(made):
        start = width - len(ids) if side == "left" else 0
        batch["input_ids"][row, start : start + len(ids)] = ids
        batch["attention_mask"][row, start : start + len(ids)] = 1
        answer = slice(start + len(ids) - 2 - row % 2, start + len(ids))
        said[row, answer] = batch["input_ids"][row, answer]
    batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return batch | {"labels": said} if labels else batch


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of :func:`prompts` without padding."""
    real = batch["attention_mask"][row].bool()
    one = {key: value[row : row + 1, real] for key, value in batch.items() if key != "pixel_values"}
    pictures = (batch["input_ids"] == IMAGE_TOKEN).any(1)
    number = int(pictures[:row].sum())
    return one | ({"pixel_values": batch["pixel_values"][number : number + 1]} if pictures[row] else {})


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
