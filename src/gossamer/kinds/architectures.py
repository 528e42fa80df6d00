"""Architectures: ``build(base) -> PreTrainedModel``, a model class of Gossamer's own that the Auto classes know.

The model returns ``loss`` for a batch that its processor collates, so that the objective ``own_loss`` trains any of
them, and it names a batch of its own in ``dummy_inputs``.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from gossamer.core.errors import InputError
from gossamer.kinds.base import System


class Architecture(System):
    """Builds a model from options, and for the trait ``converts`` from a model that is there already.

    Importing the file of a subclass registers its config and model with transformers' Auto classes.
    """

    verb = "build"

    def check(self, base: Any = None) -> None:
        if self._converts and base is None:
            raise InputError(
                f"{self.name}.build",
                must="get a model to build on",
                got="none",
                do=f'pass one: system("{self.name}").build(model)',
            )
        if getattr(base, "peft_config", None):
            raise InputError(
                f"{self.name}.build",
                must="get a model without an adapter",
                got=f"adapters {sorted(base.peft_config)}",
                do="merge it first",
            )

    @property
    def _converts(self) -> bool:
        from gossamer.core import registry

        return "converts" in registry.find(self.name, kind="architectures").card.traits

    @abc.abstractmethod
    def build(self, base: Any = None) -> Any:
        """The model, in evaluation mode; new weights follow from :attr:`seed`. ``base`` itself is left as it is."""

    @abc.abstractmethod
    def processor(self, base: Any = None) -> Any:
        """What turns rows into batches of the built model; ``base`` is the processor of the model built on.

        It has ``examples(rows)``, ``collate(examples)``, ``save_pretrained`` and ``from_pretrained``.
        """

    def finish(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import CONFIG_MAPPING

        kind = result.config.model_type
        assert kind in CONFIG_MAPPING, f"{self.name} registers no config of type {kind!r}"
        for name, parameter in result.named_parameters():
            if not torch.isfinite(parameter).all():
                raise InputError(f"{self.name}: {name}", must="hold finite weights", got="NaN or Inf")
        return result.eval()
