"""The checkpoint format of quantised models, and its registration with transformers.

``config.json`` carries ``quantization_config = {"quant_method": "gossamer", "modules": {...}, "scale_dtype": ...}``:
for each packed module its shape, bits, group and symmetry. ``from_pretrained`` puts empty packed modules in place by
that table and fills them from the safetensors file; nothing is quantised or restored on the way, so logits after a
reload are the same to the last bit. Without ``import gossamer`` transformers would only warn and read the bytes as
floats.

An embedding that is also the output matrix is one matrix, packed where neither name is skipped: the embedding owns the
rows, the head reads them (``"tied": {head: embedding}``), and ``tie_word_embeddings`` is off, as no weight is left that
transformers could tie.

Importing this module registers the format; it does so once and may be repeated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.core.errors import InputError
from gossamer.parts.quant_linear import PackedWeight, QuantEmbedding, QuantExperts, QuantLinear, TiedQuantLinear
from gossamer.parts.quantiser import PER_CHANNEL, Quantised

METHOD = "gossamer"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight that can be packed: where it is, and its view as ``[..., out, in]``."""

    name: str  # of the module, or of the expert parameter
    weight: torch.Tensor
    linear: str = ""  # the module that multiplies by it: itself, or the head that an embedding is tied to; or none

    @property
    def columns(self) -> int:
        return self.weight.shape[-1]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How to pack one matrix."""

    bits: int
    group: int = PER_CHANNEL
    symmetric: bool = True


def find_matrices(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[Matrix], dict[str, str]]:
    """Weights of linear layers, GPT-2's ``Conv1D`` (transposed), input embeddings and expert stacks; and what stays
    float, with why.

    ``skip`` holds parts of dotted module names. A weight that another module shares is left alone, as packing it here
    would change it there; but for an embedding and the head that it is tied to: they are one matrix, under the
    embedding's name. :class:`InputError` for expert stacks of a layout that is not ``[experts, out, in]``.
    """
    owners: dict[int, int] = {}
    for _, owned in model.named_parameters(remove_duplicate=False):
        owners[id(owned)] = owners.get(id(owned), 0) + 1
    embedding, head = _ends(model)
    tied = (embedding, head) if embedding and head and _at(model, embedding).weight is _at(model, head).weight else ()
    found: list[Matrix] = []
    left: dict[str, str] = {}
    for name, weight, parameter in _candidates(model, embedding):
        names, sharers = (tied, 2) if name in tied else ((name,), 1)
        word = next((word for word in skip if any(word in one for one in names)), None)
        if word is not None:
            left[name] = f"skipped by {word!r}"
        elif owners[id(parameter)] > sharers:
            left[name] = "shared with another module"
        elif name in tied:
            found += [Matrix(name, weight, head)] if name == embedding else []
        elif weight.ndim == 3:
            _check_experts(model, name, weight)
            found.append(Matrix(name, weight))
        else:
            found.append(Matrix(name, weight, "" if name == embedding else name))
    return found, left


def pack_matrix(
    model: nn.Module, matrix: Matrix, packing: Packing, scale_dtype: torch.dtype, parts: Quantised | None = None
) -> PackedWeight:
    """Replace the matrix's module by a packed one in ``model``; returns it. ``parts`` are its codes, where they are
    not those of rounding."""
    module = _empty(model, matrix.name, _entry(matrix.weight, packing), scale_dtype)
    if parts is None:
        module.fill(matrix.weight.detach())
    else:
        module.fill_parts([parts])
    _put(model, matrix.name, module)
    if isinstance(module, QuantEmbedding) and matrix.linear:
        _tie(model, {matrix.linear: matrix.name})
    return module


def mark_quantised(model: nn.Module) -> None:
    """Make a model whose modules were packed in place one that transformers saves, loads and treats as quantised."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    modules = {name: module for name, module in packed.items() if not isinstance(module, TiedQuantLinear)}
    tied = {head: _ends(model)[0] for head in packed.keys() - modules.keys()}
    table = {
        name: {"shape": list(m.shape), "bits": m.bits, "group": m.group, "symmetric": m.symmetric}
        for name, m in modules.items()
    }
    dtypes = {module.scales.dtype for module in modules.values()}
    assert len(dtypes) <= 1, dtypes
    scale_dtype = str(next(iter(dtypes), torch.bfloat16)).removeprefix("torch.")
    quantizer = GossamerQuantizer(GossamerQuantizationConfig(table, scale_dtype, tied), pre_quantized=True)
    any_model: Any = model
    any_model.hf_quantizer, any_model.is_quantized, any_model.quantization_method = quantizer, True, METHOD
    quantizer.postprocess_model(any_model)


