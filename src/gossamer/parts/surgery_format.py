"""Ragged widths in a model's config, from which ``from_pretrained`` and ``from_config`` rebuild the cut blocks.

``config.json`` carries, one entry a block,

    "gossamer_widths": {"heads": [12, 7, 0], "kv_heads": [12, 7, 0], "neurons": [1536, 0, 302]}

where 0 stands for a module that is gone. When a model class has built its blocks, right before transformers would set
up their weights, the blocks of a config with such a table are cut to it. Weights then load as into any other model:
nothing is loaded and cut afterwards. Without ``import gossamer`` the shapes in the file do not fit, which transformers
refuses.

Importing this module registers the format; it does so once and may be repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from gossamer.core.errors import InputError
from gossamer.parts.surgery import Block, find_blocks, resize_block

KEY = "gossamer_widths"
KINDS = ("heads", "kv_heads", "neurons")


def write_widths(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Write the widths of ``blocks``, those of ``model``, to every config in it that describes them."""
    table = {kind: [int(getattr(block, kind)) for block in blocks] for kind in KINDS}
    for config in _configs(model, blocks[0].path):
        setattr(config, KEY, table)


def read_widths(config: Any) -> dict[str, list[int]] | None:
    """The table of a config; ``None`` where nothing was cut, InputError where it is not whole."""
    table = getattr(config, KEY, None)
    if table is None:
        return None
    counts = {len(table[kind]) for kind in KINDS if isinstance(table, dict) and isinstance(table.get(kind), list)}
    if len(counts) != 1 or set(table) != set(KINDS):
        raise InputError(f"config.{KEY}", must=f"hold lists of one length for {KINDS}", got=table)
    return dict(table)


def rebuild(model: nn.Module) -> None:
    """Cut the freshly built blocks that ``model`` itself owns to the widths in its config."""
    table = read_widths(getattr(model, "config", None))
    if table is None or not _owns_blocks(model):
        return
    blocks = find_blocks(model)
    if len(blocks) != len(table["heads"]):
        raise InputError(f"config.{KEY}", must=f"describe {len(blocks)} blocks", got=len(table["heads"]))
    for block, heads, pairs, neurons in zip(blocks, *(table[kind] for kind in KINDS), strict=True):
        try:
            resize_block(block, heads, pairs, neurons)
        except InputError as error:
            raise InputError(f"config.{KEY}", must="fit the model", got=str(error)) from error


def _owns_blocks(model: nn.Module) -> bool:
    """Whether the stack of blocks is in ``model`` and not in a model inside of it, which has rebuilt them already."""
    inner = [name + "." for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)]
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return any(not name.startswith(tuple(inner)) for name in lists)


def _configs(model: nn.Module, path: str) -> Iterator[Any]:
    """Configs on the way from ``model`` to its blocks at ``path`` that describe these blocks."""
    owners = [
        m
        for name, m in model.named_modules()
        if isinstance(m, PreTrainedModel) and path.startswith(name and name + ".")
    ]
    own = owners[-1].config
    yield own
    for owner in owners[:-1]:
        if type(owner.config) is type(own):
            yield owner.config
        else:
            # a composite config may hold a copy of the part's
            yield from (part for part in vars(owner.config).values() if type(part) is type(own))


def _wrapped(post_init: Any) -> Any:
    @functools.wraps(post_init)
    def run(self: Any) -> None:
        rebuild(self)
        post_init(self)

    run.gossamer_widths = True  # type: ignore[attr-defined]
    return run


if not hasattr(PreTrainedModel.post_init, KEY):
    PreTrainedModel.post_init = _wrapped(PreTrainedModel.post_init)  # type: ignore[method-assign]
