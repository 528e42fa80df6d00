"""Deep prompts by hooks: learnt vectors among the tokens of a CLIP or SigLIP tower, removable and off at will.

A tower turns its input into tokens ``h_0 [n, t, d]`` and runs them through layers 0 ... L-1. Prompts are vectors
``P [J, M, d]``, M for each of the first J layers (independent vision-language prompting, Rasheed et al. 2023,
arXiv 2212.03640, after visual prompt tuning):

    vision   [h_0, P_0]                     after class and patch tokens, without positions, before the first norm
             [layer's first t tokens, P_l]  l = 1 ... J-1: what came out of the M slots is thrown away
             the M slots leave after the last layer, so that pooling and the output's shape are the tower's own
    text     the M slots are the places 1 ... M after the start token, filled by placeholder ids; P_0 stands in for
             their embeddings and gets the positions; the same replacement before layers 1 ... J-1

The ids stay as they were, so pooling at the end-of-text id finds its place. Layers are found by their class, since the
paths to them differ between versions of transformers. Hooks are objects that read their vectors from the module, so a
copied or reloaded model has prompts of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip

from gossamer.core.errors import InputError

_TOWERS: dict[str, tuple[type[nn.Module], ...]] = {
    "vision": (clip.CLIPVisionModel, siglip.SiglipVisionModel),
    "text": (clip.CLIPTextModel, siglip.SiglipTextModel),
}
_LAYERS = (clip.CLIPEncoderLayer, siglip.SiglipEncoderLayer)
_EMBEDDINGS = (clip.CLIPVisionEmbeddings, siglip.SiglipVisionEmbeddings)


class DeepPrompts(nn.Module):
    """``vectors [depth, tokens, width]``, drawn from N(0, std^2). With ``enabled`` False the tower is as without."""

    def __init__(
        self, width: int, *, tokens: int, depth: int, std: float = 0.02, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        assert tokens >= 1
        assert depth >= 1
        self.vectors = nn.Parameter(std * torch.randn(depth, tokens, width, generator=generator))
        self.enabled = True

    @property
    def tokens(self) -> int:
        return self.vectors.shape[1]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the tower computes what it does without prompts."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def at(self, layer: int, like: Tensor) -> Tensor:
        """The vectors of ``layer`` for the rows of ``like [n, t, d]``, in its dtype: [n, M, d]."""
        return self.vectors[layer].to(like).expand(len(like), -1, -1)


class PromptHooks:
    """What :func:`attach_prompts` returns; ``remove()`` takes the prompts out."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take all hooks off; the tower is bit for bit what it was."""
        while self._handles:
            self._handles.pop().remove()


def attach_prompts(model: nn.Module, side: str, prompts: DeepPrompts) -> PromptHooks:
    """Put ``prompts`` among the tokens of the ``side`` ("vision" or "text") tower of ``model``.

    ``model`` is any CLIP or SigLIP class that has the tower. Raises :class:`InputError` for a model without it, another
    width, more prompt layers than the tower has, or text prompts that leave no place for text.
    """
    tower = find_tower(model, side)
    layers = encoder_layers(tower)
    width = tower.config.hidden_size
    depth, tokens, given = prompts.vectors.shape
    where = f"{side} prompts of {type(model).__name__}"
    if given != width:
        raise InputError(where, must=f"be {width} wide, as the tower is", got=given)
    if depth > len(layers):
        raise InputError(where, must=f"reach at most its {len(layers)} layers", got=depth, do="lower the depth")
    handles: list[Any] = []
    if side == "vision":
        embedding = next(module for module in tower.modules() if isinstance(module, _EMBEDDINGS))
        handles.append(embedding.register_forward_hook(_Append(prompts)))
        handles.append(layers[-1].register_forward_hook(_Drop(prompts)))
    else:
        room = tower.config.max_position_embeddings
        if tokens + 2 > room:
            raise InputError(where, must=f"leave room for text in {room} places", got=f"{tokens} tokens")
        handles.append(tower.get_input_embeddings().register_forward_hook(_Fill(prompts)))
    for layer in range(1, depth):
        hook = _Replace(prompts, layer, last=side == "vision")
        handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
    return PromptHooks(handles)


def find_tower(model: nn.Module, side: str) -> Any:
    """The vision or text tower in ``model``, found by its class; :class:`InputError` where there is none."""
    for module in model.modules():
        if isinstance(module, _TOWERS[side]):
            return module
    raise InputError(
        type(model).__name__,
        must=f"have a {side} tower of CLIP or SigLIP",
        got="none",
        do=f"give one of {sorted(tower.__name__ for tower in _TOWERS[side])} or a model that holds it",
    )


def encoder_layers(tower: nn.Module) -> list[nn.Module]:
    """The tower's layers in order."""
    return [module for module in tower.modules() if isinstance(module, _LAYERS)]


class _Hook:
    def __init__(self, prompts: DeepPrompts) -> None:
        self.prompts = prompts


class _Append(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        return torch.cat([out, self.prompts.at(0, out)], dim=1) if self.prompts.enabled else out


class _Drop(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        return out[:, : -self.prompts.tokens] if self.prompts.enabled else out


class _Fill(_Hook):
    """``out [n, t, d]`` are embeddings of ids, positions not yet added."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        if not self.prompts.enabled:
            return out
        if out.shape[1] < self.prompts.tokens + 2:
            raise InputError(
                "text with prompts",
                must=f"hold a start token, {self.prompts.tokens} placeholders and an end token",
                got=f"{out.shape[1]} ids",
                do="put placeholder ids after the start token",
            )
        return _filled(out, self.prompts.at(0, out))


class _Replace(_Hook):
    def __init__(self, prompts: DeepPrompts, layer: int, *, last: bool) -> None:
        super().__init__(prompts)
        self.layer, self.last = layer, last

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.prompts.enabled:
            return None
        hidden = inputs[0] if inputs else named["hidden_states"]
        own = self.prompts.at(self.layer, hidden)
        hidden = torch.cat([hidden[:, : -own.shape[1]], own], dim=1) if self.last else _filled(hidden, own)
        return ((hidden, *inputs[1:]), named) if inputs else ((), {**named, "hidden_states": hidden})


def _filled(hidden: Tensor, own: Tensor) -> Tensor:
    """``hidden`` with the places 1 ... M taken by ``own [n, M, d]``."""
    return torch.cat([hidden[:, :1], own, hidden[:, 1 + own.shape[1] :]], dim=1)
