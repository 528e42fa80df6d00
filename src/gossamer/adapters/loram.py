"""LoRAM: a LoRA trained on a small, pruned copy of a model, and run on the whole one.

The memory of LoRA training is mostly the frozen model. So the copy is pruned (:mod:`gossamer.compression.small_copy`),
optionally trained a little on general text to make up for that (alignment), optionally quantised, and then holds

    y = W_P x + s B A dropout(x)        A: [r, d_in'], Kaiming-uniform    B: [d_out', r], zero    s = alpha / r

with the widths that were left. Where the copy kept its shape with zeros in it, the update is confined to what is not
zero, ``y = W_P x + s ((B A) * M) dropout(x)`` with ``M = (W_P != 0)``.

Recovery gives a plain PEFT LoRA of the same r and s on the *original* weights, ``y = (W_0 + s B_R A_R) x``:

    gate, up, q, k, v    B_R [d_out, r]: rows of what was pruned are 0, the others stand where they came from
    down, o              A_R [r, d_in]: columns likewise, or drawn from N(0, 1/r^2) (``fill="normal"``)
    all else             unchanged

So what was pruned keeps its pre-trained weights and gets no update. A sparse copy has nothing to put back, and the
factors are taken as they are: their product is then no longer confined, for the masked one is of no low rank.

The small adapter carries the record of its copy: which units stayed and the fingerprint of the whole model. It is
refused on another copy, and recovery on another model. The head is left out; the paper trains it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import TunerAdapter
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.injection import Projection, check_rank, is_transposed, projections, target_names, task_type
from gossamer.parts.small_copies import Place, SmallCopy, places, read_record, spread
from gossamer.parts.tuners import LinearTuner, LowRankLayer, register_tuner

if TYPE_CHECKING:
    from peft import PeftModel

CARD = Card(
    title="LoRAM: train small, infer large",
    paper="2502.13533",
    year=2025,
    claim="trained on an aligned copy with half of its units, the recovered LoRA beats the untuned model and the copy",
    traits=("identity_at_init", "mergeable"),
    requires=("small_copy",),
    provides=("adapter_attached",),
    forbids=("adapter_attached",),
    registers=("peft:loram",),
    families=("llama", "gemma3"),
    limits="70B models and the speed of 4-bit training are not shown; memory falls with structured copies only",
)
FILLS = ("zero", "normal")


class LoRAMConfig(Config):
    rank: int = option(8, "rank r of each layer's update", ge=1)
    alpha: float = option(16.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = option(0.05, "share of a layer's inputs dropped before A, in training", ge=0, lt=1)
    target_modules: str | tuple[str, ...] = option("all-linear", '"all-linear", names of layers, or a path expression')
    confined: bool = option(True, "on a sparse copy, update only the weights that are not 0")


class LoRAM(TunerAdapter):
    """LoRA on a small copy, and its way back to the whole model."""

    config_class = LoRAMConfig
    config: LoRAMConfig

    def peft_config(self, model: nn.Module) -> LoRAMPeftConfig:
        record = read_record(model)
        if record is None:
            do = "make one with small_copy, or use lora on the whole model"
            raise InputError(f"{self.name}.attach", must="get a small copy", got=type(model).__name__, do=do)
        names = target_names(model, self.config.target_modules)
        options = self.config.as_dict() | {"target_modules": names}
        return LoRAMPeftConfig(**options, copy=record.as_dict(), task_type=task_type(model))

    def recover(self, adapter: Any, base: Any, *, fill: str = "zero") -> PeftModel:
        """``base``, the whole model, with the trained factors as a plain PEFT LoRA that goes on training or is saved.

        ``adapter`` is what :meth:`attach` returned, or the folder that its ``save_pretrained`` wrote: the copy is not
        needed then. InputError where ``base`` is not the model that the copy was made of, or factors do not fit.
        """
        from peft import LoraConfig, get_peft_model

        if fill not in FILLS:
            raise OptionError("recover.fill", must=f"be one of {FILLS}", got=repr(fill), do=did_you_mean(fill, FILLS))
        self.check(base)
        config, factors = _read(adapter)
        record = SmallCopy.from_dict(config.copy)
        if fingerprint(base) != record.origin:
            must = f"be the model that the copy was made of (fingerprint {record.origin})"
            do = "load the original weights in their own type: not the copy, not the aligned ones"
            raise InputError("recover: the whole model", must=must, got=fingerprint(base), do=do)
        full = self._full(factors, places(base, record), projections(base, config.target_modules), fill)
        found = projections(base, config.target_modules)
        plain = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            fan_in_fan_out=any(is_transposed(projection.module) for projection in found),
            task_type=config.task_type,
        )
        trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        with torch.random.fork_rng(devices=[]):
            recovered: Any = get_peft_model(base, plain)
        recovered.gossamer_trainable = trainable
        with torch.no_grad():
            for path, (a, b) in full.items():
                layer = recovered.get_base_model().get_submodule(path)
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
        return recovered.eval()

    def _full(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        found: Mapping[str, Place],
        layers: list[Projection],
        fill: str,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors in the shapes of the whole model, by path."""
        if sorted(factors) != sorted(layer.path for layer in layers):
            must = f"have factors for the {len(layers)} targeted layers of the whole model"
            raise InputError("recover: the adapter", must=must, got=len(factors), do=_WHOLE)
        generator = torch.Generator().manual_seed(self.seed)
        full = {}
        for layer in layers:
            place, (a, b) = found.get(layer.path, Place()), factors[layer.path]
            kept = [
                width if index is None else len(index)
                for width, index in ((layer.d_in, place.columns), (layer.d_out, place.rows))
            ]
            if [a.shape[1], b.shape[0]] != kept:
                got = [a.shape[1], b.shape[0]]
                raise InputError(f"recover: {layer.path}", must=f"have factors of widths {kept}", got=got, do=_WHOLE)
            wide = spread(a, place.columns, layer.d_in, 1)
            if fill == "normal" and place.columns is not None:
                gone = torch.ones(layer.d_in, dtype=torch.bool)
                gone[place.columns] = False
                wide[:, gone] = torch.randn(len(a), int(gone.sum()), generator=generator).to(wide) / len(a)
            full[layer.path] = wide, spread(b, place.rows, layer.d_out, 0)
        return full


