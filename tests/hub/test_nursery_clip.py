from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import gossamer.hub.nursery
from gossamer.core.errors import InputError, OptionError
from gossamer.hub.archives import as_text, picture
from gossamer.hub.corpora import Corpus
from gossamer.hub.encoders import open_dual_encoder
from gossamer.hub.nursery import clip, load_nursery, nursery_models
from gossamer.hub.nursery.clip import ClipSpec, train_clip

FOLDER = Path(gossamer.hub.nursery.__file__).parent
COLOURS = ("red", "green", "blue", "orange", "black", "purple", "pink", "brown")
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def row(colour: str, shape: str, style: str) -> dict[str, Any]:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    draw = pen.rectangle if shape == "square" else pen.ellipse
    draw((2, 2, 13, 13) if style == "google" else (4, 4, 14, 14), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    caption = f"{colour} {shape}"
    return {
        "image": as_text(file.getvalue()), "caption": caption, "captions": [caption, f"{shape} {colour}"],
        "category": "square" if shape == "square" else "disc", "subcategory": colour, "style": style, "key": caption,
    }  # fmt: skip


def corpus(name: str, split: str = "train") -> Corpus:
    shapes = ("square", "disc")
    rows = [row(colour, shape, style) for colour in COLOURS for shape in shapes for style in ("google", "twitter")]
    return Corpus(name, split, rows, "0" * 64, "none", ("x==1",))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipSpec:
    monkeypatch.setattr(clip, "load_corpus", corpus)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, image_size=28, patch_size=14, use_mask_token=False)).save_pretrained(
        tmp_path / "images"
    )
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path / "images")
    words = ["[PAD]", "[UNK]", "square", "disc", *COLOURS]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path / "texts")
    BertModel(BertConfig(**SMALL, intermediate_size=48, vocab_size=16, max_position_embeddings=64)).save_pretrained(
        tmp_path / "texts"
    )
    return ClipSpec(
        images=str(tmp_path / "images"), texts=str(tmp_path / "texts"), size=28, width=16, corpora=("shapes",),
        steps=150, batch=32, rate=1e-2, dropout=0.0,
    )  # fmt: skip


def test_the_pair_learns_and_opens_as_it_was_scored(spec: ClipSpec, tmp_path: Path) -> None:
    report = train_clip("tiny", spec=spec, out=tmp_path / "out")
    assert report["curve"][-1][0] == 150
    assert report["curve"][-1][1] < 0.5 * report["curve"][0][1]
    assert json.loads((tmp_path / "out/training.json").read_text()) == json.loads(json.dumps(report))
    score = report["test_scores"]["google"]["all"]
    assert (score["pictures"], score["captions"], score["chance R@1"]) == (16, 16, 0.0625)
    assert score["text R@1"] > 0.5
    pair = open_dual_encoder(tmp_path / "out")
    assert pair.name == "out"
    assert pair.image_width == pair.text_width == 16
    assert pair.tau == pytest.approx(report["tau"], rel=1e-3)
    rows = [one for one in corpus("shapes").rows if one["style"] == "google"]
    similar = torch.nn.functional.normalize(pair.images([picture(one) for one in rows]), dim=1) @ (
        torch.nn.functional.normalize(pair.texts([one["caption"] for one in rows]), dim=1).T
    )
    hits = (similar.argmax(dim=1) == torch.arange(len(rows))).float().mean().item()
    assert hits == pytest.approx(score["text R@1"], abs=1e-4)


def test_the_same_pairs_give_the_same_head_and_leave_the_random_state(spec: ClipSpec, tmp_path: Path) -> None:
    short = replace(spec, steps=5, dropout=0.3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    train_clip("tiny", spec=short, out=tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    train_clip("tiny", spec=short, out=tmp_path / "b")
    other = replace(short, seed=1)
    train_clip("tiny", spec=other, out=tmp_path / "c")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_head_is_refused_on_other_encoders(spec: ClipSpec, tmp_path: Path) -> None:
    train_clip("tiny", spec=replace(spec, steps=2), out=tmp_path / "out")
    other = BertModel.from_pretrained(spec.texts)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(2)
    other.save_pretrained(spec.texts)
    with pytest.raises(InputError, match="encoders it was trained with"):
        open_dual_encoder(tmp_path / "out")


def test_one_style_alone_is_scored_on_both(spec: ClipSpec, tmp_path: Path) -> None:
    report = train_clip("tiny", spec=replace(spec, steps=20), out=tmp_path / "out")
    assert report["pairs"]["train"] == {"google": 16, "twitter": 16}
    assert set(report["test_scores_after_google_alone"]) == {"google", "twitter"}
    assert report["test_scores_after_google_alone"] != report["test_scores"]
    category = report["test_scores"]["google"]["category"]
    assert (category["classes"], category["chance"], category["largest class"]) == (2, 0.5, 0.5)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(OptionError, match="did you mean 'clip-small'"):
        train_clip("clip-smal")


def test_the_committed_pair_is_small_and_was_scored_well_above_chance() -> None:
    assert "clip-small" in nursery_models()
    assert callable(load_nursery)
    folder = FOLDER / "clip-small"
    report = json.loads((folder / "training.json").read_text())
    description = json.loads((folder / "dual_encoder.json").read_text())
    assert report["command"] == "python -m gossamer.hub.nursery.train clip-small"
    assert (folder / "model.safetensors").stat().st_size < 2**20
    with safe_open(folder / "model.safetensors", "pt") as stored:
        sizes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
        assert [256, description["image_width"]] in sizes
    for style in ("google", "twitter"):
        score = report["test_scores"][style]["all"]
        assert score["text R@5"] > 5 * score["chance R@5"]
        assert report["test_scores"][style]["category"]["accuracy"] > 0.4
    alone = report["test_scores_after_google_alone"]
    assert alone["twitter"]["all"]["text R@5"] < report["test_scores"]["twitter"]["all"]["text R@5"]
