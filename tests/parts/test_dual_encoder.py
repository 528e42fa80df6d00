from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from gossamer.core.errors import InputError, OptionError
from gossamer.hub.encoders import open_dual_encoder
from gossamer.parts.dual_encoder import DualEncoder, FeatureCache, Head, Preparation, as_array, same_encoder

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WORDS = tuple(
    "a red green cup plate on the table wash cut potato apple dishes two people walking in rain".split()  # noqa: SIM905
)


def tokenizer(limit: int = 16) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=limit
    )


def save(folder: Path, model: Any, *processors: Any) -> Path:
    for item in (model, *processors):
        item.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    siglip = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
    dino = Dinov2Model(Dinov2Config(**(SMALL | {"image_size": 56, "patch_size": 14, "use_mask_token": False})))
    bert = BertModel(BertConfig(**SMALL, vocab_size=40, max_position_embeddings=16))
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return {
        "clip": save(root / "clip", clip, CLIPImageProcessorPil(**crop), tokenizer()),
        "siglip": save(
            root / "siglip", siglip, SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer()
        ),
        "dino": save(
            root / "dino",
            dino,
            BitImageProcessorPil(
                size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3,
                image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
            ),
        ),
        "bert": save(root / "bert", bert, tokenizer()),
    }  # fmt: skip


def pictures(count: int, height: int = 45, width: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    coarse = [rng.integers(0, 255, (6, 8, 3), dtype=np.uint8) for _ in range(count)]
    return [np.asarray(Image.fromarray(item).resize((width, height), Image.Resampling.BICUBIC)) for item in coarse]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_checkpoint_gives_the_features_of_its_own_classes(name: str, checkpoints: dict[str, Path]) -> None:
    encoder = open_dual_encoder(checkpoints[name], dtype="float32")
    model = encoder.image_tower.model
    images = [Image.fromarray(item) for item in pictures(3)]
    own = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[name].from_pretrained(checkpoints[name])
    pixels = own(images, return_tensors="pt").pixel_values
    # Pillow rounds each pass to a byte, torch too: a step or two of 255
    assert (encoder.image_tower.prepare(images) - pixels).abs().max() < 2.5 / 255 / 0.25
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        texts = ["a red cup", "wash the dishes on the table"]
        settings: dict[str, Any] = (
            {"padding": "max_length", "max_length": 16} if name == "siglip" else {"padding": True}
        )
        batch = tokenizer()(texts, return_tensors="pt", **settings)
        expected_texts = model.get_text_features(**batch).pooler_output
    found = encoder.images(images)
    assert found.shape == (3, encoder.image_width)
    assert torch.cosine_similarity(found, expected).min() > 0.999
    assert torch.allclose(encoder.texts(texts), expected_texts, atol=1e-5)
    assert encoder.tau == pytest.approx(float(torch.exp(-model.logit_scale.detach())))


def test_unrelated_towers_pool_class_token_and_patches(checkpoints: dict[str, Path]) -> None:
    encoder = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=28, dtype="float32")
    assert (encoder.image_width, encoder.text_width, encoder.tau) == (64, 32, None)
    batch = pictures(2)
    model = encoder.image_tower.model
    with torch.no_grad():
        hidden = model(pixel_values=encoder.image_tower.prepare(batch)).last_hidden_state
    assert hidden.shape == (2, 1 + 2 * 2, 32)
    expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)
    assert torch.allclose(encoder.images(batch), expected, atol=1e-6)
    assert torch.allclose(encoder.texts(["a cup"]).norm(dim=1), torch.ones(1))
    assert encoder.images(batch).norm(dim=1).min() > 1.1


def test_squash_sees_the_rim_and_crop_does_not(checkpoints: dict[str, Path]) -> None:
    base = np.full((40, 80, 3), 90, np.uint8)
    marked = base.copy()
    marked[:, :10] = 250
    own = BitImageProcessorPil.from_pretrained(checkpoints["dino"])
    crop, squash = Preparation.of(own, 28), Preparation.of(own, 28, "squash")
    assert (crop.fit, crop.edge, squash.size) == ("crop", 32, 28)
    assert torch.equal(*crop([base, marked]))
    assert not torch.equal(*squash([base, marked]))


