"""What LaVIN trains, and the places in a decoder and a vision transformer that its adapters stand before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.front_end import Projector

if TYPE_CHECKING:
    from gossamer.adapters.lavin import LaVINConfig


class Adapter(nn.Module):
    """y of the equations for x [b, t, width]; ``routes`` [b, 2] are w, ignored by a single expert."""

    def __init__(self, width: int, config: LaVINConfig, *, experts: int = 2, routed: bool = True) -> None:
        super().__init__()
        self.scale, self.tau = config.scale, config.tau
        self.down = nn.Linear(width, config.dim)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.ModuleList(_Grouped(config.dim, width, config.groups) for _ in range(experts))
        self.router = nn.Linear(width, 2) if routed and experts == 2 else None

    def routes(self, first: Tensor) -> Tensor | None:
        """w [b, 2] from x_0 [b, width]."""
        if self.router is None:
            return None
        logits: Tensor = self.router(first) / self.tau
        return logits.softmax(-1)

    def forward(self, x: Tensor, routes: Tensor | None) -> Tensor:
        z = self.dropout(self.down(x.to(self.down.weight)))
        if routes is None:
            return x + (self.scale * self.up[0](z)).to(x)
        mixed = sum(routes[:, place, None, None] * expert(z) for place, expert in enumerate(self.up))
        return x + (self.scale * mixed).to(x)

    def linear(self, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(M [width, width], c [width]) with y = (I + M) x + c for one w [2]."""
        weights = torch.ones(1) if routes is None else routes
        pairs: list[tuple[Tensor, Any]] = list(zip(weights, self.up, strict=True))
        up = torch.stack([weight * expert.dense() for weight, expert in pairs]).sum(0)
        bias = torch.stack([weight * expert.bias for weight, expert in pairs]).sum(0)
        return self.scale * up @ self.down.weight, self.scale * (up @ self.down.bias + bias)


class _Grouped(nn.Module):
    """A linear map in blocks: group g of the inputs gives group g of the outputs. Starts at zero."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, width_out // groups, width_in // groups))
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, z: Tensor) -> Tensor:
        parts = z.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...gi,goi->...go", parts, self.weight).flatten(-2) + self.bias

    def dense(self) -> Tensor:
        return torch.block_diag(*self.weight)


class Modules(nn.Module):
    """All that is trained: adapters by block, the modality token, and what belongs to the vision tower."""

    def __init__(self, blocks: int, width: int, vision: nn.Module | None, config: LaVINConfig) -> None:
        super().__init__()
        experts = 2 if config.router else 1
        make = lambda: Adapter(width, config, experts=experts)  # noqa: E731
        self.attn = nn.ModuleList(make() for _ in range(blocks))
        self.ffn = nn.ModuleList(make() for _ in range(blocks * (config.where == "block")))
        self.modality = nn.Embedding(2, width) if config.router else None
        if vision is not None:
            wide = int(vision.config.hidden_size)  # type: ignore[union-attr,arg-type]
            self.projector = Projector("bottleneck", wide, width, hidden=config.hidden_proj)
            kind = config.visual_adapter
            count = 0 if kind == "none" else len(vision_blocks(vision))
            own = lambda: Adapter(wide, config, experts=1 + (kind == "router"))  # noqa: E731
            self.vision = nn.ModuleList(own() for _ in range(count))


class SelfRouted:
    """An adapter whose router reads the first place of its own input."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.adapter.routes(x[:, 0].to(self.adapter.down.weight)))


def before(module: nn.Module, change: Any) -> Any:
    """Change the hidden states that ``module`` gets, first argument or keyword."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def text_blocks(model: Any, name: str = "lavin") -> list[Any]:
    """The decoder's blocks; InputError where they are not pre-norm blocks with q, k and v projections."""
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    wanted = ("input_layernorm", "self_attn", "mlp")
    if not layers or not all(hasattr(layers[0], part) for part in wanted) or not hasattr(layers[0].self_attn, "q_proj"):
        raise InputError(
            f"{name}.attach",
            must="get a causal model of pre-norm blocks with input_layernorm, self_attn.q_proj and mlp",
            got=type(model).__name__,
            do="use a Llama, Gemma, Qwen or Mistral model",
        )
    return list(layers)


def vision_blocks(vision: nn.Module) -> list[Any]:
    """Blocks of a vision transformer in order, found by their parts (DINOv2, ViT, CLIP, SigLIP)."""
    norms = ("norm1", "layernorm_before", "layer_norm1")
    found = [block for block in vision.modules() if any(hasattr(block, name) for name in norms)]
    if not found:
        raise InputError(
            "lavin: vision", must="be a vision transformer of pre-norm blocks", got=type(vision).__name__,
            do="use DINOv2, ViT, CLIP's or SigLIP's vision model",
        )  # fmt: skip
    return found


def attention(block: Any) -> nn.Module:
    return block.attention if hasattr(block, "attention") else block.self_attn
