"""A model as plain transformers holds it: packed weights restored, no class and no shape of Gossamer's left.

A packed weight becomes ``w_hat [out, in]``, and an embedding and head that were packed as one matrix are tied again.
What transformers cannot rebuild from a config alone is refused: blocks cut to ragged widths, and architectures of
this package. Folders are written by ``save_pretrained``; an adapter, where PEFT can hold it, as a PEFT folder.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.core.errors import InputError
from gossamer.parts.quant_linear import PackedWeight, QuantExperts, QuantLinear, TiedQuantLinear
from gossamer.parts.surgery_format import read_widths

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_PACKED = ("qweight", "scales", "minima")


def refuse_own_shapes(model: Any, where: str) -> None:
    """InputError for a model that does not load without Gossamer: ragged blocks, or a class of this package."""
    if any(read_widths(config) for config in (model.config, model.config.get_text_config())):
        do = "share the folder as it is, which loads after `import gossamer`, or export the model before pruning"
        raise InputError(
            where, must="get blocks of one shape", got="a pruned model, its layers of ragged widths", do=do
        )
    if not type(model).__module__.startswith("transformers."):
        do = "share the folder as it is, which loads after `import gossamer`"
        raise InputError(where, must="get a model of transformers' own classes", got=type(model).__name__, do=do)


def as_float32(model: nn.Module) -> nn.Module:
    """``model`` itself, computing in float32 on the weights that it has; packed weights stay packed."""
    nn.Module.float(model).eval()  # transformers' own refuses quantised models, whose packed weights do not change here
    module: Any
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # a model in bfloat16 holds it rounded
            module.embed_scale = torch.tensor(float(module.scalar_embed_scale), device=module.embed_scale.device)
    return model


@torch.no_grad()
def restore_linears(model: nn.Module) -> None:
    """Put float32 linear layers where packed ones are, in place, so that an adapter on them can be folded in."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and not isinstance(module, TiedQuantLinear):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, _linear(module))


@torch.no_grad()
def plain_model(model: Any) -> Any:
    """``model`` in float32 as a model of transformers' own modules; ``model`` itself where nothing is packed.

    Raises what :func:`refuse_own_shapes` raises.
    """
    refuse_own_shapes(model, "export")
    quantised = getattr(model.config, "quantization_config", None) is not None
    if not quantised and not any(isinstance(module, PackedWeight) for module in model.modules()):
        return model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if any(isinstance(module, TiedQuantLinear) for module in model.modules()):
        config.tie_word_embeddings = True
    state = _float_state(model, config)
    # transformers builds the rest: buffers, ties, what is not in the file
    plain, loaded = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    lost = sorted(map(str, loaded["missing_keys"])) + sorted(map(str, loaded["unexpected_keys"]))
    if lost:
        raise InputError(
            "export", must="find a place for every restored weight", got=f"{len(lost)} not, {lost[0]} first"
        )
    plain.generation_config = model.generation_config
    return plain.eval()


def write_safetensors(model: Any, processor: Any, folder: Path, kind: str) -> None:
    """Write a folder that ``from_pretrained`` loads: weights as ``kind`` ("bf16", "f16", "f32"), config, tokenizer."""
    model.to(TYPES[kind]).save_pretrained(folder)
    save_processor(processor, folder)


def save_processor(processor: Any, folder: Path) -> None:
    """Without the marks of where it was loaded from."""
    for mark in ("is_local", "local_files_only"):
        getattr(processor, "init_kwargs", {}).pop(mark, None)
    processor.save_pretrained(folder)


def write_peft(model: Any, folder: Path) -> None:
    """Write the adapter of a PEFT model as a folder that PEFT loads without Gossamer: as plain LoRA wherever it is a
    low-rank update, else as PEFT's own type. Raises InputError for a type that only Gossamer brings."""
    from peft import PeftType

    from gossamer.parts.lora import export_lora
    from gossamer.parts.tuners import LowRankLayer

    config = model.peft_config[model.active_adapters[0]]
    low_rank = any(isinstance(module, LowRankLayer) for module in model.modules())
    if low_rank or config.peft_type == PeftType.LORA or not type(config).__module__.startswith("peft."):
        export_lora(model, folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)


def _linear(packed: QuantLinear) -> nn.Linear:
    layer = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    layer.weight = nn.Parameter(packed.dequantised(torch.float32))
    if packed.bias is not None:
        layer.bias = nn.Parameter(packed.bias.float())
    return layer


def _float_state(model: Any, config: Any) -> dict[str, Tensor]:
    """The weights under the names and in the shapes that the class of ``model`` gives them."""
    with torch.device("meta"):
        target = dict(type(model)(config).named_modules())
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] not in _PACKED}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and not isinstance(module, TiedQuantLinear):
            key = name if isinstance(module, QuantExperts) else f"{name}.weight"
            state[key] = module.dequantised(torch.float32)
        if isinstance(target.get(name), Conv1D) and isinstance(module, QuantLinear | nn.Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"].t().contiguous()
    return state