def test_one_by_one_mixed_shapes_and_kinds_give_the_batch(checkpoints: dict[str, Path]) -> None:
    encoder = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=28, dtype="float32")
    batch = [*pictures(2), Image.fromarray(pictures(1, 30, 30)[0]), pictures(1, 45, 60)[0]]
    texts = ["a cup", "two people walking in the rain", "a", "cut the red apple on the table"]
    assert torch.allclose(encoder.images(batch), torch.cat([encoder.images([one]) for one in batch]), atol=1e-5)
    assert torch.allclose(encoder.images(batch), encoder.images(batch, batch_size=3), atol=1e-5)
    assert torch.allclose(encoder.texts(texts), torch.cat([encoder.texts([one]) for one in texts]), atol=1e-5)
    clip = open_dual_encoder(checkpoints["clip"], dtype="float32")
    single = torch.cat([clip.texts([one]) for one in texts])
    assert torch.allclose(clip.texts(texts, batch_size=3), single, atol=1e-5)
    assert encoder.images([]).shape == (0, 64)
    assert encoder.texts([]).shape == (0, 32)


def test_bfloat16_costs_little_and_makes_no_other_encoder(checkpoints: dict[str, Path]) -> None:
    for images, texts in ((checkpoints["dino"], checkpoints["bert"]), (checkpoints["clip"], None)):
        exact, half = (open_dual_encoder(images, texts, dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert half.image_tower.model.dtype == torch.bfloat16
        batch = pictures(4)
        assert half.images(batch).dtype == torch.float32
        assert torch.cosine_similarity(exact.images(batch), half.images(batch)).min() > 0.999
        assert torch.cosine_similarity(exact.texts(["a red cup"]), half.texts(["a red cup"])).min() > 0.999
        half.check_fits(exact.name, exact.text_width, exact.fingerprint)


def test_transparent_pictures_lie_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = clear.convert("P")
    palette.info["transparency"] = 0
    for picture in (clear, grey):
        assert (as_array(picture) == 255).all()
    assert as_array(palette).shape == (4, 4, 3)
    assert as_array(Image.new("L", (2, 3), 7)).tolist() == [[[7, 7, 7]] * 2] * 3


@pytest.mark.parametrize(
    ("picture", "hint"),
    [
        (np.zeros((4, 4, 3), np.float32), r"got float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"uint8 array \[height, width, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "have pixels, got 4 x 0"),
        ("cat.png", "got str"),
    ],
)
def test_what_is_no_picture_is_told(picture: Any, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        as_array(picture)


def test_a_fingerprint_holds_all_that_a_vector_depends_on(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def opened(size: int = 28, fit: Any = None, texts: Path = checkpoints["bert"]) -> DualEncoder:
        return open_dual_encoder(checkpoints["dino"], texts, size=size, fit=fit)

    first = opened()
    assert opened().fingerprint == first.fingerprint
    larger, cropped = opened(size=56), opened(fit="crop")
    assert len({first.image_fingerprint, larger.image_fingerprint, cropped.image_fingerprint}) == 3
    assert first.text_fingerprint == larger.text_fingerprint
    # other words behind the same weights
    swapped = tokenizer()
    folder = save(tmp_path / "swapped", BertModel.from_pretrained(checkpoints["bert"]), swapped)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"red"', '"dishes!"').replace('"dishes"', '"red"'))
    other = opened(texts=folder)
    assert other.text_fingerprint.split("-")[0] == first.text_fingerprint.split("-")[0]
    with pytest.raises(InputError, match="vocabulary: must be made with the encoder"):
        other.check_fits("first", 32, first.text_fingerprint, side="texts", where="vocabulary")
    with pytest.raises(InputError, match=r"width: must be that of .*, 32, got 384"):
        first.check_fits("all-minilm-l6-v2", 384, first.fingerprint)
    with pytest.raises(InputError, match="be made with the encoder"):
        first.check_fits(first.name, 32, larger.fingerprint)
    larger.check_fits("first", 32, first.text_fingerprint, side="texts")


def test_fingerprints_agree_up_to_rounding_of_the_probes() -> None:
    assert same_encoder("ab+cd-7f80", "ab+cd-8082")
    assert not same_encoder("ab+cd-7f80", "ab+cd-7f90")
    assert not same_encoder("ab+cd-7f80", "ab+ce-7f80")
    for damaged in ("ab+cd", "ab+cd-7f", "ab+cd-zzzz", ""):
        assert not same_encoder("ab+cd-7f80", damaged)


def test_features_that_are_not_finite_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    encoder = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=28)
    broken = BertModel.from_pretrained(checkpoints["bert"])
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[5] = torch.nan
    encoder.text_tower.model = broken
    assert encoder.texts(["a cup"]).isfinite().all()
    with pytest.raises(InputError, match="row 1 of 2"):
        encoder.texts(["a cup", "a red cup"])
    with pytest.raises(InputError, match=r"features of 'k'.*row 0 of 1"):
        FeatureCache(tmp_path, encoder).put("k", torch.full((1, 64), torch.inf))


def test_texts_beyond_the_limit_and_a_lone_string_are_refused(checkpoints: dict[str, Path]) -> None:
    encoder = open_dual_encoder(checkpoints["clip"])
    with pytest.raises(InputError, match="at most 16 tokens, got 32 in text 1"):
        encoder.texts(["a cup", "cup " * 30])
    assert encoder.texts(["people walking in the rain table"]).shape == (1, 24)
    with pytest.raises(InputError, match="list of strings"):
        encoder.texts("a cup")


def test_the_cache_keeps_features_of_one_encoder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    encoder = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=28)
    cache = FeatureCache(tmp_path / "c", encoder)
    assert cache.get("video one") is None
    features = encoder.images(pictures(2))
    assert torch.equal(cache.of("video one", lambda: features), features)
    again = FeatureCache(tmp_path / "c", encoder)
    assert torch.equal(again.of("video one", lambda: pytest.fail("made again")), features)
    with pytest.raises(InputError, match=r"be \[n, 64\]"):
        cache.put("x", torch.zeros(2, 32))
    larger = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=56)
    with pytest.raises(InputError, match=r"feature cache .*: must be made with the encoder"):
        FeatureCache(tmp_path / "c", larger)
    with pytest.raises(InputError, match="must hold texts, got images"):
        FeatureCache(tmp_path / "c", encoder, side="texts")
    (stored,) = (tmp_path / "c").glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:40])
    with pytest.raises(InputError, match="whole safetensors file"):
        cache.get("video one")


def test_a_head_brings_both_sides_into_one_space(checkpoints: dict[str, Path]) -> None:
    plain = open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=28)
    torch.manual_seed(0)
    head = Head(64, 32, 8, hidden=12)
    paired = DualEncoder(
        "pair", plain.image_tower.model, plain.text_tower.model, plain.text_tower.tokenizer, plain.image_tower.prepare,
        head=head,
    )  # fmt: skip
    assert paired.image_width == paired.text_width == 8
    assert paired.tau == pytest.approx(0.07)
    batch = pictures(2)
    assert torch.allclose(paired.images(batch), head.images(plain.images(batch)))
    assert torch.allclose(paired.texts(["a cup"]), head.texts(plain.texts(["a cup"])))
    assert not same_encoder(paired.text_fingerprint, plain.text_fingerprint)


def test_wrong_names_and_sizes_are_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of the patch size 14, got 30; take 28"):
        open_dual_encoder(checkpoints["dino"], checkpoints["bert"], size=30)
    with pytest.raises(InputError, match="image processor"):
        open_dual_encoder(checkpoints["bert"])
    (tmp_path / "dual_encoder.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="keep its own text encoder"):
        open_dual_encoder(tmp_path, checkpoints["bert"])
