"""Opens dual encoders by name: one CLIP or SigLIP checkpoint, two unrelated encoders, or a trained pair of the nursery.

A nursery pair is a folder with dual_encoder.json (its two encoders, size, widths and what it fits) and the weights of
its head; the encoders themselves are the packaged ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from gossamer.core.errors import InputError, OptionError
from gossamer.hub.models import Dtype, load_model, resolve
from gossamer.parts.dual_encoder import DualEncoder, Head, Preparation

DESCRIPTION = "dual_encoder.json"
SIZE = 112  # of image encoders that were trained at several sizes: a fifth of the time of 224


def open_dual_encoder(
    images: str | Path = "dinov2-small",
    texts: str | Path | None = None,
    size: int | None = None,
    *,
    fit: Literal["crop", "squash"] | None = None,
    dtype: Dtype = "bfloat16",
    device: str = "cpu",
) -> DualEncoder:
    """``images`` names a CLIP or SigLIP checkpoint, a vision transformer, or a pair of the nursery ("clip-small").

    ``texts`` names a sentence encoder; None is the checkpoint's own text tower, and all-minilm-l6-v2 beside a vision
    transformer. ``size`` None is the checkpoint's own, the nursery pair's, or 112. ``fit`` None is the processor's
    way for a checkpoint, and "squash" for a vision transformer: nothing at the rim of the picture is lost.
    Raises OptionError and InputError for names, sizes and checkpoints that do not serve.
    """
    folder = _pair_folder(images)
    if folder is not None:
        if texts is not None or fit is not None:
            do = "leave texts and fit out, or name the encoders"
            raise OptionError(f"dual encoder {folder.name}", must="keep its own text encoder and fit", do=do)
        return _trained_pair(folder, size, dtype, device)
    config = _config(images)
    whole = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if config.model_type == "siglip2" or (whole and config.model_type.endswith("vl")):
        do = "take a checkpoint with one image size, such as CLIP, SigLIP or SigLIP 2 at a fixed resolution"
        raise InputError(f"model {images}", must="take square pictures", got=config.model_type, do=do)
    processor = _image_processor(images)
    if whole:
        prepare = Preparation.of(processor, size, fit)
        model, tokenizer = load_model(images, dtype="float32", task="encoder")
        if not hasattr(model, "get_text_features"):
            must = "have an image and a text tower that end in one space"
            raise InputError(f"model {images}", must=must, got=type(model).__name__, do="name a CLIP or SigLIP model")
        text_model, name = model, str(images)
    else:
        prepare = Preparation.of(processor, size or SIZE, fit or "squash")
        model, _ = load_model(images, dtype="float32", task="image-encoder")
        text_model, name, texts = None, str(images), texts or "all-minilm-l6-v2"
    if texts is not None:
        text_model, tokenizer = load_model(texts, dtype="float32", task="encoder")
        name = f"{name} + {texts}"
    return DualEncoder(name, model, text_model, tokenizer, prepare, dtype=_dtype(dtype), device=device)


def describe_pair(folder: Path) -> dict[str, Any]:
    """Content of a trained pair's dual_encoder.json."""
    return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))


def _trained_pair(folder: Path, size: int | None, dtype: Dtype, device: str) -> DualEncoder:
    facts = describe_pair(folder)
    image_model, processor = load_model(facts["images"], dtype="float32", task="image-encoder")
    text_model, tokenizer = load_model(facts["texts"], dtype="float32", task="encoder")
    prepare = Preparation.of(processor, size or facts["size"], facts["fit"])
    head = Head(facts["image_width"], facts["text_width"], facts["width"], facts["hidden"])
    # stored in bfloat16 where it was stored small; computed in float32
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    head.load_state_dict(state)
    pair = DualEncoder(
        folder.name, image_model, text_model, tokenizer, prepare, head=head, dtype=_dtype(dtype), device=device
    )
    if pair.weights != facts["fits"]:
        must = f"be opened with the encoders it was trained with, {facts['fits']}"
        raise InputError(f"dual encoder {folder}", must=must, got=str(pair.weights), do="train it again on these")
    return pair


def _pair_folder(name: str | Path) -> Path | None:
    """A folder with a trained pair, given as such or by its name in the nursery."""
    for folder in (Path(name).expanduser(), Path(__file__).parent / "nursery" / str(name)):
        if (folder / DESCRIPTION).is_file():
            return folder
    return None


def _config(name: str | Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve(name).path, trust_remote_code=False, local_files_only=True)


def _image_processor(name: str | Path) -> Any:
    from transformers import AutoImageProcessor

    path = resolve(name).path
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        do = "name an image encoder that was saved with its processor"
        raise InputError(
            f"model {path}", must="have an image processor", got=str(error).splitlines()[0], do=do
        ) from error


def _dtype(dtype: Dtype) -> torch.dtype:
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)
