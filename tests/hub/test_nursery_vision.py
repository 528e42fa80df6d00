from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import gossamer.hub.nursery
from gossamer.core.errors import InputError, OptionError
from gossamer.hub.nursery import (
    load_nursery,
    nursery_models,
    vision,
    vision_alignment,
    vision_build,
    vision_data,
    vision_training,
)
from gossamer.hub.nursery.vision import answers, load_vision, prompt, whole
from gossamer.hub.nursery.vision_alignment import align, patch_words, standardise
from gossamer.hub.nursery.vision_build import new_model
from gossamer.hub.nursery.vision_data import DESCRIBE, SceneData, VisionSpec
from gossamer.hub.nursery.vision_training import train_vision
from gossamer.hub.worlds.scene import COLOURS, Scene, Thing
from gossamer.hub.worlds.stills import Still, still_scenes

FOLDER = Path(gossamer.hub.nursery.__file__).parent
TINY = VisionSpec(
    vocabulary=320, hidden=32, intermediate=48, layers=2, heads=2, tower="tower", tower_layer=1, size=56, flat=20,
    textured=4, held=6, turns=3, wordings=2, steps=8, batch=4, rate=1e-2, bfloat16=False,
)  # fmt: skip


def tower() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 70}
        config = Dinov2Config(**shape, patch_size=14, use_mask_token=False, initializer_range=0.2)
        return Dinov2Model(config).eval()


def base() -> tuple[Any, Any]:
    """A Gemma of two layers with a byte tokenizer that puts <bos> in front."""
    names = ["<pad>", "</s>", "<bos>", "<start_of_image>"]
    vocabulary = {token: place for place, token in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=names[0], eos_token=names[1], bos_token=names[2], add_bos_token=True,
        extra_special_tokens=names[3:],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Gemma3TextConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2,
            layer_types=["sliding_attention", "full_attention"], sliding_window=512,
        )  # fmt: skip
        return Gemma3ForCausalLM(config).eval(), tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a tiny tower and base in the place of the packaged models."""

    def load(name: str, *, dtype: str, task: str = "") -> tuple[Any, Any]:
        return base() if name == "base" else (tower().to(getattr(torch, dtype)), None)

    monkeypatch.setattr(vision_alignment, "_STEPS", 20)
    for module in (vision, vision_data, vision_build):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(vision, "resolve", lambda name: None)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def trainer(spec: VisionSpec, path: Path) -> Any:
    data = SceneData(spec)
    model, processor = new_model(spec, data)
    made = vision_training._Trainer(spec, model, processor, data, path / "checkpoint.pt")
    made.processor = processor
    return made


def test_a_run_learns_and_writes_a_model_that_loads(cache: Path) -> None:
    report = train_vision("tiny", spec=TINY, out=cache / "out")
    assert report["steps"] == 8
    assert report["curve"][-1][1] < math.log(320)
    assert json.loads((cache / "out/training.json").read_text()) == json.loads(json.dumps(report))
    assert report["held_out"]["test"]["questions"] > 10
    model, processor = load_nursery_folder(cache / "out")
    stored = load_file(cache / "out/language.safetensors")
    assert not any("vision_tower" in key for key in stored)
    assert all(value.dtype == torch.bfloat16 for value in stored.values())
    assert torch.equal(model.model.language_model.norm.weight, stored["model.language_model.norm.weight"].float())
    for key, value in tower().state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[key], value), key
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vision_feature_layer == 1
    still = still_scenes("test", 1)[0]
    told = answers(model, processor, [still.image(56)] * 3, ["What is it?", "Where?", "How many are there?"], batch=2)
    assert len(told) == 3


def load_nursery_folder(folder: Path) -> tuple[Any, Any]:
    model, processor = load_vision(folder)
    again, _ = load_vision(folder)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    return model, processor


@pytest.mark.parametrize("restart", [0, 3, 5])
def test_a_killed_run_goes_on_exactly(cache: Path, monkeypatch: pytest.MonkeyPatch, restart: int) -> None:
    spec = replace(TINY, restart=restart)
    entire = train_vision("tiny", spec=spec, out=cache / "whole")
    monkeypatch.setenv("GOSSAMER_CACHE", str(cache / "other"))
    torch.manual_seed(99)
    assert train_vision("tiny", spec=spec, out=cache / "resumed", stop_after=3)["steps"] == 3
    assert not (cache / "resumed").exists()
    torch.manual_seed(5)
    resumed = train_vision("tiny", spec=spec, out=cache / "resumed")
    assert resumed["curve"] == entire["curve"]
    first, second = (load_file(cache / name / "language.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_rate_rises_again_at_a_restart(cache: Path) -> None:
    made = trainer(replace(TINY, steps=60, restart=40), cache)
    rates = [made._rate(step) for step in range(60)]
    assert max(rates) == rates[0] == rates[40] == TINY.rate
    assert rates[1:40] == sorted(rates[1:40], reverse=True)
    assert rates[39] < 0.03 * TINY.rate
    before = made.optimizers
    made.step = 40
    made.advance()
    assert made.optimizers is not before
    # none, or not within the run
    assert len({trainer(replace(TINY, restart=at), cache)._rate(5) for at in (0, 8, 99)}) == 1


def test_a_checkpoint_of_other_settings_is_not_used(cache: Path) -> None:
    train_vision("tiny", spec=TINY, stop_after=3)
    assert train_vision("tiny", spec=TINY, steps=30, stop_after=2)["steps"] == 2


@pytest.mark.parametrize("kind", ["", "base"])
def test_a_turn_among_others_is_a_prompt_of_its_own(cache: Path, kind: str) -> None:
    """Logits of a packed row equal those of the saved model on the processor's own inputs, one question each."""
    made = trainer(VisionSpec(**{**TINY.__dict__, "base": kind}), cache)
    model, processor = made.model.eval(), made.processor
    row = made.data.rows["train"][2]
    turns = [(turn["kind"], turn["text"], turn["answer"]) for turn in row["questions"][:3]]
    turns += [("caption", DESCRIBE, row["captions"][0])]
    batch = made.collate("train", [2], [turns])
    still = still_scenes("train", 3)[2]
    image_token = processor.image_token
    end = processor.tokenizer.eos_token
    texts = [f"{prompt(question, image_token)} {answer}{end}" for _, question, answer in turns]
    inputs = processor(images=[still.image(56)] * len(turns), text=texts, padding=True, return_tensors="pt")
    batch = replace(batch, features=exact_features(model, inputs))
    with torch.no_grad():
        packed = made._logits(batch, batch.labels != -100)
        model.model.language_model.set_attn_implementation("sdpa")
        alone = model(**inputs).logits
    expected, wanted = [], []
    for number, (*_, answer) in enumerate(turns):
        count = len(processor.tokenizer(f" {answer}", add_special_tokens=False).input_ids) + 1
        expected.append(alone[number, -count - 1 : -1])
        wanted += inputs["input_ids"][number, -count:].tolist()
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert batch.labels[batch.labels != -100].tolist() == wanted


