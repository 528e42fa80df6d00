"""One step of the decoding runner as one call of the compiled kernels: all layers, integer or bfloat16 weights, float32
between.

Nothing is dispatched between two matrices, which is most of what a small model's step costs in torch. What a request
gives does not depend on the number of threads, on its company, or on whether tokens come as a chain or one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gossamer.parts.decode_native import Library, MatrixStruct, NativeMatrix, address
from gossamer.parts.decode_plan import Feed, Layer, Norm, Plan
from gossamer.parts.decode_state import BEFORE_NORM, LANES, Chunk, Output, State
from gossamer.parts.decode_step import embedded, outputs, positions_of
from gossamer.parts.decode_weights import GROUP, FloatWeight, Weight

_ACTS = ("silu", "gelu_tanh", "gelu")
_NORMS = ("before_attention", "after_attention", "before_feed", "after_feed", "q_norm", "k_norm")


class NormStruct(ctypes.Structure):
    """``Norm`` of the source."""

    _fields_ = (("gain", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float), ("kind", ctypes.c_int32))


class LayerStruct(ctypes.Structure):
    """``Layer`` of the source."""

    _fields_ = (
        *((name, MatrixStruct) for name in ("qkv", "out", "up", "down")),
        *((name, NormStruct) for name in _NORMS),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim", "window", "rope", "act", "gated")),
        ("scale", ctypes.c_float),
    )


class SpanStruct(ctypes.Structure):
    """``Span`` of the source."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "past", "blocks", "unused")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "visible", "depths")),
    )


class ModelStruct(ctypes.Structure):
    """``Model`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "cosines", "sines")),
        ("norm", NormStruct),
        *((name, ctypes.c_int32) for name in ("count", "width")),
    )


def native_fits(plan: Plan, matrices: dict[int, Weight]) -> bool:
    """Whether the kernels know every layer: dense, integer or bfloat16 matrices, widths in whole vectors."""

    def ready(layer: Layer) -> bool:
        feed, a = layer.feed, layer.attention
        found = [] if a is None else [a.qkv, a.out]
        if a is not None and a.head_dim % LANES:
            return False
        if isinstance(feed, Feed):
            found += [feed.up, feed.down]
        weights = [matrices[id(m)] for m in found]
        fits = all((isinstance(w, NativeMatrix) or is_half(w)) and w.inputs % GROUP == 0 for w in weights)
        return fits and (feed is None or (isinstance(feed, Feed) and feed.act_name in _ACTS))

    return all(ready(layer) for layer in plan.layers)


def is_half(weight: Any) -> TypeGuard[FloatWeight]:
    """Whether the kernels would take it as :class:`~gossamer.parts.decode_native.NativeHalf`."""
    return (
        isinstance(weight, FloatWeight) and weight.weight.dtype == torch.bfloat16 and weight.weight.device.type == "cpu"
    )


class NativeStep:
    def __init__(self, plan: Plan, matrices: dict[int, Weight], max_length: int, library: Library) -> None:
        self.plan, self.max_length, self.library = plan, max_length, library
        places = torch.arange(max_length)
        names = list(plan.ropes)
        tables = [plan.ropes[name](places, torch.float32) for name in names]
        # everything that the structures point at
        self.kept: list[Any] = [[t.contiguous() for t in pair] for pair in zip(*tables, strict=True)]
        layers = [self._layer(layer, matrices, names) for layer in plan.layers]
        self.kept += [matrices, (LayerStruct * len(layers))(*layers)]
        cosines, sines = (_pointers(t) for t in self.kept[:2]) if tables else (None, None)
        self.kept += [cosines, sines]
        self.model = ModelStruct(
            ctypes.addressof(self.kept[-3]),
            None if cosines is None else ctypes.addressof(cosines),
            None if sines is None else ctypes.addressof(sines),
            self._norm(plan.norm),
            len(layers),
            plan.width,
        )

    def open(self) -> State:
        return State([layer.cached for layer in self.plan.layers], self.max_length, torch.float32, "cpu", blocked=True)

    def run(self, chunks: Sequence[Chunk], hidden: tuple[int, ...], head: Callable[[Tensor], Tensor]) -> list[Output]:
        positions = positions_of(chunks) if self.plan.positions is not None else torch.empty(0)
        x = embedded(self.plan, chunks, positions).float().contiguous()
        last = torch.empty_like(x)
        count = len(self.plan.layers)
        wanted = {layer % (count + 1) for layer in hidden if layer != BEFORE_NORM} - {count}
        seen = [torch.empty_like(x) if layer in wanted else None for layer in range(count + 1)]
        kept: list[Any] = []
        spans = (SpanStruct * len(chunks))(*(_span(chunk, kept) for chunk in chunks))
        copies = _pointers(seen) if wanted else None
        self.library.calls.gossamer_step(
            ctypes.byref(self.model), spans, ctypes.c_int(len(chunks)), address(x), address(last), copies,
            ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip
        seen[-1] = last
        # the kernels add to x in place
        return outputs(chunks, [last if state is None else state for state in seen], x, hidden, head)

    def _layer(self, layer: Layer, matrices: dict[int, Any], ropes: list[str]) -> LayerStruct:
        """No heads, or no outputs of ``up``, where there is no attention or feed."""
        a, feed, found = layer.attention, layer.feed, LayerStruct()
        norms = {name: getattr(layer, name, None) for name in _NORMS}
        if a is not None:
            found.qkv, found.out = (matrices[id(matrix)].struct for matrix in (a.qkv, a.out))
            norms |= {"q_norm": a.q_norm, "k_norm": a.k_norm}
            found.heads, found.kv_heads, found.head_dim, found.scale = a.heads, a.kv_heads, a.head_dim, a.scale
            found.window, found.rope = a.window or 0, -1 if a.rope is None else ropes.index(a.rope)
        if isinstance(feed, Feed):
            found.up, found.down = (matrices[id(matrix)].struct for matrix in (feed.up, feed.down))
            found.act, found.gated = _ACTS.index(feed.act_name), feed.gated
        for name, norm in norms.items():
            setattr(found, name, self._norm(norm))
        return found

    def _norm(self, norm: Norm | None) -> NormStruct:
        if norm is None:
            return NormStruct(None, None, 0.0, 0)
        parts = [None if t is None else t.float().contiguous() for t in (norm.gain, norm.bias)]
        self.kept.append(parts)
        return NormStruct(*map(address, parts), norm.eps, 1 if norm.kind == "rms" else 2)


def _span(chunk: Chunk, kept: list[Any]) -> SpanStruct:
    state, tree, n = chunk.state, chunk.tree, len(chunk.tokens)
    if state.addresses is None:
        state.addresses = (_pointers(state.keys), _pointers(state.values))
    is_chain = tree.ancestors[-1] == (1 << n) - 1
    visible = None if is_chain else tree.visible().to(torch.uint8).contiguous()
    depths = (ctypes.c_int32 * n)(*tree.depths)
    kept += [visible, depths]
    keys, values = (ctypes.addressof(pointers) for pointers in state.addresses)
    blocks = state.keys[0].shape[1]
    return SpanStruct(n, state.length, blocks, 0, keys, values, address(visible), ctypes.addressof(depths))


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*map(address, tensors))
