"""Recipes on images: an adapter that sees, an accelerated model; both go on from their stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gossamer.core.bundle import Bundle
from gossamer.pipeline.engine import run
from gossamer.pipeline.stage import load_bundle, save_bundle
from gossamer.pipeline.system_steps import take_system
from gossamer.testing.bench import Bench


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A tiny vision transformer as a folder."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    Bench("vit").model(layers=4).save_pretrained(tmp_path / "tower")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def test_an_adapter_that_sees_trains_in_a_recipe_and_loads_again(tower: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(24):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "instruction": f"say {number}", "answer": "red"})
        rows.append({"image": None, "instruction": f"count to {number}", "answer": "one"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": "llama-7m",
        "models": {"eyes": str(tower)},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "steps": [
            {"lavin": {"vision": "eyes", "visual_every": 2, "visual_adapter": "none"}},
            {"train": {"objective": "own_loss", "steps": 2, "batch_size": 4}},
        ],
    }
    report = run(recipe, out=tmp_path / "run")
    assert [step.name for step in report.steps] == ["lavin", "train"]
    eyes: Any = Bench("vit").model(layers=4)
    bundle = load_bundle(tmp_path / "run" / "result", lambda: {"eyes": eyes})
    batch = bundle.processor.collate(bundle.processor.examples([row | _absolute(row, tmp_path) for row in rows[:2]]))
    assert torch.isfinite(bundle.model(**batch).loss)
    assert bundle.model.gossamer_adapter.attn[0].up[0].weight.any()


def _absolute(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"image": str(folder / row["image"])} if row["image"] else {}


def test_an_accelerated_model_is_accelerated_again_when_its_stage_is_read(tmp_path: Path) -> None:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from gossamer.core import registry
    from gossamer.core.recipe import StepCall

    bench = Bench("llava")
    tokenizer = bench.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    bundle = Bundle(bench.model(layers=4), LlavaProcessor(images, tokenizer, patch_size=8))
    inputs = bench.inputs()
    call = StepCall("pyramiddrop", {}, registry.find("pyramiddrop"))
    plain = bundle.model(**inputs).logits
    bundle, _ = take_system(call, bundle, job=None, seed=0)  # type: ignore[arg-type]
    before = bundle.model(**inputs).logits
    assert not torch.allclose(before, plain)
    save_bundle(bundle, tmp_path / "stage", base="")
    again = load_bundle(tmp_path / "stage")
    assert torch.allclose(again.model(**inputs).logits, before, atol=1e-6)
    assert again.parts["pyramiddrop"].report()["tokens"]