def exact_features(model: Any, inputs: Any) -> Any:
    """[1, patches, width] in float32, where the cached ones are rounded."""
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"][:1], output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def test_cached_features_are_those_of_the_model(cache: Path) -> None:
    made = trainer(TINY, cache)
    stills = [*still_scenes("train", 20), *still_scenes("train", 4, seed=1, style="textured")]
    images = [stills[number].image(56) for number in (3, 21)]
    texts = [prompt("What?")] * 2
    inputs = made.processor(images=images, text=texts, padding=True, return_tensors="pt")
    cached = made.data.features("train", [3, 21]).float()
    states = tower()(inputs["pixel_values"], output_hidden_states=True).hidden_states[1][:, 1:]
    torch.testing.assert_close(cached, states, atol=0.1, rtol=0.05)
    assert (cached[0] - states[0]).abs().mean() < 0.1 * (cached[0] - states[1]).abs().mean()


def test_the_share_of_right_answers_is_that_of_greedy_generation(cache: Path) -> None:
    made = trainer(VisionSpec(**{**TINY.__dict__, "steps": 250}), cache)
    for _ in range(250):
        made.advance()
    rows = made.data.rows["train"][:8]
    turns = [[(turn["kind"], turn["text"], turn["answer"]) for turn in row["questions"]] for row in rows]
    made.model.eval()
    with torch.no_grad():
        batch = made.collate("train", range(8), turns)
        right, blind = made.right(batch, blind=False), made.right(batch, blind=True)
    stills = still_scenes("train", 8)
    asked = [(still.image(56), turn) for still, row in zip(stills, turns, strict=True) for turn in row]
    images, questions = [image for image, _ in asked], [turn[1] for _, turn in asked]
    for hits, options in ((right, {}), (blind, {"blind": True})):
        told = answers(made.model, made.processor, images, questions, new_tokens=12, **options)
        same = [given == turn[2] for given, (_, turn) in zip(told, asked, strict=True)]
        assert sum(hit == is_same for hit, is_same in zip(hits, same, strict=True)) >= 0.95 * len(hits)
    assert sum(right) > 0.1 * len(right)


def test_a_projector_starts_with_standardised_inputs(cache: Path) -> None:
    made = trainer(TINY, cache)
    features = made.data.features("train", range(24)).float().flatten(0, 1)
    projector = made.model.model.multi_modal_projector
    standardise(projector, features, 0.3)
    with torch.no_grad():
        inside, outside = projector.linear_1(features), projector(features)
    assert inside.mean().abs() < 0.1
    assert inside.std().item() == pytest.approx(1, abs=0.2)
    assert outside.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.05)


