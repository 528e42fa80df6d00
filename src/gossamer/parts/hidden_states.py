"""Hidden states of decoder blocks, taken where they are made.

The input of block l is the state h_l [b, t, d] that the residual stream has there: h_0 is the embedding. What is kept
is one position a row, the last real token, so that memory does not grow with the text and the output head never runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.generation import left_pad


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a causal model's blocks, found by its length: config.num_hidden_layers."""
    config: Any = model.config
    layers = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise InputError(
        type(model).__name__,
        must=f"hold its {layers} blocks in one list",
        got="none of that length",
        do="give a decoder model of transformers",
    )


class LastTokens:
    """What :func:`watch` collects: ``states()`` of the latest forward pass."""

    def __init__(self, layers: int) -> None:
        self.taken: list[Tensor | None] = [None] * layers

    def states(self) -> Tensor:
        """float32 [b, L, d]: per row and watched block its input at the last position."""
        held = [state for state in self.taken if state is not None]
        assert len(held) == len(self.taken), "no forward pass has run"
        return torch.stack(held, dim=1)


@contextlib.contextmanager
def watch(model: nn.Module, layers: Sequence[int]) -> Iterator[LastTokens]:
    """While open, keep the inputs of ``layers`` at the last position of every forward pass.

    With padding on the left, as ``generate`` has it, the last position is the last real token of each row.
    """
    blocks, seen = decoder_blocks(model), LastTokens(len(layers))

    def keep(place: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named["hidden_states"]
            seen.taken[place] = hidden[:, -1].detach().float()

        return hook

    handles = [
        blocks[layer].register_forward_pre_hook(keep(place), with_kwargs=True) for place, layer in enumerate(layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_token_states(
    model: Any, rows: Sequence[Sequence[int]], layers: Sequence[int], *, pad: int = 0, batch_size: int = 16
) -> Tensor:
    """Inputs of the blocks ``layers`` at the last token of each row of ids: float32 [n, L, d], on the CPU.

    Rows of like length share a batch. The model runs in evaluation mode and without its output head.
    """
    out = torch.empty(0)
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
    training = model.training
    model.eval()
    try:
        with watch(model, layers) as seen:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                inputs = left_pad([rows[n] for n in chosen], pad, model.device)
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                model.base_model(**inputs, position_ids=positions, use_cache=False)
                states = seen.states().cpu()
                out = torch.empty(len(rows), *states.shape[1:]) if start == 0 else out
                out[torch.tensor(chosen)] = states
    finally:
        model.train(training)
    return out
