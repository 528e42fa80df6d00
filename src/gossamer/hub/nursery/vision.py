"""The nursery's small vision-language models, as LlavaForConditionalGeneration over a DINOv2 tower.

    features = h_6[:, 1:]      the tower's sixth hidden state (config.vision_feature_layer), class token off
    prompt   = <image> x 64, question; then the answer after a space and the end token (112 px, patches of 14)

The tower's final norm does not come into it, as transformers records what layers put out; the projector's first layer
starts with the standardisation of its inputs folded in.

The package holds the text model and the projector only (``language.safetensors``); the tower comes from the packaged
model that training.json names, and :func:`whole` puts the two together once, in the cache, as an ordinary folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from gossamer.core.errors import InputError
from gossamer.core.paths import atomic_dir, cache_dir, sha256
from gossamer.hub.models import load_model, resolve

LANGUAGE = "language.safetensors"  # text model and projector, without the tower
IMAGE_TOKEN = "<image>"
_TOWER = "model.vision_tower."


def prompt(question: str, image_token: str = IMAGE_TOKEN) -> str:
    """What the processor is given with one image; it repeats the image token once a patch."""
    return image_token + question


def chat_template(image_token: str = IMAGE_TOKEN) -> str:
    """Messages of text and image parts in the form of :func:`prompt`; the answer to come begins with a space."""
    return (
        "{% for message in messages %}{% set asks = message['role'] == 'user' %}"
        "{% set parts = [{'type': 'text', 'text': message['content']}] "
        "if message['content'] is string else message['content'] %}"
        "{% for part in parts %}"
        "{% if part['type'] == 'image' %}IMAGE{% elif asks %}{{ part['text'] }}"
        "{% else %}{{ ' ' + part['text'] + eos_token }}{% endif %}"
        "{% endfor %}{% endfor %}"
    ).replace("IMAGE", image_token)


def load_vision(folder: Path) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration in float32, in evaluation mode; LlavaProcessor, padding on the left)."""
    folder = whole(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def whole(folder: Path) -> Path:
    """A folder that ``from_pretrained`` reads: ``folder`` itself, or its copy in the cache with the tower added.

    Raises what ``resolve`` raises where the tower's package is not installed.
    """
    if not (folder / LANGUAGE).is_file():
        return folder
    tower = json.loads((folder / "training.json").read_text(encoding="utf-8"))["spec"]["tower"]
    resolve(tower)
    final = cache_dir("nursery") / f"{folder.name}-{sha256(folder / LANGUAGE)[:12]}"
    with FileLock(f"{final}.lock"):
        if not final.is_dir():
            with atomic_dir(final) as temporary:
                compose(folder, tower).save_pretrained(temporary)
                LlavaProcessor.from_pretrained(folder).save_pretrained(temporary)
    return final


def compose(folder: Path, tower: str) -> LlavaForConditionalGeneration:
    """The model of ``folder`` in float32 with the weights of the packaged model ``tower``."""
    model: Any = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
    result = model.load_state_dict(load_file(folder / LANGUAGE), strict=False)
    missing = [key for key in result.missing_keys if not key.startswith((_TOWER, "lm_head."))]
    if missing or result.unexpected_keys:
        got = f"{len(missing)} missing, {len(result.unexpected_keys)} unknown, {(missing + result.unexpected_keys)[0]}"
        raise InputError(str(folder / LANGUAGE), must="hold the text model and the projector", got=got)
    model.model.vision_tower.load_state_dict(load_model(tower, dtype="float32")[0].state_dict())
    return model


def save_language(model: LlavaForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Write ``model`` without its tower, weights in bfloat16, for :func:`whole`."""
    head = model.lm_head.weight is model.get_input_embeddings().weight
    state = {
        key: value.detach().to(torch.bfloat16).contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(_TOWER) and not (head and key.startswith("lm_head."))
    }
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # save_file would make a file that only its owner may read
    (folder / LANGUAGE).write_bytes(save(state, metadata={"format": "pt"}))


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    new_tokens: int = 8,
    batch: int = 32,
    blind: bool = False,
    log: Callable[[str], None] | None = None,
) -> list[str]:
    """Greedy answers to a question about each image. ``blind`` puts zeros in the place of the visual tokens."""
    assert len(images) == len(questions)
    found: list[str] = []
    image_token = processor.image_token
    hook = model.model.multi_modal_projector.register_forward_hook(_zeros) if blind else nullcontext()
    with hook:
        for start in range(0, len(questions), batch):
            texts = [prompt(question, image_token) for question in questions[start : start + batch]]
            inputs = processor(
                images=list(images[start : start + batch]), text=texts, padding=True, return_tensors="pt"
            )
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            new = made[:, inputs["input_ids"].shape[1] :]
            found += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
            if log is not None:
                log(f"{len(found)}/{len(questions)} answers")
    return found


def _zeros(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)
