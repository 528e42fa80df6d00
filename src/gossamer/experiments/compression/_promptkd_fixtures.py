"""Two small CLIPs trained from scratch on flat pictures of the still world, and domains in its other styles."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.paths import atomic_dir
from gossamer.experiments.lab import Lab
from gossamer.hub.worlds.draw import draw
from gossamer.hub.worlds.scene import BACKGROUNDS, COLOURS, KINDS, SIZES, Scene, sample_scene

SIDE, PATCH = 56, 8
CLASSES = KINDS[:20]
TEMPLATES = ("a photo of a {}.", "this is a {}.", "a picture of a {}.")
_OPENINGS = ("", "", "a photo of ", "this is ", "a picture of ")
# transformers pools at the highest id, not at the end token, where that has the id 2
_SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")
# vision layers and width, text layers and width, width of the features, batches of 32, learning rate
SIZES_OF: dict[str, dict[str, Any]] = {
    "teacher": {"vision": (6, 256), "text": (3, 128), "features": 256, "steps": 1000, "lr": 3e-4},
    "student": {"vision": (3, 128), "text": (2, 96), "features": 128, "steps": 350, "lr": 5e-4},
}
_BATCH = 32


def pretrained(name: str, lab: Lab) -> Bundle:
    """The teacher or the student with its processor, trained the first time; callers leave its weights alone."""
    folder = lab.folder("models") / name
    if not (folder / "config.json").exists():
        model = _train(name, 3 if lab.quick else SIZES_OF[name]["steps"], lab.log)
        with atomic_dir(folder) as path:
            model.save_pretrained(str(path))
    return Bundle(_loaded(folder), processor())


@functools.cache
def _loaded(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(str(folder)).eval()


def domain_scenes(count: int, seed: int, classes: tuple[str, ...] = CLASSES) -> list[Scene]:
    """Scenes of one thing, the classes in turn."""
    rng = random.Random(seed)
    return [sample_scene(rng, things=1, kinds=(classes[number % len(classes)],), grid=1) for number in range(count)]


def pictures(scenes: list[Scene], style: str) -> list[Any]:
    """PIL images of 56 pixels a side."""
    return [draw(scene, SIDE, style) for scene in scenes]


@dataclasses.dataclass(frozen=True)
class Caption:
    """``text`` and what it says: (kind, colour, size) of each thing and the background, "" for what it leaves out."""

    text: str
    things: tuple[tuple[str, str, str], ...]
    background: str

    def true_of(self, scene: Scene) -> bool:
        """Whether a picture of ``scene`` shows all of it."""
        return self.background in ("", scene.background) and all(scene.matching(*told) for told in self.things)


def caption(scene: Scene, rng: random.Random) -> Caption:
    """What is in the picture. Sizes, colours and places are named rarely, so that kinds are learnt soon."""

    def rarely(word: str) -> str:
        return word if rng.random() < 0.1 else ""

    told = tuple((thing.kind, rarely(thing.colour), rarely(thing.size)) for thing in scene.things)
    named = [" ".join(filter(None, (size, colour, kind))) for kind, colour, size in told]
    background = rarely(scene.background)
    things = " and ".join(("an " if words[0] in "aeiou" else "a ") + words for words in named)
    where = f" before the {background}" if background else ""
    return Caption(f"{rng.choice(_OPENINGS)}{things}{where}.", told, background)


@functools.cache
def processor() -> Any:
    """Words as tokens, and pictures of 56 pixels a side."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessorPil, CLIPProcessor, PreTrainedTokenizerFast

    text = " ".join((*KINDS, *COLOURS, *SIZES, *BACKGROUNDS, *_OPENINGS, *TEMPLATES, "a an and before the . { }"))
    words = sorted({word for word in text.replace(".", " . ").split() if word != "{}"})
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate((*_SPECIAL, *words))}, unk_token=_SPECIAL[2]))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, start, unknown, end = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=start, eos_token=end, unk_token=unknown
    )
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE), tokenizer)


def _model(name: str) -> Any:
    import torch
    from transformers import CLIPConfig, CLIPModel

    shape, tokenizer = SIZES_OF[name], processor().tokenizer

    def tower(layers: int, width: int) -> dict[str, Any]:
        heads, inner = width // 32, 4 * width
        return {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner,
                "num_attention_heads": heads, "hidden_act": "gelu"}  # fmt: skip

    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    text = {**tower(*shape["text"]), "vocab_size": len(tokenizer), "max_position_embeddings": 32,
            "projection_dim": shape["features"], **ids}  # fmt: skip
    vision = {**tower(*shape["vision"]), "image_size": SIDE, "patch_size": PATCH, "projection_dim": shape["features"]}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape["features"]))
    # at transformers' start places and words weigh a tenth of what patches do, and kinds are learnt much later
    for embedding in (model.vision_model.embeddings.position_embedding, model.text_model.get_input_embeddings()):
        torch.nn.init.normal_(embedding.weight, std=0.2)
    return model


def _train(name: str, steps: int, log: Callable[[str], None]) -> Any:
    """Contrastive training on new pictures in every batch; a caption is no negative of a picture that it is true of."""
    import torch

    from gossamer.compression.promptkd.clip import Clip
    from gossamer.parts.contrastive import contrastive_loss

    rng = random.Random(17)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(name)
    clip = Clip(model, processor())
    optimizer = torch.optim.AdamW(model.parameters(), lr=SIZES_OF[name]["lr"], weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        rise, fall = min(1.0, (step + 1) / 50), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = SIZES_OF[name]["lr"] * rise * (0.02 + 0.98 * fall)
        scenes = [_source_scene(rng) for _ in range(_BATCH)]
        captions = [caption(scene, rng) for scene in scenes]
        true = torch.tensor([[told.true_of(scene) for told in captions] for scene in scenes])
        pixels = clip.pixels(pictures(scenes, "flat"))
        # inside the caller's autocast, a cache would keep the weights of the first step
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            seen = model.get_image_features(pixel_values=pixels).pooler_output
            told = model.get_text_features(input_ids=clip.ids([told.text for told in captions], "{}")).pooler_output
        tau = 1 / model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(seen, told, tau, equal=true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            log(f"{name}: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}")
    return model.eval()


def _source_scene(rng: random.Random) -> Scene:
    if rng.random() < 0.9:
        return sample_scene(rng, things=1, grid=1)
    return sample_scene(rng, things=(1, 3), grid=2)
