"""Base classes for own PEFT tuners whose update is low-rank, and their registration with PEFT.

A tuner is three classes in one file: a ``PeftConfig`` dataclass, a :class:`LowRankLayer` that says what its factors
are, and a :class:`LinearTuner` that plans what each layer gets. ``register_tuner`` then makes ``get_peft_model``,
``save_pretrained``, ``PeftModel.from_pretrained``, ``merge_and_unload`` and transformers' ``load_adapter`` work.

    y = W x + b + scaling B A dropout(x)      A: [r, d_in]   B: [d_out, r]

PEFT finds an adapter's tensors by visiting its layers, so what is to be saved lives in the layers: as entries, by
adapter name, of the containers in ``adapter_layer_names`` (trained) and ``other_param_names``. All containers with
tensors have a name that begins with the tuner's ``prefix``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.injection import ALL_LINEAR, Projection, is_transposed, projections, target_names, widths


class LowRankLayer(nn.Module, BaseTunerLayer):
    """A linear layer with low-rank updates by adapter name."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("adapter_dropout", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = widths(self.get_base_layer())
        assert shape is not None, type(base_layer)
        self.d_in, self.d_out = shape
        self.adapter_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.train(base_layer.training)

    @abc.abstractmethod
    def add_adapter(self, name: str, config: Any, plan: Any) -> None:
        """Make the tensors of adapter ``name``; ``plan`` is what :meth:`LinearTuner.plan` gave for this layer.
        Ends with :meth:`added`."""

    @abc.abstractmethod
    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r] of the adapter, with gradients."""

    def added(self, name: str, *, scaling: float, dropout: float, inference_mode: bool) -> None:
        self.scaling[name] = scaling
        # new modules are in training mode: an adapter added to a model in evaluation mode must not drop inputs
        self.adapter_dropout[name] = (nn.Dropout(dropout) if dropout > 0 else nn.Identity()).train(self.training)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.scaling:
                a, b = self.lora_factors(name)
                dropped = self.adapter_dropout[name](self._cast_input_dtype(x, a.dtype))
                result = result + self.scaling[name] * F.linear(F.linear(dropped, a), b)
        return result.to(dtype)

    def get_delta_weight(self, name: str) -> Tensor:
        """scaling B A, in the layout of the base weight, computed in float32."""
        a, b = self.lora_factors(name)
        delta = self.scaling[name] * (b.float() @ a.float())
        return delta.T if is_transposed(self.get_base_layer()) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.scaling:
                merged = self._with_delta(self.get_delta_weight(name))
                if safe_merge and not torch.isfinite(merged).all():
                    raise InputError(f"merging adapter {name!r}", must="give finite weights", do="train it again")
                self.get_base_layer().weight.data = merged
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop())
            self.get_base_layer().weight.data = self._with_delta(-delta)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _get_available_adapters(self) -> set[str]:
        return set(self.scaling)

    def _with_delta(self, delta: Tensor) -> Tensor:
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.shape != delta.shape:
            raise InputError(
                f"merging into {type(base).__name__}",
                must="find a float weight",
                do="merge before the model is quantised, or keep the adapter beside it (export_lora)",
            )
        return (weight.data.float() + delta.to(weight.device)).to(weight.dtype)


class LinearTuner(BaseTuner):
    """Puts ``tuner_layer_cls`` around every targeted linear layer. Subclasses set it and ``prefix``."""

    prefix: str
    tuner_layer_cls: type[LowRankLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares it on instances)

    @abc.abstractmethod
    def plan(self, config: Any, found: list[Projection]) -> Mapping[str, Any]:
        """What each of the targeted layers gets, by path. Refuses what cannot work, before the model is changed."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config.target_modules = target_names(self.model, peft_config.target_modules or ALL_LINEAR)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._plan = dict(self.plan(peft_config, projections(model, peft_config.target_modules)))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = self._plan.pop(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.add_adapter(adapter_name, peft_config, plan)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.add_adapter(adapter_name, peft_config, plan)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register_tuner(name: str, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Make ``PeftType(NAME)`` known to PEFT with these classes; importing the same module again renews them.

    Raises KeyError where PEFT or another package has a method of that name.
    """
    if name.upper() not in list(PeftType):
        _add_member(name.upper())
    kind = PeftType(name.upper())
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if known is not None and (known.__module__, known.__qualname__) == (
        tuner_class.__module__,
        tuner_class.__qualname__,
    ):
        for mapping in (
            PEFT_TYPE_TO_TUNER_MAPPING,
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        ):
            mapping.pop(kind, None)
    register_peft_method(name=name, config_cls=config_class, model_cls=tuner_class)


def _add_member(value: str) -> None:
    # Enum has no public way to grow; these are the places where it keeps its members
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
    PeftType._member_names_.append(value)
    type.__setattr__(PeftType, value, member)
