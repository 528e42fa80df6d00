"""Muon: momentum, orthogonalised, for the matrices inside a network; AdamW for the rest.

    M = mu M + (1 - mu) G,   G' = (1 - mu) G + mu M,   O = NS(G') ~ U V^T  of  G' = U S V^T
    W = (1 - lr * wd) W - 0.2 lr sqrt(max(n, m)) O        W [n, m]

NS are five Newton-Schulz steps. The factor gives updates the size of AdamW's (Liu et al., arXiv 2502.16982), so that
both share one rate. Embedding tables, the output layer and whatever is no matrix are AdamW's; both are torch's own
classes. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def muon(
    model: Any,
    lr: float,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.Optimizer:
    """One optimizer for all parameters of ``model`` that require gradients; only Muon's matrices decay."""
    tables = {id(p) for table in _tables(model) for p in table.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in tables]
    inside = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in inside]
    kinds: list[torch.optim.Optimizer] = []
    if matrices:
        scale = "match_rms_adamw"
        kinds.append(
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=scale)
        )
    if rest:
        kinds.append(torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0, fused=True))
    return Together(kinds)


class Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups one after another, one state."""

    def __init__(self, kinds: list[torch.optim.Optimizer]) -> None:
        self._kinds = kinds
        groups = [{**group, "kind": number} for number, kind in enumerate(kinds) for group in kind.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, kind in enumerate(self._kinds):
            # loading a state puts new groups and a new state here
            kind.state = self.state
            kind.param_groups = [group for group in self.param_groups if group["kind"] == number]
            kind.step()
        return loss


def _tables(model: Any) -> list[nn.Module]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found if output is None else [*found, output]