class GossamerQuantizationConfig(QuantizationConfigMixin):
    """``modules``: name -> {shape, bits, group, symmetric}; ``scale_dtype``: a torch dtype's name; ``tied``: name of a
    head -> name of the embedding whose rows it reads."""

    def __init__(
        self,
        modules: dict[str, Any],
        scale_dtype: str = "bfloat16",
        tied: dict[str, str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.modules = modules
        self.scale_dtype = scale_dtype
        self.tied = tied or {}


class GossamerQuantizer(HfQuantizer):
    """Loads and saves packed modules; transformers calls it."""

    requires_calibration = False
    quantization_config: GossamerQuantizationConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            raise InputError(
                "from_pretrained(quantization_config=...)",
                must="read a checkpoint that was saved quantised",
                do="load the float model and call gossamer.system('finequant').compress(model)",
            )
        scale_dtype = getattr(torch, self.quantization_config.scale_dtype)
        with torch.device("meta"):
            for name, entry in self.quantization_config.modules.items():
                here = _name_in(model, name)
                if here is not None:
                    _put(model, here, _empty(model, here, entry, scale_dtype))
                    # some models initialise a weight of their children by name, which a packed child has not
                    model.get_submodule(here.rpartition(".")[0])._is_hf_initialized = True
        _tie(model, self.quantization_config.tied)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _tie(model, self.quantization_config.tied)
        for module in model.modules():
            if any(isinstance(child, QuantExperts) for child in module.children()):
                # the other implementations multiply whole stacks, which a packed stack has not
                module.config._experts_implementation = "eager"
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        if any(isinstance(module, QuantExperts) for module in model.modules()):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming

            # packed stacks are saved as they are held, not split into a file entry an expert
            known = getattr(model, "_weight_conversions", None)
            known = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
            model._weight_conversions = [item for item in known if isinstance(item, WeightRenaming)]
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # through adapters: packed weights have no gradients


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(GossamerQuantizationConfig)
    register_quantizer(METHOD)(GossamerQuantizer)


def _ends(model: Any) -> tuple[str, str]:
    """Names of the input embedding, if it is of a known class, and of the output matrix; empty where there is none."""
    if not isinstance(model, PreTrainedModel):
        return "", ""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    known = type(first) in (nn.Embedding, QuantEmbedding) or type(first).__name__ == "Gemma3TextScaledWordEmbedding"
    return names.get(id(first), "") if known else "", names.get(id(last), "")


def _tie(model: Any, tied: dict[str, str]) -> None:
    """Let packed heads read what their embeddings hold now; nothing is left that transformers could tie."""
    for head, embedding in tied.items():
        here, source = _name_in(model, head), _name_in(model, embedding)
        if here is None or source is None:
            continue
        if isinstance(_at(model, here), TiedQuantLinear):
            _at(model, here).share()
        else:
            _put(model, here, TiedQuantLinear(_at(model, source)))
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _candidates(model: nn.Module, embedding: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, weight as [..., out, in], the parameter itself)."""
    rows: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        # subclasses of Linear are left out: their owners read the weight themselves
        if type(module) is nn.Linear or (name and name == embedding):
            rows.append((name, module.weight, module.weight))
        elif type(module) is Conv1D:
            rows.append((name, module.weight.t(), module.weight))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and "expert" in name.lower():
                    rows.append((f"{name}.{key}", parameter, parameter))
    return rows


def _check_experts(model: nn.Module, name: str, weight: torch.Tensor) -> None:
    owner = name.rpartition(".")[0]
    module: Any = model.get_submodule(owner)
    straight = getattr(module, "is_transposed", None) is False and not getattr(module, "has_bias", False)
    if not straight or getattr(module, "num_experts", -1) != weight.shape[0]:
        raise InputError(
            f"{name} {list(weight.shape)}",
            must="be a stack of expert matrices [experts, out, in] that its module loops over",
            got=type(module).__name__,
            do=f"leave it in float with skip: [{owner.rsplit('.', 1)[-1]}]",
        )


def _entry(weight: torch.Tensor, packing: Packing) -> dict[str, Any]:
    return {"shape": list(weight.shape), **dataclasses.asdict(packing)}


def _empty(model: nn.Module, name: str, entry: dict[str, Any], scale_dtype: torch.dtype) -> PackedWeight:
    """The packed module for what stands at ``name``, not filled yet."""
    bits, group, shape = entry["bits"], entry["group"], tuple(entry["shape"])
    old = _at(model, name)
    if len(shape) == 3:
        return QuantExperts(shape, bits, group, symmetric=entry["symmetric"], scale_dtype=scale_dtype, dtype=old.dtype)
    if isinstance(old, nn.Embedding):
        return QuantEmbedding(
            shape, bits, group, scale=getattr(old, "scalar_embed_scale", 1.0), symmetric=entry["symmetric"],
            scale_dtype=scale_dtype, dtype=old.weight.dtype,
        )  # fmt: skip
    bias = getattr(old, "bias", None)
    return QuantLinear(
        shape[1], shape[0], bits, group, bias=bias is not None, symmetric=entry["symmetric"],
        scale_dtype=scale_dtype, dtype=None if bias is None else bias.dtype,
    )  # fmt: skip


def _put(model: nn.Module, name: str, module: PackedWeight) -> None:
    """Set ``module`` at ``name``, over a module or a parameter, taking over the bias."""
    owner, _, key = name.rpartition(".")
    parent = model.get_submodule(owner)
    old = getattr(parent, key)
    if isinstance(module, QuantLinear) and module.bias is not None:
        module.bias = old.bias
    module.train(old.training if isinstance(old, nn.Module) else parent.training)
    delattr(parent, key)
    parent.add_module(key, module)


def _at(model: nn.Module, name: str) -> Any:
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)


def _name_in(model: Any, name: str) -> str | None:
    """``name`` as this class calls it: a bare model lacks the prefix of one with a head, and the other way round."""
    prefix = model.base_model_prefix + "."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        owner, _, key = candidate.rpartition(".")
        try:
            if hasattr(model.get_submodule(owner), key):
                return candidate
        except AttributeError:
            continue
    return None
