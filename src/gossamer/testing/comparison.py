"""Comparing what systems give: copies that later changes do not reach, and where two of them differ, in words."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def differs(one: Any, other: Any, *, atol: float = 0.0, where: str = "") -> str:
    """Where two outcomes differ, in words; empty where they are the same. ``atol`` is relative to the largest value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{where or 'tensor'} {tuple(one.shape)} {one.dtype} against {tuple(other.shape)} {other.dtype}"
        if torch.equal(one, other) or not one.numel():
            return ""
        gap = (one.double() - other.double()).abs().nan_to_num(posinf=float("inf")).max().item()
        scale = max(1.0, other.double().abs().nan_to_num().max().item())
        same_nan = torch.equal(one.isnan(), other.isnan())
        return (
            ""
            if same_nan and gap <= atol * scale
            else f"{where or 'tensor'} by up to {gap:.3g} (values up to {scale:.3g})"
        )
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where} has {sorted(map(str, one.keys() ^ other.keys()))} on one side"
        pairs = [(one[key], other[key], f"{where}.{key}".lstrip(".")) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where} has {len(one)} against {len(other)} items"
        pairs = [(a, b, f"{where}[{place}]") for place, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float):
        close = one == other or abs(one - other) <= atol * max(1.0, abs(other)) or (one != one and other != other)
        return "" if close else f"{where} {one!r} against {other!r}"
    else:
        return "" if one == other else f"{where} {one!r:.80} against {other!r:.80}"
    return next((found for a, b, place in pairs if (found := differs(a, b, atol=atol, where=place))), "")


def frozen(value: Any) -> Any:
    """A copy of ``value`` that later changes do not reach: of a model its tensors, modes and config."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module):
        config: Any = getattr(value, "config", None)
        generation: Any = getattr(value, "generation_config", None)
        return {
            "tensors": {name: tensor.detach().clone() for name, tensor in value.state_dict().items()},
            "trained": {name: parameter.requires_grad for name, parameter in value.named_parameters()},
            "gradients": {name: parameter.grad is not None for name, parameter in value.named_parameters()},
            "training": [name for name, module in value.named_modules() if module.training],
            "config": config.to_dict() if hasattr(config, "to_dict") else {},
            "generation": generation.to_dict() if hasattr(generation, "to_dict") else {},
        }
    if hasattr(value, "padding_side"):
        kept = ("padding_side", "truncation_side", "pad_token", "bos_token", "eos_token", "chat_template")
        return {name: getattr(value, name) for name in kept} | {"core": value.backend_tokenizer.to_str()}
    if hasattr(value, "to_dict"):
        return copy.deepcopy(value.to_dict())
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return copy.deepcopy(value)
