"""The gates of DyVTE and what they read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.parts.token_layouts import Layout
from gossamer.parts.token_selection import Run


class Gates(nn.Module):
    """A gate after each layer but the last: ``first`` [L - 1, w, 2d] and ``second`` [L - 1, 2, w], float32."""

    def __init__(self, layers: int, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(layers - 1, hidden, 2 * width))
        self.second = nn.Parameter(torch.empty(layers - 1, 2, hidden))
        for weights in (self.first, self.second):
            for matrix in weights.data:
                nn.init.xavier_uniform_(matrix, generator=generator)

    @property
    def operations(self) -> int:
        """Multiply-adds of one gate for one prompt."""
        return self.first[0].numel() + self.second[0].numel()

    def forward(self, done: int, z: Tensor) -> Tensor:
        """Logits (keep, exit) [b, 2] of the gate after ``done`` layers for z [b, 2d]."""
        return F.linear(F.gelu(F.linear(z, self.first[done - 1])), self.second[done - 1])


def gate_input(hidden: Tensor, layout: Layout, run: Run) -> Tensor:
    """z float32 [b, 2d] from states [b, t, d] of the tokens in ``layout``."""
    if "read" not in run.notes:
        run.notes["read"] = read_tokens(run)
    return torch.cat([_mean(hidden, layout.of(tokens)) for tokens in run.notes["read"]], dim=-1)


def read_tokens(run: Run) -> tuple[Tensor, Tensor]:
    """The text that a gate averages, and the last token of the prompt, bool [b, T] each."""
    places = torch.arange(run.image.shape[1], device=run.image.device)
    last = (places == (run.prompt * places).amax(1, keepdim=True)) & run.prompt
    text = run.prompt & ~run.image & ~last
    after = text & (places > (run.image * places).amax(1, keepdim=True))
    # an image after the question leaves no text behind it: then all text, and of no text at all the last token
    text = torch.where(after.any(1, keepdim=True), after, text)
    return torch.where(text.any(1, keepdim=True), text, last), last


def _mean(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen [b, t] states [b, t, d], float32 [b, d]."""
    return (hidden.float() * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True).clamp(min=1)
