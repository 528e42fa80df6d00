"""What the decoding runner keeps of a request, and the new tokens of a step as a tree.

A :class:`State` is one request: keys and values of every layer for ``length`` tokens, in tensors of a fixed capacity.
States know nothing of one another, so a step takes any of them in any order, each with its own number of new tokens,
and nothing is padded. Layers with a sliding window keep their whole past too: the window is a matter of what a query
looks at, and cutting back is exact.

New tokens of a step are a :class:`Tree`: ``parents[i] < i`` is the token that ``i`` follows, -1 the last token of the
state. Their keys and values are written behind the past, in the order given. Of a chain they simply become the past; of
a tree they are pending until :meth:`State.keep` says which path was accepted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.huge_pages import mapped

BEFORE_NORM = 1_000_000  # as a number of hidden states: the last layer's output before the final norm
LANES = 16  # keys of a block in the native layout
_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class Tree:
    """``visible`` [n, n]: bit j of ``ancestors[i]`` says that i sees j; depth 0 follows the last token of the state."""

    ancestors: tuple[int, ...]
    depths: tuple[int, ...]
    chain: bool

    def visible(self) -> Tensor:
        rows = [[bool(bits >> j & 1) for j in range(len(self.depths))] for bits in self.ancestors]
        return torch.tensor(rows, dtype=torch.bool)

    def paths(self) -> list[list[int]]:
        """Root-to-leaf paths as indices."""
        inner = {path[-2] for path in map(_bits, self.ancestors) if len(path) > 1}
        return [_bits(bits) for i, bits in enumerate(self.ancestors) if i not in inner]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of one request in one step. ``logits`` says of which they are wanted: "last", "all" or "none"."""

    state: Any
    tokens: Sequence[int]
    tree: Tree
    logits: str = "last"


@dataclasses.dataclass(frozen=True)
class Output:
    """What a chunk gives: float32 ``logits`` [as many as wanted, V]; ``hidden`` [layers asked for, new tokens, d]."""

    logits: Tensor
    hidden: Tensor | None


def chain(count: int) -> Tree:
    return Tree(tuple((2 << i) - 1 for i in range(count)), tuple(range(count)), True)


def tree_from(count: int, parents: Sequence[int] | None, mask: Tensor | None, positions: Sequence[int] | None) -> Tree:
    """A tree of ``count`` tokens from parents or a mask [n, n] of what each sees; :class:`InputError` where it is none.

    ``positions``, counted from the first place behind the past, must be what the tree says.
    """
    if parents is None and mask is None:
        tree = chain(count)
    else:
        ancestors = _from_parents(count, parents) if parents is not None else _from_mask(count, mask)
        tree = Tree(ancestors, tuple(bits.bit_count() - 1 for bits in ancestors), ancestors == chain(count).ancestors)
    if positions is not None and tuple(positions) != tree.depths:
        raise InputError("positions", must=f"be the depths {list(tree.depths)}", got=list(positions))
    return tree