def test_alignment_makes_a_patch_say_what_it_shows(cache: Path) -> None:
    made = trainer(TINY, cache)
    first, last = align(made.model, made.tokenizer, made.data, steps=400)
    assert first > 0.8
    assert last < 0.6
    embeddings = made.model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        visual = made.model.model.multi_modal_projector(made.data.features("train", range(12)).float()).flatten(0, 1)
    told = [words for number in range(12) for words in patch_words(made.data.stills["train"][number], 56)]
    ids = [made.tokenizer(f" {colour}", add_special_tokens=False).input_ids[-1] for colour in COLOURS]
    guessed = (visual @ embeddings[ids].T).argmax(-1).tolist()
    seen = [COLOURS[guess] == words[1] for guess, words in zip(guessed, told, strict=True) if len(words) > 1]
    assert sum(seen) > 0.2 * len(seen)  # one in eight by chance


def test_the_words_of_a_patch_are_so() -> None:
    things = (Thing("star", "red", "big", (0, 0), "7"), Thing("cup", "blue", "big", (2, 2)))
    told = patch_words(Still(Scene(things, "sea"), "flat", "test"), 112)
    assert len(told) == 64
    assert told[9] == ("star", "red", "big", "top left", "7")
    assert told[54] == ("cup", "blue", "big", "bottom right")
    assert told[7] == told[56] == ("sea",)


def test_a_pretrained_base_is_adapted_and_merged(cache: Path) -> None:
    spec = VisionSpec(**{**TINY.__dict__, "base": "base", "lora": 2, "steps": 3})
    made = trainer(spec, cache)
    frozen = made.model.get_input_embeddings().weight.clone()
    assert {name.split(".")[1] for name in made.trained} == {"language_model", "multi_modal_projector"}
    assert all("lora" in name or "projector" in name for name in made.trained)
    for _ in range(3):
        made.advance()
    made.model.eval()
    row = made.data.rows["test"][0]
    batch = made.collate("test", [0], [[(turn["kind"], turn["text"], turn["answer"]) for turn in row["questions"]]])
    with torch.no_grad():
        before = made._logits(batch, batch.labels != -100)
        made.merge()
        after = made._logits(batch, batch.labels != -100)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(made.model.get_input_embeddings().weight, frozen)
    report = train_vision("tiny-base", spec=spec)
    model, processor = load_vision(cache / "cache/nursery/tiny-base")
    assert report["held_out"]["test"]["questions"] == report["held_out"]["test"]["questions"]
    assert processor.image_token == "<start_of_image>"
    ids = processor(images=[still_scenes("test", 1)[0].image(56)], text=prompt("Where?", processor.image_token))
    assert ids["input_ids"][0][0] == model.config.get_text_config().bos_token_id
    assert ids["input_ids"][0].count(model.config.image_token_id) == 16


def test_messages_are_written_as_prompts_are(cache: Path) -> None:
    processor = trainer(TINY, cache).processor
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    told = {"role": "assistant", "content": "cat"}
    assert processor.apply_chat_template([asked], tokenize=False) == prompt("What is it?")
    assert processor.apply_chat_template([asked, told], tokenize=False) == prompt("What is it? cat<|endoftext|>")


def test_a_folder_that_lacks_weights_is_refused(cache: Path) -> None:
    train_vision("tiny", spec=TINY, steps=1, out=cache / "out")
    state = load_file(cache / "out/language.safetensors")
    del state["model.language_model.norm.weight"]
    save_file(state, cache / "out/language.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="must hold the text model and the projector, got 1 missing"):
        whole(cache / "out")


def test_a_model_that_is_not_there_is_told(cache: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'vlm-gemma'"):
        load_nursery("vlm-gemm")
    with pytest.raises(InputError, match=r"train it into the cache with `python -m gossamer.hub.nursery.train vlm-"):
        load_nursery("vlm-gemma")
    with pytest.raises(OptionError, match="nursery model: must be a known name"):
        train_vision("vlm-huge")


def test_the_committed_model_answers() -> None:
    assert "vlm-small" in nursery_models()
    report = json.loads((FOLDER / "vlm-small/training.json").read_text())
    assert report["command"].startswith("python -m gossamer.hub.nursery.train vlm-small")
    assert report["held_out"]["test"]["exact"] > 0.85
    assert sum(path.stat().st_size for path in (FOLDER / "vlm-small").iterdir()) < 12 * 2**20
    model, processor = load_nursery("vlm-small")
    asked = [(still.image(112), turn) for still in still_scenes("test", 12) for turn in still.questions][:40]
    told = answers(model, processor, [image for image, _ in asked], [turn.text for _, turn in asked], batch=40)
    right = sum(given == turn.answer for given, (_, turn) in zip(told, asked, strict=True))
    assert right >= 32