_SLACK = 0.02  # the share of zeros of one matrix below that of all
_WHOLE = "take the files that were saved for this very copy"


@dataclasses.dataclass
class LoRAMPeftConfig(PeftConfig):
    """PEFT's side of :class:`LoRAMConfig`; ``copy`` is the record of the copy that it fits."""

    target_modules: Any = "all-linear"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    confined: bool = True
    copy: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORAM")
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)


class LoRAMLinear(LowRankLayer):
    """A linear layer of the copy with its factors, and the mask ``[out, in]`` that confines them."""

    adapter_layer_names = ("loram_A", "loram_B")
    other_param_names = (*LowRankLayer.other_param_names, "loram_mask")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.loram_A = nn.ParameterDict()
        self.loram_B = nn.ParameterDict()
        self.loram_mask = BufferDict(persistent=False)  # read off the copy whenever it is loaded

    def add_adapter(self, name: str, config: LoRAMPeftConfig, plan: Tensor | None) -> None:
        bound = self.d_in**-0.5  # Kaiming-uniform with a = sqrt 5 and fan-in d_in
        self.loram_A[name] = nn.Parameter(torch.empty(config.rank, self.d_in).uniform_(-bound, bound))
        self.loram_B[name] = nn.Parameter(torch.zeros(self.d_out, config.rank))
        if plan is not None:
            self.loram_mask[name] = plan
        scaling = config.alpha / config.rank
        self.added(name, scaling=scaling, dropout=config.dropout, inference_mode=config.inference_mode)

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.loram_A[name], self.loram_B[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not len(self.loram_mask) or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.scaling:
                a, b = self.lora_factors(name)
                update = self.scaling[name] * (b @ a)
                if name in self.loram_mask:
                    update = update * self.loram_mask[name]
                result = result + F.linear(self.adapter_dropout[name](self._cast_input_dtype(x, a.dtype)), update)
        return result.to(dtype)

    def get_delta_weight(self, name: str) -> Tensor:
        delta = super().get_delta_weight(name)
        if name not in self.loram_mask:
            return delta
        mask = self.loram_mask[name]
        return delta * (mask.T if is_transposed(self.get_base_layer()) else mask)


class LoRAMModel(LinearTuner):
    """The tuner: refuses another copy, and reads the masks."""

    prefix = "loram_"
    tuner_layer_cls = LoRAMLinear

    def plan(self, config: LoRAMPeftConfig, found: list[Projection]) -> dict[str, Tensor | None]:
        check_rank("loram.rank", config.rank, found)
        record = read_record(self.model)
        if record is None or record != SmallCopy.from_dict(config.copy):
            got = "a whole model" if record is None else f"another copy ({record.method} of {record.origin})"
            do = "load that copy, or recover the adapter onto the whole model"
            raise InputError("loram: the model for this adapter", must="be the copy it was made on", got=got, do=do)
        confined = set(record.sparse) if config.confined else set()
        return {layer.path: _mask(layer, record.zeros) if layer.path in confined else None for layer in found}


def _mask(layer: Projection, zeros: float) -> Tensor:
    """True where the weight ``[out, in]`` is not 0. Rounding may have made more of them 0, but not fewer."""
    module: Any = layer.module
    weight = module.weight if hasattr(module, "weight") else module.dequantised(torch.float32)
    mask: Tensor = (weight.detach().T if is_transposed(module) else weight.detach()) != 0
    share = 1 - float(mask.float().mean())
    if share < zeros - _SLACK:
        do = "align it with the step align or under zeros_kept, quantise it symmetrically, or set confined: false"
        must = f"hold the zeros of its copy, {zeros:.0%} of the weights"
        raise InputError(f"loram: {layer.path}", must=must, got=f"{share:.0%}", do=do)
    return mask


def _read(adapter: Any) -> tuple[LoRAMPeftConfig, dict[str, tuple[Tensor, Tensor]]]:
    """Config and factors by path, of an attached model or of a folder."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    if isinstance(adapter, str | Path):
        folder = Path(adapter)
        if not (folder / "adapter_config.json").is_file():
            raise InputError(str(folder), must="hold an adapter", got="no adapter_config.json", do=_WHOLE)
        config: Any = PeftConfig.from_pretrained(str(folder))
        _check_kind(config)
        tensors = load_file(folder / "adapter_model.safetensors")
    else:
        name = adapter.active_adapters[0] if isinstance(adapter, PeftModel) else ""
        config = adapter.peft_config[name] if name else None
        _check_kind(config)
        tensors = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    factors: dict[str, list[Tensor]] = {}
    for letter in "AB":
        for key, tensor in tensors.items():
            path, found, _ = key.removeprefix("base_model.model.").partition(f".loram_{letter}")
            if found:
                factors.setdefault(path, []).append(tensor.detach().float().cpu())
    return config, {path: (pair[0], pair[1]) for path, pair in factors.items()}


def _check_kind(config: Any) -> None:
    if not isinstance(config, LoRAMPeftConfig):
        got = getattr(config, "peft_type", None) or "no adapter"
        raise InputError("recover: the adapter", must="be one of loram", got=got, do="give what loram.attach returned")


register_tuner("loram", LoRAMPeftConfig, LoRAMModel)