class State:
    """One request of a runner. ``length`` tokens are settled; ``room`` more fit.

    ``keys[l]``, ``values[l]`` are float [kv heads, capacity, head_dim]; with ``blocked`` keys are
    [kv heads, capacity / 16, head_dim, 16], so that a vector holds the same place of 16 keys.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], capacity: int, dtype: torch.dtype, device: Any, blocked: bool
    ):
        self.capacity, self.blocked, self.length = capacity, blocked, 0
        self.pending: Tree | None = None
        self.addresses: Any = None  # of keys and values, as the kernels take them
        blocks = -(-capacity // LANES)
        values = [(h, blocks * LANES, d) for h, d in shapes]
        keys = [(h, blocks, d, LANES) for h, d in shapes] if blocked else values
        # a masked place is multiplied by zero, so it must never hold NaN
        zeros = _zeros([*keys, *values], dtype, device)
        self.keys, self.values = zeros[: len(keys)], zeros[len(keys) :]

    @property
    def room(self) -> int:
        return self.capacity - self.length

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens, and what is pending."""
        if not 0 <= length <= self.length:
            raise InputError("crop", must=f"keep from 0 to {self.length} tokens", got=length)
        self.length, self.pending = length, None

    def keep(self, indices: Sequence[int]) -> None:
        """Settle a verified tree: its tokens ``indices``, a path from the root (any length), become the past."""
        tree = settled_path(self.pending, indices)
        self.pending = None
        if list(indices) != list(range(len(indices))):
            old, new = self.length + torch.tensor(indices), self.length + torch.arange(len(indices))
            for keys, values in zip(self.keys, self.values, strict=True):
                values[:, new] = values[:, old]
                if self.blocked:
                    keys[:, new // LANES, :, new % LANES] = keys[:, old // LANES, :, old % LANES]
                else:
                    keys[:, new] = keys[:, old]
        assert len(indices) <= len(tree.depths)
        self.length += len(indices)

    def fork(self) -> State:
        """A copy that goes its own way."""
        twin = State.__new__(State)
        twin.__dict__.update(self.__dict__)
        twin.addresses = None
        used = self.length + (0 if self.pending is None else len(self.pending.depths))
        old = [*self.keys, *self.values]
        new = _zeros([tuple(tensor.shape) for tensor in old], old[0].dtype, old[0].device)
        for place, (source, target) in enumerate(zip(old, new, strict=True)):
            end = -(-used // LANES) if self.blocked and place < len(self.keys) else used
            target[:, :end] = source[:, :end]
        twin.keys, twin.values = new[: len(self.keys)], new[len(self.keys) :]
        return twin

    def check(self, count: int, where: str) -> None:
        """:class:`InputError` unless ``count`` new tokens may follow now."""
        check_new(self, count, where)


def check_new(state: Any, count: int, where: str) -> None:
    """Refuse new tokens for a state that is full, or whose last tree was not settled."""
    if state.pending is not None:
        raise InputError(where, must="follow a settled past", got="a pending tree", do="call keep() or crop() first")
    if count < 1 or count > state.room:
        raise InputError(
            where,
            must=f"add from 1 to {state.room} tokens to the {state.length} of a state of {state.capacity}",
            got=count,
            do="make the runner with a larger max_length",
        )


def settled_path(tree: Tree | None, indices: Sequence[int]) -> Tree:
    if tree is None:
        raise InputError("keep", must="follow verify()", got="nothing pending")
    bits = 0
    for index in indices:
        bits |= 1 << index if 0 <= index < len(tree.depths) else 0
        if not 0 <= index < len(tree.depths) or tree.ancestors[index] != bits:
            raise InputError("keep", must="get a path of the verified tree from its root", got=list(indices))
    return tree


def _from_parents(count: int, parents: Sequence[int]) -> tuple[int, ...]:
    if len(parents) != count or any(not -1 <= parent < i for i, parent in enumerate(parents)):
        raise InputError("parents", must=f"be {count} indices of earlier tokens, or -1", got=list(parents))
    found: list[int] = []
    for i, parent in enumerate(parents):
        found.append((found[parent] if parent >= 0 else 0) | 1 << i)
    return tuple(found)


def _from_mask(count: int, mask: Any) -> tuple[int, ...]:
    rows = torch.as_tensor(mask).bool().tolist()
    found = tuple(sum(1 << j for j, seen in enumerate(row) if seen) for row in rows)
    for i, bits in enumerate(found):
        above = bits & ~(1 << i)
        # all but the token itself must be exactly what its last ancestor sees
        fine = len(found) == count and bits >> i == 1 and above == (found[above.bit_length() - 1] if above else 0)
        if not fine:
            raise InputError("mask", must=f"be that of a tree of {count} tokens, parents first", got=f"row {i}")
    return found


def _bits(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def _zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: Any) -> list[Tensor]:
    """Zeros in one mapping of their own, whose pages are taken as they are written; each begins with a whole vector.

    Memory of the allocator, once used and freed, would be cleared from end to end, for room that few requests fill.
    """
    if torch.device(device).type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    memory = torch.frombuffer(mapped(sum(map(_aligned, sizes))), dtype=torch.uint8)
    found, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        found.append(memory[start : start + size].view(dtype).view(shape))
        start += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
