"""Small models trained from scratch, with their weights in the package.

Each folder here is one model as ``from_pretrained`` reads it, with training.json (command, data, loss curve,
held-out scores); of a vision-language model it holds all but the vision tower, which a packaged model brings.
``python -m gossamer.hub.nursery.train NAME`` makes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.paths import cache_dir

ON_DEMAND = ("vlm-gemma",)  # too large for the package: trained into the cache


def nursery_models() -> list[str]:
    """Names of the models whose weights are here, sorted."""
    here = Path(__file__).parent
    return sorted(path.parent.name for kind in ("model", "language") for path in here.glob(f"*/{kind}.safetensors"))


def nursery_folder(name: str) -> Path:
    """A whole Hugging Face folder of the model; what lacks its vision tower here is put together in the cache.

    Raises OptionError for an unknown name, InputError for one that has to be trained first.
    """
    if name in nursery_models():
        folder = Path(__file__).parent / name
        if (folder / "model.safetensors").is_file():
            return folder
        from gossamer.hub.nursery.vision import whole

        return whole(folder)
    if name not in ON_DEMAND:
        names = [*nursery_models(), *ON_DEMAND]
        raise OptionError("nursery model", must="exist", got=repr(name), do=did_you_mean(name, names))
    folder = cache_dir("nursery") / name
    if not (folder / "model.safetensors").is_file():
        do = f"train it into the cache with `python -m gossamer.hub.nursery.train {name}` (about 20 minutes)"
        raise InputError(f"nursery model {name!r}", must="have been trained", got=f"no {folder}", do=do)
    return folder


def load_nursery(name: str = "llama-7m") -> tuple[Any, Any]:
    """(model in float32, in evaluation mode; its tokenizer or processor).

    A LlamaForCausalLM, or a LlavaForConditionalGeneration for the vision-language models; for a pair of encoders a
    DualEncoder, whose towers compute in bfloat16, and its tokenizer; the narrator comes without its vocabulary.
    Raises what :func:`nursery_folder` raises.
    """
    folder = nursery_folder(name)
    if (folder / "dual_encoder.json").is_file():
        from gossamer.hub.encoders import open_dual_encoder

        pair = open_dual_encoder(folder)
        return pair, pair.text_tower.tokenizer
    if (folder / f"{name}.vocab").is_dir():
        from gossamer.hub.nursery.narrator import load_narrator

        narrator, own, _ = load_narrator(folder)
        return narrator, own
    if (folder / "processor_config.json").is_file():
        from gossamer.hub.nursery.vision import load_vision

        return load_vision(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def train_nursery(name: str = "llama-7m", **settings: Any) -> dict[str, Any]:
    """As gossamer.hub.nursery.training.train_nursery; here so that listing the models needs no torch."""
    from gossamer.hub.nursery.training import train_nursery as train

    return train(name, **settings)
