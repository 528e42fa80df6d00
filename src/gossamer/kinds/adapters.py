"""Adapters: ``attach(model) -> model``, a model that trains a few parameters and leaves its own alone.

:class:`TunerAdapter` is a real PEFT tuner, so that ``save_pretrained``, ``PeftModel.from_pretrained``, merging and
switching are PEFT's own. :class:`ModuleAdapter` is for what does not sit inside a layer: hooks and own modules.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class Adapter(System):
    """Checks that both bases share."""

    verb = "attach"

    def check(self, model: nn.Module) -> None:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise InputError(
                f"{self.name}.attach",
                must="get a model without an adapter",
                got=type(model).__name__,
                do="merge or detach the adapter that it carries first",
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{self.name}.attach",
                must="get a model without an adapter",
                got=f"one that load_adapter gave {sorted(model.peft_config)}",  # type: ignore[arg-type]
                do="load it again without",
            )
        if hasattr(model, ModuleAdapter.slot):
            raise InputError(f"{self.name}.attach", must="get a model that has no adapter yet", do="detach it first")

    @abc.abstractmethod
    def attach(self, model: Any) -> Any:
        """Return ``model`` with the adapter in it; only the adapter's parameters require gradients."""

    @abc.abstractmethod
    def detach(self, model: Any) -> Any:
        """Take the adapter out: bit for bit the model that was attached to."""


class TunerAdapter(Adapter):
    """An adapter that PEFT handles. A subclass gives ``peft_config(model)``.

    Its PEFT config and tuner are PEFT's own, or classes made with :mod:`gossamer.parts.tuners` in the same file.
    """

    @abc.abstractmethod
    def peft_config(self, model: nn.Module) -> PeftConfig:
        """The PEFT config for this model. Widths and ranks are checked here, or by the tuner's ``plan``."""

    def attach(self, model: Any) -> PeftModel:
        from peft import get_peft_model

        config = self.peft_config(model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            attached: Any = get_peft_model(model, config)
        attached.gossamer_trainable = trainable
        return attached

    def finish(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(parameter.requires_grad for parameter in result.parameters()):
            raise InputError(f"{self.name}.attach", must="leave trainable parameters", do="widen target_modules")
        return result

    def detach(self, model: PeftModel) -> Any:
        if any(getattr(module, "merged_adapters", None) for module in model.modules()):
            raise InputError(
                f"{self.name}.detach",
                must="get an adapter that is not merged",
                do="call unmerge_adapter() first, which restores the weights up to rounding",
            )
        return _as_before(model, model.unload())

    def merge(self, model: PeftModel) -> Any:
        """Fold the adapter into the weights and return the plain model."""
        for path, module in model.named_modules():
            if hasattr(module, "merged_adapters") and not hasattr(module.get_base_layer(), "weight"):
                raise InputError(
                    f"{self.name}.merge",
                    must="find a float weight",
                    got=f"{type(module.get_base_layer()).__name__} at {path}",
                    do="merge before the model is quantised, or keep the adapter beside it with export_lora",
                )
        return _as_before(model, model.merge_and_unload(safe_merge=True))

    def export_lora(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter as an ordinary PEFT LoRA checkpoint that loads without Gossamer."""
        from gossamer.parts.lora import export_lora

        export_lora(model, Path(folder))


def _as_before(attached: Any, plain: Any) -> Any:
    """Give back ``requires_grad`` as it was before :meth:`TunerAdapter.attach`; PEFT leaves everything frozen."""
    trainable: set[str] = getattr(attached, "gossamer_trainable", set())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trainable)
    return plain


class ModuleAdapter(Adapter):
    """An adapter of hooks and own modules, kept in ``model.gossamer_adapter`` while attached."""

    slot: ClassVar[str] = "gossamer_adapter"

    @abc.abstractmethod
    def modules(self, model: nn.Module) -> nn.Module:
        """The trainable modules, freshly initialised for this model."""

    @abc.abstractmethod
    def hook(self, model: nn.Module, modules: nn.Module) -> list[Any]:
        """Install ``modules`` on ``model`` by forward hooks; returns the handles to remove them by."""

    def attach(self, model: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            modules = self.modules(model)
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(False)
        model.add_module(self.slot, modules)
        self._handles = self.hook(model, modules)
        return model

    def detach(self, model: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        delattr(model, self.slot)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        return model

    @contextlib.contextmanager
    def disabled(self, model: Any) -> Iterator[None]:
        """Inside, ``model`` computes as if nothing were attached."""
        for handle in self._handles:
            handle.remove()
        try:
            yield
        finally:
            self._handles = self.hook(model, getattr(model, self.slot))

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter's own weights and options."""
        from safetensors.torch import save_file

        from gossamer.core.paths import atomic_dir, write_json

        with atomic_dir(Path(folder)) as path:
            state = {name: tensor.contiguous() for name, tensor in getattr(model, self.slot).state_dict().items()}
            save_file(state, path / "adapter.safetensors")
            write_json(path / "adapter.json", {"system": self.name, "options": self.config.as_dict()})

    def load(self, model: Any, folder: Path) -> Any:
        """Attach to ``model`` with the weights that :meth:`save` wrote; :class:`InputError` where they do not fit."""
        from safetensors.torch import load_file

        attached = self.attach(model)
        own = getattr(attached, self.slot)
        state, shapes = load_file(Path(folder) / "adapter.safetensors"), _shapes(own.state_dict())
        if _shapes(state) != shapes:
            self.detach(attached)
            raise InputError(
                f"{self.name}: {folder}",
                must=f"hold the {len(shapes)} tensors of this adapter on this model",
                got=f"{len(state)}, some of other names or shapes",
                do="load it with the options and the model that it was saved with",
            )
        own.load_state_dict(state)
        return attached


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
