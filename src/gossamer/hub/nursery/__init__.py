"""Small models trained from scratch, with their weights in the package.

Each folder here is one model as ``from_pretrained`` reads it, with training.json (command, data, loss curve,
held-out bits per byte). ``python -m gossamer.hub.nursery.train NAME`` makes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.core.errors import OptionError, did_you_mean


def nursery_models() -> list[str]:
    """Names of the models whose weights are here, sorted."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/model.safetensors"))


def load_nursery(name: str = "llama-7m") -> tuple[Any, Any]:
    """(LlamaForCausalLM in float32, in evaluation mode; its tokenizer). Raises OptionError for an unknown name."""
    if name not in nursery_models():
        raise OptionError("nursery model", must="exist", got=repr(name), do=did_you_mean(name, nursery_models()))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parent / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def train_nursery(name: str = "llama-7m", **settings: Any) -> dict[str, Any]:
    """As gossamer.hub.nursery.training.train_nursery; here so that listing the models needs no torch."""
    from gossamer.hub.nursery.training import train_nursery as train

    return train(name, **settings)
