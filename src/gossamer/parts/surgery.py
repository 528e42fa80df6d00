"""Structured surgery: heads, neurons and whole modules are cut out of the blocks of a transformers model.

A block has two writers to the residual stream: the attention output ``W_o [d, n_q d_h]`` and the FFN output
``W_2 [d, d_ff]`` (``[in, out]`` where it is a Conv1D). What is cut is a *unit*, a run of their input columns, with
everything that feeds it:

    neuron j     column j of W_2; row j of W_1, or of gate and up; entry j of their biases
    head group   columns of W_o; rows of q, k, v (or of the fused qkv in its three parts) and their biases:
                   as many key-value heads as query heads   one head
                   fewer, but more than one                 a key-value head with all its query heads
                   one                                      one query head; k and v stay until the last one goes

A module without units left is replaced by one that adds nothing to the stream: the residual passes through, the norms
that stood around it go too (of a post-norm block, as BERT's, the norm after the sum stays), and an attention keeps
counting tokens in the cache. Norms of queries and keys are shared by heads and stay.

What is a block is for :mod:`gossamer.parts.surgery_blocks` to say. The widths that are left are written to the config,
from which ``from_pretrained`` rebuilds them (:mod:`gossamer.parts.surgery_format`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.injection import is_transposed
from gossamer.parts.surgery_blocks import Block, NoAttention, Nothing, find_blocks

__all__ = [
    "Block", "Keep", "cut", "cut_block", "drop_attention", "drop_ffn", "find_blocks", "head_columns", "keep_inputs",
    "keep_outputs", "resize_block",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Keep:
    """What stays of one block, by index as it is before the cut: ``None`` is all, an empty list drops the module."""

    head_groups: Sequence[int] | None = None
    neurons: Sequence[int] | None = None


def cut(model: nn.Module, keep: Mapping[int, Keep]) -> None:
    """Cut ``model`` in place to what ``keep`` says of each block (by its number), and write the widths to its config.

    InputError for a block that is not there, or indices that are not rising or beyond what it has.
    """
    from gossamer.parts.surgery_format import write_widths

    blocks = find_blocks(model)
    for index, kept in keep.items():
        if not 0 <= index < len(blocks):
            raise InputError(f"surgery: block {index}", must=f"be one of the {len(blocks)} of the model")
        cut_block(blocks[index], kept)
    write_widths(model, blocks)


def cut_block(block: Block, keep: Keep) -> None:
    """As :func:`cut` for one block, without the config."""
    if keep.head_groups is not None and block.has_attention:
        groups = _indices(keep.head_groups, block.head_groups, f"{block.path}: head groups")
        if groups:
            _cut_heads(block, groups)
        else:
            drop_attention(block)
    if keep.neurons is not None and block.has_ffn:
        neurons = _indices(keep.neurons, block.neurons, f"{block.path}: neurons")
        if neurons:
            index = torch.tensor(neurons)
            for name in block.layout.ins:
                keep_outputs(block.module.get_submodule(name), index)
            keep_inputs(block.module.get_submodule(block.layout.down), index)
            _set(block.module.get_submodule(block.layout.ffn), intermediate_size=len(neurons))
        else:
            drop_ffn(block)


def resize_block(block: Block, heads: int, kv_heads: int, neurons: int) -> None:
    """Cut a block to its first heads and neurons: to the widths that a cut left, not to what it kept.

    InputError where no cut of this block leaves these widths.
    """
    if heads and 1 < block.kv_heads < block.heads:
        cut_block(block, Keep(range(min(kv_heads, block.kv_heads))))
    cut_block(
        block,
        Keep(
            range(min(heads, block.head_groups)) if block.heads != heads else None,
            range(min(neurons, block.neurons)) if block.neurons != neurons else None,
        ),
    )
    found, wanted = (block.heads, block.kv_heads, block.neurons), (heads, kv_heads, neurons)
    if found != wanted:
        raise InputError(f"{block.path}: widths {wanted}", must="be what a cut of it leaves", got=found)


def drop_attention(block: Block) -> None:
    """Replace the attention by a pass-through that keeps the residual."""
    attention, layout = block.module.get_submodule(block.layout.attention), block.layout
    gone = NoAttention(block.head_width, getattr(attention, "layer_idx", block.index), passes=layout.post_norm)
    _replace(block.module, layout.attention, gone)
    if layout.post_norm:
        _replace(block.module, layout.out, Nothing())
    for norm in layout.attention_norms:
        _replace(block.module, norm, nn.Identity())


def drop_ffn(block: Block) -> None:
    """Replace the feed-forward module by a pass-through that keeps the residual."""
    layout = block.layout
    if layout.post_norm:
        _replace(block.module, layout.ffn, nn.Identity())
        _replace(block.module, layout.down, Nothing())
    else:
        _replace(block.module, layout.ffn, Nothing())
    for norm in layout.ffn_norms:
        _replace(block.module, norm, nn.Identity())


def head_columns(block: Block, groups: Sequence[int]) -> Tensor:
    """Columns of ``W_o`` that belong to ``groups`` of heads."""
    return _runs(groups, block.group_width)


def keep_inputs(layer: Any, index: Tensor) -> None:
    """Cut a linear layer or Conv1D in place to the inputs ``index``."""
    layer.weight = _part(_weight(layer), 0 if is_transposed(layer) else 1, index)
    _resized(layer)


def keep_outputs(layer: Any, index: Tensor) -> None:
    """Cut a linear layer or Conv1D in place to the outputs ``index``, bias included."""
    layer.weight = _part(_weight(layer), 1 if is_transposed(layer) else 0, index)
    if layer.bias is not None:
        layer.bias = _part(layer.bias, 0, index)
    _resized(layer)


def _cut_heads(block: Block, groups: list[int]) -> None:
    module, layout, width = block.module, block.layout, block.head_width
    heads, shared = block.heads, block.kv_heads == 1 < block.heads
    columns = head_columns(block, groups)
    if layout.pairs:
        keep_outputs(module.get_submodule(layout.queries), columns)
        for name in () if shared else layout.pairs:
            keep_outputs(module.get_submodule(name), _runs(groups, width))
    else:
        fused = torch.cat([columns + part * heads * width for part in range(3)])
        keep_outputs(module.get_submodule(layout.queries), fused)
    keep_inputs(module.get_submodule(layout.out), columns)
    left, left_pairs = len(columns) // width, 1 if shared else len(groups)
    _set(
        module.get_submodule(layout.attention), num_heads=left, num_attention_heads=left, all_head_size=left * width,
        split_size=left * width, num_key_value_heads=left_pairs, num_key_value_groups=left // left_pairs,
    )  # fmt: skip


def _indices(chosen: Sequence[int], count: int, where: str) -> list[int]:
    found = [int(index) for index in chosen]
    if found != sorted(set(found)) or (found and not 0 <= found[0] <= found[-1] < count):
        raise InputError(where, must=f"be kept by rising indices below {count}", got=found)
    return found


def _runs(groups: Sequence[int], width: int) -> Tensor:
    return torch.tensor([group * width + place for group in groups for place in range(width)])


def _weight(layer: nn.Module) -> Any:
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
        got, do = type(layer).__name__, "cut the float model, quantise it afterwards"
        raise InputError("surgery", must="cut layers with float weights", got=got, do=do)
    return layer.weight


def _part(parameter: nn.Parameter, axis: int, index: Tensor) -> nn.Parameter:
    part = parameter.detach().index_select(axis, index.to(parameter.device)).contiguous()
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _resized(layer: Any) -> None:
    if is_transposed(layer):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    module.train(block.training)
    setattr(block.get_submodule(owner), name, module)


def _set(module: Any, **values: int) -> None:
    """Set the attributes that ``module`` has."""
    for name, value in values.items():
        if hasattr(module, name):
            setattr(module, name, value)
