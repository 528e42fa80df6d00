"""LoRA: low-rank updates of the linear layers, by PEFT.

    y = W x + s B A dropout(x)      A: [r, d_in], Kaiming-uniform    B: [d_out, r], zero    s = alpha / r

Only A and B are trained: r (d_in + d_out) numbers a layer. rsLoRA has s = alpha / sqrt(r). This is PEFT's own tuner;
it is here so that recipes and experiments have the common baseline. "all-linear" is every linear layer of the
repeated blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import TunerAdapter
from gossamer.parts.injection import Projection, check_rank, is_transposed, projections, target_names, task_type

if TYPE_CHECKING:
    from peft import LoraConfig

CARD = Card(
    title="LoRA",
    paper="2106.09685",
    year=2021,
    claim="",
    traits=("identity_at_init", "mergeable", "lora_exportable"),
    provides=("adapter_attached",),
    forbids=("adapter_attached",),
    builtin=True,
)


class LoRAConfig(Config):
    rank: int = option(8, "rank r of each layer's update", ge=1)
    alpha: float = option(16.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = option(0.0, "share of a layer's inputs dropped before A, in training", ge=0, lt=1)
    target_modules: str | tuple[str, ...] = option("all-linear", '"all-linear", names of layers, or a path expression')
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")


class LoRA(TunerAdapter):
    """LoRA of one rank on all targeted layers."""

    config_class = LoRAConfig
    config: LoRAConfig

    def peft_config(self, model: nn.Module) -> LoraConfig:
        from peft import LoraConfig

        found = projections(model, self.config.target_modules)
        check_rank("lora.rank", self.config.rank, found)
        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]
            lora_dropout=self.config.dropout,
            use_rslora=self.config.use_rslora,
            target_modules=target_names(model, self.config.target_modules),  # type: ignore[arg-type]
            fan_in_fan_out=any(is_transposed(projection.module) for projection in found),
            task_type=task_type(model),
        )
        _accept_other_linears(config, found)
        return config


def _accept_other_linears(config: LoraConfig, found: list[Projection]) -> None:
    """PEFT refuses linear classes that it does not know, such as quantised ones of other packages."""
    from peft.tuners.lora import Linear

    foreign = {
        type(projection.module)
        for projection in found
        if not isinstance(projection.module, nn.Linear) and not is_transposed(projection.module)
    }
    if foreign:
        config._register_custom_module(dict.fromkeys(foreign, Linear))
