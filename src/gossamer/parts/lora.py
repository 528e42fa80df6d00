"""Plain LoRA: what it costs, and low-rank adapters written as ordinary PEFT LoRA checkpoints.

y = W x + (alpha / r) B A x        A: [r, d_in]   B: [d_out, r]      r (d_in + d_out) numbers a layer
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.paths import atomic_dir
from gossamer.parts.injection import Projection, is_transposed


def lora_parameters(found: Iterable[Projection], rank: int) -> int:
    """Trainable numbers of a plain LoRA of that rank on these layers."""
    return sum(rank * (projection.d_in + projection.d_out) for projection in found)


def export_lora(model: Any, folder: Path) -> None:
    """Write the active adapter of a PEFT model as a LoRA checkpoint that PEFT loads without Gossamer.

    Works for PEFT's own LoRA and for every tuner on :class:`gossamer.parts.tuners.LowRankLayer`.
    Raises InputError for several active adapters and for adapters that are no low-rank update of linear layers.
    """
    from peft import PeftType
    from safetensors.torch import save_file

    name = _one_adapter(model)
    if model.peft_config[name].peft_type == PeftType.LORA:
        config, tensors = _peft_lora(model, name)
    else:
        config, tensors = _materialised(model, name)
    with atomic_dir(Path(folder)) as path:
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(path))


def _one_adapter(model: Any) -> str:
    active = list(getattr(model, "active_adapters", []))
    if len(active) != 1:
        raise InputError(
            "export_lora", must="find one active adapter", got=active or "none", do="attach one, or call set_adapter"
        )
    return str(active[0])


def _peft_lora(model: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    return config, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _materialised(model: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig

    from gossamer.parts.tuners import LowRankLayer

    own = model.peft_config[name]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    transposed = False
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LowRankLayer) and name in layer.scaling:
            a, b = (factor.detach().cpu().contiguous() for factor in layer.lora_factors(name))
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
            ranks[path] = a.shape[0]
            alphas[path] = layer.scaling[name] * a.shape[0]
            transposed = transposed or is_transposed(layer.get_base_layer())
    if not tensors:
        raise InputError(
            "export_lora",
            must="find layers with low-rank factors",
            got=own.peft_type,
            do="merge the adapter into the weights instead",
        )
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=own.target_modules,
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        lora_dropout=getattr(own, "dropout", 0.0),
        fan_in_fan_out=transposed,
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
    )
    return config, tensors
