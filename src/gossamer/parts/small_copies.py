"""Small copies: a pruned model that stands for a whole one in training, and remembers what of it stayed.

The config of a small copy carries, and so does ``config.json``,

    "gossamer_small_copy": {"origin": "91c0...", "method": "stru", "zeros": 0.0, "sparse": [],
                            "heads": ["", "4:5", ...], "neurons": ["", "32:ff00ff00", ...]}

one entry a block: the number of head groups or neurons of the whole block and, in hexadecimal, one bit for each that
stayed (the lowest bit is the first); empty where the block was not cut. ``origin`` is the fingerprint of the whole
model. A copy that kept its shape has the paths of its pruned layers in ``sparse`` and the share of zeros in them in
``zeros``. Two copies are the same cut where all of this is equal.

A layer of the whole model is at the same path in the copy, with fewer rows (outputs), columns (inputs) or neither:

    gate, up, W_1    rows of the neurons that stayed         down, W_2    columns of them
    q; k and v       rows of the head groups that stayed     o            columns of them
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.surgery import Block, find_blocks, head_columns

KEY = "gossamer_small_copy"


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which of ``count`` units stayed, as rising indices."""

    count: int
    indices: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.count}:{sum(1 << index for index in self.indices):x}"

    @classmethod
    def parse(cls, text: str) -> Kept:
        """The inverse of ``str``; ValueError for anything else."""
        count, _, bits = text.partition(":")
        mask = int(bits, 16)
        if mask < 0 or mask.bit_length() > int(count):
            raise ValueError(f"{text!r} keeps more than it has")
        return cls(int(count), tuple(index for index in range(int(count)) if mask >> index & 1))


@dataclasses.dataclass(frozen=True)
class SmallCopy:
    """The record above; ``None`` in ``heads`` and ``neurons`` where nothing was cut."""

    origin: str
    method: str
    heads: tuple[Kept | None, ...]
    neurons: tuple[Kept | None, ...]
    zeros: float = 0.0
    sparse: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        named = {name: ["" if kept is None else str(kept) for kept in getattr(self, name)] for name in _LISTS}
        return {"origin": self.origin, "method": self.method, "zeros": self.zeros, "sparse": list(self.sparse), **named}

    @classmethod
    def from_dict(cls, record: Any) -> SmallCopy:
        """InputError where it is not such a record."""
        try:
            lists = {name: tuple(Kept.parse(text) if text else None for text in record[name]) for name in _LISTS}
            sparse = float(record["zeros"]), tuple(str(path) for path in record["sparse"])
            if len(lists["heads"]) != len(lists["neurons"]):
                raise ValueError("its lists differ in length")
            return cls(str(record["origin"]), str(record["method"]), lists["heads"], lists["neurons"], *sparse)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            do = "take the config.json that was saved with the copy"
            raise InputError(f"config.{KEY}", must="be the record of a small copy", got=error, do=do) from error


_LISTS = ("heads", "neurons")


def write_record(model: Any, record: SmallCopy) -> None:
    """Put the record into the config of ``model``, from which ``save_pretrained`` writes it."""
    setattr(model.config, KEY, record.as_dict())


def read_record(model: Any) -> SmallCopy | None:
    """The record of a small copy, ``None`` where ``model`` is none; InputError where the record is not whole."""
    found = getattr(getattr(model, "config", None), KEY, None)
    return None if found is None else SmallCopy.from_dict(found)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer of the copy stands in the whole one: indices of its rows and columns, ``None`` for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def places(base: nn.Module, record: SmallCopy) -> dict[str, Place]:
    """Path of each layer that was cut -> its place in ``base``, the whole model.

    InputError where ``base`` has other blocks, heads or neurons than the record says.
    """
    blocks = find_blocks(base)
    if len(blocks) != len(record.heads):
        raise InputError("the whole model", must=f"have {len(record.heads)} blocks", got=len(blocks), do=_OTHER)
    found: dict[str, Place] = {}
    for block, heads, neurons in zip(blocks, record.heads, record.neurons, strict=True):
        layout = block.layout
        if neurons is not None:
            _fits(block, neurons, block.neurons, "neurons")
            index = torch.tensor(neurons.indices)
            inside = {name: Place(rows=index) for name in layout.ins} | {layout.down: Place(columns=index)}
            found |= {f"{block.path}.{name}": place for name, place in inside.items()}
        if heads is not None:
            _fits(block, heads, block.head_groups, "head groups")
            found |= {f"{block.path}.{name}": place for name, place in _attention(block, heads.indices).items()}
    return found


@contextlib.contextmanager
def zeros_kept(model: nn.Module) -> Iterator[None]:
    """Inside, weights of a sparse copy that are 0 get no gradient, so that training leaves them 0.

    Of any other model nothing is held. Optimizers that move weights without gradients are not for this.
    """
    record = read_record(model)
    handles = [_held(model.get_submodule(path).weight) for path in (record.sparse if record is not None else ())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spread(part: Tensor, index: Tensor | None, count: int, axis: int) -> Tensor:
    """``part`` with its entries along ``axis`` at ``index`` of ``count``, zeros elsewhere."""
    if index is None:
        return part
    shape = list(part.shape)
    shape[axis] = count
    return part.new_zeros(shape).index_copy_(axis, index.to(part.device), part)


_OTHER = "give the model that the copy was made of"


def _held(weight: Any) -> Any:
    wanted = weight.requires_grad
    weight.requires_grad_(True)  # else no hook can be put on it
    handle = weight.register_hook(functools.partial(torch.mul, weight.detach() != 0))
    weight.requires_grad_(wanted)
    return handle


def _attention(block: Block, groups: Sequence[int]) -> dict[str, Place]:
    layout, columns = block.layout, head_columns(block, groups)
    found = {layout.out: Place(columns=columns)}
    if not layout.pairs:
        fused = torch.cat([columns + part * block.heads * block.head_width for part in range(3)])
        return found | {layout.queries: Place(rows=fused)}
    found[layout.queries] = Place(rows=columns)
    if block.kv_heads == block.head_groups:
        width = block.head_width
        rows = torch.tensor([group * width + place for group in groups for place in range(width)])
        found |= {name: Place(rows=rows) for name in layout.pairs}
    return found


def _fits(block: Block, kept: Kept, count: int, what: str) -> None:
    if kept.count != count:
        raise InputError(f"{block.path}: {what}", must=f"be {kept.count} in the whole model", got=count, do=_OTHER)
